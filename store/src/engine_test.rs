//! Named cases of the engine that the model test does not spell out.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use model::message::{self, put_property};
use model::{Group, GroupConfig, TagFilter, Timestamp, Topic, TopicConfig};

use crate::change::Change;
use crate::engine::{self, PopRequest};
use crate::fs::{Fault, Fs, MemFs, Space};
use crate::keys::key_hash;
use crate::kv::{Batch, Family, Kv, MemKv};
use crate::log::{LogOptions, segment_path};
use crate::pop::Standing;
use crate::{Engine, FlushMode, Hold, NewMessage, Options, Popped, RecoveryReport, Retention, StoreError};

const NOW: Timestamp = Timestamp(1_000_000);

struct Disk {
    fs: MemFs,
    kv: MemKv,
}

impl Disk {
    fn new() -> Self {
        Self { fs: MemFs::new(), kv: MemKv::default() }
    }

    fn open(&self, flush: FlushMode) -> (Engine, RecoveryReport) {
        self.open_with(flush, Retention::default())
    }

    fn open_with(&self, flush: FlushMode, retention: Retention) -> (Engine, RecoveryReport) {
        let options = Options {
            dir: "/data".into(),
            flush,
            log: LogOptions { segment_bytes: 64 << 10, chunk_bytes: 8 << 10, reserve_bytes: 8 << 10 },
            queue_file_entries: 16,
            key_index: crate::keys::Shape { slots: 64, entries: 1000 },
            retention,
            host: ([127, 0, 0, 1], 1).into(),
            new_key: [1; 16],
        };
        let fs: Arc<dyn Fs> = Arc::new(self.fs.clone());
        let lock = engine::claim(&*fs, &options).unwrap();
        let (mut engine, report) = Engine::open(options, fs, Arc::new(self.kv.clone()), lock, NOW).unwrap();
        engine.put_meta(Change::PutTopic(TopicConfig { queues: 1, ..TopicConfig::normal(topic()) }));
        engine.put_meta(Change::PutGroup(GroupConfig::concurrent(group())));
        engine.commit(NOW).unwrap().changes.unwrap();
        (engine, report)
    }
}

fn topic() -> Topic {
    Topic::stored("t")
}

fn group() -> Group {
    Group::stored("g")
}

fn send(engine: &mut Engine, body: &str, tag: &str) -> Result<u64, StoreError> {
    let mut properties = Vec::new();
    put_property(&mut properties, message::TAGS, tag);
    put_property(&mut properties, message::KEYS, &format!("key-{}", body.len()));
    let message = NewMessage {
        queue: 0,
        body: Bytes::from(body.to_owned()),
        properties: properties.into(),
        sys_flag: 0,
        born_timestamp_ms: NOW.0,
        born_host: ([127, 0, 0, 1], 2).into(),
        hold: Hold::Nothing,
    };
    let stored = engine.append(&topic(), &[message], NOW)?;
    engine.commit(NOW)?;
    Ok(stored[0].log_offset)
}

fn pop(engine: &mut Engine, filter: &str, now: Timestamp) -> Vec<(String, Popped)> {
    let filter = TagFilter::parse(filter).unwrap();
    let (group, topic) = (group(), topic());
    let request = PopRequest {
        group: &group,
        topic: &topic,
        filter: &filter,
        max: 32,
        invisible_ms: 1000,
        renewed_for: None,
        in_order: false,
        attempt_id: 0,
    };
    let popped = engine.pop(&request, now).unwrap();
    engine.commit(now).unwrap();
    let body = |p: &Popped| engine.reader().read(p.log_offset, p.size).map(|r| r.body).unwrap_or_default();
    popped.into_iter().map(|p| (String::from_utf8_lossy(&body(&p)).into_owned(), p)).collect()
}

fn bodies(popped: &[(String, Popped)]) -> Vec<&str> {
    popped.iter().map(|(body, _)| body.as_str()).collect()
}

