//! The drain of an outbox onto a topic, as the broker sees it. The same for every contender.

use std::future::Future;
use std::time::Instant;

use anyhow::Result;

use super::contender::Running;
pub(crate) use crate::drain::Drain;
use crate::drain::{self, Sampler};
use crate::servers::Servers;
use crate::topics::{self, PARTITIONS};

/// Makes `topic`, starts a contender, and stops it when `records` are there.
pub(crate) async fn measure(
    servers: &Servers,
    topic: &str,
    records: u64,
    start: impl Future<Output = Result<Running>>,
) -> Result<Drain> {
    topics::create(&servers.brokers(), topic, PARTITIONS, None).await?;
    let sampler = Sampler::start(topics::ready(&servers.brokers(), topic, PARTITIONS).await?);
    let started = Instant::now();
    let mut running = start.await?;
    let process = (running.pid()?, started);
    let drain = drain::measure(servers, sampler, process, records, || running.check()).await?;
    running.stop().await?;
    Ok(drain)
}
