//! A broker as its callers see it: checks the request, asks the engine's thread, reads bodies on the way out.

use std::sync::Arc;
use std::time::Duration;

use apis::brokers::Reply;
use apis::context::CallContext;
use apis::convert::{address, metadata as wire};
use apis::internal::*;
use apis::status::Error;
use apis::v2::Code;
use model::{Bound, Group, Receipt, ReceiptKey, Sealed, TagFilter, Timestamp, Topic, hash, limits, message};
use store::change::Change;
use store::engine::Stored;
use store::log::LogReader;
use store::log::record::Record;
use store::pop::Standing;
use store::{Engine, Hold, NewMessage, Popped};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;

use crate::command::{Answer, Command, PopCommand};
use crate::driver::Commands;
use crate::error;
use crate::held::Held;

/// Bodies on their way into the log, in KiB.
const INCOMING_MAX_KIB: usize = 64 * 1024;
/// Messages of one query.
const QUERY_MAX: u32 = 1000;
/// Bytes of bodies in one answer.
const ANSWER_MAX_BYTES: usize = 32 << 20;

/// A handle on a running broker; cheap to clone.
#[derive(Clone)]
pub struct Broker(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) name: String,
    commands: Commands,
    pub(crate) reader: LogReader,
    pub(crate) key: ReceiptKey,
    incoming: Arc<Semaphore>,
}

