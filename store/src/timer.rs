//! Messages that wait for their time: a timeline by due time, exact to the millisecond. Sans-IO but for reads of rows.
//!
//! ```text
//!   key    due (ms, 8 bytes), id (8 bytes): log offset of the record that scheduled it
//!   row    where its record is now: log offset, size
//!   memory the next ones (`near`), and what no checkpoint has written yet (`fresh`, `writing`)
//! ```
//! The record stays in the log until its time; before its file is let go it is written again at the log's end, and only
//! the row changes. So ten million of them cost rows, not memory.

use std::collections::{BTreeMap, BTreeSet};

use model::Timestamp;
use model::codec::{self, CodecError, Reader};

use crate::error::{Result, StoreError};
use crate::kv::{Batch, Family, Kv};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimerKey {
    pub due: Timestamp,
    pub id: u64,
}

/// Where a record is that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub log_offset: u64,
    pub size: u32,
}

impl Held {
    pub(crate) fn put(self, out: &mut Vec<u8>) {
        codec::put_u64(out, self.log_offset);
        codec::put_u64(out, u64::from(self.size));
    }

    pub(crate) fn take(r: &mut Reader<'_>) -> std::result::Result<Self, CodecError> {
        Ok(Self { log_offset: r.u64()?, size: r.u32()? })
    }
}

/// Rows read at once, and how few in memory make more be read.
const PAGE: usize = if cfg!(test) { 4 } else { 4096 };
const LOW: usize = if cfg!(test) { 2 } else { 1024 };
/// As many may be near: 1 MiB.
const NEAR_MAX: usize = if cfg!(test) { 8 } else { 16 * 1024 };
/// Changes in memory from which on a checkpoint does not wait for its time: 16 MiB.
pub const FRESH_MAX: usize = 256 * 1024;

/// The row of [`Family::Covered`] with the number of those pending, the latest due time that was delivered, and how
/// many each log file holds.
const SUMMARY: &[u8] = b"timers";
/// The row with the keys of those taken back, and how many and for how long after their time they are kept.
const RECALLED: &[u8] = b"recalled";
const RECALLED_MAX: usize = 16 * 1024;
const RECALLED_MS: i64 = 3_600_000;

type Overlay = BTreeMap<TimerKey, Option<Held>>;
/// Rows, and where the next page begins if there is one.
pub type Page = (BTreeMap<TimerKey, Held>, Option<TimerKey>);

impl TimerKey {
    const FIRST: TimerKey = TimerKey { due: Timestamp(0), id: 0 };

    fn encode(self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&(self.due.0.max(0) as u64).to_be_bytes());
        out[8..].copy_from_slice(&self.id.to_be_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let due = u64::from_be_bytes(bytes.get(..8)?.try_into().ok()?);
        let id = u64::from_be_bytes(bytes.get(8..16)?.try_into().ok()?);
        Some(Self { due: Timestamp(i64::try_from(due).ok()?), id })
    }

    fn after(self) -> Self {
        Self { id: self.id.saturating_add(1), ..self }
    }
}

pub struct Timers {
    /// All that are due before `horizon`.
    near: BTreeMap<TimerKey, Held>,
    /// From here on rows are not in memory; nothing if all of them are.
    horizon: Option<TimerKey>,
    fresh: Overlay,
    /// In a checkpoint that is being written.
    writing: Overlay,
    pending: u64,
    /// The latest due time of all that were delivered: a clock that went back does not make it the future again.
    delivered_to: Timestamp,
    /// Lately taken back, so that whoever did not hear of it can ask again after their time.
    recalled: BTreeSet<TimerKey>,
    recalled_dirty: bool,
    /// Number of log file -> records in it that wait.
    files: BTreeMap<u64, u64>,
    segment_bytes: u64,
    dirty: bool,
}

impl Timers {
    pub fn load(kv: &dyn Kv, segment_bytes: u64) -> Result<Self> {
        let mut timers = Self {
            near: BTreeMap::new(),
            horizon: Some(TimerKey::FIRST),
            fresh: Overlay::new(),
            writing: Overlay::new(),
            pending: 0,
            delivered_to: Timestamp(0),
            recalled: BTreeSet::new(),
            recalled_dirty: false,
            files: BTreeMap::new(),
            segment_bytes,
            dirty: false,
        };
        if let Some(summary) = kv.get(Family::Covered, SUMMARY)? {
            let damaged = |e| StoreError::Kv(format!("the summary of timers cannot be read: {e}"));
            let mut r = Reader::new(&summary);
            timers.pending = r.u64().map_err(damaged)?;
            timers.delivered_to = Timestamp(r.i64().map_err(damaged)?);
            while !r.is_empty() {
                timers.files.insert(r.u64().map_err(damaged)?, r.u64().map_err(damaged)?);
            }
        }
        if let Some(recalled) = kv.get(Family::Covered, RECALLED)? {
            timers.recalled = recalled.chunks_exact(16).filter_map(TimerKey::decode).collect();
        }
        timers.refill(kv)?;
        Ok(timers)
    }

