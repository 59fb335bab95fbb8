//! payment-svc on real PostgreSQL and Kafka, and a payment sandbox that misbehaves.

mod bad_input;
mod cancelled;
mod common;
mod crash;
mod gate;
mod orders;
mod outages;
mod outcomes;
mod process;
mod reconcile;
mod requests;
