//! Files that cannot be read, or are none that the spool has written.

use super::*;
use crate::spool::log::Paths;
use crate::spool::recover::{self, Depth};
use crate::spool::segment::Header;

fn is_kept(dir: &TempDir, segment: &Path) -> bool {
    files(dir, "damaged").iter().any(|path| path.file_name() == segment.file_name())
}

fn number(segment: &Path) -> u64 {
    segment::parse_name(segment.file_name().unwrap().to_str().unwrap()).unwrap()
}

fn position(segment: &Path, of: &[u8]) -> u64 {
    let bytes = fs::read(segment).unwrap();
    bytes.windows(of.len()).position(|window| window == of).unwrap() as u64
}

/// A spool with messages 1 to 5, each longer than two blocks, and the segment they lie in.
async fn five(durability: Durability) -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    for n in 1..=5 {
        let content = [vec![b'x'; 5_000], format!("number {n}").into(), vec![b'x'; 5_000]].concat();
        log.apply(vec![put(n, &content)], durability).await.unwrap();
    }
    let segment = segments(&dir).pop().unwrap();
    (dir, segment)
}

fn bad(segment: &Path, octets: Range<u64>) -> Arc<TestDisk> {
    let disk = TestDisk::new();
    lock(&disk.bad_octets).push((segment.to_owned(), octets));
    disk
}

#[tokio::test]
async fn a_sector_that_cannot_be_read_costs_only_what_lies_there() {
    for durability in [Durability::Durable, Durability::Lazy] {
        let (dir, segment) = five(durability).await;
        let before = fs::read(&segment).unwrap();
        let at = position(&segment, b"number 3");
        let disk = bad(&segment, at..at + 1);
        // A look reads the same.
        let paths = Paths::new(&dir.path().join("spool"));
        let looked =
            recover::read(&*disk, &paths, Depth::Everything).unwrap_or_else(|e| panic!("{e}"));
        let (log, report) = open_on(&disk, &dir).await;
        assert_eq!(looked.report, report);
        assert_eq!(ids(&log), [1, 2, 4, 5], "{durability:?}: {report:?}");
        let [what, batch] = &report.damaged[..] else { panic!("{report:?}") };
        let (start, name) = (at / 4096 * 4096, segment.file_name().unwrap().to_str().unwrap());
        let says = format!("log/{name}: octets {start} to {} cannot be read", start + 4096);
        assert!(what.starts_with(&says), "{what}");
        assert!(batch.contains(": batch 3 cannot be read"), "{batch}");
        assert!(is_kept(&dir, &segment));
        // What comes after counts at every start.
        durable(&log, vec![put(9, b"nine"), done(1)]).await;
        drop(log);
        let (log, report) = open_on(&disk, &dir).await;
        assert_eq!((ids(&log), report.damaged.len()), (vec![2, 4, 5, 9], 2), "{report:?}");
        durable(&log, [2, 4, 5, 9].map(done).into()).await;
        until(|| !segment.exists()).await;
        let aside = files(&dir, "damaged").pop().unwrap();
        assert_eq!(fs::read(aside).unwrap(), before);
    }
}

#[tokio::test]
async fn a_header_that_cannot_be_read_is_a_damaged_one() {
    let (dir, segment) = five(Durability::Durable).await;
    let (log, report) = open_on(&bad(&segment, 0..64), &dir).await;
    // The first is in the same block.
    assert_eq!(ids(&log), [2, 3, 4, 5]);
    assert!(report.damaged.iter().any(|it| it.contains("its header is damaged")), "{report:?}");
    assert!(report.damaged.iter().any(|it| it.contains("octets 0 to 4096")), "{report:?}");
    assert!(is_kept(&dir, &segment));
}

/// A spool with a segment that has an index, and that segment.
async fn indexed() -> (TempDir, PathBuf, u64) {
    let dir = TempDir::new().unwrap();
    let config = at(dir.path());
    let (log, _) = Log::open_on(TestDisk::new(), &config, SMALL).await.unwrap();
    durable(&log, vec![note("key", b"value of the note")]).await;
    for n in 0..200 {
        durable(&log, (1..=10).map(|m| put(10 * n + m, b"hello")).collect()).await;
    }
    drop(log);
    let all = segments(&dir);
    let header = Header::decode(&fs::read(&all[1]).unwrap()).unwrap();
    let sealed = header.sealed.unwrap();
    assert_eq!(sealed.segment, number(&all[0]));
    (dir, all[0].clone(), sealed.offset)
}

