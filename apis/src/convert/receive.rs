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
