//! The key index: where the messages with a key are, in Apache RocketMQ's IndexFile bytes (storage spec §2.5).
//! Written behind, a batch at a time, at checkpoints; a derived family of its own, because syncing it with every
//! checkpoint would cost more than rebuilding its end in the background after a crash.
//!
//! ```text
//! header 40   begin, end time 8+8 · begin, end log offset 8+8 · slots used 4 · next entry 4 (from 1)
//! slots       4 each: the newest entry of the hash
//! entries     20 each: hash 4 · log offset 8 · seconds since begin time 4 · previous entry of the slot 4
//! ```
//! The hash is |Java hash of `topic#key`|; files are named by their first message's time, `yyyyMMddHHmmssSSS` (UTC).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::codec::{self, Reader};
use model::{hash, message};
use parking_lot::Mutex;

use crate::error::{Result, StoreError};
use crate::fs::{self, File, Fs};
use crate::kv::{Batch, Family, Kv};
use crate::log::LogReader;
use crate::log::record::{self, Record};

const HEADER_BYTES: u64 = 40;
const ENTRY_BYTES: u64 = 20;
const PAGE_BYTES: u64 = 4096;
/// Log that one step of a rebuild reads, bytes.
const REBUILD_BYTES: u64 = 16 << 20;
/// Entries that wait for a rebuild to end; more are read from the log again instead.
pub const WAITING_MAX: usize = 1 << 18;
/// Not the name of a family: those have rows of their own in the same place.
const ROW: &[u8] = b"key index";

/// Sizes of an index file; the default is the reference's.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub slots: u32,
    pub entries: u32,
}

impl Default for Shape {
    fn default() -> Self {
        Self { slots: 5_000_000, entries: 20_000_000 }
    }
}

impl Shape {
    pub fn file_bytes(self) -> u64 {
        self.entry_at(self.entries)
    }

    fn entry_at(self, entry: u32) -> u64 {
        HEADER_BYTES + u64::from(self.slots) * 4 + u64::from(entry) * ENTRY_BYTES
    }
}

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

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub begin_ms: i64,
    pub end_ms: i64,
    pub begin_offset: u64,
    pub end_offset: u64,
    pub slots_used: u32,
    /// The entry that is written next; the first is 1.
    pub next: u32,
}

impl Header {
    pub fn decode(b: &[u8]) -> Option<Self> {
        let at64 = |at| record::get64(b, at);
        let at32 = |at: usize| Some(u32::from_be_bytes(b.get(at..at + 4)?.try_into().ok()?));
        Some(Self {
            begin_ms: at64(0)? as i64,
            end_ms: at64(8)? as i64,
            begin_offset: at64(16)?,
            end_offset: at64(24)?,
            slots_used: at32(32)?,
            next: at32(36)?,
        })
    }

    fn encode(&self) -> [u8; HEADER_BYTES as usize] {
        let mut out = [0; HEADER_BYTES as usize];
        out[..8].copy_from_slice(&self.begin_ms.to_be_bytes());
        out[8..16].copy_from_slice(&self.end_ms.to_be_bytes());
        out[16..24].copy_from_slice(&self.begin_offset.to_be_bytes());
        out[24..32].copy_from_slice(&self.end_offset.to_be_bytes());
        out[32..36].copy_from_slice(&self.slots_used.to_be_bytes());
        out[36..].copy_from_slice(&self.next.to_be_bytes());
        out
    }
}

/// One entry as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredEntry {
    pub hash: u32,
    pub log_offset: u64,
    pub seconds: i32,
    pub previous: u32,
}

pub fn decode_entry(b: &[u8]) -> Option<StoredEntry> {
    let at32 = |at: usize| Some(u32::from_be_bytes(b.get(at..at + 4)?.try_into().ok()?));
    Some(StoredEntry {
        hash: at32(0)?,
        log_offset: record::get64(b, 4)?,
        seconds: at32(12)? as i32,
        previous: at32(16)?,
    })
}

