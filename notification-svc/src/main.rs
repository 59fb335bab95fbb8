//! The process notification-svc.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use notification_svc::mails::Mails;
use notification_svc::{Config, ENV_PREFIX, NAME, VERSION, verify};
use service::process::{ConfigArgs, Process};
use service::shutdown::BoxError;
use subscription::Dlt;

/// Mails to users about their orders.
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
    /// Work (the default).
    Run,
    /// Bring the database up to date.
    Migrate,
    /// Read the configuration, report everything that is wrong, and end.
    CheckConfig,
    /// Look at records that could not be handled, and replay or discard them.
    #[command(subcommand)]
    Dlt(Dlt),
    /// Look at mails, and decide about those of which nobody knows whether they were sent.
    #[command(subcommand)]
    Mails(Mails),
    /// Compare the mails that were sent with their history, and the history with the outbox.
    Verify {
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
            for name in notification_svc::migrate(&config.database).await? {
                tracing::info!(migration = name, "migrated");
            }
            Ok::<_, BoxError>(())
        }),
        Command::Dlt(command) => process.run(async |_| notification_svc::dlt(&config, command).await),
        Command::Mails(command) => process.run(async |_| command.run(&config.database, NAME).await),
        Command::Verify { json } => {
            process.run(async |shutdown| verify::command(&config.database, json, shutdown).await)
        }
    }
}
