//! A queue entry.
#![no_main]

use libfuzzer_sys::fuzz_target;
use store::queue::Entry;

fuzz_target!(|data: &[u8]| {
    if let Some(entry) = Entry::decode(data) {
        assert!(data.len() >= 20 && entry.size > 0);
    }
});
