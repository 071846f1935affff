//! A message as a client sends it: every rule of the protocol spec's §3, and its stored form.

use std::net::SocketAddr;

use bytes::Bytes;
use model::message::{self, put_property};
use model::{MessageType, Topic, hash, limits};

use super::address;
use crate::internal::AppendMessage;
use crate::names;
use crate::status::Error;
use crate::v2::{self, Code};

/// A valid message on its way to a queue.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub topic: Topic,
    pub message_id: String,
    pub kind: MessageType,
    /// Hash of the message group: messages of one group have one queue.
    pub group: Option<u64>,
    pub message: AppendMessage,
}

fn err<T>(code: Code, message: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(code, message))
}

fn is_control(c: char) -> bool {
    matches!(c, '\u{0}'..='\u{1f}' | '\u{7f}'..='\u{9f}')
}

/// Checks a message and gives it the form in which it is stored.
pub fn message(
    m: v2::Message,
    header_namespace: &str,
    peer: Option<SocketAddr>,
    now_ms: i64,
    delay_max_ms: i64,
) -> Result<Outgoing, Error> {
    let topic = names::topic(m.topic.as_ref(), header_namespace)?;
    if topic.is_retry() || topic.is_dead_letter() {
        let what = format!("topic {topic} is filled by the server; send to another topic");
        return err(Code::IllegalTopic, what);
    }
    let system = m.system_properties.unwrap_or_default();
    body(&m.body)?;
    tag(system.tag())?;
    system.keys.iter().try_for_each(|k| key(k))?;
    message_group(system.message_group.as_deref())?;
    if system.message_id.trim().is_empty() {
        return err(Code::IllegalMessageId, "the message has no id; clients make one for every message");
    }
    user_properties(&m.user_properties, &system)?;
    digest(&m.body, system.body_digest.as_ref())?;
    let kind = kind(&system)?;
    let deliver_at_ms = delivery_time(&system, now_ms, delay_max_ms)?;
    recovery_time(&system, kind)?;
    let properties = properties(&m.user_properties, &system, kind);
    if properties.len() + SERVER_PROPERTIES_BYTES > limits::PROPERTIES_AREA_MAX_BYTES {
        let what = format!(
            "the properties need {} bytes, at most {}",
            properties.len(),
            limits::PROPERTIES_AREA_MAX_BYTES
        );
        return err(Code::MessagePropertiesTooLarge, what);
    }
    let compressed = system.body_encoding() == v2::Encoding::Gzip;
    Ok(Outgoing {
        topic,
        kind,
        message: AppendMessage {
            queue_id: 0,
            body: m.body,
            properties: Bytes::from(properties),
            sys_flag: if compressed { message::FLAG_COMPRESSED } else { 0 },
            born_timestamp_ms: system.born_timestamp.map_or(now_ms, |t| millis(&t)),
            born_host: peer.map(address::to_wire).unwrap_or_default(),
            deliver_at_ms,
            half: kind == MessageType::Transaction,
        },
        group: system.message_group.as_deref().filter(|g| !g.is_empty()).map(hash::stable_hash),
        message_id: system.message_id,
    })
}

/// Kept free for what the server adds: checksum, where a message that waits is to go, where a retry came from.
const SERVER_PROPERTIES_BYTES: usize = 1200;

fn delivery_time(system: &v2::SystemProperties, now_ms: i64, delay_max_ms: i64) -> Result<i64, Error> {
    let Some(at) = system.delivery_timestamp.as_ref().map(millis) else { return Ok(0) };
    if at.saturating_sub(now_ms) > delay_max_ms {
        let what = format!(
            "the delivery timestamp is {} ms ahead, at most {delay_max_ms} ms ({} days) are allowed",
            at.saturating_sub(now_ms),
            delay_max_ms / 86_400_000
        );
        return err(Code::IllegalDeliveryTime, what);
    }
    // The past is at once.
    Ok(if at > now_ms { at } else { 0 })
}

