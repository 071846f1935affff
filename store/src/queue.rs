//! The index of every queue: 20-byte entries, 300,000 a file, `consumequeue/<topic>/<queue>/<20 digits>`,
//! as in Apache RocketMQ (storage spec §2.1). Entries are kept in memory until [`QueueIndex::write_out`];
//! a lost entry is rebuilt from the log, so nothing here is on the way of a send.
//!
//! ```text
//! log offset 8 · size 4 · tag code 8      big-endian; size 0: no entry; (0, i32::MAX, 0): a place without message
//! ```

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::Topic;

use crate::error::{Result, StoreError};
use crate::fs::{self, File, Fs};

pub const ENTRY_BYTES: u64 = 20;
/// Entries of one file, as the reference has them.
pub const ENTRIES_PER_FILE: u64 = 300_000;

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

/// What must be synced before a checkpoint may count on the index.
#[derive(Default)]
pub struct Unsynced {
    pub files: BTreeSet<PathBuf>,
    pub dirs: BTreeSet<PathBuf>,
}

/// Queue files kept open; there may be far more queues than a process may have files.
const OPEN_MAX: usize = 256;

/// Open queue files. All are closed when there are too many: those in use are soon open again.
struct Handles {
    fs: Arc<dyn Fs>,
    open: RefCell<HashMap<PathBuf, Arc<dyn File>>>,
}

impl Handles {
    fn get(&self, path: &Path, create: bool) -> std::io::Result<Arc<dyn File>> {
        if let Some(file) = self.open.borrow().get(path) {
            return Ok(file.clone());
        }
        let file = self.fs.open(path, create)?;
        let mut open = self.open.borrow_mut();
        if open.len() >= OPEN_MAX {
            open.clear();
        }
        open.insert(path.to_owned(), file.clone());
        Ok(file)
    }

    fn close_under(&self, dir: &Path) {
        self.open.borrow_mut().retain(|path, _| !path.starts_with(dir));
    }
}

fn file_path(dir: &Path, base: u64) -> PathBuf {
    dir.join(format!("{base:020}"))
}

/// Where every queue's messages stand in the log.
pub trait QueueIndex: Send {
    fn bounds(&self, topic: &Topic, queue: u32) -> Bounds;
    /// Queue ids of a topic that have ever had a message.
    fn queues(&self, topic: &Topic) -> Vec<u32>;
    /// Every topic that has ever had a message.
    fn topics(&self) -> Vec<Topic>;
    fn append(&mut self, topic: &Topic, queue: u32, offset: u64, entry: Entry);
    /// Up to `max` entries from an offset on.
    fn read(&self, topic: &Topic, queue: u32, from: u64, max: usize) -> Result<Vec<Entry>>;
    fn delete(&mut self, topic: &Topic) -> Result<()>;
    /// Forgets entries of messages before a log offset. The next offset of a queue stays, also of an empty one.
    fn trim(&mut self, log_start: u64) -> Result<()>;
    /// Entries that are only in memory.
    fn buffered(&self) -> usize;
    /// Writes what is only in memory. What was written is remembered as unsynced until it is taken.
    fn write_out(&mut self) -> Result<()>;
    fn take_unsynced(&mut self) -> Unsynced;
    /// What was taken could not be dealt with.
    fn give_back(&mut self, unsynced: Unsynced);
}

#[derive(Default)]
struct Queue {
    bounds: Bounds,
    /// Entries `[bounds.max - tail.len(), bounds.max)`.
    tail: VecDeque<Entry>,
    /// Bases of its files.
    files: BTreeSet<u64>,
}

impl Queue {
    fn written(&self) -> u64 {
        self.bounds.max - self.tail.len() as u64
    }
}

pub struct FileQueues {
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    entries_per_file: u64,
    topics: HashMap<Topic, BTreeMap<u32, Queue>>,
    dirty: BTreeSet<(Topic, u32)>,
    buffered: usize,
    unsynced: Unsynced,
    handles: Handles,
}

