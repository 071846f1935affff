//! What is in flight: for each group and queue how far it has been read, and which messages were handed out
//! but not yet acknowledged. Sans-IO: time is an argument, every effect is a [`Change`] that `apply` carries out,
//! live and in recovery alike.
//!
//! ```text
//!   offsets   0 ── acknowledged ── committed ── in flight / acknowledged out of order ── next ── not yet read
//! ```
//! A message is invisible while its row stands; the row alone decides when that ends.
//!
//! A group that consumes in order has rows in [`lanes`]: of each message group one batch is in flight. What lies behind
//! it keeps a row that waits, and what was not acknowledged in time goes back to waiting in its place.

mod lanes;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use model::codec::{self, CodecError, Reader};
use model::{Group, GroupConfig, Timestamp, Topic, TopicConfig, limits};

pub use self::lanes::Lane;
use self::lanes::Lanes;
use crate::change::{self, Change, CursorKey, Taken};
use crate::error::{Result, StoreError};
use crate::kv::{Batch, Family, Kv};

/// Remembered offsets that were moved away, to answer a late acknowledgement truthfully.
const MOVED_REMEMBERED: usize = 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    visible_at: Timestamp,
    /// When it was handed out.
    since: Timestamp,
    client: Option<Arc<str>>,
    /// Set where the group consumes in order.
    place: Option<Box<Place>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    lane: Lane,
    /// Deliveries so far.
    attempt: u32,
    attempt_id: u64,
    /// Not in flight: behind others, or back after its invisible time.
    waiting: bool,
}

impl Row {
    fn waiting(lane: Lane, attempt: u32) -> Self {
        let place = Place { lane, attempt, attempt_id: 0, waiting: true };
        Self { visible_at: Timestamp(0), since: Timestamp(0), client: None, place: Some(Box::new(place)) }
    }

    fn is_waiting(&self) -> bool {
        self.place.as_ref().is_some_and(|p| p.waiting)
    }
}

#[derive(Debug, Default)]
struct Cursor {
    next: u64,
    rows: BTreeMap<u64, Row>,
    /// Acknowledged at or above `next`: rows that a crash lost, whose handles still count.
    ahead: BTreeSet<u64>,
    moved: VecDeque<u64>,
    lanes: Lanes,
}

impl Cursor {
    fn lag(&self) -> Lag {
        let in_flight = (self.rows.len() - self.lanes.waiting()) as u64;
        Lag { committed: self.committed(), next: self.next, in_flight }
    }

    fn committed(&self) -> u64 {
        self.rows.keys().next().copied().unwrap_or(self.next).min(self.next)
    }
}

type Id = u32;

/// What an acknowledgement finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// In flight.
    Live,
    /// Not in flight, but not yet handed out either as far as is known: a crash has lost the row.
    Lost,
    /// Acknowledged before.
    Settled,
    /// The invisible time is over.
    Expired,
}

