//! The one writer. Messages and changes are staged and then committed as one group: one write of the log, one
//! change record. Derived state follows from what was committed.
//!
//! Call order: any number of `append`, `pop`, `acknowledge`, … then [`Engine::commit`]. Messages staged are not
//! seen by `pop` before the commit. After a failed commit nothing staged has happened.

mod bounds;
mod consume;
mod hold;
mod open;
mod order;
mod repair;
mod retain;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use model::message;
use model::{Group, ReceiptKey, Timestamp, Topic, hash};

pub use self::consume::{NEW_GROUP_BACKLOG_MAX_BYTES, PopRequest, Popped};
pub use self::hold::{Ended, Hold, Recall};
use self::hold::{HELD_EXTRA_BYTES, Roll, StagedHeld};
pub use self::open::{FORMAT, RecoveryReport, claim};
pub use self::repair::Repaired;
pub use self::retain::{Retention, Retired, State};
use crate::change::{Change, CursorKey, Writer};
use crate::checkpoint::{self, Checkpoint, Failed, Outcome, Written};
use crate::error::{Result, StoreError};
use crate::fs::{Fs, Space};
use crate::keys::{self, KeyEntry, KeyIndex};
use crate::kv::{Batch, Kv};
use crate::log::record::{self, NewRecord, Place, Record};
use crate::log::{Group as LogGroup, Log, LogOptions, LogReader, Room, Syncer};
use crate::meta::Meta;
use crate::pop::{Lag, Pop};
use crate::queue::{Bounds, Entry, FileQueues, QueueIndex};
use crate::recent::{Fingerprint, Recent};
use crate::timer::Timers;
use crate::txn::Txns;

/// Log written between two syncs of the key index: what a crash makes it read again, in the background.
const KEYS_SYNC_BYTES: u64 = 1 << 30;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlushMode {
    /// Acknowledged once written: survives a killed process.
    #[default]
    Async,
    /// Acknowledged once synced: survives a power loss.
    Sync,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub dir: PathBuf,
    pub flush: FlushMode,
    pub log: LogOptions,
    /// Entries of one file of the queue index ([`crate::queue::ENTRIES_PER_FILE`]).
    pub queue_file_entries: u64,
    /// Sizes of one file of the key index.
    pub key_index: keys::Shape,
    pub retention: Retention,
    /// The address that records carry as their store host.
    pub host: SocketAddr,
    /// The receipt key of a new store.
    pub new_key: [u8; 16],
}

/// A message to be stored.
#[derive(Clone, Debug)]
pub struct NewMessage {
    pub queue: u32,
    pub body: Bytes,
    pub properties: Bytes,
    pub sys_flag: u32,
    pub born_timestamp_ms: i64,
    pub born_host: SocketAddr,
    /// Whether its queue gets it at once.
    pub hold: Hold,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    pub queue: u32,
    pub queue_offset: u64,
    pub log_offset: u64,
}

/// What a commit did.
#[derive(Debug)]
pub struct Committed {
    /// The log's end: durable once it is flushed up to here.
    pub end: u64,
    /// Topics that have new messages.
    pub topics: Vec<Topic>,
    /// Set if the messages are stored but acknowledgements and offsets could not be (disk full).
    pub changes: Result<()>,
}

#[derive(Default)]
struct Staged {
    group: Option<LogGroup>,
    entries: Vec<(Topic, u32, u64, Entry)>,
    /// The next offset of queues with staged messages, but for the queue of the last one.
    counts: HashMap<(Topic, u32), u64>,
    keys: Vec<KeyEntry>,
    held: Vec<StagedHeld>,
}

pub struct Engine {
    options: Options,
    fs: Arc<dyn Fs>,
    kv: Arc<dyn Kv>,
    log: Log,
    reader: LogReader,
    index: FileQueues,
    keys: Arc<KeyIndex>,
    new_keys: Vec<KeyEntry>,
    pop: Pop,
    meta: Meta,
    timers: Timers,
    txns: Txns,
    roll: Option<Roll>,
    recent: Recent,
    /// The log's end at the last two checkpoints.
    checkpoints_at: [u64; 2],
    staged: Staged,
    /// Changes carried out in memory that the log does not hold yet. They stay here until it does: a later change
    /// must never be in the log without the earlier ones.
    changes: Writer,
    /// Set while the disk is too full for them.
    stuck: bool,
    changes_topic: Topic,
    /// Where the next pop of a group and topic begins.
    turns: HashMap<(Group, Topic), u32>,
    covered: u64,
    last_store_ms: i64,
    unreadable: u64,
    checkpoints_stopped: bool,
    /// The disk as it was seen last, and whether it is too full for messages.
    disk: Option<Space>,
    over_full: bool,
    /// The log's end when the key index was last asked to sync.
    keys_asked: u64,
    key: ReceiptKey,
    _lock: Box<dyn std::any::Any + Send + Sync>,
}

