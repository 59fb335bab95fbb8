//! Debezium's outbox event router on a Kafka Connect worker of one's own: what the relay is compared with.

use std::ffi::OsString;
use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tokio_postgres::config::Host;

use crate::child::{self, Child, Launch};
use crate::postgres::connect;
use crate::process::http_get;
use crate::{kafka, maven, paths, ports, wait};

/// The version of Debezium that is run, on the Kafka Connect of [`kafka::VERSION`].
pub const VERSION: &str = "3.3.1.Final";

/// The name of its replication slot and of its publication, unless set otherwise.
pub const SLOT: &str = "debezium";

const START_LIMIT: Duration = Duration::from_secs(120);
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// How to make a worker.
#[derive(Debug, Clone)]
pub struct Builder {
    folder: PathBuf,
    database_url: String,
    brokers: String,
    table: String,
    settings: Vec<(String, String)>,
    worker_settings: Vec<(String, String)>,
    jvm: Vec<String>,
}

impl Builder {
    /// Any property of the connector, its transform included: `transforms.outbox.…`.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Any property of the Connect worker.
    pub fn worker_setting(mut self, name: &str, value: &str) -> Self {
        self.worker_settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// An option of the JVM, such as `-Xmx1g`, behind those of this crate: the last one counts.
    pub fn jvm_option(mut self, option: &str) -> Self {
        self.jvm.push(option.to_owned());
        self
    }

    /// Starts it, and waits until its replication slot is in use: it publishes what is committed from then on, or from
    /// where one with the same folder left off. Fetches the jars if need be.
    pub async fn start(self) -> Result<Debezium> {
        fetch_jars()?;
        let java =
            kafka::find_java().context("no Java 17 or newer (apt-get install default-jre-headless)")?;
        std::fs::create_dir_all(&self.folder)
            .with_context(|| format!("cannot make {}", self.folder.display()))?;
        let folder = self.folder.canonicalize()?;
        let mut last_error = None;
        for _ in 0..3 {
            let mut worker = Debezium {
                java: java.clone(),
                log: folder.join("debezium.log"),
                folder: folder.clone(),
                database_url: self.database_url.clone(),
                slot: self.slot().to_owned(),
                port: ports::free_ports(1)?[0],
                jvm: self.jvm.clone(),
                child: None,
            };
            self.write_settings(&worker)?;
            let offset = child::length(&worker.log);
            match worker.start().await {
                Ok(()) => return Ok(worker),
                Err(error)
                    if child::written_since(&worker.log, offset).contains("Address already in use") =>
                {
                    last_error = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(last_error.unwrap_or_else(|| anyhow::anyhow!("Debezium did not start")))
    }

    fn slot(&self) -> &str {
        let own = self.settings.iter().rev().find(|(name, _)| name == "slot.name");
        own.map_or(SLOT, |(_, value)| value)
    }

    fn write_settings(&self, worker: &Debezium) -> Result<()> {
        let port = worker.port;
        let listeners = format!("http://127.0.0.1:{port}");
        let offsets = worker.folder.join("offsets");
        let connector_jars = connector_dir()?;
        let text = properties(
            &[
                ("bootstrap.servers", &self.brokers),
                // Text as it is: the router gives the payload as the text of its column.
                (
                    "key.converter",
                    "org.apache.kafka.connect.storage.StringConverter",
                ),
                (
                    "value.converter",
                    "org.apache.kafka.connect.storage.StringConverter",
                ),
                ("offset.storage.file.filename", &offsets.to_string_lossy()),
                ("offset.flush.interval.ms", "1000"),
                ("plugin.path", &connector_jars.to_string_lossy()),
                ("plugin.discovery", "service_load"),
                ("listeners", &listeners),
            ],
            &self.worker_settings,
        );
        std::fs::write(worker.folder.join("worker.properties"), text)?;

        let database: tokio_postgres::Config =
            self.database_url.parse().context("the URL of the database")?;
        let Some(Host::Tcp(host)) = database.get_hosts().first() else {
            anyhow::bail!("the URL of the database names no host");
        };
        let database_port = database.get_ports().first().unwrap_or(&5432).to_string();
        let password = String::from_utf8_lossy(database.get_password().unwrap_or_default());
        let text = properties(
            &[
                ("name", "outbox"),
                (
                    "connector.class",
                    "io.debezium.connector.postgresql.PostgresConnector",
                ),
                ("tasks.max", "1"),
                ("database.hostname", host),
                ("database.port", &database_port),
                ("database.user", database.get_user().unwrap_or("postgres")),
                ("database.password", &password),
                ("database.dbname", database.get_dbname().unwrap_or("postgres")),
                ("plugin.name", "pgoutput"),
                ("slot.name", SLOT),
                ("publication.name", SLOT),
                ("publication.autocreate.mode", "filtered"),
                ("table.include.list", &self.table),
                ("snapshot.mode", "no_data"),
                ("tombstones.on.delete", "false"),
                ("topic.prefix", "debezium"),
                ("transforms", "outbox"),
                (
                    "transforms.outbox.type",
                    "io.debezium.transforms.outbox.EventRouter",
                ),
                // The brokers here make no topics by themselves.
                ("topic.creation.default.partitions", "1"),
                ("topic.creation.default.replication.factor", "1"),
            ],
            &self.settings,
        );
        std::fs::write(worker.folder.join("connector.properties"), text)?;
        std::fs::write(worker.folder.join("log4j2.properties"), kafka::LOGGING)?;
        Ok(())
    }
}

/// A running Kafka Connect worker with the one connector. Dropping it kills it; its slot and its offsets stay.
#[derive(Debug)]
pub struct Debezium {
    java: PathBuf,
    folder: PathBuf,
    log: PathBuf,
    database_url: String,
    slot: String,
    port: u16,
    jvm: Vec<String>,
    child: Option<Child>,
}

impl Debezium {
    /// A worker whose offsets and log are in `folder`, which publishes to `brokers` what is inserted into `table` (with
    /// its schema, `public.outbox_events`). By default to `outbox.event.` and what is in the column `aggregatetype`.
    pub fn builder(folder: impl Into<PathBuf>, database_url: &str, brokers: &str, table: &str) -> Builder {
        Builder {
            folder: folder.into(),
            database_url: database_url.to_owned(),
            brokers: brokers.to_owned(),
            table: table.to_owned(),
            settings: Vec::new(),
            worker_settings: Vec::new(),
            jvm: Vec::new(),
        }
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Where Kafka Connect's REST interface is.
    pub fn rest(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Starts it again after [`stop`](Self::stop) or [`kill`](Self::kill), from where it left off.
    pub async fn start(&mut self) -> Result<()> {
        if let Some(running) = &mut self.child
            && running.is_running()
        {
            return Ok(());
        }
        // The server may take a moment to see that the one before is gone.
        let database = connect(&self.database_url).await?;
        let slot = &self.slot;
        let is_active = async || -> Result<bool> {
            let row = database
                .query_opt(
                    "SELECT FROM pg_replication_slots WHERE slot_name = $1 AND active",
                    &[slot],
                )
                .await?;
            Ok(row.is_some())
        };
        let what = format!("nobody else uses the replication slot {slot}");
        wait::until(&what, START_LIMIT, async || {
            Ok((!is_active().await?).then_some(()))
        })
        .await?;
        let mut child = Launch::new("Debezium", &self.java, &self.log)
            .args(kafka::jvm_options(&self.folder))
            .args(&self.jvm)
            .args([OsString::from("-cp"), kafka::classpath(&kafka::jars_dir()?)])
            .args([
                "org.apache.kafka.connect.cli.ConnectStandalone",
                "worker.properties",
                "connector.properties",
            ])
            .folder(&self.folder)
            .spawn()?;
        let rest = self.rest();
        let is_active = &is_active;
        let waited = wait::until("Debezium uses its replication slot", START_LIMIT, || {
            let running = child.check_running();
            async move {
                running?;
                if let Ok((200, status)) = http_get(rest, "/connectors/outbox/status").await {
                    ensure!(!status.contains("\"FAILED\""), "Debezium has failed: {status}");
                }
                Ok(is_active().await?.then_some(()))
            }
        })
        .await;
        self.child = Some(child);
        waited.with_context(|| format!("Debezium did not start; its log: {}", self.log.display()))
    }

    /// An orderly shutdown, which notes how far it got.
    pub async fn stop(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.stop(Signal::SIGTERM, STOP_LIMIT).await?;
        }
        Ok(())
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
        }
        Ok(())
    }

    /// Freezes it.
    pub fn pause(&mut self) -> Result<()> {
        self.running()?.signal(Signal::SIGSTOP)
    }

    /// Undoes [`pause`](Self::pause).
    pub fn resume(&mut self) -> Result<()> {
        self.running()?.signal(Signal::SIGCONT)
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(Child::is_running)
    }

    fn running(&mut self) -> Result<&mut Child> {
        self.child.as_mut().context("Debezium is not running")
    }
}

/// The text of a properties file.
fn properties(fixed: &[(&str, &str)], own: &[(String, String)]) -> String {
    let own = own.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let mut text = String::from("# Written at every start.\n");
    // The last of equal names counts.
    for (name, value) in fixed.iter().copied().chain(own) {
        let value = value.replace('\\', "\\\\");
        let _ = writeln!(text, "{name}={value}");
    }
    text
}

/// Where Kafka Connect looks for its plug-ins: one folder per plug-in.
fn connector_dir() -> Result<PathBuf> {
    Ok(paths::target_dir()?.join(format!("tools/debezium-{VERSION}/plugins")))
}

/// Fetches the jars of Debezium's connector, and Kafka's, with Maven, once per target directory.
pub fn fetch_jars() -> Result<()> {
    // Kafka Connect is among them.
    kafka::fetch_jars()?;
    let plugins = connector_dir()?;
    std::fs::create_dir_all(&plugins).with_context(|| format!("cannot make {}", plugins.display()))?;
    maven::fetch(
        "Debezium",
        &plugins.join("jars"),
        &[("io.debezium", "debezium-connector-postgres", VERSION)],
    )
}
