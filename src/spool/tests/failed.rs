//! Failed messages in files of their own.

use super::*;

const FOLDER: &str = "failed";

pub(super) fn fail(n: u128) -> Op {
    let cause = Cause::new(Scope::Recipient, outcome::Stage::Rcpt, "550 no such user");
    let failed = RcptStatus::Failed(cause);
    let rcpts = vec![failed.clone(), failed];
    Op::Fail { id: id(n), progress: Progress { rcpts, ..progress(3) } }
}

pub(super) fn requeue(n: u128, attempts: u16) -> Op {
    Op::Requeue { id: id(n), progress: progress(attempts) }
}

fn with_prepend(n: u128) -> Envelope {
    Envelope { prepend: Bytes::from_static(b"Received: from app\r\n"), ..envelope(n) }
}

fn path(dir: &TempDir, n: u128, ending: &str) -> PathBuf {
    dir.path().join("spool").join(FOLDER).join(format!("{}.{ending}", id(n)))
}

fn is_in_log(log: &Log, n: u128) -> bool {
    lock(&log.shared.index).get(id(n)).is_some()
}

pub(super) async fn filed(log: &Log, n: u128) {
    until(|| !is_in_log(log, n)).await;
}

/// A spool with message 1, which lies in files, and has a prepended line.
async fn with_filed(content: &[u8]) -> (TempDir, Log, Stored) {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    let body = stage(&log, content).await;
    durable(&log, vec![Op::Put { envelope: with_prepend(1), body }]).await;
    let failed = log.apply(vec![fail(1)], Durability::Lazy).await;
    failed.unwrap();
    let stored = log.open(id(1)).await.unwrap();
    filed(&log, 1).await;
    (dir, log, stored)
}

#[tokio::test]
async fn a_failed_message_leaves_the_log_and_reads_the_same() {
    for len in [0, 5, 300_000, 1_100_000] {
        let content = vec![b'x'; len];
        let (dir, log, stored) = with_filed(&content).await;
        until(|| files(&dir, "bodies").is_empty()).await;
        assert_eq!(files(&dir, FOLDER), [path(&dir, 1, "eml"), path(&dir, 1, "json")]);
        let eml = fs::read(path(&dir, 1, "eml")).unwrap();
        assert_eq!(eml, [&b"Received: from app\r\n"[..], &content].concat());
        let json: serde_json::Value =
            serde_json::from_slice(&fs::read(path(&dir, 1, "json")).unwrap()).unwrap();
        assert_eq!(json["id"], id(1).to_string());
        let check = async |log: &Log| {
            let heads = log.heads(None, 9);
            let [head] = heads[..] else { panic!("{heads:?}") };
            assert_eq!((head.id, head.state, head.attempts), (id(1), QueueState::Failed, 3));
            assert_eq!((head.size, head.pending, head.due.0), (5, 0, 7_000));
            assert_eq!(log.health().failed, 1);
            let again = log.open(id(1)).await.unwrap();
            assert_eq!(again.envelope, stored.envelope);
            assert_eq!(again.progress, stored.progress);
            assert_eq!(read_all(&again.body).await.unwrap(), content);
        };
        check(&log).await;
        drop(log);
        let (log, report) = open(&dir).await;
        assert_eq!(report, Report { messages: 1, ..Report::default() });
        check(&log).await;
        assert!(!is_in_log(&log, 1));
    }
}

#[tokio::test]
async fn files_are_private() {
    let (dir, _log, _) = with_filed(b"secret").await;
    for file in files(&dir, FOLDER) {
        assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o7777, 0o600);
    }
}

#[tokio::test]
async fn listings_are_in_order_whatever_lies_where() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    durable(&log, (1..=6).map(|n| put(n, b"hello")).collect()).await;
    durable(&log, vec![fail(2), fail(3), fail(6)]).await;
    for n in [2, 3, 6] {
        filed(&log, n).await;
    }
    assert_eq!(ids(&log), [1, 2, 3, 4, 5, 6]);
    let after = |n: u128| log.heads(Some(id(n)), 2).iter().map(|h| h.id.as_u128()).collect();
    let pages: [Vec<u128>; 4] = [1, 2, 4, 6].map(after);
    assert_eq!(pages, [vec![2, 3], vec![3, 4], vec![5, 6], vec![]]);
}