impl Engine {
    /// Stages a change and carries it out.
    fn change(&mut self, change: Change) {
        self.changes.push(&change);
        self.apply(&change);
    }

    pub fn reader(&self) -> LogReader {
        self.reader.clone()
    }

    pub fn syncer(&self) -> Syncer {
        self.log.syncer()
    }

    pub fn fs(&self) -> Arc<dyn Fs> {
        self.fs.clone()
    }

    pub fn kv(&self) -> Arc<dyn Kv> {
        self.kv.clone()
    }

    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    pub fn key(&self) -> ReceiptKey {
        self.key
    }

    pub fn flush_mode(&self) -> FlushMode {
        self.options.flush
    }

    pub fn end(&self) -> u64 {
        self.log.end()
    }

    /// Records that could not be read when they were wanted.
    pub fn unreadable(&self) -> u64 {
        self.unreadable
    }

    /// Queues of a topic that ever had a message.
    pub fn queues(&self, topic: &Topic) -> Vec<(u32, Bounds)> {
        let queues = self.index.queues(topic).into_iter();
        queues.map(|queue| (queue, self.index.bounds(topic, queue))).collect()
    }

    pub fn keys(&self) -> Arc<KeyIndex> {
        self.keys.clone()
    }

    /// Log offsets of messages that are not in the key index yet, newest first.
    pub fn new_keys(&self, hash: u32) -> Vec<u64> {
        self.new_keys.iter().rev().filter(|e| e.hash == hash).map(|e| e.log_offset).collect()
    }

    pub fn bounds(&self, topic: &Topic, queue: u32) -> Bounds {
        self.index.bounds(topic, queue)
    }

    pub fn entries(&self, topic: &Topic, queue: u32, from: u64, max: usize) -> Result<Vec<Entry>> {
        self.index.read(topic, queue, from, max)
    }

    // --- messages -------------------------------------------------------------------------------------------

    /// Stages messages of one topic: all of them, or none if there is no room.
    pub fn append(&mut self, topic: &Topic, messages: &[NewMessage], now: Timestamp) -> Result<Vec<Stored>> {
        let extra = |m: &NewMessage| if m.hold == Hold::Nothing { 0 } else { HELD_EXTRA_BYTES };
        let bytes: usize = messages.iter().map(|m| record_len(topic, m, self.options.host) + extra(m)).sum();
        self.room_for(bytes as u64, Room::Messages)?;
        Ok(messages.iter().map(|m| self.stage_once(topic, m, now)).collect())
    }

    /// A message that was sent before is where it is.
    fn stage_once(&mut self, topic: &Topic, m: &NewMessage, now: Timestamp) -> Stored {
        let sent = Fingerprint::of(topic.as_str(), &m.properties, m.born_timestamp_ms, &m.body);
        if let Some(stored) = sent.and_then(|sent| self.recent.find(sent)) {
            return stored;
        }
        let stored = match m.hold {
            Hold::Nothing => self.stage(topic, m, 0, now),
            Hold::Until(due) if due <= now => self.stage(topic, m, 0, now),
            Hold::Until(_) | Hold::Half => self.stage_held(topic, m, now),
        };
        if let Some(sent) = sent {
            self.recent.remember(sent, stored, now);
        }
        stored
    }

    fn room_for(&mut self, bytes: u64, room: Room) -> Result<()> {
        let segment = self.log.segment_bytes();
        if bytes + record::BLANK_BYTES > segment {
            return Err(StoreError::RecordTooLarge { size: bytes, segment });
        }
        if self.over_full && room == Room::Messages {
            return Err(StoreError::DiskFull { path: self.options.dir.clone() });
        }
        let staged = self.staged.group.as_ref().map_or(0, LogGroup::bytes);
        // A record that rolls to the next file leaves less than its own size unused.
        self.log.make_room(staged + 2 * bytes, room)
    }