fn recovery_time(system: &v2::SystemProperties, kind: MessageType) -> Result<(), Error> {
    let Some(asked) = &system.orphaned_transaction_recovery_duration else { return Ok(()) };
    let ms = asked.seconds.saturating_mul(1000).saturating_add(i64::from(asked.nanos) / 1_000_000);
    if kind == MessageType::Transaction && !(0..=limits::CHECK_IMMUNITY_MAX_MS).contains(&ms) {
        let max = limits::CHECK_IMMUNITY_MAX_MS;
        let what = format!("an orphaned transaction recovery duration of {ms} ms; it must be 0 to {max} ms");
        return err(Code::BadRequest, what);
    }
    Ok(())
}

pub fn millis(t: &prost_types::Timestamp) -> i64 {
    t.seconds.saturating_mul(1000).saturating_add(i64::from(t.nanos) / 1_000_000)
}

fn body(body: &Bytes) -> Result<(), Error> {
    if body.is_empty() {
        return err(Code::MessageBodyEmpty, "the message has no body; send at least one byte");
    }
    if body.len() > limits::BODY_MAX_BYTES {
        let what =
            format!("the body has {} bytes, at most {} are allowed", body.len(), limits::BODY_MAX_BYTES);
        return err(Code::MessageBodyTooLarge, what);
    }
    Ok(())
}

fn tag(tag: &str) -> Result<(), Error> {
    if tag.is_empty() {
        return Ok(());
    }
    if tag.trim().is_empty() {
        return err(Code::IllegalMessageTag, "the tag is only white space; leave it out or name one");
    }
    if tag.contains('|') {
        return err(
            Code::IllegalMessageTag,
            format!("the tag {tag:?} contains '|', which separates tags in filters"),
        );
    }
    if tag.chars().any(is_control) {
        return err(Code::IllegalMessageTag, format!("the tag {tag:?} contains a control character"));
    }
    Ok(())
}

fn key(key: &str) -> Result<(), Error> {
    if key.is_empty() {
        return Ok(());
    }
    if key.trim().is_empty() {
        return err(Code::IllegalMessageKey, "a message key is only white space; leave it out or name one");
    }
    if key.chars().any(is_control) {
        return err(Code::IllegalMessageKey, format!("the message key {key:?} contains a control character"));
    }
    Ok(())
}

fn message_group(group: Option<&str>) -> Result<(), Error> {
    let Some(group) = group.filter(|g| !g.is_empty()) else { return Ok(()) };
    if group.trim().is_empty() {
        return err(Code::IllegalMessageGroup, "the message group is only white space; name one");
    }
    if group.len() > limits::MESSAGE_GROUP_MAX_BYTES {
        let max = limits::MESSAGE_GROUP_MAX_BYTES;
        return err(
            Code::IllegalMessageGroup,
            format!("the message group has {} bytes, at most {max}", group.len()),
        );
    }
    if group.chars().any(is_control) {
        return err(
            Code::IllegalMessageGroup,
            format!("the message group {group:?} contains a control character"),
        );
    }
    Ok(())
}

fn user_properties(
    user: &std::collections::HashMap<String, String>,
    system: &v2::SystemProperties,
) -> Result<(), Error> {
    if user.len() > limits::USER_PROPERTIES_MAX {
        let what =
            format!("{} user properties, at most {} are allowed", user.len(), limits::USER_PROPERTIES_MAX);
        return err(Code::MessagePropertiesTooLarge, what);
    }
    for (key, value) in user {
        if key.is_empty() {
            return err(Code::IllegalMessagePropertyKey, "a user property has an empty name; name it");
        }
        if message::is_reserved(key) {
            let what = format!("the user property {key:?} has a name that RocketMQ uses itself; rename it");
            return err(Code::IllegalMessagePropertyKey, what);
        }
        if key.chars().chain(value.chars()).any(is_control) {
            let what = format!("the user property {key:?} contains a control character in its name or value");
            return err(Code::IllegalMessagePropertyKey, what);
        }
    }
    let user: usize = user.iter().map(|(k, v)| k.len() + v.len()).sum();
    let total = user + system.tag().len() + system.keys.iter().map(String::len).sum::<usize>();
    if total > limits::USER_PROPERTIES_MAX_BYTES {
        let max = limits::USER_PROPERTIES_MAX_BYTES;
        let what =
            format!("user properties, tag and keys have {total} bytes in all, at most {max} are allowed");
        return err(Code::MessagePropertiesTooLarge, what);
    }
    Ok(())
}

