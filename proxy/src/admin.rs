//! What `ferry` asks: topics, groups, lag, reading without a group. Writes go to every broker of the cluster.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use apis::admin::ferry_admin_server::FerryAdmin;
use apis::admin::*;
use apis::brokers::{Brokers, NameServers};
use apis::context::CallContext;
use apis::convert::metadata as wire;
use apis::internal::{
    DecideRequest, GroupLagRequest as BrokerLagRequest, PutMetadataRequest, QueryRequest, ReadRequest,
    RecallRequest, ResetGroupRequest as BrokerResetRequest, ScheduledRequest,
    StoreStateRequest as BrokerStateRequest, TransactionsRequest,
};
use apis::status::Error;
use apis::v2::Code;
use model::{Group, GroupConfig, RecallHandle, Sealed, Topic, TopicConfig, TransactionId, limits};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::service::Front;

pub struct Admin<B, N>(pub Arc<Front<B, N>>);

impl<B, N> Clone for Admin<B, N> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// Durations of a back-off.
const BACKOFF_STEPS_MAX: usize = 100;
/// Between two looks of `tail` at queues that had nothing new.
const TAIL_PAUSE: Duration = Duration::from_millis(100);

/// A full name as an operator writes it: checked like a client's.
fn topic(name: &str) -> Result<Topic, Error> {
    let (namespace, name) =
        if name.starts_with('%') { ("", name) } else { name.split_once('%').unwrap_or(("", name)) };
    Topic::new(namespace, name).map_err(|e| Error::topic(&e))
}

fn group(name: &str) -> Result<Group, Error> {
    let (namespace, name) = name.split_once('%').unwrap_or(("", name));
    Group::new(namespace, name).map_err(|e| Error::group(&e))
}

/// A name that may be left out.
fn optional(name: &str, check: impl Fn(&str) -> Result<String, Error>) -> Result<String, Error> {
    if name.is_empty() { Ok(String::new()) } else { check(name) }
}

fn exists(what: &str, name: &str) -> Error {
    Error::new(
        Code::PreconditionFailed,
        format!("{what} {name} exists already; delete it first, or choose another name"),
    )
}

impl<B: Brokers, N: NameServers> Admin<B, N> {
    async fn put(&self, request: PutMetadataRequest) -> Result<(), Error> {
        self.0.routes.refresh().await.ok();
        self.0.routes.put(&CallContext::internal(), request).await
    }
}

#[tonic::async_trait]
impl<B: Brokers, N: NameServers> FerryAdmin for Admin<B, N> {
    async fn list_topics(&self, _: Request<ListTopicsRequest>) -> Result<Response<ListTopicsReply>, Status> {
        let view = self.0.routes.refresh().await?;
        let topics = view.topics().into_values().filter(|t| !t.deleted).map(wire::topic_to_wire).collect();
        Ok(Response::new(ListTopicsReply { topics }))
    }

    async fn describe_topic(
        &self,
        r: Request<DescribeTopicRequest>,
    ) -> Result<Response<DescribeTopicReply>, Status> {
        let topic = topic(&r.into_inner().topic)?;
        let view = self.0.routes.refresh().await?;
        let config = view.topic(&topic).ok_or_else(|| Error::topic_not_found(&topic))?;
        let mut queues = Vec::new();
        for (broker, own) in view.route(&topic) {
            for queue_id in 0..own.queues {
                let request =
                    ReadRequest { topic: topic.as_str().into(), queue_id, offset: u64::MAX, max_messages: 1 };
                let read = self.0.brokers.read(&broker.name, &CallContext::internal(), request).await?;
                queues.push(QueueState {
                    broker: broker.name.clone(),
                    queue_id,
                    min_offset: read.min_offset,
                    max_offset: read.max_offset,
                });
            }
        }
        Ok(Response::new(DescribeTopicReply { topic: Some(wire::topic_to_wire(config)), queues }))
    }

