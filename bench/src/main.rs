//! The benchmarks behind `./dev bench`: on real servers of their own, one run on one machine. `docs/benchmarks.md` says what is
//! measured how.
#![expect(clippy::print_stderr, reason = "a command line tool talks to its terminal")]

mod commands;
mod consumer;
mod drain;
mod inventory;
mod meter;
mod relay;
mod released;
mod report;
mod servers;
mod stats;
mod topics;
mod ui;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "bench",
    version,
    about = "The benchmarks behind ./dev bench",
    max_term_width = 110
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The relay against the limit, Debezium and a polling peer
    Relay(relay::Options),
    /// A consumer into a projection, against the limits of both sides
    Consumer(consumer::Options),
    /// PlaceOrder and ProcessPayment, against their statements by pgbench
    Commands(commands::Options),
    /// Orders that all want one product, against orders that want many
    Inventory(inventory::Options),
    /// Publishes an outbox as fast as can be and keeps nothing; what the relay is compared with
    #[command(hide = true)]
    Limit(relay::limit::Options),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Into::into)
        .and_then(|runtime| {
            runtime.block_on(async {
                match cli.command {
                    Command::Relay(options) => relay::run(options).await,
                    Command::Consumer(options) => consumer::run(options).await,
                    Command::Commands(options) => commands::run(options).await,
                    Command::Inventory(options) => inventory::run(options).await,
                    Command::Limit(options) => relay::limit::run(options).await,
                }
            })
        });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
