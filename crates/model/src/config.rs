//! What is kept of a topic and of a consumer group: versioned records of the log.

use std::collections::BTreeSet;

use crate::codec::{self, CodecError, Reader};
use crate::{Group, Topic, limits};

/// Numbers of `apache.rocketmq.v2.MessageType`; persisted: never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum MessageType {
    Normal = 1,
    Fifo = 2,
    Delay = 3,
    Transaction = 4,
    Lite = 5,
    Priority = 6,
}

impl MessageType {
    pub const ALL: [MessageType; 6] = [
        MessageType::Normal,
        MessageType::Fifo,
        MessageType::Delay,
        MessageType::Transaction,
        MessageType::Lite,
        MessageType::Priority,
    ];
    /// What a MIXED topic takes.
    pub const MIXED: [MessageType; 4] =
        [MessageType::Normal, MessageType::Fifo, MessageType::Delay, MessageType::Transaction];

    pub fn from_number(number: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| *t as i32 == number)
    }

    pub fn name(self) -> &'static str {
        match self {
            MessageType::Normal => "NORMAL",
            MessageType::Fifo => "FIFO",
            MessageType::Delay => "DELAY",
            MessageType::Transaction => "TRANSACTION",
            MessageType::Lite => "LITE",
            MessageType::Priority => "PRIORITY",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicConfig {
    pub topic: Topic,
    pub queues: u32,
    pub types: BTreeSet<MessageType>,
    /// Grows with every change; the larger one wins where two brokers differ.
    pub version: u64,
    /// The topic is no more. The record stays, so that a broker that was away does not bring it back.
    pub deleted: bool,
}

impl TopicConfig {
    pub fn normal(topic: Topic) -> Self {
        Self {
            topic,
            queues: limits::QUEUES_DEFAULT,
            types: [MessageType::Normal].into(),
            version: 1,
            deleted: false,
        }
    }

    /// Takes every kind: what a topic is that comes into being when it is first named.
    pub fn mixed(topic: Topic) -> Self {
        Self { types: MessageType::MIXED.into(), ..Self::normal(topic) }
    }

    pub fn put(&self, out: &mut Vec<u8>) {
        codec::put_bytes(out, self.topic.as_str().as_bytes());
        codec::put_u64(out, u64::from(self.queues));
        codec::put_u64(out, self.types.iter().fold(0, |bits, t| bits | 1 << (*t as u8)));
        codec::put_u64(out, self.version);
        codec::put_u64(out, u64::from(self.deleted));
    }

    pub fn take(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let topic = Topic::stored(r.str()?);
        let queues = r.u32()?;
        let bits = r.u64()?;
        let types = MessageType::ALL.into_iter().filter(|t| bits & (1 << (*t as u8)) != 0).collect();
        Ok(Self { topic, queues, types, version: r.u64()?, deleted: r.u64()? != 0 })
    }
}

/// How long a consumer waits before the next delivery of a message it failed to consume, ms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backoff {
    /// One for each delivery; the last one for all after it.
    Steps(Vec<i64>),
    /// Grows from delivery to delivery: `multiplier` in hundredths.
    Exponential { initial: i64, max: i64, multiplier: u64 },
}

impl Default for Backoff {
    /// The reference's.
    fn default() -> Self {
        const SECONDS: [i64; 18] =
            [1, 5, 10, 30, 60, 120, 180, 240, 300, 360, 420, 480, 540, 600, 1200, 1800, 3600, 7200];
        Self::Steps(SECONDS.map(|s| s * 1000).to_vec())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupConfig {
    pub group: Group,
    pub fifo: bool,
    /// Deliveries in all, the first included; after the last the message is a dead letter.
    pub max_attempts: u32,
    pub backoff: Backoff,
    pub version: u64,
    pub deleted: bool,
}

/// In the last number of a stored group: it is deleted; its back-off follows.
const DELETED: u64 = 1;
const STEPS: u64 = 2;
const EXPONENTIAL: u64 = 4;

impl GroupConfig {
    pub fn concurrent(group: Group) -> Self {
        Self {
            group,
            fifo: false,
            max_attempts: limits::ATTEMPTS_DEFAULT,
            backoff: Backoff::default(),
            version: 1,
            deleted: false,
        }
    }

    pub fn put(&self, out: &mut Vec<u8>) {
        codec::put_bytes(out, self.group.as_str().as_bytes());
        codec::put_u64(out, u64::from(self.fifo));
        codec::put_u64(out, u64::from(self.max_attempts));
        codec::put_u64(out, self.version);
        let deleted = u64::from(self.deleted) * DELETED;
        match &self.backoff {
            backoff if *backoff == Backoff::default() => codec::put_u64(out, deleted),
            Backoff::Steps(steps) => {
                codec::put_u64(out, deleted | STEPS);
                codec::put_u64(out, steps.len() as u64);
                steps.iter().for_each(|ms| codec::put_i64(out, *ms));
            }
            Backoff::Exponential { initial, max, multiplier } => {
                codec::put_u64(out, deleted | EXPONENTIAL);
                codec::put_i64(out, *initial);
                codec::put_i64(out, *max);
                codec::put_u64(out, *multiplier);
            }
        }
    }

    pub fn take(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let (group, fifo) = (Group::stored(r.str()?), r.u64()? != 0);
        let (max_attempts, version, flags) = (r.u32()?, r.u64()?, r.u64()?);
        let backoff = if flags & STEPS != 0 {
            let count = r.u64()?;
            Backoff::Steps((0..count).map(|_| r.i64()).collect::<Result<_, _>>()?)
        } else if flags & EXPONENTIAL != 0 {
            Backoff::Exponential { initial: r.i64()?, max: r.i64()?, multiplier: r.u64()? }
        } else {
            Backoff::default()
        };
        Ok(Self { group, fifo, max_attempts, backoff, version, deleted: flags & DELETED != 0 })
    }
}
