//! PostgreSQL and Kafka for tests: `./dev stack up|down`, and for the length of a run `./dev test`.

use std::path::Path;

use anyhow::{Context, Result};
use local_stack::testing::Endpoints;
use local_stack::{Kafka, Postgres, kafka, paths, postgres};

use crate::background::{Background, asked_to_end};
use crate::{build, ui};

fn background() -> Result<Background> {
    Ok(Background::new(paths::target_dir()?.join("test-stack")))
}

pub(crate) async fn up() -> Result<()> {
    let background = background()?;
    if let Some(pid) = background.running()? {
        println!("The test stack is already up (process {pid}); ./dev stack down stops it.");
        return Ok(());
    }
    build::install_missing().await?;
    background.start(&["test-stack".into()]).await?;
    println!("The test stack is up: cargo test --release now finds it. ./dev stack down stops it.");
    println!(
        "{}",
        std::fs::read_to_string(background.endpoints_file())?.trim_end()
    );
    Ok(())
}

pub(crate) async fn down() -> Result<()> {
    if background()?.stop().await? {
        println!("The test stack is stopped.");
    } else {
        println!("The test stack was not up.");
    }
    Ok(())
}

pub(crate) async fn supervise() -> Result<()> {
    let background = background()?;
    let _running = background.enter()?;
    let asked = asked_to_end();
    tokio::pin!(asked);
    let mut stack = tokio::select! {
        stack = TestStack::start(background.folder()) => stack?,
        asked = &mut asked => return asked,
    };
    background.announce(&stack.endpoints())?;
    asked.await?;
    background.withdraw();
    stack.stop().await
}

/// Empty at the start, without care for its data at the end.
pub(crate) struct TestStack {
    postgres: Postgres,
    kafka: Kafka,
}

impl TestStack {
    pub(crate) async fn start(folder: &Path) -> Result<Self> {
        ui::blocking_step("Kafka's jars", kafka::fetch_jars).await?;
        let (postgres_folder, kafka_folder) = (folder.join("postgres"), folder.join("kafka"));
        postgres::remove(&postgres_folder)?;
        if kafka_folder.exists() {
            std::fs::remove_dir_all(&kafka_folder).context("cannot remove the last run's Kafka")?;
        }
        let postgres = ui::step(
            "PostgreSQL",
            Postgres::builder(&postgres_folder).fsync(false).start(),
        );
        let kafka = ui::step("Kafka", Kafka::builder(&kafka_folder).start());
        let (postgres, kafka) = tokio::try_join!(postgres, kafka)?;
        ui::say_where_data_is(&postgres, folder);
        Ok(Self { postgres, kafka })
    }

    pub(crate) fn endpoints(&self) -> Endpoints {
        Endpoints {
            postgres_url: self.postgres.url("postgres"),
            kafka_brokers: self.kafka.brokers(),
        }
    }

    pub(crate) async fn stop(&mut self) -> Result<()> {
        // Nobody will want its data, so there is nothing to wait for.
        self.kafka.kill()?;
        self.postgres.stop().await
    }
}
