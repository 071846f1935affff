//! What is in flight: for each group and queue how far it has been read, and which messages were handed out
//! but not yet acknowledged. Sans-IO: time is an argument, every effect is a [`Change`] that `apply` carries out,
//! live and in recovery alike.
//!
//! ```text
//!   offsets   0 ── acknowledged ── committed ── in flight / acknowledged out of order ── next ── not yet read
//! ```
//! A message is invisible while its row stands; the row alone decides when that ends.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use model::codec::{self, CodecError, Reader};
use model::{Group, GroupConfig, Timestamp, Topic, TopicConfig, limits};

use crate::change::{self, Change, CursorKey};
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
}

#[derive(Debug, Default)]
struct Cursor {
    next: u64,
    rows: BTreeMap<u64, Row>,
    /// Acknowledged at or above `next`: rows that a crash lost, whose handles still count.
    ahead: BTreeSet<u64>,
    moved: VecDeque<u64>,
}

impl Cursor {
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
        let c = self.get(key)?;
        Some(Lag { committed: c.committed(), next: c.next, in_flight: c.rows.len() as u64 })
    }

    /// Where every group stands on every queue.
    pub fn positions(&self) -> impl Iterator<Item = (&CursorKey, Lag)> {
        let lag = |c: &Cursor| Lag { committed: c.committed(), next: c.next, in_flight: c.rows.len() as u64 };
        self.cursors.values().map(move |(key, cursor)| (key, lag(cursor)))
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
            let lives = row.since == popped_at && (row.visible_at > now || self.renewable(row, now));
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
        Some(Due::Move(key.clone(), offset))
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
                    let row = Row { visible_at: *visible_at, since: *since, client: client.clone() };
                    cursor.rows.insert(*offset, row);
                }
                cursor.ahead = cursor.ahead.split_off(next);
                *self.in_flight.entry(key.group.clone()).or_default() += offsets.len();
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
                if let Some(row) = cursor.rows.get_mut(offset) {
                    self.due.remove(&(row.visible_at, id, *offset));
                    row.visible_at = *visible_at;
                    if !renewal {
                        row.client = None;
                    }
                    self.due.insert((*visible_at, id, *offset));
                }
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
            Change::PutTopic(_) | Change::PutGroup(_) | Change::Key(_) => {}
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
            pop.due.extend(rows.iter().map(|(offset, row)| (row.visible_at, id, *offset)));
            *pop.in_flight.entry(key.group).or_default() += rows.len();
            let (_, cursor) = pop.cursors.get_mut(&id).expect("made above");
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

