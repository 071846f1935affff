//! A message's properties.
#![no_main]

use libfuzzer_sys::fuzz_target;
use model::message;

fuzz_target!(|data: &[u8]| {
    for (key, value) in message::properties(data) {
        assert!(key.len() + value.len() < data.len());
        let _ = message::is_reserved(key);
    }
});