impl FileQueues {
    /// Loads the index as of a log offset: entries at or above `covered` are dropped, to be made again from the log.
    pub fn open(
        fs: Arc<dyn Fs>,
        dir: &Path,
        entries_per_file: u64,
        covered: u64,
        clean: bool,
    ) -> Result<Self> {
        let handles = Handles { fs: fs.clone(), open: RefCell::default() };
        let mut this = Self {
            handles,
            fs,
            dir: dir.into(),
            entries_per_file,
            topics: HashMap::new(),
            dirty: BTreeSet::new(),
            buffered: 0,
            unsynced: Unsynced::default(),
        };
        let list = |dir: &Path| this.fs.list(dir).map_err(|e| StoreError::io("listed", dir, e));
        for topic in list(dir)? {
            let mut queues = BTreeMap::new();
            for queue in list(&dir.join(&topic))? {
                let Ok(id) = queue.parse::<u32>() else { continue };
                let loaded = this.load(&dir.join(&topic).join(&queue), covered, clean)?;
                queues.extend(loaded.map(|q| (id, q)));
            }
            this.topics.insert(Topic::stored(&topic), queues);
        }
        if !clean && !this.topics.is_empty() {
            // What was cut, of any number of files.
            this.fs.sync_all(dir).map_err(|e| StoreError::io("synced", dir, e))?;
        }
        Ok(this)
    }

    fn load(&self, dir: &Path, covered: u64, clean: bool) -> Result<Option<Queue>> {
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |e| StoreError::io(operation, path, e)
        };
        let mut queue = Queue::default();
        let mut min = None;
        for name in self.fs.list(dir).map_err(failed("listed", dir))? {
            let Ok(base) = name.parse::<u64>() else { continue };
            let path = dir.join(&name);
            let file = self.fs.open(&path, false).map_err(failed("opened", &path))?;
            let count = count_valid(&*file, self.entries_per_file, covered).map_err(failed("read", &path))?;
            let first = base / ENTRY_BYTES;
            let follows = min.is_none() || queue.bounds.max == first;
            if count == 0 || !follows {
                self.fs.remove_file(&path).map_err(failed("removed", &path))?;
                continue;
            }
            if !clean && count < self.entries_per_file {
                // Entries of a log that has been cut since must never be taken for valid ones later.
                file.set_len(count * ENTRY_BYTES).map_err(failed("cut", &path))?;
                file.set_len(self.entries_per_file * ENTRY_BYTES).map_err(failed("cut", &path))?;
            }
            // A queue that begins inside a file has holes in front.
            min.get_or_insert(first);
            queue.bounds.max = first + count;
            queue.files.insert(base);
        }
        let Some(first) = min else { return Ok(None) };
        queue.bounds.min = first;
        Ok(Some(queue))
    }

    fn queue(&self, topic: &Topic, queue: u32) -> Option<&Queue> {
        self.topics.get(topic)?.get(&queue)
    }

    /// The first offset of a queue whose message stands at or after a log offset.
    fn first_from(&self, topic: &Topic, id: u32, log_start: u64) -> Result<u64> {
        let bounds = self.bounds(topic, id);
        let (mut low, mut high) = (bounds.min, bounds.max);
        while low < high {
            let middle = low.midpoint(high);
            // A hole says nothing: the message after it does.
            let mut at = middle;
            let mut later = false;
            while at < high {
                let entries = self.read(topic, id, at, 64)?;
                if let Some(entry) = entries.iter().find(|e| !e.is_hole()) {
                    later = entry.log_offset >= log_start;
                    break;
                }
                at += entries.len().max(1) as u64;
            }
            match later || at >= high {
                true => high = middle,
                false => low = middle + 1,
            }
        }
        Ok(low)
    }

    fn write_queue(&mut self, topic: &Topic, id: u32) -> Result<()> {
        let Some(queue) = self.topics.get_mut(topic).and_then(|q| q.get_mut(&id)) else { return Ok(()) };
        let dir = self.dir.join(topic.as_str()).join(id.to_string());
        let file_bytes = self.entries_per_file * ENTRY_BYTES;
        while !queue.tail.is_empty() {
            let from = queue.written();
            let base = from / self.entries_per_file * file_bytes;
            let path = file_path(&dir, base);
            let failed = |operation| {
                let path = path.clone();
                move |e| StoreError::io(operation, path, e)
            };
            if !queue.files.contains(&base) {
                self.fs.create_dir(&dir).map_err(failed("created"))?;
                let file = self.handles.get(&path, true).map_err(failed("created"))?;
                file.set_len(file_bytes).map_err(failed("created"))?;
                let mut holes = Vec::new();
                for _ in base / ENTRY_BYTES..from {
                    Entry::HOLE.put(&mut holes);
                }
                file.write_at(&holes, 0).map_err(failed("written"))?;
                queue.files.insert(base);
                self.unsynced.dirs.extend(dir.ancestors().take(4).map(Path::to_owned));
            }
            let room = (base + file_bytes) / ENTRY_BYTES - from;
            let count = queue.tail.len().min(room as usize);
            let mut bytes = Vec::with_capacity(count * ENTRY_BYTES as usize);
            queue.tail.iter().take(count).for_each(|e| e.put(&mut bytes));
            let file = self.handles.get(&path, false).map_err(failed("opened"))?;
            file.write_at(&bytes, from * ENTRY_BYTES - base).map_err(failed("written"))?;
            self.unsynced.files.insert(path);
            queue.tail.drain(..count);
            self.buffered -= count;
        }
        queue.tail.shrink_to(64);
        Ok(())
    }
}

