//! Who is measured: each a process of its own that publishes an outbox to a topic.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use local_stack::child::{Child, Launch};
use local_stack::process::Process;
use local_stack::{Debezium, debezium, paths, wait};
use tokio_postgres::Client;

use super::outbox;
use super::tuning::Tuning;
use crate::servers::Servers;

/// All of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Who {
    /// COPY straight into librdkafka
    Limit,
    /// With its default headers
    Relay,
    /// With Debezium's one header
    OneHeader,
    Debezium,
    /// Watermill
    Peer,
}

impl Who {
    pub(crate) const ALL: [Self; 5] = [
        Self::Limit,
        Self::Relay,
        Self::OneHeader,
        Self::Debezium,
        Self::Peer,
    ];

    pub(crate) fn name(self) -> String {
        match self {
            Self::Limit => "the limit".to_owned(),
            Self::Relay => "outbox-relay".to_owned(),
            Self::OneHeader => "outbox-relay, Debezium profile".to_owned(),
            Self::Debezium => "Debezium".to_owned(),
            Self::Peer => format!("Watermill {}", Watermill::VERSION),
        }
    }

    /// What its figures' names begin with.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::Relay => "relay",
            Self::OneHeader => "relay_debezium_profile",
            Self::Debezium => "debezium",
            Self::Peer => "peer",
        }
    }
}

/// The relay's headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// The default: CloudEvents, of these rows 13 headers.
    CloudEvents,
    /// One header, as Debezium's EventRouter has it.
    Debezium,
}

/// How a relay is configured beyond what it needs.
#[derive(Debug, Clone)]
pub(crate) struct RelayOptions {
    pub(crate) style: Style,
    pub(crate) retention: &'static str,
}

impl RelayOptions {
    pub(crate) const DEFAULT: Self = Self {
        style: Style::CloudEvents,
        retention: "forever",
    };
    pub(crate) const ONE_HEADER: Self = Self {
        style: Style::Debezium,
        ..Self::DEFAULT
    };
    /// Published rows go as soon as may be.
    pub(crate) const REMOVING: Self = Self {
        retention: "1s",
        ..Self::DEFAULT
    };

    fn toml(&self, servers: &Servers, database_url: &str, topic: &str) -> String {
        let style = match self.style {
            Style::CloudEvents => "",
            // The same table: its columns under the names that it has.
            Style::Debezium => {
                "profile = \"debezium\"\n[outbox.bench.columns]\nid = \"id\"\nevent_id = \"event_id\"\n\
                 aggregate_type = \"aggregate_type\"\naggregate_id = \"aggregate_id\"\nevent_type = \"event_type\"\n"
            }
        };
        format!(
            "kafka.brokers = \"{}\"\n[outbox.bench]\ndatabase_url = \"{database_url}\"\ntopic = \"{topic}\"\n\
             retention = \"{}\"\n{style}",
            servers.brokers(),
            self.retention
        )
    }
}

/// A contender at work. Dropping it kills it.
pub(crate) struct Running {
    kind: Kind,
}

enum Kind {
    Plain(Child),
    Relay(Box<Process>),
    Debezium(Box<Debezium>, Client),
}

impl Running {
    pub(crate) fn pid(&self) -> Result<u32> {
        let pid = match &self.kind {
            Kind::Plain(child) => Some(child.id()),
            Kind::Relay(process) => process.id(),
            Kind::Debezium(worker, _) => worker.id(),
        };
        pid.context("it has ended")
    }

    /// Fails when it has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        let (runs, log) = match &mut self.kind {
            Kind::Plain(child) => return child.check_running(),
            Kind::Relay(process) => (process.is_running(), process.log().to_owned()),
            Kind::Debezium(worker, _) => (worker.is_running(), worker.log().to_owned()),
        };
        ensure!(
            runs,
            "it has ended; the end of its log:\n{}",
            local_stack::child::tail(&log, 20)
        );
        Ok(())
    }

    pub(crate) async fn stop(self) -> Result<()> {
        match self.kind {
            Kind::Plain(mut child) => {
                child.kill()?;
            }
            Kind::Relay(mut process) => {
                let status = process.stop().await?;
                ensure!(status.success(), "the relay ended badly ({status})");
            }
            Kind::Debezium(mut worker, client) => {
                worker.stop().await?;
                drop_slot(&client).await?;
            }
        }
        Ok(())
    }
}

/// The [limit](super::limit).
pub(crate) fn limit(servers: &Servers, database_url: &str, topic: &str) -> Result<Running> {
    let own = std::env::current_exe().context("the path of this executable")?;
    let child = Launch::new("the limit", own, servers.folder("limit").join("limit.log"))
        .args(["limit", "--database-url", database_url])
        .args(["--brokers", &servers.brokers(), "--topic", topic])
        .spawn()?;
    Ok(Running {
        kind: Kind::Plain(child),
    })
}