#[test]
fn damage_below_the_flushed_offset_is_skipped_and_reported() {
    let disk = Disk::new();
    let (mut engine, _) = disk.open(FlushMode::Async);
    send(&mut engine, "one", "a").unwrap();
    let damaged = send(&mut engine, "two", "a").unwrap();
    send(&mut engine, "three", "a").unwrap();
    engine.syncer().sync().unwrap();
    drop(engine);
    disk.fs.kill();
    disk.fs.damage(&segment_path(Path::new("/data/commitlog"), 0), damaged + 90);
    let (mut engine, report) = disk.open(FlushMode::Async);
    assert_eq!((report.damaged, report.torn), (vec![damaged], false));
    assert_eq!(bodies(&pop(&mut engine, "*", NOW)), ["one", "three"]);
    assert_eq!(engine.bounds(&topic(), 0).max, 3, "its place stays");
}

#[test]
fn damage_above_the_flushed_offset_is_a_torn_tail() {
    let disk = Disk::new();
    let (mut engine, _) = disk.open(FlushMode::Async);
    send(&mut engine, "one", "a").unwrap();
    engine.syncer().sync().unwrap();
    let torn = send(&mut engine, "two", "a").unwrap();
    drop(engine);
    disk.fs.kill();
    disk.fs.damage(&segment_path(Path::new("/data/commitlog"), 0), torn + 90);
    let (mut engine, report) = disk.open(FlushMode::Async);
    assert_eq!((report.damaged, report.torn, report.end), (vec![], true, torn));
    assert_eq!(send(&mut engine, "again", "a").unwrap(), torn);
    assert_eq!(bodies(&pop(&mut engine, "*", NOW)), ["one", "again"]);
}

#[test]
fn a_full_disk_refuses_sends_while_acknowledgements_go_on_and_mends_by_itself() {
    let disk = Disk::new();
    let (mut engine, _) = disk.open(FlushMode::Async);
    let body = "x".repeat(500);
    send(&mut engine, &body, "a").unwrap();
    disk.fs.set_room(Some(0));
    let mut stored = 1;
    let error = loop {
        match send(&mut engine, &body, "a") {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StoreError::DiskFull { .. }), "{error}");
    let popped = pop(&mut engine, "*", NOW);
    assert_eq!(popped.len(), stored);
    for (_, p) in popped {
        assert_eq!(engine.acknowledge(&p.receipt, NOW).unwrap(), Standing::Live);
        engine.commit(NOW).unwrap().changes.expect("the reserve takes it");
    }
    disk.fs.set_room(None);
    send(&mut engine, &body, "a").expect("space again: sends go on by themselves");
    assert_eq!(pop(&mut engine, "*", NOW).len(), 1);
}

#[test]
fn a_failed_sync_poisons_the_store_for_good() {
    let disk = Disk::new();
    let (mut engine, _) = disk.open(FlushMode::Sync);
    disk.fs.inject(Fault::Sync { after: 0 });
    send(&mut engine, "one", "a").unwrap();
    assert!(matches!(engine.syncer().sync(), Err(StoreError::Poisoned { operation: "sync", .. })));
    disk.fs.heal();
    assert!(
        matches!(engine.syncer().sync(), Err(StoreError::Poisoned { .. })),
        "never retried on the same descriptor"
    );
    assert!(matches!(send(&mut engine, "two", "a"), Err(StoreError::Poisoned { .. })));
}

#[test]
fn sync_flush_shows_nothing_that_a_power_loss_could_take() {
    let disk = Disk::new();
    let (mut engine, _) = disk.open(FlushMode::Sync);
    send(&mut engine, "one", "a").unwrap();
    assert_eq!(pop(&mut engine, "*", NOW).len(), 0);
    engine.syncer().sync().unwrap();
    assert_eq!(pop(&mut engine, "*", NOW).len(), 1);
}

#[test]
fn filters_pass_over_what_does_not_match() {
    let disk = Disk::new();
    let (mut engine, _) = disk.open(FlushMode::Async);
    for i in 0..600 {
        send(&mut engine, &i.to_string(), if i == 599 { "b" } else { "a" }).unwrap();
    }
    assert_eq!(bodies(&pop(&mut engine, "b", NOW)), ["599"]);
    let lag = engine.lag(&group());
    assert_eq!((lag[0].2.next, lag[0].2.in_flight), (600, 1));
}