#[tokio::test]
async fn a_filed_message_that_is_done_leaves_nothing() {
    for durability in [Durability::Durable, Durability::Lazy] {
        let (dir, log, _) = with_filed(b"hello").await;
        log.apply(vec![done(1)], durability).await.unwrap();
        assert_eq!(ids(&log), []);
        assert!(matches!(log.open(id(1)).await, Err(SpoolError::Unknown(_))));
        until(|| files(&dir, FOLDER).is_empty()).await;
        drop(log);
        let (log, report) = open(&dir).await;
        assert_eq!((ids(&log), report), (vec![], Report::default()));
    }
}

#[tokio::test]
async fn nothing_but_its_end_happens_to_a_filed_message() {
    let (_dir, log, _) = with_filed(b"hello").await;
    for op in [update(1, 1), Op::Hold { id: id(1), progress: progress(1) }, fail(1)] {
        let refused = log.apply(vec![op], Durability::Durable).await;
        assert!(matches!(refused, Err(SpoolError::Refused(..))), "{refused:?}");
    }
    let twice = log.apply(vec![put(1, b"again")], Durability::Durable).await;
    assert!(matches!(twice, Err(SpoolError::Io(..))), "{twice:?}");
}

#[tokio::test]
async fn a_filed_message_can_be_put_again() {
    for len in [5, 2_000_000] {
        let content = vec![b'y'; len];
        let (dir, log, stored) = with_filed(&content).await;
        log.apply(vec![requeue(1, 4)], Durability::Lazy).await.unwrap();
        assert!(is_in_log(&log, 1));
        let is_large = usize::from(len > 1024 * 1024);
        until(|| files(&dir, "bodies").len() == is_large).await;
        let again = log.open(id(1)).await.unwrap();
        assert_eq!((again.envelope, again.progress), (stored.envelope, progress(4)));
        assert_eq!(log.heads(None, 9)[0].state, QueueState::Queued);
        // And fails again.
        log.apply(vec![fail(1)], Durability::Lazy).await.unwrap();
        filed(&log, 1).await;
        assert_eq!((ids(&log), body_of(&log).await), (vec![1], content.clone()));
        drop(log);
        let (log, report) = open(&dir).await;
        assert_eq!(report, Report { messages: 1, ..Report::default() });
        assert_eq!(body_of(&log).await, content);
    }
}

async fn body_of(log: &Log) -> Vec<u8> {
    body(log, 1).await
}

#[tokio::test]
async fn a_message_in_the_log_wins_over_its_files() {
    let (dir, log, _) = with_filed(b"hello").await;
    let kept = [path(&dir, 1, "eml"), path(&dir, 1, "json")].map(|p| (fs::read(&p).unwrap(), p));
    durable(&log, vec![requeue(1, 0)]).await;
    drop(log);
    kept.iter().for_each(|(bytes, path)| fs::write(path, bytes).unwrap());
    let (log, report) = open(&dir).await;
    assert_eq!(report, Report { messages: 1, ..Report::default() });
    assert_eq!(log.heads(None, 9)[0].state, QueueState::Queued);
    until(|| files(&dir, FOLDER).is_empty()).await;
    durable(&log, vec![done(1)]).await;
    drop(log);
    // Nor do they come back when it is done, as long as the log knows of it.
    kept.iter().for_each(|(bytes, path)| fs::write(path, bytes).unwrap());
    let (log, _) = open(&dir).await;
    assert_eq!(ids(&log), []);
    until(|| files(&dir, FOLDER).is_empty()).await;
}

