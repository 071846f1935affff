//! The key index: where the messages with a key are, in Apache RocketMQ's IndexFile bytes (storage spec §2.5).
//! Written behind, a batch at a time, at checkpoints; a derived family of its own, because syncing it with every
//! checkpoint would cost more than rebuilding its end in the background after a crash.

mod file;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::codec::{self, Reader};
use model::{hash, message};
use parking_lot::Mutex;

pub use self::file::{Header, Shape, StoredEntry, decode_entry};
use self::file::{Index, file_name, read_header};
use crate::error::{Result, StoreError};
use crate::fs::Fs;
use crate::kv::{Batch, Family, Kv};
use crate::log::LogReader;
use crate::log::record::Record;

/// Log that one step of a rebuild reads, bytes.
const REBUILD_BYTES: u64 = 16 << 20;
/// Entries that wait for a rebuild to end; more are read from the log again instead.
pub const WAITING_MAX: usize = 1 << 18;
/// Not the name of a family: those have rows of their own in the same place.
const ROW: &[u8] = b"key index";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyEntry {
    pub hash: u32,
    pub log_offset: u64,
    pub stored_ms: i64,
}

/// The hash of a key in a topic.
pub fn key_hash(topic: &str, key: &str) -> u32 {
    let hash = hash::java_hash_on(hash::java_hash_on(hash::java_hash(topic), "#"), key);
    // Java's abs leaves the least number negative, which the reference then takes for 0.
    hash.checked_abs().unwrap_or(0) as u32
}

/// The keys that a message is found by: its id and its own.
pub fn keys_of(topic: &str, properties: &[u8], mut each: impl FnMut(u32)) {
    for (name, value) in message::properties(properties) {
        match name {
            message::UNIQ_KEY if !value.is_empty() => each(key_hash(topic, value)),
            message::KEYS => {
                value.split(' ').filter(|k| !k.is_empty()).for_each(|k| each(key_hash(topic, k)))
            }
            _ => {}
        }
    }
}

/// The key index of a store. The writer only ever stages, which takes no time; files are for other threads.
pub struct KeyIndex {
    staged: Mutex<Staged>,
    files: Mutex<Files>,
}

#[derive(Default)]
struct Staged {
    entries: Vec<KeyEntry>,
    /// Everything below this is staged or in the files.
    to: u64,
}

struct Files {
    fs: Arc<dyn Fs>,
    kv: Arc<dyn Kv>,
    dir: PathBuf,
    shape: Shape,
    /// Oldest first; the last one is written to.
    files: Vec<Index>,
    /// Entries of the log below this are in the files.
    covered: u64,
    /// The same, once a sync has made it durable.
    synced: u64,
    /// Set while the end of the log is being indexed again; up to where.
    rebuild_to: Option<u64>,
    /// Slots of the newest file are not to be trusted: a crash may have left them behind, or ahead.
    repair: bool,
    failed: bool,
}

/// How far a rebuild is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub at: u64,
    pub to: u64,
}

impl KeyIndex {
    /// Opens the index as of the last sync.
    pub fn open(fs: Arc<dyn Fs>, kv: Arc<dyn Kv>, dir: &Path, shape: Shape, clean: bool) -> Result<Self> {
        let files = Mutex::new(Files::open(fs, kv, dir, shape, clean)?);
        Ok(Self { staged: Mutex::default(), files })
    }

    /// To be called once the log is open: what it has beyond the index is to be indexed again by
    /// [`KeyIndex::rebuild`].
    pub fn follow(&self, log_start: u64, log_end: u64) {
        let mut files = self.files.lock();
        files.covered = files.covered.clamp(log_start.min(log_end), log_end);
        files.rebuild_to = (files.repair || files.covered < log_end).then_some(log_end);
        self.staged.lock().to = log_end;
    }

    /// Takes what was committed since the last call, up to the log offset `to`.
    pub fn stage(&self, entries: &mut Vec<KeyEntry>, to: u64) {
        let mut staged = self.staged.lock();
        staged.entries.append(entries);
        staged.to = to;
    }

    /// Writes what is staged; with `sync`, makes it durable and remembers how far it goes.
    pub fn write_out(&self, sync: bool) -> Result<()> {
        let mut files = self.files.lock();
        if let Some(to) = &mut files.rebuild_to {
            let mut staged = self.staged.lock();
            if staged.entries.len() > WAITING_MAX {
                staged.entries = Vec::new();
                *to = staged.to;
            }
            return Ok(());
        }
        if files.failed {
            // Read from the log again once that helps.
            self.staged.lock().entries = Vec::new();
            return Ok(());
        }
        self.write_staged(&mut files)?;
        if sync { files.sync() } else { Ok(()) }
    }

