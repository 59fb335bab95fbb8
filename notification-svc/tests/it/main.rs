//! notification-svc on real PostgreSQL and Kafka, and a mail server that misbehaves.

mod addresses;
mod common;
mod crash;
mod letters;
mod mails;
mod outages;
mod outcomes;
mod process;
mod two;
mod verify;
