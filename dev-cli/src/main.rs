//! The tool behind `./dev`: everything a person does with this workspace.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line tool talks to its terminal"
)]

mod background;
mod bench;
mod build;
mod chaos;
mod demo;
mod doctor;
mod local;
mod stack;
mod tests;
mod ui;

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "./dev",
    version,
    about = "Everything a person does with this workspace",
    max_term_width = 110
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says what is missing on this machine and how to get it
    Doctor,
    /// Builds and starts everything, places and pays orders, and reconciles what came out at the other end
    Demo(demo::Options),
    /// Starts everything in the background and leaves it up, for trying things by hand
    Up(local::UpOptions),
    /// Stops what `up` started
    Down,
    /// Shows the log of a process that `up` started
    Logs(local::LogsOptions),
    /// Shows one order: its row, payments, stock and mails, the whole journey of its events, and what is parked
    Order {
        /// The order's id, as PlaceOrder returned it
        id: String,
    },
    /// Checks everything: formatting, lints, documentation, dependencies, and all tests
    Test(tests::Options),
    /// Measures, on servers of its own; results go to bench/results
    #[command(subcommand)]
    Bench(BenchCommand),
    /// PostgreSQL and Kafka alone, in the background, for running tests with plain cargo test
    #[command(subcommand)]
    Stack(StackCommand),
    /// Runs in the background on behalf of `up` and `stack up`
    #[command(hide = true)]
    Supervise {
        #[command(subcommand)]
        what: Supervised,
    },
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// The relay against the limit, Debezium and a polling peer; --help says how much of it
    Relay(bench::Arguments),
    /// Events into a projection and its rebuild, against the limits of both sides; --help says how much of it
    Consumer(bench::Arguments),
    /// PlaceOrder and ProcessPayment, against their statements by pgbench; --help says how much of it
    Commands(bench::Arguments),
    /// Orders that all want one product, against orders that want many
    Inventory(bench::Arguments),
}

#[derive(Debug, Subcommand)]
enum StackCommand {
    /// Starts them, with nothing in them
    Up,
    /// Stops them
    Down,
}

#[derive(Debug, Subcommand)]
enum Supervised {
    TestStack,
    Local(local::UpOptions),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(cli.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> Result<()> {
    if !std::path::Path::new("dev-cli/Cargo.toml").exists() {
        bail!("this is not the workspace's folder; run it by its script: ./dev");
    }
    match command {
        Command::Doctor => doctor::run(),
        Command::Demo(options) => demo::run(options).await,
        Command::Up(options) => local::up(options).await,
        Command::Down => local::down().await,
        Command::Logs(options) => local::logs(&options),
        Command::Order { id } => local::order(&id),
        Command::Test(options) => tests::run(options).await,
        Command::Bench(BenchCommand::Relay(arguments)) => bench::relay(&arguments).await,
        Command::Bench(BenchCommand::Consumer(arguments)) => bench::consumer(&arguments).await,
        Command::Bench(BenchCommand::Commands(arguments)) => bench::commands(&arguments).await,
        Command::Bench(BenchCommand::Inventory(arguments)) => bench::inventory(&arguments).await,
        Command::Stack(StackCommand::Up) => stack::up().await,
        Command::Stack(StackCommand::Down) => stack::down().await,
        Command::Supervise {
            what: Supervised::TestStack,
        } => stack::supervise().await,
        Command::Supervise {
            what: Supervised::Local(options),
        } => local::supervise(options).await,
    }
}
