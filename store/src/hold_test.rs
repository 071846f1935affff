//! Named cases of messages in order, of messages that wait, and of messages sent twice. The store is closed by a kill
//! wherever it says `again`: everything must be there afterwards.

use std::sync::Arc;

use bytes::Bytes;
use model::message::{self, put_property};
use model::{Group, GroupConfig, TagFilter, Timestamp, Topic, TopicConfig};

use crate::change::Change;
use crate::engine::{self, Ended, PopRequest, Recall};
use crate::fs::{Fs, MemFs};
use crate::kv::MemKv;
use crate::log::LogOptions;
use crate::pop::Standing;
use crate::timer::TimerKey;
use crate::txn::{CHECKS_MAX, Decision};
use crate::{Engine, FlushMode, Hold, NewMessage, Options, Popped, Retention};

const INVISIBLE_MS: i64 = 1000;

struct World {
    fs: MemFs,
    kv: MemKv,
    engine: Option<Engine>,
    now: Timestamp,
    retention: Retention,
    sent: u32,
}

fn topic() -> Topic {
    Topic::stored("t")
}

fn group() -> Group {
    Group::stored("g")
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            fs: MemFs::new(),
            kv: MemKv::default(),
            engine: None,
            now: Timestamp(1_000_000),
            retention: Retention::default(),
            sent: 0,
        };
        world.again();
        let e = world.engine();
        e.put_meta(Change::PutTopic(TopicConfig { queues: 1, ..TopicConfig::normal(topic()) }));
        e.put_meta(Change::PutGroup(GroupConfig {
            fifo: true,
            max_attempts: 3,
            ..GroupConfig::concurrent(group())
        }));
        world.commit();
        world
    }

    fn engine(&mut self) -> &mut Engine {
        self.engine.as_mut().expect("open")
    }

    /// Killed and opened again.
    fn again(&mut self) {
        self.engine = None;
        self.fs.kill();
        let options = Options {
            dir: "/data".into(),
            flush: FlushMode::Async,
            log: LogOptions { segment_bytes: 16 << 10, chunk_bytes: 4 << 10, reserve_bytes: 2 << 10 },
            queue_file_entries: 16,
            key_index: crate::keys::Shape { slots: 64, entries: 1000 },
            retention: self.retention,
            host: ([127, 0, 0, 1], 1).into(),
            new_key: [1; 16],
        };
        let fs: Arc<dyn Fs> = Arc::new(self.fs.clone());
        let lock = engine::claim(&*fs, &options).unwrap();
        let (engine, report) = Engine::open(options, fs, Arc::new(self.kv.clone()), lock, self.now).unwrap();
        assert_eq!(report.damaged, [] as [u64; 0]);
        self.engine = Some(engine);
    }

    fn checkpoint(&mut self) {
        let (kv, now) = (self.kv.clone(), self.now);
        let checkpoint = self.engine().checkpoint(now, false).unwrap();
        let written = checkpoint.write(&self.engine().syncer(), &kv);
        self.engine().checkpoint_written(written);
    }

    fn commit(&mut self) {
        let now = self.now;
        self.engine().commit(now).unwrap().changes.unwrap();
    }

    fn message(&mut self, body: &str, lane: &str, due: i64, hold: Hold) -> NewMessage {
        let mut properties = Vec::new();
        self.sent += 1;
        put_property(&mut properties, message::UNIQ_KEY, &format!("id-{}", self.sent));
        put_property(&mut properties, message::BORN_TIMESTAMP, &self.now.0.to_string());
        if !lane.is_empty() {
            put_property(&mut properties, message::SHARDING_KEY, lane);
        }
        if due > 0 {
            put_property(&mut properties, message::TIMER_DELIVER_MS, &due.to_string());
        }
        NewMessage {
            queue: 0,
            body: Bytes::from(body.to_owned()),
            properties: properties.into(),
            sys_flag: 0,
            born_timestamp_ms: self.now.0,
            born_host: ([127, 0, 0, 1], 2).into(),
            hold,
        }
    }

    fn append(&mut self, message: NewMessage) -> u64 {
        let now = self.now;
        let stored = self.engine().append(&topic(), &[message], now).unwrap();
        self.commit();
        stored[0].log_offset
    }

    fn send(&mut self, body: &str, lane: &str) {
        let message = self.message(body, lane, 0, Hold::Nothing);
        self.append(message);
    }

    fn schedule(&mut self, body: &str, due: i64) -> TimerKey {
        let message = self.message(body, body, due, Hold::Until(Timestamp(due)));
        TimerKey { due: Timestamp(due), id: self.append(message) }
    }

    fn half(&mut self, body: &str, due: i64) -> u64 {
        let message = self.message(body, body, due, Hold::Half);
        self.append(message)
    }

    fn pop_as(&mut self, max: usize, attempt_id: u64, in_order: bool) -> Vec<(String, u32, Popped)> {
        let now = self.now;
        let (group, topic) = (group(), topic());
        let request = PopRequest {
            group: &group,
            topic: &topic,
            filter: &TagFilter::All,
            max,
            invisible_ms: INVISIBLE_MS,
            renewed_for: None,
            in_order,
            attempt_id,
        };
        let popped = self.engine().pop(&request, now).unwrap();
        self.commit();
        let reader = self.engine().reader();
        let read = |p: Popped| {
            let record = reader.read(p.log_offset, p.size).unwrap();
            let attempt = p.attempt.unwrap_or(record.reconsume_times + 1);
            (String::from_utf8_lossy(&record.body).into_owned(), attempt, p)
        };
        popped.into_iter().map(read).collect()
    }

    fn pop(&mut self, max: usize) -> Vec<(String, u32, Popped)> {
        self.pop_as(max, 0, true)
    }

    fn bodies(&mut self, max: usize) -> Vec<String> {
        self.pop(max).into_iter().map(|(body, ..)| body).collect()
    }

    fn ack(&mut self, popped: &Popped) -> Standing {
        let now = self.now;
        let standing = self.engine().acknowledge(&popped.receipt, now).unwrap();
        self.commit();
        standing
    }

    fn wait(&mut self, ms: i64) {
        self.now = self.now.plus_ms(ms);
        let now = self.now;
        while self.engine().expire(now).unwrap() {
            self.commit();
        }
        self.commit();
    }
}