    fn stage(&mut self, topic: &Topic, m: &NewMessage, reconsume_times: u32, now: Timestamp) -> Stored {
        let new = NewRecord {
            topic: topic.as_str(),
            queue: m.queue,
            sys_flag: m.sys_flag,
            born_timestamp_ms: m.born_timestamp_ms,
            born_host: m.born_host,
            store_host: self.options.host,
            reconsume_times,
            body: &m.body,
            properties: &m.properties,
        };
        let queue_offset = match self.staged.entries.last() {
            // Messages of one call follow each other in one queue.
            Some((last, queue, offset, _)) if *queue == m.queue && last == topic => offset + 1,
            _ => {
                let staged = self.staged.counts.get(&(topic.clone(), m.queue));
                staged.copied().unwrap_or_else(|| self.index.bounds(topic, m.queue).max)
            }
        };
        let (log_offset, size) = self.place(&new, queue_offset, now);
        let tag_code = hash::tag_code(message::property(&m.properties, message::TAGS));
        let entry = Entry { log_offset, size, tag_code };
        let (stored_ms, keys) = (self.last_store_ms, &mut self.staged.keys);
        keys::keys_of(topic.as_str(), &m.properties, |hash| {
            keys.push(KeyEntry { hash, log_offset, stored_ms })
        });
        if let Some((last, queue, offset, _)) = self.staged.entries.last()
            && (*queue != m.queue || last != topic)
        {
            self.staged.counts.insert((last.clone(), *queue), offset + 1);
        }
        self.staged.entries.push((topic.clone(), m.queue, queue_offset, entry));
        Stored { queue: m.queue, queue_offset, log_offset }
    }

    /// Gives a record its place in the group.
    fn place(&mut self, new: &NewRecord<'_>, queue_offset: u64, now: Timestamp) -> (u64, u32) {
        // Store time never goes back, so that a search by time stays a search.
        self.last_store_ms = self.last_store_ms.max(now.0);
        let size = record::encoded_len(new);
        let group = self.staged.group.get_or_insert_with(|| self.log.group());
        let log_offset = group.place(size);
        let place = Place { queue_offset, log_offset, store_timestamp_ms: self.last_store_ms };
        (log_offset, record::encode(group.buffer(size), new, place))
    }

    /// Writes everything staged as one group.
    pub fn commit(&mut self, now: Timestamp) -> Result<Committed> {
        let changes = self.stage_changes(now);
        let staged = std::mem::take(&mut self.staged);
        if let Some(group) = staged.group.filter(|g| !g.is_empty()) {
            self.log.append(group)?;
        } else {
            self.log.check()?;
        }
        self.new_keys.extend(staged.keys);
        self.held_is_in_the_log(staged.held)?;
        let mut topics = Vec::new();
        for (topic, queue, offset, entry) in staged.entries {
            self.index.append(&topic, queue, offset, entry);
            if topics.last() != Some(&topic) && topic != self.changes_topic {
                topics.push(topic);
            }
        }
        topics.extend(self.pop.take_freed());
        topics.sort_unstable();
        topics.dedup();
        Ok(Committed { end: self.log.end(), topics, changes })
    }

    fn stage_changes(&mut self, now: Timestamp) -> Result<()> {
        if self.changes.is_empty() {
            return Ok(());
        }
        let host = self.options.host;
        let mut message = NewMessage {
            queue: 0,
            body: Bytes::new(),
            properties: Bytes::new(),
            sys_flag: 0,
            born_timestamp_ms: now.0,
            born_host: host,
            hold: Hold::Nothing,
        };
        let topic = self.changes_topic.clone();
        let bytes = record_len(&topic, &message, host) + self.changes.len();
        let room = self.room_for(bytes as u64, Room::Reserve);
        self.stuck = room.is_err();
        room?;
        message.body = self.changes.take().into();
        self.stage(&topic, &message, 0, now);
        Ok(())
    }

    // --- clients, metadata, lag -----------------------------------------------------------------------------

    pub fn client_seen(&mut self, client: &str, now: Timestamp) {
        self.pop.client_seen(client, now);
    }

    pub fn client_gone(&mut self, client: &str, now: Timestamp) {
        for change in self.pop.client_gone(client, now) {
            self.change(change);
        }
    }

    /// The message at a place of a queue.
    pub fn message(&self, topic: &Topic, queue: u32, offset: u64) -> Option<Record> {
        let entry = self.entry(topic, queue, offset).ok()??;
        self.reader.read(entry.log_offset, entry.size).ok()
    }

