//! The store against a reference model in memory, with kills, power losses, torn writes and failing disks.
//!
//! The model knows for every message whether its send was acknowledged (then it must never be lost), and for
//! every acknowledgement whether it was confirmed (then the message must never come back).

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use model::message::{self, put_property};
use model::{Group, GroupConfig, TagFilter, Timestamp, Topic, TopicConfig};
use proptest::prelude::*;

use crate::change::Change;
use crate::engine::{self, PopRequest};
use crate::fs::{Fault, Fs, MemFs};
use crate::kv::MemKv;
use crate::log::LogOptions;
use crate::pop::Standing;
use crate::{Engine, FlushMode, Hold, NewMessage, Options, Popped, StoreError};

const QUEUES: u32 = 2;
const MAX_ATTEMPTS: u32 = 3;
const INVISIBLE_MS: i64 = 1000;

#[derive(Clone, Debug)]
enum Op {
    Send { queue: u32, count: u8, size: u16 },
    Pop { max: u8 },
    Ack { which: u8 },
    Nack { which: u8 },
    Advance { ms: u16 },
    Sync,
    Checkpoint,
    Kill,
    PowerLoss { seed: u64 },
    FailWrite { after: u8 },
    FailSync { after: u8 },
    FailKv,
    Room { kib: u8 },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..QUEUES, 1u8..6, 0u16..700).prop_map(|(queue, count, size)| Op::Send { queue, count, size }),
        5 => (1u8..9).prop_map(|max| Op::Pop { max }),
        5 => any::<u8>().prop_map(|which| Op::Ack { which }),
        1 => any::<u8>().prop_map(|which| Op::Nack { which }),
        2 => (0u16..1500).prop_map(|ms| Op::Advance { ms }),
        2 => Just(Op::Sync),
        2 => Just(Op::Checkpoint),
        1 => Just(Op::Kill),
        1 => any::<u64>().prop_map(|seed| Op::PowerLoss { seed }),
        1 => (0u8..4).prop_map(|after| Op::FailWrite { after }),
        1 => (0u8..4).prop_map(|after| Op::FailSync { after }),
        1 => Just(Op::FailKv),
        1 => (0u8..64).prop_map(|kib| Op::Room { kib }),
    ]
}

/// Seeded, so that a failing case can be run again.
fn coin(seed: u64) -> impl FnMut() -> bool {
    let mut random = fastrand::Rng::with_seed(seed);
    move || random.bool()
}

#[derive(Clone, Debug)]
struct Sent {
    queue: u32,
    offset: u64,
    end: u64,
    body: Vec<u8>,
}

struct World {
    fs: MemFs,
    kv: MemKv,
    now: Timestamp,
    flush: FlushMode,
    engine: Option<Engine>,
    next_id: u32,
    /// Sends that were acknowledged, or will be once the log is flushed up to their end.
    sent: BTreeMap<u32, Sent>,
    held: Vec<(u32, Popped)>,
    /// Confirmed acknowledgements and the log's end that makes them last through a power loss.
    acked: BTreeMap<u32, u64>,
    /// Acknowledgements asked for: they may have happened, whatever came back.
    asked: BTreeSet<u32>,
    /// Sends that the producer has been told of.
    told: BTreeSet<u32>,
    seen: BTreeSet<u32>,
    dead: BTreeSet<u32>,
}

impl World {
    fn new(flush: FlushMode) -> Self {
        let mut world = Self {
            fs: MemFs::new(),
            kv: MemKv::default(),
            now: Timestamp(1_000_000),
            flush,
            engine: None,
            next_id: 0,
            sent: BTreeMap::new(),
            held: Vec::new(),
            acked: BTreeMap::new(),
            asked: BTreeSet::new(),
            told: BTreeSet::new(),
            seen: BTreeSet::new(),
            dead: BTreeSet::new(),
        };
        world.open();
        world.with(|e, now| {
            e.put_meta(Change::PutTopic(TopicConfig { queues: QUEUES, ..TopicConfig::normal(topic()) }));
            e.put_meta(Change::PutGroup(GroupConfig {
                max_attempts: MAX_ATTEMPTS,
                ..GroupConfig::concurrent(group())
            }));
            e.commit(now).unwrap().changes.unwrap();
            e.syncer().sync().unwrap();
        });
        world
    }

