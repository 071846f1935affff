//! The CommitLog: files of one length, named by the 20-digit offset of their first byte. The only truth.
//!
//! One writer appends ([`Log`]); any number of threads read ([`LogReader`]) and one syncs ([`Syncer`]), so that
//! appends go on while a sync runs. A failed write or sync poisons all three: nothing is acknowledged after it.

pub mod map;
pub mod record;
mod recovery;
pub mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};

use self::map::Map;
use self::record::{Check, Record, RecordError};
pub use self::recovery::{Scan, ScanEnd};
use crate::error::{Result, StoreError};
use crate::fs::{self, File, Fs};

pub(crate) struct Segment {
    base: u64,
    file: Arc<dyn File>,
    map: OnceLock<Option<Map>>,
}

impl Segment {
    fn map(&self) -> Option<&Map> {
        self.map.get_or_init(|| self.file.map().unwrap_or(None)).as_ref()
    }
}

/// Keeps a segment, and with it its map, alive while a reader holds bytes of it.
struct Slice {
    segment: Arc<Segment>,
    from: usize,
    to: usize,
}

impl AsRef<[u8]> for Slice {
    fn as_ref(&self) -> &[u8] {
        self.segment.map().map_or(&[], |m| &m[self.from..self.to])
    }
}

/// What writer, readers and syncer share.
struct Shared {
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    segment_bytes: u64,
    segments: RwLock<BTreeMap<u64, Arc<Segment>>>,
    /// Bases of the files written to since their last sync.
    dirty: Mutex<BTreeSet<u64>>,
    /// Held while syncing.
    syncing: Mutex<()>,
    end: AtomicU64,
    /// What lies below came from another broker's log: its records may lack the whole-record checksum.
    imported: u64,
    /// What lies below was written by an earlier process: reading it verifies it.
    opened_at: AtomicU64,
    flushed: AtomicU64,
    poisoned: AtomicBool,
    cause: Mutex<Option<StoreError>>,
    /// Remembers how far the log was synced; read by recovery.
    flushed_file: Arc<dyn File>,
}

impl Shared {
    fn check(&self) -> Result<()> {
        if !self.poisoned.load(Ordering::Acquire) {
            return Ok(());
        }
        let unknown = || StoreError::Poisoned {
            operation: "write",
            source: Arc::new(io::Error::other("the store was stopped")),
        };
        Err(self.cause.lock().clone().unwrap_or_else(unknown))
    }

    fn poison(&self, operation: &'static str, source: io::Error) -> StoreError {
        let error = StoreError::Poisoned { operation, source: Arc::new(source) };
        self.cause.lock().get_or_insert_with(|| error.clone());
        self.poisoned.store(true, Ordering::Release);
        tracing::error!(%error, "the store acknowledges nothing any more");
        error
    }

    /// How a record of an earlier process is verified.
    fn check_at(&self, offset: u64) -> Check {
        if offset < self.imported { Check::WholeOrBody } else { Check::Whole }
    }

    fn segment(&self, offset: u64) -> Option<Arc<Segment>> {
        let segments = self.segments.read();
        let (base, segment) = segments.range(..=offset).next_back()?;
        (offset < base + self.segment_bytes).then(|| segment.clone())
    }
}

/// The file of a log offset.
pub fn segment_path(dir: &Path, base: u64) -> PathBuf {
    dir.join(format!("{base:020}"))
}

/// Bytes that are to be appended as one group; already at their final offsets.
pub struct Group {
    start: u64,
    at: u64,
    segment_bytes: u64,
    /// One part a file.
    parts: Vec<(u64, Vec<u8>)>,
    /// The buffer of an earlier group, to be used again.
    spare: Vec<u8>,
}

impl Group {
    /// Where a record of `size` bytes will stand. Rolls to the next file if it does not fit this one.
    pub fn place(&mut self, size: usize) -> u64 {
        let used = self.at % self.segment_bytes;
        let left = self.segment_bytes - used;
        if size as u64 + record::BLANK_BYTES > left {
            let base = self.at - used;
            record::encode_blank(self.part(base), left);
            self.at = base + self.segment_bytes;
        }
        self.at
    }

