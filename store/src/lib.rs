//! The storage engine: owns every byte on disk, knows no network, no async and no thread.
//! Only `broker` (and the offline tools in `ferry`) may use it.
//!
//! ```text
//!  Engine ── the one writer: stages messages and changes, commits them as one group
//!    ├─ log      CommitLog files: the only truth
//!    ├─ queue    20-byte entries per queue     ┐ functions of a prefix of the log;
//!    ├─ keys     where the messages of a key are   │
//!    ├─ pop      what is in flight, per group  │ each says which prefix it covers
//!    ├─ timer    messages that wait for their time │
//!    ├─ txn      transactions                  │
//!    └─ meta     topics, groups, the key       ┘
//!  fs, kv ── the seams to disk and RocksDB; both have a memory version that can lose and fail
//! ```

pub mod change;
pub mod checkpoint;
pub mod engine;
#[cfg(test)]
mod engine_test;
pub mod error;
pub mod fs;
#[cfg(test)]
mod hold_test;
pub mod import;
pub mod inspect;
#[cfg(test)]
mod inspect_test;
pub mod keys;
#[cfg(test)]
mod kinds_test;
pub mod kv;
pub mod log;
pub mod meta;
#[cfg(test)]
mod model_test;
pub mod pop;
pub mod queue;
pub mod recent;
pub mod timer;
pub mod txn;

pub use engine::{Engine, FlushMode, Hold, NewMessage, Options, Popped, RecoveryReport, Retention};
pub use error::StoreError;
