//! The seeded twin of the fuzz target `replay`, and its corpus.

use super::failed::{fail, filed, requeue};
use super::*;
use crate::spool::fuzz::mutate::mutate;
use crate::spool::fuzz::replay;
use crate::spool::fuzz::script::{
    LAST_BATCHES, LAST_NUMBERS, LATER_VERSION, NO_HEADER, OF_ANOTHER, Piece, describe, pieces,
    script,
};
use crate::spool::record::{Kind, Record, Stamp, encode_batch};
use crate::spool::segment::Header;
use crate::spool::side_file::FileRef;

/// Of a script: something happens to the messages after the start; segments are short.
const CHANGES: u8 = 1;
const SMALL: u8 = 2;
/// Of a record.
const LAST: u8 = 1;
const SIDE_FILE: u8 = 2;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/replay")
}

/// Names and contents.
fn kept() -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(corpus()).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let mut kept: Vec<_> = entries.map(|path| (name(&path), fs::read(&path).unwrap())).collect();
    kept.sort();
    kept
}

/// Says which input it was when the thread panics, and keeps it.
struct Input<'a> {
    name: String,
    octets: &'a [u8],
}

impl Drop for Input<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let path = std::env::temp_dir().join(self.name.replace(' ', "-"));
            let kept = fs::write(&path, self.octets);
            eprintln!("the input was {}, {} has it: {kept:?}", self.name, path.display());
        }
    }
}

#[test]
fn a_start_copes_with_every_file_of_the_corpus() {
    let kept = kept();
    assert!(kept.len() >= 20, "the corpus was not found");
    let dir = TempDir::new().unwrap();
    for (name, octets) in &kept {
        let _input = Input { name: name.clone(), octets };
        replay(dir.path(), octets);
    }
}

#[test]
fn a_start_copes_with_whatever_records_say() {
    let kept = kept();
    let dir = TempDir::new().unwrap();
    let first = std::env::var("FUZZ_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    for seed in first..first + 10 * fuzz_rounds() {
        let mut random = Random(seed);
        let mut pick = || &kept[usize::try_from(random.below(kept.len() as u64)).unwrap()];
        let ((name, octets), (_, other)) = (pick(), pick());
        let octets = mutate(octets, other, seed);
        let _input = Input { name: format!("seed {seed} from {name}"), octets: &octets };
        replay(dir.path(), &octets);
    }
}

/// What operations leave, as a script.
async fn after(batches: Vec<Vec<Op>>) -> Vec<u8> {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    for ops in batches {
        durable(&log, ops).await;
        log.shared.wait_until_filed();
    }
    drop(log);
    described(&dir)
}

fn described(dir: &TempDir) -> Vec<u8> {
    describe(&dir.path().join("spool"), 0)
}

/// The same with other pieces.
fn edited(octets: &[u8], edit: impl FnOnce(&mut Vec<Piece>)) -> Vec<u8> {
    let mut pieces = pieces(&octets[2..]);
    edit(&mut pieces);
    script(octets[1], &pieces)
}

fn with_switches(octets: &[u8], switches: u8) -> Vec<u8> {
    script(switches, &pieces(&octets[2..]))
}

fn all_fields(n: u128) -> Envelope {
    let orcpt = Some("rfc822;a+2Bb@example.com".into());
    let notify = Notify::On { success: true, failure: false, delay: true };
    Envelope {
        reverse_path: ReversePath::Mailbox(mailbox("\"j\u{f6}rg x\"@b\u{fc}cher.example")),
        rcpts: vec![
            Rcpt { notify, orcpt, ..rcpt("a@example.com") },
            Rcpt { notify: Notify::Never, ..rcpt("PostMaster") },
            rcpt("\"q\\\"\"@[192.0.2.1]"),
        ],
        smtputf8: true,
        eight_bit: true,
        ret: Some(Ret::Headers),
        envid: Some("a+2Bb".into()),
        priority: Priority::High,
        author: Some(mailbox("author@example.com")),
        prepend: Bytes::from_static(b"Received: from \xff\r\n"),
        ..envelope(n)
    }
}