struct Index {
    name: String,
    file: Arc<dyn File>,
    header: Header,
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

impl Index {
    fn append(&mut self, shape: Shape, entries: &[KeyEntry]) -> io::Result<()> {
        let Some((first, last)) = entries.first().zip(entries.last()) else { return Ok(()) };
        let header = &mut self.header;
        if header.next == 1 {
            (header.begin_ms, header.begin_offset) = (first.stored_ms, first.log_offset);
        }
        let slot_of = |e: &KeyEntry| e.hash % shape.slots;
        let mut order: Vec<usize> = (0..entries.len()).collect();
        order.sort_by_key(|i| slot_of(&entries[*i]));
        let mut previous = vec![0u32; entries.len()];
        // Page by page: what one batch puts into a page of slots is one read and one write.
        let page_of = |i: &usize| u64::from(slot_of(&entries[*i])) * 4 / PAGE_BYTES;
        for group in order.chunk_by(|a, b| page_of(a) == page_of(b)) {
            let at = page_of(&group[0]) * PAGE_BYTES;
            let len = PAGE_BYTES.min(u64::from(shape.slots) * 4 - at) as usize;
            let mut page = fs::read_exact_at(&*self.file, len, HEADER_BYTES + at)?;
            for i in group {
                let slot = (u64::from(slot_of(&entries[*i])) * 4 - at) as usize;
                let place = &mut page[slot..slot + 4];
                let own = header.next + *i as u32;
                let old = u32::from_be_bytes([place[0], place[1], place[2], place[3]]);
                previous[*i] = if old < own { old } else { 0 };
                header.slots_used += u32::from(previous[*i] == 0);
                place.copy_from_slice(&own.to_be_bytes());
            }
            self.file.write_at(&page, HEADER_BYTES + at)?;
        }
        let mut bytes = Vec::with_capacity(entries.len() * ENTRY_BYTES as usize);
        for (entry, previous) in entries.iter().zip(previous) {
            let seconds = ((entry.stored_ms - header.begin_ms) / 1000).clamp(0, i64::from(i32::MAX)) as i32;
            bytes.extend_from_slice(&entry.hash.to_be_bytes());
            bytes.extend_from_slice(&entry.log_offset.to_be_bytes());
            bytes.extend_from_slice(&seconds.to_be_bytes());
            bytes.extend_from_slice(&previous.to_be_bytes());
        }
        self.file.write_at(&bytes, shape.entry_at(header.next))?;
        header.next += entries.len() as u32;
        (header.end_ms, header.end_offset) = (last.stored_ms, last.log_offset);
        self.file.write_at(&header.encode(), 0)
    }

    fn repair(&mut self, shape: Shape) -> io::Result<()> {
        let mut slots = vec![0u8; shape.slots as usize * 4];
        let mut used = 0;
        let mut at = 1;
        while at < self.header.next {
            let count = (self.header.next - at).min(1 << 16);
            let bytes = fs::read_exact_at(&*self.file, count as usize * 20, shape.entry_at(at))?;
            for (i, b) in bytes.chunks(ENTRY_BYTES as usize).enumerate() {
                let Some(entry) = decode_entry(b) else { continue };
                let slot = (entry.hash % shape.slots) as usize * 4;
                used += u32::from(slots[slot..slot + 4] == [0; 4]);
                slots[slot..slot + 4].copy_from_slice(&(at + i as u32).to_be_bytes());
                self.header.end_offset = entry.log_offset;
                self.header.end_ms = self.header.begin_ms + i64::from(entry.seconds) * 1000 + 999;
            }
            at += count;
        }
        self.header.slots_used = used;
        self.file.write_at(&slots, HEADER_BYTES)?;
        self.file.write_at(&self.header.encode(), 0)
    }

    fn find(
        &self,
        shape: Shape,
        hash: u32,
        (from_ms, to_ms): (i64, i64),
        max: usize,
        found: &mut Vec<u64>,
    ) -> io::Result<()> {
        let slot = fs::read_exact_at(&*self.file, 4, HEADER_BYTES + u64::from(hash % shape.slots) * 4)?;
        let mut at = u32::from_be_bytes([slot[0], slot[1], slot[2], slot[3]]);
        let mut below = self.header.next;
        // Entries lead to older ones only; one that does not is damage, and ends the chain.
        while at > 0 && at < below && found.len() < max {
            let bytes = fs::read_exact_at(&*self.file, ENTRY_BYTES as usize, shape.entry_at(at))?;
            let Some(entry) = decode_entry(&bytes) else { break };
            let ms = self.header.begin_ms + i64::from(entry.seconds) * 1000;
            if ms + 999 < from_ms {
                break;
            }
            if entry.hash == hash && ms <= to_ms {
                found.push(entry.log_offset);
            }
            (below, at) = (at, entry.previous);
        }
        Ok(())
    }
}

fn read_header(file: &dyn File) -> io::Result<Option<Header>> {
    let mut bytes = [0; HEADER_BYTES as usize];
    let n = file.read_at(&mut bytes, 0)?;
    Ok(Header::decode(&bytes[..n]))
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

/// `yyyyMMddHHmmssSSS`, UTC.
fn file_name(ms: i64) -> String {
    let (days, in_day) = (ms.div_euclid(86_400_000), ms.rem_euclid(86_400_000));
    // Days of the civil calendar, counted from 0000-03-01 in eras of 400 years.
    let z = days + 719_468;
    let (era, day) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let d = day - (153 * month + 2) / 5 + 1;
    let m = if month < 10 { month + 3 } else { month - 9 };
    let y = year + era * 400 + i64::from(m <= 2);
    let (h, min, s) = (in_day / 3_600_000, in_day / 60_000 % 60, in_day / 1000 % 60);
    format!("{y:04}{m:02}{d:02}{h:02}{min:02}{s:02}{:03}", in_day % 1000)
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
