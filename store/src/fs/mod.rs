//! The seam to the file system. [`OsFs`] is the real one; [`MemFs`] loses what was not synced, tears writes
//! and fails on demand. Nothing else in the workspace opens a store's file.

mod mem;
mod os;

use std::any::Any;
use std::io;
use std::path::Path;
use std::sync::Arc;

pub use mem::{Fault, MemFs};
pub use os::OsFs;

use crate::log::map::Map;

/// The disk that a folder is on, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// What is used and what may still be written.
    pub total: u64,
    /// What may still be written.
    pub free: u64,
}

impl Space {
    /// The used part, 0 to 1.
    pub fn used(self) -> f64 {
        if self.total == 0 { 0.0 } else { 1.0 - self.free as f64 / self.total as f64 }
    }
}

pub trait Fs: Send + Sync + 'static {
    /// Opens for reading and writing; makes the file if `create`.
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn File>>;
    /// Opens for reading only: what is not ours is never changed.
    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn File>>;
    /// Names in a folder, sorted; none if there is no such folder.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    fn create_dir(&self, dir: &Path) -> io::Result<()>;
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    fn remove_dir(&self, dir: &Path) -> io::Result<()>;
    /// Makes creations and removals in the folder durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Everything written before, on the file system of the folder.
    fn sync_all(&self, dir: &Path) -> io::Result<()>;
    /// None where there is no such thing as a disk.
    fn space(&self, dir: &Path) -> io::Result<Option<Space>>;
    /// An exclusive lock, held until the value is dropped; `WouldBlock` if another process has it.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Any + Send + Sync>>;
}

#[allow(clippy::len_without_is_empty, reason = "a file that is empty is not a special one")]
pub trait File: Send + Sync + 'static {
    /// Reads up to `buf.len()` bytes; fewer only at the end of the file.
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize>;
    /// Writes all of `buf`.
    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<()>;
    /// What was written before this call survives a power loss once it returns.
    fn sync(&self) -> io::Result<()>;
    fn len(&self) -> io::Result<u64>;
    /// Cuts, or extends with zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Reserves room on the disk, so that writes there cannot find it full. The length stays.
    fn allocate(&self, at: u64, len: u64) -> io::Result<()>;
    /// A read-only map of the whole file, where the file system has such a thing.
    fn map(&self) -> io::Result<Option<Map>>;
}

/// Reads exactly `len` bytes.
pub fn read_exact_at(file: &dyn File, len: usize, at: u64) -> io::Result<Vec<u8>> {
    let mut buf = vec![0; len];
    let mut done = 0;
    while done < len {
        match file.read_at(&mut buf[done..], at + done as u64)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => done += n,
        }
    }
    Ok(buf)
}
