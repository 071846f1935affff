//! A receipt handle: a forged one never passes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use model::{Receipt, ReceiptKey, receipt};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = receipt::broker_of(text);
    assert!(Receipt::decode(text, &ReceiptKey([0x5a; 16])).is_err(), "a handle without the key was taken");
});
