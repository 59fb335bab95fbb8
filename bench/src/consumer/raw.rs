//! The limit on Kafka's side: a plain consumer in this process that reads the topics and counts.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::{Offset, TopicPartitionList};

use super::Run;
use super::backlog::Backlog;
use crate::report::{Section, number, thousands};
use crate::servers::Servers;
use crate::stats::median;
use crate::topics::PARTITIONS;
use crate::{meter, topics, ui};

const PATIENCE: Duration = Duration::from_secs(20);

struct Raw {
    rate: f64,
    cpu_s_per_million: f64,
}

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let backlog = run.backlog().await?;
    let mut raws = Vec::new();
    for round in 1..=run.sizes.runs {
        let work = read(&run.servers, backlog.clone());
        let outcome = |raw: &Raw| format!("{} events/s", thousands(raw.rate));
        raws.push(
            ui::step(
                format!("a raw consumer ({round}/{})", run.sizes.runs),
                outcome,
                work,
            )
            .await?,
        );
    }
    let rate = median(raws.iter().map(|raw| raw.rate));
    let cpu = median(raws.iter().map(|raw| raw.cpu_s_per_million));
    let mut section = Section::new("A raw consumer")
        .note(
            "One rdkafka client with its default settings reads all partitions, one thread takes the records and counts them: nothing is \
             decoded or written.",
        )
        .columns(&["events", "events/s", "CPU s per million"]);
    section.row([
        thousands(backlog.events as f64),
        thousands(rate.unwrap_or_default()),
        number(cpu, 2),
    ]);
    run.report.section(section);
    run.report.figure("raw_consumer_rate", rate);
    run.report.figure("raw_cpu_s_per_million", cpu);
    Ok(())
}

async fn read(servers: &Servers, backlog: Backlog) -> Result<Raw> {
    let mut config = topics::client(&servers.brokers());
    config
        .set("group.id", "unused")
        .set("enable.auto.commit", "false");
    tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = config.create()?;
        let mut assignment = TopicPartitionList::new();
        for topic in backlog.topics() {
            for partition in 0..PARTITIONS {
                assignment.add_partition_offset(topic, partition, Offset::Beginning)?;
            }
        }
        consumer.assign(&assignment)?;
        let next = || consumer.poll(PATIENCE).context("a record that does not come");
        next()??;
        let own = std::process::id();
        let (began, before) = (Instant::now(), meter::cpu_seconds(own)?);
        for _ in 1..backlog.events {
            next()??;
        }
        let events = (backlog.events - 1) as f64;
        Ok(Raw {
            rate: events / began.elapsed().as_secs_f64(),
            cpu_s_per_million: (meter::cpu_seconds(own)? - before) / events * 1e6,
        })
    })
    .await?
}
