//! Receipt handles: self-contained, versioned, authenticated. A proxy reads only the routing part; the broker
//! checks the rest with a key that lives in the replica set's log, so any proxy and any later leader accept them.
//!
//! ```text
//! "1." broker-name "." url-safe base64 of:
//!   topic kind (0 the topic itself, 1 the group's retry topic)
//!   group, topic, queue id, queue offset, log offset, handed out at, invisible until (ms)    LEB128 fields
//!   MAC (16 bytes): SipHash-2-4-128 of version, broker name and the fields
//! ```
//! The time in it never decides whether a message is still invisible: the broker's row does.

use std::hash::Hasher;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use siphasher::sip128::{Hasher128, SipHasher24};

use crate::codec::{self, Reader};
use crate::{Group, Timestamp, Topic};

const VERSION: &str = "1.";
const MAC_BYTES: usize = 16;

/// The secret of a replica set.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ReceiptKey(pub [u8; 16]);

impl std::fmt::Debug for ReceiptKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReceiptKey(…)")
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    pub group: Group,
    /// The topic that was received from; not the retry topic.
    pub topic: Topic,
    pub from_retry: bool,
    pub queue: u32,
    pub offset: u64,
    pub log_offset: u64,
    /// Tells one delivery of a message from another.
    pub popped_at: Timestamp,
    pub invisible_until: Timestamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceiptError {
    #[error("the receipt handle is malformed; use the one that came with the message, unchanged")]
    Malformed,
    #[error("the receipt handle was not made by this replica set, or has been altered")]
    Forged,
}

impl Receipt {
    pub fn encode(&self, broker: &str, key: &ReceiptKey) -> String {
        let mut data = Vec::with_capacity(64 + self.topic.as_str().len());
        data.push(u8::from(self.from_retry));
        codec::put_bytes(&mut data, self.group.as_str().as_bytes());
        codec::put_bytes(&mut data, self.topic.as_str().as_bytes());
        codec::put_u64(&mut data, u64::from(self.queue));
        codec::put_u64(&mut data, self.offset);
        codec::put_u64(&mut data, self.log_offset);
        codec::put_i64(&mut data, self.popped_at.0);
        codec::put_i64(&mut data, self.invisible_until.0);
        let mac = mac(broker, &data, key);
        data.extend_from_slice(&mac);
        let mut text = String::with_capacity(3 + broker.len() + data.len() * 4 / 3 + 4);
        text.push_str(VERSION);
        text.push_str(broker);
        text.push('.');
        URL_SAFE_NO_PAD.encode_string(&data, &mut text);
        text
    }

    pub fn decode(text: &str, key: &ReceiptKey) -> Result<Self, ReceiptError> {
        let (broker, encoded) = split(text).ok_or(ReceiptError::Malformed)?;
        let data = URL_SAFE_NO_PAD.decode(encoded).map_err(|_| ReceiptError::Malformed)?;
        let at = data.len().checked_sub(MAC_BYTES).ok_or(ReceiptError::Malformed)?;
        let (fields, given) = data.split_at(at);
        let wrong = mac(broker, fields, key).iter().zip(given).fold(0, |acc, (a, b)| acc | (a ^ b));
        if wrong != 0 {
            return Err(ReceiptError::Forged);
        }
        Self::take(&mut Reader::new(fields)).map_err(|_| ReceiptError::Malformed)
    }

    fn take(r: &mut Reader<'_>) -> Result<Self, codec::CodecError> {
        let from_retry = r.u8()? == 1;
        Ok(Self {
            from_retry,
            group: Group::stored(r.str()?),
            topic: Topic::stored(r.str()?),
            queue: r.u32()?,
            offset: r.u64()?,
            log_offset: r.u64()?,
            popped_at: Timestamp(r.i64()?),
            invisible_until: Timestamp(r.i64()?),
        })
    }
}

/// The broker (replica set) that a handle belongs to: all that a proxy may read of it.
pub fn broker_of(handle: &str) -> Option<&str> {
    split(handle).map(|(broker, _)| broker)
}

fn split(text: &str) -> Option<(&str, &str)> {
    text.strip_prefix(VERSION)?.rsplit_once('.').filter(|(broker, _)| !broker.is_empty())
}

fn mac(broker: &str, fields: &[u8], key: &ReceiptKey) -> [u8; MAC_BYTES] {
    let mut hasher = SipHasher24::new_with_key(&key.0);
    hasher.write(VERSION.as_bytes());
    hasher.write(&(broker.len() as u64).to_le_bytes());
    hasher.write(broker.as_bytes());
    hasher.write(fields);
    hasher.finish128().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn receipt(queue: u32, offset: u64, from_retry: bool) -> Receipt {
        Receipt {
            group: Group::stored("ns%g"),
            topic: Topic::stored("t"),
            from_retry,
            queue,
            offset,
            log_offset: offset * 7,
            popped_at: Timestamp(3),
            invisible_until: Timestamp(-5 + offset as i64),
        }
    }

    proptest! {
        #[test]
        fn round_trip(queue: u32, offset in 0u64..1 << 40, retry: bool, key: [u8; 16]) {
            let text = receipt(queue, offset, retry).encode("broker-a", &ReceiptKey(key));
            prop_assert_eq!(broker_of(&text), Some("broker-a"));
            prop_assert_eq!(Receipt::decode(&text, &ReceiptKey(key)).unwrap(), receipt(queue, offset, retry));
        }

        #[test]
        fn an_altered_handle_is_refused(at in 0usize..200, to in 32u8..127) {
            let key = ReceiptKey([7; 16]);
            let text = receipt(3, 9, false).encode("b", &key);
            let mut bytes = text.clone().into_bytes();
            let at = at % bytes.len();
            bytes[at] = to;
            let altered = String::from_utf8(bytes).unwrap();
            prop_assert!(altered == text || Receipt::decode(&altered, &key).is_err());
        }

        #[test]
        fn foreign_text_does_not_panic(text: String) {
            let _ = Receipt::decode(&text, &ReceiptKey([0; 16]));
            let _ = Receipt::decode(&format!("1.b.{text}"), &ReceiptKey([0; 16]));
        }
    }

    #[test]
    fn another_key_is_forged() {
        let text = receipt(3, 9, false).encode("b", &ReceiptKey([7; 16]));
        assert_eq!(Receipt::decode(&text, &ReceiptKey([8; 16])), Err(ReceiptError::Forged));
    }
}
