//! Starts real parts on loopback, each under a folder of the caller's choice: PostgreSQL, Kafka and the workspace's own
//! processes. Used by `./dev`, by tests and by benchmarks.
//!
//! Whatever is started here dies with the process that started it, however that ends (see [`child`]). Nothing needs a
//! container engine; [`install`] knows what the machine has to have.
//!
//! Linux only: it leans on `setpriv` from util-linux.

pub mod cards;
pub mod certificates;
pub mod child;
pub mod debezium;
pub mod disk;
pub mod install;
pub mod kafka;
mod maven;
pub mod measure;
pub mod paths;
pub mod pgbouncer;
mod ports;
pub mod postgres;
pub mod process;
pub mod shop;
pub mod smtp;
pub mod testing;
pub mod wait;

pub use child::Child;
pub use debezium::Debezium;
pub use disk::Disk;
pub use kafka::Kafka;
pub use pgbouncer::Pgbouncer;
pub use ports::free_ports;
pub use postgres::Postgres;
pub use process::Process;
pub use shop::Shop;
pub use smtp::Smtp;
