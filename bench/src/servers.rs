//! The servers that all contenders of a run share: one PostgreSQL and one Kafka on loopback, in a folder of the run's own.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use local_stack::postgres::{self, connect};
use local_stack::{Kafka, Postgres, kafka, paths};
use tokio_postgres::Client;

use crate::meter;

/// On top of those of `local_stack`: wal_level logical, fsync on, 300 connections.
const POSTGRES: [(&str, &str); 7] = [
    ("shared_buffers", "2GB"),
    ("effective_cache_size", "8GB"),
    ("max_wal_size", "8GB"),
    ("checkpoint_timeout", "15min"),
    ("random_page_cost", "1.1"),
    ("autovacuum_naptime", "10s"),
    ("max_parallel_workers_per_gather", "0"),
];

/// Kafka's own start script has these.
const KAFKA_JVM: [&str; 7] = [
    "-server",
    "-XX:-UseSerialGC",
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=20",
    "-XX:InitiatingHeapOccupancyPercent=35",
    "-Xms1g",
    "-Xmx1g",
];

/// Topics that are deleted, or past their size, give their disk back soon.
const KAFKA: [(&str, &str); 3] = [
    ("log.retention.check.interval.ms", "10000"),
    ("log.segment.delete.delay.ms", "1000"),
    ("log.initial.task.delay.ms", "1000"),
];

pub(crate) struct Servers {
    pub(crate) postgres: Postgres,
    pub(crate) kafka: Kafka,
    folder: PathBuf,
}

impl Servers {
    /// Fresh ones; what an interrupted run left is removed.
    pub(crate) async fn start() -> Result<Self> {
        Self::start_with(&[]).await
    }

    /// With more settings of PostgreSQL.
    pub(crate) async fn start_with(more: &[(&str, &str)]) -> Result<Self> {
        let folder = paths::target_dir()?.join("bench-run");
        remove_data(&folder)?;
        kafka::fetch_jars()?;
        let mut postgres = Postgres::builder(folder.join("postgres"));
        for (name, value) in POSTGRES.iter().chain(more) {
            postgres = postgres.setting(name, value);
        }
        let mut kafka = Kafka::builder(folder.join("kafka"));
        for option in KAFKA_JVM {
            kafka = kafka.jvm_option(option);
        }
        for (name, value) in KAFKA {
            kafka = kafka.setting(name, value);
        }
        let (postgres, kafka) = tokio::try_join!(postgres.start(), kafka.start())?;
        Ok(Self {
            postgres,
            kafka,
            folder,
        })
    }

    /// How they are set, for the report.
    pub(crate) fn settings() -> Vec<String> {
        let postgres: Vec<String> = POSTGRES
            .iter()
            .map(|(name, value)| format!("{name} = {value}"))
            .collect();
        vec![
            format!(
                "PostgreSQL: wal_level = logical, fsync = on, {}",
                postgres.join(", ")
            ),
            format!("Kafka: one broker, {}", KAFKA_JVM.join(" ")),
        ]
    }

    /// A folder for what a contender keeps.
    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(crate) fn url(&self, database: &str) -> String {
        self.postgres.url(database)
    }

    pub(crate) async fn connect(&self, database: &str) -> Result<Client> {
        connect(&self.url(database)).await
    }

    pub(crate) fn brokers(&self) -> String {
        self.kafka.brokers()
    }

    /// CPU seconds of the server and all its sessions.
    pub(crate) fn postgres_cpu(&self) -> Result<f64> {
        meter::family_cpu_seconds(self.postgres.id().context("PostgreSQL has ended")?)
    }

    pub(crate) fn kafka_cpu(&self) -> Result<f64> {
        meter::cpu_seconds(self.kafka.id().context("Kafka has ended")?)
    }

    /// Stops them and removes all that they had.
    pub(crate) async fn stop(mut self) -> Result<()> {
        self.postgres.stop().await?;
        self.kafka.stop().await?;
        let folder = self.folder.clone();
        drop(self);
        remove_data(&folder)
    }
}

fn remove_data(folder: &Path) -> Result<()> {
    // PostgreSQL's may be elsewhere; its own folder says where.
    postgres::remove(&folder.join("postgres"))?;
    postgres::remove(folder)
}
