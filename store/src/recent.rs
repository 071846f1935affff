//! Messages that were sent lately: a producer that got no answer sends again, and the message is there once.
//!
//! A message is the same if topic, message id, born time and body are. Remembered are the last 256 Ki at least,
//! unless they are older than 30 s; and after a restart those since the checkpoint before the last.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use model::{Timestamp, hash, message};

use crate::engine::Stored;

/// Messages of one generation: 8 MiB. There are two.
pub const GENERATION_MAX: usize = if cfg!(test) { 64 } else { 256 * 1024 };
pub const GENERATION_MS: i64 = 30_000;

/// What is remembered of a message.
#[derive(Clone, Copy)]
struct Seen {
    log_offset: u64,
    queue_offset: u64,
    queue: u32,
    /// Of born time and body.
    check: u32,
}

/// The keys are hashes already.
#[derive(Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.0 = self.0.rotate_left(8) ^ u64::from(*b));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

type Generation = HashMap<u64, Seen, BuildHasherDefault<AsIs>>;

#[derive(Default)]
pub struct Recent {
    now: Generation,
    before: Generation,
    since: Timestamp,
}

/// What a message is recognised by.
#[derive(Clone, Copy)]
pub struct Fingerprint {
    key: u64,
    check: u32,
}

impl Fingerprint {
    /// Nothing if the client has not given the message an id and a born time: it cannot be told from others like it.
    pub fn of(topic: &str, properties: &[u8], born_timestamp_ms: i64, body: &[u8]) -> Option<Self> {
        let (mut id, mut born) = (None, false);
        for (key, value) in message::properties(properties) {
            match key {
                message::UNIQ_KEY => id = Some(value).filter(|id| !id.is_empty()),
                message::BORN_TIMESTAMP => born = true,
                _ => continue,
            }
            if id.is_some() && born {
                break;
            }
        }
        let id = id.filter(|_| born)?;
        let key = hash::stable_hash(id) ^ (hash::java_hash(topic) as u32 as u64).rotate_left(32);
        let check = (born_timestamp_ms as u32).rotate_left(7) ^ crc32fast::hash(body);
        Some(Self { key, check })
    }
}

impl Recent {
    pub fn len(&self) -> usize {
        self.now.len() + self.before.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the message is, if it was sent before.
    pub fn find(&self, message: Fingerprint) -> Option<Stored> {
        let seen = self.now.get(&message.key).or_else(|| self.before.get(&message.key))?;
        let Seen { log_offset, queue_offset, queue, check } = *seen;
        (check == message.check).then_some(Stored { queue, queue_offset, log_offset })
    }

    pub fn remember(&mut self, message: Fingerprint, stored: Stored, now: Timestamp) {
        if self.now.len() >= GENERATION_MAX || now.since(self.since) >= GENERATION_MS {
            std::mem::swap(&mut self.now, &mut self.before);
            self.now.clear();
            if now.since(self.since) >= 2 * GENERATION_MS {
                self.before.clear();
            }
            self.since = now;
        }
        let Stored { queue, queue_offset, log_offset } = stored;
        let seen = Seen { log_offset, queue_offset, queue, check: message.check };
        self.now.insert(message.key, seen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(id: &str, born: i64, byte: u8) -> Fingerprint {
        Fingerprint::of("t", &properties(id, true), born, &[byte]).unwrap()
    }

    fn properties(id: &str, born: bool) -> Vec<u8> {
        let mut out = Vec::new();
        message::put_property(&mut out, message::UNIQ_KEY, id);
        if born {
            message::put_property(&mut out, message::BORN_TIMESTAMP, "5");
        }
        out
    }

    fn stored(log_offset: u64) -> Stored {
        Stored { queue: 1, queue_offset: 2, log_offset }
    }

    #[test]
    fn the_same_message_and_no_other() {
        let mut recent = Recent::default();
        recent.remember(of("a", 5, 9), stored(7), Timestamp(0));
        assert_eq!(recent.find(of("a", 5, 9)), Some(stored(7)));
        assert_eq!(recent.find(of("a", 6, 9)), None, "another message that was given the same id");
        assert_eq!(recent.find(of("a", 5, 8)), None);
        assert_eq!(recent.find(of("b", 5, 9)), None);
        assert_eq!(recent.find(Fingerprint::of("u", &properties("a", true), 5, &[9]).unwrap()), None);
        assert!(Fingerprint::of("t", &properties("", true), 5, &[9]).is_none());
        assert!(Fingerprint::of("t", &properties("a", false), 5, &[9]).is_none());
    }

    #[test]
    fn bounded_in_number_and_time() {
        let mut recent = Recent::default();
        for i in 0..5 * GENERATION_MAX {
            recent.remember(of(&i.to_string(), 0, 0), stored(i as u64), Timestamp(0));
            assert!(recent.len() <= 2 * GENERATION_MAX);
            let oldest = i.saturating_sub(GENERATION_MAX - 1);
            assert!(recent.find(of(&oldest.to_string(), 0, 0)).is_some());
        }
        recent.remember(of("x", 0, 0), stored(1), Timestamp(GENERATION_MS));
        recent.remember(of("y", 0, 0), stored(1), Timestamp(2 * GENERATION_MS));
        assert!(recent.find(of("x", 0, 0)).is_some());
        recent.remember(of("z", 0, 0), stored(1), Timestamp(9 * GENERATION_MS));
        assert_eq!(recent.len(), 1);
    }
}