    pub fn pending(&self) -> u64 {
        self.pending
    }

    /// What no checkpoint has taken yet.
    pub fn fresh(&self) -> usize {
        self.fresh.len()
    }

    /// Records that wait in the log file with this offset.
    pub fn in_file(&self, log_offset: u64) -> u64 {
        self.files.get(&(log_offset / self.segment_bytes)).copied().unwrap_or(0)
    }

    /// The one that is due next.
    pub fn first(&self) -> Option<(TimerKey, Held)> {
        self.near.first_key_value().map(|(key, held)| (*key, *held))
    }

    pub fn get(&self, kv: &dyn Kv, key: TimerKey) -> Result<Option<Held>> {
        if self.is_near(key) {
            return Ok(self.near.get(&key).copied());
        }
        if let Some(known) = self.fresh.get(&key).or_else(|| self.writing.get(&key)) {
            return Ok(*known);
        }
        let row = kv.get(Family::Timers, &key.encode())?;
        Ok(row.and_then(|row| Held::take(&mut Reader::new(&row)).ok()))
    }

    fn is_near(&self, key: TimerKey) -> bool {
        self.horizon.is_none_or(|horizon| key < horizon)
    }

    fn count(&mut self, held: Held, more: bool) {
        let count = self.files.entry(held.log_offset / self.segment_bytes).or_default();
        *count = if more { *count + 1 } else { count.saturating_sub(1) };
        if *count == 0 {
            self.files.remove(&(held.log_offset / self.segment_bytes));
        }
        self.dirty = true;
    }

    pub fn schedule(&mut self, key: TimerKey, held: Held) {
        self.pending += 1;
        self.put(key, held);
    }

    fn put(&mut self, key: TimerKey, held: Held) {
        self.count(held, true);
        self.fresh.insert(key, Some(held));
        if self.is_near(key) {
            self.near.insert(key, held);
        }
        if self.near.len() > NEAR_MAX
            && let Some(key) = self.near.keys().nth(PAGE).copied()
        {
            self.near.split_off(&key);
            self.horizon = Some(key);
        }
    }

    /// True if messages of this time have been delivered.
    pub fn has_come(&self, due: Timestamp) -> bool {
        due <= self.delivered_to
    }

    pub fn was_recalled(&self, key: TimerKey) -> bool {
        self.recalled.contains(&key)
    }

    pub fn recall(&mut self, kv: &dyn Kv, key: TimerKey) -> Result<bool> {
        self.recalled.insert(key);
        let forgotten = self.delivered_to.plus_ms(-RECALLED_MS);
        while self.recalled.len() > RECALLED_MAX || self.recalled.first().is_some_and(|k| k.due < forgotten) {
            self.recalled.pop_first();
        }
        self.recalled_dirty = true;
        self.settle(kv, key)
    }

    pub fn deliver(&mut self, kv: &dyn Kv, key: TimerKey) -> Result<bool> {
        self.delivered_to = self.delivered_to.max(key.due);
        self.settle(kv, key)
    }

    /// It is delivered or recalled; false if it was before.
    pub fn settle(&mut self, kv: &dyn Kv, key: TimerKey) -> Result<bool> {
        let Some(held) = self.get(kv, key)? else { return Ok(false) };
        self.pending = self.pending.saturating_sub(1);
        self.count(held, false);
        self.near.remove(&key);
        self.fresh.insert(key, None);
        self.refill(kv)?;
        Ok(true)
    }

    /// Its record was written again.
    pub fn move_to(&mut self, kv: &dyn Kv, key: TimerKey, held: Held) -> Result<()> {
        if let Some(old) = self.get(kv, key)? {
            self.count(old, false);
            self.put(key, held);
        }
        Ok(())
    }

    /// Up to a page of what is pending, from a key on.
    pub fn page(&self, kv: &dyn Kv, from: TimerKey) -> Result<Page> {
        let stored = kv.range(Family::Timers, &from.encode(), PAGE)?;
        let last = stored.last().and_then(|(key, _)| TimerKey::decode(key));
        let end = last.filter(|_| stored.len() == PAGE).map(TimerKey::after);
        let row = |(key, row): (Vec<u8>, Vec<u8>)| {
            Some((TimerKey::decode(&key)?, Held::take(&mut Reader::new(&row)).ok()?))
        };
        let mut rows: BTreeMap<TimerKey, Held> = stored.into_iter().filter_map(row).collect();
        for overlay in [&self.writing, &self.fresh] {
            let within = overlay.range(from..).take_while(|(key, _)| end.is_none_or(|end| **key < end));
            for (key, held) in within {
                match held {
                    Some(held) => rows.insert(*key, *held),
                    None => rows.remove(key),
                };
            }
        }
        Ok((rows, end))
    }

    fn refill(&mut self, kv: &dyn Kv) -> Result<()> {
        while self.near.len() < LOW
            && let Some(horizon) = self.horizon
        {
            let (rows, end) = self.page(kv, horizon)?;
            self.near.extend(rows);
            self.horizon = end;
        }
        Ok(())
    }