#[test]
fn one_batch_of_a_message_group_is_in_flight_and_the_others_go_on() {
    let mut w = World::new();
    for (body, lane) in [("a1", "a"), ("b1", "b"), ("a2", "a"), ("b2", "b"), ("c1", "c"), ("a3", "a")] {
        w.send(body, lane);
    }
    let first = w.pop(2);
    assert_eq!(first.iter().map(|p| &*p.0).collect::<Vec<_>>(), ["a1", "b1"]);
    w.again();
    assert_eq!(w.bodies(9), ["c1"], "a and b are in flight");
    assert_eq!(w.bodies(9), [] as [&str; 0]);
    assert_eq!(w.ack(&first[0].2), Standing::Live);
    w.checkpoint();
    w.again();
    assert_eq!(w.bodies(9), ["a2", "a3"], "all that was behind it, in its order");
    assert_eq!(w.ack(&first[1].2), Standing::Live);
    assert_eq!(w.bodies(9), ["b2"]);
}

#[test]
fn what_is_not_acknowledged_comes_back_in_its_place_and_is_counted() {
    let mut w = World::new();
    ["a1", "a2", "a3"].iter().for_each(|body| w.send(body, "a"));
    let batch = w.pop(2);
    w.ack(&batch[1].2);
    w.wait(INVISIBLE_MS);
    assert_eq!(w.ack(&batch[0].2), Standing::Expired);
    w.checkpoint();
    w.again();
    let again = w.pop(9);
    let seen: Vec<_> = again.iter().map(|(body, attempt, _)| (&**body, *attempt)).collect();
    assert_eq!(seen, [("a1", 2), ("a3", 1)]);
    w.again();
    w.wait(INVISIBLE_MS);
    let third = w.pop(1);
    assert_eq!((&*third[0].0, third[0].1), ("a1", 3));
    assert_eq!(w.bodies(9), [] as [&str; 0]);
    w.wait(INVISIBLE_MS);
    // After the last delivery it is a dead letter, and the ones behind it go on.
    assert_eq!(w.bodies(9), ["a3"]);
    let letters = w.engine().entries(&Topic::dead_letter(&group()), 0, 0, 9).unwrap();
    assert_eq!(letters.len(), 1);
}

