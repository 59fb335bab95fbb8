//! The process user-svc.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use service::process::{ConfigArgs, Process};
use service::shutdown::BoxError;
use user_svc::{Config, ENV_PREFIX, NAME, VERSION, verify};

/// Users over gRPC, with their events in an outbox.
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
    /// Rebuild every user from his history and compare him with his row, and the history with the outbox.
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
            for name in user_svc::migrate(&config.database).await? {
                tracing::info!(migration = name, "migrated");
            }
            Ok::<_, BoxError>(())
        }),
        Command::Verify { json } => {
            process.run(async |shutdown| verify::command(&config.database, json, shutdown).await)
        }
    }
}