/// count, then offset, since, visible at, client of each; then the offsets acknowledged ahead
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
        rows.insert(offset, Row { visible_at, since, client });
    }
    Ok((rows, change::take_offsets(&mut r)?.into_iter().collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::MemKv;

    fn key() -> CursorKey {
        CursorKey { group: Group::stored("g"), topic: Topic::stored("t"), queue: 0 }
    }

    fn popped(next: u64, at: i64, invisible: i64, client: Option<&str>, offsets: &[u64]) -> Change {
        Change::Popped {
            cursor: key(),
            next,
            since: Timestamp(at),
            visible_at: Timestamp(at + invisible),
            client: client.map(Arc::from),
            offsets: offsets.into(),
        }
    }

    fn done(offsets: &[u64], moved: bool) -> Change {
        Change::Done { cursor: key(), moved, offsets: offsets.into() }
    }

    #[test]
    fn a_message_not_acknowledged_in_time_becomes_due() {
        let mut pop = Pop::default();
        pop.apply(&popped(3, 0, 100, None, &[0, 1, 2]));
        pop.apply(&done(&[0, 2], false));
        assert_eq!(pop.lag(&key()), Some(Lag { committed: 1, next: 3, in_flight: 1 }));
        assert_eq!(pop.due(Timestamp(99), 9), []);
        assert_eq!(pop.next_due(), Some(Timestamp(100)));
        assert_eq!(pop.due(Timestamp(100), 9), [Due::Move(key(), 1)]);
        pop.apply(&done(&[1], true));
        assert_eq!(pop.lag(&key()), Some(Lag { committed: 3, next: 3, in_flight: 0 }));
        assert_eq!(
            pop.standing(&key(), 1, (Timestamp(0), Timestamp(500)), Timestamp(100)),
            Standing::Expired
        );
        assert_eq!(
            pop.standing(&key(), 0, (Timestamp(0), Timestamp(500)), Timestamp(100)),
            Standing::Settled
        );
    }

    #[test]
    fn the_row_decides_not_the_handle() {
        let mut pop = Pop::default();
        pop.apply(&popped(1, 0, 100, None, &[0]));
        pop.apply(&Change::Visible { cursor: key(), offset: 0, visible_at: Timestamp(900), renewal: false });
        // The handle's own time (100) is over; the row's is not.
        assert_eq!(pop.standing(&key(), 0, (Timestamp(0), Timestamp(100)), Timestamp(500)), Standing::Live);
        assert_eq!(
            pop.standing(&key(), 0, (Timestamp(0), Timestamp(9999)), Timestamp(900)),
            Standing::Expired
        );
    }

    #[test]
    fn a_handle_of_another_delivery_is_expired() {
        let mut pop = Pop::default();
        pop.apply(&popped(1, 50, 100, None, &[0]));
        assert_eq!(
            pop.standing(&key(), 0, (Timestamp(49), Timestamp(149)), Timestamp(60)),
            Standing::Expired
        );
        assert_eq!(pop.standing(&key(), 0, (Timestamp(50), Timestamp(150)), Timestamp(60)), Standing::Live);
    }

    #[test]
    fn a_row_lost_in_a_crash_still_takes_its_ack() {
        let mut pop = Pop::default();
        pop.apply(&Change::Seek { cursor: key(), next: 0 });
        assert_eq!(pop.standing(&key(), 1, (Timestamp(0), Timestamp(900)), Timestamp(1)), Standing::Lost);
        pop.apply(&done(&[1], false));
        assert!(pop.is_settled_ahead(&key(), 1));
        assert_eq!(pop.standing(&key(), 1, (Timestamp(0), Timestamp(900)), Timestamp(1)), Standing::Settled);
        pop.apply(&popped(2, 0, 100, None, &[0]));
        assert!(!pop.is_settled_ahead(&key(), 1));
        assert_eq!(pop.lag(&key()).map(|l| l.committed), Some(0));
    }

    #[test]
    fn renewal_lasts_as_long_as_the_client_lives() {
        let mut pop = Pop::default();
        pop.apply(&popped(1, 0, 60_000, Some("c"), &[0]));
        pop.client_seen("c", Timestamp(50_000));
        let Due::Renew(renewed) = &pop.due(Timestamp(60_000), 9)[0] else { panic!("not renewed") };
        pop.apply(renewed);
        assert_eq!(pop.next_due(), Some(Timestamp(120_000)));
        assert_eq!(pop.due(Timestamp(180_000), 9), [Due::Move(key(), 0)], "silent for more than two minutes");
        pop.client_seen("c", Timestamp(170_000));
        assert!(matches!(pop.due(Timestamp(180_000), 9)[0], Due::Renew(_)));
        for change in pop.client_gone("c", Timestamp(100_000)) {
            pop.apply(&change);
        }
        assert_eq!(pop.due(Timestamp(101_000), 9), [Due::Move(key(), 0)]);
    }

    #[test]
    fn a_message_given_back_is_not_renewed() {
        let mut pop = Pop::default();
        pop.apply(&popped(1, 0, 60_000, Some("c"), &[0]));
        pop.client_seen("c", Timestamp(500));
        pop.apply(&Change::Visible { cursor: key(), offset: 0, visible_at: Timestamp(1000), renewal: false });
        assert_eq!(pop.due(Timestamp(1000), 9), [Due::Move(key(), 0)]);
    }

    #[test]
    fn a_checkpoint_holds_everything() {
        let mut pop = Pop::default();
        pop.apply(&popped(5, 7, 100, Some("c"), &[0, 3, 4]));
        pop.apply(&done(&[3, 9], false));
        let kv = MemKv::default();
        let mut batch = Batch::default();
        pop.checkpoint(&mut batch);
        kv.write(&batch, true).unwrap();
        let loaded = Pop::load(&kv, Timestamp(0)).unwrap();
        assert_eq!(loaded.lag(&key()), pop.lag(&key()));
        assert_eq!(loaded.due, pop.due);
        assert!(loaded.is_settled_ahead(&key(), 9));
        pop.apply(&Change::PutGroup(GroupConfig {
            deleted: true,
            ..GroupConfig::concurrent(Group::stored("g"))
        }));
        let mut batch = Batch::default();
        pop.checkpoint(&mut batch);
        kv.write(&batch, true).unwrap();
        assert_eq!(Pop::load(&kv, Timestamp(0)).unwrap().cursors(&Group::stored("g")), []);
    }
}
