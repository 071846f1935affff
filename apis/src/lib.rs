//! The wire contracts: what official clients speak (`v2`), what FerryMQ's roles speak among themselves
//! (`internal`, `brokers`), what `ferry` asks of a proxy (`admin`), and the tables between wire and model.

pub mod brokers;
pub mod codec;
pub mod context;
pub mod convert;
pub mod names;
pub mod remote;
pub mod status;
pub mod unary;

#[allow(clippy::all, clippy::unwrap_used)]
mod generated {
    pub mod v2 {
        tonic::include_proto!("apache.rocketmq.v2");
    }
    // Nested as the packages are: generated code refers to its neighbours by path.
    pub mod ferrymq {
        pub mod internal {
            pub mod v1 {
                tonic::include_proto!("ferrymq.internal.v1");
            }
        }
        pub mod admin {
            pub mod v1 {
                tonic::include_proto!("ferrymq.admin.v1");
            }
        }
    }
}

pub use generated::ferrymq::admin::v1 as admin;
pub use generated::ferrymq::internal::v1 as internal;
pub use generated::v2;

/// All descriptors, for reflection and for comparing with an official client's.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Version of the internal protocol.
pub const INTERNAL_VERSION: u32 = 1;
