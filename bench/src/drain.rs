//! A drain: how fast a backlog is worked off by a process, and what that costs. Whoever counts what is done stands outside of it.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::task::JoinHandle;

use crate::meter;
use crate::servers::Servers;

/// Nothing done for so long, and it is given up.
const PATIENCE: Duration = Duration::from_secs(90);

/// Who knows how many records are done.
pub(crate) trait Count: Send + 'static {
    /// How often it may be asked without costing those who are measured anything to speak of.
    const EVERY: Duration;

    fn count(&mut self) -> impl Future<Output = Result<u64>> + Send;
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Drain {
    /// Records a second between a tenth and nine tenths of them: the rate that is compared. How a contender starts and ends
    /// is left out, for all alike.
    pub(crate) rate: f64,
    /// Records a second from the first one done to the last.
    pub(crate) whole_rate: f64,
    /// From the start of the process to the last one done.
    pub(crate) seconds: f64,
    /// From when its process is known and the first records are there.
    pub(crate) cpu_s_per_million: f64,
    /// The same of PostgreSQL with all its sessions.
    pub(crate) postgres_cpu_s_per_million: f64,
    pub(crate) peak_mb: f64,
    /// Per cent of a core over that time: of the contender, of PostgreSQL with all its sessions, of the broker.
    pub(crate) shares: [f64; 3],
}

type Samples = Arc<Mutex<Vec<(Instant, u64)>>>;

/// Notes how many records are done until it is dropped.
pub(crate) struct Sampler {
    samples: Samples,
    task: JoinHandle<Result<()>>,
}

impl Sampler {
    pub(crate) fn start<C: Count>(mut counter: C) -> Self {
        let samples = Samples::default();
        let into = Arc::clone(&samples);
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(C::EVERY);
            loop {
                ticks.tick().await;
                let total = counter.count().await?;
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
    async fn reached(&mut self, records: u64, check: &mut impl FnMut() -> Result<()>) -> Result<()> {
        let mut moved = (Instant::now(), 0);
        loop {
            let (_, total) = self.last().unwrap_or((moved.0, 0));
            if total >= records {
                return Ok(());
            }
            if total > moved.1 {
                moved = (Instant::now(), total);
            }
            check()?;
            if self.task.is_finished() {
                (&mut self.task).await??;
            }
            if moved.0.elapsed() > PATIENCE {
                bail!("nothing was done for {PATIENCE:?}; {total} of {records} records are");
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

/// Watches the process `pid`, which was begun at `started`, until `records` are done. `check` fails when it has ended.
pub(crate) async fn measure(
    servers: &Servers,
    mut sampler: Sampler,
    (pid, started): (u32, Instant),
    records: u64,
    mut check: impl FnMut() -> Result<()>,
) -> Result<Drain> {
    sampler.reached(1, &mut check).await?;
    let before = snapshot(servers, pid, &sampler)?;
    sampler.reached(records, &mut check).await?;
    let after = snapshot(servers, pid, &sampler)?;
    let peak_mb = meter::peak_mb(pid)?;

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
    let per_million = |used: f64| used / (after.records - before.records) as f64 * 1e6;
    Ok(Drain {
        rate: rate(records / 10, records / 10 * 9)?,
        whole_rate: rate(1, records)?,
        seconds: (sampler.first_with(records)?.0 - started).as_secs_f64(),
        cpu_s_per_million: per_million(used[0]),
        postgres_cpu_s_per_million: per_million(used[1]),
        peak_mb,
        shares: [0, 1, 2].map(|party| used[party] / elapsed * 100.0),
    })
}
