//! The process payment-svc.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use payment_svc::{Config, ENV_PREFIX, NAME, VERSION, reconcile, verify};
use service::process::{ConfigArgs, Process};
use service::shutdown::BoxError;
use subscription::Dlt;

/// Payments of orders over gRPC, with their events in an outbox.
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
    /// Rebuild every payment from its history and compare it with its row, and the history with the outbox.
    Verify {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Compare our ledger with the provider's and name every difference.
    Reconcile {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    #[cfg(feature = "failpoints")]
    let _failpoints = fail::FailScenario::setup();
    let cli = Cli::parse();
    let config = match cli.config.load(ENV_PREFIX, Config::read) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let process = Process {
        name: NAME,
        version: VERSION,
        instance: &config.instance,
        log: &config.log,
        telemetry: &config.telemetry,
    };
    match cli.command.unwrap_or(Command::Run) {
        Command::CheckConfig => ExitCode::SUCCESS,
        Command::Run => {
            let config = config.clone();
            process.run(async |shutdown| Ok::<_, BoxError>(config.build().await?.run(shutdown).await?))
        }
        Command::Migrate => process.run(async |_| {
            for name in payment_svc::migrate(&config.database).await? {
                tracing::info!(migration = name, "migrated");
            }
            Ok::<_, BoxError>(())
        }),
        Command::Dlt(command) => process.run(async |_| payment_svc::dlt(&config, command).await),
        Command::Verify { json } => {
            process.run(async |shutdown| verify::command(&config.database, json, shutdown).await)
        }
        Command::Reconcile { json } => {
            process.run(async |shutdown| reconcile::command(&config, json, shutdown).await)
        }
    }
}
