//! Command line of the relay.

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use outbox_relay::commands::init::{self, StartAt};
use outbox_relay::commands::replay::{self, Ids, Since};
use outbox_relay::commands::{self, Answer, CommandError, Format, quarantine, status, verify};
use outbox_relay::config::{self, Config};
use outbox_relay::topics::{self, Topic};
use service::process::{ConfigArgs, Process};

/// Publishes outbox tables in PostgreSQL to Kafka: in order per entity, losing nothing.
///
/// Exit codes: 0 done; 1 failed; 2 wrong words; 3 verify has found differences; 78 the configuration is bad.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(flatten)]
    config: ConfigArgs,
    /// Answers as one JSON document.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Relay until SIGTERM (the default).
    Run,
    /// Make or complete the tables of an outbox; it may run again at any time.
    Init(Init),
    /// Who leads each outbox, how far it is and what waits.
    Status,
    /// Compare an outbox with its topics: what is missing, repeated or out of order.
    Verify { outbox: Option<String> },
    /// Publish rows again that were published, as long as the retention keeps them.
    Replay(Replay),
    /// What Kafka does not take: keys that wait, with the rows behind.
    Quarantine {
        #[command(subcommand)]
        command: Quarantine,
    },
    /// Let another replica lead an outbox.
    Handover {
        outbox: Option<String>,
        /// The name of that replica (service.instance); whichever leads the fewest, otherwise.
        #[arg(long)]
        to: Option<String>,
    },
    /// After a restore: relay from this cluster from now on.
    Adopt { outbox: Option<String> },
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

#[derive(Args)]
struct Init {
    /// Its name in the configuration; needed when there are several.
    outbox: Option<String>,
    /// Print the SQL, and do nothing.
    #[arg(long, conflicts_with = "start_at")]
    sql: bool,
    /// Connect here instead, with the rights to make tables.
    #[arg(
        long,
        value_name = "URL",
        env = "OUTBOX_RELAY_INIT_DATABASE_URL",
        hide_env_values = true
    )]
    database_url: Option<String>,
    /// Grant this role what the relay needs.
    #[arg(long = "relay-role", value_name = "ROLE")]
    relay_roles: Vec<String>,
    /// Grant this role what a writer needs, and nothing more.
    #[arg(long = "writer-role", value_name = "ROLE")]
    writer_roles: Vec<String>,
    /// beginning, end, published (all that the topics do not have), or the id of the last row not to be published.
    #[arg(long)]
    start_at: Option<StartAt>,
}

#[derive(Args)]
struct Replay {
    outbox: Option<String>,
    /// Rows not older than this: a duration like 2h, or a time like 2026-01-31T12:00:00Z.
    #[arg(long)]
    since: Option<Since>,
    /// Rows of this key.
    #[arg(long)]
    key: Option<String>,
    /// The row with this id, or FIRST..LAST.
    #[arg(long)]
    ids: Option<Ids>,
    /// Count them, and publish nothing.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Subcommand)]
enum Quarantine {
    /// The keys that wait.
    List {
        #[arg(long)]
        outbox: Option<String>,
    },
    /// The rows of a key, without payloads.
    Show {
        key: String,
        #[arg(long)]
        outbox: Option<String>,
    },
    /// Try a key again, with the rows behind.
    Retry {
        #[arg(required_unless_present = "all")]
        key: Option<String>,
        /// Every key.
        #[arg(long, conflicts_with = "key")]
        all: bool,
        #[arg(long)]
        outbox: Option<String>,
    },
    /// Publish a marker with the row's key and version instead of it, then the rows behind.
    Skip {
        /// The first row of its key; see list.
        id: i64,
        /// Why; kept, and in the marker.
        #[arg(long)]
        reason: String,
        #[arg(long)]
        outbox: Option<String>,
    },
}

fn main() -> ExitCode {
    #[cfg(feature = "failpoints")]
    let _failpoints = fail::FailScenario::setup();
    let cli = Cli::parse();
    let config = match cli.config.load(config::ENV_PREFIX, Config::read) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let format = if cli.json { Format::Json } else { Format::Table };
    match cli.command.unwrap_or(Command::Run) {
        Command::Run => run(config),
        Command::CheckConfig => {
            say("the configuration is valid");
            ExitCode::SUCCESS
        }
        Command::CreateTopics { replication, topics } => create_topics(config, topics, replication),
        command => commands::run(format, answer(&config, command)),
    }
}

async fn answer(config: &Config, command: Command) -> Result<Answer, CommandError> {
    match command {
        Command::Init(init) => {
            let options = init::Options {
                database_url: init.database_url,
                relay_roles: init.relay_roles,
                writer_roles: init.writer_roles,
                start_at: init.start_at,
            };
            if init.sql {
                init::sql(config, init.outbox.as_deref(), &options)
            } else {
                init::init(config, init.outbox.as_deref(), &options).await
            }
        }
        Command::Status => status::status(config).await,
        Command::Verify { outbox } => verify::verify(config, outbox.as_deref()).await,
        Command::Replay(asked) => {
            let selection = replay::Selection {
                since: asked.since,
                key: asked.key,
                ids: asked.ids,
            };
            replay::replay(config, asked.outbox.as_deref(), &selection, asked.dry_run).await
        }
        Command::Quarantine { command } => match command {
            Quarantine::List { outbox } => quarantine::list(config, outbox.as_deref()).await,
            Quarantine::Show { key, outbox } => quarantine::show(config, outbox.as_deref(), &key).await,
            Quarantine::Retry { key, outbox, .. } => {
                quarantine::retry(config, outbox.as_deref(), key.as_deref()).await
            }
            Quarantine::Skip { id, reason, outbox } => {
                quarantine::skip(config, outbox.as_deref(), id, &reason).await
            }
        },
        Command::Handover { outbox, to } => status::handover(config, outbox.as_deref(), to.as_deref()).await,
        Command::Adopt { outbox } => status::adopt(config, outbox.as_deref()).await,
        Command::Run | Command::CheckConfig | Command::CreateTopics { .. } => {
            Err(CommandError::Usage("this command does not answer".to_owned()))
        }
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
