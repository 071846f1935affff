//! `ferry dlq …`: what a group could not consume; looked at, and sent again.

use std::time::Duration;

use apis::admin::*;
use apis::convert::receive::{self as convert, timestamp};
use apis::internal::GroupConfig;
use apis::v2::receive_message_response::Content;
use apis::v2::*;
use model::name::DLQ_PREFIX;
use serde_json::{Value, json};
use tokio_stream::StreamExt;

use super::client::{self, Messaging, check, failed, resource};
use super::{DlqCommand, Format, messages, output};

/// Remembers how far dead letters have been sent again.
const REPLAY_GROUP: &str = "ferry-dlq-replay";

pub async fn run(command: DlqCommand) -> anyhow::Result<()> {
    match command {
        DlqCommand::List { remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let reply = admin.list_topics(ListTopicsRequest {}).await.map_err(failed)?.into_inner();
            let mut rows: Vec<Vec<Value>> = Vec::new();
            for topic in reply.topics.into_iter().map(|t| t.name).filter(|t| t.starts_with(DLQ_PREFIX)) {
                let request = DescribeTopicRequest { topic: topic.clone() };
                let reply = admin.describe_topic(request).await.map_err(failed)?.into_inner();
                let stored: u64 = reply.queues.iter().map(|q| q.max_offset - q.min_offset).sum();
                rows.push(vec![json!(topic[DLQ_PREFIX.len()..]), json!(topic), json!(stored)]);
            }
            output::rows(remote.output, &["GROUP", "TOPIC", "MESSAGES"], &rows);
        }
        DlqCommand::Show { group, max, remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let topic = format!("{DLQ_PREFIX}{group}");
            let request = FindMessagesRequest { topic, max_messages: max, ..Default::default() };
            let reply = admin.find_messages(request).await.map_err(failed)?.into_inner();
            for found in reply.messages {
                let message = convert::message(found.message.unwrap_or_default(), Digest::default());
                messages::show(remote.output, &found.broker, &message, false);
            }
        }
        DlqCommand::Replay { group, rate, max, remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let config = GroupConfig { name: REPLAY_GROUP.into(), max_attempts: 1000, ..Default::default() };
            let create = PutGroupRequest { group: Some(config), create_only: false };
            admin.put_group(create).await.map_err(failed)?;
            let mut client = client::messaging(&remote.endpoint, "dlq").await?;
            let replayed = replay(&mut client, &remote.endpoint, &group, (rate, max), remote.output).await?;
            output::object(remote.output, &[("group", json!(group)), ("sent again", json!(replayed))]);
        }
    }
    Ok(())
}

async fn replay(
    client: &mut Messaging,
    endpoint: &str,
    group: &str,
    (rate, max): (u32, u64),
    format: Format,
) -> anyhow::Result<u64> {
    let topic = format!("{DLQ_PREFIX}{group}");
    let route = QueryRouteRequest { topic: resource(&topic), endpoints: client::endpoints(endpoint) };
    let route = client.query_route(route).await.map_err(failed)?.into_inner();
    check(route.status.as_ref())?;
    let mut brokers: Vec<Broker> = route.message_queues.iter().filter_map(|q| q.broker.clone()).collect();
    brokers.dedup_by(|a, b| a.name == b.name);
    let filter = FilterExpression { r#type: FilterType::Tag.into(), expression: "*".into() };
    let _attached = client::attach(client, &topic, REPLAY_GROUP, filter.clone()).await?;
    let mut pace = tokio::time::interval(Duration::from_secs(1) / rate.max(1));
    let mut sent = 0;
    for broker in brokers {
        while sent < max {
            let queue =
                MessageQueue { topic: resource(&topic), broker: Some(broker.clone()), ..Default::default() };
            let mut request = tonic::Request::new(ReceiveMessageRequest {
                group: resource(REPLAY_GROUP),
                message_queue: Some(queue),
                filter_expression: Some(filter.clone()),
                batch_size: (max - sent).min(32) as i32,
                invisible_duration: Some(convert::duration(60_000)),
                ..Default::default()
            });
            request.set_timeout(Duration::from_millis(500));
            let stream = client.receive_message(request).await.map_err(failed)?.into_inner();
            let frames: Vec<_> = stream.collect::<Result<_, _>>().await.map_err(failed)?;
            let letters: Vec<Message> = frames
                .into_iter()
                .filter_map(|frame| match frame.content {
                    Some(Content::Message(m)) => Some(m),
                    _ => None,
                })
                .collect();
            if letters.is_empty() {
                break;
            }
            for letter in letters {
                pace.tick().await;
                send_again(client, &topic, letter).await?;
                sent += 1;
                if format == Format::Table && sent % 1000 == 0 {
                    eprintln!("{sent} sent again");
                }
            }
        }
    }
    Ok(sent)
}

/// To its topic first, then it is done with: what fails in between is sent again, not lost.
async fn send_again(client: &mut Messaging, topic: &str, mut letter: Message) -> anyhow::Result<()> {
    let system = letter.system_properties.take().unwrap_or_default();
    let origin = system.dead_letter_queue.clone().unwrap_or_default().topic;
    if origin.is_empty() {
        anyhow::bail!("dead letter {} does not say which topic it came from", system.message_id);
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let message = Message {
        topic: Some(convert::resource(&origin)),
        user_properties: letter.user_properties,
        system_properties: Some(SystemProperties {
            tag: system.tag,
            keys: system.keys,
            message_id: system.message_id.clone(),
            body_encoding: system.body_encoding,
            born_timestamp: Some(timestamp(now.as_millis() as i64)),
            born_host: system.born_host,
            message_group: system.message_group,
            trace_context: system.trace_context,
            ..Default::default()
        }),
        body: letter.body,
    };
    let reply = client.send_message(SendMessageRequest { messages: vec![message] }).await.map_err(failed)?;
    check(reply.into_inner().status.as_ref())?;
    let entry = AckMessageEntry {
        message_id: system.message_id,
        receipt_handle: system.receipt_handle.unwrap_or_default(),
        lite_topic: None,
    };
    let request =
        AckMessageRequest { group: resource(REPLAY_GROUP), topic: resource(topic), entries: vec![entry] };
    check(client.ack_message(request).await.map_err(failed)?.into_inner().status.as_ref())
}
