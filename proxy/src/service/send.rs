//! SendMessage: one or many messages of one topic, stored together.

use std::sync::atomic::Ordering;

use apis::brokers::{Brokers, NameServers};
use apis::convert::send::{self, Outgoing};
use apis::internal::AppendRequest;
use apis::status::{Error, ok};
use apis::v2::*;
use model::{MessageType, TopicConfig};

use super::Front;
use crate::call::Call;

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
            .map(|m| send::message(m, &call.namespace, call.peer, now))
            .collect::<Result<_, _>>()?;
        let topic = outgoing[0].topic.clone();
        let context = call.context();
        let view = self.view_with_topic(&topic, &context).await?;
        let route = view.route(&topic);
        let config = view.topic(&topic).ok_or_else(|| Error::topic_not_found(&topic))?;
        outgoing.iter().try_for_each(|o| check_kind(o.kind, config))?;
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let (broker, own) = route[turn % route.len()];
        let queue = (turn / route.len()) as u32 % own.queues;
        let (ids, messages) = outgoing
            .into_iter()
            .map(|mut o| {
                o.message.queue_id = queue;
                (o.message_id, o.message)
            })
            .unzip::<_, _, Vec<_>, Vec<_>>();
        let request = AppendRequest { topic: topic.as_str().into(), messages };
        let reply = self.brokers.append(&broker.name, &context, request).await?;
        let entries = ids.into_iter().zip(reply.results).map(|(message_id, stored)| SendResultEntry {
            status: Some(ok()),
            message_id,
            transaction_id: String::new(),
            offset: stored.queue_offset as i64,
            recall_handle: String::new(),
        });
        Ok(SendMessageResponse { status: Some(ok()), entries: entries.collect() })
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
    if kind != MessageType::Normal {
        let what = format!("{} messages are not part of this version of FerryMQ", kind.name());
        return Err(Error::new(Code::NotImplemented, what));
    }
    Ok(())
}
