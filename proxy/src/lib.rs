//! The stateless front of `apache.rocketmq.v2`: terminates official clients, asks brokers, answers.
//! Holds nothing that a client needs after a crash: sessions are hints, handles are self-contained.
//!
//! ```text
//!  service/*  one file per RPC family: check, ask, answer      admin   what `ferry` asks
//!  session    what clients said of themselves                  routes  the cluster as name servers see it
//! ```

pub mod admin;
pub mod call;
pub mod node;
pub mod routes;
pub mod service;
pub mod session;

pub use node::{Proxy, ProxyConfig};
