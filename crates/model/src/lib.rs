//! The nouns of FerryMQ: validated when made, without I/O and without async.
//! Every other crate speaks in these; none of them is allowed to invent its own.

pub mod bound;
pub mod codec;
pub mod config;
pub mod filter;
pub mod hash;
pub mod limits;
pub mod message;
pub mod name;
pub mod receipt;
pub mod seal;
pub mod time;

pub use bound::Bound;
pub use config::{Backoff, GroupConfig, MessageType, TopicConfig};
pub use filter::TagFilter;
pub use name::{Group, NameError, Topic};
pub use receipt::Receipt;
pub use seal::{RecallHandle, ReceiptKey, Sealed, TransactionId};
pub use time::{Clock, ManualClock, SystemClock, Timestamp};