#[tokio::test]
async fn damaged_files_are_reported_and_kept() {
    type Damage = fn(&Path, &Path);
    let cases: [(Damage, &str, usize); 6] = [
        (|eml, _| fs::remove_file(eml).unwrap(), ".eml cannot be read", 1),
        (|eml, _| fs::write(eml, b"short").unwrap(), ".eml has 5 octets instead of 25", 1),
        (|_, json| fs::remove_file(json).unwrap(), ".json: it is missing", 0),
        (|_, json| fs::write(json, b"{}").unwrap(), ".json: it has no checksum", 0),
        (
            |_, json| {
                let text = fs::read_to_string(json).unwrap();
                fs::write(json, text.replace("a@example.com", "z@example.com")).unwrap();
            },
            ".json: it is not what was written",
            0,
        ),
        (|eml, _| fs::write(eml, vec![b'x'; 25]).unwrap(), "", 1),
    ];
    for (damage, says, listed) in cases {
        let (dir, log, _) = with_filed(b"hello").await;
        drop(log);
        damage(&path(&dir, 1, "eml"), &path(&dir, 1, "json"));
        let before = files(&dir, FOLDER);
        let (log, report) = open(&dir).await;
        let said = report.damaged.join("\n");
        assert!(said.contains(says) && said.is_empty() == says.is_empty(), "{said:?}, {says}");
        assert_eq!(ids(&log).len(), listed, "{said}");
        if listed == 1 {
            let read = match log.open(id(1)).await {
                Ok(stored) => read_all(&stored.body).await.map_err(|e| e.to_string()),
                Err(error) => Err(error.to_string()),
            };
            assert!(read.is_err(), "{read:?}");
            let refused = log.apply(vec![requeue(1, 0)], Durability::Durable).await;
            assert!(matches!(refused, Err(SpoolError::Damaged(..))), "{refused:?}");
        }
        log.shared.wait_until_filed();
        assert_eq!(files(&dir, FOLDER), before);
    }
}

#[tokio::test]
async fn a_content_whose_json_is_lost_is_put_aside_and_said() {
    let (dir, log, _) = with_filed(b"hello").await;
    // Nothing of it is in the log any more.
    let mib = vec![b'x'; 1024 * 1024];
    for n in 2..=140 {
        log.apply(vec![put(n, &mib), done(n)], Durability::Lazy).await.unwrap();
    }
    drop(log);
    fs::remove_file(path(&dir, 1, "json")).unwrap();
    fs::write(dir.path().join("spool/failed/notes.txt"), b"of the operator").unwrap();
    let (_log, report) = open(&dir).await;
    assert_eq!((report.messages, report.damaged.len()), (0, 1), "{report:?}");
    assert!(report.damaged[0].contains(".json is missing"), "{report:?}");
    assert_eq!(files(&dir, FOLDER).len(), 1);
    let kept = dir.path().join("spool/damaged").join(format!("{}.eml", id(1)));
    assert_eq!(fs::read(kept).unwrap(), b"Received: from app\r\nhello");
}

#[tokio::test]
async fn a_disk_that_fails_or_is_full_leaves_it_in_the_log_for_now() {
    let dir = TempDir::new().unwrap();
    let disk = TestDisk::new();
    let (log, _) = open_on(&disk, &dir).await;
    durable(&log, vec![put(1, b"hello"), put(2, b"hello")]).await;
    log.shared.wait_until_filed();
    disk.free.store(1_000_004, Ordering::SeqCst);
    until(|| !log.has_room_for(5)).await;
    durable(&log, vec![fail(1)]).await;
    log.shared.wait_until_filed();
    assert!(is_in_log(&log, 1));
    assert_eq!((files(&dir, FOLDER).len(), files(&dir, "tmp").len()), (0, 0));
    assert_eq!(body(&log, 1).await, b"hello");
    disk.free.store(u64::MAX, Ordering::SeqCst);
    until(|| log.has_room_for(5)).await;
    durable(&log, vec![fail(2)]).await;
    filed(&log, 1).await;
    filed(&log, 2).await;
    assert_eq!(files(&dir, FOLDER).len(), 4);
}

#[tokio::test]
async fn whatever_operation_of_the_filer_fails_the_message_stays_and_is_filed_later() {
    let mut is_over = false;
    let mut at = 0;
    while !is_over {
        let dir = TempDir::new().unwrap();
        let disk = TestDisk::new();
        let (log, _) = open_on(&disk, &dir).await;
        let body = stage(&log, &vec![b'x'; 1_100_000]).await;
        durable(&log, vec![put(1, b"hello"), Op::Put { envelope: envelope(2), body }]).await;
        log.shared.wait_until_filed();
        // The record of the failure takes two: write and sync.
        disk.fail(disk.count.load(Ordering::SeqCst) + 2 + at, 1, EIO);
        durable(&log, vec![fail(1), fail(2)]).await;
        log.shared.wait_until_filed();
        assert_eq!(ids(&log), [1, 2], "{at}");
        is_over = !is_in_log(&log, 1) && !is_in_log(&log, 2);
        disk.heal();
        let killed = snapshot(&dir);
        drop(log);
        for dir in [dir, killed] {
            let (log, report) = open(&dir).await;
            assert_eq!((ids(&log), report.damaged), (vec![1, 2], vec![]), "{at}");
            filed(&log, 1).await;
            filed(&log, 2).await;
            assert_eq!(
                read_all(&log.open(id(2)).await.unwrap().body).await.unwrap().len(),
                1_100_000
            );
            until(|| files(&dir, FOLDER).len() == 4).await;
        }
        at += 1;
    }
    assert!(at > 10, "{at}");
}

