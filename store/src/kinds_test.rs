//! Every kind of message under crashes, lost answers and a clock that jumps, against what was promised: nothing told to
//! a sender is lost, nothing is doubled, no timer is early, no rollback and nothing recalled is delivered, and no message
//! of a message group comes before an earlier one is done with. Seeded: `KINDS_SEEDS` sets how many, `KINDS_FIRST` from
//! which on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use fastrand::Rng;
use model::message::{self, put_property};
use model::{Group, GroupConfig, TagFilter, Timestamp, Topic, TopicConfig};

use crate::change::Change;
use crate::engine::{self, Ended, PopRequest, Recall};
use crate::fs::{Fs, MemFs};
use crate::kv::MemKv;
use crate::log::LogOptions;
use crate::pop::Standing;
use crate::timer::TimerKey;
use crate::txn::Decision;
use crate::{Engine, FlushMode, Hold, NewMessage, Options, Popped, Retention};

const INVISIBLE_MS: i64 = 1000;
const MAX_ATTEMPTS: u32 = 4;
const QUEUES: u32 = 2;
const LANES: u32 = 4;
const OPS: usize = 150;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// To be delivered.
    Due,
    /// Waits for its time.
    Timed(i64),
    Recalled,
    /// A half message, and when it is due once it is committed.
    Open(Option<i64>),
    RolledBack,
}

#[derive(Clone)]
struct Sent {
    topic: Topic,
    message: NewMessage,
    lane: Option<u32>,
    fate: Fate,
    /// The sender knows; else it sends again.
    told: Option<u64>,
    /// Deliveries that count.
    attempts: u32,
    /// An acknowledgement was asked for.
    asked: bool,
    acked: bool,
    delivered: bool,
}

struct Held {
    id: u32,
    popped: Popped,
    until: Timestamp,
}

struct World {
    random: Rng,
    fs: MemFs,
    kv: MemKv,
    engine: Option<Engine>,
    now: Timestamp,
    /// The latest time the engine was ever told.
    latest: Timestamp,
    sent: BTreeMap<u32, Sent>,
    held: Vec<Held>,
    next_attempt: u64,
    /// A receive whose answer was lost, and what it would have got.
    lost_receive: Option<(u64, Vec<u32>)>,
    trace: Vec<String>,
}

fn ordered() -> Topic {
    Topic::stored("ordered")
}

fn plain() -> Topic {
    Topic::stored("plain")
}

fn group(topic: &Topic) -> Group {
    Group::stored(if *topic == ordered() { "in-order" } else { "concurrent" })
}

