//! Header and entries of the key index.
#![no_main]

use libfuzzer_sys::fuzz_target;
use store::keys::{self, Header};

fuzz_target!(|data: &[u8]| {
    assert_eq!(Header::decode(data).is_some(), data.len() >= 40);
    for entry in data.chunks(20) {
        assert_eq!(keys::decode_entry(entry).is_some(), entry.len() == 20);
    }
    let mut count = 0;
    keys::keys_of("topic", data, |_| count += 1);
    assert!(count <= data.len());
});