#[tokio::test]
async fn a_message_that_cannot_be_read_stays_in_the_log() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    let body = stage(&log, &vec![b'x'; 1_100_000]).await;
    durable(&log, vec![Op::Put { envelope: envelope(1), body }, put(2, b"hello")]).await;
    let file = files(&dir, "bodies").remove(0);
    fs::write(&file, vec![b'y'; 1_100_000]).unwrap();
    durable(&log, vec![fail(1), fail(2)]).await;
    filed(&log, 2).await;
    log.shared.wait_until_filed();
    assert!(is_in_log(&log, 1));
    assert!(file.exists());
    until(|| files(&dir, FOLDER).len() == 2).await;
}

#[tokio::test]
async fn old_failed_messages_are_removed() {
    let (dir, log, _) = with_filed(b"hello").await;
    durable(&log, vec![put(2, b"queued")]).await;
    let shared = Arc::clone(&log.shared);
    let expire = async |time: u64| {
        let shared = Arc::clone(&shared);
        let expire = move || crate::spool::failed::expire(&shared, UnixMillis(time));
        tokio::task::spawn_blocking(expire).await.unwrap();
    };
    expire(1_000_000).await;
    assert_eq!(ids(&log), [1, 2]);
    expire(crate::clock::wall().0 + 1_000).await;
    assert_eq!(ids(&log), [2]);
    assert_eq!(log.health().failed, 0);
    until(|| files(&dir, FOLDER).is_empty()).await;
}

/// The files of message 1 cannot be removed then.
fn put_folders_in_place_of_files(dir: &TempDir) {
    for ending in ["eml", "json"] {
        fs::rename(path(dir, 1, ending), dir.path().join(ending)).unwrap();
        fs::create_dir(path(dir, 1, ending)).unwrap();
    }
}

fn put_the_files_back(dir: &TempDir) {
    for ending in ["eml", "json"] {
        fs::remove_dir(path(dir, 1, ending)).unwrap();
        fs::rename(dir.path().join(ending), path(dir, 1, ending)).unwrap();
    }
}

#[tokio::test]
async fn a_done_mark_stays_as_long_as_the_files() {
    let (dir, log, _) = with_filed(b"hello").await;
    let mib = vec![b'x'; 1024 * 1024];
    put_folders_in_place_of_files(&dir);
    durable(&log, vec![done(1)]).await;
    for n in 2..=70 {
        log.apply(vec![put(n, &mib), done(n)], Durability::Lazy).await.unwrap();
    }
    drop(log);
    put_the_files_back(&dir);
    let (log, _) = open(&dir).await;
    assert_eq!(ids(&log), []);
    until(|| files(&dir, FOLDER).is_empty()).await;
    durable(&log, vec![put(100, b"x")]).await;
    until(|| segments(&dir).len() == 1).await;
}

#[tokio::test]
async fn what_is_queued_again_while_old_messages_go_stays() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    const N: u128 = 3;
    for n in 1..=N {
        log.apply(vec![put(n, b"hello"), fail(n)], Durability::Lazy).await.unwrap();
    }
    for n in 1..=N {
        filed(&log, n).await;
    }
    let later = crate::clock::wall().plus(Duration::from_secs(1));
    let old = lock(&log.shared.index).failed.failed_before(later);
    assert_eq!(old.len(), 3);
    log.apply(vec![requeue(N, 0)], Durability::Durable).await.unwrap();
    let shared = Arc::clone(&log.shared);
    let end = move || crate::spool::failed::end_all(&shared, old);
    tokio::task::spawn_blocking(end).await.unwrap();
    assert_eq!(ids(&log), [N], "it was queued again, durably");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_that_queue_a_filed_message_again_at_once_one_is_refused() {
    let (_dir, log, _) = with_filed(&vec![b'y'; 2_000_000]).await;
    let again = || async {
        let queued = log.apply(vec![requeue(1, 4)], Durability::Lazy).await;
        if queued.is_ok() {
            log.apply(vec![update(1, 5)], Durability::Lazy).await.unwrap();
        }
        queued
    };
    let (one, two) = tokio::join!(again(), again());
    let refused = [one, two].into_iter().filter_map(Result::err).collect::<Vec<_>>();
    assert!(matches!(refused[..], [SpoolError::Refused(..)]), "{refused:?}");
    assert_eq!(log.open(id(1)).await.unwrap().progress, progress(5), "its progress counts");
}

