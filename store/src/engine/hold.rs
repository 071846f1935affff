//! Messages that wait: scheduled ones for their time, half messages for a decision. Each is a record of a system topic
//! that no queue has; what becomes of it is a copy that says so itself, or a change.

use bytes::Bytes;
use model::message::{self, put_property};
use model::name::{HALF_TOPIC, TIMER_TOPIC};
use model::{Timestamp, Topic};

use super::{Engine, NewMessage, Stored, record_len};
use crate::change::Change;
use crate::error::{Result, StoreError};
use crate::log::Room;
use crate::log::record::{NewRecord, Record};
use crate::timer::{Held, Page, TimerKey};
use crate::txn::{Decision, Half, IMMUNITY_MIN_MS, Standing};

/// What a message waits for before its queue gets it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hold {
    #[default]
    Nothing,
    /// Its time, which its properties say too.
    Until(Timestamp),
    /// The producer's decision.
    Half,
}

/// What became of a wish to take a scheduled message back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recall {
    Recalled,
    /// Its time has not come, and it is not there: it was recalled before.
    Before,
    /// Its time has come.
    TooLate,
}

/// What became of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// As it was asked for, now or before.
    Done,
    /// The other way, before.
    Otherwise(Decision),
    Unknown,
}

/// Deliveries of one group.
const DELIVERIES_PER_GROUP: usize = 256;
/// Log looked through in one step for what still waits in a file that is to go.
const ROLL_STEP_BYTES: u64 = 4 << 20;

/// How far the oldest log file has been looked through for what still waits.
pub(super) struct Roll {
    at: u64,
    passes: u8,
    /// The log's end when nothing was left.
    durable_at: Option<u64>,
}

/// A record that waits, on its way into the log.
pub(super) struct StagedHeld {
    topic: &'static str,
    held: Held,
    properties: Bytes,
    stored_at: Timestamp,
}

fn number<T: std::str::FromStr>(properties: &[u8], key: &str) -> Option<T> {
    message::property(properties, key)?.parse().ok()
}

/// The message as it goes to its queue, or on to the timers.
fn released(r: &Record, what: &str) -> (Topic, NewMessage) {
    let topic = Topic::stored(r.property(message::REAL_TOPIC).unwrap_or_default());
    let mut properties = Vec::with_capacity(r.properties.len() + 48);
    for (key, value) in message::properties(&r.properties) {
        if !matches!(
            key,
            message::CRC
                | message::REAL_TOPIC
                | message::REAL_QUEUE
                | message::HELD_ID
                | message::RELEASED
                | message::TRAN_MSG
        ) {
            put_property(&mut properties, key, value);
        }
    }
    put_property(&mut properties, message::RELEASED, what);
    let message = NewMessage {
        queue: number(&r.properties, message::REAL_QUEUE).unwrap_or(0),
        body: r.body.clone(),
        properties: properties.into(),
        sys_flag: r.sys_flag & !message::FLAG_TRANSACTION,
        born_timestamp_ms: r.born_timestamp_ms,
        born_host: r.born_host,
        hold: Hold::Nothing,
    };
    (topic, message)
}

impl Engine {
    /// Stages a message that waits; its id is its log offset.
    pub(super) fn stage_held(&mut self, topic: &Topic, m: &NewMessage, now: Timestamp) -> Stored {
        let mut properties = m.properties.to_vec();
        put_property(&mut properties, message::REAL_TOPIC, topic.as_str());
        put_property(&mut properties, message::REAL_QUEUE, &m.queue.to_string());
        let log_offset = self.write_held(m, properties.into(), now);
        Stored { queue: m.queue, queue_offset: 0, log_offset }
    }

