//! The files of queues: `<topic>/<queue>/<20 digits>`, entries of 20 bytes, 300,000 a file, as in Apache RocketMQ
//! (storage spec §2.1). Only [`super`] may use it: what of a file counts stands in the queue's row.
//!
//! ```text
//! log offset 8 · size 4 · tag code 8      big-endian; size 0: no entry; (0, i32::MAX, 0): a place without message
//! ```

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::Topic;
use parking_lot::Mutex;

use super::{ENTRY_BYTES, Entry};
use crate::error::{Result, StoreError};
use crate::fs::{self, File, Fs};

/// Files kept open; there may be far more queues than a process may have files.
const OPEN_MAX: usize = 256;
/// Files synced by name; of more than that the whole file system is.
const SYNC_ONE_BY_ONE_MAX: usize = if cfg!(test) { 2 } else { 64 };

/// Entries that follow each other in one queue.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub topic: Topic,
    pub queue: u32,
    /// Queue offset of the first one.
    pub from: u64,
    pub entries: Vec<Entry>,
}

/// Read by the writer of the log, written by whoever writes checkpoints.
pub(super) struct QueueFiles {
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    entries_per_file: u64,
    /// All are closed when there are too many: those in use are soon open again.
    open: Mutex<HashMap<PathBuf, Arc<dyn File>>>,
    /// Folders whose new files may not be durable yet.
    unsynced: Mutex<BTreeSet<PathBuf>>,
}

impl QueueFiles {
    pub fn new(fs: Arc<dyn Fs>, dir: &Path, entries_per_file: u64) -> Self {
        Self { fs, dir: dir.into(), entries_per_file, open: Mutex::default(), unsynced: Mutex::default() }
    }

    fn path(&self, topic: &Topic, queue: u32, base: u64) -> PathBuf {
        self.dir.join(topic.as_str()).join(queue.to_string()).join(format!("{base:020}"))
    }

    /// The file of a queue offset by its first byte, and the offset that the next file begins with.
    fn place(&self, offset: u64) -> (u64, u64) {
        let number = offset / self.entries_per_file;
        (number * self.entries_per_file * ENTRY_BYTES, (number + 1) * self.entries_per_file)
    }

    fn get(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        if let Some(file) = self.open.lock().get(path) {
            return Ok(file.clone());
        }
        let file = self.fs.open(path, false)?;
        self.keep(path, &file);
        Ok(file)
    }

    fn keep(&self, path: &Path, file: &Arc<dyn File>) {
        let mut open = self.open.lock();
        if open.len() >= OPEN_MAX {
            open.clear();
        }
        open.insert(path.to_owned(), file.clone());
    }

    /// Entries `[from, to)`. One that is not there is damage: it was, or the row would not say so.
    pub fn read(&self, topic: &Topic, queue: u32, from: u64, to: u64, out: &mut Vec<Entry>) -> Result<()> {
        let mut at = from;
        while at < to {
            let (base, next) = self.place(at);
            let end = to.min(next);
            let path = self.path(topic, queue, base);
            let file = self.get(&path).map_err(|e| StoreError::io("opened", &path, e))?;
            let place = at * ENTRY_BYTES - base;
            let bytes = fs::read_exact_at(&*file, ((end - at) * ENTRY_BYTES) as usize, place)
                .map_err(|e| StoreError::io("read", &path, e))?;
            for (i, entry) in bytes.chunks(ENTRY_BYTES as usize).enumerate() {
                out.push(Entry::decode(entry).ok_or_else(|| {
                    let at = place + i as u64 * ENTRY_BYTES;
                    let what = format!("no queue entry at byte {at}; ferry store repair makes it again");
                    StoreError::Damaged { path: path.clone(), what }
                })?);
            }
            at = end;
        }
        Ok(())
    }

    /// Writes all runs and makes them durable.
    pub fn write<'a>(&self, mut runs: impl Iterator<Item = &'a Run>) -> Result<()> {
        let mut written = BTreeSet::new();
        runs.try_for_each(|run| self.write_run(run, &mut written))?;
        if written.len() > SYNC_ONE_BY_ONE_MAX {
            self.fs.sync_all(&self.dir).map_err(|e| StoreError::io("synced", &self.dir, e))?;
        } else {
            for path in &written {
                gone_is_fine(self.get(path).and_then(|file| file.sync()), path)?;
            }
            self.unsynced.lock().iter().try_for_each(|dir| gone_is_fine(self.fs.sync_dir(dir), dir))?;
        }
        self.unsynced.lock().clear();
        Ok(())
    }

    fn write_run(&self, run: &Run, written: &mut BTreeSet<PathBuf>) -> Result<()> {
        let mut at = run.from;
        let mut rest = &run.entries[..];
        while !rest.is_empty() {
            let (base, next) = self.place(at);
            let path = self.path(&run.topic, run.queue, base);
            let failed = |operation| {
                let path = path.clone();
                move |e| StoreError::io(operation, path, e)
            };
            let file = self.get_or_create(&path, base, at).map_err(failed("opened"))?;
            let (now, later) = rest.split_at(rest.len().min((next - at) as usize));
            let mut bytes = Vec::with_capacity(now.len() * ENTRY_BYTES as usize);
            now.iter().for_each(|e| e.put(&mut bytes));
            file.write_at(&bytes, at * ENTRY_BYTES - base).map_err(failed("written"))?;
            written.insert(path);
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    fn get_or_create(&self, path: &Path, base: u64, first: u64) -> io::Result<Arc<dyn File>> {
        if let Some(file) = self.open.lock().get(path) {
            return Ok(file.clone());
        }
        let dir = path.parent().unwrap_or(path);
        // Also where the file is there: whoever made it may not have come to sync it.
        self.unsynced.lock().extend(dir.ancestors().take(4).map(Path::to_owned));
        let file = match self.fs.open(path, false) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.fs.create_dir(dir)?;
                let file = self.fs.open(path, true)?;
                file.set_len(self.entries_per_file * ENTRY_BYTES)?;
                // A queue that begins inside a file has holes in front.
                let mut holes = Vec::new();
                (base / ENTRY_BYTES..first).for_each(|_| Entry::HOLE.put(&mut holes));
                file.write_at(&holes, 0)?;
                file
            }
            other => other?,
        };
        self.keep(path, &file);
        Ok(file)
    }

    /// The files of a deleted topic.
    pub fn remove(&self, topic: &Topic) -> Result<()> {
        let dir = self.dir.join(topic.as_str());
        self.open.lock().retain(|path, _| !path.starts_with(&dir));
        gone_is_fine(self.fs.remove_dir(&dir), &dir)
    }

    /// Files with entries of `[from, to)` alone, closed: nobody needs them any more.
    pub fn close(&self, topic: &Topic, queue: u32, from: u64, to: u64) -> Vec<PathBuf> {
        let files = from / self.entries_per_file..to / self.entries_per_file;
        let paths: Vec<_> =
            files.map(|n| self.path(topic, queue, n * self.entries_per_file * ENTRY_BYTES)).collect();
        let mut open = self.open.lock();
        paths.iter().for_each(|path| drop(open.remove(path)));
        paths
    }
}

/// A file that was deleted with its topic meanwhile needs no sync.
fn gone_is_fine(done: io::Result<()>, path: &Path) -> Result<()> {
    match done {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|e| StoreError::io("synced", path, e)),
    }
}
