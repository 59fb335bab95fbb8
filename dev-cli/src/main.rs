//! The tool behind `./dev`: everything a person does with this workspace.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line tool talks to its terminal"
)]

mod background;
mod stack;
mod ui;

use std::process::ExitCode;

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
enum StackCommand {
    /// Starts them, with nothing in them
    Up,
    /// Stops them
    Down,
}

#[derive(Debug, Subcommand)]
enum Supervised {
    TestStack,
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
    let result = runtime.block_on(async {
        match cli.command {
            Command::Stack(StackCommand::Up) => stack::up().await,
            Command::Stack(StackCommand::Down) => stack::down().await,
            Command::Supervise {
                what: Supervised::TestStack,
            } => stack::supervise().await,
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