/// The relay, from where its table says.
pub(crate) async fn relay(
    servers: &Servers,
    database_url: &str,
    topic: &str,
    options: &RelayOptions,
) -> Result<Running> {
    let folder = servers.folder("outbox-relay");
    std::fs::create_dir_all(&folder)?;
    let file = folder.join("relay.toml");
    std::fs::write(&file, options.toml(servers, database_url, topic))?;
    let process = Process::builder("outbox-relay", folder)
        .arg("--config")
        .arg(file)
        .start()
        .await?;
    Ok(Running {
        kind: Kind::Relay(Box::new(process)),
    })
}

/// Debezium's table and where it is read from: what is inserted after [`DebeziumOutbox::reset`] is what the next worker
/// publishes.
pub(crate) struct DebeziumOutbox {
    pub(crate) client: Client,
    database: &'static str,
}

impl DebeziumOutbox {
    pub(crate) async fn create(servers: &Servers, database: &'static str) -> Result<Self> {
        let client = outbox::create_debezium(servers, database).await?;
        client
            .batch_execute("CREATE PUBLICATION debezium FOR TABLE outbox_events")
            .await?;
        Ok(Self { client, database })
    }

    /// Empties the table, and makes the slot anew.
    pub(crate) async fn reset(&self) -> Result<()> {
        drop_slot(&self.client).await?;
        self.client.batch_execute("TRUNCATE outbox_events").await?;
        let slot = "SELECT pg_create_logical_replication_slot($1, 'pgoutput')";
        self.client.execute(slot, &[&debezium::SLOT]).await?;
        Ok(())
    }

    /// A worker of its own, which begins where the slot does.
    pub(crate) async fn start(&self, servers: &Servers, topic: &str, tuning: &Tuning) -> Result<Running> {
        let folder = servers.folder("debezium");
        // Offsets of the one before.
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        let mut builder = Debezium::builder(
            &folder,
            &servers.url(self.database),
            &servers.brokers(),
            "public.outbox_events",
        )
        .setting("transforms.outbox.route.topic.replacement", topic);
        for (name, value) in &tuning.connector {
            builder = builder.setting(name, value);
        }
        for (name, value) in &tuning.worker {
            builder = builder.worker_setting(name, value);
        }
        for option in &tuning.jvm {
            builder = builder.jvm_option(option);
        }
        let worker = builder.start().await?;
        let client = local_stack::postgres::connect(&servers.url(self.database)).await?;
        Ok(Running {
            kind: Kind::Debezium(Box::new(worker), client),
        })
    }
}

/// A slot that is left keeps all WAL of the server.
async fn drop_slot(client: &Client) -> Result<()> {
    wait::until(
        "nobody uses the replication slot",
        Duration::from_secs(30),
        async || {
            let sql = "SELECT active FROM pg_replication_slots WHERE slot_name = $1";
            match client.query_opt(sql, &[&debezium::SLOT]).await? {
                None => Ok(Some(())),
                Some(row) if row.get(0) => Ok(None),
                Some(_) => {
                    client
                        .execute("SELECT pg_drop_replication_slot($1)", &[&debezium::SLOT])
                        .await?;
                    Ok(Some(()))
                }
            }
        },
    )
    .await
}

/// Watermill's subscriber of PostgreSQL and publisher of Kafka, built with Go.
pub(crate) struct Watermill {
    program: PathBuf,
    pub(crate) client: Client,
}

impl Watermill {
    pub(crate) const VERSION: &str = "1.5.1";
    const DATABASE: &str = "watermill";

    pub(crate) async fn create(servers: &Servers) -> Result<Self> {
        Ok(Self {
            program: tokio::task::spawn_blocking(build_watermill).await??,
            client: outbox::create_watermill(servers, Self::DATABASE).await?,
        })
    }

    pub(crate) fn start(&self, servers: &Servers, topic: &str) -> Result<Running> {
        let log = servers.folder("watermill").join("watermill.log");
        let child = Launch::new("Watermill", &self.program, log)
            .args(["-brokers", &servers.brokers(), "-topic", topic])
            .args(["-database", &servers.url(Self::DATABASE)])
            .spawn()?;
        Ok(Running {
            kind: Kind::Plain(child),
        })
    }
}

fn build_watermill() -> Result<PathBuf> {
    let program = paths::target_dir()?.join("tools/watermill-peer");
    let go = paths::on_path("go")
        .or_else(|| Some(PathBuf::from("/usr/local/go/bin/go")).filter(|path| path.is_file()))
        .context("Watermill is built with Go 1.23 or newer, which is not installed: see https://go.dev/dl")?;
    let output = Command::new(go)
        .args(["build", "-o"])
        .arg(&program)
        .arg(".")
        .current_dir("bench/peers/watermill")
        .stdin(Stdio::null())
        .output()
        .context("Go did not start")?;
    ensure!(
        output.status.success(),
        "Go could not build Watermill:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(program)
}
