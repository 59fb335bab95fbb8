//! Command line of the relay.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use outbox_relay::config::{self, Config};
use outbox_relay::topics::{self, Topic};
use service::process::{ConfigArgs, Process};

/// Publishes outbox tables in PostgreSQL to Kafka: in order per entity, losing nothing.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Relay until SIGTERM (the default).
    Run,
    /// Read the configuration, say what is wrong with it, and leave.
    CheckConfig,
    /// Create the topics that do not exist yet, keeping everything (retention.ms=-1).
    CreateTopics {
        /// Copies of each partition.
        #[arg(long, default_value_t = 1)]
        replication: i32,
        #[arg(required = true, value_name = "NAME=PARTITIONS")]
        topics: Vec<Topic>,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let config = match cli.config.load(config::ENV_PREFIX, Config::read) {
        Ok(config) => config,
        Err(code) => return code,
    };
    match cli.command.unwrap_or(Command::Run) {
        Command::Run => run(config),
        Command::CheckConfig => {
            say("the configuration is valid");
            ExitCode::SUCCESS
        }
        Command::CreateTopics { replication, topics } => create_topics(config, topics, replication),
    }
}

fn run(config: Config) -> ExitCode {
    let (instance, log, telemetry) = (
        config.instance.clone(),
        config.log.clone(),
        config.telemetry.clone(),
    );
    process(&instance, &log, &telemetry).run(|shutdown| async {
        let app = config.build().await?;
        tracing::info!(admin.address = %app.admin_addr(), "relay started");
        app.run(shutdown).await.map_err(service::shutdown::BoxError::from)
    })
}

fn create_topics(config: Config, topics: Vec<Topic>, replication: i32) -> ExitCode {
    process(&config.instance, &config.log, &config.telemetry).run(|_| async {
        let created = topics::create(&config.producer(), &topics, replication).await?;
        say(&format!(
            "{} of {} topics created: {}",
            created.len(),
            topics.len(),
            created.join(" ")
        ));
        Ok::<_, topics::TopicError>(())
    })
}

fn process<'c>(
    instance: &'c service::config::Instance,
    log: &'c service::config::Log,
    telemetry: &'c service::config::Telemetry,
) -> Process<'c> {
    Process {
        name: "outbox-relay",
        version: env!("CARGO_PKG_VERSION"),
        instance,
        log,
        telemetry,
    }
}

fn say(text: &str) {
    #[expect(clippy::print_stdout, reason = "what a command answers")]
    {
        println!("{text}");
    }
}
