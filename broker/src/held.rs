//! The broker's calls about messages that wait: scheduled ones and half messages. And where a group goes on.

use std::time::Duration;

use apis::brokers::Reply;
use apis::context::CallContext;
use apis::internal::*;
use apis::status::Error;
use apis::v2::Code;
use model::message::{self, property};
use model::{Group, RecallHandle, ReceiptKey, Sealed, Timestamp, Topic, TransactionId};
use store::change::Change;
use store::engine::{Ended, Recall};
use store::log::record::Record;
use store::timer::TimerKey;
use store::txn::{Decision, Half};
use store::{Hold, NewMessage};
use tokio::sync::oneshot;

use crate::command::Command;
use crate::error;
use crate::handle::{Broker, plain};

/// Messages of one page.
const PAGE_MAX: usize = 1000;

/// What the sender of a message that waits is told besides its place.
pub(crate) enum Held {
    Nothing,
    Timer { topic: Topic, due: Timestamp, message_id: String },
    Half { topic: Topic },
}

impl Held {
    /// Recall handle and transaction id.
    pub fn named(self, id: u64, broker: &str, key: &ReceiptKey) -> (String, String) {
        match self {
            Held::Nothing => Default::default(),
            Held::Timer { topic, due, message_id } => {
                (RecallHandle { topic, due, id, message_id }.encode(broker, key), String::new())
            }
            Held::Half { topic } => (String::new(), TransactionId { topic, id }.encode(broker, key)),
        }
    }
}

fn recall_handle(r: &Record, key: TimerKey) -> RecallHandle {
    let text = |key| r.property(key).unwrap_or_default();
    RecallHandle {
        topic: Topic::stored(text(message::REAL_TOPIC)),
        due: key.due,
        id: key.id,
        message_id: text(message::UNIQ_KEY).to_owned(),
    }
}

/// A message that waits, as its consumer would see it.
fn waiting(r: Record) -> Delivered {
    let topic = r.property(message::REAL_TOPIC).unwrap_or_default().to_owned();
    let queue_id = r.property(message::REAL_QUEUE).and_then(|q| q.parse().ok()).unwrap_or(0);
    Delivered { topic, queue_id, ..plain(r) }
}

impl Broker {
    pub(crate) fn held(&self, topic: &Topic, m: &NewMessage) -> Held {
        let topic = || topic.clone();
        match m.hold {
            Hold::Nothing => Held::Nothing,
            Hold::Until(due) => {
                let message_id = property(&m.properties, message::UNIQ_KEY).unwrap_or_default().to_owned();
                Held::Timer { topic: topic(), due, message_id }
            }
            Hold::Half => Held::Half { topic: topic() },
        }
    }

    pub async fn decide(&self, _: &CallContext, request: DecideRequest) -> Reply<DecideReply> {
        let invalid = |what: String| Error::new(Code::InvalidTransactionId, what);
        let named = TransactionId::decode(&request.transaction_id, &self.0.key)
            .map_err(|e| invalid(format!("the transaction id {e}")))?;
        if named.topic.as_str() != request.topic {
            return Err(invalid(format!(
                "the transaction belongs to topic {}, not to {}",
                named.topic, request.topic
            )));
        }
        let decision = if request.commit { Decision::Committed } else { Decision::RolledBack };
        match self.ask(|answer| Command::Decide { id: named.id, decision, answer }).await? {
            Ended::Done => Ok(DecideReply {}),
            Ended::Otherwise(before) => {
                let was = if before == Decision::Committed { "committed" } else { "rolled back" };
                let what = format!("the transaction was {was} before; a decision is final");
                Err(Error::new(Code::PreconditionFailed, what))
            }
            Ended::Unknown => Err(invalid(
                "the transaction is not known here: decided long ago, or its topic is no more".into(),
            )),
        }
    }

    pub async fn recall(&self, _: &CallContext, request: RecallRequest) -> Reply<RecallReply> {
        let bad = |what: String| Error::new(Code::BadRequest, what);
        let handle = RecallHandle::decode(&request.handle, &self.0.key)
            .map_err(|e| bad(format!("the recall handle {e}")))?;
        if handle.topic.as_str() != request.topic {
            return Err(bad(format!(
                "the recall handle belongs to topic {}, not to {}",
                handle.topic, request.topic
            )));
        }
        let key = TimerKey { due: handle.due, id: handle.id };
        match self.ask(|answer| Command::Recall { key, answer }).await? {
            Recall::Recalled | Recall::Before => Ok(RecallReply { message_id: handle.message_id }),
            Recall::TooLate => {
                let what = "the message cannot be recalled: its time has come, it is delivered";
                Err(Error::new(Code::PreconditionFailed, what))
            }
        }
    }

