//! One log file, record by record: finds what can be proved to be a record and steps over what cannot.

use std::io;
use std::sync::Arc;

use bytes::Bytes;

use super::record::{self, Check, Record, RecordError};
use crate::fs::{self, File};

const WINDOW_BYTES: usize = 4 << 20;

/// A log file that is read through a window.
pub struct Walk {
    file: Arc<dyn File>,
    /// Log offset of its first byte, and its length.
    base: u64,
    len: u64,
    window: Bytes,
    window_at: u64,
}

/// What stands at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Record(Record),
    /// Bytes up to `to` that are not, or no longer, records.
    Damage {
        at: u64,
        to: u64,
        error: RecordError,
    },
    /// Nothing was ever written from here on, or the rest is blank.
    End {
        at: u64,
        blank: bool,
    },
}

impl Walk {
    pub fn new(file: Arc<dyn File>, base: u64, len: u64) -> Self {
        Self { file, base, len, window: Bytes::new(), window_at: base }
    }

    pub fn end(&self) -> u64 {
        self.base + self.len
    }

    /// Decodes what stands at a log offset of this file.
    pub fn decode_at(&mut self, at: u64, check: Check) -> io::Result<Result<Record, RecordError>> {
        let head = self.peek(at, 8)?;
        let size = match record::peek(&head) {
            Ok(size) => size,
            Err(e) => return Ok(Err(e)),
        };
        let data = self.peek(at, size as usize)?;
        Ok(record::decode(&data, at, check))
    }

    /// The first place after `at` and below `limit` where a record or the final blank begins.
    pub fn next_start(&mut self, at: u64, limit: u64, check: Check) -> io::Result<Option<u64>> {
        let mut at = at + 1;
        while at + record::BLANK_BYTES < limit {
            let head = self.peek(at, 36)?;
            let is_start = match record::peek(&head) {
                Ok(_) => record::get64(&head, record::PHYSICAL_OFFSET_AT) == Some(at),
                Err(RecordError::Blank) => {
                    u64::from(u32::from_be_bytes([head[0], head[1], head[2], head[3]])) == self.end() - at
                }
                Err(_) => false,
            };
            if is_start
                && !matches!(self.decode_at(at, check)?, Err(RecordError::NotARecord | RecordError::Checksum))
            {
                return Ok(Some(at));
            }
            at += 1;
        }
        Ok(None)
    }

    /// What stands at `at`; for damage, where what is sound goes on.
    pub fn step(&mut self, at: u64, check: Check) -> io::Result<Step> {
        if self.end().saturating_sub(at) < record::BLANK_BYTES {
            return Ok(Step::End { at, blank: true });
        }
        let error = match self.decode_at(at, check)? {
            Ok(record) => return Ok(Step::Record(record)),
            Err(RecordError::Blank) => return Ok(Step::End { at, blank: true }),
            Err(error) => error,
        };
        match self.next_start(at, self.end(), check)? {
            Some(to) => Ok(Step::Damage { at, to, error }),
            None if self.is_zero_from(at)? => Ok(Step::End { at, blank: false }),
            None => Ok(Step::Damage { at, to: self.end(), error }),
        }
    }

    fn is_zero_from(&mut self, mut at: u64) -> io::Result<bool> {
        while at < self.end() {
            let bytes = self.peek(at, WINDOW_BYTES)?;
            if bytes.iter().any(|b| *b != 0) {
                return Ok(false);
            }
            at += bytes.len() as u64;
        }
        Ok(true)
    }

    /// Up to `len` bytes at an offset; never past the end of the file.
    fn peek(&mut self, at: u64, len: usize) -> io::Result<Bytes> {
        let len = len.min((self.end() - at) as usize);
        let inside = at >= self.window_at && at + len as u64 <= self.window_at + self.window.len() as u64;
        if !inside {
            let want = len.max(WINDOW_BYTES).min((self.end() - at) as usize);
            self.window = Bytes::from(fs::read_exact_at(&*self.file, want, at - self.base)?);
            self.window_at = at;
        }
        let from = (at - self.window_at) as usize;
        Ok(self.window.slice(from..from + len))
    }
}
