//! Changes a script into another that is likely to mean something.

use fastrand::Rng;

use super::script::{self, Piece};

/// Numbers at which something may tip over, as JSON has them.
const NUMBERS: [&str; 12] = [
    "0",
    "1",
    "-1",
    "255",
    "65535",
    "65536",
    "4294967295",
    "4294967296",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e999",
];
const STRINGS: [&str; 14] = [
    "",
    "a",
    "a@b",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    ".",
    "\\u0000",
    "\\ud800",
    "\u{e9}@\u{e9}",
    "never",
    "hdrs",
    "relay",
];
const FRAGMENTS: [&str; 10] = [
    ",\"file\":{\"name\":\"../x\",\"len\":1,\"crc\":1}",
    ",\"file\":{\"name\":\"x\",\"len\":18446744073709551615,\"crc\":1}",
    ",\"add\":{\"hex\":\"0\"}",
    ",\"sending\":[0,1,4294967295]",
    ",\"first\":18446744073709551615",
    "{\"p\":{\"last\":null}}",
    ",\"wait\":{\"secs\":18446744073709551615,\"nanos\":4294967295}",
    ",\"status\":[5,65535,65535]",
    "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    ",\"later\":{\"x\":[null]}",
];

/// `octets`, changed in a few places. Some of what is new comes from `other`.
pub fn mutate(octets: &[u8], other: &[u8], seed: u64) -> Vec<u8> {
    let mut rng = Rng::with_seed(seed);
    let [0, mut switches, ref script @ ..] = *octets else {
        let mut octets = octets.to_vec();
        change_octets(&mut octets, &mut rng);
        return octets;
    };
    let mut pieces = script::pieces(script);
    let others = script::pieces(other.get(2..).unwrap_or_default());
    for _ in 0..rng.usize(1..6) {
        match rng.u8(..8) {
            0 => switches ^= 1 << rng.u8(..8),
            1 => change_order(&mut pieces, &others, &mut rng),
            2 => {
                let at = rng.usize(..=pieces.len());
                let new = new_piece(&pieces, &mut rng);
                pieces.insert(at, new);
            }
            _ => match rng.choice(&mut pieces) {
                Some(piece) => change_piece(piece, &mut rng),
                None => pieces.push(new_piece(&[], &mut rng)),
            },
        }
    }
    script::script(switches, &pieces)
}

fn change_order(pieces: &mut Vec<Piece>, others: &[Piece], rng: &mut Rng) {
    let at = rng.usize(..=pieces.len());
    let from = rng.usize(..=others.len());
    let some = &others[from..others.len().min(from + 3)];
    match (rng.u8(..4), pieces.get(at).cloned()) {
        (0, Some(_)) => drop(pieces.remove(at)),
        (1, Some(piece)) => pieces.insert(rng.usize(..=pieces.len()), piece),
        (2, Some(_)) => {
            let with = rng.usize(..pieces.len());
            pieces.swap(at, with);
        }
        (_, _) => drop(pieces.splice(at..at, some.iter().cloned())),
    }
}

fn new_piece(pieces: &[Piece], rng: &mut Rng) -> Piece {
    match rng.u8(..6) {
        0 => {
            let step = rng.u8(..3);
            Piece::Segment { step, flags: 0, first: rng.i8(-1..2), void: rng.i8(-1..2) }
        }
        1 => Piece::Zeros(rng.u16(..100)),
        2 => Piece::Cut(rng.u8(..)),
        3 => {
            // A record as it is, somewhere else.
            let mut octets = Vec::new();
            if let Some(piece) = rng.choice(pieces) {
                octets = script::script(0, std::slice::from_ref(piece));
            }
            Piece::Octets(octets)
        }
        4 => {
            let names =
                ["spare-00000001000000aa", "new-0000000100000001", "x", "spare-ffffffff00000001"];
            let name = rng.choice(names).unwrap_or_default().as_bytes().to_vec();
            Piece::File { folder: rng.u8(..5), flags: 0, name, octets: vec![1; rng.usize(..80)] }
        }
        _ => {
            let mut payload = u128::from(rng.u8(..6)).to_be_bytes().to_vec();
            payload.extend(std::iter::repeat_with(|| rng.u8(..)).take(24));
            Piece::Record { kind: rng.u8(..18), flags: 1, step: 1, unsynced: 0, payload }
        }
    }
}