    pub async fn checks(&self, _: &CallContext, request: ChecksRequest) -> Reply<ChecksReply> {
        let (answer, reply) = oneshot::channel();
        let topics = request.topics.iter().map(|t| Topic::stored(t)).collect();
        let wait = Duration::from_millis(request.poll_ms.max(0) as u64);
        self.bring(Command::Checks { topics, answer }).await?;
        let parked = runtime::net::Parked::begin();
        let answered = tokio::time::timeout(wait, reply).await;
        drop(parked);
        let Ok(answered) = answered else { return Ok(ChecksReply::default()) };
        let checks = answered.unwrap_or_else(|_| Err(error::stopped()))?;
        let check = |(id, r): (u64, Record)| {
            let message = waiting(r);
            let named = TransactionId { topic: Topic::stored(&message.topic), id };
            Check { transaction_id: named.encode(&self.0.name, &self.0.key), message: Some(message) }
        };
        Ok(ChecksReply { checks: checks.into_iter().map(check).collect() })
    }

    pub async fn scheduled(&self, _: &CallContext, request: ScheduledRequest) -> Reply<ScheduledReply> {
        let max = (request.max_messages as usize).clamp(1, PAGE_MAX);
        let mut from = Some(TimerKey { due: Timestamp(request.from_ms), id: request.from_id });
        let mut messages = Vec::new();
        let pending = self.look(|engine| engine.timers_pending()).await?;
        while let Some(at) = from.filter(|_| messages.len() < max) {
            let (rows, next) =
                self.look(move |engine| engine.scheduled(at)).await?.map_err(|e| error::of_store(&e))?;
            from = next;
            for (key, held) in rows {
                if messages.len() == max {
                    from = Some(key);
                    break;
                }
                // A row whose message has just been delivered is passed over.
                let Ok(record) = self.0.reader.read(held.log_offset, held.size) else { continue };
                let handle = recall_handle(&record, key);
                if !request.topic.is_empty() && handle.topic.as_str() != request.topic {
                    continue;
                }
                messages.push(ScheduledMessage {
                    due_ms: key.due.0,
                    recall_handle: handle.encode(&self.0.name, &self.0.key),
                    message: Some(waiting(record)),
                });
            }
        }
        let (next_ms, next_id) = from.map_or((0, 0), |key| (key.due.0, key.id));
        Ok(ScheduledReply { messages, next_ms, next_id, pending })
    }

    pub async fn transactions(
        &self,
        _: &CallContext,
        request: TransactionsRequest,
    ) -> Reply<TransactionsReply> {
        let mut open = self.look(|engine| engine.open_transactions()).await?;
        open.retain(|(_, half)| request.topic.is_empty() || half.topic.as_str() == request.topic);
        open.truncate(PAGE_MAX);
        let transaction = |(id, half): (u64, Half)| {
            let record = self.0.reader.read(half.held.log_offset, half.held.size).ok()?;
            let parked = half.is_parked();
            let named = TransactionId { topic: half.topic, id };
            Some(OpenTransaction {
                transaction_id: named.encode(&self.0.name, &self.0.key),
                message: Some(waiting(record)),
                check_at_ms: if parked { 0 } else { half.check_at.0 },
                checks: half.checks,
            })
        };
        Ok(TransactionsReply { transactions: open.into_iter().filter_map(transaction).collect() })
    }

    /// The group goes on at the first message stored at or after a time. What is in flight is forgotten.
    pub async fn reset_group(&self, _: &CallContext, request: ResetGroupRequest) -> Reply<ResetGroupReply> {
        let group = Group::stored(&request.group);
        let (name, only) = (group.clone(), Topic::stored(&request.topic));
        let looked = self.look(move |engine| {
            engine.meta().group(&name).ok_or_else(|| Error::group_not_found(&name))?;
            let mut queues = engine.lag(&name);
            queues.retain(|(key, ..)| only.as_str().is_empty() || key.topic == only);
            // Also queues that it has not read yet.
            if !only.as_str().is_empty() {
                let read: Vec<u32> = queues.iter().map(|(key, ..)| key.queue).collect();
                for (queue, bounds) in
                    engine.queues(&only).into_iter().filter(|(queue, _)| !read.contains(queue))
                {
                    let key = store::change::CursorKey { group: name.clone(), topic: only.clone(), queue };
                    let lag = store::pop::Lag { committed: bounds.min, next: bounds.min, in_flight: 0 };
                    queues.push((key, bounds, lag));
                }
            }
            Ok::<_, Error>(queues)
        });
        let mut reply = ResetGroupReply::default();
        let mut changes = Vec::new();
        for (key, bounds, lag) in looked.await?? {
            let to = self.first_at(&key.topic, key.queue, (bounds.min, bounds.max), request.to_ms).await?;
            reply.queues.push(QueueReset {
                topic: key.topic.as_str().into(),
                queue_id: key.queue,
                from: lag.committed,
                to,
            });
            changes.push(Change::Seek { cursor: key, next: to });
        }
        if !request.dry_run && !changes.is_empty() {
            self.ask(|answer| Command::PutMeta { changes, answer }).await?;
        }
        Ok(reply)
    }
}
