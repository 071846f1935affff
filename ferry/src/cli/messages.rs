//! `ferry send`, `ferry tail`, `ferry receive`.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use apis::admin::{FindMessagesRequest, TailRequest};
use apis::convert::receive::{self as convert, timestamp};
use apis::v2::receive_message_response::Content;
use apis::v2::*;
use bytes::Bytes;
use serde_json::{Value, json};
use tokio_stream::StreamExt;

use super::client::{self, Messaging, check, failed, resource};
use super::{Format, MessageCommand, ReceiveArgs, SendArgs, TailArgs, Usage, output};

/// Messages of one call, and bodies of one call, when many are sent.
const BATCH: usize = 32;
const BATCH_BYTES: usize = 1 << 20;

/// A message id of the form that clients make: 34 characters, unique to this process and call.
pub fn message_id(sequence: u64) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let pid = u64::from(std::process::id());
    format!(
        "01{:012X}{:04X}{:08X}{:08X}",
        since.as_micros() as u64 & 0xFFFF_FFFF_FFFF,
        pid & 0xFFFF,
        0,
        sequence
    )
}

fn message(args: &SendArgs, body: Bytes, sequence: u64) -> Message {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let due = args.at.or(args.delay.map(|delay| since.as_millis() as i64 + delay));
    Message {
        topic: resource(&args.topic),
        user_properties: args.properties.iter().cloned().collect::<HashMap<_, _>>(),
        system_properties: Some(SystemProperties {
            tag: args.tag.clone(),
            keys: args.keys.clone(),
            message_id: message_id(sequence),
            body_encoding: Encoding::Identity.into(),
            message_type: if due.is_some() {
                MessageType::Delay
            } else if args.message_group.is_some() {
                MessageType::Fifo
            } else {
                MessageType::Normal
            }
            .into(),
            message_group: args.message_group.clone(),
            delivery_timestamp: due.map(timestamp),
            born_timestamp: Some(timestamp(since.as_millis() as i64)),
            born_host: host.trim().to_owned(),
            ..Default::default()
        }),
        body,
    }
}

pub async fn send(args: SendArgs) -> anyhow::Result<()> {
    let bodies: Vec<Bytes> = match (&args.file, &args.body) {
        (Some(path), _) => {
            let text = std::fs::read_to_string(path)
                .map_err(|e| Usage(format!("{} cannot be read: {e}", path.display())))?;
            text.lines().filter(|l| !l.is_empty()).map(|l| Bytes::from(l.to_owned())).collect()
        }
        (None, Some(body)) => vec![Bytes::from(body.clone())],
        (None, None) => {
            return Err(
                Usage("nothing to send: give a body, or --file with one message a line".into()).into()
            );
        }
    };
    let mut client = client::messaging(&args.remote.endpoint, "send").await?;
    // The route comes first, as with every client: where topics come into being by themselves, here they do.
    let endpoints = client::endpoints(&args.remote.endpoint);
    let route = QueryRouteRequest { topic: resource(&args.topic), endpoints };
    check(client.query_route(route).await.map_err(failed)?.into_inner().status.as_ref())?;
    let all = bodies.iter().cycle().take(bodies.len() * args.count as usize);
    let mut batch: Vec<Message> = Vec::new();
    let (mut sent, mut bytes, mut last) = (0u64, 0, None);
    for body in all {
        if batch.len() == BATCH || bytes + body.len() > BATCH_BYTES && !batch.is_empty() {
            last = deliver(&mut client, std::mem::take(&mut batch)).await?;
            bytes = 0;
        }
        bytes += body.len();
        sent += 1;
        batch.push(message(&args, body.clone(), sent));
    }
    if !batch.is_empty() {
        last = deliver(&mut client, batch).await?;
    }
    let mut fields = vec![("topic", json!(args.topic)), ("sent", json!(sent))];
    if let Some(entry) = last.filter(|_| sent == 1) {
        fields.extend([("message id", json!(entry.message_id)), ("offset", json!(entry.offset))]);
        if !entry.recall_handle.is_empty() {
            fields.push(("recall handle", json!(entry.recall_handle)));
        }
    }
    output::object(args.remote.output, &fields);
    Ok(())
}

