//! Hashes that must equal the reference's, and one of our own that is stored and must never change.

use std::hash::Hasher;

use siphasher::sip::SipHasher24;

/// SipHash-2-4 with an all-zero key, never 0: for message groups, attempt ids and message ids.
pub fn stable_hash(text: &str) -> u64 {
    let mut hasher = SipHasher24::new();
    hasher.write(text.as_bytes());
    hasher.finish().max(1)
}

/// Java's `String.hashCode`: over UTF-16 units.
pub fn java_hash(text: &str) -> i32 {
    java_hash_on(0, text)
}

/// The hash of a text whose beginning has the hash `start`.
pub fn java_hash_on(start: i32, text: &str) -> i32 {
    if text.is_ascii() {
        return text.bytes().fold(start, |h, b| h.wrapping_mul(31).wrapping_add(i32::from(b)));
    }
    text.encode_utf16().fold(start, |h, u| h.wrapping_mul(31).wrapping_add(i32::from(u)))
}

/// The tag code of a queue entry: the hash, sign-extended; 0 where there is no tag.
pub fn tag_code(tag: Option<&str>) -> i64 {
    match tag {
        Some(tag) if !tag.is_empty() => i64::from(java_hash(tag)),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_changes() {
        assert_eq!(stable_hash(""), 0x1e92_4b9d_7377_00d7);
        assert_eq!(stable_hash("order-42"), stable_hash(&String::from("order-42")));
    }

    #[test]
    fn equals_java() {
        assert_eq!(java_hash(""), 0);
        assert_eq!(java_hash("TagA"), 2_598_919);
        assert_eq!(java_hash("hello world"), 1_794_106_052);
        assert_eq!(java_hash("é"), 233);
        assert_eq!(java_hash_on(java_hash("hello "), "world"), java_hash("hello world"));
    }
}
