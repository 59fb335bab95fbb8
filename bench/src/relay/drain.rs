//! A drain: how fast a backlog comes onto a topic, as the broker sees it, and what it costs. The same for every contender.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::task::JoinHandle;

use super::contender::Running;
use crate::meter;
use crate::servers::Servers;
use crate::topics::{self, LogEnds, PARTITIONS};

const SAMPLING: Duration = Duration::from_millis(20);
/// Nothing appended for so long, and it is given up.
const PATIENCE: Duration = Duration::from_secs(90);

#[derive(Debug, Clone, Copy)]
pub(crate) struct Drain {
    /// Records a second between a tenth and nine tenths of them: the rate that is compared. How a contender starts and ends
    /// is left out, for all alike.
    pub(crate) rate: f64,
    /// Records a second from the first append to the last.
    pub(crate) whole_rate: f64,
    /// From the start of the process to the last append.
    pub(crate) seconds: f64,
    /// From when its process is known and the first records are there.
    pub(crate) cpu_s_per_million: f64,
    pub(crate) peak_mb: f64,
    /// Per cent of a core over that time: of the contender, of PostgreSQL with all its sessions, of the broker.
    pub(crate) shares: [f64; 3],
}

type Samples = Arc<Mutex<Vec<(Instant, u64)>>>;

/// Records the number of records in a topic until it is dropped.
struct Sampler {
    samples: Samples,
    task: JoinHandle<Result<()>>,
}

impl Sampler {
    fn start(mut ends: LogEnds) -> Self {
        let samples = Samples::default();
        let into = Arc::clone(&samples);
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(SAMPLING);
            loop {
                ticks.tick().await;
                let total = ends.total().await?;
                let mut samples = into.lock().unwrap_or_else(PoisonError::into_inner);
                samples.push((Instant::now(), total));
            }
        });
        Self { samples, task }
    }

    fn last(&self) -> Option<(Instant, u64)> {
        self.samples
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .last()
            .copied()
    }

    /// The first sample that has so many records.
    fn first_with(&self, records: u64) -> Result<(Instant, u64)> {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let found = samples.iter().find(|(_, total)| *total >= records);
        found.copied().context("no sample with so many records")
    }

    /// Waits for a sample that has so many records.
    async fn reached(&mut self, running: &mut Running, records: u64) -> Result<()> {
        let mut moved = (Instant::now(), 0);
        loop {
            let (_, total) = self.last().unwrap_or((moved.0, 0));
            if total >= records {
                return Ok(());
            }
            if total > moved.1 {
                moved = (Instant::now(), total);
            }
            running.check()?;
            if self.task.is_finished() {
                (&mut self.task).await??;
            }
            if moved.0.elapsed() > PATIENCE {
                bail!("nothing was appended for {PATIENCE:?}; {total} of {records} records are there");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Snapshot {
    at: Instant,
    records: u64,
    cpu: [f64; 3],
}

fn snapshot(servers: &Servers, pid: u32, sampler: &Sampler) -> Result<Snapshot> {
    let (_, records) = sampler.last().context("no sample")?;
    Ok(Snapshot {
        at: Instant::now(),
        records,
        cpu: [
            meter::cpu_seconds(pid)?,
            servers.postgres_cpu()?,
            servers.kafka_cpu()?,
        ],
    })
}

/// Makes `topic`, starts a contender, and stops it when `records` are there.
pub(crate) async fn measure(
    servers: &Servers,
    topic: &str,
    records: u64,
    start: impl Future<Output = Result<Running>>,
) -> Result<Drain> {
    topics::create(&servers.brokers(), topic, PARTITIONS, None).await?;
    let mut sampler = Sampler::start(topics::ready(&servers.brokers(), topic, PARTITIONS).await?);
    let started = Instant::now();
    let mut running = start.await?;
    let pid = running.pid()?;
    sampler.reached(&mut running, 1).await?;
    let before = snapshot(servers, pid, &sampler)?;
    sampler.reached(&mut running, records).await?;
    let after = snapshot(servers, pid, &sampler)?;
    let peak_mb = meter::peak_mb(pid)?;
    running.stop().await?;

    let rate = |from: u64, to: u64| -> Result<f64> {
        let (first, last) = (sampler.first_with(from)?, sampler.first_with(to)?);
        Ok((last.1 - first.1) as f64 / (last.0 - first.0).as_secs_f64())
    };
    let elapsed = (after.at - before.at).as_secs_f64();
    let used: Vec<f64> = after
        .cpu
        .iter()
        .zip(before.cpu)
        .map(|(after, before)| after - before)
        .collect();
    Ok(Drain {
        rate: rate(records / 10, records / 10 * 9)?,
        whole_rate: rate(1, records)?,
        seconds: (sampler.first_with(records)?.0 - started).as_secs_f64(),
        cpu_s_per_million: used[0] / (after.records - before.records) as f64 * 1e6,
        peak_mb,
        shares: [0, 1, 2].map(|party| used[party] / elapsed * 100.0),
    })
}
