//! The name server: which brokers live, and which topics they have. Each name server is independent.

pub mod local;
pub mod node;
pub mod registry;
pub mod service;

pub use local::LocalNameServer;
