//! `ferry topic …` and `ferry group …`.

use apis::admin::*;
use apis::internal::{Backoff, GroupConfig, TopicConfig};
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

const GROUP_COLUMNS: [&str; 4] = ["GROUP", "ORDER", "MAX ATTEMPTS", "BACKOFF"];

fn group_row(g: &GroupConfig) -> Vec<Value> {
    let order = if g.fifo { "fifo" } else { "concurrent" };
    vec![json!(g.name), json!(order), json!(g.max_attempts), json!(backoff(g))]
}

fn backoff(g: &GroupConfig) -> String {
    let time =
        |ms: i64| humantime::format_duration(std::time::Duration::from_millis(ms.max(0) as u64)).to_string();
    match &g.backoff {
        None => "default".into(),
        Some(b) if b.steps.is_empty() => {
            format!("{} to {}, times {}", time(b.initial), time(b.max), b.multiplier as f64 / 100.0)
        }
        Some(b) => b.steps.iter().map(|ms| time(*ms)).collect::<Vec<_>>().join(","),
    }
}

async fn find(admin: &mut client::Admin, group: &str) -> anyhow::Result<GroupConfig> {
    let reply = admin.list_groups(ListGroupsRequest {}).await.map_err(failed)?.into_inner();
    let found = reply.groups.into_iter().find(|g| g.name == group);
    found.ok_or_else(|| anyhow::anyhow!("{}", apis::status::Error::group_not_found(&group)))
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
        GroupCommand::Set { group, order, max_attempts, backoff, exponential, remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let mut config = find(&mut admin, &group).await?;
            config.fifo = order.map_or(config.fifo, |order| order == Order::Fifo);
            config.max_attempts = max_attempts.unwrap_or(config.max_attempts);
            if !backoff.is_empty() {
                config.backoff = Some(Backoff { steps: backoff, ..Default::default() });
            } else if let [initial, max] = exponential[..] {
                config.backoff = Some(Backoff { steps: Vec::new(), initial, max, multiplier: 200 });
            }
            let request = PutGroupRequest { group: Some(config.clone()), create_only: false };
            admin.put_group(request).await.map_err(failed)?;
            output::rows(remote.output, &GROUP_COLUMNS, &[group_row(&config)]);
        }
        GroupCommand::Reset { group, to, topic, dry_run, remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let request = ResetGroupRequest { group, topic: topic.unwrap_or_default(), to_ms: to, dry_run };
            let reply = admin.reset_group(request).await.map_err(failed)?.into_inner();
            let row = |on: &ResetOn| {
                let q = on.queue.clone().unwrap_or_default();
                let moved = q.to as i64 - q.from as i64;
                vec![
                    json!(q.topic),
                    json!(on.broker),
                    json!(q.queue_id),
                    json!(q.from),
                    json!(q.to),
                    json!(moved),
                ]
            };
            let rows: Vec<Vec<Value>> = reply.queues.iter().map(row).collect();
            output::rows(remote.output, &["TOPIC", "BROKER", "QUEUE", "FROM", "TO", "MOVED"], &rows);
            if dry_run && remote.output == super::Format::Table {
                println!("nothing was changed: leave --dry-run out to do it");
            }
        }
        GroupCommand::List { remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let reply = admin.list_groups(ListGroupsRequest {}).await.map_err(failed)?.into_inner();
            let rows: Vec<Vec<Value>> = reply.groups.iter().map(group_row).collect();
            output::rows(remote.output, &GROUP_COLUMNS, &rows);
        }
        GroupCommand::Describe { group, remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let found = find(&mut admin, &group).await?;
            output::rows(remote.output, &GROUP_COLUMNS, &[group_row(&found)]);
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
