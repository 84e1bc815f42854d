//! What a message consists of for its readers: the texts that are its body, and its files.

use std::borrow::Cow;

use super::scan::{Kind, Node};
use super::{LossKind, Losses};

/// Positions of parts, each in the order of the message.
#[derive(Debug, Default)]
pub(super) struct Content {
    pub(super) texts: Vec<usize>,
    pub(super) files: Vec<usize>,
    pub(super) losses: Losses,
}

/// Where a part stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// It is the message.
    Root,
    /// The first of a multipart.
    First,
    Later,
}

/// Sorts the parts of a message.
pub(super) fn sort(nodes: &[Node]) -> Content {
    let mut content = Content::default();
    Walk { nodes }.walk(0, Place::Root, &mut content);
    content.files.sort_unstable();
    content
}

struct Walk<'a> {
    nodes: &'a [Node],
}

impl Walk<'_> {
    /// As deep as multiparts are opened.
    fn walk(&self, at: usize, place: Place, out: &mut Content) {
        let Some(node) = self.nodes.get(at) else { return };
        match &node.kind {
            Kind::Multipart(parts) => match node.entity.media_type() {
                "multipart/alternative" => self.alternative(parts, out),
                "multipart/related" => self.related(node, parts, out),
                _ => {
                    for (position, part) in parts.iter().enumerate() {
                        let place = if position == 0 { Place::First } else { Place::Later };
                        self.walk(*part, place, out);
                    }
                }
            },
            Kind::Sealed => {
                out.files.push(at);
                self.lose(
                    at,
                    LossKind::Part,
                    "lies too deep in the message: it becomes a file",
                    out,
                );
            }
            Kind::Leaf(_) => {
                if node.entity.is_text() && !node.entity.is_attachment() {
                    let why = "is too large for the body: it becomes a file";
                    self.lose(at, LossKind::Text, why, out);
                }
                out.files.push(at);
            }
            Kind::Text(_) if is_body(node, place) => out.texts.push(at),
            Kind::Text(_) => out.files.push(at),
        }
    }

    /// The body is the HTML, else the last text that says something (RFC 2046 5.1.4).
    fn alternative(&self, parts: &[usize], out: &mut Content) {
        let read = |part: &usize| {
            let mut content = Content::default();
            self.walk(*part, Place::First, &mut content);
            content
        };
        let renditions: Vec<Content> = parts.iter().map(read).collect();
        let says = |content: &Content| content.texts.iter().any(|it| !self.is_blank(*it));
        let has_html = |content: &Content| {
            content.texts.iter().any(|it| self.is_html(*it) && !self.is_blank(*it))
        };
        let chosen = renditions
            .iter()
            .rposition(has_html)
            .or_else(|| renditions.iter().rposition(says))
            .or_else(|| renditions.iter().position(|it| !it.texts.is_empty()));
        for (position, rendition) in renditions.into_iter().enumerate() {
            if Some(position) == chosen {
                out.texts.extend(rendition.texts);
                out.files.extend(rendition.files);
                out.losses.extend(rendition.losses.list);
                continue;
            }
            for text in rendition.texts.into_iter().filter(|it| !self.is_blank(*it)) {
                let kind = if self.is_html(text) { LossKind::Part } else { LossKind::Usual };
                let why = "is another form of the body, and Graph takes one";
                self.lose(text, kind, why, out);
            }
            for file in rendition.files {
                match chosen.is_some() && self.is_form_of_text(file) {
                    true => {
                        let why = "is another form of the body, and Graph takes one";
                        self.lose(file, LossKind::Part, why, out);
                    }
                    false => out.files.push(file),
                }
            }
            out.losses.extend(rendition.losses.list);
        }
    }

    /// A body with what it shows (RFC 2387).
    fn related(&self, node: &Node, parts: &[usize], out: &mut Content) {
        let start = node.entity.parameter("start").map(|id| id.trim_matches(['<', '>', ' ']));
        let is_start = |part: &&usize| {
            let id = self.nodes.get(**part).and_then(|it| it.entity.id.as_deref());
            start.is_some() && id == start
        };
        let root = parts.iter().find(is_start).or(parts.first()).copied();
        for part in parts {
            match Some(*part) == root {
                true => self.walk(*part, Place::First, out),
                false => self.attach(*part, out),
            }
        }
    }

    /// All that is in it is files.
    fn attach(&self, at: usize, out: &mut Content) {
        match self.nodes.get(at).map(|node| &node.kind) {
            Some(Kind::Multipart(parts)) => parts.iter().for_each(|part| self.attach(*part, out)),
            Some(Kind::Sealed | Kind::Leaf(_) | Kind::Text(_)) => out.files.push(at),
            None => {}
        }
    }

    fn is_blank(&self, at: usize) -> bool {
        match self.nodes.get(at).map(|node| &node.kind) {
            Some(Kind::Text(text)) => text.trim_ascii().is_empty(),
            _ => true,
        }
    }

    fn is_html(&self, at: usize) -> bool {
        self.nodes.get(at).is_some_and(|node| node.entity.media_type() == "text/html")
    }

    /// Of no use to readers who see the body.
    fn is_form_of_text(&self, at: usize) -> bool {
        let forms = [
            "text/enriched",
            "text/richtext",
            "text/x-amp-html",
            "text/watch-html",
            "text/markdown",
        ];
        self.nodes.get(at).is_some_and(|node| {
            forms.contains(&node.entity.media_type()) && node.entity.name().is_none()
        })
    }

    fn lose(&self, at: usize, kind: LossKind, why: &'static str, out: &mut Content) {
        out.losses.push(kind, describe(self.nodes, at), why);
    }
}