#[test]
fn the_same_attempt_gets_the_same_messages_and_does_not_count() {
    let mut w = World::new();
    ["a1", "a2"].iter().for_each(|body| w.send(body, "a"));
    let first = w.pop_as(1, 77, true);
    w.again();
    assert_eq!(w.pop_as(1, 78, true).len(), 0);
    let second = w.pop_as(1, 77, true);
    assert_eq!((&*second[0].0, second[0].1), ("a1", 1));
    assert_eq!(
        w.ack(&first[0].2),
        Standing::Live,
        "the handle of the answer that was thought lost counts too"
    );
    assert_eq!(w.ack(&second[0].2), Standing::Settled);
    assert_eq!(w.pop_as(1, 77, true)[0].0, "a2");
}

#[test]
fn a_delivery_that_reached_nobody_does_not_count() {
    let mut w = World::new();
    w.send("a1", "a");
    let unsent = w.pop(1);
    let now = w.now;
    w.engine().release(&unsent[0].2.receipt, now).unwrap();
    w.commit();
    w.again();
    let popped = w.pop(1);
    assert_eq!((&*popped[0].0, popped[0].1), ("a1", 1));
}

#[test]
fn changing_one_message_s_invisible_time_holds_up_its_message_group_alone() {
    let mut w = World::new();
    for (body, lane) in [("a1", "a"), ("a2", "a"), ("b1", "b"), ("b2", "b")] {
        w.send(body, lane);
    }
    let batch = w.pop(1);
    let now = w.now;
    w.engine().change_invisible(&batch[0].2.receipt, 5 * INVISIBLE_MS, now).unwrap().unwrap();
    w.commit();
    w.wait(2 * INVISIBLE_MS);
    assert_eq!(w.bodies(9), ["b1", "b2"]);
    w.wait(3 * INVISIBLE_MS);
    assert_eq!(w.bodies(1), ["a1"]);
}

#[test]
fn messages_without_a_message_group_are_in_order_among_themselves() {
    let mut w = World::new();
    ["1", "2"].iter().for_each(|body| w.send(body, ""));
    let first = w.pop(1);
    assert_eq!(w.bodies(9), [] as [&str; 0]);
    w.ack(&first[0].2);
    assert_eq!(w.bodies(9), ["2"]);
}

#[test]
fn a_group_that_stops_consuming_in_order_gets_what_waited() {
    let mut w = World::new();
    ["a1", "a2", "a3"].iter().for_each(|body| w.send(body, "a"));
    let _in_flight = w.pop(1);
    assert_eq!(w.bodies(9), [] as [&str; 0], "a2 and a3 wait now");
    let popped: Vec<_> = w.pop_as(9, 0, false).into_iter().map(|p| p.0).collect();
    assert_eq!(popped, ["a2", "a3"]);
    w.wait(INVISIBLE_MS);
    let mut popped: Vec<_> = w.pop_as(9, 0, false).into_iter().map(|p| p.0).collect();
    popped.sort_unstable();
    assert_eq!(popped, ["a1", "a2", "a3"]);
}

