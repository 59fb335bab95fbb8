//! What the processes agree on: messages and services generated from `proto/`, the catalogue of events, the topics.
//!
//! No I/O. The envelope around an event is in the crate `envelope`.

pub mod catalogue;
pub mod topics;
pub mod wire;

mod card;

mod generated {
    #![allow(
        clippy::allow_attributes,
        clippy::allow_attributes_without_reason,
        unreachable_pub,
        unused_qualifications,
        reason = "generated code"
    )]
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

pub use generated::shop;

/// Descriptors of everything in `proto/`, for gRPC reflection and for showing payloads as JSON.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