async fn deliver(client: &mut Messaging, messages: Vec<Message>) -> anyhow::Result<Option<SendResultEntry>> {
    let mut request = tonic::Request::new(SendMessageRequest { messages });
    request.set_timeout(Duration::from_secs(10));
    let reply = client.send_message(request).await.map_err(failed)?.into_inner();
    check(reply.status.as_ref())?;
    Ok(reply.entries.into_iter().next_back())
}

/// One message, as people or machines read it.
pub fn show(format: Format, broker: &str, m: &Message, receipt: bool) {
    let system = m.system_properties.clone().unwrap_or_default();
    let body = String::from_utf8_lossy(&m.body);
    let place = format!("{broker}/{}/{}", system.queue_id, system.queue_offset.unwrap_or_default());
    if format == Format::Json {
        let mut line = json!({
            "broker": broker,
            "queue": system.queue_id,
            "offset": system.queue_offset,
            "message_id": system.message_id,
            "tag": system.tag,
            "keys": system.keys,
            "properties": m.user_properties,
            "born_ms": system.born_timestamp.as_ref().map(apis::convert::send::millis),
            "stored_ms": system.store_timestamp.as_ref().map(apis::convert::send::millis),
            "body": body,
        });
        if receipt {
            line["attempt"] = json!(system.delivery_attempt);
            line["receipt_handle"] = json!(system.receipt_handle);
        }
        println!("{line}");
        return;
    }
    let tag = system.tag.map(|t| format!("  tag={t}")).unwrap_or_default();
    let keys =
        if system.keys.is_empty() { String::new() } else { format!("  keys={}", system.keys.join(",")) };
    let attempt =
        system.delivery_attempt.filter(|_| receipt).map(|a| format!("  attempt={a}")).unwrap_or_default();
    println!("{place}{attempt}{tag}{keys}  {body}");
}

pub async fn message_command(command: MessageCommand) -> anyhow::Result<()> {
    let (request, remote) = match command {
        MessageCommand::Get { topic, id, remote } => {
            (FindMessagesRequest { topic, key: id, max_messages: 32, ..Default::default() }, remote)
        }
        MessageCommand::Find { topic, key, from, to, max, remote } => {
            if key.is_none() && from.is_none() {
                let what = "find what? give --key, or --from for a time";
                return Err(Usage(what.into()).into());
            }
            let request = FindMessagesRequest {
                topic,
                key: key.unwrap_or_default(),
                from_ms: from.unwrap_or(0),
                to_ms: to.unwrap_or(0),
                max_messages: max,
            };
            (request, remote)
        }
    };
    let mut admin = client::admin(&remote.endpoint).await?;
    let reply = admin.find_messages(request).await.map_err(failed)?.into_inner();
    if reply.incomplete {
        eprintln!("keys are being indexed again after a restart: messages may be missing; ask again later");
    }
    if reply.messages.is_empty() && remote.output == Format::Table {
        println!("no such message");
    }
    for found in reply.messages {
        let message = convert::message(found.message.unwrap_or_default(), Digest::default());
        show(remote.output, &found.broker, &message, false);
    }
    Ok(())
}

pub async fn tail(args: TailArgs) -> anyhow::Result<()> {
    let mut admin = client::admin(&args.remote.endpoint).await?;
    let request = TailRequest { topic: args.topic.clone(), from_beginning: args.from_beginning };
    let mut stream = admin.tail(request).await.map_err(failed)?.into_inner();
    let mut left = args.max.unwrap_or(u64::MAX);
    while left > 0 {
        let next = tokio::select! {
            next = stream.next() => next,
            _ = tokio::signal::ctrl_c() => return Ok(()),
        };
        let Some(reply) = next else { break };
        let reply = reply.map_err(failed)?;
        let message = convert::message(reply.message.unwrap_or_default(), Digest::default());
        show(args.remote.output, &reply.broker, &message, false);
        left -= 1;
    }
    Ok(())
}