#[test]
fn a_group_that_begins_to_consume_in_order_goes_on_where_it_stood() {
    let mut w = World::new();
    ["a1", "a2"].iter().for_each(|body| w.send(body, "a"));
    let first = w.pop_as(1, 0, false);
    assert_eq!(w.bodies(9), ["a2"]);
    assert_eq!(w.ack(&first[0].2), Standing::Live);
}

#[test]
fn a_scheduled_message_comes_when_it_is_due_and_not_before() {
    let mut w = World::new();
    let due = w.now.0 + 500;
    w.schedule("later", due + 1);
    w.schedule("soon", due);
    w.schedule("past", 5);
    assert_eq!(w.bodies(9), ["past"]);
    w.wait(499);
    w.again();
    assert_eq!(w.engine().next_due(), Some(Timestamp(due)));
    assert_eq!(w.bodies(9), [] as [&str; 0]);
    w.wait(1);
    let soon = w.pop(9);
    assert_eq!(soon[0].0, "soon");
    w.ack(&soon[0].2);
    w.checkpoint();
    w.again();
    w.wait(1);
    assert_eq!(w.bodies(9), ["later"]);
    w.again();
    w.wait(INVISIBLE_MS);
    assert_eq!(w.engine().timers_pending(), 0, "each once");
}

#[test]
fn recalled_or_delivered_never_both() {
    let mut w = World::new();
    let due = w.now.0 + 500;
    let (first, second) = (w.schedule("first", due), w.schedule("second", due));
    let now = w.now;
    assert_eq!(w.engine().recall(first, now).unwrap(), Recall::Recalled);
    w.commit();
    w.again();
    assert_eq!(w.engine().recall(first, now).unwrap(), Recall::Before);
    w.wait(500);
    assert_eq!(w.bodies(9), ["second"]);
    let now = w.now;
    assert_eq!(w.engine().recall(second, now).unwrap(), Recall::TooLate);
    w.checkpoint();
    w.again();
    // Whoever did not hear the answer learns the truth also after the message's time.
    assert_eq!(w.engine().recall(first, now).unwrap(), Recall::Before);
}

#[test]
fn what_waits_outlives_its_log_file() {
    let mut w = World::new();
    w.retention = Retention { age_ms: 1000, ..Retention::default() };
    w.again();
    let due = w.now.0 + 1_000_000;
    let kept = w.schedule("kept", due);
    let recalled = w.schedule("recalled", due);
    let half = w.half("half", 0);
    for round in 0..4 {
        for _ in 0..40 {
            w.send(&"x".repeat(1000), "a");
        }
        // Consumed, so that it may go.
        for _ in 0..50 {
            for (.., popped) in w.pop(32) {
                w.ack(&popped);
            }
        }
        w.wait(2000);
        for _ in 0..20 {
            w.checkpoint();
            let now = w.now;
            w.engine().keep_disk(now).unwrap();
            w.commit();
            w.engine().syncer().sync().unwrap();
        }
        assert!(w.engine().state().log_start > round * (16 << 10), "old files go all the same");
        w.again();
        assert_eq!(w.engine().timers_pending(), if round < 2 { 2 } else { 1 });
        if round == 1 {
            let now = w.now;
            assert_eq!(w.engine().recall(recalled, now).unwrap(), Recall::Recalled);
            w.commit();
        }
    }
    let now = w.now;
    assert_eq!(w.engine().end_transaction(half, Decision::Committed, now).unwrap(), Ended::Done);
    w.commit();
    w.wait(due - w.now.0);
    assert_eq!(w.engine().recall(kept, Timestamp(due)).unwrap(), Recall::TooLate);
    assert_eq!(w.bodies(99), ["half", "kept"]);
}

