//! A change record: what decodes encodes to something that decodes to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use store::change::{self, Writer};

fuzz_target!(|data: &[u8]| {
    if let Ok(changes) = change::decode(data) {
        let mut writer = Writer::default();
        changes.iter().for_each(|c| writer.push(c));
        if !writer.is_empty() {
            assert_eq!(change::decode(&writer.take()).as_ref(), Ok(&changes));
        }
    }
});