    /// The buffer to append `size` bytes to, after [`Group::place`].
    pub fn buffer(&mut self, size: usize) -> &mut Vec<u8> {
        let base = self.at - self.at % self.segment_bytes;
        self.at += size as u64;
        self.part(base)
    }

    fn part(&mut self, base: u64) -> &mut Vec<u8> {
        if self.parts.last().is_none_or(|(b, _)| *b != base) {
            self.parts.push((base, std::mem::take(&mut self.spare)));
        }
        &mut self.parts.last_mut().expect("pushed above").1
    }

    pub fn is_empty(&self) -> bool {
        self.at == self.start
    }

    pub fn bytes(&self) -> u64 {
        self.at - self.start
    }
}

/// How much of the disk the next records may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// Messages: must leave the reserve untouched.
    Messages,
    /// Acknowledgements and offsets: may use the reserve.
    Reserve,
}

/// The one appender.
pub struct Log {
    shared: Arc<Shared>,
    /// Room on the disk is reserved up to here.
    allocated: u64,
    chunk_bytes: u64,
    reserve_bytes: u64,
    spare: Vec<u8>,
}

/// A group's buffer up to this size is kept for the next one.
const SPARE_MAX_BYTES: usize = 1 << 20;

/// The sizes of a new log; the defaults are the reference's.
#[derive(Clone, Copy, Debug)]
pub struct LogOptions {
    pub segment_bytes: u64,
    /// Disk is reserved in steps of this.
    pub chunk_bytes: u64,
    /// Kept free for acknowledgements when the disk is full.
    pub reserve_bytes: u64,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { segment_bytes: 1 << 30, chunk_bytes: 64 << 20, reserve_bytes: 16 << 20 }
    }
}