fn change_piece(piece: &mut Piece, rng: &mut Rng) {
    match piece {
        Piece::Segment { step, flags, first, void } => match rng.u8(..4) {
            0 => *step = rng.u8(..3),
            1 => *flags ^= 1 << rng.u8(..6),
            2 => *first = rng.i8(-3..4),
            _ => *void = rng.i8(-3..4),
        },
        Piece::Record { kind, flags, step, unsynced, payload } => match rng.u8(..12) {
            0 => *kind = rng.u8(..18),
            1 => *flags ^= 1 << rng.u8(..5),
            2 => *step = *rng.choice(&[0, 0, 1, 1, 2, 3, -1, 127, -128]).unwrap_or(&1),
            3 => *unsynced = rng.u8(..4),
            4 => change_id(payload, rng),
            5 => change_number(payload, rng),
            6 => payload.truncate(rng.usize(..=payload.len())),
            7 => change_octets(payload, rng),
            _ => change_json(payload, rng),
        },
        Piece::Octets(octets) => change_octets(octets, rng),
        Piece::Zeros(n) => *n = rng.u16(..200),
        Piece::Cut(n) => *n = rng.u8(..),
        Piece::File { folder, flags, name, octets } => match rng.u8(..6) {
            0 => *folder = rng.u8(..5),
            1 => *flags ^= 1,
            2 => change_octets(name, rng),
            3 | 4 => change_json(octets, rng),
            _ => change_octets(octets, rng),
        },
    }
}

/// Few ids, so that records are of the same message.
fn change_id(payload: &mut [u8], rng: &mut Rng) {
    if let Some(id) = payload.first_chunk_mut() {
        *id = match rng.u8(..8) {
            0 => u128::MAX,
            n => n.into(),
        }
        .to_be_bytes();
    }
}

/// One of the fixed fields after the id.
fn change_number(payload: &mut [u8], rng: &mut Rng) {
    let at = 16 + 4 * rng.usize(..6);
    let number = [0, 1, u32::MAX, 1 << 31, 40, 41];
    let number = rng.choice(&number).copied().unwrap_or_default();
    if let Some(field) = payload.get_mut(at..at + 4) {
        field.copy_from_slice(&number.to_le_bytes());
    }
}

/// A number, a string or more of it gives way to another, or a fragment goes in.
fn change_json(octets: &mut Vec<u8>, rng: &mut Rng) {
    let is = |kind: fn(&u8) -> bool, octets: &[u8]| -> Vec<usize> {
        (0..octets.len()).filter(|at| kind(&octets[*at])).collect()
    };
    let (places, new) = match rng.u8(..4) {
        0 | 1 => (is(u8::is_ascii_digit, octets), rng.choice(NUMBERS)),
        2 => (is(|octet| *octet == b'"', octets), rng.choice(STRINGS)),
        _ => (is(|octet| b"{}[],".contains(octet), octets), rng.choice(FRAGMENTS)),
    };
    let (Some(at), Some(new)) = (rng.choice(places), new) else { return };
    let (from, to) = match octets[at] {
        b'"' => {
            let rest = &octets[at + 1..];
            (at + 1, at + 1 + rest.iter().position(|octet| *octet == b'"').unwrap_or(rest.len()))
        }
        b'0'..=b'9' => {
            let digits = |octets: &[u8]| octets.iter().take_while(|it| it.is_ascii_digit()).count();
            let before = octets[..at].iter().rev().take_while(|it| it.is_ascii_digit()).count();
            (at - before, at + digits(&octets[at..]))
        }
        _ => (at, at),
    };
    octets.splice(from..to, new.bytes());
}

fn change_octets(octets: &mut Vec<u8>, rng: &mut Rng) {
    let from = rng.usize(..=octets.len());
    let to = octets.len().min(from + rng.usize(..64));
    match rng.u8(..5) {
        0 => octets.truncate(from),
        1 => octets[from..to].fill(0),
        2 => drop(octets.drain(from..to)),
        3 => {
            let copy = octets[from..to].to_vec();
            octets.splice(from..from, copy);
        }
        _ => {
            if let Some(octet) = octets.get_mut(from) {
                *octet ^= 1 << rng.u8(..8);
            }
        }
    }
}
