//! A stored message as a consumer gets it.

use std::collections::HashMap;

use model::{Topic, message};

use super::address;
use crate::internal::Delivered;
use crate::v2;

pub fn timestamp(ms: i64) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: ms.div_euclid(1000), nanos: (ms.rem_euclid(1000) * 1_000_000) as i32 }
}

pub fn duration(ms: i64) -> prost_types::Duration {
    prost_types::Duration { seconds: ms / 1000, nanos: (ms % 1000 * 1_000_000) as i32 }
}

pub fn resource(full_name: &str) -> v2::Resource {
    let topic = Topic::stored(full_name);
    let (namespace, name) = topic.split();
    v2::Resource { resource_namespace: namespace.into(), name: name.into() }
}

/// As the generated types have it; [`encode_message`] writes the same.
pub fn message(d: Delivered, digest: v2::Digest) -> v2::Message {
    let mut user = HashMap::new();
    let mut system = v2::SystemProperties {
        body_digest: Some(digest),
        body_encoding: if d.sys_flag & message::FLAG_COMPRESSED != 0 {
            v2::Encoding::Gzip.into()
        } else {
            v2::Encoding::Identity.into()
        },
        message_type: v2::MessageType::Normal.into(),
        born_timestamp: Some(timestamp(d.born_timestamp_ms)),
        store_timestamp: Some(timestamp(d.store_timestamp_ms)),
        store_host: d.store_host,
        queue_id: d.queue_id as i32,
        queue_offset: Some(d.queue_offset as i64),
        ..Default::default()
    };
    if !d.handle.is_empty() {
        system.receipt_handle = Some(d.handle);
        system.delivery_attempt = Some(d.attempt as i32);
        system.invisible_duration = Some(duration(d.invisible_ms));
    }
    let mut origin = v2::DeadLetterQueue::default();
    for (key, value) in message::properties(&d.properties) {
        match key {
            message::TAGS => system.tag = Some(value.to_owned()).filter(|tag| !tag.is_empty()),
            message::KEYS => {
                system.keys = value.split(' ').filter(|k| !k.is_empty()).map(Into::into).collect()
            }
            message::UNIQ_KEY => system.message_id = value.into(),
            message::BORN_HOST => system.born_host = value.into(),
            message::TRACE_CONTEXT => system.trace_context = Some(value.into()),
            message::SHARDING_KEY => {
                system.message_group = Some(value.into());
                system.message_type = v2::MessageType::Fifo.into();
            }
            message::TIMER_DELIVER_MS => {
                system.delivery_timestamp = value.parse().ok().map(timestamp);
                system.message_type = v2::MessageType::Delay.into();
            }
            message::DLQ_ORIGIN_TOPIC => origin.topic = value.into(),
            message::DLQ_ORIGIN_MESSAGE_ID => origin.message_id = value.into(),
            key if message::is_reserved(key) => {}
            key => drop(user.insert(key.into(), value.into())),
        }
    }
    if system.born_host.is_empty() {
        system.born_host = address::from_wire(&d.born_host).map(|a| a.to_string()).unwrap_or_default();
    }
    if !origin.topic.is_empty() {
        system.dead_letter_queue = Some(origin);
    }
    v2::Message {
        topic: Some(resource(&d.topic)),
        user_properties: user,
        system_properties: Some(system),
        body: d.body,
    }
}

/// Writes `ReceiveMessageResponse { message }` of a delivered message, as one gRPC frame, straight to the wire: what a
/// hundred thousand messages a second would allocate for the structures between costs more than everything else here.
/// `scratch` is a buffer to be used again.
pub fn encode_message(
    d: &Delivered,
    digest: (v2::DigestType, &str),
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) {
    let Scratch { system, head } = scratch;
    system.clear();
    head.clear();
    let (namespace, name) = model::name::split(&d.topic);
    nested(head, 1, [text_len(1, namespace), text_len(2, name)], |out| {
        text(out, 1, namespace);
        text(out, 2, name);
    });
    system_properties(d, digest, system, head);
    key(head, 3, LEN);
    varint(head, system.len() as u64);
    head.extend_from_slice(system);

    let body = if d.body.is_empty() { 0 } else { 1 + varint_len(d.body.len() as u64) + d.body.len() };
    let message = head.len() + body;
    let response = 1 + varint_len(message as u64) + message;
    out.reserve(5 + response);
    out.push(0);
    out.extend_from_slice(&(response as u32).to_be_bytes());
    key(out, 2, LEN);
    varint(out, message as u64);
    out.extend_from_slice(head);
    if !d.body.is_empty() {
        key(out, 4, LEN);
        varint(out, d.body.len() as u64);
        out.extend_from_slice(&d.body);
    }
}