/// What is to be done with a message whose invisible time is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Due {
    /// Its client lives: the invisible time goes on.
    Renew(Change),
    /// To the retry topic, or the dead letters.
    Move(CursorKey, u64),
    /// Back to its place in the order, or to the dead letters after this many deliveries.
    Return(CursorKey, u64, u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lag {
    pub committed: u64,
    pub next: u64,
    pub in_flight: u64,
}

#[derive(Debug, Default)]
pub struct Pop {
    ids: HashMap<CursorKey, Id>,
    cursors: BTreeMap<Id, (CursorKey, Cursor)>,
    last_id: Id,
    due: BTreeSet<(Timestamp, Id, u64)>,
    in_flight: HashMap<Group, usize>,
    dirty: BTreeSet<CursorKey>,
    clients: HashMap<Arc<str>, Timestamp>,
    /// Topics of which a message in order can be handed out that could not before.
    freed: Vec<Topic>,
    /// Clients not heard of since then are judged from it.
    opened: Timestamp,
}

impl Pop {
    pub fn next(&self, key: &CursorKey) -> Option<u64> {
        self.get(key).map(|c| c.next)
    }

    /// An offset at or above `next` that is not to be handed out: acknowledged, or in flight, by a handle whose
    /// row a crash had lost.
    pub fn is_settled_ahead(&self, key: &CursorKey, offset: u64) -> bool {
        self.get(key).is_some_and(|c| c.ahead.contains(&offset) || c.rows.contains_key(&offset))
    }

    pub fn in_flight(&self, group: &Group) -> usize {
        self.in_flight.get(group).copied().unwrap_or(0)
    }

    /// Messages in flight of the group that has most.
    pub fn most_in_flight(&self) -> usize {
        self.in_flight.values().copied().max().unwrap_or(0)
    }

    pub fn lag(&self, key: &CursorKey) -> Option<Lag> {
        self.get(key).map(Cursor::lag)
    }

    /// Where every group stands on every queue.
    pub fn positions(&self) -> impl Iterator<Item = (&CursorKey, Lag)> {
        self.cursors.values().map(|(key, cursor)| (key, cursor.lag()))
    }

    /// The cursors of a group.
    pub fn cursors(&self, group: &Group) -> Vec<CursorKey> {
        let mut keys: Vec<_> = self.ids.keys().filter(|k| k.group == *group).cloned().collect();
        keys.sort();
        keys
    }

    /// `popped_at` and `until` are the receipt's: which delivery it belongs to, and for how long it was promised.
    pub fn standing(
        &self,
        key: &CursorKey,
        offset: u64,
        (popped_at, until): (Timestamp, Timestamp),
        now: Timestamp,
    ) -> Standing {
        let Some(cursor) = self.get(key) else { return Standing::Lost };
        if let Some(row) = cursor.rows.get(&offset) {
            let lives = !row.is_waiting()
                && row.since == popped_at
                && (row.visible_at > now || self.renewable(row, now));
            return if lives { Standing::Live } else { Standing::Expired };
        }
        if cursor.moved.contains(&offset) {
            Standing::Expired
        } else if offset >= cursor.next && !cursor.ahead.contains(&offset) {
            Standing::Lost
        } else if until <= now {
            // Long gone, one way or the other.
            Standing::Expired
        } else {
            Standing::Settled
        }
    }

    /// When the earliest invisible time ends.
    pub fn next_due(&self) -> Option<Timestamp> {
        self.due.first().map(|(at, ..)| *at)
    }

    /// What has become due, up to `max`. Nothing changes until the changes are applied.
    pub fn due(&self, now: Timestamp, max: usize) -> Vec<Due> {
        let end = (now, Id::MAX, u64::MAX);
        self.due
            .range(..=end)
            .take(max)
            .filter_map(|(_, id, offset)| self.decide(*id, *offset, now))
            .collect()
    }

    fn decide(&self, id: Id, offset: u64, now: Timestamp) -> Option<Due> {
        let (key, cursor) = self.cursors.get(&id)?;
        let row = cursor.rows.get(&offset)?;
        if self.renewable(row, now) {
            let visible_at = now.plus_ms(limits::INVISIBLE_RENEWED_MS);
            return Some(Due::Renew(Change::Visible {
                cursor: key.clone(),
                offset,
                visible_at,
                renewal: true,
            }));
        }
        Some(match &row.place {
            Some(place) => Due::Return(key.clone(), offset, place.attempt),
            None => Due::Move(key.clone(), offset),
        })
    }

    // --- in order -------------------------------------------------------------------------------------------

    /// True if messages of this queue were handed out in order and are not all settled.
    pub fn has_order(&self, key: &CursorKey) -> bool {
        self.get(key).is_some_and(|c| !c.lanes.is_empty())
    }

    /// What the receive with this attempt id was given, if it is still in flight.
    pub fn attempted(&self, key: &CursorKey, attempt_id: u64, now: Timestamp) -> Vec<(Taken, Timestamp)> {
        let Some(cursor) = self.get(key).filter(|c| attempt_id != 0 && !c.lanes.is_empty()) else {
            return Vec::new();
        };
        let taken = |(offset, row): (&u64, &Row)| {
            let place = row.place.as_ref().filter(|p| !p.waiting && p.attempt_id == attempt_id)?;
            let taken = Taken { offset: *offset, lane: place.lane, attempt: place.attempt };
            (row.visible_at > now).then_some((taken, row.since))
        };
        cursor.rows.iter().filter_map(taken).collect()
    }

    /// What waits and may be handed out next, up to `max`. Without `in_order` whatever waits: the group has changed.
    pub fn ready(&self, key: &CursorKey, max: usize, in_order: bool) -> Vec<Taken> {
        let Some(cursor) = self.get(key).filter(|c| !c.lanes.is_empty()) else { return Vec::new() };
        let taken = |offset: u64| {
            let place = cursor.rows.get(&offset)?.place.as_ref()?;
            Some(Taken { offset, lane: place.lane, attempt: place.attempt + 1 })
        };
        match in_order {
            true => {
                let offsets = cursor.lanes.ready().flat_map(|(_, waiting)| waiting.iter().copied());
                offsets.filter_map(taken).take(max).collect()
            }
            false => cursor.lanes.all_waiting().filter_map(taken).take(max).collect(),
        }
    }

    /// True if nothing of this lane is in flight or waiting.
    pub fn is_free(&self, key: &CursorKey, lane: Lane) -> bool {
        self.get(key).is_none_or(|c| c.lanes.is_free(lane))
    }

    /// Messages of a queue that wait behind others.
    pub fn waiting(&self, key: &CursorKey) -> usize {
        self.get(key).map_or(0, |c| c.lanes.waiting())
    }

    /// The invisible time of a message in order is over. No change says so: time alone does.
    pub fn give_back(&mut self, key: &CursorKey, offset: u64) {
        if let Some(id) = self.ids.get(key).copied() {
            self.back_in_place(id, offset, 0);
        }
    }

    fn back_in_place(&mut self, id: Id, offset: u64, undelivered: u32) {
        let Some((key, cursor)) = self.cursors.get_mut(&id) else { return };
        let Some(row) = cursor.rows.get_mut(&offset) else { return };
        let Some(place) = row.place.as_mut().filter(|p| !p.waiting) else { return };
        place.waiting = true;
        place.attempt -= undelivered.min(place.attempt);
        if cursor.lanes.come_back(place.lane, offset) {
            self.freed.push(key.topic.clone());
        }
        self.due.remove(&(row.visible_at, id, offset));
        row.client = None;
        if let Some(count) = self.in_flight.get_mut(&key.group) {
            *count = count.saturating_sub(1);
        }
    }

    pub fn is_in_order(&self, key: &CursorKey, offset: u64) -> bool {
        self.get(key).and_then(|c| c.rows.get(&offset)).is_some_and(|row| row.place.is_some())
    }

    /// Topics to look at again for those who wait.
    pub fn take_freed(&mut self) -> Vec<Topic> {
        std::mem::take(&mut self.freed)
    }

    fn renewable(&self, row: &Row, now: Timestamp) -> bool {
        let Some(client) = &row.client else { return false };
        let seen = self.clients.get(client).copied().unwrap_or(self.opened);
        now.since(seen) < limits::CLIENT_EXPIRY_MS && now.since(row.since) < limits::RENEWAL_MAX_MS
    }

    pub fn client_seen(&mut self, client: &str, now: Timestamp) {
        match self.clients.get_mut(client) {
            Some(seen) => *seen = now,
            None => drop(self.clients.insert(client.into(), now)),
        }
    }

    /// The client said good-bye: what it holds becomes visible shortly.
    pub fn client_gone(&mut self, client: &str, now: Timestamp) -> Vec<Change> {
        self.clients.remove(client);
        let visible_at = now.plus_ms(limits::INVISIBLE_AFTER_GOODBYE_MS);
        let held = |row: &Row| row.client.as_deref() == Some(client) && row.visible_at > visible_at;
        let mut changes = Vec::new();
        for (key, cursor) in self.cursors.values() {
            for (offset, _) in cursor.rows.iter().filter(|(_, row)| held(row)) {
                changes.push(Change::Visible {
                    cursor: key.clone(),
                    offset: *offset,
                    visible_at,
                    renewal: false,
                });
            }
        }
        changes
    }

    /// Forgets clients that have not been heard of for long.
    pub fn forget_clients(&mut self, now: Timestamp) {
        self.clients.retain(|_, seen| now.since(*seen) < 2 * limits::CLIENT_EXPIRY_MS);
    }

    fn get(&self, key: &CursorKey) -> Option<&Cursor> {
        Some(&self.cursors.get(self.ids.get(key)?)?.1)
    }

    fn id(&mut self, key: &CursorKey) -> Id {
        if let Some(id) = self.ids.get(key) {
            return *id;
        }
        self.last_id += 1;
        self.ids.insert(key.clone(), self.last_id);
        self.cursors.insert(self.last_id, (key.clone(), Cursor::default()));
        self.last_id
    }

    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Popped { cursor: key, next, since, visible_at, client, offsets } => {
                let id = self.touch(key);
                for offset in offsets {
                    self.remove_row(id, *offset);
                    self.due.insert((*visible_at, id, *offset));
                }
                let (_, cursor) = self.cursors.get_mut(&id).expect("touched above");
                cursor.next = cursor.next.max(*next);
                for offset in offsets {
                    let client = client.clone();
                    let row = Row { visible_at: *visible_at, since: *since, client, place: None };
                    cursor.rows.insert(*offset, row);
                }
                cursor.ahead = cursor.ahead.split_off(next);
                *self.in_flight.entry(key.group.clone()).or_default() += offsets.len();
            }
            Change::Ordered { cursor: key, next, since, visible_at, client, attempt_id, taken, held } => {
                let id = self.touch(key);
                for Taken { offset, lane, attempt } in taken {
                    self.remove_row(id, *offset);
                    let (_, cursor) = self.cursors.get_mut(&id).expect("touched above");
                    cursor.lanes.hand_out(*lane, *offset);
                    let (lane, attempt, attempt_id) = (*lane, *attempt, *attempt_id);
                    let place = Some(Box::new(Place { lane, attempt, attempt_id, waiting: false }));
                    let (visible_at, since, client) = (*visible_at, *since, client.clone());
                    cursor.rows.insert(*offset, Row { visible_at, since, client, place });
                    self.due.insert((visible_at, id, *offset));
                }
                let (_, cursor) = self.cursors.get_mut(&id).expect("touched above");
                for (offset, lane) in held {
                    cursor.lanes.hold(*lane, *offset);
                    cursor.rows.insert(*offset, Row::waiting(*lane, 0));
                }
                cursor.next = cursor.next.max(*next);
                cursor.ahead = cursor.ahead.split_off(next);
                *self.in_flight.entry(key.group.clone()).or_default() += taken.len();
            }
            Change::Done { cursor: key, moved, offsets } => {
                let id = self.touch(key);
                for offset in offsets {
                    self.remove_row(id, *offset);
                    let (_, cursor) = self.cursors.get_mut(&id).expect("touched above");
                    if *offset >= cursor.next {
                        cursor.ahead.insert(*offset);
                    }
                    if *moved {
                        cursor.moved.push_back(*offset);
                        if cursor.moved.len() > MOVED_REMEMBERED {
                            cursor.moved.pop_front();
                        }
                    }
                }
            }
            Change::Visible { cursor: key, offset, visible_at, renewal } => {
                let id = self.touch(key);
                let (_, cursor) = self.cursors.get_mut(&id).expect("touched above");
                if let Some(row) = cursor.rows.get_mut(offset).filter(|row| !row.is_waiting()) {
                    self.due.remove(&(row.visible_at, id, *offset));
                    row.visible_at = *visible_at;
                    if !renewal {
                        row.client = None;
                    }
                    self.due.insert((*visible_at, id, *offset));
                }
            }
            Change::Unsent { cursor: key, offsets } => {
                let id = self.touch(key);
                offsets.iter().for_each(|offset| self.back_in_place(id, *offset, 1));
            }
            Change::Seek { cursor: key, next } => {
                let id = self.touch(key);
                let offsets: Vec<u64> = self.cursors[&id].1.rows.keys().copied().collect();
                offsets.into_iter().for_each(|offset| self.remove_row(id, offset));
                let (_, cursor) = self.cursors.get_mut(&id).expect("touched above");
                *cursor = Cursor { next: *next, ..Cursor::default() };
            }
            Change::PutTopic(TopicConfig { topic, deleted: true, .. }) => {
                self.drop_cursors(|key| key.topic == *topic || key.topic == Topic::retry(&key.group, topic))
            }
            Change::PutGroup(GroupConfig { group, deleted: true, .. }) => {
                self.drop_cursors(|key| key.group == *group)
            }
            Change::PutTopic(_)
            | Change::PutGroup(_)
            | Change::Key(_)
            | Change::Recalled(_)
            | Change::Checked { .. }
            | Change::RolledBack { .. } => {}
        }
    }

    fn touch(&mut self, key: &CursorKey) -> Id {
        if !self.dirty.contains(key) {
            self.dirty.insert(key.clone());
        }
        self.id(key)
    }

    fn remove_row(&mut self, id: Id, offset: u64) {
        let Some((key, cursor)) = self.cursors.get_mut(&id) else { return };
        if let Some(row) = cursor.rows.remove(&offset) {
            if row.place.as_ref().is_some_and(|place| cursor.lanes.settle(place.lane, offset)) {
                self.freed.push(key.topic.clone());
            }
            if row.is_waiting() {
                return;
            }
            self.due.remove(&(row.visible_at, id, offset));
            if let Some(count) = self.in_flight.get_mut(&key.group) {
                *count = count.saturating_sub(1);
            }
        }
    }

    fn drop_cursors(&mut self, gone: impl Fn(&CursorKey) -> bool) {
        let ids: Vec<Id> = self.cursors.iter().filter(|(_, (key, _))| gone(key)).map(|(id, _)| *id).collect();
        for id in ids {
            let offsets: Vec<u64> = self.cursors[&id].1.rows.keys().copied().collect();
            offsets.into_iter().for_each(|offset| self.remove_row(id, offset));
            if let Some((key, _)) = self.cursors.remove(&id) {
                self.ids.remove(&key);
                self.dirty.insert(key);
            }
        }
    }

    /// Puts what changed since the last call into a checkpoint.
    pub fn checkpoint(&mut self, batch: &mut Batch) {
        for key in std::mem::take(&mut self.dirty) {
            let name = encode_key(&key);
            let Some(cursor) = self.get(&key) else {
                batch.delete(Family::Offsets, name.clone());
                batch.delete(Family::InFlight, name);
                continue;
            };
            let mut offsets = Vec::new();
            codec::put_u64(&mut offsets, cursor.next);
            batch.put(Family::Offsets, name.clone(), offsets);
            batch.put(Family::InFlight, name, encode_rows(cursor));
        }
    }

    /// A checkpoint failed: everything must go into the next one.
    pub fn mark_dirty(&mut self, batch: &Batch) {
        let keys = batch.0.iter().filter(|(family, ..)| *family == Family::Offsets);
        self.dirty.extend(keys.filter_map(|(_, key, _)| decode_key(key).ok()));
    }

    pub fn load(kv: &dyn Kv, now: Timestamp) -> Result<Self> {
        let damaged = |e| StoreError::Kv(format!("a stored row cannot be read: {e}"));
        let mut pop = Self { opened: now, ..Self::default() };
        for (name, value) in kv.rows(Family::Offsets)? {
            let key = decode_key(&name).map_err(damaged)?;
            let id = pop.id(&key);
            let (_, cursor) = pop.cursors.get_mut(&id).expect("made above");
            cursor.next = Reader::new(&value).u64().map_err(damaged)?;
        }
        for (name, value) in kv.rows(Family::InFlight)? {
            let key = decode_key(&name).map_err(damaged)?;
            let id = pop.id(&key);
            let (rows, ahead) = decode_rows(&value).map_err(damaged)?;
            let out = rows.iter().filter(|(_, row)| !row.is_waiting());
            let due = out.map(|(offset, row)| (row.visible_at, id, *offset));
            let before = pop.due.len();
            pop.due.extend(due);
            *pop.in_flight.entry(key.group).or_default() += pop.due.len() - before;
            let (_, cursor) = pop.cursors.get_mut(&id).expect("made above");
            for (offset, row) in &rows {
                match &row.place {
                    Some(place) if place.waiting => drop(cursor.lanes.hold(place.lane, *offset)),
                    Some(place) => cursor.lanes.hand_out(place.lane, *offset),
                    None => {}
                }
            }
            cursor.rows = rows;
            cursor.ahead = ahead;
        }
        Ok(pop)
    }
}

