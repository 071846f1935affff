//! Reading the log from an offset to its end, and deciding where it ends.
//!
//! Below the recorded flushed offset everything was on the disk once: a record that cannot be read there is
//! damage; it is skipped, counted and reported. Above it, the first record that cannot be read is the torn tail
//! of a crash: the log is cut exactly there.

use super::record::{self, Record, RecordError};
use super::walk::Walk;
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
    walk: Option<Walk>,
    damaged: Vec<u64>,
}

impl<'a> Scan<'a> {
    pub fn new(log: &'a Log, from: u64) -> Self {
        Self { log, at: from.max(log.start()), walk: None, damaged: Vec::new() }
    }

    /// The next record, or nothing at the end of the log.
    pub fn next_record(&mut self) -> Result<Option<Record>> {
        let segment_bytes = self.log.shared.segment_bytes;
        loop {
            let base = self.at - self.at % segment_bytes;
            let Some(segment) = self.log.shared.segments.read().get(&base).cloned() else { return Ok(None) };
            let end = base + segment_bytes;
            if end - self.at < record::BLANK_BYTES {
                self.at = end;
                continue;
            }
            let walk = match &mut self.walk {
                Some(walk) if walk.end() == end => walk,
                walk => walk.insert(Walk::new(segment.file.clone(), base, segment_bytes)),
            };
            let failed = |e| StoreError::io("read", segment_path(&self.log.shared.dir, base), e);
            let flushed = self.log.flushed();
            match walk.decode_at(self.at, self.log.shared.check_at(self.at)).map_err(failed)? {
                Ok(record) => {
                    self.at += u64::from(record.size);
                    return Ok(Some(record));
                }
                Err(RecordError::Blank) => self.at = end,
                Err(_) if self.at < flushed => {
                    self.damaged.push(self.at);
                    tracing::error!(offset = self.at, "damaged record below the flushed offset: skipped");
                    let limit = end.min(flushed);
                    let next = walk.next_start(self.at, limit, self.log.shared.check_at(self.at));
                    // Nothing readable before the flushed offset: go on from there (the next file, or the tail).
                    self.at = next.map_err(failed)?.unwrap_or(limit.max(self.at + 1));
                }
                Err(_) => return Ok(None),
            }
        }
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