fn id_of(properties: &[u8]) -> u32 {
    message::property(properties, message::UNIQ_KEY).unwrap().parse().unwrap()
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            random: Rng::with_seed(seed),
            fs: MemFs::new(),
            kv: MemKv::default(),
            engine: None,
            now: Timestamp(1_000_000),
            latest: Timestamp(0),
            sent: BTreeMap::new(),
            held: Vec::new(),
            next_attempt: 1,
            lost_receive: None,
            trace: Vec::new(),
        };
        world.open();
        for topic in [ordered(), plain()] {
            let fifo = topic == ordered();
            let config =
                GroupConfig { fifo, max_attempts: MAX_ATTEMPTS, ..GroupConfig::concurrent(group(&topic)) };
            world
                .engine()
                .put_meta(Change::PutTopic(TopicConfig { queues: QUEUES, ..TopicConfig::mixed(topic) }));
            world.engine().put_meta(Change::PutGroup(config));
        }
        world.commit();
        world
    }

    fn engine(&mut self) -> &mut Engine {
        self.engine.as_mut().expect("open")
    }

    fn open(&mut self) {
        self.engine = None;
        self.fs.kill();
        let options = Options {
            dir: "/data".into(),
            flush: FlushMode::Async,
            log: LogOptions { segment_bytes: 16 << 10, chunk_bytes: 4 << 10, reserve_bytes: 2 << 10 },
            queue_file_entries: 16,
            key_index: crate::keys::Shape { slots: 64, entries: 1000 },
            retention: Retention { age_ms: 20_000, ..Retention::default() },
            host: ([127, 0, 0, 1], 1).into(),
            new_key: [1; 16],
        };
        let fs: Arc<dyn Fs> = Arc::new(self.fs.clone());
        let lock = engine::claim(&*fs, &options).unwrap();
        let (engine, report) = Engine::open(options, fs, Arc::new(self.kv.clone()), lock, self.now).unwrap();
        assert_eq!(report.damaged, [] as [u64; 0]);
        self.engine = Some(engine);
    }

    fn commit(&mut self) {
        let now = self.now;
        self.engine().commit(now).unwrap().changes.unwrap();
    }

    fn send(&mut self) {
        let id = self.sent.len() as u32;
        let now = self.now.0;
        let due = now + self.random.i64(-500..4000);
        let (topic, lane, fate, hold) = match self.random.u8(0..6) {
            0..3 => (ordered(), Some(self.random.u32(0..LANES)), Fate::Due, Hold::Nothing),
            3 if due <= now => (plain(), None, Fate::Due, Hold::Nothing),
            3 => (plain(), None, Fate::Timed(due), Hold::Until(Timestamp(due))),
            4 => (plain(), None, Fate::Open(None), Hold::Half),
            _ if due > now => (plain(), None, Fate::Open(Some(due)), Hold::Half),
            _ => (plain(), None, Fate::Due, Hold::Nothing),
        };
        let mut properties = Vec::new();
        put_property(&mut properties, message::UNIQ_KEY, &id.to_string());
        put_property(&mut properties, message::BORN_TIMESTAMP, &now.to_string());
        if let Some(lane) = lane {
            put_property(&mut properties, message::SHARDING_KEY, &format!("lane-{lane}"));
        }
        if let Fate::Timed(due) | Fate::Open(Some(due)) = fate {
            put_property(&mut properties, message::TIMER_DELIVER_MS, &due.to_string());
        }
        let message = NewMessage {
            queue: lane.unwrap_or(id) % QUEUES,
            body: Bytes::from(vec![b'x'; self.random.usize(1..400)]),
            properties: properties.into(),
            sys_flag: 0,
            born_timestamp_ms: now,
            born_host: ([127, 0, 0, 1], 2).into(),
            hold,
        };
        let (told, attempts) = (None, 0);
        let sent =
            Sent { topic, message, lane, fate, told, attempts, asked: false, acked: false, delivered: false };
        self.sent.insert(id, sent);
        self.send_again(id);
    }

    /// Sends until an answer comes back; each time may have been the first that arrived.
    fn send_again(&mut self, id: u32) {
        let Sent { topic, message, .. } = self.sent[&id].clone();
        loop {
            let now = self.now;
            let stored = self.engine().append(&topic, std::slice::from_ref(&message), now).unwrap();
            self.commit();
            match self.random.u8(0..8) {
                // The answer is lost, and perhaps the broker with it.
                0 => self.open(),
                1 => {}
                _ => {
                    self.sent.get_mut(&id).expect("sent").told = Some(stored[0].log_offset);
                    return;
                }
            }
        }
    }

    fn pick(&mut self, which: impl Fn(&Sent) -> bool) -> Option<(u32, Sent)> {
        let ids: Vec<u32> = self.sent.iter().filter(|(_, s)| which(s)).map(|(id, _)| *id).collect();
        let id = *self.random.choice(&ids)?;
        Some((id, self.sent[&id].clone()))
    }

    fn recall(&mut self) {
        let Some((id, sent)) = self.pick(|s| matches!(s.message.hold, Hold::Until(_))) else { return };
        let Hold::Until(due) = sent.message.hold else { return };
        let key = TimerKey { due, id: sent.told.expect("told") };
        let due = due.0;
        let now = self.now;
        let recalled = self.engine().recall(key, now).unwrap();
        self.commit();
        self.trace.push(format!("recall of {id}, due {due}: {recalled:?}"));
        match recalled {
            Recall::Recalled | Recall::Before => {
                assert!(!sent.delivered, "message {id} was recalled and delivered");
                self.sent.get_mut(&id).expect("sent").fate = Fate::Recalled;
            }
            Recall::TooLate if sent.fate == Fate::Recalled => panic!("message {id} was recalled"),
            Recall::TooLate => {
                assert!(due <= self.latest.max(now).0, "message {id} could not be recalled before its time")
            }
        }
    }

    fn end_transaction(&mut self) {
        let Some((id, sent)) = self.pick(|s| s.message.hold == Hold::Half) else { return };
        let commit = self.random.bool();
        let decision = if commit { Decision::Committed } else { Decision::RolledBack };
        let now = self.now;
        let ended = self.engine().end_transaction(sent.told.expect("told"), decision, now).unwrap();
        self.commit();
        self.trace.push(format!("{decision:?} of {id} ({:?}): {ended:?}", sent.fate));
        let fate = match (sent.fate, ended, commit) {
            (Fate::Open(due), Ended::Done, true) => match due.filter(|due| *due > now.0) {
                Some(due) => Fate::Timed(due),
                None => Fate::Due,
            },
            (Fate::Open(_), Ended::Done, false) => Fate::RolledBack,
            (Fate::RolledBack, Ended::Done, false) => Fate::RolledBack,
            (Fate::RolledBack, Ended::Otherwise(Decision::RolledBack), true) => Fate::RolledBack,
            (fate @ (Fate::Due | Fate::Timed(_)), Ended::Done, true) => fate,
            (fate @ (Fate::Due | Fate::Timed(_)), Ended::Otherwise(Decision::Committed), false) => fate,
            // Remembered for an hour: the clock has jumped.
            (fate @ (Fate::Due | Fate::Timed(_) | Fate::RolledBack), Ended::Unknown, _) => fate,
            other => panic!("message {id}: {other:?}"),
        };
        self.sent.get_mut(&id).expect("sent").fate = fate;
    }

    fn receive(&mut self, topic: &Topic) -> usize {
        let in_order = *topic == ordered();
        let again = self.lost_receive.take_if(|_| in_order);
        let attempt_id = again.as_ref().map_or(self.next_attempt, |(attempt, _)| *attempt);
        self.next_attempt += 1;
        let now = self.now;
        let (group, max) = (group(topic), self.random.usize(1..6));
        let request = PopRequest {
            group: &group,
            topic,
            filter: &TagFilter::All,
            max,
            invisible_ms: INVISIBLE_MS,
            renewed_for: None,
            in_order,
            attempt_id: if in_order { attempt_id } else { 0 },
        };
        let popped = self.engine().pop(&request, now).unwrap();
        self.commit();
        let lost = self.random.u8(0..8);
        if lost == 0 && in_order && again.is_none() {
            // The answer is lost: it is asked for again. The deliveries were made, and count.
            let reader = self.engine().reader();
            let ids = popped.iter().map(|p| id_of(&reader.read(p.log_offset, p.size).unwrap().properties));
            let ids: Vec<u32> = ids.collect();
            for p in &popped {
                self.delivered(p, true, &ids);
            }
            self.held.retain(|h| !ids.contains(&h.id));
            self.lost_receive = Some((attempt_id, ids));
            if self.random.bool() {
                self.open();
            }
            return popped.len();
        }
        if lost == 1 && again.is_none() {
            // It reached nobody, and the broker knows.
            for p in &popped {
                self.engine().release(&p.receipt, now).unwrap();
            }
            self.commit();
            if !in_order {
                let reader = self.engine().reader();
                for p in &popped {
                    let id = id_of(&reader.read(p.log_offset, p.size).unwrap().properties);
                    self.sent.get_mut(&id).expect("sent").attempts += 1;
                }
            }
            return 0;
        }
        let before = again.map(|(_, ids)| ids).unwrap_or_default();
        let reader = self.engine().reader();
        let batch: Vec<u32> =
            popped.iter().map(|p| id_of(&reader.read(p.log_offset, p.size).unwrap().properties)).collect();
        for p in &popped {
            self.delivered(p, false, &before);
        }
        self.trace.push(format!("received {batch:?} at {now:?}"));
        popped.len()
    }

    /// `before`: what a receive of this attempt was given before.
    fn delivered(&mut self, p: &Popped, lost: bool, before: &[u32]) {
        let now = self.now;
        let record = self.engine().reader().read(p.log_offset, p.size).unwrap();
        let id = id_of(&record.properties);
        let sent = self.sent.get_mut(&id).expect("sent");
        match sent.fate {
            Fate::Due => {}
            Fate::Timed(due) => assert!(due <= self.latest.0, "message {id} is early"),
            fate => panic!("message {id} was delivered: {fate:?}"),
        }
        assert!(!sent.acked, "message {id} came back after its acknowledgement");
        assert_eq!(record.body, sent.message.body);
        sent.delivered = true;
        let repeated = !lost && before.contains(&id) && p.attempt == Some(sent.attempts);
        if !repeated {
            sent.attempts += 1;
        }
        let attempt = p.attempt.unwrap_or(record.reconsume_times + 1);
        assert_eq!(attempt, sent.attempts, "message {id}: deliveries are counted");
        let lane = sent.lane;
        if let Some(lane) = lane {
            let batch: BTreeSet<u32> = self
                .held
                .iter()
                .filter(|h| h.popped.receipt.popped_at == p.receipt.popped_at)
                .map(|h| h.id)
                .collect();
            for (other, earlier) in self.sent.range(..id).filter(|(_, s)| s.lane == Some(lane)) {
                let done = earlier.acked || earlier.asked || batch.contains(other) || before.contains(other);
                let dead = earlier.attempts >= MAX_ATTEMPTS;
                assert!(
                    done || dead || earlier.told.is_none(),
                    "message {id} came before {other}, which is not done"
                );
            }
        }
        self.held.retain(|h| h.id != id);
        self.held.push(Held { id, popped: p.clone(), until: now.plus_ms(INVISIBLE_MS) });
    }

    fn ack(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let at = self.random.usize(..self.held.len());
        let Held { id, popped, until } = self.held.swap_remove(at);
        let now = self.now;
        let standing = self.engine().acknowledge(&popped.receipt, now).unwrap();
        self.commit();
        let sent = self.sent.get_mut(&id).expect("sent");
        match standing {
            Standing::Live | Standing::Lost => {
                // The answer may be lost; the acknowledgement counts all the same.
                (sent.asked, sent.acked) = (true, true);
            }
            // What was moved away is forgotten in a crash; then a clock that went back makes the handle good again.
            Standing::Settled => {
                assert!(sent.acked || until <= self.latest.max(now), "message {id} was settled by nobody")
            }
            Standing::Expired => assert!(until <= self.latest.max(now), "message {id} expired too early"),
        }
    }

    fn nack(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let at = self.random.usize(..self.held.len());
        let Held { popped, .. } = self.held.swap_remove(at);
        let (now, ms) = (self.now, self.random.i64(0..1500));
        self.engine().change_invisible(&popped.receipt, ms, now).unwrap();
        self.commit();
    }

    fn expire(&mut self) {
        self.latest = self.latest.max(self.now);
        let now = self.now;
        while self.engine().expire(now).unwrap() {
            self.commit();
        }
        self.commit();
    }

    fn checkpoint(&mut self) {
        let (kv, now) = (self.kv.clone(), self.now);
        let checkpoint = self.engine().checkpoint(now, false).unwrap();
        let written = checkpoint.write(&self.engine().syncer(), &kv);
        self.engine().checkpoint_written(written);
        for _ in 0..self.random.u8(0..4) {
            self.engine().keep_disk(now).unwrap();
            self.commit();
            self.engine().syncer().sync().unwrap();
        }
    }

    fn step(&mut self) {
        self.now = self.now.plus_ms(1);
        let op = self.random.u8(0..32);
        self.trace.push(format!("op {op} at {:?}", self.now));
        match op {
            0..9 => self.send(),
            9..13 => drop(self.receive(&ordered())),
            13..16 => drop(self.receive(&plain())),
            16..21 => self.ack(),
            21 => self.nack(),
            22 => self.recall(),
            23..25 => self.end_transaction(),
            25..28 => {
                self.now = self.now.plus_ms(self.random.i64(0..1200));
                self.expire();
            }
            28 => self.checkpoint(),
            29 => self.open(),
            30 => {
                let topics = [plain()];
                let now = self.now;
                for (_, half) in self.engine().checks(&topics, now, 4).unwrap() {
                    let id = id_of(&half.properties);
                    assert!(matches!(self.sent[&id].fate, Fate::Open(_)), "message {id} is decided");
                }
                self.commit();
            }
            // The clock jumps, one way or the other.
            _ => {
                self.now = self.now.plus_ms(self.random.i64(-20_000..20_000)).max(Timestamp(1_000_000));
                self.expire();
            }
        }
    }

    /// Time passes, and everything promised arrives.
    fn drain(&mut self) {
        self.now = self.latest.max(self.now).plus_ms(30_000);
        self.lost_receive = None;
        for _ in 0..600 {
            self.expire();
            let got = self.receive(&ordered()) + self.receive(&plain());
            while !self.held.is_empty() {
                self.ack();
            }
            if got == 0 {
                self.now = self.now.plus_ms(INVISIBLE_MS);
            }
        }
        assert_eq!(self.engine().timers_pending(), 0);
        for (id, sent) in &self.sent {
            let wanted = matches!(sent.fate, Fate::Due | Fate::Timed(_));
            let dead = sent.attempts >= MAX_ATTEMPTS;
            assert_eq!(
                wanted && !dead,
                sent.acked && wanted && !dead,
                "message {id} was lost: {:?}",
                sent.fate
            );
            assert!(wanted || !sent.delivered, "message {id} was delivered: {:?}", sent.fate);
        }
        self.each_is_there_once();
    }

    fn each_is_there_once(&mut self) {
        let mut seen = BTreeSet::new();
        for topic in [ordered(), plain()] {
            for queue in 0..QUEUES {
                let bounds = self.engine().bounds(&topic, queue);
                let entries = self.engine().entries(&topic, queue, bounds.min, usize::MAX).unwrap();
                for entry in entries.into_iter().filter(|e| !e.is_hole()) {
                    let record = self.engine().reader().read(entry.log_offset, entry.size).unwrap();
                    assert!(seen.insert(id_of(&record.properties)), "a message is there twice");
                }
            }
        }
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

#[test]
fn every_kind_keeps_its_promise() {
    let first = number("KINDS_FIRST", 0);
    for seed in first..first + number("KINDS_SEEDS", 1000) {
        let mut world = World::new(seed);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            (0..OPS).for_each(|_| world.step());
            world.drain();
        }));
        if outcome.is_err() {
            let from = world.trace.len().saturating_sub(150);
            panic!("seed {seed}, the last steps: {:#?}", &world.trace[from..]);
        }
    }
}