/// group, topic, queue
fn encode_key(key: &CursorKey) -> Vec<u8> {
    let mut out = Vec::new();
    codec::put_bytes(&mut out, key.group.as_str().as_bytes());
    codec::put_bytes(&mut out, key.topic.as_str().as_bytes());
    codec::put_u64(&mut out, u64::from(key.queue));
    out
}

fn decode_key(bytes: &[u8]) -> std::result::Result<CursorKey, CodecError> {
    let mut r = Reader::new(bytes);
    let (group, topic) = (Group::stored(r.str()?), Topic::stored(r.str()?));
    Ok(CursorKey { group, topic, queue: r.u32()? })
}

/// count, then offset, since, visible at, client of each; then the offsets acknowledged ahead; then of those that
/// are in order: count, and offset, lane, attempt, attempt id, waiting of each
fn encode_rows(cursor: &Cursor) -> Vec<u8> {
    let mut out = Vec::new();
    codec::put_u64(&mut out, cursor.rows.len() as u64);
    for (offset, row) in &cursor.rows {
        codec::put_u64(&mut out, *offset);
        codec::put_i64(&mut out, row.since.0);
        codec::put_i64(&mut out, row.visible_at.0);
        codec::put_bytes(&mut out, row.client.as_deref().unwrap_or("").as_bytes());
    }
    let ahead: Vec<u64> = cursor.ahead.iter().copied().collect();
    change::put_offsets(&mut out, &ahead);
    let places = cursor.rows.iter().filter_map(|(offset, row)| Some((offset, row.place.as_ref()?)));
    codec::put_u64(&mut out, places.clone().count() as u64);
    for (offset, place) in places {
        codec::put_u64(&mut out, *offset);
        codec::put_fixed_u64(&mut out, place.lane);
        codec::put_u64(&mut out, u64::from(place.attempt));
        codec::put_fixed_u64(&mut out, place.attempt_id);
        out.push(u8::from(place.waiting));
    }
    out
}

type Rows = (BTreeMap<u64, Row>, BTreeSet<u64>);

fn decode_rows(bytes: &[u8]) -> std::result::Result<Rows, CodecError> {
    let mut r = Reader::new(bytes);
    let mut rows = BTreeMap::new();
    for _ in 0..r.u64()? {
        let offset = r.u64()?;
        let (since, visible_at) = (Timestamp(r.i64()?), Timestamp(r.i64()?));
        let client = Some(r.str()?).filter(|c| !c.is_empty()).map(Arc::from);
        rows.insert(offset, Row { visible_at, since, client, place: None });
    }
    let ahead = change::take_offsets(&mut r)?.into_iter().collect();
    // Absent in stores of format 2.
    let places = if r.is_empty() { 0 } else { r.u64()? };
    for _ in 0..places {
        let (offset, lane) = (r.u64()?, r.fixed_u64()?);
        let (attempt, attempt_id, waiting) = (r.u32()?, r.fixed_u64()?, r.u8()? != 0);
        if let Some(row) = rows.get_mut(&offset) {
            row.place = Some(Box::new(Place { lane, attempt, attempt_id, waiting }));
        }
    }
    Ok((rows, ahead))
}

#[cfg(test)]
mod tests;
