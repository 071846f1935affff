//! Read-only maps of log files: the one place with `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Deref;

/// A whole file, mapped for reading.
pub struct Map(memmap2::Mmap);

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

pub fn map(file: &File) -> io::Result<Map> {
    // SAFETY: a mapped file is never cut (log files are extended to their full length when made, and only
    // recovery, before any map exists, cuts one). Readers are handed only bytes below the appended end, and
    // those are never written again.
    unsafe { memmap2::Mmap::map(file) }.map(Map)
}
