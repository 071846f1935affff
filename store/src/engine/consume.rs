//! Consumption: handing messages out, settling them, and moving what was not settled in time.

use std::sync::Arc;

use model::message::{self, put_property};
use model::name::{DLQ_PREFIX, RETRY_PREFIX};
use model::{Group, Receipt, TagFilter, Timestamp, Topic, TopicConfig, limits};

use super::{Engine, FlushMode, Hold, NewMessage, record_len};
use crate::change::{Change, CursorKey};
use crate::error::{Result, StoreError};
use crate::log::Room;
use crate::log::record::Record;
use crate::pop::{Due, Standing};
use crate::queue::{Bounds, Entry, QueueIndex};

/// A group that is new to a queue begins at its first message, unless that lies further back than this.
pub const NEW_GROUP_BACKLOG_MAX_BYTES: u64 = 4 << 30;
/// Queue entries looked at in one step of a pop.
const SCAN_STEP: usize = 256;
/// Queue entries one pop may pass over.
const SCAN_MAX: usize = 16 * 1024;
/// Messages moved to retry topics in one group.
const MOVES_PER_GROUP: usize = 256;

#[derive(Clone, Debug)]
pub struct PopRequest<'a> {
    pub group: &'a Group,
    pub topic: &'a Topic,
    pub filter: &'a TagFilter,
    pub max: usize,
    pub invisible_ms: i64,
    /// Set if the broker is to renew the invisible time while this client lives.
    pub renewed_for: Option<Arc<str>>,
    /// The group consumes in order.
    pub in_order: bool,
    /// Hash of the receive's attempt id, 0 if it has none.
    pub attempt_id: u64,
}

impl PopRequest<'_> {
    pub(super) fn popped(
        &self,
        topic: &Topic,
        queue: u32,
        offset: u64,
        entry: Entry,
        since: Timestamp,
        visible_at: Timestamp,
    ) -> Popped {
        let receipt = Receipt {
            group: self.group.clone(),
            topic: self.topic.clone(),
            from_retry: topic != self.topic,
            queue,
            offset,
            log_offset: entry.log_offset,
            popped_at: since,
            invisible_until: visible_at,
        };
        Popped { log_offset: entry.log_offset, size: entry.size, attempt: None, receipt }
    }
}

/// A message that was handed out: where it stands, and its receipt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Popped {
    pub log_offset: u64,
    pub size: u32,
    /// Which delivery this is, if the record does not say so: in order, messages are delivered again in place.
    pub attempt: Option<u32>,
    pub receipt: Receipt,
}

/// The copy of a message that goes to another topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Destination {
    Retry,
    DeadLetter,
}

impl Engine {
    /// Hands out messages of a topic to a group: of its retry topic first every fifth time, otherwise after it.
    pub fn pop(&mut self, request: &PopRequest<'_>, now: Timestamp) -> Result<Vec<Popped>> {
        self.log.check()?;
        if self.stuck {
            // No more rows that the log does not know of.
            self.stage_changes(now)?;
        }
        let turn = self.turns.entry((request.group.clone(), request.topic.clone())).or_default();
        *turn = turn.wrapping_add(1);
        let turn = *turn;
        let mut out = Vec::new();
        self.pop_attempted(request, now, &mut out)?;
        if !out.is_empty() {
            return Ok(out);
        }
        let retry = Topic::retry(request.group, request.topic);
        let retry_first = turn.is_multiple_of(5);
        if retry_first {
            self.pop_topic(request, &retry, turn, now, &mut out)?;
        }
        self.pop_topic(request, request.topic, turn, now, &mut out)?;
        if !retry_first {
            self.pop_topic(request, &retry, turn, now, &mut out)?;
        }
        Ok(out)
    }

    fn pop_topic(
        &mut self,
        request: &PopRequest<'_>,
        topic: &Topic,
        turn: u32,
        now: Timestamp,
        out: &mut Vec<Popped>,
    ) -> Result<()> {
        let queues = self.index.queues(topic);
        let mut unreadable = Ok(());
        for i in 0..queues.len() {
            if out.len() >= request.max || self.pop.in_flight(request.group) >= limits::IN_FLIGHT_MAX {
                break;
            }
            let queue = queues[(i + turn as usize) % queues.len()];
            let popped = match request.in_order && !topic.is_retry() {
                true => self.pop_in_order(request, topic, queue, now, out),
                false => self.pop_queue(request, topic, queue, now, out),
            };
            match popped {
                // Its file is damaged: the others are not held up, and what is in it is not passed over.
                Err(error @ (StoreError::Io { .. } | StoreError::Damaged { .. })) if queues.len() > 1 => {
                    tracing::error!(%topic, queue, %error, "this queue cannot be read");
                    unreadable = Err(error);
                }
                other => other?,
            }
        }
        if out.is_empty() { unreadable } else { Ok(()) }
    }