    fn write_staged(&self, files: &mut Files) -> Result<()> {
        // Found in one place or the other all the time.
        let (entries, to) = {
            let staged = self.staged.lock();
            (staged.entries.clone(), staged.to)
        };
        files.write(&entries, to)?;
        self.staged.lock().entries.drain(..entries.len());
        Ok(())
    }

    /// Log offsets of messages whose key has this hash, newest first. The caller compares the keys themselves.
    pub fn find(&self, hash: u32, from_ms: i64, to_ms: i64, max: usize) -> Result<Vec<u64>> {
        let files = self.files.lock();
        let mut found: Vec<u64> = {
            let staged = self.staged.lock();
            let wanted = |e: &&KeyEntry| e.hash == hash && (from_ms..=to_ms).contains(&e.stored_ms);
            staged.entries.iter().rev().filter(wanted).map(|e| e.log_offset).take(max).collect()
        };
        for (i, index) in files.files.iter().enumerate().rev() {
            let outside = index.header.begin_ms > to_ms || index.header.end_ms < from_ms;
            let broken = files.repair && i + 1 == files.files.len();
            if found.len() < max && !outside && !broken {
                let read = index.find(files.shape, hash, (from_ms, to_ms), max, &mut found);
                read.map_err(|e| StoreError::io("read", files.dir.join(&index.name), e))?;
            }
        }
        Ok(found)
    }

    /// Removes files that point only to places before `log_start`.
    pub fn prune(&self, log_start: u64) -> Result<()> {
        let mut files = self.files.lock();
        while files.files.len() > 1 && files.files[0].header.end_offset < log_start {
            let path = files.dir.join(&files.files[0].name);
            files.fs.remove_file(&path).map_err(|e| StoreError::io("removed", &path, e))?;
            files.files.remove(0);
        }
        Ok(())
    }

    /// The next start makes the index anew.
    pub fn forget(&self) -> Result<()> {
        let mut files = self.files.lock();
        files.failed = true;
        let mut batch = Batch::default();
        batch.delete(Family::Covered, ROW);
        files.kv.write(&batch, true)
    }

    /// Keys that are staged and not yet in a file.
    pub fn waiting(&self) -> usize {
        self.staged.lock().entries.len()
    }

    /// After an error: goes back to what is durable. True if [`KeyIndex::rebuild`] is to do the rest again.
    pub fn mend(&self) -> Result<bool> {
        let mut files = self.files.lock();
        if !files.failed {
            return Ok(false);
        }
        let again = Files::open(files.fs.clone(), files.kv.clone(), &files.dir, files.shape, false)?;
        *files = again;
        let mut staged = self.staged.lock();
        staged.entries = Vec::new();
        files.rebuild_to = Some(staged.to);
        Ok(true)
    }

    /// Set while keys are being indexed again.
    pub fn progress(&self) -> Option<Progress> {
        let files = self.files.lock();
        files.rebuild_to.map(|to| Progress { at: files.covered, to })
    }

    /// Indexes what a crash, or an import, left out; to be run on a thread of its own. Ends early if `stop` says so.
    pub fn rebuild(&self, reader: &LogReader, mut stop: impl FnMut() -> bool) -> Result<()> {
        self.files.lock().repair_slots()?;
        while let Some(Progress { at, to }) = self.progress() {
            if at >= to {
                let mut files = self.files.lock();
                if files.rebuild_to == Some(to) {
                    files.rebuild_to = None;
                    return self.write_staged(&mut files);
                }
                continue;
            }
            if stop() {
                break;
            }
            let mut entries = Vec::new();
            let next = reader.walk(at, to, REBUILD_BYTES, |r| entries_of(r, &mut entries))?;
            self.files.lock().write(&entries, next)?;
        }
        Ok(())
    }
}