    async fn put_topic(&self, r: Request<PutTopicRequest>) -> Result<Response<PutTopicReply>, Status> {
        let PutTopicRequest { topic: config, create_only } = r.into_inner();
        let mut config =
            config.ok_or_else(|| Error::new(Code::BadRequest, "the topic's record is missing"))?;
        let topic = topic(&config.name)?;
        if config.queues == 0 || config.queues > limits::QUEUES_MAX || config.types.is_empty() {
            let what =
                format!("a topic has 1 to {} queues and at least one message type", limits::QUEUES_MAX);
            return Err(Error::new(Code::BadRequest, what).into());
        }
        let view = self.0.routes.refresh().await?;
        let known = view.topic(&topic);
        if create_only && known.is_some() {
            return Err(exists("topic", topic.as_str()).into());
        }
        if known.is_some_and(|k| k.queues > config.queues) {
            let what = "a topic's queues cannot be taken away: their messages would be out of reach";
            return Err(Error::new(Code::BadRequest, what).into());
        }
        config.version = view.topic_record(&topic).map_or(0, |k| k.version) + 1;
        config.deleted = false;
        self.put(PutMetadataRequest { topics: vec![config], ..Default::default() }).await?;
        Ok(Response::new(PutTopicReply {}))
    }

    async fn delete_topic(
        &self,
        r: Request<DeleteTopicRequest>,
    ) -> Result<Response<DeleteTopicReply>, Status> {
        let topic = topic(&r.into_inner().topic)?;
        let view = self.0.routes.refresh().await?;
        let known = view.topic(&topic).ok_or_else(|| Error::topic_not_found(&topic))?;
        let gone = TopicConfig { version: known.version + 1, deleted: true, ..known.clone() };
        self.put(PutMetadataRequest { topics: vec![wire::topic_to_wire(&gone)], ..Default::default() })
            .await?;
        Ok(Response::new(DeleteTopicReply {}))
    }

    async fn list_groups(&self, _: Request<ListGroupsRequest>) -> Result<Response<ListGroupsReply>, Status> {
        let view = self.0.routes.refresh().await?;
        let groups = view.groups().into_values().filter(|g| !g.deleted).map(wire::group_to_wire).collect();
        Ok(Response::new(ListGroupsReply { groups }))
    }

    async fn put_group(&self, r: Request<PutGroupRequest>) -> Result<Response<PutGroupReply>, Status> {
        let PutGroupRequest { group: config, create_only } = r.into_inner();
        let mut config =
            config.ok_or_else(|| Error::new(Code::BadRequest, "the group's record is missing"))?;
        let group = group(&config.name)?;
        if config.max_attempts == 0 {
            return Err(Error::new(Code::BadRequest, "a message needs at least one delivery attempt").into());
        }
        if let Some(b) = &config.backoff {
            let steps = b.steps.len() <= BACKOFF_STEPS_MAX && b.steps.iter().all(|ms| *ms >= 0);
            let grows = b.initial > 0 && b.initial <= b.max && b.multiplier >= 100;
            if !(steps && (grows || !b.steps.is_empty())) {
                let what = format!(
                    "a back-off is 1 to {BACKOFF_STEPS_MAX} durations, or a first one that grows up to a longer one"
                );
                return Err(Error::new(Code::BadRequest, what).into());
            }
        }
        let view = self.0.routes.refresh().await?;
        let known = view.group(&group);
        if create_only && known.is_some() {
            return Err(exists("consumer group", group.as_str()).into());
        }
        config.version = view.group_record(&group).map_or(0, |k| k.version) + 1;
        config.deleted = false;
        self.put(PutMetadataRequest { groups: vec![config], ..Default::default() }).await?;
        Ok(Response::new(PutGroupReply {}))
    }

    async fn delete_group(
        &self,
        r: Request<DeleteGroupRequest>,
    ) -> Result<Response<DeleteGroupReply>, Status> {
        let group = group(&r.into_inner().group)?;
        let view = self.0.routes.refresh().await?;
        let known = view.group(&group).ok_or_else(|| Error::group_not_found(&group))?;
        let gone = GroupConfig { version: known.version + 1, deleted: true, ..known.clone() };
        self.put(PutMetadataRequest { groups: vec![wire::group_to_wire(&gone)], ..Default::default() })
            .await?;
        Ok(Response::new(DeleteGroupReply {}))
    }

    async fn group_lag(&self, r: Request<GroupLagRequest>) -> Result<Response<GroupLagReply>, Status> {
        let group = group(&r.into_inner().group)?;
        let view = self.0.routes.refresh().await?;
        view.group(&group).ok_or_else(|| Error::group_not_found(&group))?;
        let mut queues = Vec::new();
        for broker in view.brokers.keys() {
            let request = BrokerLagRequest { group: group.as_str().into() };
            let reply = self.0.brokers.group_lag(broker, &CallContext::internal(), request).await?;
            queues.extend(
                reply.queues.into_iter().map(|lag| BrokerLag { broker: broker.clone(), lag: Some(lag) }),
            );
        }
        Ok(Response::new(GroupLagReply { queues }))
    }