    fn open(&mut self) {
        let options = Options {
            dir: PathBuf::from("/data"),
            flush: self.flush,
            log: LogOptions { segment_bytes: 16 << 10, chunk_bytes: 4 << 10, reserve_bytes: 2 << 10 },
            queue_file_entries: 16,
            key_index: crate::keys::Shape { slots: 64, entries: 1000 },
            retention: crate::Retention::default(),
            host: ([127, 0, 0, 1], 10911).into(),
            new_key: [9; 16],
        };
        let fs: Arc<dyn Fs> = Arc::new(self.fs.clone());
        let lock = engine::claim(&*fs, &options).unwrap();
        let (engine, report) = Engine::open(options, fs, Arc::new(self.kv.clone()), lock, self.now).unwrap();
        assert_eq!(report.damaged, [] as [u64; 0]);
        self.engine = Some(engine);
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut Engine, Timestamp) -> T) -> T {
        f(self.engine.as_mut().expect("open"), self.now)
    }

    fn send(&mut self, queue: u32, count: u8, size: u16) {
        let messages: Vec<(u32, NewMessage)> = (0..count)
            .map(|i| {
                let id = self.next_id + u32::from(i);
                let mut properties = Vec::new();
                put_property(&mut properties, message::UNIQ_KEY, &id.to_string());
                let body = Bytes::from(vec![id as u8; size.into()]);
                let host = ([127, 0, 0, 1], 5).into();
                let now = self.now.0;
                let properties = properties.into();
                (
                    id,
                    NewMessage {
                        queue,
                        body,
                        properties,
                        sys_flag: 0,
                        born_timestamp_ms: now,
                        born_host: host,
                        hold: Hold::Nothing,
                    },
                )
            })
            .collect();
        self.next_id += u32::from(count);
        let news: Vec<NewMessage> = messages.iter().map(|(_, m)| m.clone()).collect();
        let result = self.with(|e, now| {
            let stored = e.append(&topic(), &news, now)?;
            Ok::<_, StoreError>((stored, e.commit(now)?))
        });
        match result {
            Ok((stored, committed)) => {
                for ((id, m), s) in messages.into_iter().zip(stored) {
                    let sent =
                        Sent { queue, offset: s.queue_offset, end: committed.end, body: m.body.to_vec() };
                    self.sent.insert(id, sent);
                    if self.flush == FlushMode::Async {
                        self.told.insert(id);
                    }
                }
            }
            Err(StoreError::DiskFull { .. }) => {}
            Err(StoreError::Poisoned { .. }) => self.restart(),
            Err(other) => panic!("{other}"),
        }
    }

    /// A poisoned broker is restarted on a healthy disk.
    fn restart(&mut self) {
        self.engine = None;
        self.fs.kill();
        self.kv.fail_writes(false);
        self.after_crash(u64::MAX);
    }

    fn after_crash(&mut self, durable: u64) {
        self.open();
        let end = self.engine.as_ref().expect("open").end();
        self.sent.retain(|id, s| s.end <= durable.max(end) || self.told.contains(id));
        self.acked.retain(|_, e| *e <= durable);
        self.check();
    }

    fn pop(&mut self, max: u8) -> usize {
        let popped = self.with(|e, now| {
            let request = PopRequest {
                group: &group(),
                topic: &topic(),
                filter: &TagFilter::All,
                max: max.into(),
                invisible_ms: INVISIBLE_MS,
                renewed_for: None,
                in_order: false,
                attempt_id: 0,
            };
            let popped = e.pop(&request, now)?;
            e.commit(now)?;
            Ok::<_, StoreError>(popped)
        });
        let popped = match popped {
            Ok(popped) => popped,
            Err(StoreError::Poisoned { .. }) => {
                self.restart();
                return 0;
            }
            Err(StoreError::DiskFull { .. }) => return 0,
            Err(other) => panic!("{other}"),
        };
        let count = popped.len();
        for p in popped {
            let record = self.with(|e, _| e.reader().read(p.log_offset, p.size)).unwrap();
            let id = id_of(&record.properties);
            assert!(!self.acked.contains_key(&id), "message {id} came back after its acknowledgement");
            if let Some(sent) = self.sent.get(&id) {
                assert_eq!(record.body, sent.body);
            }
            self.seen.insert(id);
            self.held.push((id, p));
        }
        count
    }

    fn settle(&mut self, which: u8, nack: bool) {
        if self.held.is_empty() {
            return;
        }
        let (id, p) = self.held.remove(usize::from(which) % self.held.len());
        if !nack {
            self.asked.insert(id);
        }
        let result = self.with(|e, now| {
            if nack {
                e.change_invisible(&p.receipt, 0, now)?;
                return e.commit(now).map(|c| (None, c));
            }
            let standing = e.acknowledge(&p.receipt, now)?;
            e.commit(now).map(|c| (Some(standing), c))
        });
        match result {
            Ok((Some(Standing::Live | Standing::Lost), committed)) if committed.changes.is_ok() => {
                self.acked.insert(id, committed.end);
            }
            Ok(_) => {}
            Err(StoreError::Poisoned { .. }) => self.restart(),
            Err(other) => panic!("{other}"),
        }
    }

    fn expire(&mut self) {
        loop {
            let result = self.with(|e, now| {
                let more = e.expire(now);
                e.commit(now)?;
                more
            });
            match result {
                Ok(true) => {}
                Ok(false) | Err(StoreError::DiskFull { .. }) => return,
                Err(StoreError::Poisoned { .. }) => return self.restart(),
                Err(other) => panic!("{other}"),
            }
        }
    }

    fn sync(&mut self) {
        match self.with(|e, _| e.syncer().sync()) {
            Ok(flushed) => {
                self.told.extend(self.sent.iter().filter(|(_, s)| s.end <= flushed).map(|(id, _)| *id))
            }
            Err(_) => self.restart(),
        }
    }

    fn checkpoint(&mut self) {
        let kv = self.kv.clone();
        let result = self.with(|e, now| {
            if !e.can_checkpoint() {
                return Ok(());
            }
            let checkpoint = e.checkpoint(now, false)?;
            let result = checkpoint.write(&e.syncer(), &kv);
            e.checkpoint_written(result);
            e.commit(now).map(drop)
        });
        match result {
            Ok(()) | Err(StoreError::DiskFull { .. } | StoreError::Io { .. }) => {}
            Err(_) => self.restart(),
        }
    }

    fn power_loss(&mut self, seed: u64) {
        let flushed = self.with(|e, _| e.syncer().flushed());
        self.engine = None;
        let mut keep = coin(seed);
        self.fs.power_loss(&mut keep);
        self.kv.power_loss(&mut keep);
        // In async mode only what was flushed is promised to survive this.
        if self.flush == FlushMode::Async {
            self.told.retain(|id| self.sent.get(id).is_some_and(|s| s.end <= flushed));
        }
        self.after_crash(flushed);
    }

    /// Everything promised is there, where it was said to be.
    fn check(&mut self) {
        let told: Vec<Sent> = self.told.iter().map(|id| self.sent[id].clone()).collect();
        let engine = self.engine.as_ref().expect("open");
        for sent in told {
            let entries = engine.entries(&topic(), sent.queue, sent.offset, 1).unwrap();
            let entry = entries.first().expect("an acknowledged message is gone");
            let record =
                engine.reader().read(entry.log_offset, entry.size).expect("a stored message cannot be read");
            assert_eq!(record.body, sent.body);
            assert_eq!(record.queue_offset, sent.offset);
        }
        for queue in 0..QUEUES {
            let bounds = engine.bounds(&topic(), queue);
            let entries = engine.entries(&topic(), queue, bounds.min, usize::MAX).unwrap();
            assert_eq!(entries.len() as u64, bounds.max - bounds.min);
            assert!(entries.iter().all(|e| !e.is_hole()), "the queue has a gap");
        }
    }

    fn run(&mut self, op: &Op) {
        self.now = self.now.plus_ms(1);
        match *op {
            Op::Send { queue, count, size } => self.send(queue, count, size),
            Op::Pop { max } => drop(self.pop(max)),
            Op::Ack { which } => self.settle(which, false),
            Op::Nack { which } => self.settle(which, true),
            Op::Advance { ms } => {
                self.now = self.now.plus_ms(ms.into());
                self.expire();
            }
            Op::Sync => self.sync(),
            Op::Checkpoint => self.checkpoint(),
            Op::Kill => {
                self.engine = None;
                self.fs.kill();
                self.kv.fail_writes(false);
                self.after_crash(u64::MAX);
            }
            Op::PowerLoss { seed } => self.power_loss(seed),
            Op::FailWrite { after } => self.fs.inject(Fault::Write { after: after.into() }),
            Op::FailSync { after } => self.fs.inject(Fault::Sync { after: after.into() }),
            Op::FailKv => self.kv.fail_writes(true),
            Op::Room { kib } => self.fs.set_room(Some(u64::from(kib) << 10)),
        }
    }

    /// On a healthy disk, everything promised and not acknowledged is delivered, or is a dead letter.
    fn drain(&mut self) {
        self.fs.heal();
        self.fs.set_room(None);
        self.kv.fail_writes(false);
        if self.with(|e, now| e.commit(now)).is_err() {
            self.restart();
        }
        self.sync();
        for _ in 0..=MAX_ATTEMPTS {
            self.now = self.now.plus_ms(INVISIBLE_MS + 1);
            self.expire();
            self.sync();
            while self.pop(32) > 0 {}
        }
        self.now = self.now.plus_ms(INVISIBLE_MS + 1);
        self.expire();
        self.sync();
        assert_eq!(self.with(|e, _| e.next_due()), None);
        let engine = self.engine.as_ref().expect("open");
        let letters = engine.entries(&Topic::dead_letter(&group()), 0, 0, usize::MAX).unwrap();
        for entry in letters {
            let record = engine.reader().read(entry.log_offset, entry.size).unwrap();
            self.dead.insert(id_of(&record.properties));
        }
        for id in &self.told {
            let reached = self.asked.contains(id) || (self.seen.contains(id) && self.dead.contains(id));
            assert!(reached, "message {id} was acknowledged to its sender and never delivered");
        }
    }
}

