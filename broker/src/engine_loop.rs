//! The one owner of the [`Engine`]. Commands are staged, committed as one group and then answered. Sans-thread:
//! `threads` drives it for real, the simulation drives it with virtual time.

use std::collections::VecDeque;

use apis::status::Error;
use model::bound::{Bound, Unit};
use model::{Timestamp, Topic, limits};
use store::checkpoint::Checkpoint;
use store::engine::{Committed, PopRequest, Retired, Stored};
use store::log::record::Record;
use store::pop::Standing;
use store::{Engine, FlushMode, Popped, StoreError};
use tokio::sync::oneshot;

use crate::command::{Answer, Command, PopCommand};
use crate::error;
use crate::waiters::{Key, Waiters};

/// How much log a restart may have to replay, and how long derived state may stay behind.
const CHECKPOINT_BYTES: u64 = 256 << 20;
const CHECKPOINT_MS: i64 = 10_000;
/// Between two checkpoints at the least.
const CHECKPOINT_MIN_MS: i64 = 50;
/// In async mode the log is synced this long after a write at the latest.
const FLUSH_MS: i64 = 500;
/// While messages wait for their time, the clock is looked at as often.
const LOOK_MS: i64 = 500;
/// Between two steps of writing again what waits in the oldest log file.
const ROLL_MS: i64 = 20;
/// Half messages of one answer.
const CHECKS_MAX: usize = 32;
/// Between two looks at the disk.
const DISK_MS: i64 = 10_000;

/// An answer that waits for the commit it belongs to.
pub enum Reply {
    Stored(Answer<Vec<Stored>>, Vec<Stored>),
    Settled(Answer<Vec<Standing>>, Vec<Standing>),
    Popped(Answer<Vec<Popped>>, Vec<Popped>),
    /// Whatever comes less often.
    Other(Box<dyn FnOnce(Result<(), Error>) + Send>),
}

impl Reply {
    fn other<T: Send + 'static>(answer: Answer<T>, value: T) -> Self {
        Reply::Other(Box::new(move |result| drop(answer.send(result.map(|()| value)))))
    }

    /// Gives back what the caller, who has gone away, has not received.
    #[must_use]
    pub fn send(self, result: Result<(), Error>) -> Option<Command> {
        match self {
            Reply::Stored(answer, value) => drop(answer.send(result.map(|()| value))),
            Reply::Settled(answer, value) => drop(answer.send(result.map(|()| value))),
            Reply::Popped(answer, value) => {
                let unread = answer.send(result.map(|()| value)).err()?.ok()?;
                return Some(Command::Release(unread.into_iter().map(|p| p.receipt).collect()));
            }
            Reply::Other(send) => send(result),
        }
        None
    }

    /// True if it stands on a change record rather than on a message.
    fn needs_changes(&self) -> bool {
        !matches!(self, Reply::Stored(..))
    }
}

/// Answers that may go out once the log is flushed up to `end`.
pub struct Pending {
    pub end: u64,
    pub replies: Vec<Reply>,
}

/// What a step wants done outside.
#[derive(Default)]
pub struct Effects {
    /// To be answered after the next sync (sync mode).
    pub pending: Option<Pending>,
    /// To be written by another thread.
    pub checkpoint: Option<Checkpoint>,
    /// Files to be removed by another thread.
    pub retired: Vec<Retired>,
    /// The log is to be synced.
    pub sync: bool,
    pub stopped: bool,
}

/// A proxy that waits for half messages of its producers' topics.
struct Asker {
    topics: Vec<Topic>,
    answer: Answer<Vec<(u64, Record)>>,
}

