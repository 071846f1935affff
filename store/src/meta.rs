//! Topics, groups and the replica set's key: what the log's change records say of them.

use std::collections::{BTreeSet, HashMap};

use model::codec::Reader;
use model::{Group, GroupConfig, ReceiptKey, Topic, TopicConfig};

use crate::change::Change;
use crate::error::{Result, StoreError};
use crate::kv::{Batch, Family, Kv};

#[derive(Debug, Default)]
pub struct Meta {
    topics: HashMap<Topic, TopicConfig>,
    groups: HashMap<Group, GroupConfig>,
    key: Option<ReceiptKey>,
    /// Grows with every change while the process lives.
    version: u64,
    dirty_topics: BTreeSet<Topic>,
    dirty_groups: BTreeSet<Group>,
}

const RECEIPT_KEY: &[u8] = b"receipt";

impl Meta {
    pub fn load(kv: &dyn Kv) -> Result<Self> {
        let damaged = |e| StoreError::Kv(format!("a stored row cannot be read: {e}"));
        let mut meta = Self::default();
        for (_, value) in kv.rows(Family::Topics)? {
            let config = TopicConfig::take(&mut Reader::new(&value)).map_err(damaged)?;
            meta.topics.insert(config.topic.clone(), config);
        }
        for (_, value) in kv.rows(Family::Groups)? {
            let config = GroupConfig::take(&mut Reader::new(&value)).map_err(damaged)?;
            meta.groups.insert(config.group.clone(), config);
        }
        let key = kv.get(Family::Keys, RECEIPT_KEY)?;
        meta.key = key.and_then(|k| k.try_into().ok()).map(ReceiptKey);
        Ok(meta)
    }

    pub fn topic(&self, topic: &Topic) -> Option<&TopicConfig> {
        self.topics.get(topic).filter(|t| !t.deleted)
    }

    /// The version that a new record of the topic must have.
    pub fn next_topic_version(&self, topic: &Topic) -> u64 {
        self.topics.get(topic).map_or(0, |t| t.version) + 1
    }

    pub fn group(&self, group: &Group) -> Option<&GroupConfig> {
        self.groups.get(group).filter(|g| !g.deleted)
    }

    /// All records by name, those of deleted topics too.
    pub fn topics(&self) -> Vec<&TopicConfig> {
        let mut all: Vec<_> = self.topics.values().collect();
        all.sort_unstable_by_key(|t| &t.topic);
        all
    }

    /// All records by name, those of deleted groups too.
    pub fn groups(&self) -> Vec<&GroupConfig> {
        let mut all: Vec<_> = self.groups.values().collect();
        all.sort_unstable_by_key(|g| &g.group);
        all
    }

    pub fn key(&self) -> Option<ReceiptKey> {
        self.key
    }

    pub fn version(&self) -> u64 {
        self.version
    }

    /// True if the change says something that is not known yet. A lower version never replaces a higher one.
    pub fn is_news(&self, change: &Change) -> bool {
        match change {
            Change::PutTopic(c) => self.topics.get(&c.topic).is_none_or(|old| old.version < c.version),
            Change::PutGroup(c) => self.groups.get(&c.group).is_none_or(|old| old.version < c.version),
            _ => true,
        }
    }

    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::PutTopic(config) => {
                self.topics.insert(config.topic.clone(), config.clone());
                self.dirty_topics.insert(config.topic.clone());
            }
            Change::PutGroup(config) => {
                self.groups.insert(config.group.clone(), config.clone());
                self.dirty_groups.insert(config.group.clone());
            }
            Change::Key(key) => self.key = Some(*key),
            _ => return,
        }
        self.version += 1;
    }

    /// Puts what changed since the last call into a checkpoint.
    pub fn checkpoint(&mut self, batch: &mut Batch) {
        for topic in std::mem::take(&mut self.dirty_topics) {
            let key = topic.as_str().as_bytes();
            match self.topics.get(&topic) {
                Some(config) => {
                    let mut value = Vec::new();
                    config.put(&mut value);
                    batch.put(Family::Topics, key, value);
                }
                None => batch.delete(Family::Topics, key),
            }
        }
        for group in std::mem::take(&mut self.dirty_groups) {
            let key = group.as_str().as_bytes();
            match self.groups.get(&group) {
                Some(config) => {
                    let mut value = Vec::new();
                    config.put(&mut value);
                    batch.put(Family::Groups, key, value);
                }
                None => batch.delete(Family::Groups, key),
            }
        }
        if let Some(key) = self.key {
            batch.put(Family::Keys, RECEIPT_KEY, key.0);
        }
    }

    /// A checkpoint failed: everything must go into the next one.
    pub fn mark_dirty(&mut self, batch: &Batch) {
        for (family, key, _) in &batch.0 {
            let name = String::from_utf8_lossy(key);
            match family {
                Family::Topics => drop(self.dirty_topics.insert(Topic::stored(&name))),
                Family::Groups => drop(self.dirty_groups.insert(Group::stored(&name))),
                _ => {}
            }
        }
    }
}
