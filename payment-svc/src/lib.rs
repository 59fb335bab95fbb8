//! payment-svc.
