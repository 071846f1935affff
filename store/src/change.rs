//! Change records: what must survive a failover besides messages. One record of the reserved topic
//! `rmq_sys_ferry_changes` for each group commit, holding every change of that group in order.
//! All derived state is made by applying these, live and in recovery alike.
//!
//! ```text
//! version (1 byte, = 1) then operations: tag (1 byte) and its LEB128 fields
//! `Cursor` names group, topic and queue once for the operations after it
//! ```

use std::sync::Arc;

use model::codec::{self, CodecError, Reader};
use model::{Group, GroupConfig, ReceiptKey, Timestamp, Topic, TopicConfig};

use crate::pop::Lane;
use crate::timer::TimerKey;

const VERSION: u8 = 1;

/// One group's position on one queue; the topic may be the group's retry topic.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CursorKey {
    pub group: Group,
    pub topic: Topic,
    pub queue: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A new record, also of a deletion.
    PutTopic(TopicConfig),
    PutGroup(GroupConfig),
    /// The secret that receipt handles are authenticated with.
    Key(ReceiptKey),
    /// Offsets were handed out; everything below `next` has been looked at.
    Popped {
        cursor: CursorKey,
        next: u64,
        since: Timestamp,
        visible_at: Timestamp,
        /// The client whose life renews the invisible time.
        client: Option<Arc<str>>,
        offsets: Vec<u64>,
    },
    /// Offsets were handed out in order: each lane's only while it has no others in flight.
    Ordered {
        cursor: CursorKey,
        next: u64,
        since: Timestamp,
        visible_at: Timestamp,
        client: Option<Arc<str>>,
        /// Hash of the receive's attempt id; 0 if it has none. The same attempt gets the same messages again.
        attempt_id: u64,
        taken: Vec<Taken>,
        /// Looked at, but behind others of their lane: offset and lane.
        held: Vec<(u64, Lane)>,
    },
    /// Acknowledged, or moved to the retry or dead-letter topic.
    Done {
        cursor: CursorKey,
        moved: bool,
        offsets: Vec<u64>,
    },
    /// Invisible until then. Unless it was a renewal, no renewal follows it.
    Visible {
        cursor: CursorKey,
        offset: u64,
        visible_at: Timestamp,
        renewal: bool,
    },
    /// Messages in order that never reached their consumer: back in their place, the delivery does not count.
    Unsent {
        cursor: CursorKey,
        offsets: Vec<u64>,
    },
    /// A scheduled message is not to be delivered.
    Recalled(TimerKey),
    /// A producer was asked what became of a transaction; if nothing is heard, another one then.
    Checked {
        id: u64,
        check_at: Timestamp,
    },
    RolledBack {
        id: u64,
        at: Timestamp,
    },
    /// The group goes on here; what was in flight is forgotten.
    Seek {
        cursor: CursorKey,
        next: u64,
    },
}

/// A message handed out in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    pub offset: u64,
    pub lane: Lane,
    /// Which delivery this is, counted from 1.
    pub attempt: u32,
}

/// Operation tags; persisted: never renumber.
mod tag {
    pub const CURSOR: u8 = 1;
    pub const PUT_TOPIC: u8 = 2;
    pub const PUT_GROUP: u8 = 4;
    pub const KEY: u8 = 6;
    pub const POPPED: u8 = 7;
    pub const DONE: u8 = 8;
    pub const VISIBLE: u8 = 9;
    pub const SEEK: u8 = 10;
    pub const ORDERED: u8 = 11;
    pub const UNSENT: u8 = 12;
    pub const RECALLED: u8 = 13;
    pub const CHECKED: u8 = 14;
    pub const ROLLED_BACK: u8 = 15;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    #[error("the change record has version {found}, this binary knows {VERSION}; use a newer ferry")]
    Version { found: u8 },
    #[error("the change record holds the unknown operation {tag}; use a newer ferry")]
    Operation { tag: u8 },
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// Collects the changes of one group commit.
#[derive(Debug, Default)]
pub struct Writer {
    body: Vec<u8>,
    cursor: Option<CursorKey>,
}

impl Writer {
    pub fn is_empty(&self) -> bool {
        self.body.is_empty()
    }

