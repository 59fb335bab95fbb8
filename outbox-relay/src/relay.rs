//! The relay of one outbox: stands by, leads a term, and starts again after whatever ended it, until it is told to stop.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use rdkafka::config::ClientConfig;
use service::telemetry;
use tokio_util::sync::CancellationToken;

use crate::config::Outbox;
use crate::failpoints::{self, pass};
use crate::inspect;
use crate::leadership::Leadership;
use crate::metrics::OutboxMetrics;
use crate::protocol::Breaker;
use crate::publisher::{PublishError, Publisher};
use crate::record::Rendering;
use crate::source::lease::Lease;
use crate::source::{Source, SourceError};
use crate::status::{Role, Status};
use crate::term::{Ended, Term};

const BACKOFF: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(5);

/// Why an outbox stopped for good: a restart, after somebody acted, goes on where it stopped.
#[derive(Debug, thiserror::Error)]
#[error("outbox {name} is stopped")]
pub(crate) struct Stopped {
    pub(crate) name: String,
    pub(crate) source: TermError,
}

/// Why a term of leading ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TermError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// So much fails at once that it cannot be about the records.
    #[error("an outage, nothing is given up: outbox row {id}: {problem}")]
    Outage { id: i64, problem: String },
    #[error("the sequence of the outbox was set back: it gave {given}, and {seen} was seen already")]
    SequenceSetBack { given: i64, seen: i64 },
}

impl TermError {
    /// Whether waiting does not help.
    fn is_permanent(&self) -> bool {
        matches!(
            self,
            Self::Source(SourceError::Unfit(_)) | Self::SequenceSetBack { .. }
        )
    }
}

/// A row that Kafka has refused once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Suspect {
    /// In a batch with others: the next time it goes alone.
    Accused(String),
    /// It was alone.
    Condemned(String),
}

/// What outlives a term.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) own_epoch: Option<i64>,
    pub(crate) suspects: HashMap<i64, Suspect>,
    pub(crate) breaker: Breaker,
    /// Topics that were missing for so long that they do not exist.
    pub(crate) missing_topics: HashSet<String>,
}

/// Rows that are remembered as suspects at the most.
const SUSPECTS: usize = 10_000;

/// The relay of one outbox.
pub(crate) struct Relay {
    pub(crate) name: String,
    pub(crate) config: Outbox,
    pub(crate) rendering: Rendering,
    pub(crate) producer: ClientConfig,
    pub(crate) max_record_bytes: usize,
    /// Name of this process among those that may lead.
    pub(crate) owner: String,
    /// Whether a span is made for each record.
    pub(crate) traced: bool,
    pub(crate) metrics: OutboxMetrics,
    pub(crate) status: Status,
    pub(crate) leadership: Leadership,
}

impl Relay {
    /// Relays until `shutdown`, through every transient error.
    ///
    /// # Errors
    /// A permanent error, which stops this outbox.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> Result<(), Stopped> {
        let mut backoff = *BACKOFF.start();
        let mut memory = Memory::default();
        loop {
            let began = Instant::now();
            let ended = self.lead(&mut memory, &shutdown).await;
            self.metrics.leader.set(0);
            self.metrics.in_flight.set(0);
            self.metrics.lease_remaining.set(0.0);
            let error = match ended {
                Ok(Ended::Shutdown) => return Ok(()),
                Ok(Ended::HandedOver) => continue,
                Err(error) => error,
            };
            if let TermError::Publish(PublishError::Refused { ids, certain, source }) = &error {
                self.metrics.permanent_errors.inc();
                note_refusal(
                    &mut memory.suspects,
                    ids,
                    *certain,
                    &format!("Kafka refuses it: {source}"),
                );
                // Each one shows more of what is refused: to wait would only keep the others.
                backoff = *BACKOFF.start();
            }
            let chain = telemetry::chain(&error).to_string();
            if error.is_permanent() {
                self.metrics.permanent_errors.inc();
                tracing::error!(
                    outbox = self.name,
                    error = chain,
                    "outbox stopped: this does not go away by waiting"
                );
                self.status.set(Role::Stopped(chain));
                return Err(Stopped {
                    name: self.name,
                    source: error,
                });
            }
            self.metrics.transient_errors.inc();
            if began.elapsed() > *BACKOFF.end() {
                backoff = *BACKOFF.start();
            }
            tracing::warn!(outbox = self.name, error = chain, wait = ?backoff, "outbox waits and starts again");
            self.status.set(Role::Waiting(chain));
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                () = shutdown.cancelled() => return Ok(()),
            }
            backoff = (backoff * 2).min(*BACKOFF.end());
        }
    }

    /// One term: from standing by to losing the lease, an error, or shutdown.
    async fn lead(&self, memory: &mut Memory, shutdown: &CancellationToken) -> Result<Ended, TermError> {
        let source = Source::connect(&self.name, &self.config).await?;
        let Some(lease) = self.stand_by(&source, memory, shutdown).await? else {
            if let Err(error) = source.leave(&self.owner).await {
                tracing::debug!(outbox = self.name, error = %telemetry::chain(&error), "left without a word");
            }
            return Ok(Ended::Shutdown);
        };
        pass(failpoints::LEASE_TAKEN);
        memory.own_epoch = Some(lease.epoch);
        let _leading = self.leadership.lead();
        self.metrics.leader_changes.inc();
        self.metrics.leader.set(1);
        tracing::info!(
            outbox = self.name,
            relay.epoch = lease.epoch,
            relay.floor = lease.progress.floor,
            "leading"
        );
        let publisher = Publisher::new(&self.producer)?;
        let mut term = Term::new(self, source, publisher, lease, memory);
        let ended = term.run(shutdown).await;
        term.end(ended).await
    }

    /// Waits for the lease. `None` at shutdown.
    async fn stand_by(
        &self,
        source: &Source,
        memory: &Memory,
        shutdown: &CancellationToken,
    ) -> Result<Option<Lease>, TermError> {
        let ttl = self.config.lease_ttl;
        let mut joined: Option<Instant> = None;
        loop {
            if let Some(lease) = source.acquire(&self.owner, memory.own_epoch, ttl).await? {
                return Ok(Some(lease));
            }
            if self.status.role() != Role::Standby {
                tracing::info!(outbox = self.name, "standing by: another relay leads");
                self.status.set(Role::Standby);
            }
            if joined.is_none_or(|at| at.elapsed() >= self.config.heartbeat()) {
                joined = Some(Instant::now());
                source.join(&self.owner, self.leadership.leads(), ttl).await?;
                let (lead, figures) = inspect::look(&source.db, &source.table, &self.name, ttl).await?;
                self.status.show(lead, figures);
            }
            tokio::select! {
                () = tokio::time::sleep(ttl / 10) => {}
                () = shutdown.cancelled() => return Ok(None),
            }
        }
    }
}

/// A batch is refused as a whole: which of its records was meant shows when each goes alone.
fn note_refusal(suspects: &mut HashMap<i64, Suspect>, ids: &[i64], certain: bool, problem: &str) {
    if suspects.len() > SUSPECTS {
        suspects.clear();
    }
    for id in ids {
        if certain {
            suspects.insert(*id, Suspect::Condemned(problem.to_owned()));
        } else {
            let accused = || Suspect::Accused(problem.to_owned());
            suspects.entry(*id).or_insert_with(accused);
        }
    }
}