    /// Where exactly this message is, if it still is.
    fn entry(&self, topic: &Topic, queue: u32, offset: u64) -> Result<Option<Entry>> {
        if offset < self.index.bounds(topic, queue).min {
            return Ok(None);
        }
        let entries = self.index.read(topic, queue, offset, 1)?;
        Ok(entries.into_iter().next().filter(|e| !e.is_hole()))
    }

    /// Takes changes over as they are: of a store that is imported.
    pub fn take_over(&mut self, changes: Vec<Change>) {
        changes.into_iter().for_each(|change| self.change(change));
    }

    /// Takes a change of topics or groups, if it is news.
    pub fn put_meta(&mut self, change: Change) {
        if self.meta.is_news(&change) {
            self.change(change);
        }
    }

    /// Position of a group on a queue; the retry topic counts as one of its queues.
    pub fn lag(&self, group: &Group) -> Vec<(CursorKey, Bounds, Lag)> {
        let lag = |key: CursorKey| {
            let bounds = self.index.bounds(&key.topic, key.queue);
            Some((key.clone(), bounds, self.pop.lag(&key)?))
        };
        self.pop.cursors(group).into_iter().filter_map(lag).collect()
    }

    // --- checkpoints ----------------------------------------------------------------------------------------

    /// Bytes of log that a restart would have to replay.
    pub fn uncovered(&self) -> u64 {
        self.log.end() - self.covered
    }

    /// False while the log lacks changes, and once the disk has failed to sync derived state: then it is rebuilt
    /// from the log at the next start.
    pub fn can_checkpoint(&self) -> bool {
        !self.checkpoints_stopped && self.changes.is_empty()
    }

    /// Takes derived state as of now. Nothing may be staged.
    pub fn checkpoint(&mut self, now: Timestamp, clean: bool) -> Result<Checkpoint> {
        self.log.check()?;
        self.pop.forget_clients(now);
        let mut batch = Batch::default();
        checkpoint::put_recent(&mut batch, self.checkpoints_at[0], now);
        self.checkpoints_at = [self.checkpoints_at[1], self.log.end()];
        let queues = self.index.take(&mut batch)?;
        self.meta.checkpoint(&mut batch);
        self.pop.checkpoint(&mut batch);
        self.timers.checkpoint(&mut batch);
        self.txns.checkpoint(&mut batch);
        self.keys.stage(&mut self.new_keys, self.log.end());
        let sync_keys = clean || self.log.end() - self.keys_asked > KEYS_SYNC_BYTES;
        if sync_keys {
            self.keys_asked = self.log.end();
        }
        Ok(Checkpoint::new((self.log.end(), clean), batch, queues, (self.keys.clone(), sync_keys)))
    }

    pub fn checkpoint_written(&mut self, outcome: Outcome) {
        match outcome {
            Ok(Written { covered, queues }) => {
                self.covered = self.covered.max(covered);
                self.index.written(queues);
                self.timers.written();
            }
            Err(failed) => {
                let Failed { error, checkpoint: failed } = *failed;
                tracing::warn!(%error, "a checkpoint could not be written; a restart replays more of the log");
                self.meta.mark_dirty(&failed.batch);
                self.pop.mark_dirty(&failed.batch);
                self.timers.give_back();
                self.txns.mark_dirty(&failed.batch);
                self.index.give_back(failed.queues, &failed.batch);
                // A failed sync may have lost pages for good: nothing derived is trusted to the disk any more.
                self.checkpoints_stopped |= matches!(error, StoreError::Io { .. });
            }
        }
    }

    /// A clean stop: everything durable, nothing to replay.
    pub fn close(mut self, now: Timestamp) -> Result<()> {
        self.commit(now)?.changes?;
        if !self.can_checkpoint() {
            return self.log.syncer().sync().map(drop);
        }
        let checkpoint = self.checkpoint(now, true)?;
        checkpoint.write(&self.log.syncer(), &*self.kv).map(drop).map_err(|failed| failed.error)
    }
}

fn record_len(topic: &Topic, m: &NewMessage, host: SocketAddr) -> usize {
    record::encoded_len(&NewRecord {
        topic: topic.as_str(),
        queue: m.queue,
        sys_flag: m.sys_flag,
        born_timestamp_ms: m.born_timestamp_ms,
        born_host: m.born_host,
        store_host: host,
        reconsume_times: 0,
        body: &m.body,
        properties: &m.properties,
    })
}