fn topic() -> Topic {
    Topic::stored("t")
}

fn group() -> Group {
    Group::stored("g")
}

fn id_of(properties: &[u8]) -> u32 {
    message::property(properties, message::UNIQ_KEY).unwrap().parse().unwrap()
}

fn case(ops: &[Op], flush: FlushMode) {
    let mut world = World::new(flush);
    for op in ops {
        world.run(op);
    }
    world.check();
    world.drain();
}

/// Half of the gate's cases each; `PROPTEST_CASES` sets another number.
fn cases() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|c| c.parse().ok()).unwrap_or(5_000);
    ProptestConfig { cases, max_shrink_iters: 20_000, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn async_flush(ops in prop::collection::vec(op(), 1..60)) {
        case(&ops, FlushMode::Async);
    }

    #[test]
    fn sync_flush(ops in prop::collection::vec(op(), 1..60)) {
        case(&ops, FlushMode::Sync);
    }
}

#[test]
fn rows_that_a_full_disk_kept_out_of_the_log() {
    let send = |queue, count, size| Op::Send { queue, count, size };
    let (pop, ack) = (|max| Op::Pop { max }, || Op::Ack { which: 0 });
    let ops = [
        send(0, 3, 143),
        Op::Sync,
        send(0, 2, 152),
        send(0, 1, 588),
        send(0, 2, 583),
        send(0, 4, 599),
        send(0, 1, 415),
        send(0, 2, 473),
        send(1, 1, 604),
        pop(3),
        send(0, 5, 574),
        send(0, 5, 417),
        ack(),
        ack(),
        ack(),
        Op::Kill,
        Op::Room { kib: 0 },
        pop(5),
        Op::FailWrite { after: 1 },
        pop(5),
        Op::Room { kib: 4 },
        pop(1),
        pop(1),
    ];
    case(&ops, FlushMode::Async);
    case(&ops, FlushMode::Sync);
}