    fn pop_queue(
        &mut self,
        request: &PopRequest<'_>,
        topic: &Topic,
        queue: u32,
        now: Timestamp,
        out: &mut Vec<Popped>,
    ) -> Result<()> {
        let cursor = CursorKey { group: request.group.clone(), topic: topic.clone(), queue };
        // The group consumed in order before.
        self.pop_ready(request, &cursor, now, out)?;
        let bounds = self.index.bounds(topic, queue);
        let start = match self.pop.next(&cursor) {
            Some(next) => next.max(bounds.min),
            None => self.first_offset(topic, queue, bounds)?,
        };
        let visible_end = self.visible_end();
        let want = request.max - out.len();
        let mut next = start;
        let mut offsets = Vec::new();
        let visible_at = now.plus_ms(request.invisible_ms);
        'scan: while offsets.len() < want && next < bounds.max && (next - start) < SCAN_MAX as u64 {
            let step = if *request.filter == TagFilter::All { want } else { SCAN_STEP };
            let entries = self.index.read(topic, queue, next, step)?;
            if entries.is_empty() {
                break;
            }
            for entry in entries {
                if offsets.len() == want
                    || (!entry.is_hole() && entry.log_offset + u64::from(entry.size) > visible_end)
                {
                    break 'scan;
                }
                let offset = next;
                next += 1;
                let wanted = !entry.is_hole() && request.filter.may_match(entry.tag_code);
                if !wanted || self.pop.is_settled_ahead(&cursor, offset) {
                    continue;
                }
                offsets.push(offset);
                out.push(request.popped(topic, queue, offset, entry, now, visible_at));
            }
        }
        if self.pop.next(&cursor).is_none() {
            self.change(Change::Seek { cursor: cursor.clone(), next: start });
        }
        if next > start || !offsets.is_empty() {
            let client = request.renewed_for.clone();
            self.change(Change::Popped { cursor, next, since: now, visible_at, client, offsets });
        }
        Ok(())
    }

    /// What lies behind this, a power loss could still take away.
    pub(super) fn visible_end(&self) -> u64 {
        match self.options.flush {
            FlushMode::Async => self.log.end(),
            FlushMode::Sync => self.log.flushed(),
        }
    }

    /// Where a group begins that has never read this queue.
    pub(super) fn first_offset(&self, topic: &Topic, queue: u32, bounds: Bounds) -> Result<u64> {
        if topic.is_retry() {
            return Ok(bounds.min);
        }
        let first = self.index.read(topic, queue, bounds.min, 1)?;
        let near = |e: &Entry| e.log_offset + NEW_GROUP_BACKLOG_MAX_BYTES > self.log.end();
        Ok(if first.first().is_none_or(near) { bounds.min } else { bounds.max })
    }

    /// The cursor that a receipt belongs to.
    pub(super) fn cursor_of(receipt: &Receipt) -> CursorKey {
        let topic = match receipt.from_retry {
            true => Topic::retry(&receipt.group, &receipt.topic),
            false => receipt.topic.clone(),
        };
        CursorKey { group: receipt.group.clone(), topic, queue: receipt.queue }
    }

    fn standing(&mut self, cursor: &CursorKey, receipt: &Receipt, now: Timestamp) -> Result<Standing> {
        let times = (receipt.popped_at, receipt.invisible_until);
        let standing = self.pop.standing(cursor, receipt.offset, times, now);
        if standing != Standing::Lost {
            return Ok(standing);
        }
        // A crash can have lost the message along with the row, and given its place to another one.
        let record = self.record(cursor, receipt.offset)?;
        let same = record.is_some_and(|r| {
            r.log_offset == receipt.log_offset && r.store_timestamp_ms <= receipt.popped_at.0
        });
        Ok(if same { Standing::Lost } else { Standing::Expired })
    }

    pub fn acknowledge(&mut self, receipt: &Receipt, now: Timestamp) -> Result<Standing> {
        let standings = self.acknowledge_all(std::slice::from_ref(receipt), now)?;
        Ok(standings.first().copied().unwrap_or(Standing::Expired))
    }

    /// One standing for each receipt. Those of one queue that follow each other are one change.
    pub fn acknowledge_all(&mut self, receipts: &[Receipt], now: Timestamp) -> Result<Vec<Standing>> {
        let mut standings = Vec::with_capacity(receipts.len());
        let one_queue = |a: &Receipt, b: &Receipt| {
            a.queue == b.queue && a.from_retry == b.from_retry && a.topic == b.topic && a.group == b.group
        };
        for receipts in receipts.chunk_by(one_queue) {
            let cursor = Self::cursor_of(&receipts[0]);
            let mut offsets = Vec::with_capacity(receipts.len());
            for receipt in receipts {
                let standing = self.standing(&cursor, receipt, now)?;
                standings.push(standing);
                if matches!(standing, Standing::Live | Standing::Lost)
                    && offsets.last() != Some(&receipt.offset)
                {
                    offsets.push(receipt.offset);
                }
            }
            if !offsets.is_empty() {
                self.change(Change::Done { cursor, moved: false, offsets });
            }
        }
        Ok(standings)
    }

    /// The message becomes visible again after `invisible_ms`; the receipt that says so.
    pub fn change_invisible(
        &mut self,
        receipt: &Receipt,
        invisible_ms: i64,
        now: Timestamp,
    ) -> Result<Option<Receipt>> {
        let cursor = Self::cursor_of(receipt);
        match self.standing(&cursor, receipt, now)? {
            Standing::Live => {}
            // The row is made again, for this delivery.
            Standing::Lost => self.change(Change::Popped {
                cursor: cursor.clone(),
                next: 0,
                since: receipt.popped_at,
                visible_at: now,
                client: None,
                offsets: vec![receipt.offset],
            }),
            Standing::Settled | Standing::Expired => return Ok(None),
        }
        let visible_at = now.plus_ms(invisible_ms);
        self.change(Change::Visible { cursor, offset: receipt.offset, visible_at, renewal: false });
        Ok(Some(Receipt { invisible_until: visible_at, ..receipt.clone() }))
    }

    /// Moves a message that is in flight to the group's dead letters.
    pub fn dead_letter(&mut self, receipt: &Receipt, now: Timestamp) -> Result<Standing> {
        let cursor = Self::cursor_of(receipt);
        let standing = self.standing(&cursor, receipt, now)?;
        if matches!(standing, Standing::Live | Standing::Lost) {
            self.stage_changes(now)?;
            self.move_message(&cursor, receipt.offset, Some(Destination::DeadLetter), now)?;
        }
        Ok(standing)
    }

    pub fn next_due(&self) -> Option<Timestamp> {
        self.pop.next_due().into_iter().chain(self.next_timer()).min()
    }

    /// Renews, retries or buries what has become due, and delivers scheduled messages. To be called until it returns
    /// false.
    pub fn expire(&mut self, now: Timestamp) -> Result<bool> {
        // A copy settles the place it comes from: what is said of that place before it must be in the log before it.
        self.stage_changes(now)?;
        let due = self.pop.due(now, MOVES_PER_GROUP);
        let mut more = due.len() == MOVES_PER_GROUP;
        for due in due {
            match due {
                Due::Renew(change) => self.change(change),
                Due::Move(cursor, offset) => self.move_message(&cursor, offset, None, now)?,
                Due::Return(cursor, offset, attempt) => match attempt >= self.max_attempts(&cursor.group) {
                    true => self.move_message(&cursor, offset, Some(Destination::DeadLetter), now)?,
                    false => self.pop.give_back(&cursor, offset),
                },
            }
        }
        more |= self.deliver_due(now)?;
        Ok(more)
    }

    fn max_attempts(&self, group: &Group) -> u32 {
        self.meta.group(group).map_or(limits::ATTEMPTS_DEFAULT, |g| g.max_attempts)
    }

    fn move_message(
        &mut self,
        cursor: &CursorKey,
        offset: u64,
        to: Option<Destination>,
        now: Timestamp,
    ) -> Result<()> {
        let done = Change::Done { cursor: cursor.clone(), moved: true, offsets: vec![offset] };
        if let Some(record) = self.record(cursor, offset)? {
            let last = record.reconsume_times + 1 >= self.max_attempts(&cursor.group);
            let to = to.unwrap_or(if last { Destination::DeadLetter } else { Destination::Retry });
            self.copy(cursor, &record, to, now)?;
            // The copy in the log says so itself: moving is one record, not two that a crash could part.
            self.apply(&done);
            return Ok(());
        }
        self.change(done);
        Ok(())
    }

    /// Copies what waits in a retry topic of another broker's naming to where it is looked for here; how many.
    pub fn adopt_retries(&mut self, from: &Topic, group: &Group, offset: u64, now: Timestamp) -> Result<u64> {
        let mut adopted = 0;
        for queue in self.index.queues(from) {
            let cursor = CursorKey { group: group.clone(), topic: from.clone(), queue };
            let bounds = self.index.bounds(from, queue);
            for offset in offset.max(bounds.min)..bounds.max {
                let Some(record) = self.record(&cursor, offset)? else { continue };
                let named =
                    from.as_str().strip_prefix(RETRY_PREFIX).and_then(|r| r.strip_prefix(group.as_str()));
                let named = named.and_then(|r| r.strip_prefix('_')).map(str::to_owned);
                let origin = record.property(message::RETRY_TOPIC).map(str::to_owned).or(named);
                let Some(origin) = origin else { continue };
                let mut properties = record.sent_properties().to_vec();
                if record.property(message::RETRY_TOPIC).is_none() {
                    put_property(&mut properties, message::RETRY_TOPIC, &origin);
                }
                let topic = Topic::retry(group, &Topic::stored(&origin));
                let message = NewMessage {
                    queue: 0,
                    body: record.body.clone(),
                    properties: properties.into(),
                    sys_flag: record.sys_flag,
                    born_timestamp_ms: record.born_timestamp_ms,
                    born_host: record.born_host,
                    hold: Hold::Nothing,
                };
                self.room_for(record_len(&topic, &message, self.options.host) as u64, Room::Messages)?;
                self.stage(&topic, &message, record.reconsume_times, now);
                adopted += 1;
            }
        }
        Ok(adopted)
    }

    pub(super) fn record(&mut self, cursor: &CursorKey, offset: u64) -> Result<Option<Record>> {
        let Some(entry) = self.entry(&cursor.topic, cursor.queue, offset)? else { return Ok(None) };
        match self.reader.read(entry.log_offset, entry.size) {
            Ok(record) => Ok(Some(record)),
            Err(error) => {
                tracing::error!(topic = %cursor.topic, queue = cursor.queue, offset, %error, "unreadable message skipped");
                self.unreadable += 1;
                Ok(None)
            }
        }
    }

    fn copy(&mut self, cursor: &CursorKey, r: &Record, to: Destination, now: Timestamp) -> Result<()> {
        let origin = r.property(message::RETRY_TOPIC).unwrap_or(&r.topic).to_owned();
        let mut properties = Vec::with_capacity(r.properties.len() + 64);
        for (key, value) in message::properties(&r.properties) {
            if !matches!(key, message::CRC | message::RETRY_TOPIC | message::MOVED_FROM | message::RELEASED) {
                put_property(&mut properties, key, value);
            }
        }
        let place = format!("{} {} {}", cursor.topic, r.queue, r.queue_offset);
        put_property(&mut properties, message::MOVED_FROM, &place);
        let (topic, reconsume_times) = match to {
            Destination::Retry => {
                put_property(&mut properties, message::RETRY_TOPIC, &origin);
                (Topic::retry(&cursor.group, &Topic::stored(&origin)), r.reconsume_times + 1)
            }
            Destination::DeadLetter => {
                let id = r.property(message::UNIQ_KEY).unwrap_or_default();
                put_property(&mut properties, message::DLQ_ORIGIN_TOPIC, &origin);
                put_property(&mut properties, message::DLQ_ORIGIN_MESSAGE_ID, id);
                (Topic::dead_letter(&cursor.group), 0)
            }
        };
        if to == Destination::DeadLetter && self.meta.topic(&topic).is_none() {
            let version = self.meta.next_topic_version(&topic);
            let config = TopicConfig { queues: 1, version, ..TopicConfig::normal(topic.clone()) };
            self.change(Change::PutTopic(config));
        }
        let message = NewMessage {
            queue: 0,
            body: r.body.clone(),
            properties: properties.into(),
            sys_flag: r.sys_flag,
            born_timestamp_ms: r.born_timestamp_ms,
            born_host: r.born_host,
            hold: Hold::Nothing,
        };
        self.room_for(record_len(&topic, &message, self.options.host) as u64, Room::Messages)?;
        self.stage(&topic, &message, reconsume_times, now);
        Ok(())
    }
}

/// What a retry or a dead letter says of the place it came from.
pub(super) fn moved_from(topic: &Topic, r: &Record) -> Option<Change> {
    if !topic.is_retry() && !topic.is_dead_letter() {
        return None;
    }
    let mut place = r.property(message::MOVED_FROM)?.rsplitn(3, ' ');
    let offset = place.next()?.parse().ok()?;
    let queue = place.next()?.parse().ok()?;
    let from = Topic::stored(place.next()?);
    let group = match topic.as_str().strip_prefix(DLQ_PREFIX) {
        Some(group) => group,
        None => {
            let origin = r.property(message::RETRY_TOPIC)?;
            topic.as_str().strip_prefix(RETRY_PREFIX)?.strip_suffix(origin)?.strip_suffix('+')?
        }
    };
    let cursor = CursorKey { group: Group::stored(group), topic: from, queue };
    Some(Change::Done { cursor, moved: true, offsets: vec![offset] })
}
