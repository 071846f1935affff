//! Where every queue's messages stand in the log: one entry a message, in order.
//!
//! ```text
//! files [.., filed)  →  row [filed, ..)  →  memory [.., max)
//! ```
//!
//! New entries are in memory. A checkpoint puts those of each changed queue into its row, together with its bounds,
//! in the same batch as everything else that is derived; once a row would hold [`ROW_ENTRIES`] they go into the
//! queue's file instead (`files`). So a queue with few messages costs a row and no file, a busy one a write now and
//! then, and after a crash the row says what of a file counts: nothing is searched, nothing is cut.

mod files;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::Topic;
use model::codec::{self, CodecError, Reader};

use self::files::{QueueFiles, Run};
use crate::error::{Result, StoreError};
use crate::fs::Fs;
use crate::kv::{Batch, Family, Kv};

pub const ENTRY_BYTES: u64 = 20;
/// Entries of one file, as the reference has them.
pub const ENTRIES_PER_FILE: u64 = 300_000;
/// As many of one queue go to its file.
const ROW_ENTRIES: u64 = if cfg!(test) { 4 } else { 32 };
/// Entries in memory from which on a checkpoint does not wait for its time: 6 MiB.
pub const BUFFERED_MAX: usize = 256 * 1024;
/// Written entries that are kept for readers of the newest messages: 6 MiB.
pub const KEPT_MAX: usize = if cfg!(test) { 16 } else { 256 * 1024 };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub log_offset: u64,
    pub size: u32,
    pub tag_code: i64,
}

impl Entry {
    /// Holds the place of a message that is no more.
    pub const HOLE: Entry = Entry { log_offset: 0, size: i32::MAX as u32, tag_code: 0 };

    pub fn is_hole(&self) -> bool {
        *self == Self::HOLE
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.log_offset.to_be_bytes());
        out.extend_from_slice(&self.size.to_be_bytes());
        out.extend_from_slice(&self.tag_code.to_be_bytes());
    }

    /// Nothing if none was written there.
    pub fn decode(b: &[u8]) -> Option<Self> {
        let size = u32::from_be_bytes(b.get(8..12)?.try_into().ok()?);
        let log_offset = u64::from_be_bytes(b.get(..8)?.try_into().ok()?);
        let tag_code = i64::from_be_bytes(b.get(12..20)?.try_into().ok()?);
        (size > 0).then_some(Entry { log_offset, size, tag_code })
    }
}

/// First offset that is there, and the offset of the next message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    pub min: u64,
    pub max: u64,
}

/// What a checkpoint writes besides the rows.
pub struct Taken {
    files: Arc<QueueFiles>,
    gone: BTreeSet<Topic>,
    /// Each with the life of its queue.
    runs: Vec<(Run, u64)>,
}

impl Taken {
    /// Runs on any thread, before the rows are written. What it writes of a log that is not flushed counts for nothing.
    pub fn write(&self) -> Result<()> {
        self.gone.iter().try_for_each(|topic| self.files.remove(topic))?;
        self.files.write(self.runs.iter().map(|(run, _)| run))
    }
}

pub trait QueueIndex: Send {
    fn bounds(&self, topic: &Topic, queue: u32) -> Bounds;
    /// Queue ids of a topic that have ever had a message.
    fn queues(&self, topic: &Topic) -> Vec<u32>;
    /// Every topic that has ever had a message.
    fn topics(&self) -> Vec<Topic>;
    fn append(&mut self, topic: &Topic, queue: u32, offset: u64, entry: Entry);
    /// Up to `max` entries from an offset on.
    fn read(&self, topic: &Topic, queue: u32, from: u64, max: usize) -> Result<Vec<Entry>>;
    fn delete(&mut self, topic: &Topic);
    /// Forgets entries of messages before a log offset. The next offset of a queue stays, also of an empty one.
    /// Gives back the files that nobody needs any more.
    fn trim(&mut self, log_start: u64) -> Result<Vec<PathBuf>>;
    /// Entries that no checkpoint has taken yet.
    fn buffered(&self) -> usize;
    /// Entries in memory.
    fn kept(&self) -> usize;
    /// Takes what has changed since the last time.
    fn take(&mut self, batch: &mut Batch) -> Result<Taken>;
    /// It is written, and so are the rows.
    fn written(&mut self, taken: Taken);
    /// It could not be written: all of it goes into the next one.
    fn give_back(&mut self, taken: Taken, batch: &Batch);
}

#[derive(Default)]
struct Queue {
    id: u32,
    bounds: Bounds,
    /// Log offset of the message at `bounds.min`; 0 if a hole is there.
    first: u64,
    /// Below it entries are in files.
    filed: u64,
    /// Entries `[bounds.max - tail.len(), bounds.max)`; those before are written.
    tail: VecDeque<Entry>,
    /// Has changed since it was last taken.
    dirty: bool,
    /// What was below when it was last taken; 0 if that came to nothing.
    taken_to: u64,
    /// Tells it from an earlier queue of the same name.
    life: u64,
}