impl Files {
    fn open(fs: Arc<dyn Fs>, kv: Arc<dyn Kv>, dir: &Path, shape: Shape, clean: bool) -> Result<Self> {
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |e| StoreError::io(operation, path, e)
        };
        let row = kv.get(Family::Covered, ROW)?;
        let (mut covered, next, newest) = row.as_deref().and_then(decode_row).unwrap_or_default();
        let mut files = Vec::new();
        for name in fs.list(dir).map_err(failed("listed", dir))? {
            let path = dir.join(&name);
            let known = covered > 0 && name <= newest;
            let file = fs.open(&path, false).map_err(failed("opened", &path))?;
            let header = read_header(&*file).map_err(failed("read", &path))?;
            match header.filter(|_| known) {
                Some(header) => files.push(Index { name, file, header }),
                None => fs.remove_file(&path).map_err(failed("removed", &path))?,
            }
        }
        match files.last_mut() {
            Some(last) if last.name == newest => last.header.next = next,
            // Another shape, or the file is gone: all over again.
            _ if covered > 0 && !newest.is_empty() => covered = 0,
            _ => {}
        }
        if covered == 0 {
            for index in files.drain(..) {
                let path = dir.join(&index.name);
                fs.remove_file(&path).map_err(failed("removed", &path))?;
            }
        }
        Ok(Self {
            fs,
            kv,
            dir: dir.into(),
            shape,
            repair: !clean && !files.is_empty(),
            files,
            covered,
            synced: covered,
            rebuild_to: None,
            failed: false,
        })
    }

    fn write(&mut self, entries: &[KeyEntry], covered: u64) -> Result<()> {
        if self.failed {
            return Ok(());
        }
        let written = self.append(entries);
        // What is in the file now is not what is known of it: nothing more is written before it is mended.
        self.failed = written.is_err();
        written.map_err(|e| StoreError::io("written", &self.dir, e))?;
        self.covered = self.covered.max(covered);
        Ok(())
    }

    fn append(&mut self, mut entries: &[KeyEntry]) -> io::Result<()> {
        while let Some(first) = entries.first() {
            if self.files.last().is_none_or(|f| f.header.next >= self.shape.entries) {
                self.roll(first)?;
            }
            let Some(index) = self.files.last_mut() else { return Ok(()) };
            let room = (self.shape.entries - index.header.next) as usize;
            let (now, later) = entries.split_at(room.min(entries.len()));
            index.append(self.shape, now)?;
            entries = later;
        }
        Ok(())
    }

    fn roll(&mut self, first: &KeyEntry) -> io::Result<()> {
        if let Some(full) = self.files.last() {
            full.file.sync()?;
        }
        self.fs.create_dir(&self.dir)?;
        let mut at = first.stored_ms;
        let mut name = file_name(at);
        while self.files.last().is_some_and(|f| f.name >= name) {
            at += 1;
            name = file_name(at);
        }
        let file = self.fs.open(&self.dir.join(&name), true)?;
        file.set_len(self.shape.file_bytes())?;
        self.fs.sync_dir(&self.dir)?;
        let header = Header { next: 1, ..Header::default() };
        self.files.push(Index { name, file, header });
        Ok(())
    }

    /// Makes it durable and remembers how far it goes.
    fn sync(&mut self) -> Result<()> {
        if self.failed || self.covered == self.synced {
            return Ok(());
        }
        let (mut next, mut newest) = (0, "");
        if let Some(last) = self.files.last() {
            last.file.sync().map_err(|e| StoreError::io("synced", self.dir.join(&last.name), e))?;
            (next, newest) = (last.header.next, &last.name);
        }
        let mut batch = Batch::default();
        batch.put(Family::Covered, ROW, encode_row(self.covered, next, newest));
        self.kv.write(&batch, true)?;
        self.synced = self.covered;
        Ok(())
    }

    /// Makes the newest file's slots again from its entries, which were synced.
    fn repair_slots(&mut self) -> Result<()> {
        let shape = self.shape;
        let Some(index) = self.files.last_mut().filter(|_| self.repair) else { return Ok(()) };
        let path = self.dir.join(&index.name);
        index.repair(shape).map_err(|e| StoreError::io("repaired", path, e))?;
        self.repair = false;
        Ok(())
    }
}

fn entries_of(r: &Record, out: &mut Vec<KeyEntry>) {
    keys_of(&r.topic, &r.properties, |hash| {
        out.push(KeyEntry { hash, log_offset: r.log_offset, stored_ms: r.store_timestamp_ms });
    });
}

/// covered, next entry, name of the newest file
fn encode_row(covered: u64, next: u32, newest: &str) -> Vec<u8> {
    let mut out = Vec::new();
    codec::put_u64(&mut out, covered);
    codec::put_u64(&mut out, u64::from(next));
    codec::put_bytes(&mut out, newest.as_bytes());
    out
}