/// Entries at the beginning of a file that belong to the log below `covered`. They are a prefix.
fn count_valid(file: &dyn File, entries: u64, covered: u64) -> std::io::Result<u64> {
    let valid = |i: u64| {
        let mut b = [0; ENTRY_BYTES as usize];
        let n = file.read_at(&mut b, i * ENTRY_BYTES)?;
        Ok::<_, std::io::Error>(Entry::decode(&b[..n]).is_some_and(|e| e.log_offset < covered))
    };
    let (mut low, mut high) = (0, entries);
    while low < high {
        let middle = (low + high) / 2;
        if valid(middle)? { low = middle + 1 } else { high = middle }
    }
    Ok(low)
}

impl QueueIndex for FileQueues {
    fn bounds(&self, topic: &Topic, queue: u32) -> Bounds {
        self.queue(topic, queue).map_or_else(Bounds::default, |q| q.bounds)
    }

    fn queues(&self, topic: &Topic) -> Vec<u32> {
        self.topics.get(topic).map_or_else(Vec::new, |q| q.keys().copied().collect())
    }

    fn topics(&self) -> Vec<Topic> {
        self.topics.keys().cloned().collect()
    }

    fn append(&mut self, topic: &Topic, id: u32, offset: u64, entry: Entry) {
        let queue = match self.topics.get_mut(topic) {
            Some(queues) => queues.entry(id).or_default(),
            None => self.topics.entry(topic.clone()).or_default().entry(id).or_default(),
        };
        if queue.bounds.max == queue.bounds.min && queue.files.is_empty() {
            queue.bounds = Bounds { min: offset, max: offset };
        }
        if offset < queue.bounds.max {
            return; // seen before: dispatch may begin again at an earlier offset
        }
        if queue.tail.is_empty() {
            self.dirty.insert((topic.clone(), id));
        }
        for _ in queue.bounds.max..offset {
            queue.tail.push_back(Entry::HOLE);
            self.buffered += 1;
        }
        queue.tail.push_back(entry);
        queue.bounds.max = offset + 1;
        self.buffered += 1;
    }

    fn read(&self, topic: &Topic, id: u32, from: u64, max: usize) -> Result<Vec<Entry>> {
        let Some(queue) = self.queue(topic, id) else { return Ok(Vec::new()) };
        let file_bytes = self.entries_per_file * ENTRY_BYTES;
        let mut from = from.max(queue.bounds.min);
        let to = queue.bounds.max.min(from.saturating_add(max as u64));
        let mut out = Vec::with_capacity(to.saturating_sub(from) as usize);
        while from < to.min(queue.written()) {
            let base = from / self.entries_per_file * file_bytes;
            let end = to.min(queue.written()).min((base + file_bytes) / ENTRY_BYTES);
            if !queue.files.contains(&base) {
                break;
            }
            let len = ((end - from) * ENTRY_BYTES) as usize;
            let path = file_path(&self.dir.join(topic.as_str()).join(id.to_string()), base);
            let file = self.handles.get(&path, false).map_err(|e| StoreError::io("opened", &path, e))?;
            let bytes = fs::read_exact_at(&*file, len, from * ENTRY_BYTES - base)
                .map_err(|e| StoreError::io("read", &path, e))?;
            out.extend(bytes.chunks(ENTRY_BYTES as usize).map(|b| Entry::decode(b).unwrap_or(Entry::HOLE)));
            from = end;
        }
        let skip = from.saturating_sub(queue.written()) as usize;
        out.extend(queue.tail.iter().skip(skip).take(to.saturating_sub(from) as usize));
        Ok(out)
    }

