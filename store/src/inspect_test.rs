//! Damage at any place of any file: named, never a panic, and never more lost than what was hit.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use model::message::{self, put_property};
use model::{Timestamp, Topic, TopicConfig};
use proptest::prelude::*;

use crate::change::Change;
use crate::fs::{Fs, MemFs};
use crate::inspect::{self, Kind};
use crate::keys::Shape;
use crate::kv::MemKv;
use crate::log::LogOptions;
use crate::{Engine, FlushMode, NewMessage, Options, Retention, StoreError, engine, import};

const NOW: Timestamp = Timestamp(1_000_000);
const SHAPE: Shape = Shape { slots: 16, entries: 500 };

fn open(fs: &MemFs, kv: &MemKv) -> Result<Engine, StoreError> {
    let options = Options {
        dir: "/data".into(),
        flush: FlushMode::Async,
        log: LogOptions { segment_bytes: 16 << 10, chunk_bytes: 4 << 10, reserve_bytes: 4 << 10 },
        queue_file_entries: 64,
        key_index: SHAPE,
        retention: Retention::default(),
        host: ([127, 0, 0, 1], 1).into(),
        new_key: [1; 16],
    };
    let fs: Arc<dyn Fs> = Arc::new(fs.clone());
    let lock = engine::claim(&*fs, &options)?;
    Engine::open(options, fs, Arc::new(kv.clone()), lock, NOW).map(|(engine, _)| engine)
}

/// A folder with messages, closed cleanly; how many messages.
fn filled(sizes: &[usize]) -> (MemFs, MemKv, Vec<String>) {
    let (fs, kv) = (MemFs::new(), MemKv::default());
    let mut engine = open(&fs, &kv).unwrap();
    let topic = Topic::stored("t");
    engine.put_meta(Change::PutTopic(TopicConfig { queues: 2, ..TopicConfig::normal(topic.clone()) }));
    let mut bodies = Vec::new();
    for (i, size) in sizes.iter().enumerate() {
        let mut properties = Vec::new();
        put_property(&mut properties, message::KEYS, &format!("key-{i}"));
        bodies.push(format!("{i}-{}", "b".repeat(*size)));
        let message = NewMessage {
            queue: i as u32 % 2,
            body: Bytes::from(bodies[i].clone()),
            properties: properties.into(),
            sys_flag: 0,
            born_timestamp_ms: NOW.0,
            born_host: ([127, 0, 0, 1], 2).into(),
            hold: crate::Hold::Nothing,
        };
        engine.append(&topic, &[message], NOW).unwrap();
        engine.commit(NOW).unwrap();
    }
    engine.close(NOW).unwrap();
    (fs, kv, bodies)
}

fn files(fs: &MemFs) -> Vec<PathBuf> {
    fn under(fs: &MemFs, dir: &Path, out: &mut Vec<PathBuf>) {
        for name in fs.list(dir).unwrap() {
            let path = dir.join(name);
            match fs.open_read(&path) {
                Ok(_) => out.push(path),
                Err(_) => under(fs, &path, out),
            }
        }
    }
    let mut out = Vec::new();
    under(fs, Path::new("/data"), &mut out);
    out
}

#[derive(Clone, Copy, Debug)]
enum Damage {
    Flip,
    Zero(usize),
    Foreign(usize),
    Cut,
}

fn any_damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        Just(Damage::Flip),
        (1usize..600).prop_map(Damage::Zero),
        (1usize..600).prop_map(Damage::Foreign),
        Just(Damage::Cut),
    ]
}

fn hurt(fs: &MemFs, path: &Path, at: u64, damage: Damage) {
    let file = fs.open(path, false).unwrap();
    let left = (file.len().unwrap() - at) as usize;
    match damage {
        Damage::Flip => fs.damage(path, at),
        Damage::Zero(n) => file.write_at(&vec![0; n.min(left)], at).unwrap(),
        Damage::Foreign(n) => {
            let noise: Vec<u8> = (0..n.min(left)).map(|i| (i * 151 + 7) as u8).collect();
            file.write_at(&noise, at).unwrap();
        }
        Damage::Cut => file.set_len(at).unwrap(),
    }
    file.sync().unwrap();
}

