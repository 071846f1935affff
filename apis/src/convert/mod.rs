//! Between the wire of official clients and what brokers store.

pub mod address;
pub mod metadata;
pub mod receive;
pub mod send;