    async fn find_messages(
        &self,
        r: Request<FindMessagesRequest>,
    ) -> Result<Response<FindMessagesReply>, Status> {
        let r = r.into_inner();
        let topic = topic(&r.topic)?;
        let view = self.0.routes.refresh().await?;
        view.topic(&topic).ok_or_else(|| Error::topic_not_found(&topic))?;
        let (mut messages, mut incomplete) = (Vec::new(), false);
        for (broker, _) in view.route(&topic) {
            let request = QueryRequest {
                topic: topic.as_str().into(),
                key: r.key.clone(),
                from_ms: r.from_ms,
                to_ms: r.to_ms,
                max_messages: r.max_messages,
            };
            let reply = self.0.brokers.query(&broker.name, &CallContext::internal(), request).await?;
            incomplete |= reply.keys_at < reply.keys_to;
            let found = reply.messages.into_iter().map(Some);
            messages.extend(found.map(|message| TailReply { broker: broker.name.clone(), message }));
        }
        let stored = |m: &TailReply| m.message.as_ref().map_or(0, |m| m.store_timestamp_ms);
        match r.key.is_empty() {
            true => messages.sort_by_key(stored),
            false => messages.sort_by_key(|m| std::cmp::Reverse(stored(m))),
        }
        messages.truncate(r.max_messages.max(1) as usize);
        Ok(Response::new(FindMessagesReply { messages, incomplete }))
    }

    async fn list_scheduled(
        &self,
        r: Request<ListScheduledRequest>,
    ) -> Result<Response<ListScheduledReply>, Status> {
        let ListScheduledRequest { topic: name, from_ms, max_messages } = r.into_inner();
        let name = optional(&name, |name| topic(name).map(|t| t.as_str().to_owned()))?;
        let view = self.0.routes.refresh().await?;
        let mut out = ListScheduledReply::default();
        for broker in view.brokers.keys() {
            let request = ScheduledRequest { topic: name.clone(), from_ms, from_id: 0, max_messages };
            let reply = self.0.brokers.scheduled(broker, &CallContext::internal(), request).await?;
            out.pending += reply.pending;
            let on = |message| ScheduledOn { broker: broker.clone(), message: Some(message) };
            out.messages.extend(reply.messages.into_iter().map(on));
        }
        out.messages.sort_by_key(|m| m.message.as_ref().map_or(0, |m| m.due_ms));
        out.messages.truncate(max_messages.max(1) as usize);
        Ok(Response::new(out))
    }

    async fn cancel_scheduled(
        &self,
        r: Request<CancelScheduledRequest>,
    ) -> Result<Response<CancelScheduledReply>, Status> {
        let CancelScheduledRequest { topic: name, recall_handle } = r.into_inner();
        let name = topic(&name)?;
        let bad = |what: String| Error::new(Code::BadRequest, what);
        let broker = self.0.broker_named(RecallHandle::broker_of(&recall_handle), "recall handle", bad)?;
        let request = RecallRequest { topic: name.as_str().into(), handle: recall_handle };
        let reply = self.0.brokers.recall(&broker, &CallContext::internal(), request).await?;
        Ok(Response::new(CancelScheduledReply { message_id: reply.message_id }))
    }

    async fn list_transactions(
        &self,
        r: Request<ListTransactionsRequest>,
    ) -> Result<Response<ListTransactionsReply>, Status> {
        let name = optional(&r.into_inner().topic, |name| topic(name).map(|t| t.as_str().to_owned()))?;
        let view = self.0.routes.refresh().await?;
        let mut transactions = Vec::new();
        for broker in view.brokers.keys() {
            let request = TransactionsRequest { topic: name.clone() };
            let reply = self.0.brokers.transactions(broker, &CallContext::internal(), request).await?;
            let on = |transaction| TransactionOn { broker: broker.clone(), transaction: Some(transaction) };
            transactions.extend(reply.transactions.into_iter().map(on));
        }
        Ok(Response::new(ListTransactionsReply { transactions }))
    }

    async fn resolve_transaction(
        &self,
        r: Request<ResolveTransactionRequest>,
    ) -> Result<Response<ResolveTransactionReply>, Status> {
        let ResolveTransactionRequest { topic: name, transaction_id, commit } = r.into_inner();
        let name = topic(&name)?;
        let invalid = |what: String| Error::new(Code::InvalidTransactionId, what);
        let named = TransactionId::broker_of(&transaction_id);
        let broker = self.0.broker_named(named, "transaction id", invalid)?;
        let request = DecideRequest { topic: name.as_str().into(), transaction_id, commit };
        self.0.brokers.decide(&broker, &CallContext::internal(), request).await?;
        Ok(Response::new(ResolveTransactionReply {}))
    }