#[tokio::test]
async fn one_that_cannot_be_read_now_keeps_no_other_from_being_filed() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    let body = stage(&log, &vec![b'x'; 1_100_000]).await;
    durable(&log, vec![Op::Put { envelope: envelope(1), body }, put(2, b"hello")]).await;
    let file = files(&dir, "bodies").remove(0);
    fs::remove_file(&file).unwrap();
    // ELOOP: neither missing nor another content.
    std::os::unix::fs::symlink(&file, &file).unwrap();
    durable(&log, vec![fail(1), fail(2)]).await;
    log.shared.wait_until_filed();
    assert!(is_in_log(&log, 1) && !is_in_log(&log, 2));
}

#[tokio::test]
async fn files_that_cannot_be_removed_do_not_keep_the_log_from_becoming_shorter() {
    let dir = TempDir::new().unwrap();
    let geometry = SMALL;
    let open = async || Log::open_on(TestDisk::new() as _, &at(dir.path()), geometry).await;
    let (log, _) = open().await.unwrap();
    durable(&log, vec![put(1, b"hello"), fail(1)]).await;
    filed(&log, 1).await;
    put_folders_in_place_of_files(&dir);
    durable(&log, vec![done(1)]).await;
    pass(&log, &dir, 200).await;
    drop(log);
    put_the_files_back(&dir);
    let (log, _) = open().await.unwrap();
    assert_eq!(ids(&log), [], "its end is still known");
    until(|| files(&dir, FOLDER).is_empty()).await;
}

#[tokio::test]
async fn what_is_queued_again_lets_go_of_the_mark_of_its_end() {
    let (dir, log, _) = with_filed(b"hello").await;
    for ending in ["eml", "json"] {
        fs::copy(path(&dir, 1, ending), dir.path().join(ending)).unwrap();
    }
    durable(&log, vec![requeue(1, 0)]).await;
    let number = *lock(&log.shared.index).segments.first_key_value().unwrap().0;
    assert_eq!(lock(&log.shared.index).failed.marks_in_segment(number, 9), []);
    drop(log);
    // A crash before the files were gone for good.
    for ending in ["eml", "json"] {
        fs::copy(dir.path().join(ending), path(&dir, 1, ending)).unwrap();
    }
    let (log, report) = open(&dir).await;
    assert_eq!((ids(&log), report.damaged), (vec![1], vec![]));
    assert!(is_in_log(&log, 1));
    until(|| files(&dir, FOLDER).is_empty()).await;
    assert_eq!(body(&log, 1).await, b"hello");
}

#[tokio::test]
async fn a_folder_that_could_not_be_opened_for_its_sync_is_synced_later() {
    let mut is_over = false;
    let mut at = 0;
    while !is_over {
        let dir = TempDir::new().unwrap();
        let disk = TestDisk::new();
        let (log, _) = open_on(&disk, &dir).await;
        durable(&log, vec![put(1, b"hello")]).await;
        log.shared.wait_until_filed();
        // The record of the failure takes two: write and sync.
        disk.fail(disk.count.load(Ordering::SeqCst) + 2 + at, 1, EMFILE);
        durable(&log, vec![fail(1)]).await;
        log.shared.wait_until_filed();
        is_over = !is_in_log(&log, 1);
        disk.heal();
        log.shared.filer.ring();
        filed(&log, 1).await;
        at += 1;
    }
    assert!(at > 5, "{at}");
}