fn all_statuses() -> Progress {
    let cause = Cause {
        status: Some(EnhancedStatus(4, 7, 999)),
        retry_after: Some(Duration::new(30, 5)),
        maybe_sent: true,
        ..Cause::new(Scope::Provider, outcome::Stage::Data, "421 later")
    };
    let rcpts = vec![
        RcptStatus::Pending { last: Some(cause.clone()) },
        RcptStatus::Delivered(Receipt { relayed: true, ..Receipt::new(&b"250 \xff"[..]) }),
        RcptStatus::Failed(cause),
    ];
    let first_deferral = Some(UnixMillis(5));
    Progress {
        attempts: 9,
        due: UnixMillis(7),
        first_deferral,
        rcpts,
        sending: vec![0],
        doubtful: vec![1],
        untold: vec![2],
        warned: true,
        named: true,
    }
}

/// Message 1 in a side file that has `content`, and a file for each of `names`.
fn with_side_file(content: &[u8], names: &[&str]) -> Vec<u8> {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("spool");
    let number = 1 << 32;
    let version = segment::VERSION;
    let header = Header { version, number, key: 1, first_batch: 1, void_from: 1, sealed: None };
    let file = FileRef { name: "abc-1".into(), len: 7, crc32c: crc32c::crc32c(b"content") };
    let mut segment = header.encode().to_vec();
    let stamp = Stamp { key: 1, segment: number, batch: 1, unsynced: 0 };
    let (one, two) = (Record::put_file(&envelope(1), file), Record::put(&envelope(2), vec![]));
    encode_batch(&mut segment, 0, &stamp, &[&one, &two]);
    for folder in ["log", "bodies"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    fs::write(root.join("log/0000000100000000.seg"), segment).unwrap();
    for name in names {
        fs::write(root.join("bodies").join(name), content).unwrap();
    }
    described(&dir)
}

/// A spool with a torn tail, before and after a start.
async fn torn() -> [Vec<u8>; 2] {
    let dir = TempDir::new().unwrap();
    let (path, start) = four_batches(&dir).await;
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..start + 100]).unwrap();
    let before = described(&dir);
    let (log, _) = open(&dir).await;
    durable(&log, vec![put(6, b"six")]).await;
    drop(log);
    [before, described(&dir)]
}

/// A spool of which a synced batch was overwritten, before and after a start.
async fn damaged() -> [Vec<u8>; 2] {
    let dir = TempDir::new().unwrap();
    let (path, start) = four_batches(&dir).await;
    let mut bytes = fs::read(&path).unwrap();
    bytes[start - 300..start - 200].fill(0x55);
    fs::write(&path, &bytes).unwrap();
    let before = described(&dir);
    drop(open(&dir).await);
    [before, described(&dir)]
}

/// No script.
async fn as_it_is() -> Vec<u8> {
    let dir = TempDir::new().unwrap();
    let (path, _) = four_batches(&dir).await;
    [vec![1], fs::read(path).unwrap()].concat()
}

/// Short segments, of which some were freed and are spares.
async fn short_segments() -> Vec<u8> {
    let dir = TempDir::new().unwrap();
    let geometry = Geometry { segment: 1500, idle: 256, few: 1, fresh: 0, ..Geometry::default() };
    let (log, _) = Log::open_on(TestDisk::new(), &at(dir.path()), geometry).await.unwrap();
    for n in 1..9 {
        durable(&log, vec![put(n, &[b'x'; 300])]).await;
        durable(&log, vec![if n % 2 == 0 { done(n) } else { update(n, 1) }]).await;
    }
    drop(log);
    described(&dir)
}

fn segment(flags: u8) -> Piece {
    Piece::Segment { step: 1, flags, first: 0, void: 0 }
}

/// A batch of one.
fn batch(kind: Kind, payload: Vec<u8>) -> Piece {
    Piece::Record { kind: kind as u8, flags: LAST, step: 1, unsynced: 0, payload }
}

/// A `Put` whose record says no more than it must.
fn short_put(n: u128) -> Piece {
    batch(Kind::Put, short_payload(n, ""))
}

fn short_payload(n: u128, file: &str) -> Vec<u8> {
    let json = r#"{"at":1,"from":"","to":[{"p":"a@b"}],"size":3,"peer":"u","helo":"h""#;
    let json = format!("{json}{file}}}");
    [&id(n).as_u128().to_be_bytes()[..], &[0; 24], json.as_bytes()].concat()
}

