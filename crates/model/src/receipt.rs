//! Receipt handles: which delivery of which message ([`Sealed`] says how they are written).
//!
//! ```text
//! topic kind (0 the topic itself, 1 the group's retry topic)
//! group, topic, queue id, queue offset, log offset, handed out at, invisible until (ms)    LEB128 fields
//! ```
//! The time in it never decides whether a message is still invisible: the broker's row does.

use crate::codec::{self, CodecError, Reader};
use crate::seal::Sealed;
use crate::{Group, Timestamp, Topic};

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

impl Sealed for Receipt {
    const VERSION: &'static str = "1.";

    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(self.from_retry));
        codec::put_bytes(out, self.group.as_str().as_bytes());
        codec::put_bytes(out, self.topic.as_str().as_bytes());
        codec::put_u64(out, u64::from(self.queue));
        codec::put_u64(out, self.offset);
        codec::put_u64(out, self.log_offset);
        codec::put_i64(out, self.popped_at.0);
        codec::put_i64(out, self.invisible_until.0);
    }

    fn take(r: &mut Reader<'_>) -> Result<Self, CodecError> {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::seal::{ReceiptKey, SealError};

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
            prop_assert_eq!(Receipt::broker_of(&text), Some("broker-a"));
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
        assert_eq!(Receipt::decode(&text, &ReceiptKey([8; 16])), Err(SealError::Forged));
    }
}