impl Queue {
    fn tail_from(&self) -> u64 {
        self.bounds.max - self.tail.len() as u64
    }

    /// min, filed, first; then number of entries, and log offset (as a distance), size and tag code of each
    fn row(&self) -> Vec<u8> {
        let skip = self.filed.saturating_sub(self.tail_from()) as usize;
        let entries = self.tail.iter().skip(skip);
        let mut out = Vec::with_capacity(16 + 12 * entries.len());
        codec::put_u64(&mut out, self.bounds.min);
        codec::put_u64(&mut out, self.filed);
        codec::put_u64(&mut out, self.first);
        codec::put_u64(&mut out, entries.len() as u64);
        let mut last = 0;
        for e in entries {
            codec::put_i64(&mut out, e.log_offset.wrapping_sub(last) as i64);
            codec::put_u64(&mut out, u64::from(e.size));
            codec::put_i64(&mut out, e.tag_code);
            last = e.log_offset;
        }
        out
    }

    fn of_row(id: u32, row: &[u8]) -> std::result::Result<Self, CodecError> {
        let mut r = Reader::new(row);
        let (min, filed, first) = (r.u64()?, r.u64()?, r.u64()?);
        let mut tail = VecDeque::new();
        let mut last = 0u64;
        for _ in 0..r.u64()? {
            last = last.wrapping_add(r.i64()? as u64);
            let size = u32::try_from(r.u64()?).map_err(|_| r.error())?;
            tail.push_back(Entry { log_offset: last, size, tag_code: r.i64()? });
        }
        let max = filed.checked_add(tail.len() as u64).filter(|max| min <= *max).ok_or(r.error())?;
        Ok(Self { id, bounds: Bounds { min, max }, first, filed, tail, ..Self::default() })
    }
}

/// topic · 0 · queue (4 bytes, big-endian)
fn key_of(topic: &Topic, id: u32) -> Vec<u8> {
    [topic.as_str().as_bytes(), &[0], &id.to_be_bytes()].concat()
}

fn of_key(key: &[u8]) -> Option<(Topic, u32)> {
    let (rest, id) = key.split_last_chunk::<4>()?;
    let topic = std::str::from_utf8(rest.strip_suffix(&[0])?).ok()?;
    Some((Topic::stored(topic), u32::from_be_bytes(*id)))
}

fn damaged(key: &[u8]) -> StoreError {
    StoreError::Kv(format!("the row of queue {:?} cannot be read", String::from_utf8_lossy(key)))
}

fn find<'a>(topics: &'a mut HashMap<Topic, Vec<Queue>>, topic: &Topic, id: u32) -> Option<&'a mut Queue> {
    let queues = topics.get_mut(topic)?;
    queues.binary_search_by_key(&id, |q| q.id).ok().map(|i| &mut queues[i])
}

/// The entries that a queue's row holds.
fn row_entries(kv: &dyn Kv, key: &[u8], queue: &Queue) -> Result<VecDeque<Entry>> {
    let row = kv.get(Family::Queues, key)?.ok_or_else(|| damaged(key))?;
    let stored = Queue::of_row(queue.id, &row).map_err(|_| damaged(key))?;
    match stored.filed == queue.filed && stored.bounds.max >= queue.tail_from() {
        true => Ok(stored.tail),
        false => Err(damaged(key)),
    }
}

pub struct FileQueues {
    kv: Arc<dyn Kv>,
    files: Arc<QueueFiles>,
    /// Queues of each topic, by id.
    topics: HashMap<Topic, Vec<Queue>>,
    dirty: Vec<(Topic, u32)>,
    /// Rows and topics that were deleted.
    gone_rows: BTreeSet<Vec<u8>>,
    gone: BTreeSet<Topic>,
    buffered: usize,
    /// Entries in memory.
    kept: usize,
    lives: u64,
}

impl FileQueues {
    /// The index as its last checkpoint has it.
    pub fn open(fs: Arc<dyn Fs>, kv: Arc<dyn Kv>, dir: &Path, entries_per_file: u64) -> Result<Self> {
        let mut topics = HashMap::<Topic, Vec<Queue>>::new();
        for (key, row) in kv.rows(Family::Queues)? {
            let (topic, id) = of_key(&key).ok_or_else(|| damaged(&key))?;
            let mut queue = Queue::of_row(id, &row).map_err(|_| damaged(&key))?;
            // Read again from the row by whoever wants them.
            queue.tail = VecDeque::new();
            // Rows come by key: queues in order.
            topics.entry(topic).or_default().push(queue);
        }
        let files = Arc::new(QueueFiles::new(fs, dir, entries_per_file));
        Ok(Self {
            kv,
            files,
            topics,
            dirty: Vec::new(),
            gone_rows: BTreeSet::new(),
            gone: BTreeSet::new(),
            buffered: 0,
            kept: 0,
            lives: 0,
        })
    }

