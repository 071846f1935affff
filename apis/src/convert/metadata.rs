//! Topic and group records: model to internal wire and back.

use model::{Backoff, Bound, Group, GroupConfig, MessageType, Topic, TopicConfig, limits};

use crate::internal;

pub fn bound_to_wire(b: &Bound) -> internal::Bound {
    internal::Bound { what: b.what.into(), used: b.used, limit: b.limit, unit: b.unit.name().into() }
}

pub fn topic_to_wire(config: &TopicConfig) -> internal::TopicConfig {
    internal::TopicConfig {
        name: config.topic.as_str().into(),
        queues: config.queues,
        types: config.types.iter().map(|t| *t as i32).collect(),
        version: config.version,
        deleted: config.deleted,
    }
}

pub fn topic_from_wire(config: &internal::TopicConfig) -> TopicConfig {
    TopicConfig {
        topic: Topic::stored(&config.name),
        queues: config.queues.clamp(1, limits::QUEUES_MAX),
        types: config.types.iter().filter_map(|t| MessageType::from_number(*t)).collect(),
        version: config.version,
        deleted: config.deleted,
    }
}

pub fn group_to_wire(config: &GroupConfig) -> internal::GroupConfig {
    internal::GroupConfig {
        name: config.group.as_str().into(),
        fifo: config.fifo,
        max_attempts: config.max_attempts,
        backoff: match &config.backoff {
            backoff if *backoff == Backoff::default() => None,
            Backoff::Steps(steps) => Some(internal::Backoff { steps: steps.clone(), ..Default::default() }),
            Backoff::Exponential { initial, max, multiplier } => Some(internal::Backoff {
                steps: Vec::new(),
                initial: *initial,
                max: *max,
                multiplier: *multiplier,
            }),
        },
        version: config.version,
        deleted: config.deleted,
    }
}

pub fn group_from_wire(config: &internal::GroupConfig) -> GroupConfig {
    GroupConfig {
        group: Group::stored(&config.name),
        fifo: config.fifo,
        max_attempts: config.max_attempts.max(1),
        backoff: match &config.backoff {
            None => Backoff::default(),
            Some(b) if b.steps.is_empty() => {
                Backoff::Exponential { initial: b.initial, max: b.max, multiplier: b.multiplier }
            }
            Some(b) => Backoff::Steps(b.steps.clone()),
        },
        version: config.version,
        deleted: config.deleted,
    }
}
