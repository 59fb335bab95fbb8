//! From commit to a consumer under a steady load: one row a transaction, at even times, and a consumer in this process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use local_stack::wait;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::Message as _;
use rdkafka::{Offset, TopicPartitionList};
use serde::Deserialize;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::Run;
use super::contender::{self, DebeziumOutbox, RelayOptions, Running, Who};
use super::outbox::{self, Outbox};
use crate::report::{Section, number};
use crate::servers::Servers;
use crate::stats::{median, percentile};
use crate::topics::{self, PARTITIONS};
use crate::{meter, ui};

/// Rows a second.
const RATE: u64 = 500;
/// Sessions that write, each its share: one alone may wait too long for its disk.
const WRITERS: u64 = 4;
/// Which a writer may send after its commit, where the run is asked to.
const CHANNEL: &str = "outbox";
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy)]
struct Latency {
    p50: f64,
    p99: f64,
    most: f64,
    /// Per cent of a core, of the contender.
    cpu: f64,
}

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let sizes = run.sizes;
    let outbox = Outbox::create(&run.servers, "latency").await?;
    let debezium_outbox = DebeziumOutbox::create(&run.servers, "debezium_latency").await?;
    let tuning = run.tuning.at_once();
    let mut latencies: [Vec<Latency>; 2] = Default::default();
    let mut next = 0;
    for round in 1..=sizes.runs {
        let topic = run.topic();
        let load = Load {
            first: next,
            warm_up: sizes.warm_up,
            measured: sizes.latency,
            notify: run.notify,
        };
        if run.takes_part(Who::Relay) {
            next += load.rows();
            let work = async {
                make(&run.servers, &topic).await?;
                let running =
                    contender::relay(&run.servers, &outbox.url, &topic, &RelayOptions::DEFAULT).await?;
                let insert = outbox::relay_insert_one();
                measure(&run.servers, "latency", insert, &topic, running, load).await
            };
            let what = format!("outbox-relay ({round}/{})", sizes.runs);
            latencies[0].push(ui::step(what, outcome, work).await?);
            run.delete(&[&topic]).await?;
        }
        let topic = run.topic();
        let load = Load {
            first: 0,
            warm_up: sizes.debezium_warm_up,
            notify: false,
            ..load
        };
        if run.takes_part(Who::Debezium) {
            let work = async {
                make(&run.servers, &topic).await?;
                debezium_outbox.reset().await?;
                let running = debezium_outbox.start(&run.servers, &topic, &tuning).await?;
                let insert = outbox::debezium_insert_one();
                measure(&run.servers, "debezium_latency", insert, &topic, running, load).await
            };
            let what = format!("Debezium ({round}/{})", sizes.runs);
            latencies[1].push(ui::step(what, outcome, work).await?);
            run.delete(&[&topic]).await?;
        }
    }
    let mut section = Section::new("From commit to a consumer")
        .note(format!(
            "{RATE} rows/s, one a transaction, {WRITERS} sessions; milliseconds from when the writer knows that it is committed until \
             a consumer has it. {} run(s) of {:?} after a warm-up of {:?} ({:?} for Debezium), medians. NOTIFY after the commit: {}; \
             Debezium: {}",
            sizes.runs,
            sizes.latency,
            sizes.warm_up,
            sizes.debezium_warm_up,
            if run.notify { "yes" } else { "no" },
            tuning.settings()
        ))
        .columns(&["", "p50", "p99", "most", "per cent of a core"]);
    for (name, key, latencies) in [
        ("outbox-relay", "relay", &latencies[0]),
        ("Debezium", "debezium", &latencies[1]),
    ] {
        if latencies.is_empty() {
            continue;
        }
        let of = |value: fn(&Latency) -> f64| median(latencies.iter().map(value));
        section.row([
            name.to_owned(),
            number(of(|latency| latency.p50), 2),
            number(of(|latency| latency.p99), 2),
            number(of(|latency| latency.most), 1),
            number(of(|latency| latency.cpu), 1),
        ]);
        run.report
            .figure(&format!("{key}_p50_ms"), of(|latency| latency.p50));
        run.report
            .figure(&format!("{key}_p99_ms"), of(|latency| latency.p99));
        run.report
            .figure(&format!("{key}_500_cpu_percent"), of(|latency| latency.cpu));
    }
    run.report.section(section);
    Ok(())
}

async fn make(servers: &Servers, topic: &str) -> Result<()> {
    topics::create(&servers.brokers(), topic, PARTITIONS, None).await?;
    topics::ready(&servers.brokers(), topic, PARTITIONS).await?;
    Ok(())
}

fn outcome(latency: &Latency) -> String {
    format!("p50 {:.2} ms, p99 {:.2} ms", latency.p50, latency.p99)
}

/// What is written, and when.
#[derive(Debug, Clone, Copy)]
struct Load {
    /// The number of the first row.
    first: u64,
    warm_up: Duration,
    measured: Duration,
    notify: bool,
}

impl Load {
    fn rows(&self) -> u64 {
        self.warmed_up() + (self.measured.as_secs_f64() * RATE as f64) as u64
    }

    fn warmed_up(&self) -> u64 {
        (self.warm_up.as_secs_f64() * RATE as f64) as u64
    }
}

/// By row, counted from the first: when it was committed, and when a consumer had it, in nanoseconds since `began`; 0: not yet.
struct Times {
    began: Instant,
    first: u64,
    committed: Vec<AtomicU64>,
    consumed: Vec<AtomicU64>,
}

impl Times {
    fn new(load: &Load) -> Self {
        let none = || (0..load.rows()).map(|_| AtomicU64::new(0)).collect();
        Self {
            began: Instant::now(),
            first: load.first,
            committed: none(),
            consumed: none(),
        }
    }