    fn queue(&self, topic: &Topic, id: u32) -> Option<&Queue> {
        let queues = self.topics.get(topic)?;
        queues.binary_search_by_key(&id, |q| q.id).ok().map(|i| &queues[i])
    }

    fn queue_mut(&mut self, topic: &Topic, id: u32) -> Option<&mut Queue> {
        find(&mut self.topics, topic, id)
    }

    /// The first offset of a queue whose message stands at or after a log offset, and where that is.
    fn first_from(&self, topic: &Topic, id: u32, log_start: u64) -> Result<(u64, u64)> {
        let bounds = self.bounds(topic, id);
        let (mut low, mut high, mut first) = (bounds.min, bounds.max, 0);
        while low < high {
            let middle = low.midpoint(high);
            // A hole says nothing: the message after it does.
            let mut at = middle;
            let mut later = None;
            while at < high && later.is_none() {
                let entries = match self.read(topic, id, at, 64) {
                    // The file went before the row could say so.
                    Err(StoreError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                        later = Some(0);
                        break;
                    }
                    other => other?,
                };
                later = entries.iter().find(|e| !e.is_hole()).map(|e| e.log_offset);
                at += entries.len().max(1) as u64;
            }
            match later.filter(|at| *at < log_start) {
                None => {
                    high = middle;
                    first = later.unwrap_or(0);
                }
                Some(_) => low = middle + 1,
            }
        }
        Ok((low, first))
    }

    fn mark(&mut self, topic: &Topic, id: u32) {
        let Some(queue) = self.queue_mut(topic, id).filter(|q| !q.dirty) else { return };
        queue.dirty = true;
        self.dirty.push((topic.clone(), id));
    }

    /// The row of a queue, and the run that goes to its file.
    fn take_queue(&mut self, topic: &Topic, id: u32, batch: &mut Batch) -> Result<Option<(Run, u64)>> {
        let Some(queue) = find(&mut self.topics, topic, id).filter(|q| q.dirty) else { return Ok(None) };
        let key = key_of(topic, id);
        if queue.tail_from() > queue.filed {
            let mut entries = row_entries(&*self.kv, &key, queue)?;
            entries.truncate((queue.tail_from() - queue.filed) as usize);
            self.kept += entries.len();
            entries.extend(queue.tail.drain(..));
            queue.tail = entries;
        }
        queue.dirty = false;
        queue.taken_to = queue.bounds.max;
        let from = queue.filed;
        if queue.bounds.max - from < ROW_ENTRIES {
            batch.put(Family::Queues, key, queue.row());
            return Ok(None);
        }
        let entries = queue.tail.iter().skip((from - queue.tail_from()) as usize).copied().collect();
        let filed =
            Queue { bounds: queue.bounds, first: queue.first, filed: queue.bounds.max, ..Queue::default() };
        batch.put(Family::Queues, key, filed.row());
        Ok(Some((Run { topic: topic.clone(), queue: id, from, entries }, queue.life)))
    }

    /// Lets go of entries that are written, if there are many. Everything that was taken is.
    fn forget_written(&mut self) {
        if self.kept <= KEPT_MAX {
            return;
        }
        for queue in self.topics.values_mut().flatten() {
            let written = queue.taken_to.saturating_sub(queue.tail_from()) as usize;
            queue.tail.drain(..written);
            queue.tail.shrink_to_fit();
            self.kept -= written;
        }
    }
}

impl QueueIndex for FileQueues {
    fn bounds(&self, topic: &Topic, queue: u32) -> Bounds {
        self.queue(topic, queue).map_or_else(Bounds::default, |q| q.bounds)
    }

    fn queues(&self, topic: &Topic) -> Vec<u32> {
        self.topics.get(topic).map_or_else(Vec::new, |queues| queues.iter().map(|q| q.id).collect())
    }

    fn topics(&self) -> Vec<Topic> {
        self.topics.keys().cloned().collect()
    }

