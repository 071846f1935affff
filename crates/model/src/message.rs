//! A message's properties in the form the log keeps them: `key 0x01 value 0x02 …`, and the names that are reserved.

pub const NAME_SEPARATOR: u8 = 1;
pub const PROPERTY_SEPARATOR: u8 = 2;

pub const TAGS: &str = "TAGS";
pub const KEYS: &str = "KEYS";
pub const UNIQ_KEY: &str = "UNIQ_KEY";
pub const BORN_HOST: &str = "__BORNHOST";
pub const BORN_TIMESTAMP: &str = "BORN_TIMESTAMP";
pub const TRACE_CONTEXT: &str = "TRACE_CONTEXT";
pub const SHARDING_KEY: &str = "__SHARDINGKEY";
pub const RETRY_TOPIC: &str = "RETRY_TOPIC";
pub const TRAN_MSG: &str = "TRAN_MSG";
pub const TIMER_DELIVER_MS: &str = "TIMER_DELIVER_MS";
pub const CRC: &str = "__CRC32#";
pub const DLQ_ORIGIN_TOPIC: &str = "DLQ_ORIGIN_TOPIC";
pub const DLQ_ORIGIN_MESSAGE_ID: &str = "DLQ_ORIGIN_MESSAGE_ID";
/// On a retry or a dead letter: the place it was moved from, `topic queue offset`. It settles that place.
pub const MOVED_FROM: &str = "FERRY_MOVED_FROM";

/// Of a message that waits (a scheduled one, a half message): where it is to go.
pub const REAL_TOPIC: &str = "REAL_TOPIC";
pub const REAL_QUEUE: &str = "REAL_QID";
/// Seconds before a transaction is asked after.
pub const CHECK_IMMUNITY: &str = "CHECK_IMMUNITY_TIME_IN_SECONDS";
/// On a record that waits and was written again: its id, the log offset it had first.
pub const HELD_ID: &str = "FERRY_HELD_ID";
/// On a message that has waited: what it was, `timer DUE ID` or `transaction ID`. It settles that.
pub const RELEASED: &str = "FERRY_RELEASED";

/// The body is compressed.
pub const FLAG_COMPRESSED: u32 = 1;
/// Where in a transaction it is: 0 not at all, prepared, committed, all bits rolled back.
pub const FLAG_TRANSACTION: u32 = 3 << 2;
pub const FLAG_PREPARED: u32 = 1 << 2;
pub const FLAG_COMMITTED: u32 = 2 << 2;
/// The born host is 20 bytes (IPv6).
pub const FLAG_BORN_HOST_V6: u32 = 1 << 4;
pub const FLAG_STORE_HOST_V6: u32 = 1 << 5;

/// Names that a user property may not have; they are also hidden from consumers.
const RESERVED: &[&str] = &[
    "TRACE_ON",
    "MSG_REGION",
    "KEYS",
    "TAGS",
    "WAIT",
    "DELAY",
    "RETRY_TOPIC",
    "REAL_TOPIC",
    "REAL_QID",
    "TRAN_MSG",
    "PGROUP",
    "MIN_OFFSET",
    "MAX_OFFSET",
    "BUYER_ID",
    "ORIGIN_MESSAGE_ID",
    "TRANSFER_FLAG",
    "CORRECTION_FLAG",
    "MQ2_FLAG",
    "RECONSUME_TIME",
    "UNIQ_KEY",
    "EXTEND_UNIQ_INFO",
    "MAX_RECONSUME_TIMES",
    "CONSUME_START_TIME",
    "POP_CK",
    "POP_CK_OFFSET",
    "1ST_POP_TIME",
    "TRAN_PREPARED_QUEUE_OFFSET",
    "DUP_INFO",
    "INSTANCE_ID",
    "CORRELATION_ID",
    "REPLY_TO_CLIENT",
    "TTL",
    "ARRIVE_TIME",
    "PUSH_REPLY_TIME",
    "CLUSTER",
    "MSG_TYPE",
    "INNER_MULTI_QUEUE_OFFSET",
    "INNER_MULTI_DISPATCH",
    "INNER_NUM",
    "INNER_BASE",
    "__BORNHOST",
    "BORN_TIMESTAMP",
    "DLQ_ORIGIN_TOPIC",
    "DLQ_ORIGIN_MESSAGE_ID",
    "__CRC32#",
    "__SHARDINGKEY",
    "TRACE_CONTEXT",
    "CHECK_IMMUNITY_TIME_IN_SECONDS",
    "TRANSACTION_CHECK_TIMES",
    "__transactionId__",
    "_SYS_MSG_PRIORITY_",
    "__LITE_TOPIC",
    MOVED_FROM,
    HELD_ID,
    RELEASED,
];

pub fn is_reserved(key: &str) -> bool {
    key.starts_with("TIMER_") || RESERVED.contains(&key)
}

pub fn put_property(out: &mut Vec<u8>, key: &str, value: &str) {
    out.extend_from_slice(key.as_bytes());
    out.push(NAME_SEPARATOR);
    out.extend_from_slice(value.as_bytes());
    out.push(PROPERTY_SEPARATOR);
}

/// The properties in their order; a pair that is not text or has no separator is left out.
pub fn properties(encoded: &[u8]) -> impl Iterator<Item = (&str, &str)> {
    encoded.split(|b| *b == PROPERTY_SEPARATOR).filter_map(|pair| {
        let at = pair.iter().position(|b| *b == NAME_SEPARATOR)?;
        Some((std::str::from_utf8(&pair[..at]).ok()?, std::str::from_utf8(&pair[at + 1..]).ok()?))
    })
}

pub fn property<'a>(encoded: &'a [u8], key: &str) -> Option<&'a str> {
    properties(encoded).find(|(k, _)| *k == key).map(|(_, v)| v)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn properties_round_trip(pairs in prop::collection::vec(("[a-zA-Z#_ é]{1,9}", "[^\u{1}\u{2}]{0,9}"), 0..9)) {
            let mut out = Vec::new();
            for (k, v) in &pairs {
                put_property(&mut out, k, v);
            }
            let read: Vec<_> = properties(&out).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
            prop_assert_eq!(read, pairs);
        }

        #[test]
        fn foreign_bytes_do_not_panic(data: Vec<u8>) {
            properties(&data).count();
        }
    }
}