impl Log {
    pub fn open(fs: Arc<dyn Fs>, dir: &Path, mut options: LogOptions) -> Result<Self> {
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |e| StoreError::io(operation, path, e)
        };
        fs.create_dir(dir).map_err(failed("created", dir))?;
        let mut segments = BTreeMap::new();
        let mut found = Vec::new();
        for name in fs.list(dir).map_err(failed("listed", dir))? {
            let Ok(base) = name.parse::<u64>() else { continue };
            let path = segment_path(dir, base);
            let file = fs.open(&path, false).map_err(failed("opened", &path))?;
            let len = file.len().map_err(failed("read", &path))?;
            found.push((base, path, file, len));
        }
        // A folder keeps the size it was begun with; the configured one is for new folders.
        if let Some((.., len)) = found.iter().find(|(.., len)| *len > 0) {
            options.segment_bytes = *len;
        }
        for (base, path, file, len) in found {
            if base % options.segment_bytes != 0 || (len != options.segment_bytes && len != 0) {
                let what = format!("{len} bytes long; the log files here have {}", options.segment_bytes);
                return Err(StoreError::Damaged { path, what });
            }
            // Created, but killed before it got its length.
            if len == 0 {
                file.set_len(options.segment_bytes).map_err(failed("extended", &path))?;
            }
            segments.insert(base, Arc::new(Segment { base, file, map: OnceLock::new() }));
        }
        let gap =
            segments.keys().zip(segments.keys().skip(1)).find(|(a, b)| *a + options.segment_bytes != **b);
        if let Some((base, _)) = gap {
            let path = segment_path(dir, base + options.segment_bytes);
            return Err(StoreError::Damaged {
                path,
                what: "the file is missing; restore it, or the log after it is lost".into(),
            });
        }
        let flushed_path = dir.with_file_name(FLUSHED_FILE);
        let flushed_file = fs.open(&flushed_path, true).map_err(failed("opened", &flushed_path))?;
        let flushed = decode_mark(&*flushed_file, FLUSHED_MAGIC).map_err(failed("read", &flushed_path))?;
        let imported_path = dir.with_file_name(IMPORTED_FILE);
        let imported =
            read_mark(&*fs, &imported_path, IMPORTED_MAGIC).map_err(failed("read", &imported_path))?;
        let end = segments.keys().next().copied().unwrap_or(0);
        let shared = Shared {
            fs,
            dir: dir.into(),
            segment_bytes: options.segment_bytes,
            segments: RwLock::new(segments),
            dirty: Mutex::default(),
            syncing: Mutex::default(),
            end: AtomicU64::new(end),
            imported,
            opened_at: AtomicU64::new(u64::MAX),
            flushed: AtomicU64::new(flushed),
            poisoned: AtomicBool::new(false),
            cause: Mutex::default(),
            flushed_file,
        };
        Ok(Self {
            shared: Arc::new(shared),
            allocated: end,
            chunk_bytes: options.chunk_bytes.min(options.segment_bytes),
            reserve_bytes: options.reserve_bytes.min(options.segment_bytes / 4),
            spare: Vec::new(),
        })
    }

    pub fn start(&self) -> u64 {
        self.shared.segments.read().keys().next().copied().unwrap_or(0)
    }

    pub fn segment_bytes(&self) -> u64 {
        self.shared.segment_bytes
    }

    /// Where the second file begins: the first may go if there is one.
    pub fn second(&self) -> Option<u64> {
        self.shared.segments.read().keys().nth(1).copied()
    }

    /// Takes the first file out of the log, unless it is the last; its path. Readers that hold bytes of it keep them.
    pub fn retire_first(&mut self) -> Option<PathBuf> {
        self.second()?;
        let (base, _) = self.shared.segments.write().pop_first()?;
        Some(segment_path(&self.shared.dir, base))
    }

    pub fn end(&self) -> u64 {
        self.shared.end.load(Ordering::Acquire)
    }

    pub fn flushed(&self) -> u64 {
        self.shared.flushed.load(Ordering::Acquire)
    }

    pub fn reader(&self) -> LogReader {
        LogReader(self.shared.clone())
    }

    pub fn syncer(&self) -> Syncer {
        Syncer(self.shared.clone())
    }

    /// An error if the store has stopped.
    pub fn check(&self) -> Result<()> {
        self.shared.check()
    }

    pub fn group(&mut self) -> Group {
        let (end, segment_bytes) = (self.end(), self.shared.segment_bytes);
        let spare = std::mem::take(&mut self.spare);
        Group { start: end, at: end, segment_bytes, parts: Vec::new(), spare }
    }

    /// Reserves room for `bytes` more bytes, or says that the disk is full. Nothing is written.
    pub fn make_room(&mut self, bytes: u64, room: Room) -> Result<()> {
        self.check()?;
        let keep = if room == Room::Messages { self.reserve_bytes } else { 0 };
        let need = self.end() + bytes + record::BLANK_BYTES;
        if need + keep <= self.allocated {
            return Ok(());
        }
        match self.allocate_to(need + keep) {
            Ok(()) => Ok(()),
            Err(StoreError::DiskFull { .. }) if need + keep <= self.allocated => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn allocate_to(&mut self, target: u64) -> Result<()> {
        while self.allocated < target {
            let base = self.allocated - self.allocated % self.shared.segment_bytes;
            let segment = self.segment_for_append(base)?;
            let at = self.allocated - base;
            let len = self.chunk_bytes.min(self.shared.segment_bytes - at);
            let path = segment_path(&self.shared.dir, base);
            segment.file.allocate(at, len).map_err(|e| StoreError::io("extended", path, e))?;
            self.allocated += len;
        }
        Ok(())
    }

    fn segment_for_append(&self, base: u64) -> Result<Arc<Segment>> {
        if let Some(segment) = self.shared.segments.read().get(&base) {
            return Ok(segment.clone());
        }
        let path = segment_path(&self.shared.dir, base);
        let make = || {
            let file = self.shared.fs.open(&path, true)?;
            file.set_len(self.shared.segment_bytes)?;
            self.shared.fs.sync_dir(&self.shared.dir)?;
            Ok(Arc::new(Segment { base, file, map: OnceLock::new() }))
        };
        let segment: Arc<Segment> = make().map_err(|e| StoreError::io("created", &path, e))?;
        self.shared.segments.write().insert(base, segment.clone());
        Ok(segment)
    }

    /// Writes the group at the end of the log. Room must have been made for it.
    pub fn append(&mut self, mut group: Group) -> Result<u64> {
        self.check()?;
        debug_assert_eq!(group.start, self.end());
        let mut from = group.start;
        for (base, bytes) in &group.parts {
            let segment = self.segment_for_append(*base)?;
            self.shared.dirty.lock().insert(*base);
            // Room was reserved, so that not even a full disk is an excuse.
            segment.file.write_at(bytes, from - base).map_err(|e| self.shared.poison("write", e))?;
            from = base + self.shared.segment_bytes;
        }
        self.shared.end.store(group.at, Ordering::Release);
        if let Some((_, mut buffer)) = group.parts.pop().filter(|(_, b)| b.capacity() <= SPARE_MAX_BYTES) {
            buffer.clear();
            self.spare = buffer;
        }
        Ok(group.at)
    }
}

/// Reads records; cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct LogReader(Arc<Shared>);

impl LogReader {
    pub fn end(&self) -> u64 {
        self.0.end.load(Ordering::Acquire)
    }

    /// True if the record is in one of the two newest files: reading it does not block on a cold disk, as a rule.
    pub fn is_hot(&self, offset: u64) -> bool {
        offset + 2 * self.0.segment_bytes > self.end()
    }

    /// Hot records are handed out without a copy, cold ones are read. What this process did not write itself is
    /// verified.
    pub fn read(&self, offset: u64, size: u32) -> std::result::Result<Record, RecordError> {
        let hot = self.is_hot(offset);
        let data = self.bytes(offset, size as usize, hot).map_err(|_| RecordError::NotARecord)?;
        let own = offset >= self.0.opened_at.load(Ordering::Relaxed);
        record::decode(&data, offset, if own { Check::Shape } else { self.0.check_at(offset) })
    }

    /// The properties of a record, without verifying it: whoever delivers it does that.
    pub fn properties(&self, offset: u64, size: u32) -> std::result::Result<Bytes, RecordError> {
        let data =
            self.bytes(offset, size as usize, self.is_hot(offset)).map_err(|_| RecordError::NotARecord)?;
        record::properties(&data).ok_or(RecordError::NotARecord)
    }

    /// Reads the record at an offset, whatever its size.
    pub fn read_at(&self, offset: u64) -> std::result::Result<Record, RecordError> {
        let head = self.bytes(offset, record::BLANK_BYTES as usize, false);
        let size = record::peek(&head.map_err(|_| RecordError::NotARecord)?)?;
        self.read(offset, size)
    }

    /// Reads records from `from` on, until `to` or until `budget` bytes have been read; where to go on. Damage is
    /// stepped over.
    pub fn walk(&self, from: u64, to: u64, budget: u64, mut each: impl FnMut(&Record)) -> Result<u64> {
        let mut at = from.max(self.0.segments.read().keys().next().copied().unwrap_or(0));
        let stop = to.min(from.saturating_add(budget)).min(self.end());
        while at < stop {
            let Some(segment) = self.0.segment(at) else { return Ok(to) };
            let end = segment.base + self.0.segment_bytes;
            let mut walk = walk::Walk::new(segment.file.clone(), segment.base, self.0.segment_bytes);
            let failed = |e| StoreError::io("read", segment_path(&self.0.dir, segment.base), e);
            while at < stop.min(end) {
                match walk.step(at, self.0.check_at(at)).map_err(failed)? {
                    walk::Step::Record(r) => {
                        each(&r);
                        at += u64::from(r.size);
                    }
                    walk::Step::Damage { to, .. } => at = to,
                    walk::Step::End { .. } => at = end,
                }
            }
        }
        Ok(at.min(to.max(from)))
    }

    fn bytes(&self, offset: u64, len: usize, mapped: bool) -> io::Result<Bytes> {
        let segment = self.0.segment(offset).ok_or(io::ErrorKind::NotFound)?;
        let at = offset - segment.base;
        if offset + len as u64 > self.end() || at + len as u64 > self.0.segment_bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if mapped && segment.map().is_some() {
            let slice = Slice { from: at as usize, to: at as usize + len, segment };
            return Ok(Bytes::from_owner(slice));
        }
        fs::read_exact_at(&*segment.file, len, at).map(Bytes::from)
    }
}

/// Makes what was appended durable. Runs on a thread of its own.
#[derive(Clone)]
pub struct Syncer(Arc<Shared>);

impl Syncer {
    pub fn flushed(&self) -> u64 {
        self.0.flushed.load(Ordering::Acquire)
    }

    /// Syncs everything appended before the call; returns the offset below which all is durable.
    pub fn sync(&self) -> Result<u64> {
        // One at a time: whoever finds nothing left to sync must know that it is synced, not that another is at it.
        let _one = self.0.syncing.lock();
        self.0.check()?;
        let end = self.0.end.load(Ordering::Acquire);
        if end == self.flushed() {
            return Ok(end);
        }
        let bases = std::mem::take(&mut *self.0.dirty.lock());
        for base in bases {
            let Some(segment) = self.0.segments.read().get(&base).cloned() else { continue };
            segment.file.sync().map_err(|e| self.0.poison("sync", e))?;
        }
        self.0.flushed.store(end, Ordering::Release);
        // Only a hint for recovery, so it is not synced itself: what it says is true whenever it is read.
        let _ = self.0.flushed_file.write_at(&encode_mark(FLUSHED_MAGIC, end), 0);
        Ok(end)
    }
}

/// Beside the log folder: how far it was synced, and how far it came from another broker.
pub const FLUSHED_FILE: &str = "flushed";
pub const IMPORTED_FILE: &str = "imported";
const FLUSHED_MAGIC: &[u8; 4] = b"FMF1";
const IMPORTED_MAGIC: &[u8; 4] = b"FMI1";

/// Magic, offset (8, big-endian), CRC-32 of both (4).
fn encode_mark(magic: &[u8; 4], offset: u64) -> [u8; 16] {
    let mut out = [0; 16];
    out[..4].copy_from_slice(magic);
    out[4..12].copy_from_slice(&offset.to_be_bytes());
    let crc = crc32fast::hash(&out[..12]);
    out[12..].copy_from_slice(&crc.to_be_bytes());
    out
}

fn decode_mark(file: &dyn File, magic: &[u8; 4]) -> io::Result<u64> {
    let mut buf = [0; 16];
    let n = file.read_at(&mut buf, 0)?;
    let offset = record::get64(&buf, 4).unwrap_or(0);
    Ok(if n == 16 && buf == encode_mark(magic, offset) { offset } else { 0 })
}

fn read_mark(fs: &dyn Fs, path: &Path, magic: &[u8; 4]) -> io::Result<u64> {
    match fs.open_read(path) {
        Ok(file) => decode_mark(&*file, magic),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(e) => Err(e),
    }
}

/// How far the log in a data folder is known to be on the disk.
pub fn flushed_of(fs: &dyn Fs, data: &Path) -> io::Result<u64> {
    read_mark(fs, &data.join(FLUSHED_FILE), FLUSHED_MAGIC)
}

/// Up to where the log in a data folder was taken over from another broker.
pub fn imported_of(fs: &dyn Fs, data: &Path) -> io::Result<u64> {
    read_mark(fs, &data.join(IMPORTED_FILE), IMPORTED_MAGIC)
}

/// Marks the log of a data folder that is not open as taken over, and as durable, up to `end`.
pub fn mark_imported(fs: &dyn Fs, data: &Path, end: u64) -> io::Result<()> {
    for (name, magic) in [(IMPORTED_FILE, IMPORTED_MAGIC), (FLUSHED_FILE, FLUSHED_MAGIC)] {
        let file = fs.open(&data.join(name), true)?;
        file.write_at(&encode_mark(magic, end), 0)?;
        file.sync()?;
    }
    fs.sync_dir(data)
}
