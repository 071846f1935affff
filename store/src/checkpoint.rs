//! Persisting derived state. A checkpoint is taken by the writer at a log offset and written by another thread
//! only after the log is flushed up to there: a persistent family never covers more than what is flushed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Result, StoreError};
use crate::fs::Fs;
use crate::keys::KeyIndex;
use crate::kv::{Batch, Family, Kv};
use crate::log::Syncer;
use crate::queue::Unsynced;

/// The families that are functions of the log, each with the offset it covers.
const DERIVED: [Family; 5] =
    [Family::Topics, Family::Groups, Family::Keys, Family::Offsets, Family::InFlight];
const QUEUES: &[u8] = b"queues";
/// Files synced by name; of more than that the whole file system is.
const SYNC_ONE_BY_ONE_MAX: usize = if cfg!(test) { 2 } else { 64 };
/// The offset of the log's end at a clean stop.
const CLEAN: &[u8] = b"clean";

/// Derived state as of `covered`, ready to be written.
pub struct Checkpoint {
    pub(crate) covered: u64,
    pub(crate) batch: Batch,
    pub(crate) unsynced: Unsynced,
    pub(crate) clean: bool,
    pub(crate) keys: Arc<KeyIndex>,
    pub(crate) sync_keys: bool,
    /// The data folder.
    pub(crate) dir: PathBuf,
}

/// The offset that all derived state covers, and whether the store was stopped cleanly there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Covered {
    pub offset: u64,
    pub clean: bool,
}

/// A checkpoint that could not be written.
pub struct Failed {
    pub error: StoreError,
    pub(crate) checkpoint: Checkpoint,
}

/// The offset that is covered now, or the checkpoint back.
pub type Outcome = std::result::Result<u64, Box<Failed>>;

impl Checkpoint {
    /// Runs on any thread. Gives the checkpoint back if it failed, so that its rows go into the next one.
    pub fn write(self, syncer: &Syncer, fs: &dyn Fs, kv: &dyn Kv) -> Outcome {
        match self.try_write(syncer, fs, kv) {
            Ok(()) => Ok(self.covered),
            Err(error) => Err(Box::new(Failed { error, checkpoint: self })),
        }
    }

    fn try_write(&self, syncer: &Syncer, fs: &dyn Fs, kv: &dyn Kv) -> Result<()> {
        while syncer.flushed() < self.covered {
            syncer.sync()?;
        }
        if self.unsynced.files.len() > SYNC_ONE_BY_ONE_MAX {
            fs.sync_all(&self.dir).map_err(|e| StoreError::io("synced", &self.dir, e))?;
        } else {
            for path in &self.unsynced.files {
                gone_is_fine(fs.open(path, false).and_then(|file| file.sync()), path)?;
            }
            for dir in &self.unsynced.dirs {
                gone_is_fine(fs.sync_dir(dir), dir)?;
            }
        }
        // The key index has its own mark of how far it goes: it may lag, it must not hold up the rest.
        if let Err(error) = self.keys.write_out(self.sync_keys) {
            tracing::error!(%error, "the key index could not be written; the next start makes it again");
        }
        let mut batch = self.batch.clone();
        let covered = self.covered.to_be_bytes();
        DERIVED.iter().for_each(|f| batch.put(Family::Covered, f.name(), covered));
        batch.put(Family::Covered, QUEUES, covered);
        if self.clean {
            batch.put(Family::Covered, CLEAN, covered);
        }
        kv.write(batch, true)
    }
}

/// A file that was deleted with its topic meanwhile needs no sync.
fn gone_is_fine(synced: std::io::Result<()>, path: &Path) -> Result<()> {
    match synced {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|e| StoreError::io("synced", path, e)),
    }
}

/// Reads what is covered, and takes the mark of a clean stop away: from now on the store is in use.
pub(crate) fn load_covered(kv: &Arc<dyn Kv>) -> Result<Covered> {
    let offset = |key: &[u8]| -> Result<Option<u64>> {
        Ok(kv.get(Family::Covered, key)?.and_then(|v| v.try_into().ok()).map(u64::from_be_bytes))
    };
    let mut covered = offset(QUEUES)?.unwrap_or(0);
    for family in DERIVED {
        covered = covered.min(offset(family.name().as_bytes())?.unwrap_or(0));
    }
    let clean = offset(CLEAN)? == Some(covered);
    let mut batch = Batch::default();
    batch.delete(Family::Covered, CLEAN);
    kv.write(batch, true)?;
    Ok(Covered { offset: covered, clean })
}