/// Buffers of [`encode_message`].
#[derive(Default)]
pub struct Scratch {
    system: Vec<u8>,
    head: Vec<u8>,
}

/// System properties into one buffer, user properties (field 2 of the message) into the other.
fn system_properties(
    d: &Delivered,
    (kind, sum): (v2::DigestType, &str),
    out: &mut Vec<u8>,
    user: &mut Vec<u8>,
) {
    let mut message_type = v2::MessageType::Normal;
    let mut born_host = None;
    let (mut origin_topic, mut origin_id) = ("", "");
    for (name, value) in message::properties(&d.properties) {
        match name {
            message::TAGS if value.is_empty() => {}
            message::TAGS => optional_text(out, 1, value),
            message::KEYS => {
                value.split(' ').filter(|k| !k.is_empty()).for_each(|k| optional_text(out, 2, k))
            }
            message::UNIQ_KEY => text(out, 3, value),
            message::BORN_HOST => born_host = Some(value),
            message::TRACE_CONTEXT => optional_text(out, 18, value),
            message::SHARDING_KEY => {
                optional_text(out, 17, value);
                message_type = v2::MessageType::Fifo;
            }
            message::TIMER_DELIVER_MS => {
                if let Ok(ms) = value.parse() {
                    instant(out, 11, timestamp(ms));
                }
                message_type = v2::MessageType::Delay;
            }
            message::DLQ_ORIGIN_TOPIC => origin_topic = value,
            message::DLQ_ORIGIN_MESSAGE_ID => origin_id = value,
            name if message::is_reserved(name) => {}
            name => nested(user, 2, [text_len(1, name), text_len(2, value)], |out| {
                text(out, 1, name);
                text(out, 2, value);
            }),
        }
    }
    nested(out, 4, [number_len(1, kind as u64), text_len(2, sum)], |out| {
        number(out, 1, kind as u64);
        text(out, 2, sum);
    });
    let gzip = d.sys_flag & message::FLAG_COMPRESSED != 0;
    number(out, 5, if gzip { v2::Encoding::Gzip } else { v2::Encoding::Identity } as u64);
    number(out, 6, message_type as u64);
    instant(out, 7, timestamp(d.born_timestamp_ms));
    match born_host.filter(|host| !host.is_empty()) {
        Some(host) => text(out, 8, host),
        None => {
            if let Some(host) = address::from_wire(&d.born_host) {
                text(out, 8, &host.to_string());
            }
        }
    }
    instant(out, 9, timestamp(d.store_timestamp_ms));
    text(out, 10, &d.store_host);
    number(out, 13, u64::from(d.queue_id));
    optional_number(out, 14, d.queue_offset);
    if !d.handle.is_empty() {
        optional_text(out, 12, &d.handle);
        let invisible = duration(d.invisible_ms);
        instant(out, 15, prost_types::Timestamp { seconds: invisible.seconds, nanos: invisible.nanos });
        optional_number(out, 16, u64::from(d.attempt));
    }
    if !origin_topic.is_empty() {
        nested(out, 20, [text_len(1, origin_topic), text_len(2, origin_id)], |out| {
            text(out, 1, origin_topic);
            text(out, 2, origin_id);
        });
    }
}

// The encoding of protocol buffers: a field is its number and wire type, then its value. What is empty or zero is left
// out, unless its presence says something (`optional_*`).

const VARINT: u64 = 0;
const LEN: u64 = 2;

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn varint_len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

fn key(out: &mut Vec<u8>, field: u64, wire: u64) {
    varint(out, field << 3 | wire);
}

fn key_len(field: u64) -> usize {
    varint_len(field << 3)
}

fn optional_text(out: &mut Vec<u8>, field: u64, value: &str) {
    key(out, field, LEN);
    varint(out, value.len() as u64);
    out.extend_from_slice(value.as_bytes());
}

fn text(out: &mut Vec<u8>, field: u64, value: &str) {
    if !value.is_empty() {
        optional_text(out, field, value);
    }
}

fn text_len(field: u64, value: &str) -> usize {
    if value.is_empty() { 0 } else { key_len(field) + varint_len(value.len() as u64) + value.len() }
}