#[tokio::test]
async fn an_index_that_cannot_be_read_costs_no_message() {
    let (dir, segment, offset) = indexed().await;
    let block = (offset / 4096 + 1) * 4096;
    assert!(block < fs::metadata(&segment).unwrap().len());
    let (log, report) = open_on(&bad(&segment, block..block + 1), &dir).await;
    assert_eq!(ids(&log), (1..=2000).collect::<Vec<_>>());
    assert_eq!(log.note("key").unwrap(), b"value of the note");
    let says = format!("octets {block} to ");
    assert!(report.damaged[0].contains(&says), "{report:?}");
    assert!(is_kept(&dir, &segment));
}

#[tokio::test]
async fn a_record_that_its_index_does_not_tell_costs_itself_when_it_cannot_be_read() {
    let (dir, segment, _) = indexed().await;
    let at = position(&segment, b"value of the note");
    let (log, report) = open_on(&bad(&segment, at..at + 1), &dir).await;
    assert_eq!(ids(&log), (1..=2000).collect::<Vec<_>>());
    assert_eq!(log.note("key"), None);
    assert_eq!(report.damaged.len(), 1, "{report:?}");
    assert!(report.damaged[0].contains("octet 64: the record cannot be read: "), "{report:?}");
    assert!(is_kept(&dir, &segment));
}