/// Whether a text stands in the body: not where it has a name as files have.
fn is_body(node: &Node, place: Place) -> bool {
    match place {
        Place::Root => true,
        Place::First => node.entity.name().is_none() || node.entity.disposition.is_none(),
        Place::Later => node.entity.name().is_none(),
    }
}

/// A part for people to read, without what a stranger wrote.
pub(super) fn describe(nodes: &[Node], at: usize) -> Cow<'static, str> {
    let kind = nodes.get(at).map_or("text/plain", |node| node.entity.media_type());
    let kind: String = kind.chars().filter(|c| c.is_ascii_graphic()).take(60).collect();
    format!("part {at} ({kind})").into()
}

/// What only MIME can carry.
pub(super) fn specials(nodes: &[Node]) -> Losses {
    let mut losses = Losses::default();
    for (at, node) in nodes.iter().enumerate() {
        let entity = &node.entity;
        let is_request = || !entity.is_attachment() && entity.parameter("method").is_some();
        let (kind, why) = match entity.media_type() {
            "multipart/signed" => (LossKind::Signature, "has a signature, which breaks"),
            "multipart/encrypted" | "application/pkcs7-mime" | "application/x-pkcs7-mime" => {
                (LossKind::Signature, "is signed or encrypted: it becomes a file")
            }
            "text/calendar" if is_request() => {
                (LossKind::Invitation, "is an invitation: it becomes a file")
            }
            kind if is_tnef(kind) => {
                let why = "is rich text of Outlook with recipients of its own: it becomes a file";
                (LossKind::Part, why)
            }
            "multipart/report" => (LossKind::Part, "is a report: it becomes an ordinary message"),
            _ => continue,
        };
        losses.push(kind, describe(nodes, at), why);
    }
    losses
}

/// Whether the message has a part of which, by MIME, Exchange makes the message: its table of recipients is not ours.
pub(super) fn has_tnef(nodes: &[Node]) -> bool {
    nodes.iter().any(|node| is_tnef(node.entity.media_type()))
}

fn is_tnef(kind: &str) -> bool {
    matches!(kind, "application/ms-tnef" | "application/vnd.ms-tnef")
}

/// The name and extension of a kind of file that has no name.
const NAMES: [(&str, &str); 55] = [
    ("application/gzip", ".gz"),
    ("application/json", ".json"),
    ("application/msword", ".doc"),
    ("application/octet-stream", ".bin"),
    ("application/ogg", ".ogg"),
    ("application/pdf", ".pdf"),
    ("application/pgp-encrypted", "version.asc"),
    ("application/pgp-keys", ".asc"),
    ("application/pgp-signature", "signature.asc"),
    ("application/pkcs7-mime", "smime.p7m"),
    ("application/pkcs7-signature", "smime.p7s"),
    ("application/postscript", ".ps"),
    ("application/rtf", ".rtf"),
    ("application/vnd.ms-excel", ".xls"),
    ("application/vnd.ms-powerpoint", ".ppt"),
    ("application/vnd.oasis.opendocument.spreadsheet", ".ods"),
    ("application/vnd.oasis.opendocument.text", ".odt"),
    ("application/vnd.openxmlformats-officedocument.presentationml.presentation", ".pptx"),
    ("application/vnd.openxmlformats-officedocument.spreadsheetml.sheet", ".xlsx"),
    ("application/vnd.openxmlformats-officedocument.wordprocessingml.document", ".docx"),
    ("application/x-pkcs7-mime", "smime.p7m"),
    ("application/x-pkcs7-signature", "smime.p7s"),
    ("application/xml", ".xml"),
    ("application/zip", ".zip"),
    ("application/ms-tnef", "winmail.dat"),
    ("application/vnd.ms-tnef", "winmail.dat"),
    ("audio/mpeg", ".mp3"),
    ("audio/mp4", ".m4a"),
    ("audio/ogg", ".ogg"),
    ("audio/wav", ".wav"),
    ("audio/x-wav", ".wav"),
    ("image/bmp", ".bmp"),
    ("image/gif", ".gif"),
    ("image/heic", ".heic"),
    ("image/jpeg", ".jpg"),
    ("image/jpg", ".jpg"),
    ("image/png", ".png"),
    ("image/svg+xml", ".svg"),
    ("image/tiff", ".tif"),
    ("image/webp", ".webp"),
    ("message/delivery-status", "delivery-status.txt"),
    ("message/disposition-notification", "disposition-notification.txt"),
    ("message/global", ".eml"),
    ("message/rfc822", ".eml"),
    ("text/css", ".css"),
    ("text/csv", ".csv"),
    ("text/enriched", ".txt"),
    ("text/html", ".html"),
    ("text/markdown", ".md"),
    ("text/plain", ".txt"),
    ("text/rfc822-headers", "headers.txt"),
    ("text/vcard", ".vcf"),
    ("text/x-vcard", ".vcf"),
    ("text/xml", ".xml"),
    ("video/mp4", ".mp4"),
];