#[tokio::test]
async fn a_failed_message_that_could_not_be_read_at_the_start_does_not_expire() {
    for ending in [".json", ".eml"] {
        let (dir, log, stored) = with_filed(b"hello").await;
        drop(log);
        let before = files(&dir, FOLDER);
        let disk = TestDisk::new();
        *lock(&disk.bad_ending) = Some(ending);
        let (log, report) = open_on(&disk, &dir).await;
        assert_eq!((ids(&log), report.damaged.len()), (vec![1], 1), "{report:?}");
        *lock(&disk.bad_ending) = None;
        let shared = Arc::clone(&log.shared);
        // An hour later: what is of 1970 is too old.
        let expire = move || crate::spool::failed::expire(&shared, UnixMillis(1_000_000));
        tokio::task::spawn_blocking(expire).await.unwrap();
        log.shared.wait_until_filed();
        assert_eq!((ids(&log), files(&dir, FOLDER)), (vec![1], before.clone()));
        if ending == ".json" {
            let shared = Arc::clone(&log.shared);
            let end = UnixMillis(u64::MAX);
            let expire = move || crate::spool::failed::expire(&shared, end);
            tokio::task::spawn_blocking(expire).await.unwrap();
            log.shared.wait_until_filed();
            assert_eq!((ids(&log), files(&dir, FOLDER)), (vec![1], before));
        }
        assert_eq!(log.open(id(1)).await.unwrap().envelope, stored.envelope);
        drop(log);
        let (_log, report) = open(&dir).await;
        assert_eq!(report, Report { messages: 1, ..Report::default() });
    }
}

#[tokio::test]
async fn what_may_only_be_read_is_read() {
    let (dir, log, stored) = with_filed(b"hello").await;
    durable(&log, vec![put(2, b"queued")]).await;
    drop(log);
    for file in files(&dir, FOLDER).into_iter().chain(segments(&dir)) {
        fs::set_permissions(file, fs::Permissions::from_mode(0o400)).unwrap();
    }
    let (log, report) = open(&dir).await;
    assert_eq!(report, Report { messages: 2, ..Report::default() });
    assert_eq!(log.open(id(1)).await.unwrap().envelope, stored.envelope);
    assert_eq!(body(&log, 2).await, b"queued");
}

#[tokio::test]
async fn a_json_that_is_too_long_is_damage_and_no_start_aborts_for_it() {
    let (dir, log, _) = with_filed(b"hello").await;
    drop(log);
    let json = File::options().write(true).open(path(&dir, 1, "json")).unwrap();
    json.set_len(1 << 40).unwrap();
    let (log, report) = open(&dir).await;
    assert_eq!((ids(&log), report.damaged.len()), (vec![], 1), "{report:?}");
    assert!(report.damaged[0].contains(".json: it has 1099511627776 octets"), "{report:?}");
    log.shared.wait_until_filed();
    assert_eq!(files(&dir, FOLDER).len(), 2);
    assert_eq!(fs::metadata(path(&dir, 1, "json")).unwrap().len(), 1 << 40);
}

#[tokio::test]
async fn a_json_of_another_format_is_refused_by_name_and_nothing_is_changed() {
    let (dir, log, _) = with_filed(b"hello").await;
    drop(log);
    let json = path(&dir, 1, "json");
    let ours = fs::read_to_string(&json).unwrap();
    let stray = dir.path().join("spool/tmp/stray");
    fs::write(&stray, b"of a crash").unwrap();
    for (format, says) in [(2, "a later"), (0, "an earlier")] {
        // All but the format and the checksum may be another.
        for rest in [ours.strip_prefix("{\"format\":1").unwrap(), ",\"sum\":0}\n"] {
            let mut sheet = format!("{{\"format\":{format}{rest}").into_bytes();
            crate::spool::failed::mend_sum(&mut sheet);
            fs::write(&json, &sheet).unwrap();
            let refused = Log::open(&at(dir.path())).await.unwrap_err();
            let says = format!(
                "{} was written by {says} version of the program: its format is {format}, this program reads 1",
                json.display()
            );
            assert!(refused.to_string().starts_with(&says), "{refused}");
            assert!(matches!(refused, OpenError::OtherFormat { .. }));
            assert_eq!(fs::read(&json).unwrap(), sheet);
            assert!(stray.exists());
        }
    }
    // A digit that was flipped is damage.
    fs::write(&json, ours.replace("{\"format\":1", "{\"format\":3")).unwrap();
    let (_log, report) = open(&dir).await;
    assert!(report.damaged[0].contains("it is not what was written"), "{report:?}");
}