    fn append(&mut self, topic: &Topic, id: u32, offset: u64, entry: Entry) {
        if !self.topics.contains_key(topic) {
            self.topics.insert(topic.clone(), Vec::new());
        }
        let Some(queues) = self.topics.get_mut(topic) else { return };
        let at = queues.binary_search_by_key(&id, |q| q.id).unwrap_or_else(|at| {
            self.lives += 1;
            let bounds = Bounds { min: offset, max: offset };
            queues.insert(at, Queue { id, bounds, filed: offset, life: self.lives, ..Queue::default() });
            at
        });
        let queue = &mut queues[at];
        if offset < queue.bounds.max {
            return; // seen before: dispatch may begin again at an earlier offset
        }
        if queue.bounds.min == queue.bounds.max {
            queue.first = if offset == queue.bounds.max && !entry.is_hole() { entry.log_offset } else { 0 };
        }
        let holes = (queue.bounds.max..offset).map(|_| Entry::HOLE);
        let before = queue.tail.len();
        queue.tail.extend(holes);
        queue.tail.push_back(entry);
        queue.bounds.max = offset + 1;
        let more = queue.tail.len() - before;
        self.buffered += more;
        self.kept += more;
        if !queue.dirty {
            queue.dirty = true;
            self.dirty.push((topic.clone(), id));
        }
    }

    fn read(&self, topic: &Topic, id: u32, from: u64, max: usize) -> Result<Vec<Entry>> {
        let Some(queue) = self.queue(topic, id) else { return Ok(Vec::new()) };
        let from = from.max(queue.bounds.min);
        let to = queue.bounds.max.min(from.saturating_add(max as u64));
        let mut out = Vec::with_capacity(to.saturating_sub(from) as usize);
        let tail_from = queue.tail_from();
        let mut at = from;
        if at < to.min(queue.filed).min(tail_from) {
            let end = to.min(queue.filed).min(tail_from);
            self.files.read(topic, id, at, end, &mut out)?;
            at = end;
        }
        if at < to.min(tail_from) {
            let row = row_entries(&*self.kv, &key_of(topic, id), queue)?;
            let end = to.min(tail_from);
            out.extend(row.range((at - queue.filed) as usize..(end - queue.filed) as usize));
            at = end;
        }
        if at < to {
            out.extend(queue.tail.range((at - tail_from) as usize..(to - tail_from) as usize));
        }
        Ok(out)
    }

    fn delete(&mut self, topic: &Topic) {
        let Some(queues) = self.topics.remove(topic) else { return };
        for queue in queues {
            self.kept -= queue.tail.len();
            self.gone_rows.insert(key_of(topic, queue.id));
        }
        self.gone.insert(topic.clone());
    }

    fn trim(&mut self, log_start: u64) -> Result<Vec<PathBuf>> {
        let mut behind = Vec::new();
        for (topic, queues) in &self.topics {
            let queues = queues.iter().filter(|q| q.bounds.min < q.bounds.max && q.first < log_start);
            behind.extend(queues.map(|q| (topic.clone(), q.id)));
        }
        let mut unneeded = Vec::new();
        for (topic, id) in behind {
            let (min, first) = self.first_from(&topic, id, log_start)?;
            let files = self.files.clone();
            let Some(queue) = self.queue_mut(&topic, id) else { continue };
            unneeded.extend(files.close(&topic, id, queue.bounds.min, min.min(queue.filed)));
            queue.bounds.min = min;
            queue.first = first;
            self.mark(&topic, id);
        }
        Ok(unneeded)
    }

    fn buffered(&self) -> usize {
        self.buffered
    }

    fn kept(&self) -> usize {
        self.kept
    }

    fn take(&mut self, batch: &mut Batch) -> Result<Taken> {
        for key in std::mem::take(&mut self.gone_rows) {
            batch.delete(Family::Queues, key);
        }
        let gone = std::mem::take(&mut self.gone);
        let mut taken = Taken { files: self.files.clone(), gone, runs: Vec::new() };
        self.buffered = 0;
        while let Some((topic, id)) = self.dirty.pop() {
            match self.take_queue(&topic, id, batch) {
                Ok(run) => taken.runs.extend(run),
                Err(error) => {
                    self.dirty.push((topic, id));
                    self.give_back(taken, batch);
                    return Err(error);
                }
            }
        }
        Ok(taken)
    }

    fn written(&mut self, taken: Taken) {
        for (run, life) in taken.runs {
            let Some(queue) = self.queue_mut(&run.topic, run.queue).filter(|q| q.life == life) else {
                continue;
            };
            queue.filed = run.from + run.entries.len() as u64;
            let filed = queue.filed.saturating_sub(queue.tail_from()) as usize;
            queue.tail.drain(..filed);
            queue.tail.shrink_to(64);
            self.kept -= filed;
        }
        self.forget_written();
    }

    fn give_back(&mut self, taken: Taken, batch: &Batch) {
        self.gone.extend(taken.gone);
        for (_, key, _) in batch.0.iter().filter(|(family, ..)| *family == Family::Queues) {
            let Some((topic, id)) = of_key(key) else { continue };
            match self.queue_mut(&topic, id) {
                Some(queue) => {
                    queue.taken_to = 0;
                    self.mark(&topic, id);
                }
                None => drop(self.gone_rows.insert(key.clone())),
            }
        }
    }
}