    fn write_held(&mut self, m: &NewMessage, properties: Bytes, now: Timestamp) -> u64 {
        let (topic, flag) = match m.hold {
            Hold::Half => (HALF_TOPIC, message::FLAG_PREPARED),
            _ => (TIMER_TOPIC, 0),
        };
        let new = NewRecord {
            topic,
            queue: 0,
            sys_flag: m.sys_flag | flag,
            born_timestamp_ms: m.born_timestamp_ms,
            born_host: m.born_host,
            store_host: self.options.host,
            reconsume_times: 0,
            body: &m.body,
            properties: &properties,
        };
        let (log_offset, size) = self.place(&new, 0, now);
        let stored_at = Timestamp(self.last_store_ms);
        self.staged.held.push(StagedHeld { topic, held: Held { log_offset, size }, properties, stored_at });
        log_offset
    }

    pub(super) fn held_is_in_the_log(&mut self, staged: Vec<StagedHeld>) -> Result<()> {
        staged.into_iter().try_for_each(|s| self.hold(s.topic, s.held, &s.properties, s.stored_at))
    }

    /// What a record of one of the two topics means, live and in recovery alike.
    pub(super) fn hold(
        &mut self,
        topic: &str,
        held: Held,
        properties: &[u8],
        stored_at: Timestamp,
    ) -> Result<()> {
        let id = number(properties, message::HELD_ID);
        if topic == TIMER_TOPIC {
            let due = Timestamp(number(properties, message::TIMER_DELIVER_MS).unwrap_or(0));
            match id {
                Some(id) => return self.timers.move_to(&*self.kv, TimerKey { due, id }, held),
                None => self.timers.schedule(TimerKey { due, id: held.log_offset }, held),
            }
        } else if let Some(id) = id {
            self.txns.move_to(id, held);
        } else {
            let immunity =
                number::<i64>(properties, message::CHECK_IMMUNITY).unwrap_or(0).saturating_mul(1000);
            let half = Half {
                held,
                topic: Topic::stored(message::property(properties, message::REAL_TOPIC).unwrap_or_default()),
                sent_at: stored_at,
                check_at: stored_at.plus_ms(immunity.max(IMMUNITY_MIN_MS)),
                checks: 0,
            };
            self.txns.begin(held.log_offset, half);
        }
        Ok(())
    }