fn optional_number(out: &mut Vec<u8>, field: u64, value: u64) {
    key(out, field, VARINT);
    varint(out, value);
}

fn number(out: &mut Vec<u8>, field: u64, value: u64) {
    if value != 0 {
        optional_number(out, field, value);
    }
}

fn number_len(field: u64, value: u64) -> usize {
    if value == 0 { 0 } else { key_len(field) + varint_len(value) }
}

/// A message of two fields whose lengths are known.
fn nested(out: &mut Vec<u8>, field: u64, lengths: [usize; 2], fields: impl FnOnce(&mut Vec<u8>)) {
    key(out, field, LEN);
    varint(out, lengths.iter().sum::<usize>() as u64);
    fields(out);
}

/// A timestamp or duration: seconds (1) and nanoseconds (2); negative numbers have ten bytes.
fn instant(out: &mut Vec<u8>, field: u64, at: prost_types::Timestamp) {
    let (seconds, nanos) = (at.seconds as u64, i64::from(at.nanos) as u64);
    nested(out, field, [number_len(1, seconds), number_len(2, nanos)], |out| {
        number(out, 1, seconds);
        number(out, 2, nanos);
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    fn any_properties() -> impl Strategy<Value = Vec<u8>> {
        let name = prop_oneof![
            3 => "[a-zA-Z]{1,8}",
            1 => Just(message::TAGS.to_owned()),
            1 => Just(message::UNIQ_KEY.to_owned()),
            1 => Just(message::KEYS.to_owned()),
            1 => Just(message::BORN_HOST.to_owned()),
            1 => Just(message::TRACE_CONTEXT.to_owned()),
            1 => Just(message::SHARDING_KEY.to_owned()),
            1 => Just(message::TIMER_DELIVER_MS.to_owned()),
            1 => Just(message::DLQ_ORIGIN_TOPIC.to_owned()),
            1 => Just(message::DLQ_ORIGIN_MESSAGE_ID.to_owned()),
        ];
        let value = prop_oneof!["[a-zé ]{0,12}", "[0-9]{1,13}", "-[0-9]{1,9}", "x{100,300}"];
        prop::collection::btree_map(name, value, 0..9).prop_map(|all| {
            let mut out = Vec::new();
            all.iter().for_each(|(name, value)| message::put_property(&mut out, name, value));
            out
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_the_generated_types_write(
            topic in "([a-z]{1,4}%)?[a-z]{1,140}",
            numbers in (any::<u32>(), any::<u64>(), any::<u32>(), -1_000_000i64..2_000_000_000_000, any::<u32>()),
            body in prop::collection::vec(any::<u8>(), 0..300),
            properties in any_properties(),
            handle in "[a-z]{0,200}",
            born in prop_oneof![Just(Vec::new()), Just(vec![10, 0, 0, 1, 1, 2])],
            sum in "[0-9A-F]{0,32}",
        ) {
            let (queue_id, queue_offset, sys_flag, ms, attempt) = numbers;
            let d = Delivered {
                topic,
                queue_offset,
                sys_flag,
                handle,
                queue_id: queue_id & 0x7fff_ffff,
                attempt: attempt & 0x7fff_ffff,
                body: body.into(),
                properties: properties.into(),
                born_timestamp_ms: ms,
                born_host: born.into(),
                store_timestamp_ms: ms + 1,
                store_host: "1.2.3.4:5".into(),
                invisible_ms: ms.abs(),
            };
            let kind = v2::DigestType::Crc32;
            let mut out = vec![7];
            let mut scratch = Scratch::default();
            encode_message(&d, (kind, &sum), &mut scratch, &mut Vec::new());
            encode_message(&d, (kind, &sum), &mut scratch, &mut out);
            let frame = &out[1..];
            prop_assert_eq!(frame[0], 0);
            prop_assert_eq!(u32::from_be_bytes(frame[1..5].try_into().unwrap()) as usize, frame.len() - 5);
            let digest = v2::Digest { r#type: kind.into(), checksum: sum };
            let want = v2::receive_message_response::Content::Message(message(d, digest));
            let got = v2::ReceiveMessageResponse::decode(&frame[5..]).unwrap();
            prop_assert_eq!(got.encoded_len(), frame.len() - 5);
            prop_assert_eq!(got.content, Some(want));
        }
    }
}