pub async fn receive(args: ReceiveArgs) -> anyhow::Result<()> {
    let mut client = client::messaging(&args.remote.endpoint, "receive").await?;
    let endpoints = client::endpoints(&args.remote.endpoint);
    let route = QueryRouteRequest { topic: resource(&args.topic), endpoints };
    let route = client.query_route(route).await.map_err(failed)?.into_inner();
    check(route.status.as_ref())?;
    let mut brokers: Vec<Broker> = route.message_queues.iter().filter_map(|q| q.broker.clone()).collect();
    brokers.dedup_by(|a, b| a.name == b.name);
    let filter = FilterExpression { r#type: FilterType::Tag.into(), expression: args.filter.clone() };
    let _attached = client::attach(&mut client, &args.topic, &args.group, filter).await?;
    let wait = Duration::from_secs(args.wait.max(1));
    let until = tokio::time::Instant::now() + wait;
    let mut got = 0;
    'all: while got < args.max {
        for broker in &brokers {
            let left = until.saturating_duration_since(tokio::time::Instant::now());
            let batch = (args.max - got).min(32) as i32;
            let messages = poll(&mut client, &args, broker, batch, left).await?;
            for message in messages {
                show(args.remote.output, &broker.name, &message, true);
                if args.ack {
                    ack(&mut client, &args, &message).await?;
                }
                got += 1;
            }
            if got >= args.max {
                break 'all;
            }
        }
        if tokio::time::Instant::now() >= until {
            break;
        }
    }
    if got == 0 {
        let what = json!(format!("no message within {} s", args.wait));
        output::object(args.remote.output, &[("received", Value::from(0)), ("because", what)]);
    }
    Ok(())
}

async fn poll(
    client: &mut Messaging,
    args: &ReceiveArgs,
    broker: &Broker,
    batch_size: i32,
    left: Duration,
) -> anyhow::Result<Vec<Message>> {
    let filter = FilterExpression { r#type: FilterType::Tag.into(), expression: args.filter.clone() };
    let queue =
        MessageQueue { topic: resource(&args.topic), broker: Some(broker.clone()), ..Default::default() };
    let long = left.as_millis() as i64 >= model::limits::POLL_MIN_MS;
    let request = ReceiveMessageRequest {
        group: resource(&args.group),
        message_queue: Some(queue),
        filter_expression: Some(filter),
        batch_size,
        invisible_duration: Some(convert::duration(args.invisible as i64 * 1000)),
        auto_renew: false,
        long_polling_timeout: long.then(|| convert::duration(left.as_millis() as i64)),
        attempt_id: None,
    };
    let mut request = tonic::Request::new(request);
    // As the official clients do: the polling time and what an answer may take. A shorter wait is said by the deadline.
    let answer = Duration::from_secs(3);
    request.set_timeout(if long { left + answer } else { left.max(Duration::from_millis(200)) });
    let stream = client.receive_message(request).await.map_err(failed)?.into_inner();
    let frames: Vec<_> = stream.collect::<Result<_, _>>().await.map_err(failed)?;
    let mut messages = Vec::new();
    for frame in frames {
        match frame.content {
            Some(Content::Status(s)) if s.code == Code::MessageNotFound as i32 => {}
            Some(Content::Status(s)) => check(Some(&s))?,
            Some(Content::Message(m)) => messages.push(m),
            _ => {}
        }
    }
    Ok(messages)
}

async fn ack(client: &mut Messaging, args: &ReceiveArgs, message: &Message) -> anyhow::Result<()> {
    let system = message.system_properties.clone().unwrap_or_default();
    let entry = AckMessageEntry {
        message_id: system.message_id,
        receipt_handle: system.receipt_handle.unwrap_or_default(),
        lite_topic: None,
    };
    let (group, topic) = (resource(&args.group), resource(&args.topic));
    let request = AckMessageRequest { group, topic, entries: vec![entry] };
    check(client.ack_message(request).await.map_err(failed)?.into_inner().status.as_ref())
}
