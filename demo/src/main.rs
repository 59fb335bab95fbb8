//! Places and pays orders on a running shop and reconciles what came out at the other end.
//!
//! It trusts nobody's word: what clients were told, the tables of all databases, a raw read of the topics, the provider's
//! ledger and the services' answers are compared with each other. `./dev demo` starts the shop, then `demo run`, and shows what
//! that writes to its file of messages; `./dev order` runs `demo order`.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line tool talks to its terminal"
)]

mod collect;
mod databases;
mod journey;
mod ledger;
mod load;
mod pay;
mod plan;
mod reconcile;
mod rpc;
mod run;
mod scan;
mod settle;
mod topic;
mod users;
mod warehouse;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    version,
    about = "Places and pays orders on a running shop and reconciles; use it by ./dev demo"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Places and pays orders, waits until everything has come to its end, and reconciles
    Run(run::Options),
    /// Shows one order and the whole journey of its events
    Order(journey::Options),
    /// Looks for card data in everything that a run has left
    Scan(scan::Options),
    /// Takes the spans that processes export and keeps them
    Collect(collect::Options),
}

/// Where everything is.
#[derive(Debug, Clone, clap::Args)]
struct Where {
    /// The file that says where everything is; `./dev up` writes target/local/endpoints.json
    #[arg(long)]
    addresses: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(options) => run::run(options).await,
        Command::Order(options) => journey::show(options).await,
        Command::Scan(options) => scan::run(options).await,
        Command::Collect(options) => collect::run(options).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs what blocks its thread elsewhere.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await?
}
