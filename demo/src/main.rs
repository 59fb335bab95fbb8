//! Places orders on a running shop and reconciles what came out at the other end.
//!
//! It trusts nobody's word: what clients were told, the tables of both databases, a raw read of the topic and the read
//! model's answers are compared with each other. `./dev demo` starts the shop, then `demo run`, and shows what that
//! writes to its file of messages; `./dev order` runs `demo order`.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line tool talks to its terminal"
)]

mod databases;
mod journey;
mod load;
mod messages;
mod plan;
mod reconcile;
mod rpc;
mod run;
mod topic;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    version,
    about = "Places orders on a running shop and reconciles; use it by ./dev demo"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Places orders, waits for the read model, and reconciles
    Run(run::Options),
    /// Shows one order's journey
    Order(journey::Options),
}

/// Where everything is.
#[derive(Debug, Clone, clap::Args)]
struct Addresses {
    /// Connection URL of order-svc's database
    #[arg(long)]
    orders_database: String,
    /// Connection URL of order-query-svc's database
    #[arg(long)]
    order_query_database: String,
    /// host:port of Kafka
    #[arg(long)]
    brokers: String,
    /// The topic of order events
    #[arg(long)]
    topic: String,
    /// URL of order-svc
    #[arg(long)]
    order_svc: String,
    /// URLs of the instances of order-query-svc
    #[arg(long, required = true)]
    order_query_svc: Vec<String>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(options) => run::run(options).await,
        Command::Order(options) => journey::show(options).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
