//! Debezium's settings: those that were tried, and the best of them.

use std::collections::BTreeMap;

use anyhow::Result;

use super::contender::DebeziumOutbox;
use super::{Run, drain, outbox};
use crate::report::{Section, number, thousands};
use crate::stats::median;
use crate::ui;

/// Settings of a worker, on top of those of `local_stack::debezium`.
#[derive(Debug, Clone)]
pub(crate) struct Tuning {
    pub(crate) name: &'static str,
    pub(crate) worker: Vec<(&'static str, &'static str)>,
    pub(crate) connector: Vec<(&'static str, &'static str)>,
    pub(crate) jvm: Vec<&'static str>,
}

const PRODUCER: [(&str, &str); 3] = [
    ("producer.linger.ms", "20"),
    ("producer.batch.size", "262144"),
    ("producer.compression.type", "lz4"),
];
const EAGER: [(&str, &str); 1] = [("poll.interval.ms", "1")];
const QUEUES: [(&str, &str); 3] = [
    ("poll.interval.ms", "1"),
    ("max.batch.size", "8192"),
    ("max.queue.size", "32768"),
];
/// And no headers of the connector's own: `__debezium.context.…`.
const ONE_HEADER: [(&str, &str); 4] = [
    QUEUES[0],
    QUEUES[1],
    QUEUES[2],
    ("extended.headers.enabled", "false"),
];
/// As Kafka Connect's own start script has it.
const CONNECT_JVM: [&str; 5] = [
    "-server",
    "-XX:-UseSerialGC",
    "-XX:+UseG1GC",
    "-Xms256m",
    "-Xmx2g",
];
const PARALLEL: [&str; 5] = [
    "-server",
    "-XX:-UseSerialGC",
    "-XX:+UseParallelGC",
    "-Xms1g",
    "-Xmx1g",
];

fn tried() -> Vec<Tuning> {
    let tuning = |name, worker: &[_], connector: &[_], jvm: &[_]| Tuning {
        name,
        worker: worker.to_vec(),
        connector: connector.to_vec(),
        jvm: jvm.to_vec(),
    };
    let late_offsets = [&PRODUCER[..], &[("offset.flush.interval.ms", "10000")]].concat();
    let short_linger = [&PRODUCER[1..], &[("producer.linger.ms", "5")]].concat();
    let in_buffer = [
        &PRODUCER[..],
        &[
            ("producer.buffer.memory", "134217728"),
            ("producer.max.request.size", "4194304"),
        ],
    ]
    .concat();
    vec![
        tuning("as delivered, Connect's JVM options", &[], &[], &CONNECT_JVM),
        tuning(
            "producer: linger 20, batch 256k, lz4",
            &PRODUCER,
            &[],
            &CONNECT_JVM,
        ),
        tuning("… and poll.interval.ms 1", &PRODUCER, &EAGER, &CONNECT_JVM),
        tuning(
            "… and batches of 8192, queue of 32768",
            &PRODUCER,
            &QUEUES,
            &CONNECT_JVM,
        ),
        tuning("… and ParallelGC, 1 GB", &PRODUCER, &QUEUES, &PARALLEL),
        tuning(
            "… and one header alone, as the EventRouter of old",
            &PRODUCER,
            &ONE_HEADER,
            &PARALLEL,
        ),
        tuning("… with linger 5", &short_linger, &ONE_HEADER, &PARALLEL),
        tuning(
            "… with offsets flushed every 10 s",
            &late_offsets,
            &ONE_HEADER,
            &PARALLEL,
        ),
        tuning(
            "… with 128 MB of producer buffer",
            &in_buffer,
            &ONE_HEADER,
            &PARALLEL,
        ),
        tuning(
            "… with the queues as delivered",
            &PRODUCER,
            &[ONE_HEADER[0], ONE_HEADER[3]],
            &PARALLEL,
        ),
        tuning(
            "… with SerialGC, 512 MB",
            &PRODUCER,
            &ONE_HEADER,
            &["-server", "-Xms512m", "-Xmx512m"],
        ),
    ]
}

impl Tuning {
    /// The best so far, where this run tries none.
    pub(crate) fn known_best() -> Self {
        Self {
            name: "the best known",
            worker: PRODUCER.to_vec(),
            connector: ONE_HEADER.to_vec(),
            jvm: PARALLEL.to_vec(),
        }
    }

    /// The same for latency: nothing waits for more.
    pub(crate) fn at_once(&self) -> Self {
        let mut tuning = self.clone();
        tuning.worker.push(("producer.linger.ms", "0"));
        tuning.connector.push(("poll.interval.ms", "1"));
        tuning
    }

    /// All of it on a line.
    pub(crate) fn settings(&self) -> String {
        // The last of equal names counts.
        let pairs: BTreeMap<_, _> = self.worker.iter().chain(&self.connector).copied().collect();
        let pairs = pairs.iter().map(|(name, value)| format!("{name}={value}"));
        let parts: Vec<String> = pairs.chain(self.jvm.iter().map(ToString::to_string)).collect();
        if parts.is_empty() {
            "none".to_owned()
        } else {
            parts.join(" ")
        }
    }
}

/// Tries them all; the best one is used from then on.
pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let rows = run.sizes.debezium_rows / 2;
    let runs = run.own_runs();
    let table = DebeziumOutbox::create(&run.servers, "debezium_tuning").await?;
    let tried = tried();
    let mut drains = vec![Vec::new(); tried.len()];
    for round in 1..=runs {
        for (tuning, drains) in tried.iter().zip(&mut drains) {
            let topic = run.topic();
            let what = format!("Debezium, {} ({round}/{runs})", tuning.name);
            let drain = ui::step(&what, drain_outcome, async {
                table.reset().await?;
                outbox::fill_debezium(&table.client, rows).await?;
                let start = table.start(&run.servers, &topic, tuning);
                drain::measure(&run.servers, &topic, rows, start).await
            })
            .await?;
            drains.push(drain);
            run.delete(&[&topic]).await?;
        }
    }
    let rates: Vec<Option<f64>> = drains
        .iter()
        .map(|drains| median(drains.iter().map(|drain| drain.rate)))
        .collect();
    let best = (0..tried.len()).max_by(|a, b| rates[*a].unwrap_or(0.0).total_cmp(&rates[*b].unwrap_or(0.0)));
    let mut section = Section::new("Debezium: settings that were tried")
        .note(format!(
            "{} rows in transactions of a thousand, {runs} run(s) each, medians. The best one is what the other tables have.",
            thousands(rows as f64)
        ))
        .columns(&["settings", "rows/s", "whole drain", "CPU s per million", "peak MB", "best", "in full"]);
    for (position, ((tuning, drains), rate)) in tried.iter().zip(&drains).zip(&rates).enumerate() {
        let of = |value: fn(&drain::Drain) -> f64| median(drains.iter().map(value));
        section.row([
            tuning.name.to_owned(),
            rate.map_or_else(String::new, thousands),
            of(|drain| drain.whole_rate).map_or_else(String::new, thousands),
            number(of(|drain| drain.cpu_s_per_million), 1),
            number(of(|drain| drain.peak_mb), 0),
            if best == Some(position) {
                "×".to_owned()
            } else {
                String::new()
            },
            tuning.settings(),
        ]);
    }
    run.report.section(section);
    if let Some(best) = best {
        run.tuning = tried[best].clone();
    }
    Ok(())
}

pub(crate) fn drain_outcome(drain: &drain::Drain) -> String {
    format!("{} rows/s", thousands(drain.rate))
}