fn decode_row(bytes: &[u8]) -> Option<(u64, u32, String)> {
    let mut r = Reader::new(bytes);
    Some((r.u64().ok()?, r.u32().ok()?, r.str().ok()?.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::MemFs;
    use crate::kv::MemKv;
    use proptest::prelude::*;

    const SHAPE: Shape = Shape { slots: 7, entries: 40 };

    #[test]
    fn names_are_dates() {
        assert_eq!(file_name(0), "19700101000000000");
        assert_eq!(file_name(951_782_400_000), "20000229000000000");
        assert_eq!(file_name(1_795_269_728_473), "20261121140208473");
    }

    #[test]
    fn the_hash_is_the_references() {
        assert_eq!(key_hash("T", "k1"), hash::java_hash("T#k1").unsigned_abs());
        assert_eq!(Shape::default().file_bytes(), 420_000_040);
    }

    fn entry(i: u64, hash: u32) -> KeyEntry {
        KeyEntry { hash, log_offset: i * 100, stored_ms: 1_000_000 + i as i64 * 700 }
    }

    fn open(fs: &MemFs, kv: &MemKv, end: u64, clean: bool) -> KeyIndex {
        let (fs, kv) = (Arc::new(fs.clone()), Arc::new(kv.clone()));
        let keys = KeyIndex::open(fs, kv, Path::new("/index"), SHAPE, clean).unwrap();
        keys.follow(0, end);
        keys
    }

    proptest! {
        /// Whatever is put in is found, newest first; after a crash all that was synced, and what is indexed again.
        #[test]
        fn finds_what_a_list_finds(
            hashes in prop::collection::vec(0u32..20, 1..150),
            batch in 1usize..30,
            synced in 0usize..150,
        ) {
            let (fs, kv) = (MemFs::new(), MemKv::default());
            let all: Vec<KeyEntry> = hashes.iter().zip(1..).map(|(h, i)| entry(i, *h)).collect();
            let keys = open(&fs, &kv, 0, true);
            let mut done = 0;
            for chunk in all.chunks(batch) {
                done += chunk.len();
                keys.stage(&mut chunk.to_vec(), chunk.last().unwrap().log_offset + 1);
                if done % 3 > 0 {
                    keys.write_out(done >= synced && keys.files.lock().synced == 0).unwrap();
                }
            }
            let check = |keys: &KeyIndex, upto: u64| {
                for hash in 0..20 {
                    let want: Vec<u64> = all.iter().rev()
                        .filter(|e| e.hash == hash && e.log_offset < upto).map(|e| e.log_offset).collect();
                    assert_eq!(keys.find(hash, 0, i64::MAX, 1000).unwrap(), want);
                }
            };
            check(&keys, u64::MAX);
            let upto = keys.files.lock().synced;
            drop(keys);
            fs.power_loss(|| false);
            kv.power_loss(|| false);
            let end = all.last().unwrap().log_offset + 1;
            let keys = open(&fs, &kv, end, false);
            prop_assert_eq!(keys.progress(), Some(Progress { at: upto, to: end }));
            keys.files.lock().repair_slots().unwrap();
            check(&keys, upto);
            keys.files.lock().rebuild_to = None;
            let rest: Vec<KeyEntry> = all.iter().copied().filter(|e| e.log_offset >= upto).collect();
            keys.files.lock().write(&rest, end).unwrap();
            check(&keys, u64::MAX);
        }
    }

    #[test]
    fn a_time_range_is_honoured_and_old_files_go() {
        let (fs, kv) = (MemFs::new(), MemKv::default());
        let keys = open(&fs, &kv, 0, true);
        let all: Vec<KeyEntry> = (1..=100).map(|i| entry(i, 3)).collect();
        keys.stage(&mut all.clone(), 10_001);
        keys.write_out(true).unwrap();
        let at = |i: u64| entry(i, 3).stored_ms;
        let found = keys.find(3, at(50), at(52), 100).unwrap();
        assert!(found.contains(&5000) && found.contains(&5200) && found.len() <= 6, "{found:?}");
        assert_eq!(keys.files.lock().files.len(), 3);
        keys.prune(4500).unwrap();
        assert_eq!(keys.find(3, 0, i64::MAX, 1000).unwrap().last(), Some(&4000));
    }
}