    // --- checkpoints ----------------------------------------------------------------------------------------

    /// Puts what changed since the last call into a checkpoint. One at a time.
    pub fn checkpoint(&mut self, batch: &mut Batch) {
        for (key, held) in &self.fresh {
            match held {
                Some(held) => {
                    let mut row = Vec::with_capacity(12);
                    held.put(&mut row);
                    batch.put(Family::Timers, key.encode(), row);
                }
                None => batch.delete(Family::Timers, key.encode()),
            }
        }
        self.writing = std::mem::take(&mut self.fresh);
        if std::mem::take(&mut self.recalled_dirty) {
            let row: Vec<u8> = self.recalled.iter().flat_map(|key| key.encode()).collect();
            batch.put(Family::Covered, RECALLED, row);
        }
        if std::mem::take(&mut self.dirty) {
            let mut summary = Vec::new();
            codec::put_u64(&mut summary, self.pending);
            codec::put_i64(&mut summary, self.delivered_to.0);
            for (file, count) in &self.files {
                codec::put_u64(&mut summary, *file);
                codec::put_u64(&mut summary, *count);
            }
            batch.put(Family::Covered, SUMMARY, summary);
        }
    }

    pub fn written(&mut self) {
        self.writing.clear();
    }

    /// The checkpoint failed: everything must go into the next one.
    pub fn give_back(&mut self) {
        (self.dirty, self.recalled_dirty) = (true, true);
        for (key, held) in std::mem::take(&mut self.writing) {
            self.fresh.entry(key).or_insert(held);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kv::MemKv;

    const SEGMENT: u64 = 100;

    #[derive(Clone, Debug)]
    enum Op {
        Schedule { due: u8 },
        Settle { which: u8 },
        Move { which: u8 },
        Fire,
        Checkpoint { fails: bool },
        Reopen,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            6 => (0u8..40).prop_map(|due| Op::Schedule { due }),
            2 => any::<u8>().prop_map(|which| Op::Settle { which }),
            2 => any::<u8>().prop_map(|which| Op::Move { which }),
            3 => Just(Op::Fire),
            2 => any::<bool>().prop_map(|fails| Op::Checkpoint { fails }),
            1 => Just(Op::Reopen),
        ]
    }

    fn checkpoint(timers: &mut Timers, kv: &MemKv, fails: bool) {
        let mut batch = Batch::default();
        timers.checkpoint(&mut batch);
        if fails {
            timers.give_back();
        } else {
            kv.write(&batch, true).unwrap();
            timers.written();
        }
    }

    proptest! {
        /// Whatever is in memory and whatever in rows: it is one timeline.
        #[test]
        fn equals_a_plain_map(ops in prop::collection::vec(op(), 1..120)) {
            let kv = MemKv::default();
            let mut timers = Timers::load(&kv, SEGMENT).unwrap();
            let mut model: BTreeMap<TimerKey, Held> = BTreeMap::new();
            let mut id = 0;
            for op in ops {
                id += 7;
                let pick = |which: u8| model.keys().nth(usize::from(which) % model.len().max(1)).copied();
                match op {
                    Op::Schedule { due } => {
                        let key = TimerKey { due: Timestamp(due.into()), id };
                        let held = Held { log_offset: id, size: 1 };
                        timers.schedule(key, held);
                        model.insert(key, held);
                    }
                    Op::Settle { which } => if let Some(key) = pick(which) {
                        prop_assert!(timers.settle(&kv, key).unwrap());
                        prop_assert!(!timers.settle(&kv, key).unwrap());
                        model.remove(&key);
                    },
                    Op::Move { which } => if let Some(key) = pick(which) {
                        let held = Held { log_offset: id, size: 2 };
                        timers.move_to(&kv, key, held).unwrap();
                        model.insert(key, held);
                    },
                    Op::Fire => {
                        let first = model.pop_first();
                        prop_assert_eq!(timers.first(), first);
                        if let Some((key, _)) = first {
                            timers.settle(&kv, key).unwrap();
                        }
                    }
                    Op::Checkpoint { fails } => checkpoint(&mut timers, &kv, fails),
                    Op::Reopen => {
                        checkpoint(&mut timers, &kv, false);
                        timers = Timers::load(&kv, SEGMENT).unwrap();
                    }
                }
                prop_assert_eq!(timers.pending(), model.len() as u64);
                prop_assert_eq!(timers.first(), model.first_key_value().map(|(k, h)| (*k, *h)));
                prop_assert!(timers.near.len() <= NEAR_MAX + PAGE);
            }
            let mut listed = BTreeMap::new();
            let mut from = Some(TimerKey::FIRST);
            while let Some(at) = from {
                let (rows, next) = timers.page(&kv, at).unwrap();
                listed.extend(rows);
                from = next;
            }
            prop_assert_eq!(&listed, &model);
            let in_files: u64 = (0..=id / SEGMENT).map(|file| timers.in_file(file * SEGMENT)).sum();
            prop_assert_eq!(in_files, model.len() as u64);
        }
    }
}
