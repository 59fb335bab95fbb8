//! The process payment-sandbox.

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use payment_sandbox::store::Store;
use payment_sandbox::{Config, ENV_PREFIX, NAME, VERSION, ledger};
use service::process::{ConfigArgs, Process};
use service::shutdown::BoxError;

/// A payment provider that speaks a part of Stripe's API and misbehaves as its cards have it.
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
    /// Print every charge and refund as JSON: from the storage file, or from a sandbox that runs.
    Ledger {
        /// Where it runs, for example http://127.0.0.1:12111. The file can be read only while none runs.
        #[arg(long)]
        url: Option<String>,
    },
    /// Read the configuration, report everything that is wrong, and end.
    CheckConfig,
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
        Command::Ledger { url: Some(url) } => process.run(async |_| fetch(&url).await),
        Command::Ledger { url: None } => process.run(async |_| {
            let path = config.path.clone();
            let print = move || {
                let store = Store::open_existing(&path)?;
                Ok::<_, BoxError>(ledger::write(&store.read()?, std::io::stdout().lock())?)
            };
            tokio::task::spawn_blocking(print).await?
        }),
    }
}

/// Prints the ledger of a sandbox that runs.
async fn fetch(url: &str) -> Result<(), BoxError> {
    let url = format!("{}/sandbox/ledger", url.trim_end_matches('/'));
    let client = reqwest::Client::builder()
        .no_proxy()
        .read_timeout(std::time::Duration::from_secs(30))
        .build()?;
    let mut answer = client.get(url).send().await?.error_for_status()?;
    let mut out = std::io::stdout().lock();
    while let Some(piece) = answer.chunk().await? {
        out.write_all(&piece)?;
    }
    Ok(out.flush()?)
}
