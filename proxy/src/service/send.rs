//! SendMessage: one or many messages of one topic. Those for one broker are stored together; all of them, unless message
//! groups lead to several brokers.

use std::sync::atomic::Ordering;

use apis::brokers::{Brokers, NameServers};
use apis::convert::send::{self, Outgoing};
use apis::internal::{AppendMessage, AppendRequest, Appended};
use apis::status::{Error, ok, summary};
use apis::v2::*;
use model::{MessageType, TopicConfig};

use super::Front;
use crate::call::Call;
use crate::routes::BrokerView;

impl<B: Brokers, N: NameServers> Front<B, N> {
    pub(super) async fn send(&self, call: Call, r: SendMessageRequest) -> Result<SendMessageResponse, Error> {
        let first =
            r.messages.first().ok_or_else(|| Error::new(Code::MessageCorrupted, "no message to send"))?;
        let resource = first.topic.clone();
        if r.messages.iter().any(|m| m.topic != resource) {
            let what = "the messages of one call must have one topic; send them in one call per topic";
            return Err(Error::new(Code::MessageCorrupted, what));
        }
        let now = self.clock.now().0;
        let outgoing: Vec<Outgoing> = r
            .messages
            .into_iter()
            .map(|m| send::message(m, &call.namespace, call.peer, now, self.delay_max_ms))
            .collect::<Result<_, _>>()?;
        let topic = outgoing[0].topic.clone();
        let context = call.context();
        let view = self.view_with_topic(&topic, &context).await?;
        let route = view.route(&topic);
        let config = view.topic(&topic).ok_or_else(|| Error::topic_not_found(&topic))?;
        outgoing.iter().try_for_each(|o| check_kind(o.kind, config))?;
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let mut parts: Vec<Part> = Vec::with_capacity(1);
        let count = outgoing.len();
        for (i, o) in outgoing.into_iter().enumerate() {
            let (broker, queue) = place(&route, o.group, turn);
            let message = AppendMessage { queue_id: queue, ..o.message };
            let part = match parts.iter_mut().position(|p| p.broker == broker) {
                Some(at) => &mut parts[at],
                None => {
                    parts.push(Part {
                        broker,
                        sent: Vec::with_capacity(count),
                        messages: Vec::with_capacity(count),
                    });
                    parts.last_mut().expect("just pushed")
                }
            };
            part.sent.push((i, o.message_id));
            part.messages.push(message);
        }
        let alone = parts.len() == 1;
        let mut entries = vec![SendResultEntry::default(); count];
        for Part { broker, sent, messages } in parts {
            let request = AppendRequest { topic: topic.as_str().into(), messages };
            let reply = self.brokers.append(&route[broker].0.name, &context, request).await;
            match reply {
                Ok(reply) => {
                    for ((i, id), stored) in sent.into_iter().zip(reply.results) {
                        entries[i] = entry(id, stored);
                    }
                }
                Err(error) if alone => return Err(error),
                Err(error) => {
                    for (i, message_id) in sent {
                        let status = Some(error.status());
                        entries[i] = SendResultEntry { status, message_id, ..Default::default() };
                    }
                }
            }
        }
        let status = if alone { ok() } else { summary(entries.iter().map(|e| &e.status)) };
        Ok(SendMessageResponse { status: Some(status), entries })
    }
}

/// What goes to one broker, by its number in the route.
struct Part {
    broker: usize,
    sent: Vec<(usize, String)>,
    messages: Vec<AppendMessage>,
}

/// The broker, by its number in the route, and its queue: always the same for a message group while the route is.
fn place(route: &[(&BrokerView, &TopicConfig)], group: Option<u64>, turn: usize) -> (usize, u32) {
    let Some(group) = group else {
        let broker = turn % route.len();
        return (broker, (turn / route.len()) as u32 % route[broker].1.queues);
    };
    let total: u64 = route.iter().map(|(_, own)| u64::from(own.queues)).sum();
    let mut queue = group % total.max(1);
    for (broker, (_, own)) in route.iter().enumerate() {
        match queue.checked_sub(own.queues.into()) {
            Some(rest) => queue = rest,
            None => return (broker, queue as u32),
        }
    }
    (0, 0)
}

fn entry(message_id: String, stored: Appended) -> SendResultEntry {
    SendResultEntry {
        status: Some(ok()),
        message_id,
        transaction_id: stored.transaction_id,
        offset: stored.queue_offset as i64,
        recall_handle: stored.recall_handle,
    }
}

fn check_kind(kind: MessageType, config: &TopicConfig) -> Result<(), Error> {
    if !config.types.contains(&kind) {
        let takes: Vec<&str> = config.types.iter().map(|t| t.name()).collect();
        let what = format!(
            "topic {} takes {} messages, this one is {}",
            config.topic,
            takes.join(", "),
            kind.name()
        );
        return Err(Error::new(Code::MessagePropertyConflictWithType, what));
    }
    if matches!(kind, MessageType::Lite | MessageType::Priority) {
        let what = format!("{} messages are not part of this version of FerryMQ", kind.name());
        return Err(Error::new(Code::NotImplemented, what));
    }
    Ok(())
}