fn check(pieces: &[Piece]) {
    let dir = TempDir::new().unwrap();
    for switches in [0, CHANGES] {
        replay(dir.path(), &script(switches, pieces));
    }
}

#[test]
fn numbers_of_batches_near_their_end_do_not_stop_the_writer() {
    check(&[segment(0), short_put(1), segment(LAST_BATCHES)]);
    check(&[segment(LAST_BATCHES), short_put(1), short_put(2), short_put(3)]);
    let records: Vec<_> = (1..7).map(short_put).collect();
    check(&[&[segment(LAST_BATCHES | NO_HEADER)], &records[..]].concat());
}

#[test]
fn numbers_of_segments_near_their_end_do_not_put_the_next_one_first() {
    check(&[segment(0), short_put(1), segment(LAST_NUMBERS), short_put(2)]);
    let name = b"spare-ffffffff00000001".to_vec();
    let spare = Piece::File { folder: 0, flags: 0, name, octets: vec![1; 80] };
    check(&[segment(0), short_put(1), spare]);
}

#[test]
fn lengths_of_side_files_are_not_more_than_can_be_summed_up() {
    let put = |n| {
        let file = r#","file":{"name":"x","len":18446744073709551615,"crc":1}"#;
        let (flags, payload) = (LAST | SIDE_FILE, short_payload(n, file));
        Piece::Record { kind: Kind::Put as u8, flags, step: 1, unsynced: 0, payload }
    };
    check(&[segment(0), put(1), put(2), put(3)]);
}

#[test]
fn a_message_that_was_put_again_after_it_was_filed_does_not_lack_its_files() {
    let filed = [&id(1).as_u128().to_be_bytes()[..], &[0; 16]].concat();
    check(&[segment(0), short_put(1), batch(Kind::Filed, filed), short_put(1)]);
    // Its files are there at the first start only.
    let name = format!("{}.eml", id(1)).into_bytes();
    let eml = Piece::File { folder: 2, flags: 0, name, octets: b"one".to_vec() };
    let filed = [&id(1).as_u128().to_be_bytes()[..], &[0; 16]].concat();
    check(&[segment(0), short_put(1), batch(Kind::Filed, filed), short_put(1), eml]);
}

#[test]
fn a_header_whose_batches_no_start_writes_is_damaged() {
    let header = |first, void| Piece::Segment { step: 1, flags: 0, first, void };
    // Before the first one; and before what is void.
    let (version, sealed) = (segment::VERSION, None);
    let before_all = Header { version, number: 1, key: 1, first_batch: 0, void_from: 0, sealed };
    let before_void = Header { first_batch: 2, void_from: 3, ..before_all };
    for header in [before_all, before_void] {
        assert_eq!(Header::decode(&header.encode()), None);
    }
    check(&[header(-1, -1), short_put(1), short_put(2), header(0, 0), short_put(4)]);
    check(&[segment(0), short_put(1), header(-1, 0), short_put(2)]);
}

