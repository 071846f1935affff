//! Making the indexes again from the log: for a folder whose queue or index files are damaged.

use model::Topic;
use model::name::CHANGES_TOPIC;

use super::Engine;
use crate::change;
use crate::checkpoint;
use crate::error::Result;
use crate::kv::Batch;
use crate::queue::{BUFFERED_MAX, Entry, QueueIndex};

/// Log read in one step, bytes.
const STEP_BYTES: u64 = 64 << 20;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repaired {
    pub records: u64,
    pub queues: u64,
}

impl Engine {
    /// Throws queues and keys away and makes queues from the log; keys follow at the next start. Topics, groups and
    /// positions stay. Nothing may be staged; to be followed by [`Engine::close`].
    pub fn rebuild_indexes(&mut self, mut progress: impl FnMut(u64)) -> Result<Repaired> {
        let mut before = Vec::new();
        for topic in self.index.topics() {
            for queue in self.index.queues(&topic) {
                before.push((topic.clone(), queue, self.index.bounds(&topic, queue).max));
            }
            self.index.delete(&topic);
        }
        self.spill()?;
        checkpoint::forget_queues(&*self.kv)?;
        let mut repaired = Repaired::default();
        let (mut at, end, reader) = (self.log.start(), self.log.end(), self.reader.clone());
        while at < end {
            let mut failed = Ok(());
            let next = reader.walk(at, end, STEP_BYTES, |r| {
                repaired.records += 1;
                if failed.is_ok() {
                    failed = self.index_again(r);
                }
            })?;
            failed?;
            progress(next - at);
            at = next;
        }
        for (topic, queue, max) in before {
            repaired.queues += 1;
            // A queue whose last messages are gone still goes on where it stood.
            if self.index.bounds(&topic, queue).max < max {
                self.index.append(&topic, queue, max - 1, Entry::HOLE);
            }
        }
        self.keys.forget()?;
        Ok(repaired)
    }

    fn index_again(&mut self, r: &crate::log::record::Record) -> Result<()> {
        self.index_record(&Topic::stored(&r.topic), r);
        if *r.topic == *CHANGES_TOPIC {
            for change in change::decode(&r.body).unwrap_or_default() {
                self.apply_to_index(&change);
            }
        }
        if self.index.buffered() > BUFFERED_MAX {
            self.spill()?;
        }
        Ok(())
    }

    /// Writes queues as far as they are made. They count once a checkpoint is written.
    fn spill(&mut self) -> Result<()> {
        let mut batch = Batch::default();
        let taken = self.index.take(&mut batch)?;
        let written = taken.write().and_then(|()| self.kv.write(&batch, false));
        match written {
            Ok(()) => self.index.written(taken),
            Err(_) => self.index.give_back(taken, &batch),
        }
        written
    }
}
