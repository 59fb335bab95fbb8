//! Looks how far things have come, says so, and knows when everything has come to its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use local_stack::measure::{Message, Progress, Writer};
use local_stack::shop::{SERVICES, events};

use crate::blocking;
use crate::databases::{Databases, Open};
use crate::topic::Topics;

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Nothing has changed for so long: nothing will.
pub(crate) const STALLED_AFTER: Duration = Duration::from_secs(90);

/// Follows a run.
pub(crate) struct Follow<'a> {
    pub(crate) messages: Writer,
    pub(crate) databases: &'a Databases,
    pub(crate) topics: Arc<Topics>,
    pub(crate) orders: u64,
    pub(crate) placed: Arc<AtomicU64>,
}

/// Counts, in the order of the kinds of events and of the consumers in the shop's table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    outbox_rows: Vec<u64>,
    kafka_records: Vec<u64>,
    /// Events taken in, and events that there are to take in.
    consumed: Vec<(u64, u64)>,
    projected: u64,
    open: Open,
}

impl Seen {
    /// Nothing is under way, so nothing can happen any more.
    fn is_settled(&self) -> bool {
        self.open == Open::default()
            && self.consumed.iter().all(|(taken, there)| taken == there)
            && self
                .kafka_records
                .iter()
                .zip(&self.outbox_rows)
                .all(|(there, rows)| there >= rows)
    }
}

impl Follow<'_> {
    /// Follows for as long as `running` runs; gives up when nothing has changed for long.
    pub(crate) async fn until_stalled(&self, phase: &str) -> Result<()> {
        self.follow(phase, |_| false).await
    }

    /// Follows until everything has come to its end, or nothing has changed for long: what is missing then, the reconciliation
    /// says.
    pub(crate) async fn until_settled(&self, phase: &str) -> Result<()> {
        self.follow(phase, Seen::is_settled).await
    }

    async fn follow(&self, phase: &str, done: impl Fn(&Seen) -> bool) -> Result<()> {
        let mut last = None;
        let mut changed = Instant::now();
        loop {
            let seen = self.look(last.as_ref()).await?;
            self.messages.send(&Message::Progress(Progress {
                phase: phase.to_owned(),
                orders: self.orders,
                placed: self.placed.load(Ordering::Relaxed),
                outbox_rows: seen.outbox_rows.iter().sum(),
                kafka_records: seen.kafka_records.iter().sum(),
                projected_events: seen.projected,
                open: seen.open.sum(),
            }))?;
            // One look is not taken at one moment: what is done has to be so twice.
            let same = last.as_ref() == Some(&seen);
            if same && (done(&seen) || changed.elapsed() > STALLED_AFTER) {
                return Ok(());
            }
            if !same {
                last = Some(seen);
                changed = Instant::now();
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn look(&self, last: Option<&Seen>) -> Result<Seen> {
        let kinds = events();
        let mut outbox_rows = Vec::new();
        for (database, events) in &kinds {
            outbox_rows.push(self.databases.outbox_count(database, events.entity_type).await?);
        }
        let topics = self.topics.clone();
        let kafka_records = match (blocking(move || topics.counts()).await, last) {
            (Ok(counts), _) => counts,
            // Kafka is away: what was there is there.
            (Err(_), Some(last)) => last.kafka_records.clone(),
            (Err(error), None) => return Err(error),
        };
        let (mut consumed, mut projected) = (Vec::new(), 0);
        for service in SERVICES.iter().filter(|service| !service.consumes.is_empty()) {
            let Some(database) = service.database else {
                continue;
            };
            let taken = self.databases.consumed(database).await?;
            let there = kinds
                .iter()
                .zip(&outbox_rows)
                .filter(|((_, events), _)| service.consumes.contains(&events.topic))
                .map(|(_, rows)| rows)
                .sum();
            consumed.push((taken, there));
            if service.emits.is_empty() {
                projected = taken;
            }
        }
        Ok(Seen {
            outbox_rows,
            kafka_records,
            consumed,
            projected,
            open: self.databases.open().await?,
        })
    }
}