    pub fn len(&self) -> usize {
        self.body.len()
    }

    pub fn take(&mut self) -> Vec<u8> {
        self.cursor = None;
        std::mem::take(&mut self.body)
    }

    /// Puts back what was taken but could not be stored: it goes before everything after it.
    pub fn restore(&mut self, body: Vec<u8>) {
        debug_assert!(self.body.is_empty());
        self.body = body;
    }

    pub fn push(&mut self, change: &Change) {
        if self.body.is_empty() {
            self.body.push(VERSION);
        }
        match change {
            Change::Popped { cursor, .. }
            | Change::Ordered { cursor, .. }
            | Change::Unsent { cursor, .. }
            | Change::Done { cursor, .. }
            | Change::Visible { cursor, .. }
            | Change::Seek { cursor, .. } => self.select(cursor),
            _ => {}
        }
        let out = &mut self.body;
        match change {
            Change::PutTopic(config) => {
                out.push(tag::PUT_TOPIC);
                config.put(out);
            }
            Change::PutGroup(config) => {
                out.push(tag::PUT_GROUP);
                config.put(out);
            }
            Change::Key(key) => {
                out.push(tag::KEY);
                codec::put_bytes(out, &key.0);
            }
            Change::Popped { next, since, visible_at, client, offsets, .. } => {
                out.push(tag::POPPED);
                codec::put_u64(out, *next);
                codec::put_i64(out, since.0);
                codec::put_i64(out, visible_at.since(*since));
                codec::put_bytes(out, client.as_deref().unwrap_or("").as_bytes());
                put_offsets(out, offsets);
            }
            Change::Ordered { next, since, visible_at, client, attempt_id, taken, held, .. } => {
                out.push(tag::ORDERED);
                codec::put_u64(out, *next);
                codec::put_i64(out, since.0);
                codec::put_i64(out, visible_at.since(*since));
                codec::put_bytes(out, client.as_deref().unwrap_or("").as_bytes());
                codec::put_fixed_u64(out, *attempt_id);
                codec::put_u64(out, taken.len() as u64);
                for Taken { offset, lane, attempt } in taken {
                    codec::put_u64(out, *offset);
                    codec::put_fixed_u64(out, *lane);
                    codec::put_u64(out, u64::from(*attempt));
                }
                codec::put_u64(out, held.len() as u64);
                for (offset, lane) in held {
                    codec::put_u64(out, *offset);
                    codec::put_fixed_u64(out, *lane);
                }
            }
            Change::Done { moved, offsets, .. } => {
                out.push(tag::DONE);
                out.push(u8::from(*moved));
                put_offsets(out, offsets);
            }
            Change::Visible { offset, visible_at, renewal, .. } => {
                out.push(tag::VISIBLE);
                out.push(u8::from(*renewal));
                codec::put_u64(out, *offset);
                codec::put_i64(out, visible_at.0);
            }
            Change::Unsent { offsets, .. } => {
                out.push(tag::UNSENT);
                put_offsets(out, offsets);
            }
            Change::Recalled(TimerKey { due, id }) => {
                out.push(tag::RECALLED);
                codec::put_i64(out, due.0);
                codec::put_u64(out, *id);
            }
            Change::Checked { id, check_at } => {
                out.push(tag::CHECKED);
                codec::put_u64(out, *id);
                codec::put_i64(out, check_at.0);
            }
            Change::RolledBack { id, at } => {
                out.push(tag::ROLLED_BACK);
                codec::put_u64(out, *id);
                codec::put_i64(out, at.0);
            }
            Change::Seek { next, .. } => {
                out.push(tag::SEEK);
                codec::put_u64(out, *next);
            }
        }
    }

