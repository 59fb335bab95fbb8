//! The process; see the library.

use std::process::ExitCode;

use analytics_svc::config::{Config, PREFIX};
use analytics_svc::{App, NAME, VERSION, dlt, migrate, rebuild};
use clap::{Parser, Subcommand};
use service::process::{ConfigArgs, Process};
use subscription::{Dlt, Rebuild};

/// Live figures of sales.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve, project and emit until SIGTERM (what happens without a command).
    Run,
    /// Bring the database up to date.
    Migrate,
    /// Look at records that could not be handled, and replay or discard them.
    #[command(subcommand)]
    Dlt(Dlt),
    Rebuild(Rebuild),
    /// Only check the configuration.
    CheckConfig,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match arguments.config.load(PREFIX, Config::read) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let (instance, log, telemetry) = (
        config.instance.clone(),
        config.log.clone(),
        config.telemetry.clone(),
    );
    let process = Process {
        name: NAME,
        version: VERSION,
        instance: &instance,
        log: &log,
        telemetry: &telemetry,
    };
    match arguments.command.unwrap_or(Command::Run) {
        Command::Run => process.run(async |shutdown| App::build(config).await?.run(shutdown).await),
        Command::Migrate => process.run(async |_| migrate(&config.database).await),
        Command::Dlt(command) => process.run(async |_| dlt(&config, command).await),
        Command::Rebuild(command) => process.run(async |shutdown| rebuild(&config, command, shutdown).await),
        Command::CheckConfig => ExitCode::SUCCESS,
    }
}
