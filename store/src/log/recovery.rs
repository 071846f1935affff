//! Reading the log from an offset to its end, and deciding where it ends.
//!
//! Below the recorded flushed offset everything was on the disk once: a record that cannot be read there is
//! damage; it is skipped, counted and reported. Above it, the first record that cannot be read is the torn tail
//! of a crash: the log is cut exactly there.

use bytes::Bytes;

use super::record::{self, Check, Record, RecordError};
use super::{Log, segment_path};
use crate::error::{Result, StoreError};
use crate::fs;

const WINDOW_BYTES: usize = 4 << 20;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScanEnd {
    /// The log ends here.
    pub end: u64,
    /// Bytes after it that were thrown away (a torn tail).
    pub torn: bool,
    /// Offsets of damaged places below the flushed offset.
    pub damaged: Vec<u64>,
}

/// Walks the log's records in order.
pub struct Scan<'a> {
    log: &'a Log,
    at: u64,
    window: Bytes,
    window_at: u64,
    damaged: Vec<u64>,
}

impl<'a> Scan<'a> {
    pub fn new(log: &'a Log, from: u64) -> Self {
        let at = from.max(log.start());
        Self { log, at, window: Bytes::new(), window_at: at, damaged: Vec::new() }
    }

    /// The next record, or nothing at the end of the log.
    pub fn next_record(&mut self) -> Result<Option<Record>> {
        let segment_bytes = self.log.shared.segment_bytes;
        loop {
            let base = self.at - self.at % segment_bytes;
            if !self.log.shared.segments.read().contains_key(&base) {
                return Ok(None);
            }
            if base + segment_bytes - self.at < record::BLANK_BYTES {
                self.at = base + segment_bytes;
                continue;
            }
            match self.decode_at(self.at)? {
                Ok(record) => {
                    self.at += u64::from(record.size);
                    return Ok(Some(record));
                }
                Err(RecordError::Blank) => self.at = base + segment_bytes,
                Err(_) if self.at < self.log.flushed() => self.skip_damage(base + segment_bytes)?,
                Err(_) => return Ok(None),
            }
        }
    }

    /// Steps over bytes that were a record once, to the next place where one begins.
    fn skip_damage(&mut self, segment_end: u64) -> Result<()> {
        self.damaged.push(self.at);
        tracing::error!(offset = self.at, "damaged record below the flushed offset: skipped");
        let limit = segment_end.min(self.log.flushed());
        let mut at = self.at + 1;
        while at + record::BLANK_BYTES < limit {
            let head = self.peek(at, 36)?;
            let is_start = match record::peek(&head) {
                Ok(_) => record::get64(&head, record::PHYSICAL_OFFSET_AT) == Some(at),
                Err(RecordError::Blank) => {
                    u64::from(u32::from_be_bytes([head[0], head[1], head[2], head[3]])) == segment_end - at
                }
                Err(_) => false,
            };
            if is_start
                && !matches!(self.decode_at(at)?, Err(RecordError::NotARecord | RecordError::Checksum))
            {
                break;
            }
            at += 1;
        }
        // Nothing readable before the flushed offset: go on from there (the next file, or the tail).
        self.at = if at + record::BLANK_BYTES < limit { at } else { limit.max(self.at + 1) };
        Ok(())
    }

    fn decode_at(&mut self, at: u64) -> Result<std::result::Result<Record, RecordError>> {
        let head = self.peek(at, 8)?;
        let size = match record::peek(&head) {
            Ok(size) => size,
            Err(e) => return Ok(Err(e)),
        };
        let data = self.peek(at, size as usize)?;
        Ok(record::decode(&data, at, Check::Whole))
    }

    /// Up to `len` bytes at an offset; never past the end of its file.
    fn peek(&mut self, at: u64, len: usize) -> Result<Bytes> {
        let segment_bytes = self.log.shared.segment_bytes;
        let base = at - at % segment_bytes;
        let len = len.min((base + segment_bytes - at) as usize);
        let inside = at >= self.window_at && at + len as u64 <= self.window_at + self.window.len() as u64;
        if !inside {
            let want = len.max(WINDOW_BYTES).min((base + segment_bytes - at) as usize);
            let segment = self.log.shared.segments.read().get(&base).cloned();
            let segment = segment.ok_or_else(|| StoreError::Damaged {
                path: segment_path(&self.log.shared.dir, base),
                what: "the file is missing".into(),
            })?;
            let read = fs::read_exact_at(&*segment.file, want, at - base);
            let path = || segment_path(&self.log.shared.dir, base);
            self.window = Bytes::from(read.map_err(|e| StoreError::io("read", path(), e))?);
            self.window_at = at;
        }
        let from = (at - self.window_at) as usize;
        Ok(self.window.slice(from..from + len))
    }

    pub fn finish(self) -> ScanEnd {
        ScanEnd { end: self.at, torn: false, damaged: self.damaged }
    }
}

impl Log {
    /// Ends the log at `end`: whatever stands after it is wiped, so that no later recovery can take it for records.
    pub fn cut(&mut self, end: u64) -> Result<bool> {
        let segment_bytes = self.shared.segment_bytes;
        let mut segments = self.shared.segments.write();
        let mut torn = false;
        for (base, segment) in segments.range(end.saturating_sub(segment_bytes - 1)..) {
            let at = end.saturating_sub(*base);
            let path = segment_path(&self.shared.dir, *base);
            let failed = |e| StoreError::io("cut", &path, e);
            if at >= segment_bytes {
                continue;
            }
            let next = (segment_bytes - at).min(WINDOW_BYTES as u64) as usize;
            torn |= fs::read_exact_at(&*segment.file, next, at).map_err(failed)?.iter().any(|b| *b != 0);
            segment.file.set_len(at).map_err(failed)?;
            segment.file.set_len(segment_bytes).map_err(failed)?;
            segment.file.sync().map_err(failed)?;
        }
        let last = end - end % segment_bytes;
        let later: Vec<u64> = segments.range(last + 1..).map(|(base, _)| *base).collect();
        for base in later {
            segments.remove(&base);
            let path = segment_path(&self.shared.dir, base);
            self.shared.fs.remove_file(&path).map_err(|e| StoreError::io("removed", &path, e))?;
        }
        // What is left was read just now, but perhaps only from the page cache.
        for segment in segments.range(last..).map(|(_, s)| s) {
            let path = segment_path(&self.shared.dir, segment.base);
            segment.file.sync().map_err(|e| StoreError::io("synced", &path, e))?;
        }
        drop(segments);
        self.shared.end.store(end, std::sync::atomic::Ordering::Release);
        self.shared.opened_at.store(end, std::sync::atomic::Ordering::Release);
        let unflushed = (self.flushed() / segment_bytes) * segment_bytes;
        self.shared
            .dirty
            .lock()
            .extend(self.shared.segments.read().range(unflushed..).map(|(base, _)| *base));
        self.allocated = end;
        Ok(torn)
    }
}