impl Broker {
    pub fn new(name: String, commands: Commands, reader: LogReader, key: ReceiptKey) -> Self {
        let incoming = Arc::new(Semaphore::new(INCOMING_MAX_KIB));
        Self(Arc::new(Inner { name, commands, reader, key, incoming }))
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub(crate) async fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Reply<T> {
        let (answer, reply) = oneshot::channel();
        self.0.commands.bring(command(answer)).await?;
        reply.await.unwrap_or_else(|_| Err(error::stopped()))
    }

    pub(crate) async fn bring(&self, command: Command) -> Reply<()> {
        self.0.commands.bring(command).await
    }

    pub(crate) async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Engine) -> T + Send + 'static,
    ) -> Reply<T> {
        let (answer, reply) = oneshot::channel();
        let look = Command::Look(Box::new(move |engine| drop(answer.send(look(engine)))));
        self.0.commands.bring(look).await?;
        reply.await.map_err(|_| error::stopped())
    }

    /// Stops cleanly: everything durable. Returns when it is done.
    pub async fn stop(&self) {
        let (done, stopped) = oneshot::channel();
        self.0.commands.bring_now(Command::Stop(done));
        let _ = stopped.await;
    }

    pub async fn append(&self, _: &CallContext, request: AppendRequest) -> Reply<AppendReply> {
        let topic = Topic::stored(&request.topic);
        let messages: Vec<NewMessage> =
            request.messages.into_iter().map(new_message).collect::<Result<_, _>>()?;
        let bytes: usize = messages.iter().map(|m| m.body.len() + m.properties.len()).sum();
        let kib = (bytes / 1024 + 1).min(INCOMING_MAX_KIB) as u32;
        let _room = self.0.incoming.acquire_many(kib).await.map_err(|_| error::stopped())?;
        let holds: Vec<Held> = messages.iter().map(|m| self.held(&topic, m)).collect();
        let stored = self.ask(|answer| Command::Append { topic, messages, answer }).await?;
        let result = |(s, held): (Stored, Held)| {
            let (recall_handle, transaction_id) = held.named(s.log_offset, &self.0.name, &self.0.key);
            Appended {
                queue_id: s.queue,
                queue_offset: s.queue_offset,
                log_offset: s.log_offset,
                recall_handle,
                transaction_id,
            }
        };
        Ok(AppendReply { results: stored.into_iter().zip(holds).map(result).collect() })
    }

    pub async fn pop(&self, context: &CallContext, request: PopRequest) -> Reply<PopReply> {
        let deadline = Instant::now() + Duration::from_millis(request.poll_ms.max(0) as u64);
        let command = PopCommand {
            group: Group::stored(&request.group),
            topic: Topic::stored(&request.topic),
            filter: TagFilter::parse(&request.tags)?,
            max: request.max_messages.clamp(1, limits::RECEIVE_BATCH_MAX) as usize,
            invisible_ms: if request.auto_renew {
                limits::INVISIBLE_RENEWED_MS
            } else {
                request.invisible_ms
            },
            client: context.client_id.as_str().into(),
            auto_renew: request.auto_renew,
            wait: request.poll_ms > 0,
            attempt_id: match request.attempt_id.as_str() {
                "" => 0,
                id => hash::stable_hash(id),
            },
        };
        loop {
            let popped = self.pop_or_wait(&command, deadline).await?;
            if popped.is_empty() {
                return Ok(PopReply::default());
            }
            let mut release = Release::new(self, &popped);
            let messages = self.deliver(popped, &command).await?;
            release.settle();
            // All of them turned out not to match the filter: back in line for what is left of the time.
            if !messages.is_empty() || Instant::now() >= deadline {
                return Ok(PopReply { messages });
            }
        }
    }

    async fn pop_or_wait(&self, command: &PopCommand, deadline: Instant) -> Reply<Vec<Popped>> {
        let (answer, reply) = oneshot::channel();
        let mut reply = Unread { broker: self, reply };
        let wait = command.wait && Instant::now() < deadline;
        let command = Command::Pop { request: PopCommand { wait, ..command.clone() }, answer };
        self.0.commands.bring(command).await?;
        if !wait {
            return (&mut reply.reply).await.unwrap_or_else(|_| Err(error::stopped()));
        }
        let parked = runtime::net::Parked::begin();
        let answered = tokio::time::timeout_at(deadline, &mut reply.reply).await;
        drop(parked);
        match answered {
            Ok(result) => result.unwrap_or_else(|_| Err(error::stopped())),
            Err(_) => {
                // What was answered in this very moment is not lost.
                reply.reply.close();
                reply.reply.try_recv().unwrap_or_else(|_| Ok(Vec::new()))
            }
        }
    }

    /// Reads bodies and filters exactly. What does not match, or cannot be read, is acknowledged silently.
    async fn deliver(&self, popped: Vec<Popped>, command: &PopCommand) -> Reply<Vec<Delivered>> {
        let reader = self.0.reader.clone();
        let read = move |popped: Vec<Popped>| -> Vec<(Popped, Option<Record>)> {
            popped
                .into_iter()
                .map(|p| (reader.read(p.log_offset, p.size).ok(), p))
                .map(|(r, p)| (p, r))
                .collect()
        };
        let hot = popped.iter().all(|p| self.0.reader.is_hot(p.log_offset));
        let records = if hot {
            read(popped)
        } else {
            tokio::task::spawn_blocking(move || read(popped)).await.map_err(|_| error::stopped())?
        };
        let mut out = Vec::with_capacity(records.len());
        let (mut unwanted, mut later) = (Vec::new(), Vec::new());
        let mut bytes = 0;
        for (p, record) in records {
            match record {
                Some(r) if command.filter.matches(r.property(message::TAGS)) => {
                    bytes += r.body.len();
                    if bytes > ANSWER_MAX_BYTES && !out.is_empty() {
                        later.push(p.receipt);
                        continue;
                    }
                    out.push(self.delivered(r, &p, command.invisible_ms));
                }
                Some(_) => unwanted.push(p.receipt),
                None => {
                    tracing::error!(topic = %p.receipt.topic, offset = p.receipt.offset, "unreadable message skipped");
                    unwanted.push(p.receipt);
                }
            }
        }
        if !unwanted.is_empty() {
            self.ask(|answer| Command::Ack { receipts: unwanted, answer }).await?;
        }
        if !later.is_empty() {
            self.0.commands.bring_now(Command::Release(later));
        }
        Ok(out)
    }

    fn delivered(&self, r: Record, popped: &Popped, invisible_ms: i64) -> Delivered {
        let receipt = &popped.receipt;
        let handle = receipt.encode(&self.0.name, &self.0.key);
        Delivered {
            handle,
            attempt: popped.attempt.unwrap_or(r.reconsume_times + 1),
            invisible_ms,
            topic: receipt.topic.as_str().into(),
            ..plain(r)
        }
    }

    fn receipt(&self, handle: &str, group: &str, topic: &str) -> Result<Receipt, Error> {
        let invalid = |what: String| Error::new(Code::InvalidReceiptHandle, what);
        let receipt =
            Receipt::decode(handle, &self.0.key).map_err(|e| invalid(format!("the receipt handle {e}")))?;
        if receipt.group.as_str() != group {
            return Err(invalid(format!(
                "the receipt handle belongs to group {}, not to {group}",
                receipt.group
            )));
        }
        if receipt.topic.as_str() != topic {
            return Err(invalid(format!(
                "the receipt handle belongs to topic {}, not to {topic}",
                receipt.topic
            )));
        }
        Ok(receipt)
    }

    pub async fn ack(&self, _: &CallContext, request: AckRequest) -> Reply<AckReply> {
        let receipts: Vec<_> =
            request.handles.iter().map(|h| self.receipt(h, &request.group, &request.topic).ok()).collect();
        let valid = receipts.iter().flatten().cloned().collect::<Vec<_>>();
        let standings = match valid.is_empty() {
            true => Vec::new(),
            false => self.ask(|answer| Command::Ack { receipts: valid, answer }).await?,
        };
        let mut standings = standings.into_iter();
        let mut result = |receipt: Option<Receipt>| match receipt.and_then(|_| standings.next()) {
            None => AckResult::AckInvalidHandle,
            Some(Standing::Expired) => AckResult::AckExpired,
            Some(_) => AckResult::AckOk,
        };
        Ok(AckReply { results: receipts.into_iter().map(|r| result(r).into()).collect() })
    }

    pub async fn change_invisible(
        &self,
        _: &CallContext,
        request: ChangeInvisibleRequest,
    ) -> Reply<ChangeInvisibleReply> {
        let receipt = self.receipt(&request.handle, &request.group, &request.topic)?;
        let invisible_ms = request.invisible_ms.clamp(0, limits::INVISIBLE_MAX_MS);
        let changed = self.ask(|answer| Command::ChangeInvisible { receipt, invisible_ms, answer }).await?;
        let changed = changed.ok_or_else(expired)?;
        Ok(ChangeInvisibleReply { handle: changed.encode(&self.0.name, &self.0.key) })
    }

    pub async fn dead_letter(&self, _: &CallContext, request: DeadLetterRequest) -> Reply<DeadLetterReply> {
        let receipt = self.receipt(&request.handle, &request.group, &request.topic)?;
        match self.ask(|answer| Command::DeadLetter { receipt, answer }).await? {
            Standing::Expired => Err(expired()),
            _ => Ok(DeadLetterReply {}),
        }
    }

    pub async fn liveness(&self, _: &CallContext, request: LivenessRequest) -> Reply<LivenessReply> {
        let LivenessRequest { alive, gone } = request;
        self.ask(|answer| Command::Liveness { alive, gone, answer }).await?;
        Ok(LivenessReply {})
    }

    pub async fn read(&self, _: &CallContext, request: ReadRequest) -> Reply<ReadReply> {
        let topic = Topic::stored(&request.topic);
        let (queue, max) = (request.queue_id, request.max_messages.clamp(1, 256) as usize);
        let looked = self.look(move |engine| {
            let bounds = engine.bounds(&topic, queue);
            engine.entries(&topic, queue, request.offset, max).map(|entries| (bounds, entries))
        });
        let (bounds, entries) = looked.await?.map_err(|e| error::of_store(&e))?;
        let reader = self.0.reader.clone();
        let read = move || -> Vec<Delivered> {
            let records = entries.into_iter().filter(|e| !e.is_hole());
            records.filter_map(|e| reader.read(e.log_offset, e.size).ok()).map(plain).collect()
        };
        let messages = tokio::task::spawn_blocking(read).await.map_err(|_| error::stopped())?;
        Ok(ReadReply { messages, min_offset: bounds.min, max_offset: bounds.max })
    }

    /// By key: newest first. By time: oldest first, queue by queue.
    pub async fn query(&self, _: &CallContext, request: QueryRequest) -> Reply<QueryReply> {
        let max = request.max_messages.clamp(1, QUERY_MAX) as usize;
        let to_ms = if request.to_ms > 0 { request.to_ms } else { i64::MAX };
        let (messages, progress) = match request.key.is_empty() {
            true => (self.between(&request.topic, request.from_ms, to_ms, max).await?, None),
            false => self.with_key(&request.topic, &request.key, request.from_ms, to_ms, max).await?,
        };
        let (keys_at, keys_to) = progress.map_or((0, 0), |p| (p.at, p.to));
        Ok(QueryReply { messages: messages.into_iter().map(plain).collect(), keys_at, keys_to })
    }

    async fn with_key(
        &self,
        topic: &str,
        key: &str,
        from_ms: i64,
        to_ms: i64,
        max: usize,
    ) -> Reply<(Vec<Record>, Option<store::keys::Progress>)> {
        let hash = store::keys::key_hash(topic, key);
        let (keys, fresh) = self.look(move |engine| (engine.keys(), engine.new_keys(hash))).await?;
        let (reader, topic, key) = (self.0.reader.clone(), topic.to_owned(), key.to_owned());
        let found = tokio::task::spawn_blocking(move || {
            // More than are wanted: another key may have the same hash.
            let older = keys.find(hash, from_ms, to_ms, 4 * max)?;
            let mut offsets: Vec<u64> = fresh.into_iter().chain(older).collect();
            offsets.sort_unstable_by(|a, b| b.cmp(a));
            offsets.dedup();
            let is_it = |r: &Record| {
                let named = r.property(message::KEYS).is_some_and(|k| k.split(' ').any(|k| k == key));
                let same = named || r.property(message::UNIQ_KEY) == Some(&key);
                same && *r.topic == *topic && (from_ms..=to_ms).contains(&r.store_timestamp_ms)
            };
            let records = offsets.into_iter().filter_map(|at| reader.read_at(at).ok()).filter(is_it);
            Ok((records.take(max).collect(), keys.progress()))
        });
        found.await.map_err(|_| error::stopped())?.map_err(|e| error::of_store(&e))
    }

    async fn between(&self, topic: &str, from_ms: i64, to_ms: i64, max: usize) -> Reply<Vec<Record>> {
        let topic = Topic::stored(topic);
        let all = topic.clone();
        let queues = self.look(move |engine| engine.queues(&all)).await?;
        let mut out = Vec::new();
        for (queue, bounds) in queues {
            let mut low = self.first_at(&topic, queue, (bounds.min, bounds.max), from_ms).await?;
            while low < bounds.max && out.len() < max {
                match self.record_at(&topic, queue, low).await? {
                    Some(r) if r.store_timestamp_ms > to_ms => break,
                    found => out.extend(found),
                }
                low += 1;
            }
        }
        Ok(out)
    }

    /// Offset of the first message of a queue stored at or after a time.
    pub(crate) async fn first_at(
        &self,
        topic: &Topic,
        queue: u32,
        (mut low, mut high): (u64, u64),
        from_ms: i64,
    ) -> Reply<u64> {
        while low < high {
            let middle = low.midpoint(high);
            let early = self.record_at(topic, queue, middle).await?;
            match early.is_none_or(|r| r.store_timestamp_ms < from_ms) {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        Ok(low)
    }

    pub(crate) async fn record_at(&self, topic: &Topic, queue: u32, offset: u64) -> Reply<Option<Record>> {
        let topic = topic.clone();
        let entries = self.look(move |engine| engine.entries(&topic, queue, offset, 1)).await?;
        let entry = entries.map_err(|e| error::of_store(&e))?.into_iter().next().filter(|e| !e.is_hole());
        let Some(entry) = entry else { return Ok(None) };
        let reader = self.0.reader.clone();
        let read = tokio::task::spawn_blocking(move || reader.read(entry.log_offset, entry.size).ok());
        read.await.map_err(|_| error::stopped())
    }

    /// Where the store stands; with `prune`, after what its policy lets go is gone.
    pub async fn store_state(&self, _: &CallContext, request: StoreStateRequest) -> Reply<StoreStateReply> {
        if request.prune {
            self.ask(|answer| Command::Prune { answer }).await?;
        }
        let (state, keys) = self.look(|engine| (engine.state(), engine.keys())).await?;
        let mut bounds = self.ask(Command::Bounds).await?;
        let incoming = 1024 * (INCOMING_MAX_KIB - self.0.incoming.available_permits());
        bounds.push(Bound::bytes("messages on their way into the log", incoming, 1024 * INCOMING_MAX_KIB));
        bounds.extend([self.0.commands.bound(), runtime::bodies::bound()]);
        let progress = keys.progress();
        Ok(StoreStateReply {
            broker: self.0.name.clone(),
            log_start: state.log_start,
            log_end: state.log_end,
            log_flushed: state.log_flushed,
            log_covered: state.log_covered,
            disk_total: state.disk.map_or(0, |d| d.total),
            disk_free: state.disk.map_or(0, |d| d.free),
            held_by: state.held_by.unwrap_or_default(),
            held_from: state.held_from,
            oldest_ms: state.oldest_ms,
            keys_at: progress.map_or(0, |p| p.at),
            keys_to: progress.map_or(0, |p| p.to),
            unreadable: state.unreadable,
            bounds: bounds.iter().map(wire::bound_to_wire).collect(),
        })
    }

    /// Grows with every change of topics and groups.
    pub async fn metadata_version(&self) -> Reply<u64> {
        self.look(|engine| engine.meta().version()).await
    }

    pub async fn metadata(&self, _: &CallContext, _: MetadataRequest) -> Reply<MetadataReply> {
        let broker = self.0.name.clone();
        self.look(move |engine| {
            let meta = engine.meta();
            MetadataReply {
                broker,
                version: meta.version(),
                topics: meta.topics().into_iter().map(wire::topic_to_wire).collect(),
                groups: meta.groups().into_iter().map(wire::group_to_wire).collect(),
            }
        })
        .await
    }

    pub async fn put_metadata(
        &self,
        _: &CallContext,
        request: PutMetadataRequest,
    ) -> Reply<PutMetadataReply> {
        let topics = request.topics.iter().map(|c| Change::PutTopic(wire::topic_from_wire(c)));
        let groups = request.groups.iter().map(|c| Change::PutGroup(wire::group_from_wire(c)));
        let changes: Vec<Change> = topics.chain(groups).collect();
        let version = self.ask(|answer| Command::PutMeta { changes, answer }).await?;
        Ok(PutMetadataReply { version })
    }

    pub async fn group_lag(&self, _: &CallContext, request: GroupLagRequest) -> Reply<GroupLagReply> {
        let group = Group::stored(&request.group);
        let known = self.look(move |engine| {
            engine
                .meta()
                .group(&group)
                .map(|_| engine.lag(&group))
                .ok_or_else(|| Error::group_not_found(&group))
        });
        let queues = known.await??.into_iter().map(|(key, bounds, lag)| QueueLag {
            topic: key.topic.as_str().into(),
            queue_id: key.queue,
            min_offset: bounds.min,
            max_offset: bounds.max,
            committed: lag.committed,
            in_flight: lag.in_flight,
        });
        Ok(GroupLagReply { queues: queues.collect() })
    }
}

fn expired() -> Error {
    let what = "the invisible time of this delivery is over: the message is, or will be, delivered again";
    Error::new(Code::InvalidReceiptHandle, what)
}

fn new_message(m: AppendMessage) -> Result<NewMessage, Error> {
    let unknown = ([0, 0, 0, 0], 0).into();
    Ok(NewMessage {
        queue: m.queue_id,
        body: m.body,
        properties: m.properties,
        sys_flag: m.sys_flag,
        born_timestamp_ms: m.born_timestamp_ms,
        born_host: address::from_wire(&m.born_host).unwrap_or(unknown),
        hold: match (m.half, m.deliver_at_ms) {
            (true, _) => Hold::Half,
            (false, 0) => Hold::Nothing,
            (false, at) => Hold::Until(Timestamp(at)),
        },
    })
}

/// A stored message without a delivery.
pub(crate) fn plain(r: Record) -> Delivered {
    Delivered {
        topic: r.topic.to_string(),
        queue_id: r.queue,
        queue_offset: r.queue_offset,
        properties: r.sent_properties(),
        body: r.body,
        sys_flag: r.sys_flag,
        born_timestamp_ms: r.born_timestamp_ms,
        born_host: address::to_wire(r.born_host),
        store_timestamp_ms: r.store_timestamp_ms,
        store_host: r.store_host.to_string(),
        ..Delivered::default()
    }
}

/// An answer that may come in the moment in which its caller goes away: what it holds is given back.
struct Unread<'a> {
    broker: &'a Broker,
    reply: oneshot::Receiver<Result<Vec<Popped>, Error>>,
}

impl Drop for Unread<'_> {
    fn drop(&mut self) {
        self.reply.close();
        if let Ok(Ok(popped)) = self.reply.try_recv()
            && !popped.is_empty()
        {
            let receipts = popped.into_iter().map(|p| p.receipt).collect();
            self.broker.0.commands.bring_now(Command::Release(receipts));
        }
    }
}

/// Gives messages back if the call that popped them is dropped before it returns.
struct Release<'a> {
    broker: &'a Broker,
    receipts: Vec<Receipt>,
}

impl<'a> Release<'a> {
    fn new(broker: &'a Broker, popped: &[Popped]) -> Self {
        Self { broker, receipts: popped.iter().map(|p| p.receipt.clone()).collect() }
    }

    fn settle(&mut self) {
        self.receipts.clear();
    }
}

impl Drop for Release<'_> {
    fn drop(&mut self) {
        if !self.receipts.is_empty() {
            self.broker.0.commands.bring_now(Command::Release(std::mem::take(&mut self.receipts)));
        }
    }
}
