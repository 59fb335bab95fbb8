//! payment-svc.

pub mod provider;