proptest! {
    #[test]
    fn damage_anywhere_is_survived_and_named(
        sizes in prop::collection::vec(0usize..900, 1..40),
        which in any::<prop::sample::Index>(),
        place in any::<prop::sample::Index>(),
        damage in any_damage(),
    ) {
        let (fs, kv, bodies) = filled(&sizes);
        let sound = inspect::verify(&fs, Path::new("/data"), |_| {}).unwrap();
        prop_assert_eq!(&sound.flaws, &[]);
        let files = files(&fs);
        let path = &files[which.index(files.len())];
        let len = fs.open_read(path).unwrap().len().unwrap();
        prop_assume!(len > 0);
        let at = place.index(len as usize) as u64;
        hurt(&fs, path, at, damage);

        // Every reader gets through, whatever it finds.
        let _ = inspect::kind(&fs, path).map(|kind| match kind {
            Kind::CommitLog { base } => inspect::commit_log(&fs, path, base, |_| true),
            Kind::ConsumeQueue { base } => inspect::consume_queue(&fs, path, base, |_, _| true),
            Kind::IndexFile => inspect::index_file(&fs, path, SHAPE.slots, |_, _| true).map(drop),
            Kind::Checkpoint => inspect::checkpoint(&fs, path).map(drop),
            Kind::Mark { .. } => Ok(()),
        });
        let _ = import::scan(&fs, &|_| Ok(Vec::new()), Path::new("/data"), |_| {});
        let in_log = path.starts_with("/data/commitlog");
        if let Ok(seen) = inspect::verify(&fs, Path::new("/data"), |_| {}) {
            let lost = sound.records - seen.records;
            let most = match damage {
                Damage::Flip => 1,
                Damage::Zero(n) | Damage::Foreign(n) => n as u64 / 90 + 2,
                Damage::Cut => sound.records,
            };
            prop_assert!(lost <= if in_log { most } else { 0 }, "{} lost", lost);
            prop_assert!(lost == 0 || !seen.flaws.is_empty(), "lost without a word");
        }
        // The store opens, or says why not; what it then holds are the messages that were sent.
        if let Ok(mut engine) = open(&fs, &kv) {
            engine.rebuild_indexes(|_| {}).unwrap();
            let topic = Topic::stored("t");
            let mut found = 0;
            for (queue, bounds) in engine.queues(&topic) {
                for offset in bounds.min..bounds.max {
                    let Some(record) = engine.message(&topic, queue, offset) else { continue };
                    let i = offset as usize * 2 + queue as usize;
                    prop_assert_eq!(&record.body[..], bodies[i].as_bytes());
                    found += 1;
                }
            }
            if !in_log {
                prop_assert_eq!(found, bodies.len(), "indexes are made again from the log");
            }
            engine.close(NOW).unwrap();
        }
    }
}

#[test]
fn a_flipped_bit_costs_one_message_and_is_named_by_file_and_offset() {
    let (fs, kv, bodies) = filled(&[100; 9]);
    let engine = open(&fs, &kv).unwrap();
    let record = engine.message(&Topic::stored("t"), 1, 1).unwrap();
    engine.close(NOW).unwrap();
    let log = PathBuf::from("/data/commitlog/00000000000000000000");
    hurt(&fs, &log, record.log_offset + 120, Damage::Flip);
    let seen = inspect::verify(&fs, Path::new("/data"), |_| {}).unwrap();
    let places: Vec<_> = seen.flaws.iter().map(|f| (f.file.clone(), f.at)).collect();
    assert_eq!(places, [(log, record.log_offset)]);
    let mut engine = open(&fs, &kv).unwrap();
    engine.rebuild_indexes(|_| {}).unwrap();
    let bounds = engine.bounds(&Topic::stored("t"), 1);
    let found = (bounds.min..bounds.max).filter(|o| engine.message(&Topic::stored("t"), 1, *o).is_some());
    assert_eq!(found.collect::<Vec<_>>(), [0, 2, 3], "of {} messages", bodies.len());
}

#[test]
fn a_log_that_ends_before_what_was_flushed_is_named() {
    let (fs, kv, _) = filled(&[100; 9]);
    let engine = open(&fs, &kv).unwrap();
    let last = engine.message(&Topic::stored("t"), 0, 4).unwrap();
    engine.close(NOW).unwrap();
    let log = PathBuf::from("/data/commitlog/00000000000000000000");
    hurt(&fs, &log, last.log_offset, Damage::Cut);
    let seen = inspect::verify(&fs, Path::new("/data"), |_| {}).unwrap();
    let places: Vec<_> = seen.flaws.iter().map(|f| (f.file.clone(), f.at)).collect();
    assert_eq!(places, [(log, last.log_offset)], "cut where a record begins, nothing looks torn");
}
