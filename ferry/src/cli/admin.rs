//! `ferry topic …` and `ferry group …`.

use apis::admin::*;
use apis::internal::{GroupConfig, TopicConfig};
use model::MessageType;
use serde_json::{Value, json};

use super::client::{self, failed};
use super::{GroupCommand, Order, TopicCommand, TopicType, output};

fn types(kind: TopicType) -> Vec<i32> {
    let one = |t: MessageType| vec![t as i32];
    match kind {
        TopicType::Normal => one(MessageType::Normal),
        TopicType::Fifo => one(MessageType::Fifo),
        TopicType::Delay => one(MessageType::Delay),
        TopicType::Transaction => one(MessageType::Transaction),
        TopicType::Mixed => MessageType::MIXED.map(|t| t as i32).to_vec(),
    }
}

fn type_name(config: &TopicConfig) -> String {
    let mixed = MessageType::MIXED.map(|t| t as i32);
    if config.types == mixed {
        return "MIXED".into();
    }
    let names = config.types.iter().filter_map(|t| MessageType::from_number(*t)).map(MessageType::name);
    names.collect::<Vec<_>>().join(",")
}

pub async fn topic(command: TopicCommand) -> anyhow::Result<()> {
    match command {
        TopicCommand::Create { topic, kind, queues, remote } => {
            let config =
                TopicConfig { name: topic.clone(), queues, types: types(kind), ..Default::default() };
            let shown = type_name(&config);
            let request = PutTopicRequest { topic: Some(config), create_only: true };
            client::admin(&remote.endpoint).await?.put_topic(request).await.map_err(failed)?;
            let fields = [("topic", json!(topic)), ("type", json!(shown)), ("queues", json!(queues))];
            output::object(remote.output, &fields);
        }
        TopicCommand::List { remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let reply = admin.list_topics(ListTopicsRequest {}).await.map_err(failed)?.into_inner();
            let row = |t: &TopicConfig| vec![json!(t.name), json!(type_name(t)), json!(t.queues)];
            let rows: Vec<Vec<Value>> = reply.topics.iter().map(row).collect();
            output::rows(remote.output, &["TOPIC", "TYPE", "QUEUES"], &rows);
        }
        TopicCommand::Describe { topic, remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let reply =
                admin.describe_topic(DescribeTopicRequest { topic }).await.map_err(failed)?.into_inner();
            let row = |q: &QueueState| {
                let stored = q.max_offset - q.min_offset;
                vec![
                    json!(q.broker),
                    json!(q.queue_id),
                    json!(q.min_offset),
                    json!(q.max_offset),
                    json!(stored),
                ]
            };
            let rows: Vec<Vec<Value>> = reply.queues.iter().map(row).collect();
            output::rows(remote.output, &["BROKER", "QUEUE", "MIN", "MAX", "MESSAGES"], &rows);
        }
        TopicCommand::Delete { topic, remote } => {
            let request = DeleteTopicRequest { topic: topic.clone() };
            client::admin(&remote.endpoint).await?.delete_topic(request).await.map_err(failed)?;
            output::object(remote.output, &[("deleted", json!(topic))]);
        }
    }
    Ok(())
}

const GROUP_COLUMNS: [&str; 3] = ["GROUP", "ORDER", "MAX ATTEMPTS"];

fn group_row(g: &GroupConfig) -> Vec<Value> {
    vec![json!(g.name), json!(if g.fifo { "fifo" } else { "concurrent" }), json!(g.max_attempts)]
}

pub async fn group(command: GroupCommand) -> anyhow::Result<()> {
    match command {
        GroupCommand::Create { group, order, max_attempts, remote } => {
            let config =
                GroupConfig { name: group, fifo: order == Order::Fifo, max_attempts, ..Default::default() };
            let request = PutGroupRequest { group: Some(config.clone()), create_only: true };
            client::admin(&remote.endpoint).await?.put_group(request).await.map_err(failed)?;
            output::rows(remote.output, &GROUP_COLUMNS, &[group_row(&config)]);
        }
        GroupCommand::List { remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let reply = admin.list_groups(ListGroupsRequest {}).await.map_err(failed)?.into_inner();
            let rows: Vec<Vec<Value>> = reply.groups.iter().map(group_row).collect();
            output::rows(remote.output, &GROUP_COLUMNS, &rows);
        }
        GroupCommand::Describe { group, remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let reply = admin.list_groups(ListGroupsRequest {}).await.map_err(failed)?.into_inner();
            let found = reply.groups.iter().find(|g| g.name == group);
            let found =
                found.ok_or_else(|| anyhow::anyhow!("{}", apis::status::Error::group_not_found(&group)))?;
            output::rows(remote.output, &GROUP_COLUMNS, &[group_row(found)]);
        }
        GroupCommand::Delete { group, remote } => {
            let request = DeleteGroupRequest { group: group.clone() };
            client::admin(&remote.endpoint).await?.delete_group(request).await.map_err(failed)?;
            output::object(remote.output, &[("deleted", json!(group))]);
        }
        GroupCommand::Lag { group, remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let reply = admin.group_lag(GroupLagRequest { group }).await.map_err(failed)?.into_inner();
            let row = |b: &BrokerLag| {
                let l = b.lag.clone().unwrap_or_default();
                let ready =
                    l.max_offset.saturating_sub(l.committed.max(l.min_offset)).saturating_sub(l.in_flight);
                let behind = l.max_offset.saturating_sub(l.committed.max(l.min_offset));
                vec![
                    json!(l.topic),
                    json!(b.broker),
                    json!(l.queue_id),
                    json!(l.committed),
                    json!(l.max_offset),
                    json!(l.in_flight),
                    json!(ready),
                    json!(behind),
                ]
            };
            let rows: Vec<Vec<Value>> = reply.queues.iter().map(row).collect();
            let columns = ["TOPIC", "BROKER", "QUEUE", "COMMITTED", "MAX", "IN FLIGHT", "READY", "LAG"];
            output::rows(remote.output, &columns, &rows);
        }
    }
    Ok(())
}
