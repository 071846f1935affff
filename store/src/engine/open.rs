//! Opening a store: its folder is claimed, what its derived state does not cover yet is replayed from the log.

use std::collections::HashMap;
use std::sync::Arc;

use model::message;
use model::name::{CHANGES_TOPIC, HALF_TOPIC, RETRY_PREFIX, TIMER_TOPIC};
use model::{GroupConfig, ReceiptKey, Timestamp, Topic, TopicConfig, hash};

use super::{Engine, Options, Staged, Stored, consume};
use crate::change::{self, Change, Writer};
use crate::checkpoint;
use crate::error::{Result, StoreError};
use crate::fs::Fs;
use crate::keys::KeyIndex;
use crate::kv::Kv;
use crate::log::record::Record;
use crate::log::{Log, Scan};
use crate::meta::Meta;
use crate::pop::Pop;
use crate::queue::{Entry, FileQueues, QueueIndex};
use crate::recent::{self, Fingerprint, Recent};
use crate::timer::{Held, Timers};
use crate::txn::{Decision, Txns};

/// Version of everything under the data folder.
pub const FORMAT: u32 = 3;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    pub covered: u64,
    pub end: u64,
    pub replayed: u64,
    pub torn: bool,
    /// Log offsets of damaged places that were skipped.
    pub damaged: Vec<u64>,
    pub clean: bool,
}

/// Locks the folder and checks its format before anything in it is touched. RocksDB is opened after this.
pub fn claim(fs: &dyn Fs, options: &Options) -> Result<Box<dyn std::any::Any + Send + Sync>> {
    let dir = &options.dir;
    fs.create_dir(dir).map_err(|e| StoreError::io("created", dir, e))?;
    let lock = fs.lock(&dir.join("lock")).map_err(|e| match e.kind() {
        std::io::ErrorKind::WouldBlock => StoreError::Locked { path: dir.clone() },
        _ => StoreError::io("locked", dir.join("lock"), e),
    })?;
    let path = dir.join("format");
    let failed = |operation| {
        let path = path.clone();
        move |e| StoreError::io(operation, path, e)
    };
    let file = fs.open(&path, true).map_err(failed("opened"))?;
    let mut text = [0; 32];
    let n = file.read_at(&mut text, 0).map_err(failed("read"))?;
    if n == 0 {
        let line = format!("ferrymq {FORMAT}\n");
        file.write_at(line.as_bytes(), 0).map_err(failed("written"))?;
        file.sync().map_err(failed("synced"))?;
        fs.sync_dir(dir).map_err(failed("synced"))?;
        return Ok(lock);
    }
    let text = String::from_utf8_lossy(&text[..n]);
    let found = text.trim().strip_prefix("ferrymq ").and_then(|v| v.parse::<u32>().ok());
    match found {
        Some(found) if found > FORMAT => {
            Err(StoreError::NewerFormat { path: dir.clone(), found, known: FORMAT })
        }
        Some(FORMAT) => Ok(lock),
        Some(_) => {
            // Opening brings what is derived up to date.
            file.write_at(format!("ferrymq {FORMAT}\n").as_bytes(), 0).map_err(failed("written"))?;
            file.sync().map_err(failed("synced"))?;
            Ok(lock)
        }
        None => Err(StoreError::Damaged { path, what: format!("{text:?} is not a FerryMQ format line") }),
    }
}

/// How a record would be recognised if it were sent again; nothing if no client has sent it.
fn sent_as(r: &Record) -> Option<(Fingerprint, Stored, Timestamp)> {
    let moved = [message::MOVED_FROM, message::RELEASED, message::HELD_ID];
    if moved.iter().any(|key| r.property(key).is_some()) {
        return None;
    }
    let (topic, queue) = match r.property(message::REAL_TOPIC) {
        Some(topic) => (topic, r.property(message::REAL_QUEUE)?.parse().ok()?),
        None => (&*r.topic, r.queue),
    };
    let sent = Fingerprint::of(topic, &r.properties, r.born_timestamp_ms, &r.body)?;
    let stored = Stored { queue, queue_offset: r.queue_offset, log_offset: r.log_offset };
    Some((sent, stored, Timestamp(r.store_timestamp_ms)))
}

impl Engine {
    /// Opens the store and replays what its derived state does not cover yet.
    pub fn open(
        options: Options,
        fs: Arc<dyn Fs>,
        kv: Arc<dyn Kv>,
        lock: Box<dyn std::any::Any + Send + Sync>,
        now: Timestamp,
    ) -> Result<(Self, RecoveryReport)> {
        let log = Log::open(fs.clone(), &options.dir.join("commitlog"), options.log)?;
        let covered = checkpoint::load_covered(&*kv)?;
        let queues = options.dir.join("consumequeue");
        let index = FileQueues::open(fs.clone(), kv.clone(), &queues, options.queue_file_entries)?;
        let dir = options.dir.join("index");
        let keys = KeyIndex::open(fs.clone(), kv.clone(), &dir, options.key_index, covered.clean)?;
        let pop = Pop::load(&*kv, now)?;
        let timers = Timers::load(&*kv, options.log.segment_bytes)?;
        let txns = Txns::load(&*kv)?;
        let meta = Meta::load(&*kv)?;
        let mut engine = Self {
            reader: log.reader(),
            log,
            index,
            keys: Arc::new(keys),
            new_keys: Vec::new(),
            pop,
            meta,
            timers,
            txns,
            roll: None,
            recent: Recent::default(),
            checkpoints_at: [covered.offset; 2],
            staged: Staged::default(),
            changes: Writer::default(),
            stuck: false,
            changes_topic: Topic::stored(CHANGES_TOPIC),
            turns: HashMap::new(),
            covered: covered.offset,
            last_store_ms: now.0,
            unreadable: 0,
            checkpoints_stopped: false,
            disk: None,
            over_full: false,
            keys_asked: covered.offset,
            key: ReceiptKey(options.new_key),
            _lock: lock,
            options,
            fs,
            kv,
        };
        let mut report = engine.replay(covered.offset)?;
        report.clean = covered.clean;
        engine.keys.follow(engine.log.start(), report.end);
        if covered.queues_missing {
            tracing::info!("the queues are made from the log; this is done once");
            engine.rebuild_indexes(|_| {})?;
        }
        engine.pop.take_freed();
        engine.remember_recent(now)?;
        engine.index.trim(engine.log.start())?;
        match engine.meta.key() {
            Some(key) => engine.key = key,
            None => {
                engine.change(Change::Key(engine.key));
                engine.commit(now)?.changes?;
            }
        }
        engine.log.syncer().sync()?;
        Ok((engine, report))
    }

