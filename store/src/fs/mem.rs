//! A disk in memory that behaves as badly as a real one may: a power loss keeps any subset of the sectors that
//! were not synced, writes and syncs fail on demand, space runs out.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{File, Fs, Space};
use crate::log::map::Map;

const SECTOR: u64 = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The n-th write from now on fails, after writing half of it.
    Write { after: u32 },
    /// The n-th sync from now on fails.
    Sync { after: u32 },
}

#[derive(Default)]
struct Disk {
    files: BTreeMap<PathBuf, Arc<Mutex<Content>>>,
    locks: BTreeSet<PathBuf>,
    fault: Option<Fault>,
    /// Bytes that may still be allocated.
    room: Option<u64>,
    space: Option<Space>,
    on_sync: Option<OnSync>,
}

type OnSync = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct Content {
    now: Vec<u8>,
    durable: Vec<u8>,
    dirty: BTreeSet<u64>,
    /// The name itself survives a power loss.
    linked: bool,
    allocated: u64,
}

#[derive(Clone, Default)]
pub struct MemFs(Arc<Mutex<Disk>>);

impl MemFs {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn inject(&self, fault: Fault) {
        self.0.lock().fault = Some(fault);
    }

    /// Called in every sync of a file before anything is durable: how long a sync takes.
    pub fn on_sync(&self, wait: impl Fn() + Send + Sync + 'static) {
        self.0.lock().on_sync = Some(Arc::new(wait));
    }

    pub fn heal(&self) {
        self.0.lock().fault = None;
    }

    pub fn set_room(&self, bytes: Option<u64>) {
        self.0.lock().room = bytes;
    }

    /// What the disk says of itself.
    pub fn set_space(&self, space: Option<Space>) {
        self.0.lock().space = space;
    }

    /// The machine loses its power: of every sector that was not synced, `keep` decides whether it got to the disk.
    pub fn power_loss(&self, mut keep: impl FnMut() -> bool) {
        let mut disk = self.0.lock();
        disk.fault = None;
        disk.locks.clear();
        disk.files.retain(|_, content| {
            let mut c = content.lock();
            let c = &mut *c;
            let len = c.now.len();
            c.durable.resize(len, 0);
            for sector in std::mem::take(&mut c.dirty) {
                let (from, to) = ((sector * SECTOR) as usize, (((sector + 1) * SECTOR) as usize).min(len));
                if from < to && keep() {
                    c.durable[from..to].copy_from_slice(&c.now[from..to]);
                }
            }
            c.now.clone_from(&c.durable);
            c.linked || keep()
        });
    }

    /// The process is killed: what was written stays, locks go.
    pub fn kill(&self) {
        let mut disk = self.0.lock();
        disk.fault = None;
        disk.locks.clear();
    }

    /// Flips a bit, as a bad disk would.
    pub fn damage(&self, path: &Path, at: u64) {
        if let Some(content) = self.0.lock().files.get(path) {
            let mut c = content.lock();
            if let Some(byte) = c.now.get_mut(at as usize) {
                *byte ^= 0x10;
            }
            if let Some(byte) = c.durable.get_mut(at as usize) {
                *byte ^= 0x10;
            }
        }
    }
}

impl Disk {
    /// Counts a fault down; true when it strikes.
    fn strikes(&mut self, write: bool) -> bool {
        let after = match &mut self.fault {
            Some(Fault::Write { after }) if write => after,
            Some(Fault::Sync { after }) if !write => after,
            _ => return false,
        };
        if *after == 0 {
            return true;
        }
        *after -= 1;
        false
    }
}

impl Fs for MemFs {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn File>> {
        let mut disk = self.0.lock();
        let content = match disk.files.get(path) {
            Some(content) => content.clone(),
            None if create => disk.files.entry(path.into()).or_default().clone(),
            None => return Err(io::ErrorKind::NotFound.into()),
        };
        Ok(Arc::new(MemFile { disk: self.0.clone(), content }))
    }

    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.open(path, false)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let disk = self.0.lock();
        let names: BTreeSet<String> = disk
            .files
            .keys()
            .filter_map(|p| p.strip_prefix(dir).ok()?.iter().next()?.to_str().map(str::to_owned))
            .collect();
        Ok(names.into_iter().collect())
    }

    fn create_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.0.lock().files.remove(path).map(drop).ok_or(io::ErrorKind::NotFound.into())
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.lock().files.retain(|p, _| !p.starts_with(dir));
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        for (path, content) in &self.0.lock().files {
            if path.parent() == Some(dir) {
                content.lock().linked = true;
            }
        }
        Ok(())
    }

    fn sync_all(&self, _dir: &Path) -> io::Result<()> {
        let mut disk = self.0.lock();
        if disk.strikes(false) {
            return Err(io::Error::other("injected sync error"));
        }
        for content in disk.files.values() {
            content.lock().make_durable();
        }
        Ok(())
    }

    fn space(&self, _dir: &Path) -> io::Result<Option<Space>> {
        Ok(self.0.lock().space)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Any + Send + Sync>> {
        if !self.0.lock().locks.insert(path.into()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(Box::new(MemLock { disk: self.0.clone(), path: path.into() }))
    }
}

struct MemLock {
    disk: Arc<Mutex<Disk>>,
    path: PathBuf,
}

impl Drop for MemLock {
    fn drop(&mut self) {
        self.disk.lock().locks.remove(&self.path);
    }
}

struct MemFile {
    disk: Arc<Mutex<Disk>>,
    content: Arc<Mutex<Content>>,
}

impl Content {
    /// Content and name survive a power loss.
    fn make_durable(&mut self) {
        let Content { now, durable, dirty, linked, .. } = self;
        durable.clone_from(now);
        dirty.clear();
        *linked = true;
    }

    fn write(&mut self, buf: &[u8], at: u64) {
        let end = at as usize + buf.len();
        if self.now.len() < end {
            self.now.resize(end, 0);
        }
        self.now[at as usize..end].copy_from_slice(buf);
        if !buf.is_empty() {
            self.dirty.extend(at / SECTOR..=(end as u64 - 1) / SECTOR);
        }
    }
}

impl File for MemFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let c = self.content.lock();
        let from = (at as usize).min(c.now.len());
        let n = buf.len().min(c.now.len() - from);
        buf[..n].copy_from_slice(&c.now[from..from + n]);
        Ok(n)
    }

    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<()> {
        if self.disk.lock().strikes(true) {
            self.content.lock().write(&buf[..buf.len() / 2], at);
            return Err(io::Error::other("injected write error"));
        }
        self.content.lock().write(buf, at);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let slowly = self.disk.lock().on_sync.clone();
        if let Some(wait) = slowly {
            wait();
        }
        if self.disk.lock().strikes(false) {
            return Err(io::Error::other("injected sync error"));
        }
        let mut c = self.content.lock();
        let c = &mut *c;
        c.durable.clone_from(&c.now);
        c.dirty.clear();
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.content.lock().now.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut c = self.content.lock();
        let old = c.now.len() as u64;
        c.now.resize(len as usize, 0);
        c.dirty.extend(old.min(len) / SECTOR..=old.max(len) / SECTOR);
        Ok(())
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        let mut disk = self.disk.lock();
        let mut c = self.content.lock();
        let more = (at + len).saturating_sub(c.allocated);
        if let Some(room) = &mut disk.room {
            *room = room.checked_sub(more).ok_or(io::ErrorKind::StorageFull)?;
        }
        c.allocated += more;
        Ok(())
    }

    fn map(&self) -> io::Result<Option<Map>> {
        Ok(None)
    }
}