    async fn reset_group(&self, r: Request<ResetGroupRequest>) -> Result<Response<ResetGroupReply>, Status> {
        let ResetGroupRequest { group: name, topic: of, to_ms, dry_run } = r.into_inner();
        let name = group(&name)?;
        let of = optional(&of, |name| topic(name).map(|t| t.as_str().to_owned()))?;
        let view = self.0.routes.refresh().await?;
        view.group(&name).ok_or_else(|| Error::group_not_found(&name))?;
        let mut queues = Vec::new();
        for broker in view.brokers.keys() {
            let (group, topic) = (name.as_str().into(), of.clone());
            let request = BrokerResetRequest { group, topic, to_ms, dry_run };
            let reply = self.0.brokers.reset_group(broker, &CallContext::internal(), request).await?;
            let on = |queue| ResetOn { broker: broker.clone(), queue: Some(queue) };
            queues.extend(reply.queues.into_iter().map(on));
        }
        Ok(Response::new(ResetGroupReply { queues }))
    }

    async fn store_state(&self, r: Request<StoreStateRequest>) -> Result<Response<StoreStateReply>, Status> {
        let prune = r.into_inner().prune;
        let view = self.0.routes.refresh().await?;
        let mut brokers = Vec::new();
        for broker in view.brokers.keys() {
            let request = BrokerStateRequest { prune };
            brokers.push(self.0.brokers.store_state(broker, &CallContext::internal(), request).await?);
        }
        let bounds = [self.0.sessions.bound(), runtime::bodies::bound()];
        let bounds = bounds.iter().map(wire::bound_to_wire).collect();
        Ok(Response::new(StoreStateReply { brokers, bounds }))
    }

    type TailStream = Pin<Box<dyn Stream<Item = Result<TailReply, Status>> + Send>>;

    async fn tail(&self, r: Request<TailRequest>) -> Result<Response<Self::TailStream>, Status> {
        let request = r.into_inner();
        let topic = topic(&request.topic)?;
        self.0.view_with_topic(&topic, &CallContext::internal()).await?;
        let (out, stream) = mpsc::channel(64);
        let admin = self.clone();
        // The first look happens before the answer: what is sent after it is seen.
        let mut at = HashMap::new();
        admin.look(&topic, &mut at, request.from_beginning, None).await?;
        tokio::spawn(async move {
            let draining = admin.0.draining.clone();
            tokio::select! {
                () = draining.cancelled() => {}
                () = out.closed() => {}
                () = admin.follow(&topic, at, &out) => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

type TailSender = mpsc::Sender<Result<TailReply, Status>>;

impl<B: Brokers, N: NameServers> Admin<B, N> {
    async fn follow(&self, topic: &Topic, mut at: HashMap<(String, u32), u64>, out: &TailSender) {
        loop {
            match self.look(topic, &mut at, true, Some(out)).await {
                Ok(0) => tokio::time::sleep(TAIL_PAUSE).await,
                Ok(_) => {}
                Err(error) => return drop(out.send(Err(error.into())).await),
            }
        }
    }

    /// Reads every queue from where it stood; a queue seen for the first time begins at its end, or its beginning.
    async fn look(
        &self,
        topic: &Topic,
        at: &mut HashMap<(String, u32), u64>,
        from_beginning: bool,
        out: Option<&TailSender>,
    ) -> Result<usize, Error> {
        let view = self.0.routes.view();
        let mut count = 0;
        for (broker, config) in view.route(topic) {
            for queue_id in 0..config.queues {
                let key = (broker.name.clone(), queue_id);
                let offset = at.get(&key).copied();
                let start = offset.unwrap_or(if out.is_some() { 0 } else { u64::MAX });
                let request =
                    ReadRequest { topic: topic.as_str().into(), queue_id, offset: start, max_messages: 64 };
                let read = self.0.brokers.read(&broker.name, &CallContext::internal(), request).await?;
                let Some(out) = out else {
                    at.insert(key, if from_beginning { read.min_offset } else { read.max_offset });
                    continue;
                };
                for message in read.messages {
                    at.insert(key.clone(), message.queue_offset + 1);
                    count += 1;
                    let reply = TailReply { broker: broker.name.clone(), message: Some(message) };
                    if out.send(Ok(reply)).await.is_err() {
                        return Ok(count);
                    }
                }
            }
        }
        Ok(count)
    }
}
