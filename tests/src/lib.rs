//! What the tests share: real processes, a cluster in this process, and a client that speaks the raw protocol.

pub mod client;
pub mod cluster;
pub mod process;
pub mod sim;