    fn note(&self, times: &[AtomicU64], row: u64, at: Instant) {
        let time = row
            .checked_sub(self.first)
            .and_then(|row| times.get(usize::try_from(row).ok()?));
        if let Some(time) = time {
            let nanos = u64::try_from((at - self.began).as_nanos()).unwrap_or(u64::MAX);
            // A repeat came later.
            let _ = time.compare_exchange(0, nanos, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Milliseconds of the rows behind `skip`; what was consumed before its writer knew of its commit took none.
    fn latencies(&self, skip: usize) -> Vec<f64> {
        let pairs = self.committed.iter().zip(&self.consumed).skip(skip);
        pairs
            .map(|(committed, consumed)| {
                let nanos = consumed
                    .load(Ordering::Relaxed)
                    .saturating_sub(committed.load(Ordering::Relaxed));
                nanos as f64 / 1e6
            })
            .collect()
    }
}

async fn measure(
    servers: &Servers,
    database: &str,
    insert: String,
    topic: &str,
    mut running: Running,
    load: Load,
) -> Result<Latency> {
    let times = Arc::new(Times::new(&load));
    let consumer = Consumer::start(&servers.brokers(), topic, Arc::clone(&times))?;
    let pid = running.pid()?;
    let mut writers = JoinSet::new();
    let committed = Arc::new(Notify::new());
    let start = tokio::time::Instant::now() + Duration::from_millis(100);
    for writer in 0..WRITERS {
        let client = servers.connect(database).await?;
        let statement = client.prepare(&insert).await?;
        let (times, committed) = (Arc::clone(&times), Arc::clone(&committed));
        writers.spawn(async move {
            let mut row = writer;
            while row < load.rows() {
                tokio::time::sleep_until(start + Duration::from_secs(1) * u32::try_from(row)? / RATE as u32)
                    .await;
                let number = load.first + row;
                client.execute(&statement, &[&i64::try_from(number)?]).await?;
                times.note(&times.committed, number, Instant::now());
                committed.notify_one();
                row += WRITERS;
            }
            anyhow::Ok(())
        });
    }
    // Coalesced: what is committed while a NOTIFY is under way is told by the next one.
    let notifier = match load.notify {
        false => None,
        true => {
            let client = servers.connect(database).await?;
            let committed = Arc::clone(&committed);
            Some(tokio::spawn(async move {
                loop {
                    committed.notified().await;
                    if let Err(error) = client.batch_execute(&format!("NOTIFY {CHANNEL}")).await {
                        return error;
                    }
                }
            }))
        }
    };
    tokio::time::sleep_until(start + load.warm_up).await;
    let (began, before) = (Instant::now(), meter::cpu_seconds(pid)?);
    while let Some(written) = writers.join_next().await {
        written??;
    }
    let cpu = (meter::cpu_seconds(pid)? - before) / began.elapsed().as_secs_f64() * 100.0;
    if let Some(notifier) = notifier {
        ensure!(!notifier.is_finished(), "NOTIFY failed: {}", notifier.await?);
        notifier.abort();
    }
    running.check()?;
    let missing = || {
        times
            .consumed
            .iter()
            .filter(|time| time.load(Ordering::Relaxed) == 0)
            .count()
    };
    wait::until("a consumer has every row", PATIENCE, async || {
        Ok((missing() == 0).then_some(()))
    })
    .await
    .with_context(|| format!("{} rows are missing", missing()))?;
    consumer.stop()?;
    running.stop().await?;
    let mut latencies = times.latencies(usize::try_from(load.warmed_up())?);
    let mut at = |share| percentile(&mut latencies, share).context("no rows were measured");
    Ok(Latency {
        p50: at(0.5)?,
        p99: at(0.99)?,
        most: at(1.0)?,
        cpu,
    })
}

/// What is read of a payload.
#[derive(Deserialize)]
struct Event {
    n: u64,
}

/// Notes when each row is there, on a thread of its own.
struct Consumer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Consumer {
    fn start(brokers: &str, topic: &str, times: Arc<Times>) -> Result<Self> {
        let consumer: BaseConsumer = topics::client(brokers)
            .set("group.id", "unused")
            .set("enable.auto.commit", "false")
            .set("fetch.min.bytes", "1")
            .create()?;
        let mut assignment = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            assignment.add_partition_offset(topic, partition, Offset::Beginning)?;
        }
        consumer.assign(&assignment)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // Returns at once when there is something; only the last millisecond of an idle one is spent spinning.
                let Some(message) = consumer.poll(Duration::from_millis(500)) else {
                    continue;
                };
                let (message, now) = (message?, Instant::now());
                let event: Event =
                    serde_json::from_slice(message.payload().context("a record without a payload")?)?;
                times.note(&times.consumed, event.n, now);
            }
            Ok(())
        });
        Ok(Self { stop, thread })
    }

    fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.join();
        ensure!(ended.is_ok(), "the consumer panicked");
        ended.unwrap_or(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_the_warm_up_and_repeats_do_not_count() {
        let load = Load {
            first: 10,
            warm_up: Duration::from_millis(2),
            measured: Duration::from_millis(6),
            notify: false,
        };
        let times = Times::new(&load);
        let at = |millis| times.began + Duration::from_millis(millis);
        for row in 10..14 {
            times.note(&times.committed, row, at(5));
            times.note(&times.consumed, row, at(row));
            times.note(&times.consumed, row, at(100));
        }
        times.note(&times.consumed, 9, at(1));
        times.note(&times.consumed, 14, at(1));
        assert_eq!(times.latencies(1), [6.0, 7.0, 8.0]);
    }
}
