use super::*;
use crate::smtp::testing::{Rng, rounds};

/// What DATA means, in the plainest words: content, whether a lone CR or LF was in it, octets used.
fn model(raw: &[u8]) -> Option<(Vec<u8>, bool, usize)> {
    let behind = [b"\r\n", raw].concat();
    let end = behind.windows(5).position(|window| window == b"\r\n.\r\n")?;
    let mut unstuffed = behind[..end + 2].to_vec();
    let mut at = 0;
    while let Some(found) = unstuffed[at..].windows(3).position(|window| window == b"\r\n.") {
        at += found + 2;
        unstuffed.remove(at);
    }
    let (content, bare) = normalised(&unstuffed[2..]);
    Some((content, bare, end + 5 - 2))
}

/// What becomes of lone CRs and LFs, one octet at a time.
fn normalised(text: &[u8]) -> (Vec<u8>, bool) {
    let (mut out, mut bare) = (Vec::new(), false);
    for (at, octet) in text.iter().enumerate() {
        let (before, after) = (at.checked_sub(1).map(|at| text[at]), text.get(at + 1));
        match octet {
            b'\r' if after == Some(&b'\n') => out.push(b'\r'),
            b'\r' => out.push(b' '),
            b'\n' if before == Some(b'\r') => out.push(b'\n'),
            b'\n' => out.extend(b"\r\n"),
            other => out.push(*other),
        }
        bare |= *octet == b'\r' && after != Some(&b'\n');
        bare |= *octet == b'\n' && before != Some(b'\r');
    }
    (out, bare)
}

/// Decodes `pieces` one after the other: content, lone ones met, octets used if the end was found.
fn decode(framing: Framing, pieces: &[&[u8]]) -> (Vec<u8>, bool, Option<usize>) {
    let (mut decoder, mut scratch) = (Decoder::new(framing), Vec::new());
    let (mut content, mut used) = (Vec::new(), 0);
    for piece in pieces {
        let mut piece = *piece;
        while !piece.is_empty() {
            let decoded = decoder.decode(piece, &mut scratch);
            assert!(decoded.used > 0, "no way forward");
            assert!(scratch.len() <= GATHER + RUN);
            match decoded.content {
                Content::Input(range) => content.extend_from_slice(&piece[range]),
                Content::Scratch => content.extend_from_slice(&scratch),
            }
            used += decoded.used;
            piece = &piece[decoded.used..];
            if decoded.end {
                return (content, decoder.bare_newline_seen(), Some(used));
            }
        }
    }
    content.extend_from_slice(decoder.finish());
    (content, decoder.bare_newline_seen(), None)
}

/// Whole, cut in two at every place, and byte by byte.
#[track_caller]
fn check(raw: &[u8]) {
    let expected = model(raw);
    let mut cuts: Vec<Vec<&[u8]>> = vec![vec![raw], raw.chunks(1).collect()];
    cuts.extend((1..raw.len()).map(|at| vec![&raw[..at], &raw[at..]]));
    for pieces in cuts {
        let (content, bare, used) = decode(Framing::Dots, &pieces);
        let found = used.map(|used| (content, bare, used));
        assert_eq!(found, expected, "{} in {pieces:?}", raw.escape_ascii());
    }
}

/// The content of `raw`, all of which must be used.
#[track_caller]
fn content(raw: &str, expected: &str) {
    check(raw.as_bytes());
    let (content, _, used) = model(raw.as_bytes()).unwrap();
    assert_eq!(
        (content.escape_ascii().to_string(), used),
        (expected.as_bytes().escape_ascii().to_string(), raw.len())
    );
}

