//! What a client keeps for the server and gives back unchanged: receipt handles, recall handles, transaction ids.
//! Self-contained, versioned, authenticated. A proxy reads only the routing part; the broker checks the rest with a key
//! that lives in the replica set's log, so any proxy and any later leader accept them.
//!
//! ```text
//! version "." broker-name "." url-safe base64 of: fields, MAC (16 bytes): SipHash-2-4-128 of version, broker name, fields
//! version   "1" receipt handle, "r1" recall handle, "t1" transaction id
//! ```

use std::hash::Hasher;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use siphasher::sip128::{Hasher128, SipHasher24};

use crate::codec::{self, CodecError, Reader};
use crate::{Timestamp, Topic};

const MAC_BYTES: usize = 16;

/// The secret of a replica set.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ReceiptKey(pub [u8; 16]);

impl std::fmt::Debug for ReceiptKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReceiptKey(…)")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error("is malformed; use the one that the server gave, unchanged")]
    Malformed,
    #[error("was not made by this replica set, or has been altered")]
    Forged,
}

/// What can be sealed.
pub trait Sealed: Sized {
    const VERSION: &'static str;
    fn put(&self, out: &mut Vec<u8>);
    fn take(r: &mut Reader<'_>) -> Result<Self, CodecError>;

    fn encode(&self, broker: &str, key: &ReceiptKey) -> String {
        let mut data = Vec::with_capacity(128);
        self.put(&mut data);
        let mac = mac(Self::VERSION, broker, &data, key);
        data.extend_from_slice(&mac);
        let mut text = String::with_capacity(4 + broker.len() + data.len() * 4 / 3 + 4);
        text.push_str(Self::VERSION);
        text.push_str(broker);
        text.push('.');
        URL_SAFE_NO_PAD.encode_string(&data, &mut text);
        text
    }

    fn decode(text: &str, key: &ReceiptKey) -> Result<Self, SealError> {
        let (broker, encoded) = split(Self::VERSION, text).ok_or(SealError::Malformed)?;
        let data = URL_SAFE_NO_PAD.decode(encoded).map_err(|_| SealError::Malformed)?;
        let at = data.len().checked_sub(MAC_BYTES).ok_or(SealError::Malformed)?;
        let (fields, given) = data.split_at(at);
        let expected = mac(Self::VERSION, broker, fields, key);
        let wrong = expected.iter().zip(given).fold(0, |acc, (a, b)| acc | (a ^ b));
        if wrong != 0 {
            return Err(SealError::Forged);
        }
        Self::take(&mut Reader::new(fields)).map_err(|_| SealError::Malformed)
    }

    /// The broker (replica set) that it belongs to: all that a proxy may read of it.
    fn broker_of(text: &str) -> Option<&str> {
        split(Self::VERSION, text).map(|(broker, _)| broker)
    }
}

fn split<'a>(version: &str, text: &'a str) -> Option<(&'a str, &'a str)> {
    text.strip_prefix(version)?.rsplit_once('.').filter(|(broker, _)| !broker.is_empty())
}

fn mac(version: &str, broker: &str, fields: &[u8], key: &ReceiptKey) -> [u8; MAC_BYTES] {
    let mut hasher = SipHasher24::new_with_key(&key.0);
    hasher.write(version.as_bytes());
    hasher.write(&(broker.len() as u64).to_le_bytes());
    hasher.write(broker.as_bytes());
    hasher.write(fields);
    hasher.finish128().as_bytes()
}

/// Takes a scheduled message back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecallHandle {
    pub topic: Topic,
    pub due: Timestamp,
    pub id: u64,
    pub message_id: String,
}

impl Sealed for RecallHandle {
    const VERSION: &'static str = "r1.";

    fn put(&self, out: &mut Vec<u8>) {
        codec::put_bytes(out, self.topic.as_str().as_bytes());
        codec::put_i64(out, self.due.0);
        codec::put_u64(out, self.id);
        codec::put_bytes(out, self.message_id.as_bytes());
    }

    fn take(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let (topic, due, id) = (Topic::stored(r.str()?), Timestamp(r.i64()?), r.u64()?);
        Ok(Self { topic, due, id, message_id: r.str()?.to_owned() })
    }
}

/// Names a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransactionId {
    pub topic: Topic,
    pub id: u64,
}

impl Sealed for TransactionId {
    const VERSION: &'static str = "t1.";

    fn put(&self, out: &mut Vec<u8>) {
        codec::put_bytes(out, self.topic.as_str().as_bytes());
        codec::put_u64(out, self.id);
    }

    fn take(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        Ok(Self { topic: Topic::stored(r.str()?), id: r.u64()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn recall() -> RecallHandle {
        RecallHandle { topic: Topic::stored("n%t"), due: Timestamp(5), id: 9, message_id: "m".into() }
    }

    proptest! {
        #[test]
        fn round_trip(topic in "[a-z%]{1,9}", due: i64, id: u64, message_id: String, key: [u8; 16]) {
            let key = ReceiptKey(key);
            let handle = RecallHandle { topic: Topic::stored(&topic), due: Timestamp(due), id, message_id };
            let text = handle.encode("broker.a", &key);
            prop_assert_eq!(RecallHandle::broker_of(&text), Some("broker.a"));
            prop_assert_eq!(RecallHandle::decode(&text, &key).unwrap(), handle);
            let transaction = TransactionId { topic: Topic::stored(&topic), id };
            let text = transaction.encode("b", &key);
            prop_assert_eq!(TransactionId::decode(&text, &key).unwrap(), transaction);
        }

        #[test]
        fn an_altered_one_is_refused(at in 0usize..200, to in 32u8..127) {
            let key = ReceiptKey([7; 16]);
            let text = recall().encode("b", &key);
            let mut bytes = text.clone().into_bytes();
            let at = at % bytes.len();
            bytes[at] = to;
            let altered = String::from_utf8(bytes).unwrap();
            prop_assert!(altered == text || RecallHandle::decode(&altered, &key).is_err());
        }

        #[test]
        fn foreign_text_does_not_panic(text: String) {
            let key = ReceiptKey([0; 16]);
            let _ = (RecallHandle::decode(&text, &key), TransactionId::decode(&text, &key));
            let _ = RecallHandle::decode(&format!("r1.b.{text}"), &key);
            let _ = TransactionId::decode(&format!("t1.b.{text}"), &key);
        }
    }

    #[test]
    fn one_kind_is_not_taken_for_another() {
        let key = ReceiptKey([7; 16]);
        let text = recall().encode("b", &key);
        assert_eq!(TransactionId::decode(&text, &key), Err(SealError::Malformed));
        let disguised = text.replacen("r1.", "t1.", 1);
        assert_eq!(TransactionId::decode(&disguised, &key), Err(SealError::Forged));
        assert_eq!(RecallHandle::decode(&text, &ReceiptKey([8; 16])), Err(SealError::Forged));
    }
}
