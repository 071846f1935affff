//! A receipt handle: a forged one never passes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use model::{Receipt, ReceiptKey, RecallHandle, Sealed, TransactionId};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = (Receipt::broker_of(text), RecallHandle::broker_of(text), TransactionId::broker_of(text));
    let key = ReceiptKey([0x5a; 16]);
    assert!(RecallHandle::decode(text, &key).is_err() && TransactionId::decode(text, &key).is_err());
    assert!(Receipt::decode(text, &ReceiptKey([0x5a; 16])).is_err(), "a handle without the key was taken");
});