#[test]
fn a_deleted_topic_takes_its_retries_along() {
    let disk = Disk::new();
    let (mut engine, _) = disk.open(FlushMode::Async);
    send(&mut engine, "old", "a").unwrap();
    pop(&mut engine, "*", NOW);
    let later = NOW.plus_ms(2000);
    engine.expire(later).unwrap();
    engine.commit(later).unwrap();
    assert_eq!(engine.bounds(&Topic::retry(&group(), &topic()), 0).max, 1);
    engine.put_meta(Change::PutTopic(TopicConfig {
        deleted: true,
        version: 2,
        ..TopicConfig::normal(topic())
    }));
    engine.commit(later).unwrap().changes.unwrap();
    let stale = TopicConfig { queues: 1, ..TopicConfig::normal(topic()) };
    engine.put_meta(Change::PutTopic(stale.clone()));
    assert!(engine.meta().topic(&topic()).is_none(), "an older record does not bring it back");
    engine.put_meta(Change::PutTopic(TopicConfig { version: 3, ..stale }));
    engine.commit(later).unwrap().changes.unwrap();
    assert_eq!(pop(&mut engine, "*", later).len(), 0);
    send(&mut engine, "new", "a").unwrap();
    let popped = pop(&mut engine, "*", later);
    assert_eq!((bodies(&popped), popped[0].1.receipt.offset), (vec!["new"], 0));

    // The same after a restart that replays it all.
    drop(engine);
    disk.fs.kill();
    let (engine, _) = disk.open(FlushMode::Async);
    assert_eq!(engine.bounds(&topic(), 0).max, 1);
    assert_eq!(engine.bounds(&Topic::retry(&group(), &topic()), 0).max, 0);
}

#[test]
fn a_clean_stop_leaves_nothing_to_replay() {
    let disk = Disk::new();
    let (mut engine, _) = disk.open(FlushMode::Async);
    send(&mut engine, "one", "a").unwrap();
    engine.close(NOW).unwrap();
    let (mut engine, report) = disk.open(FlushMode::Async);
    assert_eq!((report.clean, report.replayed, report.torn), (true, 0, false));
    assert_eq!(bodies(&pop(&mut engine, "*", NOW)), ["one"]);
    drop(engine);
    disk.fs.kill();
    assert!(!disk.open(FlushMode::Async).1.clean, "the mark of a clean stop counts once");
}

#[test]
fn a_missing_log_file_is_refused_not_skipped() {
    let disk = Disk::new();
    let (mut engine, _) = disk.open(FlushMode::Async);
    let body = "x".repeat(5000);
    for _ in 0..40 {
        send(&mut engine, &body, "a").unwrap();
    }
    drop(engine);
    disk.fs.kill();
    disk.fs.remove_file(&segment_path(Path::new("/data/commitlog"), 64 << 10)).unwrap();
    let fs: Arc<dyn Fs> = Arc::new(disk.fs.clone());
    let options = LogOptions { segment_bytes: 64 << 10, chunk_bytes: 8 << 10, reserve_bytes: 8 << 10 };
    let opened = crate::log::Log::open(fs, Path::new("/data/commitlog"), options);
    assert!(matches!(opened.map(drop), Err(StoreError::Damaged { .. })));
}

const DAY_LATER: Timestamp = Timestamp(NOW.0 + 24 * 3_600_000);

/// Fills some log files; where the first message stands that a group has not acknowledged.
fn fill(engine: &mut Engine, consumed: usize) {
    for i in 0..30 {
        send(engine, &"x".repeat(8000 + i), "a").unwrap();
    }
    let popped = pop(engine, "*", NOW);
    assert_eq!(popped.len(), 30);
    for (_, p) in &popped[..consumed] {
        engine.acknowledge(&p.receipt, NOW).unwrap();
    }
    engine.commit(NOW).unwrap().changes.unwrap();
}

fn checkpoint(engine: &mut Engine) {
    let checkpoint = engine.checkpoint(NOW, false).unwrap();
    let outcome = checkpoint.write(&engine.syncer(), &*engine.kv());
    engine.checkpoint_written(outcome);
}

/// Lets go of what may go, as the broker's threads do; how many files of the log.
fn keep_disk(engine: &mut Engine, now: Timestamp) -> usize {
    let Some(retired) = engine.keep_disk(now).unwrap() else { return 0 };
    retired.files.iter().for_each(|file| engine.fs().remove_file(file).unwrap());
    retired.keys.prune(retired.log_start).unwrap();
    retired.files.iter().filter(|file| file.starts_with("/data/commitlog")).count()
}

