//! A storage node: the engine, who runs it, and the calls that proxies make.
//!
//! ```text
//!  service (gRPC) ─┐
//!  local           ┴─► handle (async, checks, reads bodies) ──commands──► driver ──► engine_loop (owns the Engine)
//!                                                                            └─► sync thread (fdatasync, then replies)
//! ```
//! Wired by `ferry`; no other role may depend on this crate.

pub mod command;
pub mod driver;
pub mod engine_loop;
pub mod error;
pub mod handle;
mod held;
pub mod local;
pub mod node;
pub mod register;
pub mod service;
mod waiters;

pub use handle::Broker;
pub use local::LocalBrokers;
pub use node::{BrokerConfig, Node};