    /// What a record says of what it was before.
    pub(super) fn settle_released(&mut self, properties: &[u8], stored_at: Timestamp) -> Result<()> {
        let Some(said) = message::property(properties, message::RELEASED) else { return Ok(()) };
        let mut words = said.split(' ');
        match (
            words.next(),
            words.next().and_then(|w| w.parse().ok()),
            words.next().and_then(|w| w.parse().ok()),
        ) {
            (Some("timer"), Some(due), Some(id)) => {
                let key = TimerKey { due: Timestamp(due), id };
                self.timers.deliver(&*self.kv, key).map(drop)
            }
            (Some("transaction"), Some(id), None) => {
                self.txns.decide(id as u64, Decision::Committed, stored_at);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    // --- scheduled messages -----------------------------------------------------------------------------------

    pub fn next_timer(&self) -> Option<Timestamp> {
        self.timers.first().map(|(key, _)| key.due)
    }

    pub fn timers_pending(&self) -> u64 {
        self.timers.pending()
    }

    /// Delivers what is due; true if there is more.
    pub(super) fn deliver_due(&mut self, now: Timestamp) -> Result<bool> {
        for _ in 0..DELIVERIES_PER_GROUP {
            let Some((key, held)) = self.timers.first().filter(|(key, _)| key.due <= now) else {
                return Ok(false);
            };
            let record = match self.reader.read(held.log_offset, held.size) {
                Ok(record) => record,
                Err(error) => {
                    tracing::error!(log_offset = held.log_offset, %error, "an unreadable scheduled message is skipped");
                    self.unreadable += 1;
                    self.change(Change::Recalled(key));
                    continue;
                }
            };
            let (topic, message) = released(&record, &format!("timer {} {}", key.due.0, key.id));
            if !self.deliver(&topic, message, now)? {
                tracing::warn!(%topic, "a scheduled message is dropped: its topic is no more");
                self.change(Change::Recalled(key));
                continue;
            }
            self.timers.deliver(&*self.kv, key)?;
        }
        Ok(self.timers.first().is_some_and(|(key, _)| key.due <= now))
    }

    /// Stages a message that has waited; false if its topic is gone.
    fn deliver(&mut self, topic: &Topic, mut message: NewMessage, now: Timestamp) -> Result<bool> {
        let Some(config) = self.meta.topic(topic) else { return Ok(false) };
        message.queue %= config.queues.max(1);
        self.room_for(record_len(topic, &message, self.options.host) as u64, Room::Messages)?;
        self.stage(topic, &message, 0, now);
        Ok(true)
    }

    /// Takes a scheduled message back: it is delivered or recalled, never both.
    pub fn recall(&mut self, key: TimerKey, now: Timestamp) -> Result<Recall> {
        if self.timers.get(&*self.kv, key)?.is_some() {
            self.change(Change::Recalled(key));
            return Ok(Recall::Recalled);
        }
        let come = key.due <= now || self.timers.has_come(key.due);
        Ok(if come && !self.timers.was_recalled(key) { Recall::TooLate } else { Recall::Before })
    }

    /// A page of what is scheduled, and where the next one begins.
    pub fn scheduled(&self, from: TimerKey) -> Result<Page> {
        self.timers.page(&*self.kv, from)
    }

    // --- transactions -----------------------------------------------------------------------------------------

    /// Commits or rolls back. Only the first decision counts.
    pub fn end_transaction(&mut self, id: u64, decision: Decision, now: Timestamp) -> Result<Ended> {
        let held = match self.txns.standing(id) {
            Standing::Open(held) => held,
            Standing::Decided(before) if before == decision => return Ok(Ended::Done),
            Standing::Decided(before) => return Ok(Ended::Otherwise(before)),
            Standing::Unknown => return Ok(Ended::Unknown),
        };
        if decision == Decision::RolledBack {
            self.change(Change::RolledBack { id, at: now });
            return Ok(Ended::Done);
        }
        // The copy settles it: what is said of it before must be in the log before it.
        self.stage_changes(now)?;
        let damaged = |e| StoreError::Damaged {
            path: self.options.dir.join("commitlog"),
            what: format!("half message at offset {}: {e}", held.log_offset),
        };
        let record = self.reader.read(held.log_offset, held.size).map_err(damaged)?;
        let (topic, mut message) = released(&record, &format!("transaction {id}"));
        message.sys_flag |= message::FLAG_COMMITTED;
        let due = number(&message.properties, message::TIMER_DELIVER_MS).map(Timestamp);
        match due.filter(|due| *due > now) {
            Some(due) => {
                message.hold = Hold::Until(due);
                let bytes = record_len(&topic, &message, self.options.host) + HELD_EXTRA_BYTES;
                self.room_for(bytes as u64, Room::Messages)?;
                self.stage_held(&topic, &message, now);
            }
            None => {
                if !self.deliver(&topic, message, now)? {
                    tracing::warn!(%topic, "a committed message is dropped: its topic is no more");
                    self.change(Change::RolledBack { id, at: now });
                    return Ok(Ended::Unknown);
                }
            }
        }
        self.txns.decide(id, Decision::Committed, now);
        Ok(Ended::Done)
    }

    /// Half messages whose producers are to be asked now; it counts as a check.
    pub fn checks(&mut self, topics: &[Topic], now: Timestamp, max: usize) -> Result<Vec<(u64, Record)>> {
        let mut out = Vec::new();
        for change in self.txns.checks(topics, now, max) {
            let Change::Checked { id, .. } = change else { continue };
            let Some(held) = self.txns.half(id).map(|half| half.held) else { continue };
            self.change(change);
            match self.reader.read(held.log_offset, held.size) {
                Ok(record) => out.push((id, record)),
                Err(error) => {
                    tracing::error!(log_offset = held.log_offset, %error, "an unreadable half message is skipped");
                    self.unreadable += 1;
                }
            }
        }
        Ok(out)
    }

    /// When producers of one of these topics are to be asked next.
    pub fn next_check(&self, can_ask: impl Fn(&Topic) -> bool) -> Option<Timestamp> {
        self.txns.next_check(can_ask)
    }

    /// Transactions that are not decided.
    pub fn open_transactions(&self) -> Vec<(u64, Half)> {
        self.txns.open().map(|(id, half)| (id, half.clone())).collect()
    }

    // --- retention --------------------------------------------------------------------------------------------

    /// True while what waits in the oldest log file is being written again.
    pub fn is_rolling(&self) -> bool {
        self.roll.is_some()
    }

    /// Writes what still waits in the oldest log file, which ends at `end`, at the log's end again, step by step. True
    /// once nothing does and what was written is durable.
    pub(super) fn roll(&mut self, end: u64, now: Timestamp) -> Result<bool> {
        let start = self.log.start();
        let mut roll = self.roll.take().unwrap_or(Roll { at: start, passes: 0, durable_at: None });
        let empty = self.timers.in_file(start) == 0 && self.txns.within(start, end).is_empty();
        if empty || roll.passes > 1 {
            if !empty {
                tracing::error!(
                    log_offset = start,
                    "messages that wait in this log file cannot be read; they go with it"
                );
            }
            let rolled = roll.at > start || roll.passes > 0;
            let durable_at = *roll.durable_at.get_or_insert(if rolled { self.log.end() } else { 0 });
            if self.log.flushed() >= durable_at {
                return Ok(true);
            }
        } else {
            let mut found = Vec::new();
            let reader = self.reader.clone();
            roll.at = reader.walk(roll.at, end, ROLL_STEP_BYTES, |r| {
                if *r.topic == *TIMER_TOPIC || *r.topic == *HALF_TOPIC {
                    found.push(r.clone());
                }
            })?;
            found.iter().try_for_each(|r| self.write_again(r, now))?;
            if roll.at >= end {
                (roll.at, roll.passes) = (start, roll.passes + 1);
            }
        }
        self.roll = Some(roll);
        Ok(false)
    }

    fn write_again(&mut self, r: &Record, now: Timestamp) -> Result<()> {
        let id = number(&r.properties, message::HELD_ID).unwrap_or(r.log_offset);
        let (waits_at, hold) = if *r.topic == *TIMER_TOPIC {
            let due = Timestamp(number(&r.properties, message::TIMER_DELIVER_MS).unwrap_or(0));
            (self.timers.get(&*self.kv, TimerKey { due, id })?, Hold::Until(due))
        } else {
            (self.txns.half(id).map(|half| half.held), Hold::Half)
        };
        if waits_at.map(|held| held.log_offset) != Some(r.log_offset) {
            return Ok(());
        }
        let mut properties = Vec::with_capacity(r.properties.len() + 32);
        for (key, value) in message::properties(&r.properties) {
            if !matches!(key, message::CRC | message::HELD_ID | message::RELEASED) {
                put_property(&mut properties, key, value);
            }
        }
        put_property(&mut properties, message::HELD_ID, &id.to_string());
        let message = NewMessage {
            queue: 0,
            body: r.body.clone(),
            properties: properties.into(),
            sys_flag: r.sys_flag,
            born_timestamp_ms: r.born_timestamp_ms,
            born_host: r.born_host,
            hold,
        };
        let bytes = record_len(&Topic::stored(&r.topic), &message, self.options.host);
        self.room_for(bytes as u64, Room::Reserve)?;
        let properties = message.properties.clone();
        self.write_held(&message, properties, now);
        Ok(())
    }
}

/// Property bytes a record that waits may have more than its message: topic, queue and what it was.
pub(super) const HELD_EXTRA_BYTES: usize = 1024;
