//! What every process shares: configuration, telemetry, health, shutdown, the database pool, idempotent requests.
//!
//! A process reads its [`config`] first and runs inside [`process::Process::run`]; its tasks are owned by a
//! [`shutdown::Supervisor`]; it shows itself on the [`admin`] port and, if it serves gRPC, through a [`grpc::GrpcServer`].
//! Commands change the database through [`command::Commands`], once per request id ([`requests`]).

pub mod admin;
pub mod command;
pub mod config;
pub mod db;
pub mod deadline;
pub mod endpoints;
pub mod grpc;
pub mod metrics;
pub mod process;
pub mod requests;
pub mod shutdown;
pub mod status;
pub mod telemetry;
pub mod validate;