#[tokio::test]
async fn a_segment_that_cannot_be_opened_now_is_no_damage_and_no_start() {
    let (dir, _) = five(Durability::Durable).await;
    let disk = TestDisk::new();
    *lock(&disk.bad_ending) = Some(".seg");
    let refused = Log::open_on(disk, &at(dir.path()), Geometry::default()).await;
    assert!(matches!(refused, Err(OpenError::Io(..))), "{refused:?}");
    assert!(files(&dir, "damaged").is_empty());
    assert_eq!(ids(&open(&dir).await.0), [1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn no_length_of_a_segment_keeps_the_spool_from_starting() {
    let (dir, segment, _) = indexed().await;
    let stranger = segment.with_file_name(segment::name(number(&segment) + 1));
    File::create_new(&stranger).unwrap();
    // Nothing is in a spare, so it goes.
    let spare = segment.with_file_name(segment::spare(1 << 32));
    File::create_new(&spare).unwrap();
    for path in [&segment, &stranger, &spare] {
        File::options().write(true).open(path).unwrap().set_len(1 << 40).unwrap();
    }
    let (log, report) = open(&dir).await;
    assert_eq!(ids(&log), (1..=2000).collect::<Vec<_>>());
    let cut = |it: &&String| it.contains("it has 1099511627776 octets, more than a segment has");
    assert_eq!(report.damaged.iter().filter(cut).count(), 2, "{report:?}");
    assert!(is_kept(&dir, &segment) && is_kept(&dir, &stranger) && !spare.exists());
    durable(&log, vec![put(9_000, b"after")]).await;
    drop(log);
    let (log, _) = open(&dir).await;
    assert_eq!((ids(&log).len(), body(&log, 9_000).await), (2001, b"after".to_vec()));
}

#[tokio::test]
async fn a_name_that_nobody_gave_hides_nothing_that_is_written_later() {
    for name in ["4000000000000000.seg", "2000000000000000.seg", "spare-4000000000000000"] {
        for octets in [&b""[..], &[b'x'; 100]] {
            let dir = TempDir::new().unwrap();
            let (log, _) = open(&dir).await;
            durable(&log, vec![put(1, b"one")]).await;
            drop(log);
            let path = dir.path().join("spool/log").join(name);
            fs::write(&path, octets).unwrap();
            for n in 2..=4 {
                let (log, report) = open(&dir).await;
                assert_eq!(ids(&log), (1..n).collect::<Vec<_>>(), "{name}: {report:?}");
                durable(&log, vec![put(n, b"more")]).await;
            }
            assert_eq!(fs::read(&path).unwrap(), octets);
        }
    }
}

#[tokio::test]
async fn a_segment_with_a_high_number_is_known_by_its_records() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    drop(log);
    // From here on all numbers are high ones.
    let high = segments(&dir)[0].with_file_name(segment::name(segment::LIKELY));
    fs::write(high, b"none of ours").unwrap();
    let (log, _) = open(&dir).await;
    durable(&log, vec![put(1, b"one")]).await;
    let segment = segments(&dir).pop().unwrap();
    assert!(number(&segment) > segment::LIKELY);
    drop(log);
    File::options().write(true).open(&segment).unwrap().write_all_at(b"!!", 20).unwrap();
    let (log, report) = open(&dir).await;
    assert_eq!(ids(&log), [1], "{report:?}");
    assert!(is_kept(&dir, &segment));
}

#[tokio::test]
async fn without_links_a_damaged_segment_is_copied_and_keeps_no_space() {
    let (dir, segment) = five(Durability::Durable).await;
    let at = position(&segment, b"number 3");
    File::options().write(true).open(&segment).unwrap().write_all_at(b"!!", at).unwrap();
    let bytes = fs::read(&segment).unwrap();
    let disk = TestDisk::new();
    disk.has_no_links.store(true, Ordering::SeqCst);
    let (log, report) = open_on(&disk, &dir).await;
    assert_eq!((ids(&log), report.damaged.len()), (vec![1, 2, 4, 5], 1));
    assert!(files(&dir, "tmp").is_empty());
    let aside = files(&dir, "damaged").pop().unwrap();
    assert_eq!(fs::metadata(&aside).unwrap().permissions().mode() & 0o777, 0o600);
    durable(&log, [1, 2, 4, 5].map(done).into()).await;
    until(|| !segment.exists()).await;
    assert_eq!(fs::read(aside).unwrap(), bytes);
}

#[tokio::test]
async fn what_can_be_neither_linked_nor_copied_stays_in_the_log() {
    let (dir, segment) = five(Durability::Durable).await;
    let at = position(&segment, b"number 3");
    let disk = bad(&segment, at..at + 1);
    disk.has_no_links.store(true, Ordering::SeqCst);
    // Where the copy would be made.
    let in_the_way = dir.path().join("spool/tmp").join(segment.file_name().unwrap());
    fs::create_dir(in_the_way).unwrap();
    let (log, _) = open_on(&disk, &dir).await;
    durable(&log, [1, 2, 4, 5].map(done).into()).await;
    durable(&log, vec![put(9, b"nine")]).await;
    assert!(segment.exists());
    assert!(files(&dir, "damaged").is_empty());
}

#[tokio::test]
async fn a_message_that_the_medium_does_not_give_back_keeps_no_space_for_ever() {
    let dir = TempDir::new().unwrap();
    let config = at(dir.path());
    let disk = TestDisk::new();
    let open = async |geometry| Log::open_on(Arc::clone(&disk) as _, &config, geometry).await;
    let patient = Geometry { patience: Duration::MAX, ..SMALL };
    let (log, _) = open(patient).await.unwrap();
    durable(&log, vec![put(1, &[b'y'; 9_000]), put(2, b"stays")]).await;
    for n in 100..130 {
        durable(&log, vec![put(n, &[b'x'; 10_000])]).await;
    }
    durable(&log, (100..130).map(done).collect()).await;
    let segment = segments(&dir).remove(0);
    lock(&disk.bad_octets).push((segment.clone(), 4_096..4_097));
    for n in 200..300 {
        durable(&log, vec![put(n, &[b'x'; 10_000])]).await;
        durable(&log, vec![done(n)]).await;
    }
    assert_eq!((ids(&log), segment.exists()), (vec![1, 2], true), "it may pass");
    drop(log);
    let (log, report) = open(SMALL).await.unwrap();
    assert_eq!((ids(&log), report.damaged), (vec![1, 2], vec![]), "the index knows of none");
    pass(&log, &dir, 300).await;
    until(|| !segment.exists()).await;
    assert_eq!(ids(&log), [2]);
    assert!(is_kept(&dir, &segment));
}
