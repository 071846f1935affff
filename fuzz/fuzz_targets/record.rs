//! A record of the log: decoded, or refused; what passes its checksum encodes to the same bytes again.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use store::log::record::{self, Check};

fuzz_target!(|data: &[u8]| {
    let offset = record::get64(data, record::PHYSICAL_OFFSET_AT).unwrap_or(0);
    let data = Bytes::copy_from_slice(data);
    for check in [Check::Shape, Check::Whole, Check::WholeOrBody] {
        if let Ok(record) = record::decode(&data, offset, check) {
            assert!(record.size as usize <= data.len());
            assert_eq!(record.log_offset, offset);
            let _ = (record.property("TAGS"), record.sent_properties());
        }
    }
});
