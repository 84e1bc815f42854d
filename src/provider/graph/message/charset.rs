//! Octets to text. Every octet becomes something: what a charset does not have, a replacement character.

use std::borrow::Cow;

use mail_parser::decoders::charsets::map::charset_decoder;

/// What a text may be in that says nothing, or nothing true: of old mailers, and in practice.
const FALLBACK: &[u8] = b"windows-1252";

/// The text, and whether it is not quite what the octets or their charset said.
pub(super) fn decode<'a>(bytes: &'a [u8], charset: Option<&str>) -> (Cow<'a, str>, Said) {
    let label = charset.map(str::trim).unwrap_or_default().to_ascii_lowercase();
    match label.as_str() {
        "utf-8" | "utf8" => match std::str::from_utf8(bytes) {
            Ok(text) => (text.into(), Said::Truth),
            // Not spoilt, but never that.
            Err(_) if !has_sequence(bytes) => (guess(bytes), Said::Nonsense),
            Err(_) => (String::from_utf8_lossy(bytes), Said::Nonsense),
        },
        "" | "us-ascii" | "ascii" | "unknown-8bit" | "x-unknown" => {
            let said = if bytes.is_ascii() { Said::Truth } else { Said::Nothing };
            (guess(bytes), said)
        }
        _ => match charset_decoder(label.as_bytes()) {
            Some(decode) => {
                let text = decode(bytes);
                let said = if text.contains('\u{fffd}') { Said::Nonsense } else { Said::Truth };
                (text.into(), said)
            }
            None if bytes.is_ascii() => (guess(bytes), Said::Truth),
            None => (guess(bytes), Said::Nonsense),
        },
    }
}

/// What a label says about the octets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    Truth,
    /// Octets above 127, and no charset for them.
    Nothing,
    /// They are not of the charset, or it is not known.
    Nonsense,
}

/// Whether some of it is UTF-8 beyond ASCII.
fn has_sequence(bytes: &[u8]) -> bool {
    bytes.utf8_chunks().any(|chunk| !chunk.valid().is_ascii())
}

/// UTF-8 where it can be that, for hardly anything else looks like it.
fn guess(bytes: &[u8]) -> Cow<'_, str> {
    match (std::str::from_utf8(bytes), charset_decoder(FALLBACK)) {
        (Ok(text), _) => text.into(),
        (Err(_), Some(decode)) => decode(bytes).into(),
        (Err(_), None) => String::from_utf8_lossy(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_many_charsets_are_read() {
        for (charset, bytes, text, said) in [
            (Some("utf-8"), &b"caf\xc3\xa9"[..], "café", Said::Truth),
            (Some("UTF-8"), b"caf\xe9 \x80", "café €", Said::Nonsense),
            (Some("UTF-8"), b"caf\xc3\xa9 caf\xe9", "café caf\u{fffd}", Said::Nonsense),
            (None, b"cafe", "cafe", Said::Truth),
            (None, b"caf\xc3\xa9", "café", Said::Nothing),
            (None, b"\x93caf\xe9\x94", "“café”", Said::Nothing),
            (Some("us-ascii"), b"caf\xe9", "café", Said::Nothing),
            (Some("iso-8859-1"), b"caf\xe9 \x80", "café €", Said::Truth),
            (Some("Windows-1252"), b"\x93caf\xe9\x94", "“café”", Said::Truth),
            (Some(" cp1251 "), b"\xcf\xf0\xe8\xe2\xe5\xf2", "Привет", Said::Truth),
            (Some("iso-2022-jp"), b"\x1b$B%O%m!<\x1b(B", "ハロー", Said::Truth),
            (Some("shift_jis"), b"\x83n\x83\x8d\x81[", "ハロー", Said::Truth),
            (Some("gb2312"), b"\xc4\xe3\xba\xc3", "你好", Said::Truth),
            (Some("big5"), b"\xa7A\xa6n", "你好", Said::Truth),
            (Some("utf-7"), b"+ZYeB9FH6ckh5Pg-", "文致出版社", Said::Truth),
            (Some("utf-16"), b"\xff\xfeh\0i\0", "hi", Said::Truth),
            (Some("klingon"), b"qapla", "qapla", Said::Truth),
            (Some("klingon"), b"caf\xe9", "café", Said::Nonsense),
            (Some(""), b"x", "x", Said::Truth),
        ] {
            let (found, heard) = decode(bytes, charset);
            assert_eq!((found.as_ref(), heard), (text, said), "{charset:?}");
        }
    }

    #[test]
    fn no_octets_of_any_charset_stop_the_reader() {
        let all: Vec<u8> = (0..=255).cycle().take(1031).collect();
        let labels = [
            "utf-7",
            "utf-16",
            "utf-16be",
            "iso-2022-jp",
            "iso-2022-kr",
            "euc-jp",
            "euc-kr",
            "gb18030",
            "gbk",
            "hz-gb-2312",
            "big5",
            "shift_jis",
            "koi8-r",
            "ibm850",
            "macintosh",
            "x-user-defined",
            "x-mac-cyrillic",
            "tis-620",
            "iso-8859-8",
            "replacement",
            "cp1258",
            "\u{e9}",
            "a-label-that-is-far-longer-than-any-that-there-is-in-the-world",
        ];
        for label in labels {
            for skip in 0..5 {
                assert!(!decode(&all[skip..], Some(label)).0.is_empty(), "{label}");
            }
        }
    }
}