pub struct EngineLoop {
    engine: Engine,
    waiters: Waiters,
    /// Proxies that can ask producers.
    askers: Vec<Asker>,
    replies: Vec<Reply>,
    popped: Vec<(PopCommand, Answer<Vec<Popped>>, Vec<Popped>)>,
    /// Topics with messages that are not durable yet, and so not visible (sync mode).
    hidden: VecDeque<(u64, Vec<Topic>)>,
    checkpointing: bool,
    last_checkpoint: Timestamp,
    dirty_since: Option<Timestamp>,
    /// When the disk is looked at next.
    disk_at: Timestamp,
    retired: Vec<Retired>,
    /// More messages are due than one round has moved.
    more_due: bool,
    /// When what was due could not be moved.
    expiry_failed: Option<Timestamp>,
    stop: Option<oneshot::Sender<()>>,
}

impl EngineLoop {
    pub fn new(engine: Engine, now: Timestamp) -> Self {
        Self {
            engine,
            waiters: Waiters::default(),
            askers: Vec::new(),
            replies: Vec::new(),
            popped: Vec::new(),
            hidden: VecDeque::new(),
            checkpointing: false,
            last_checkpoint: now,
            dirty_since: None,
            disk_at: now,
            retired: Vec::new(),
            more_due: false,
            expiry_failed: None,
            stop: None,
        }
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// When [`EngineLoop::tend`] wants to run even if nobody asks.
    pub fn next_wake(&self, now: Timestamp) -> Option<Timestamp> {
        if self.more_due || (self.stop.is_some() && !self.checkpointing) {
            return Some(now);
        }
        let flush = self.dirty_since.map(|since| since.plus_ms(FLUSH_MS));
        let behind = self.engine.uncovered() > 0 && !self.checkpointing;
        let pause = if self.far_behind() { CHECKPOINT_MIN_MS } else { CHECKPOINT_MS };
        let checkpoint = behind.then(|| self.last_checkpoint.plus_ms(pause));
        // What is due but cannot be done now (a full disk) is tried again, not spun on.
        let due =
            self.engine.next_due().map(|at| self.expiry_failed.map_or(at, |failed| failed.plus_ms(100)));
        let check = self.next_check().map(|at| self.expiry_failed.map_or(at, |failed| failed.plus_ms(100)));
        // A clock may jump: what waits for a time is looked at again now and then.
        let look = (self.engine.timers_pending() > 0).then(|| now.plus_ms(LOOK_MS));
        [flush, checkpoint, due, check, look, Some(self.disk_at)].into_iter().flatten().min()
    }

    /// So far that a checkpoint should not wait for its time.
    fn far_behind(&self) -> bool {
        self.engine.uncovered() > CHECKPOINT_BYTES || self.engine.is_laden()
    }

    /// Stages one command.
    pub fn handle(&mut self, command: Command, now: Timestamp) {
        match command {
            Command::Append { topic, messages, answer } => {
                match self.append(&topic, &messages, now) {
                    Ok(stored) => self.replies.push(Reply::Stored(answer, stored)),
                    Err(e) => drop(answer.send(Err(e))),
                };
            }
            Command::Pop { request, answer } => self.pop(request, answer, now),
            Command::Ack { receipts, answer } => {
                let standings = self.engine.acknowledge_all(&receipts, now);
                self.stage(answer, standings, Reply::Settled);
            }
            Command::ChangeInvisible { receipt, invisible_ms, answer } => {
                let changed = self.engine.change_invisible(&receipt, invisible_ms, now);
                self.stage(answer, changed, Reply::other);
            }
            Command::DeadLetter { receipt, answer } => {
                let standing = self.engine.dead_letter(&receipt, now);
                self.stage(answer, standing, Reply::other);
            }
            Command::Decide { id, decision, answer } => {
                let ended = self.engine.end_transaction(id, decision, now);
                self.stage(answer, ended, Reply::other);
            }
            Command::Recall { key, answer } => {
                let recalled = self.engine.recall(key, now);
                self.stage(answer, recalled, Reply::other);
            }
            Command::Checks { topics, answer } => {
                self.askers.retain(|asker| !asker.answer.is_closed());
                self.askers.push(Asker { topics, answer });
                self.ask_producers(now);
            }
            Command::Release(receipts) => self.release(&receipts, now),
            Command::PutMeta { changes, answer } => {
                changes.into_iter().for_each(|change| self.engine.put_meta(change));
                self.replies.push(Reply::other(answer, self.engine.meta().version()));
            }
            Command::Liveness { alive, gone, answer } => {
                alive.iter().for_each(|client| self.engine.client_seen(client, now));
                gone.iter().for_each(|client| self.engine.client_gone(client, now));
                self.replies.push(Reply::other(answer, ()));
            }
            Command::Prune { answer } => {
                self.disk_at = now;
                let kept = self.engine.keep_disk(now).map(|retired| self.retired.extend(retired));
                self.stage(answer, kept, Reply::other);
            }
            Command::Look(look) => look(&self.engine),
            Command::Bounds(answer) => {
                let mut bounds = self.engine.bounds_used();
                bounds.push(Bound::of(
                    "waiting consumers",
                    self.waiters.len(),
                    limits::WAITING_MAX,
                    Unit::Calls,
                ));
                let _ = answer.send(Ok(bounds));
            }
            Command::Flushed(flushed) => self.flushed(flushed, now),
            Command::CheckpointWritten(result) => {
                self.checkpointing = false;
                self.engine.checkpoint_written(result);
            }
            Command::Stop(done) => self.stop = Some(done),
        }
    }

    fn stage<T>(
        &mut self,
        answer: Answer<T>,
        result: Result<T, StoreError>,
        reply: fn(Answer<T>, T) -> Reply,
    ) {
        match result {
            Ok(value) => self.replies.push(reply(answer, value)),
            Err(e) => drop(answer.send(Err(error::of_store(&e)))),
        }
    }

    fn append(
        &mut self,
        topic: &Topic,
        messages: &[store::NewMessage],
        now: Timestamp,
    ) -> Result<Vec<Stored>, Error> {
        let config = self.engine.meta().topic(topic).ok_or_else(|| Error::topic_not_found(topic))?;
        if let Some(m) = messages.iter().find(|m| m.queue >= config.queues) {
            let what =
                format!("topic {topic} has {} queues here; there is no queue {}", config.queues, m.queue);
            return Err(Error::new(apis::v2::Code::Forbidden, what));
        }
        self.engine.append(topic, messages, now).map_err(|e| error::of_store(&e))
    }

    fn pop(&mut self, request: PopCommand, answer: Answer<Vec<Popped>>, now: Timestamp) {
        if request.auto_renew {
            self.engine.client_seen(&request.client, now);
        }
        let checks = self.check_pop(&request);
        let popped = checks.and_then(|()| self.pop_now(&request, now).map_err(|e| error::of_store(&e)));
        match popped {
            Ok(popped) if popped.is_empty() && request.wait && self.waiters.len() >= limits::WAITING_MAX => {
                drop(answer.send(Err(error::busy("consumers wait here"))));
            }
            Ok(popped) if popped.is_empty() && request.wait => self.waiters.park(request, answer),
            Ok(popped) => self.popped.push((request, answer, popped)),
            Err(e) => drop(answer.send(Err(e))),
        }
    }

    fn check_pop(&self, request: &PopCommand) -> Result<(), Error> {
        let meta = self.engine.meta();
        meta.topic(&request.topic).ok_or_else(|| Error::topic_not_found(&request.topic))?;
        meta.group(&request.group).ok_or_else(|| Error::group_not_found(&request.group)).map(drop)
    }

    fn pop_now(&mut self, request: &PopCommand, now: Timestamp) -> Result<Vec<Popped>, StoreError> {
        let request = PopRequest {
            group: &request.group,
            topic: &request.topic,
            filter: &request.filter,
            max: request.max,
            invisible_ms: request.invisible_ms,
            renewed_for: request.auto_renew.then(|| request.client.clone()),
            in_order: self.engine.meta().group(&request.group).is_some_and(|g| g.fifo),
            attempt_id: request.attempt_id,
        };
        self.engine.pop(&request, now)
    }

    fn release(&mut self, receipts: &[model::Receipt], now: Timestamp) {
        for receipt in receipts {
            if let Err(error) = self.engine.release(receipt, now) {
                tracing::warn!(%error, "a message that reached nobody stays invisible for its time");
            }
        }
    }

    /// When a half message is due whose producers somebody here can ask.
    fn next_check(&self) -> Option<Timestamp> {
        if self.askers.is_empty() {
            return None;
        }
        self.engine.next_check(|topic| self.askers.iter().any(|asker| asker.topics.contains(topic)))
    }

    fn ask_producers(&mut self, now: Timestamp) {
        if self.next_check().is_none_or(|at| at > now) {
            return;
        }
        for Asker { topics, answer } in std::mem::take(&mut self.askers) {
            match self.engine.checks(&topics, now, CHECKS_MAX) {
                _ if answer.is_closed() => {}
                Ok(checks) if checks.is_empty() => self.askers.push(Asker { topics, answer }),
                Ok(checks) => self.replies.push(Reply::other(answer, checks)),
                Err(e) => drop(answer.send(Err(error::of_store(&e)))),
            }
        }
    }

    fn flushed(&mut self, flushed: u64, now: Timestamp) {
        while let Some((_, topics)) = self.hidden.pop_front_if(|(end, _)| *end <= flushed) {
            self.serve(&topics, now);
        }
    }

    /// Commits what is staged, answers, and serves those who waited for it.
    pub fn finish(&mut self, now: Timestamp) -> Effects {
        let mut effects = Effects::default();
        // Serving waiters stages rows of its own, which go into a second group.
        while let Some(topics) = self.commit(now, &mut effects) {
            match self.engine.flush_mode() {
                FlushMode::Async => self.serve(&topics, now),
                FlushMode::Sync => self.hidden.push_back((self.engine.end(), topics)),
            }
        }
        if effects.sync {
            self.dirty_since = None;
        }
        effects
    }

    /// What is done in its own time: expiry, the regular sync, checkpoints. Commits what it staged.
    pub fn tend(&mut self, now: Timestamp) -> Effects {
        self.more_due = false;
        if self.engine.next_due().is_some_and(|due| due <= now) {
            let expired = self.engine.expire(now);
            self.expiry_failed = expired.is_err().then_some(now);
            match expired {
                Ok(more) => self.more_due = more,
                Err(StoreError::DiskFull { .. } | StoreError::Poisoned { .. }) => {}
                Err(error) => {
                    tracing::error!(%error, "messages whose invisible time is over could not be moved")
                }
            }
        }
        self.ask_producers(now);
        let mut effects = self.finish(now);
        self.keep_house(now, &mut effects);
        effects
    }

    /// Topics with new messages, if there are any.
    fn commit(&mut self, now: Timestamp, effects: &mut Effects) -> Option<Vec<Topic>> {
        let before = self.engine.end();
        let committed = self.engine.commit(now);
        let mut replies = std::mem::take(&mut self.replies);
        let popped = std::mem::take(&mut self.popped);
        let Committed { end, topics, changes } = match committed {
            Ok(committed) => committed,
            Err(e) => {
                let e = error::of_store(&e);
                replies.into_iter().for_each(|r| drop(r.send(Err(e.clone()))));
                popped.into_iter().for_each(|(_, answer, _)| drop(answer.send(Err(e.clone()))));
                return None;
            }
        };
        if end != before {
            self.dirty_since.get_or_insert(now);
        }
        let sync = self.engine.flush_mode() == FlushMode::Sync;
        for (_, answer, popped) in popped {
            // What is in order must be in the log, and in sync flush on the disk, before anybody sees it.
            if (sync || changes.is_err()) && popped.iter().any(|p| p.attempt.is_some()) {
                replies.push(Reply::Popped(answer, popped));
                continue;
            }
            if let Err(Ok(popped)) = answer.send(Ok(popped)) {
                let receipts: Vec<_> = popped.into_iter().map(|p| p.receipt).collect();
                self.release(&receipts, now);
            }
        }
        self.answer(replies, end, changes, effects, now);
        (!topics.is_empty()).then_some(topics)
    }

    fn answer(
        &mut self,
        replies: Vec<Reply>,
        end: u64,
        changes: Result<(), StoreError>,
        effects: &mut Effects,
        now: Timestamp,
    ) {
        let mut pending = Vec::new();
        for reply in replies {
            match &changes {
                Err(e) if reply.needs_changes() => {
                    if let Reply::Popped(_, popped) = &reply {
                        let receipts: Vec<_> = popped.iter().map(|p| p.receipt.clone()).collect();
                        self.release(&receipts, now);
                    }
                    drop(reply.send(Err(error::of_store(e))));
                }
                _ if self.engine.flush_mode() == FlushMode::Sync => pending.push(reply),
                _ => {
                    if let Some(Command::Release(receipts)) = reply.send(Ok(())) {
                        self.release(&receipts, now);
                    }
                }
            }
        }
        if self.engine.flush_mode() == FlushMode::Sync && end > self.engine.syncer().flushed() {
            effects.sync = true;
        }
        if !pending.is_empty() {
            effects.sync = true;
            let all = effects.pending.get_or_insert(Pending { end, replies: Vec::new() });
            all.end = end;
            all.replies.extend(pending);
        }
    }

    fn serve(&mut self, topics: &[Topic], now: Timestamp) {
        for key in self.waiters.wanting(topics) {
            self.serve_line(&key, now);
        }
    }

    fn serve_line(&mut self, key: &Key, now: Timestamp) {
        while let Some((request, answer)) = self.waiters.next(key) {
            match self.pop_now(&request, now) {
                Ok(popped) if popped.is_empty() => return self.waiters.put_back(key, (request, answer)),
                Ok(popped) => self.popped.push((request, answer, popped)),
                Err(e) => drop(answer.send(Err(error::of_store(&e)))),
            }
        }
    }

    fn keep_house(&mut self, now: Timestamp, effects: &mut Effects) {
        if now >= self.disk_at {
            let rolling = self.engine.is_rolling();
            self.disk_at = now.plus_ms(if rolling { ROLL_MS } else { DISK_MS });
            match self.engine.keep_disk(now) {
                Ok(retired) => self.retired.extend(retired),
                Err(error) => tracing::warn!(%error, "old messages could not be let go; it is tried again"),
            }
        }
        effects.retired = std::mem::take(&mut self.retired);
        if self.dirty_since.is_some_and(|since| now.since(since) >= FLUSH_MS) {
            effects.sync = true;
        }
        if effects.sync {
            self.dirty_since = None;
        }
        let pause = if self.far_behind() { CHECKPOINT_MIN_MS } else { CHECKPOINT_MS };
        let due = self.engine.uncovered() > 0 && now.since(self.last_checkpoint) >= pause;
        if due && !self.checkpointing {
            self.last_checkpoint = now;
        }
        if due && !self.checkpointing && self.engine.can_checkpoint() {
            match self.engine.checkpoint(now, false) {
                Ok(checkpoint) => {
                    self.checkpointing = true;
                    effects.checkpoint = Some(checkpoint);
                }
                Err(error) => tracing::warn!(%error, "no checkpoint could be taken; it is tried again"),
            }
        }
        effects.stopped = self.stop.is_some() && !self.checkpointing && effects.checkpoint.is_none();
    }

    /// A clean stop; the loop is gone afterwards.
    pub fn close(self, now: Timestamp) {
        if let Err(error) = self.engine.close(now) {
            tracing::error!(%error, "the store was not closed cleanly; the next start replays the log");
        }
        if let Some(done) = self.stop {
            let _ = done.send(());
        }
    }
}