#[test]
fn a_half_message_is_seen_once_it_is_committed_and_never_if_it_is_rolled_back() {
    let mut w = World::new();
    let (yes, no) = (w.half("yes", 0), w.half("no", 0));
    w.again();
    assert_eq!(w.bodies(9), [] as [&str; 0]);
    let now = w.now;
    let e = w.engine();
    assert_eq!(e.end_transaction(yes, Decision::Committed, now).unwrap(), Ended::Done);
    assert_eq!(e.end_transaction(no, Decision::RolledBack, now).unwrap(), Ended::Done);
    w.commit();
    w.again();
    w.checkpoint();
    w.again();
    let e = w.engine();
    assert_eq!(e.end_transaction(yes, Decision::Committed, now).unwrap(), Ended::Done, "said twice");
    let other = Ended::Otherwise(Decision::Committed);
    assert_eq!(e.end_transaction(yes, Decision::RolledBack, now).unwrap(), other);
    let other = Ended::Otherwise(Decision::RolledBack);
    assert_eq!(e.end_transaction(no, Decision::Committed, now).unwrap(), other);
    assert_eq!(e.end_transaction(1, Decision::Committed, now).unwrap(), Ended::Unknown);
    w.commit();
    assert_eq!(w.bodies(9), ["yes"]);
}

#[test]
fn a_transaction_can_be_scheduled_too() {
    let mut w = World::new();
    let due = w.now.0 + 500;
    let id = w.half("both", due);
    let now = w.now;
    assert_eq!(w.engine().end_transaction(id, Decision::Committed, now).unwrap(), Ended::Done);
    w.commit();
    w.again();
    assert_eq!(w.bodies(9), [] as [&str; 0]);
    assert_eq!(w.engine().open_transactions(), []);
    w.wait(500);
    assert_eq!(w.bodies(9), ["both"]);
}

#[test]
fn producers_are_asked_in_time_and_not_for_ever() {
    let mut w = World::new();
    let id = w.half("orphan", 0);
    let topics = [topic()];
    w.now = w.now.plus_ms(5_999);
    let now = w.now;
    assert_eq!(w.engine().checks(&topics, now, 9).unwrap().len(), 0);
    assert_eq!(w.engine().checks(&[], now.plus_ms(1), 9).unwrap().len(), 0);
    w.now = w.now.plus_ms(1);
    for _ in 0..CHECKS_MAX {
        let now = w.now;
        let asked = w.engine().checks(&topics, now, 9).unwrap();
        assert_eq!(
            asked.iter().map(|(id, r)| (*id, &r.body[..])).collect::<Vec<_>>(),
            [(id, &b"orphan"[..])]
        );
        w.commit();
        w.again();
        w.now = w.now.plus_ms(30_000);
    }
    let now = w.now;
    assert_eq!(w.engine().checks(&topics, now, 9).unwrap().len(), 0);
    assert!(w.engine().open_transactions()[0].1.is_parked());
    assert_eq!(w.engine().end_transaction(id, Decision::Committed, now).unwrap(), Ended::Done);
    w.commit();
    assert_eq!(w.bodies(9), ["orphan"]);
}

#[test]
fn a_send_that_is_repeated_is_there_once() {
    let mut w = World::new();
    let message = w.message("once", "", 0, Hold::Nothing);
    let first = w.append(message.clone());
    assert_eq!(w.append(message.clone()), first);
    w.again();
    assert_eq!(w.append(message.clone()), first, "also after a crash");
    w.checkpoint();
    w.checkpoint();
    w.again();
    let another = NewMessage { born_timestamp_ms: message.born_timestamp_ms + 1, ..message.clone() };
    assert_ne!(w.append(another), first, "another message that was given the same id");
    let due = w.now.0 + 500;
    let timer = w.message("timer", "b", due, Hold::Until(Timestamp(due)));
    let id = w.append(timer.clone());
    assert_eq!(w.append(timer.clone()), id);
    w.wait(500);
    w.again();
    assert_eq!(w.append(timer), id, "also when it was delivered");
    assert_eq!(w.bodies(9), ["once", "once", "timer"], "and the one of the same id");
}