#[test]
fn old_files_go_but_not_what_a_group_has_not_consumed() {
    let disk = Disk::new();
    let hour = Retention { age_ms: 3_600_000, ..Retention::default() };
    let (mut engine, _) = disk.open_with(FlushMode::Async, hour);
    fill(&mut engine, 20);
    assert_eq!(keep_disk(&mut engine, DAY_LATER), 0, "nothing goes that a restart would need");
    checkpoint(&mut engine);
    assert_eq!(keep_disk(&mut engine, NOW), 0, "too young");
    assert_eq!(keep_disk(&mut engine, DAY_LATER), 2, "messages 0 to 15 fill them, 20 is in the third");
    assert_eq!(engine.state().held_by.as_deref(), Some("g on t"));
    let min = engine.bounds(&topic(), 0).min;
    assert!((14..20).contains(&min), "{min}");
    let start = engine.state().log_start;
    drop(engine);
    disk.fs.kill();

    let (mut engine, report) = disk.open_with(FlushMode::Async, hour);
    assert_eq!((engine.state().log_start, report.damaged.len()), (start, 0));
    assert_eq!(engine.bounds(&topic(), 0).min, min);
    // What was in flight comes again, and once it is acknowledged its file may go.
    engine.expire(Timestamp(NOW.0 + 2000)).unwrap();
    engine.commit(NOW).unwrap().changes.unwrap();
    let again = pop(&mut engine, "*", DAY_LATER);
    assert_eq!(again.len(), 10);
    checkpoint(&mut engine);
    assert_eq!(keep_disk(&mut engine, DAY_LATER), 1, "their copies in the retry topic are newer");
}

#[test]
fn unconsumed_messages_go_only_by_explicit_policy_and_the_log_keeps_its_size() {
    let disk = Disk::new();
    let small = Retention { max_bytes: 100 << 10, delete_unconsumed: true, ..Retention::default() };
    let (mut engine, _) = disk.open_with(FlushMode::Async, small);
    fill(&mut engine, 0);
    checkpoint(&mut engine);
    assert_eq!(keep_disk(&mut engine, NOW), 3);
    let bounds = engine.bounds(&topic(), 0);
    assert!(bounds.min > 20 && bounds.max == 30, "{bounds:?}");
    assert!(engine.state().log_end - engine.state().log_start <= 100 << 10);
    // What was in flight and is gone is not delivered again, and nothing breaks.
    while engine.expire(Timestamp(NOW.0 + 2000)).unwrap() {}
    engine.commit(NOW).unwrap().changes.unwrap();
    assert_eq!(pop(&mut engine, "*", DAY_LATER).len() as u64, 30 - bounds.min);
}

#[test]
fn a_nearly_full_disk_refuses_sends_until_there_is_space_again() {
    let disk = Disk::new();
    let (mut engine, _) = disk.open(FlushMode::Async);
    fill(&mut engine, 30);
    checkpoint(&mut engine);
    let used = |percent: u64| disk.fs.set_space(Some(Space { total: 100, free: 100 - percent }));
    used(84);
    assert_eq!(keep_disk(&mut engine, NOW), 0);
    used(91);
    assert!(keep_disk(&mut engine, NOW) > 0, "consumed messages go whatever their age");
    assert!(matches!(send(&mut engine, "no", "a"), Err(StoreError::DiskFull { .. })));
    used(87);
    keep_disk(&mut engine, NOW);
    assert!(matches!(send(&mut engine, "not yet", "a"), Err(StoreError::DiskFull { .. })));
    used(80);
    keep_disk(&mut engine, NOW);
    send(&mut engine, "yes", "a").unwrap();
}

#[test]
fn keys_are_found_at_once_and_after_a_kill() {
    let disk = Disk::new();
    let (mut engine, _) = disk.open(FlushMode::Async);
    let first = send(&mut engine, "one", "a").unwrap();
    let hash = key_hash("t", "key-3");
    assert_eq!(engine.new_keys(hash), [first]);
    checkpoint(&mut engine);
    assert_eq!(engine.keys().find(hash, 0, i64::MAX, 9).unwrap(), [first]);
    let second = send(&mut engine, "two", "a").unwrap();
    engine.syncer().sync().unwrap();
    drop(engine);
    disk.fs.kill();
    let (engine, _) = disk.open(FlushMode::Async);
    assert!(engine.keys().progress().is_some());
    engine.keys().rebuild(&engine.reader(), || false).unwrap();
    assert_eq!(engine.keys().find(hash, 0, i64::MAX, 9).unwrap(), [second, first]);
    assert_eq!(engine.keys().progress(), None);
    engine.close(NOW).unwrap();
    // The mark of how far it goes once shared its row with a family of the same name.
    let (engine, report) = disk.open(FlushMode::Async);
    assert!(report.clean);
    assert_eq!(engine.keys().progress(), None, "nothing to index again after a clean stop");
    assert_eq!(engine.keys().find(hash, 0, i64::MAX, 9).unwrap(), [second, first]);
}