    fn select(&mut self, cursor: &CursorKey) {
        if self.cursor.as_ref() == Some(cursor) {
            return;
        }
        self.body.push(tag::CURSOR);
        codec::put_bytes(&mut self.body, cursor.group.as_str().as_bytes());
        codec::put_bytes(&mut self.body, cursor.topic.as_str().as_bytes());
        codec::put_u64(&mut self.body, u64::from(cursor.queue));
        self.cursor = Some(cursor.clone());
    }
}

/// Ascending offsets as differences.
pub fn put_offsets(out: &mut Vec<u8>, offsets: &[u64]) {
    codec::put_u64(out, offsets.len() as u64);
    let mut last = 0;
    for offset in offsets {
        codec::put_i64(out, offset.wrapping_sub(last) as i64);
        last = *offset;
    }
}

pub fn take_offsets(r: &mut Reader<'_>) -> Result<Vec<u64>, CodecError> {
    let count = r.u64()?;
    let mut last = 0u64;
    let mut out = Vec::new();
    for _ in 0..count {
        last = last.wrapping_add(r.i64()? as u64);
        out.push(last);
    }
    Ok(out)
}

/// The changes of a record's body.
pub fn decode(body: &[u8]) -> Result<Vec<Change>, ChangeError> {
    let mut r = Reader::new(body);
    let found = r.u8()?;
    if found != VERSION {
        return Err(ChangeError::Version { found });
    }
    let mut changes = Vec::new();
    let mut current: Option<CursorKey> = None;
    while !r.is_empty() {
        let operation = r.u8()?;
        let cursor = || current.clone().ok_or(CodecError { at: 0 });
        changes.push(match operation {
            tag::CURSOR => {
                let (group, topic) = (Group::stored(r.str()?), Topic::stored(r.str()?));
                current = Some(CursorKey { group, topic, queue: r.u32()? });
                continue;
            }
            tag::PUT_TOPIC => Change::PutTopic(TopicConfig::take(&mut r)?),
            tag::PUT_GROUP => Change::PutGroup(GroupConfig::take(&mut r)?),
            tag::KEY => Change::Key(ReceiptKey(r.bytes()?.try_into().map_err(|_| r.error())?)),
            tag::POPPED => {
                let next = r.u64()?;
                let since = Timestamp(r.i64()?);
                let visible_at = since.plus_ms(r.i64()?);
                let client = Some(r.str()?).filter(|c| !c.is_empty()).map(Arc::from);
                Change::Popped {
                    cursor: cursor()?,
                    next,
                    since,
                    visible_at,
                    client,
                    offsets: take_offsets(&mut r)?,
                }
            }
            tag::ORDERED => {
                let next = r.u64()?;
                let since = Timestamp(r.i64()?);
                let visible_at = since.plus_ms(r.i64()?);
                let client = Some(r.str()?).filter(|c| !c.is_empty()).map(Arc::from);
                let attempt_id = r.fixed_u64()?;
                let (mut taken, mut held) = (Vec::new(), Vec::new());
                for _ in 0..r.u64()? {
                    taken.push(Taken { offset: r.u64()?, lane: r.fixed_u64()?, attempt: r.u32()? });
                }
                for _ in 0..r.u64()? {
                    held.push((r.u64()?, r.fixed_u64()?));
                }
                let cursor = cursor()?;
                Change::Ordered { cursor, next, since, visible_at, client, attempt_id, taken, held }
            }
            tag::DONE => {
                let moved = r.u8()? != 0;
                Change::Done { cursor: cursor()?, moved, offsets: take_offsets(&mut r)? }
            }
            tag::VISIBLE => {
                let (renewal, offset) = (r.u8()? != 0, r.u64()?);
                Change::Visible { cursor: cursor()?, offset, visible_at: Timestamp(r.i64()?), renewal }
            }
            tag::UNSENT => Change::Unsent { cursor: cursor()?, offsets: take_offsets(&mut r)? },
            tag::RECALLED => Change::Recalled(TimerKey { due: Timestamp(r.i64()?), id: r.u64()? }),
            tag::CHECKED => Change::Checked { id: r.u64()?, check_at: Timestamp(r.i64()?) },
            tag::ROLLED_BACK => Change::RolledBack { id: r.u64()?, at: Timestamp(r.i64()?) },
            tag::SEEK => Change::Seek { cursor: cursor()?, next: r.u64()? },
            tag => return Err(ChangeError::Operation { tag }),
        });
    }
    Ok(changes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_change() -> impl Strategy<Value = Change> {
        let cursor = ("[a-c]", "[a-c%+]{1,4}", 0u32..3).prop_map(|(g, t, queue)| CursorKey {
            group: Group::stored(&g),
            topic: Topic::stored(&t),
            queue,
        });
        let offsets = prop::collection::vec(any::<u64>(), 0..5);
        prop_oneof![
            ("[a-c]", 1u32..9, any::<u64>()).prop_map(|(t, queues, version)| {
                Change::PutTopic(TopicConfig {
                    queues,
                    version,
                    deleted: version % 2 == 0,
                    ..TopicConfig::normal(Topic::stored(&t))
                })
            }),
            ("[a-c]", any::<bool>(), any::<u32>()).prop_map(|(g, fifo, max_attempts)| {
                Change::PutGroup(GroupConfig {
                    fifo,
                    max_attempts,
                    ..GroupConfig::concurrent(Group::stored(&g))
                })
            }),
            any::<[u8; 16]>().prop_map(|k| Change::Key(ReceiptKey(k))),
            (cursor.clone(), any::<u64>(), 0i64..1 << 40, 0i64..1 << 30, "[a-z]{0,3}", offsets.clone())
                .prop_map(|(cursor, next, since, invisible, client, offsets)| Change::Popped {
                    cursor,
                    next,
                    since: Timestamp(since),
                    visible_at: Timestamp(since + invisible),
                    client: Some(client).filter(|c| !c.is_empty()).map(Arc::from),
                    offsets,
                }),
            (cursor.clone(), any::<u64>(), 0i64..1 << 40, any::<u64>(), any::<[u64; 2]>(), 1u32..9).prop_map(
                |(cursor, next, since, attempt_id, [offset, lane], attempt)| Change::Ordered {
                    cursor,
                    next,
                    since: Timestamp(since),
                    visible_at: Timestamp(since + 1),
                    client: None,
                    attempt_id,
                    taken: vec![Taken { offset, lane, attempt }],
                    held: vec![(lane, offset)],
                }
            ),
            (any::<i64>(), any::<u64>())
                .prop_map(|(due, id)| Change::Recalled(TimerKey { due: Timestamp(due), id })),
            (any::<i64>(), any::<u64>()).prop_map(|(at, id)| Change::Checked { id, check_at: Timestamp(at) }),
            (any::<i64>(), any::<u64>()).prop_map(|(at, id)| Change::RolledBack { id, at: Timestamp(at) }),
            (cursor.clone(), offsets.clone())
                .prop_map(|(cursor, offsets)| Change::Unsent { cursor, offsets }),
            (cursor.clone(), any::<bool>(), offsets).prop_map(|(cursor, moved, offsets)| Change::Done {
                cursor,
                moved,
                offsets
            }),
            (cursor.clone(), any::<u64>(), any::<i64>(), any::<bool>()).prop_map(
                |(cursor, offset, at, renewal)| {
                    Change::Visible { cursor, offset, visible_at: Timestamp(at), renewal }
                }
            ),
            (cursor, any::<u64>()).prop_map(|(cursor, next)| Change::Seek { cursor, next }),
        ]
    }

    proptest! {
        #[test]
        fn round_trip(changes in prop::collection::vec(any_change(), 1..20)) {
            let mut writer = Writer::default();
            changes.iter().for_each(|c| writer.push(c));
            prop_assert_eq!(decode(&writer.take()).unwrap(), changes);
        }

        #[test]
        fn foreign_bytes_do_not_panic(mut body: Vec<u8>) {
            let _ = decode(&body);
            body.insert(0, VERSION);
            let _ = decode(&body);
        }
    }

    #[test]
    fn what_could_not_be_stored_goes_first() {
        let seek = |next| {
            let cursor = CursorKey { group: Group::stored("g"), topic: Topic::stored("t"), queue: 0 };
            Change::Seek { cursor, next }
        };
        let mut writer = Writer::default();
        writer.push(&seek(1));
        let body = writer.take();
        writer.restore(body);
        writer.push(&seek(2));
        assert_eq!(decode(&writer.take()).unwrap(), [seek(1), seek(2)]);
    }

    #[test]
    fn a_newer_version_is_refused() {
        assert_eq!(decode(&[2, 0]), Err(ChangeError::Version { found: 2 }));
    }
}
