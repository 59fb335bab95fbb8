//! The process inventory-svc.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use inventory_svc::{Config, ENV_PREFIX, NAME, VERSION, verify};
use service::process::{ConfigArgs, Process};
use service::shutdown::BoxError;
use subscription::Dlt;

/// The stock of products over gRPC, and what is held of it for orders.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve (the default).
    Run,
    /// Bring the database up to date.
    Migrate,
    /// Read the configuration, report everything that is wrong, and end.
    CheckConfig,
    /// Look at records that could not be handled, and replay or discard them.
    #[command(subcommand)]
    Dlt(Dlt),
    /// Rebuild every reservation and all stock from their history and compare, with their rows, with each other and with the outbox.
    Verify {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let config = match cli.config.load(ENV_PREFIX, Config::read) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let (instance, log, telemetry) = (&config.instance, &config.log, &config.telemetry);
    let process = Process {
        name: NAME,
        version: VERSION,
        instance,
        log,
        telemetry,
    };
    match cli.command.unwrap_or(Command::Run) {
        Command::CheckConfig => ExitCode::SUCCESS,
        Command::Run => {
            let config = config.clone();
            process.run(async |shutdown| Ok::<_, BoxError>(config.build().await?.run(shutdown).await?))
        }
        Command::Migrate => process.run(async |_| {
            for name in inventory_svc::migrate(&config.database).await? {
                tracing::info!(migration = name, "migrated");
            }
            Ok::<_, BoxError>(())
        }),
        Command::Dlt(command) => process.run(async |_| inventory_svc::dlt(&config, command).await),
        Command::Verify { json } => {
            process.run(async |shutdown| verify::command(&config.database, json, shutdown).await)
        }
    }
}