/// CRC-32 in any of the forms that clients write. Other kinds are left to the consumer.
fn digest(body: &[u8], digest: Option<&v2::Digest>) -> Result<(), Error> {
    let Some(digest) = digest.filter(|d| d.r#type() == v2::DigestType::Crc32 && !d.checksum.is_empty())
    else {
        return Ok(());
    };
    let sum = crc32fast::hash(body);
    let said = digest.checksum.trim();
    let same = u32::from_str_radix(said, 16) == Ok(sum) || said.parse::<u32>() == Ok(sum);
    if same {
        return Ok(());
    }
    err(
        Code::MessageCorrupted,
        format!("the body's CRC-32 is {sum:08X}, the message says {said}; it was damaged on its way"),
    )
}

/// What kind of message it is: what it says, or what its properties make it. Both must agree.
fn kind(system: &v2::SystemProperties) -> Result<MessageType, Error> {
    let said = MessageType::from_number(system.message_type);
    let group = system.message_group.as_deref().is_some_and(|g| !g.is_empty());
    let derived = if said == Some(MessageType::Transaction) {
        MessageType::Transaction
    } else if system.delivery_timestamp.is_some() {
        MessageType::Delay
    } else if group {
        MessageType::Fifo
    } else if system.priority.is_some() {
        MessageType::Priority
    } else if system.lite_topic.is_some() {
        MessageType::Lite
    } else {
        MessageType::Normal
    };
    let kinds = [
        ("a message group", group),
        ("a delivery timestamp", system.delivery_timestamp.is_some()),
        ("a priority", system.priority.is_some()),
        ("a lite topic", system.lite_topic.is_some()),
    ];
    let has: Vec<&str> = kinds.iter().filter(|(_, is)| *is).map(|(what, _)| *what).collect();
    let may_have = |what: &str| derived != MessageType::Transaction || what == "a delivery timestamp";
    if has.len() > 1 || !has.iter().all(|what| may_have(what)) {
        let and = if derived == MessageType::Transaction { " and a transaction" } else { "" };
        return err(
            Code::MessagePropertyConflictWithType,
            format!("the message has {}{and}; these exclude each other", has.join(" and ")),
        );
    }
    match said {
        Some(said) if said != derived => err(
            Code::MessagePropertyConflictWithType,
            format!("the message says it is {}, its properties make it {}", said.name(), derived.name()),
        ),
        _ => Ok(derived),
    }
}

fn properties(
    user: &std::collections::HashMap<String, String>,
    system: &v2::SystemProperties,
    kind: MessageType,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    put_property(&mut out, message::UNIQ_KEY, &system.message_id);
    let mut put = |key, value: Option<&str>| {
        if let Some(value) = value.filter(|v| !v.is_empty()) {
            put_property(&mut out, key, value);
        }
    };
    put(message::TAGS, system.tag.as_deref());
    put(message::KEYS, Some(&system.keys.join(" ")));
    put(message::SHARDING_KEY, system.message_group.as_deref());
    put(message::TRACE_CONTEXT, system.trace_context.as_deref());
    put(message::BORN_HOST, Some(&system.born_host));
    let born = system.born_timestamp.as_ref().map(|t| millis(t).to_string());
    put(message::BORN_TIMESTAMP, born.as_deref());
    let due = system.delivery_timestamp.as_ref().map(|t| millis(t).to_string());
    put(message::TIMER_DELIVER_MS, due.as_deref());
    let immunity = system.orphaned_transaction_recovery_duration.as_ref().map(|d| d.seconds.to_string());
    put(message::CHECK_IMMUNITY, immunity.as_deref().filter(|_| kind == MessageType::Transaction));
    put(message::TRAN_MSG, (kind == MessageType::Transaction).then_some("true"));
    for (key, value) in user {
        put_property(&mut out, key, value);
    }
    out
}