/// Gives names to files.
#[derive(Debug, Default)]
pub(super) struct Names {
    files: usize,
    invitations: usize,
}

impl Names {
    /// The name of the next file: its own, or one after its kind and number.
    pub(super) fn next(&mut self, node: &Node) -> String {
        self.files += 1;
        let kind = match node.kind {
            Kind::Sealed => "message/rfc822",
            _ => node.entity.media_type(),
        };
        let is_invitation = kind == "text/calendar" || kind == "application/ics";
        self.invitations += usize::from(is_invitation);
        let number = self.files;
        let usual = NAMES.iter().find(|(it, _)| *it == kind).map(|(_, name)| *name);
        match (node.entity.name().and_then(clean), usual) {
            (Some(name), Some(".eml")) if !name.to_ascii_lowercase().ends_with(".eml") => {
                shorten(&name, ".eml")
            }
            (Some(name), _) => name,
            _ if is_invitation => format!("invite-{}.ics", self.invitations),
            (None, Some(ending)) if ending.starts_with('.') => {
                format!("attachment-{number}{ending}")
            }
            (None, Some(name)) => name.to_owned(),
            (None, None) if kind.starts_with("text/") => format!("attachment-{number}.txt"),
            (None, None) => format!("attachment-{number}.bin"),
        }
    }
}

/// Characters of the name of a file.
const MAX_NAME: usize = 255;

/// A name without path; None where nothing is left of it.
fn clean(name: &str) -> Option<String> {
    let is_separator = |c| matches!(c, '/' | '\\');
    let has_drive =
        matches!(name.as_bytes(), [drive, b':', b'\\' | b'/', ..] if drive.is_ascii_alphabetic());
    let name = match has_drive || name.starts_with(is_separator) || name.starts_with("..") {
        true => name.rsplit(is_separator).next().unwrap_or_default(),
        false => name,
    };
    let name = name.replace(is_separator, "_");
    let name = name.trim();
    if name.trim_matches('.').is_empty() {
        return None;
    }
    let (stem, ending) = match name.rfind('.').map(|at| name.split_at(at)) {
        Some((stem, ending)) if ending.len() <= 20 => (stem, ending),
        _ => (name, ""),
    };
    Some(shorten(stem, ending))
}

fn shorten(stem: &str, ending: &str) -> String {
    let room = MAX_NAME.saturating_sub(ending.chars().count());
    let mut name: String = stem.chars().take(room).collect();
    name.push_str(ending);
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_their_path_and_what_is_too_long() {
        for (name, expected) in [
            ("a.pdf", Some("a.pdf")),
            ("C:\\Users\\x\\a.pdf", Some("a.pdf")),
            ("/etc/passwd", Some("passwd")),
            ("../../a.sh", Some("a.sh")),
            ("\\\\server\\share\\a.pdf", Some("a.pdf")),
            ("24/7 report.pdf", Some("24_7 report.pdf")),
            ("...", None),
            ("..", None),
            ("", None),
            (".profile", Some(".profile")),
        ] {
            assert_eq!(clean(name).as_deref(), expected, "{name:?}");
        }
        let long = clean(&format!("{}.pdf", "é".repeat(300))).unwrap();
        assert_eq!((long.chars().count(), long.ends_with("éé.pdf")), (MAX_NAME, true));
    }
}