#[test]
fn a_folder_of_the_first_format_gets_its_queues_made_again() {
    let disk = Disk::new();
    let (mut engine, _) = disk.open(FlushMode::Async);
    fill(&mut engine, 20);
    let bounds = engine.bounds(&topic(), 0);
    let entries = engine.entries(&topic(), 0, 0, 100).unwrap();
    engine.close(NOW).unwrap();
    // As it was: no rows of queues, another mark.
    let mut batch = Batch::default();
    batch.delete(Family::Covered, "queue rows");
    disk.kv.rows(Family::Queues).unwrap().into_iter().for_each(|(key, _)| batch.delete(Family::Queues, key));
    disk.kv.write(&batch, true).unwrap();
    disk.fs.open(Path::new("/data/format"), false).unwrap().write_at(b"ferrymq 1\n", 0).unwrap();
    for _ in 0..2 {
        let (engine, _) = disk.open(FlushMode::Async);
        assert_eq!(engine.bounds(&topic(), 0), bounds);
        assert_eq!(engine.entries(&topic(), 0, 0, 100).unwrap(), entries);
        engine.close(NOW).unwrap();
    }
    let file = disk.fs.open_read(Path::new("/data/format")).unwrap();
    assert_eq!(crate::fs::read_exact_at(&*file, 10, 0).unwrap(), b"ferrymq 3\n");
}

#[test]
fn keys_lost_to_a_failing_disk_are_indexed_again_without_a_restart() {
    let disk = Disk::new();
    let (mut engine, _) = disk.open(FlushMode::Async);
    let first = send(&mut engine, "one", "a").unwrap();
    // The index is the first that a checkpoint of so few messages writes to.
    disk.fs.inject(Fault::Write { after: 0 });
    checkpoint(&mut engine);
    disk.fs.heal();
    let second = send(&mut engine, "two", "a").unwrap();
    checkpoint(&mut engine);
    let hash = key_hash("t", "key-3");
    assert_eq!(engine.keys().waiting(), 0, "nothing piles up meanwhile");
    assert!(engine.keys().mend().unwrap());
    engine.keys().rebuild(&engine.reader(), || false).unwrap();
    assert_eq!(engine.keys().find(hash, 0, i64::MAX, 9).unwrap(), [second, first]);
    assert!(!engine.keys().mend().unwrap(), "mended");
    let third = send(&mut engine, "six", "a").unwrap();
    checkpoint(&mut engine);
    assert_eq!(engine.keys().find(hash, 0, i64::MAX, 9).unwrap(), [third, second, first]);
}

#[test]
fn nobody_takes_a_sync_that_is_still_running_for_done() {
    let disk = Disk::new();
    let (mut engine, _) = disk.open(FlushMode::Async);
    send(&mut engine, "one", "a").unwrap();
    let end = engine.end();
    let (entered, is_in) = std::sync::mpsc::sync_channel(9);
    let (go, may_go) = std::sync::mpsc::channel();
    let may_go = parking_lot::Mutex::new(may_go);
    disk.fs.on_sync(move || {
        entered.send(()).unwrap();
        let _: Result<(), _> = may_go.lock().recv();
    });
    let syncers = [engine.syncer(), engine.syncer()];
    std::thread::scope(|threads| {
        let [first, second] = &syncers;
        let first = threads.spawn(|| first.sync().unwrap());
        is_in.recv().unwrap();
        let (done, is_done) = std::sync::mpsc::channel();
        threads.spawn(move || done.send(second.sync().unwrap()).unwrap());
        let early = is_done.recv_timeout(std::time::Duration::from_millis(100));
        assert!(early.is_err(), "the second one is told that {early:?} is durable");
        drop(go);
        assert_eq!((first.join().unwrap(), is_done.recv().unwrap()), (end, end));
    });
}
