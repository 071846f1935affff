//! Letting go of old messages, and saying no before the disk is full.
//!
//! The oldest log file goes when all of it is older than the retention time, or the log is larger than allowed, or the
//! disk is nearly full; never while it holds something that a group has not consumed, unless the policy says so.
//! Queues, key index and positions follow.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use model::{Timestamp, Topic};

use super::Engine;
use crate::error::Result;
use crate::fs::Space;
use crate::keys::KeyIndex;
use crate::queue::QueueIndex;

/// What is kept, and how full the disk may get.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// Messages older than this may go, ms (the reference's `fileReservedTime`).
    pub age_ms: i64,
    /// Bytes of log that are kept at the most.
    pub max_bytes: u64,
    /// Let go also of what a group has not consumed.
    pub delete_unconsumed: bool,
    /// Used part of the disk from which on the oldest files go whatever their age, if they are consumed.
    pub clean_ratio: f64,
    /// Used part of the disk from which on sends are refused, until it is below `clean_ratio` again.
    pub full_ratio: f64,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            age_ms: 72 * 3_600_000,
            max_bytes: u64::MAX,
            delete_unconsumed: false,
            clean_ratio: 0.85,
            full_ratio: 0.90,
        }
    }
}

/// Files that are no longer part of the store. Removing them takes time: not the writer's.
pub struct Retired {
    pub files: Vec<PathBuf>,
    pub keys: Arc<KeyIndex>,
    pub log_start: u64,
}

/// Where the store stands.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub log_start: u64,
    pub log_end: u64,
    pub log_flushed: u64,
    pub log_covered: u64,
    pub disk: Option<Space>,
    /// Who has not consumed the message at `held_from`, the oldest such one: `group on topic`.
    pub held_by: Option<String>,
    pub held_from: u64,
    pub oldest_ms: i64,
    pub unreadable: u64,
}

impl Engine {
    /// Looks at the disk and lets go of what may go.
    pub fn keep_disk(&mut self, now: Timestamp) -> Result<Option<Retired>> {
        self.disk = self.fs.space(&self.options.dir).unwrap_or(None);
        let policy = self.options.retention;
        let used = self.disk.map_or(0.0, Space::used);
        match self.over_full {
            false if used >= policy.full_ratio => {
                tracing::error!(
                    used_percent = (used * 100.0).round(),
                    "the disk is nearly full: sends are refused"
                );
                self.over_full = true;
            }
            true if used < policy.clean_ratio => {
                tracing::info!("the disk has space again: sends are taken");
                self.over_full = false;
            }
            _ => {}
        }
        self.retire(now, used >= policy.clean_ratio)
    }

    fn retire(&mut self, now: Timestamp, forced: bool) -> Result<Option<Retired>> {
        let policy = self.options.retention;
        let mut held = None;
        let mut files = Vec::new();
        while let Some(next) = self.log.second() {
            let durable = next <= self.covered.min(self.log.flushed());
            // What follows it is no older than its newest message.
            let newest_ms = self.reader.read_at(next).map_or(i64::MAX, |r| r.store_timestamp_ms);
            let expired = now.0.saturating_sub(newest_ms) >= policy.age_ms;
            let too_large = self.log.end() - self.log.start() > policy.max_bytes;
            if !durable || !(expired || too_large || forced) {
                break;
            }
            if !policy.delete_unconsumed {
                let (from, _) = held.get_or_insert_with(|| self.held());
                if *from < next {
                    break;
                }
            }
            if !self.roll(next, now)? {
                break;
            }
            files.extend(self.log.retire_first());
        }
        if files.is_empty() {
            return Ok(None);
        }
        let log_start = self.log.start();
        files.extend(self.index.trim(log_start)?);
        tracing::info!(files = files.len(), log_start, "old messages let go");
        Ok(Some(Retired { files, keys: self.keys.clone(), log_start }))
    }

    /// The oldest log offset that some group has not consumed, and who that is.
    fn held(&self) -> (u64, Option<String>) {
        let mut oldest = (self.log.end(), None);
        let mut consumed = HashSet::new();
        let first = |topic: &Topic, queue, offset| {
            let entries = self.index.read(topic, queue, offset, 1).unwrap_or_default();
            entries.first().filter(|e| !e.is_hole()).map(|e| e.log_offset)
        };
        for (key, lag) in self.pop.positions() {
            consumed.insert(key.topic.clone());
            if let Some(at) = first(&key.topic, key.queue, lag.committed).filter(|at| *at < oldest.0) {
                oldest = (at, Some(format!("{} on {}", key.group, key.topic)));
            }
        }
        // Retries that their group has not looked at yet.
        for topic in self.index.topics().into_iter().filter(|t| t.is_retry() && !consumed.contains(t)) {
            if let Some(at) = first(&topic, 0, 0).filter(|at| *at < oldest.0) {
                oldest = (at, Some(format!("a group that has not looked at {topic}")));
            }
        }
        oldest
    }

    pub fn state(&self) -> State {
        let (held_from, held_by) = self.held();
        let start = self.log.start();
        State {
            log_start: start,
            log_end: self.log.end(),
            log_flushed: self.log.flushed(),
            log_covered: self.covered,
            disk: self.fs.space(&self.options.dir).unwrap_or(None),
            held_by,
            held_from,
            oldest_ms: self.reader.read_at(start).map_or(0, |r| r.store_timestamp_ms),
            unreadable: self.unreadable,
        }
    }
}