/// The corpus as it is made, but for what came to it by what the fuzzer found.
async fn scripts() -> Vec<(&'static str, Vec<u8>)> {
    let attempt = |n| Op::Attempt { id: id(n), progress: all_statuses() };
    let hold = |n| Op::Hold { id: id(n), progress: progress(1) };
    let full = || Op::Put { envelope: all_fields(1), body: Staged::Memory(b"full".to_vec()) };
    let note = |bytes: &[u8]| Op::Note { key: "gate/a".into(), bytes: bytes.to_vec() };
    let changed = Op::Update { id: id(1), progress: all_statuses() };
    let release = Op::Release { id: id(1), progress: progress(2) };
    let notes = vec![vec![note(b"1"), note(b"22")], vec![note(b""), put(1, b"one")]];
    let puts = after(vec![vec![put(1, b"one"), put(2, b"two")], vec![put(3, b"three")]]).await;
    let filed = after(vec![vec![put(1, b"one"), put(2, b"two")], vec![fail(1)]]).await;
    let [torn, void] = torn().await;
    let [damaged, after_damage] = damaged().await;
    let of_a_file = |folder, name: &str| Piece::File {
        folder,
        flags: 0,
        name: name.as_bytes().to_vec(),
        octets: vec![7; 70],
    };
    let next_to = |flags| {
        edited(&puts, |pieces| {
            let record = pieces[2].clone();
            pieces.extend([segment(flags), record]);
        })
    };
    vec![
        ("attempt", after(vec![vec![full()], vec![attempt(1)]]).await),
        (
            "content-like-a-record",
            edited(&puts, |pieces| {
                let record = script(0, &pieces[1..2]);
                pieces.push(Piece::Octets(record));
            }),
        ),
        ("damage", damaged),
        ("damage-after-a-start", after_damage),
        ("deleted", after(vec![vec![put(1, b"one")], vec![Op::Delete { id: id(1) }]]).await),
        ("done", after(vec![vec![put(1, b"one")], vec![done(1)]]).await),
        ("empty", script(0, &[])),
        (
            "failed-not-filed",
            edited(&filed, |pieces| {
                let filing = Kind::Filed as u8;
                pieces.retain(|piece| match piece {
                    Piece::Record { kind, .. } => *kind != filing,
                    Piece::File { .. } => false,
                    _ => true,
                });
            }),
        ),
        (
            "file-of-a-segment-to-come",
            edited(&puts, |pieces| {
                let names = [(0, "new-0000000200000000"), (0, "spare-0000000300000000"), (3, "a")];
                pieces.extend(names.map(|(folder, name)| of_a_file(folder, name)));
            }),
        ),
        ("filed", with_switches(&filed, CHANGES | 1 << 4)),
        ("filed-without-sheet", edited(&filed, |pieces| drop(pieces.pop()))),
        ("held", after(vec![vec![put(1, b"one")], vec![hold(1)]]).await),
        ("later-version", next_to(LATER_VERSION)),
        ("many-changes", with_switches(&puts, CHANGES | 4 << 4)),
        ("no-header", next_to(NO_HEADER)),
        ("notes", after(notes).await),
        ("of-another-spool", next_to(OF_ANOTHER)),
        ("puts", puts),
        ("released", after(vec![vec![put(1, b"one")], vec![hold(1)], vec![release]]).await),
        ("requeued", after(vec![vec![put(1, b"one")], vec![fail(1)], vec![requeue(1, 4)]]).await),
        ("segment-as-it-is", as_it_is().await),
        ("short-segments", with_switches(&short_segments().await, SMALL | CHANGES)),
        ("side-file", with_side_file(b"content", &["abc-1"])),
        ("side-file-missing", with_side_file(b"content", &["stray-1"])),
        ("side-file-too-short", with_side_file(b"cont", &["abc-1", "stray-1"])),
        ("torn", torn),
        (
            "unsynced",
            edited(&filed, |pieces| {
                for piece in pieces {
                    if let Piece::Record { unsynced, .. } = piece {
                        *unsynced = 1;
                    }
                }
            }),
        ),
        ("update", after(vec![vec![full()], vec![changed]]).await),
        ("void-after-a-tear", void),
    ]
}

/// `UPDATE_EXPECT=1` writes them; they are not the same to the octet each time, for there are times in them.
#[tokio::test]
async fn the_corpus_is_made_of_real_operations() {
    for (name, octets) in scripts().await {
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            fs::write(corpus().join(name), &octets).unwrap();
        }
        assert!(corpus().join(name).exists(), "{name} is not there: UPDATE_EXPECT=1 makes it");
        if octets[0] == 0 {
            assert_eq!(edited(&octets, |_| {}), octets, "{name}");
        }
    }
}

#[tokio::test]
async fn a_script_lays_out_the_spool_that_it_is_of() {
    let dir = TempDir::new().unwrap();
    four_batches(&dir).await;
    let (log, _) = open(&dir).await;
    durable(&log, vec![put(6, b"six"), fail(5)]).await;
    filed(&log, 5).await;
    let should = ids(&log);
    drop(log);
    let octets = described(&dir);
    let again = TempDir::new().unwrap();
    let replayed = tokio::task::spawn_blocking(move || replay(again.path(), &octets));
    let found: Vec<u128> = replayed.await.unwrap().into_iter().map(SpoolId::as_u128).collect();
    assert_eq!(found, should);
}