#[test]
fn only_crlf_dot_crlf_ends_data() {
    for (raw, expected) in [
        (".\r\n", ""),
        ("\r\n.\r\n", "\r\n"),
        ("a\r\n.\r\n", "a\r\n"),
        ("a\r\n..\r\n.\r\n", "a\r\n.\r\n"),
        ("a\r\n...\r\n.\r\n", "a\r\n..\r\n"),
        ("..\r\n.\r\n", ".\r\n"),
        (".a\r\n.\r\n", "a\r\n"),
        ("a\r\n.b\r\n.\r\n", "a\r\nb\r\n"),
        ("a.\r\n.\r\n", "a.\r\n"),
        ("a\n.\n\r\n.\r\n", "a\r\n.\r\n\r\n"),
        ("a\n.\r\n\r\n.\r\n", "a\r\n.\r\n\r\n"),
        ("a\r\n.\nb\r\n.\r\n", "a\r\n\r\nb\r\n"),
        ("a\r.\r\r\n.\r\n", "a . \r\n"),
        ("a\r.\r\n\r\n.\r\n", "a .\r\n\r\n"),
        ("a\r\n.\rb\r\n.\r\n", "a\r\n b\r\n"),
        ("a\r\n.\r\r\n.\r\n", "a\r\n \r\n"),
        ("a\r\n.\r\r\n\r\n.\r\n", "a\r\n \r\n\r\n"),
        ("a\r\r\n.\r\n", "a \r\n"),
        ("a\r\r\r\n.\r\n", "a  \r\n"),
        ("a\n\r\n.\r\n", "a\r\n\r\n"),
        ("a\n\n\r\n.\r\n", "a\r\n\r\n\r\n"),
        ("a\r\n\n.\r\n\r\n.\r\n", "a\r\n\r\n.\r\n\r\n"),
        ("a\n\r.\r\n\r\n.\r\n", "a\r\n .\r\n\r\n"),
        ("a\0\r\n.\0\r\n.\r\n", "a\0\r\n\0\r\n"),
        ("a\0\n.\r\n\r\n.\r\n", "a\0\r\n.\r\n\r\n"),
        ("a\r\0\n.\r\n\r\n.\r\n", "a \0\r\n.\r\n\r\n"),
        ("a\r\n.\0\r\n.\r\n", "a\r\n\0\r\n"),
        ("a\r\n\0.\r\n.\r\n", "a\r\n\0.\r\n"),
        ("\n.\n\r\n.\r\n", "\r\n.\r\n\r\n"),
        (".\n\r\n.\r\n", "\r\n\r\n"),
        (".\r.\r\n.\r\n", " .\r\n"),
        ("a\r\n. \r\n.\r\n", "a\r\n \r\n"),
        ("a\r\n .\r\n.\r\n", "a\r\n .\r\n"),
        ("a\r\n..\n.\r\n\r\n.\r\n", "a\r\n.\r\n.\r\n\r\n"),
        ("a\n..\r\n.\r\n", "a\r\n..\r\n"),
        ("a\u{b}.\u{c}\u{85}\r\n.\r\n", "a\u{b}.\u{c}\u{85}\r\n"),
        ("a\u{2028}.\u{2028}\r\n.\r\n", "a\u{2028}.\u{2028}\r\n"),
        ("\r\r\n.\r\n", " \r\n"),
        ("\r\n\r\n\r\n.\r\n", "\r\n\r\n\r\n"),
    ] {
        content(raw, expected);
    }
}

#[test]
fn what_looks_like_an_end_is_none() {
    for raw in [
        "",
        ".",
        ".\r",
        ".\n",
        ".\r\r\n",
        "a.\r\n",
        "a\r\n.",
        "a\r\n.\r",
        "a\n.\n",
        "a\r.\r",
        "a\n.\r\n",
        "a\r\n.\n",
        "a\r.\r\n",
        "a\r\n.\r\r\n",
        "a\r\n..\r\n",
        "a\r\n.\0\r\n",
        "a\r\n. \r\n",
        "a\n.\r\r\n",
        "a\r\n\n.\r\n",
    ] {
        check(raw.as_bytes());
        assert_eq!(model(raw.as_bytes()), None, "{raw:?}");
    }
}

#[test]
fn what_follows_the_end_is_left_alone() {
    for raw in ["a\r\n.\r\nQUIT\r\n", ".\r\n.\r\n", "a\r\n.\r\n\r\n.\r\n"] {
        check(raw.as_bytes());
    }
}