    fn delete(&mut self, topic: &Topic) -> Result<()> {
        let Some(queues) = self.topics.remove(topic) else { return Ok(()) };
        self.buffered -= queues.values().map(|q| q.tail.len()).sum::<usize>();
        self.dirty.retain(|(t, _)| t != topic);
        let dir = self.dir.join(topic.as_str());
        self.unsynced.files.retain(|path| !path.starts_with(&dir));
        self.handles.close_under(&dir);
        match self.fs.remove_dir(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(StoreError::io("removed", dir, e)),
            _ => Ok(()),
        }
    }

    fn trim(&mut self, log_start: u64) -> Result<()> {
        let queues = self.topics.iter().flat_map(|(t, queues)| queues.keys().map(|id| (t.clone(), *id)));
        for (topic, id) in queues.collect::<Vec<_>>() {
            let min = self.first_from(&topic, id, log_start)?;
            let file_bytes = self.entries_per_file * ENTRY_BYTES;
            let Some(queue) = self.topics.get_mut(&topic).and_then(|q| q.get_mut(&id)) else { continue };
            queue.bounds.min = min;
            let dir = self.dir.join(topic.as_str()).join(id.to_string());
            while let Some(base) = queue.files.first().copied().filter(|_| queue.files.len() > 1) {
                if (base + file_bytes) / ENTRY_BYTES > min {
                    break;
                }
                let path = file_path(&dir, base);
                self.handles.close_under(&path);
                self.fs.remove_file(&path).map_err(|e| StoreError::io("removed", &path, e))?;
                self.unsynced.files.remove(&path);
                queue.files.pop_first();
            }
        }
        Ok(())
    }

    fn buffered(&self) -> usize {
        self.buffered
    }

    fn write_out(&mut self) -> Result<()> {
        while let Some((topic, id)) = self.dirty.first().cloned() {
            self.write_queue(&topic, id)?;
            self.dirty.pop_first();
        }
        Ok(())
    }

    fn take_unsynced(&mut self) -> Unsynced {
        std::mem::take(&mut self.unsynced)
    }

    fn give_back(&mut self, unsynced: Unsynced) {
        self.unsynced.files.extend(unsynced.files);
        self.unsynced.dirs.extend(unsynced.dirs);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::MemFs;

    fn entry(i: u64) -> Entry {
        Entry { log_offset: 1000 + i * 10, size: 10, tag_code: -(i as i64) }
    }

    #[test]
    fn entries_come_back_from_memory_and_from_files() {
        let fs: Arc<dyn Fs> = Arc::new(MemFs::new());
        let dir = Path::new("/q");
        let topic = Topic::stored("t");
        let mut index = FileQueues::open(fs.clone(), dir, 100, 0, true).unwrap();
        for i in 0..100 + 5 {
            index.append(&topic, 3, i, entry(i));
            if i == 100 - 7 {
                index.write_out().unwrap();
            }
        }
        let from = 100 - 10;
        let want: Vec<_> = (from..from + 15).map(entry).collect();
        assert_eq!(index.read(&topic, 3, from, 100).unwrap(), want);
        index.write_out().unwrap();
        assert_eq!(index.buffered(), 0);
        assert_eq!(index.read(&topic, 3, from, 100).unwrap(), want);

        // Opened as of an earlier log offset: what is newer is gone, also for later openings.
        let covered = entry(from + 12).log_offset;
        let again = FileQueues::open(fs.clone(), dir, 100, covered, false).unwrap();
        assert_eq!(again.bounds(&topic, 3), Bounds { min: 0, max: from + 12 });
        let later = FileQueues::open(fs, dir, 100, u64::MAX, false).unwrap();
        assert_eq!(later.bounds(&topic, 3).max, from + 12);
    }

    #[test]
    fn a_gap_becomes_holes() {
        let mut index = FileQueues::open(Arc::new(MemFs::new()), Path::new("/q"), 100, 0, true).unwrap();
        let topic = Topic::stored("t");
        index.append(&topic, 0, 0, entry(0));
        index.append(&topic, 0, 2, entry(2));
        assert_eq!(index.read(&topic, 0, 0, 9).unwrap(), [entry(0), Entry::HOLE, entry(2)]);
        index.append(&topic, 0, 1, entry(1));
        assert_eq!(index.bounds(&topic, 0).max, 3, "an offset already there is left alone");
    }
}