    /// What was sent before the restart may be sent again after it.
    fn remember_recent(&mut self, now: Timestamp) -> Result<()> {
        let from = match checkpoint::load_recent(&*self.kv)? {
            Some((_, at)) if now.since(at) > 2 * recent::GENERATION_MS => self.covered,
            Some((from, _)) => from,
            None => self.covered,
        };
        let (reader, end) = (self.reader.clone(), self.log.end());
        let mut at = from.max(self.log.start());
        while at < end {
            let mut found = Vec::new();
            at = reader.walk(at, end, 64 << 20, |r| {
                if now.0.saturating_sub(r.store_timestamp_ms) < 2 * recent::GENERATION_MS {
                    found.extend(sent_as(r));
                }
            })?;
            found.into_iter().for_each(|(sent, stored, at)| self.recent.remember(sent, stored, at));
        }
        Ok(())
    }

    fn replay(&mut self, from: u64) -> Result<RecoveryReport> {
        let mut report = RecoveryReport { covered: from, ..RecoveryReport::default() };
        // The scan borrows the log; what it finds is applied in slices.
        let mut at = from;
        loop {
            let mut scan = Scan::new(&self.log, at);
            let mut records = Vec::new();
            let mut bytes = 0;
            while bytes < 8 << 20 {
                let Some(record) = scan.next_record()? else { break };
                bytes += record.size as usize;
                records.push(record);
            }
            let end = scan.finish();
            at = end.end;
            report.damaged.extend(end.damaged);
            if records.is_empty() {
                break;
            }
            report.replayed += records.len() as u64;
            records.iter().try_for_each(|r| self.dispatch(r))?;
        }
        report.torn = self.log.cut(at)?;
        report.end = at;
        Ok(report)
    }

    /// What a record of the log means for derived state.
    fn dispatch(&mut self, r: &Record) -> Result<()> {
        let topic = Topic::stored(&r.topic);
        self.index_record(&topic, r);
        let stored_at = Timestamp(r.store_timestamp_ms);
        if matches!(topic.as_str(), TIMER_TOPIC | HALF_TOPIC) {
            let held = Held { log_offset: r.log_offset, size: r.size };
            self.hold(topic.as_str(), held, &r.properties, stored_at)?;
        }
        self.settle_released(&r.properties, stored_at)?;
        if let Some(settled) = consume::moved_from(&topic, r) {
            self.apply(&settled);
        }
        if topic == self.changes_topic {
            let changes = change::decode(&r.body).map_err(|e| StoreError::Damaged {
                path: self.options.dir.join("commitlog"),
                what: format!("change record at offset {}: {e}", r.log_offset),
            })?;
            changes.iter().for_each(|change| self.apply(change));
        }
        Ok(())
    }

    pub(super) fn index_record(&mut self, topic: &Topic, r: &Record) {
        let tag_code = hash::tag_code(r.property(message::TAGS));
        let entry = Entry { log_offset: r.log_offset, size: r.size, tag_code };
        // Half messages and rollbacks of another broker have no place in a queue.
        if !matches!(topic.as_str(), TIMER_TOPIC | HALF_TOPIC)
            && !matches!(
                r.sys_flag & message::FLAG_TRANSACTION,
                message::FLAG_PREPARED | message::FLAG_TRANSACTION
            )
        {
            self.index.append(topic, r.queue, r.queue_offset, entry);
        }
    }

    pub(super) fn apply(&mut self, change: &Change) {
        self.pop.apply(change);
        self.meta.apply(change);
        match change {
            Change::Recalled(key) => {
                if let Err(error) = self.timers.recall(&*self.kv, *key) {
                    tracing::error!(%error, "a row of the timers cannot be read");
                }
            }
            Change::Checked { id, check_at } => self.txns.checked(*id, *check_at),
            Change::RolledBack { id, at } => self.txns.decide(*id, Decision::RolledBack, *at),
            _ => {}
        }
        self.apply_to_index(change);
    }

    pub(super) fn apply_to_index(&mut self, change: &Change) {
        match change {
            Change::PutTopic(TopicConfig { topic, deleted: true, .. }) => {
                self.index.delete(topic);
                self.delete_retries(|retry| retry.strip_suffix(topic.as_str())?.strip_suffix('+'))
            }
            Change::PutGroup(GroupConfig { group, deleted: true, .. }) => {
                self.delete_retries(|retry| retry.strip_prefix(group.as_str())?.strip_prefix('+'))
            }
            _ => {}
        }
    }

    /// Retries go with their topic or group: a later one of the same name must not get them.
    fn delete_retries(&mut self, gone: impl Fn(&str) -> Option<&str>) {
        for topic in self.index.topics() {
            if topic.as_str().strip_prefix(RETRY_PREFIX).and_then(&gone).is_some() {
                self.index.delete(&topic);
            }
        }
    }
}
