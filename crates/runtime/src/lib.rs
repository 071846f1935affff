//! Process scaffolding that every role shares: configuration, logs, sockets, TLS, signals.
//! Knows nothing of messages.

pub mod bodies;
pub mod config;
pub mod net;
pub mod random;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