#[test]
fn chunks_keep_their_dots_and_their_last_line_as_it_is() {
    for (raw, expected) in [
        ("", ""),
        (".\r\n", ".\r\n"),
        ("a\r\n.\r\nb", "a\r\n.\r\nb"),
        ("..\r\n.a", "..\r\n.a"),
        ("a\nb\rc\r", "a\r\nb c "),
        ("a\r\r\n\n", "a \r\n\r\n"),
        ("\r", " "),
        ("\r\n", "\r\n"),
    ] {
        let raw = raw.as_bytes();
        for at in 0..=raw.len() {
            let (content, _, _) = decode(Framing::Counted, &[&raw[..at], &raw[at..]]);
            assert_eq!(content, expected.as_bytes(), "{}", raw.escape_ascii());
        }
    }
}

#[test]
fn long_content_comes_as_it_lies_in_the_input() {
    let text = "An ordinary line of text, as most messages have them.\r\n".repeat(1000);
    let raw = format!("{text}..dots\r\n{text}lone\n{text}.\r\n");
    let (content, bare, used) = decode(Framing::Dots, &[raw.as_bytes()]);
    assert_eq!(content, format!("{text}.dots\r\n{text}lone\r\n{text}").into_bytes());
    assert!(bare);
    assert_eq!(used, Some(raw.len()));
    let mut scratch = Vec::new();
    let decoded = Decoder::new(Framing::Dots).decode(raw.as_bytes(), &mut scratch);
    assert_eq!(decoded.content, Content::Input(0..text.len()));
}

#[test]
fn a_dot_line_with_other_line_ends_is_noticed() {
    let ends = |raw: &[u8], framing| {
        let (mut decoder, mut scratch) = (Decoder::new(framing), Vec::new());
        for piece in raw.chunks(3) {
            let mut at = 0;
            while at < piece.len() {
                at += decoder.decode(&piece[at..], &mut scratch).used;
            }
        }
        decoder.bare_end_of_data()
    };
    for raw in
        [&b"a\n.\n"[..], b"a\r.\r", b".\n", b"a\r\n.\n", b"a\n.\r\n", b"hello\n.\n\n", b".\r"]
    {
        assert!(ends(raw, Framing::Dots), "{}", raw.escape_ascii());
        assert!(!ends(raw, Framing::Counted), "{}", raw.escape_ascii());
    }
    for raw in [&b""[..], b"a\r\n", b"a.\n", b"\n", b".", b"a\n.b\n", b"\n\n\n\n\n\n"] {
        assert!(!ends(raw, Framing::Dots), "{}", raw.escape_ascii());
    }
}

/// The decoder against the model, on what is made of the pieces that matter, at random cuts.
#[test]
fn decoder_agrees_with_the_model() {
    let pieces: [&[u8]; 12] = [
        b"\r\n",
        b"\r",
        b"\n",
        b".",
        b"\r\n.",
        b"\r\n.\r\n",
        b"\0",
        b"a",
        b"\n.\n",
        b"\r.\r",
        b"\xff",
        &[b'x'; 300],
    ];
    for seed in 0..rounds(4000) {
        let mut rng = Rng::new(seed);
        let mut raw = Vec::new();
        for _ in 0..rng.below(24) {
            raw.extend_from_slice(rng.pick(&pieces));
        }
        let mut cuts = Vec::new();
        let mut rest = raw.as_slice();
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rng.below(rest.len().min(40)) + 1);
            cuts.push(piece);
            rest = after;
        }
        for cuts in [cuts, vec![&raw]] {
            let (content, bare, used) = decode(Framing::Dots, &cuts);
            let found = used.map(|used| (content, bare, used));
            assert_eq!(found, model(&raw), "seed {seed}: {}", raw.escape_ascii());
            let (content, bare, _) = decode(Framing::Counted, &cuts);
            assert_eq!((content, bare), normalised(&raw), "seed {seed}");
        }
    }
}
