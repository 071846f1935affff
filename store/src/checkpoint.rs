//! Persisting derived state. A checkpoint is taken by the writer at a log offset and written by another thread
//! only after the log is flushed up to there: a persistent family never covers more than what is flushed.

use std::sync::Arc;

use model::Timestamp;

use crate::error::{Result, StoreError};
use crate::keys::KeyIndex;
use crate::kv::{Batch, Family, Kv};
use crate::log::Syncer;
use crate::queue::Taken;

/// The families that are functions of the log, each with the offset it covers.
const DERIVED: [Family; 5] =
    [Family::Topics, Family::Groups, Family::Keys, Family::Offsets, Family::InFlight];
/// The mark of the queues, which are rows since format 2. Without it they are made again from the log.
const QUEUES: &[u8] = b"queue rows";
/// The offset of the log's end at a clean stop.
const CLEAN: &[u8] = b"clean";

/// Where the log ended two checkpoints ago, and when that was said: messages since then are remembered.
const RECENT: &[u8] = b"recent";

pub(crate) fn put_recent(batch: &mut Batch, log_offset: u64, now: Timestamp) {
    let mut row = log_offset.to_be_bytes().to_vec();
    row.extend_from_slice(&now.0.to_be_bytes());
    batch.put(Family::Covered, RECENT, row);
}

pub(crate) fn load_recent(kv: &dyn Kv) -> Result<Option<(u64, Timestamp)>> {
    let number = |bytes: &[u8]| Some(u64::from_be_bytes(bytes.try_into().ok()?));
    Ok(kv.get(Family::Covered, RECENT)?.and_then(|row| {
        let (offset, at) = row.split_at_checked(8)?;
        Some((number(offset)?, Timestamp(number(at)? as i64)))
    }))
}

/// Derived state as of `covered`, ready to be written.
pub struct Checkpoint {
    covered: u64,
    /// With the marks of what it covers.
    pub(crate) batch: Batch,
    pub(crate) queues: Taken,
    keys: Arc<KeyIndex>,
    sync_keys: bool,
}

/// Puts the marks of a checkpoint into its batch.
fn mark(batch: &mut Batch, covered: u64, clean: bool) {
    let covered = covered.to_be_bytes();
    DERIVED.iter().for_each(|f| batch.put(Family::Covered, f.name(), covered));
    batch.put(Family::Covered, QUEUES, covered);
    if clean {
        batch.put(Family::Covered, CLEAN, covered);
    }
}

/// The queues are about to be made again: until a checkpoint is written there are none.
pub(crate) fn forget_queues(kv: &dyn Kv) -> Result<()> {
    let mut batch = Batch::default();
    batch.delete(Family::Covered, QUEUES);
    kv.rows(Family::Queues)?.into_iter().for_each(|(key, _)| batch.delete(Family::Queues, key));
    kv.write(&batch, true)
}

/// The offset that all derived state covers, and whether the store was stopped cleanly there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Covered {
    pub offset: u64,
    pub clean: bool,
    /// The queues have to be made from the log.
    pub queues_missing: bool,
}

/// A checkpoint that could not be written.
pub struct Failed {
    pub error: StoreError,
    pub(crate) checkpoint: Checkpoint,
}

/// The offset that is covered now, or the checkpoint back.
pub type Outcome = std::result::Result<Written, Box<Failed>>;

/// A checkpoint that is durable.
pub struct Written {
    pub(crate) covered: u64,
    pub(crate) queues: Taken,
}

impl Checkpoint {
    pub(crate) fn new(
        (covered, clean): (u64, bool),
        mut batch: Batch,
        queues: Taken,
        (keys, sync_keys): (Arc<KeyIndex>, bool),
    ) -> Self {
        mark(&mut batch, covered, clean);
        Self { covered, batch, queues, keys, sync_keys }
    }

    /// Runs on any thread. Gives the checkpoint back if it failed, so that its rows go into the next one.
    pub fn write(self, syncer: &Syncer, kv: &dyn Kv) -> Outcome {
        match self.try_write(syncer, kv) {
            Ok(()) => Ok(Written { covered: self.covered, queues: self.queues }),
            Err(error) => Err(Box::new(Failed { error, checkpoint: self })),
        }
    }

    fn try_write(&self, syncer: &Syncer, kv: &dyn Kv) -> Result<()> {
        while syncer.flushed() < self.covered {
            syncer.sync()?;
        }
        self.queues.write()?;
        // The key index has its own mark of how far it goes: it may lag, it must not hold up the rest.
        if let Err(error) = self.keys.write_out(self.sync_keys) {
            tracing::error!(%error, "the key index could not be written; it is made again");
        }
        kv.write(&self.batch, true)
    }
}

/// Reads what is covered, and takes the mark of a clean stop away: from now on the store is in use.
pub(crate) fn load_covered(kv: &dyn Kv) -> Result<Covered> {
    let offset = |key: &[u8]| -> Result<Option<u64>> {
        Ok(kv.get(Family::Covered, key)?.and_then(|v| v.try_into().ok()).map(u64::from_be_bytes))
    };
    let mut covered = u64::MAX;
    for family in DERIVED {
        covered = covered.min(offset(family.name().as_bytes())?.unwrap_or(0));
    }
    let queues = offset(QUEUES)?;
    if let Some(queues) = queues {
        covered = covered.min(queues);
    }
    let clean = offset(CLEAN)? == Some(covered);
    let mut batch = Batch::default();
    batch.delete(Family::Covered, CLEAN);
    kv.write(&batch, true)?;
    Ok(Covered { offset: covered, clean, queues_missing: queues.is_none() && covered > 0 })
}
