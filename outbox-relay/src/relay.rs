//! The relay of one outbox: stands by, leads a term, and starts again after whatever ended it, until it is told to stop.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use service::telemetry;
use tokio_util::sync::CancellationToken;

use crate::context::{Context, Memory, Suspect, TermError};
use crate::failpoints::{self, pass};
use crate::inspect;
use crate::publisher::{PublishError, Publisher};
use crate::source::Source;
use crate::source::lease::Lease;
use crate::status::Role;
use crate::term::{Ended, Term};

const BACKOFF: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(5);

/// Why an outbox stopped for good: a restart, after somebody acted, goes on where it stopped.
#[derive(Debug, thiserror::Error)]
#[error("outbox {name} is stopped")]
pub(crate) struct Stopped {
    pub(crate) name: String,
    pub(crate) source: TermError,
}

/// Rows that are remembered as suspects at the most.
const SUSPECTS: usize = 10_000;

/// Relays until `shutdown`, through every transient error.
///
/// # Errors
/// A permanent error, which stops this outbox.
pub(crate) async fn run(context: Context, shutdown: CancellationToken) -> Result<(), Stopped> {
    let mut backoff = *BACKOFF.start();
    let mut memory = Memory::default();
    loop {
        let began = Instant::now();
        let ended = lead(&context, &mut memory, &shutdown).await;
        context.metrics.lead_no_more();
        let error = match ended {
            Ok(Ended::Shutdown) => return Ok(()),
            Ok(Ended::HandedOver) => continue,
            Err(error) => error,
        };
        if let TermError::Publish(PublishError::Refused { ids, certain, source }) = &error {
            context.metrics.permanent_errors.inc();
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
            context.metrics.permanent_errors.inc();
            tracing::error!(
                outbox = context.name,
                error = chain,
                "outbox stopped: this does not go away by waiting"
            );
            context.status.set(Role::Stopped(chain));
            return Err(Stopped {
                name: context.name,
                source: error,
            });
        }
        context.metrics.transient_errors.inc();
        if began.elapsed() > *BACKOFF.end() {
            backoff = *BACKOFF.start();
        }
        tracing::warn!(outbox = context.name, error = chain, wait = ?backoff, "outbox waits and starts again");
        context.status.set(Role::Waiting(chain));
        tokio::select! {
            () = tokio::time::sleep(backoff) => {}
            () = shutdown.cancelled() => return Ok(()),
        }
        backoff = (backoff * 2).min(*BACKOFF.end());
    }
}

/// One term: from standing by to losing the lease, an error, or shutdown.
async fn lead(
    context: &Context,
    memory: &mut Memory,
    shutdown: &CancellationToken,
) -> Result<Ended, TermError> {
    let source = Source::connect(&context.name, &context.config).await?;
    let Some(lease) = stand_by(context, &source, memory, shutdown).await? else {
        if let Err(error) = source.leave(&context.owner).await {
            tracing::debug!(outbox = context.name, error = %telemetry::chain(&error), "left without a word");
        }
        return Ok(Ended::Shutdown);
    };
    pass(failpoints::LEASE_TAKEN);
    memory.own_epoch = Some(lease.epoch);
    let _leading = context.leadership.lead();
    context.metrics.leader_changes.inc();
    context.metrics.leader.set(1);
    tracing::info!(
        outbox = context.name,
        relay.epoch = lease.epoch,
        relay.floor = lease.progress.floor,
        "leading"
    );
    let publisher = Publisher::new(&context.producer)?;
    let mut term = Term::new(context, source, publisher, lease, memory);
    let ended = term.run(shutdown).await;
    term.end(ended).await
}

/// Waits for the lease. `None` at shutdown.
async fn stand_by(
    context: &Context,
    source: &Source,
    memory: &Memory,
    shutdown: &CancellationToken,
) -> Result<Option<Lease>, TermError> {
    let ttl = context.config.lease_ttl;
    let mut joined: Option<Instant> = None;
    loop {
        if let Some(lease) = source.acquire(&context.owner, memory.own_epoch, ttl).await? {
            return Ok(Some(lease));
        }
        if context.status.role() != Role::Standby {
            tracing::info!(outbox = context.name, "standing by: another relay leads");
            context.status.set(Role::Standby);
        }
        if joined.is_none_or(|at| at.elapsed() >= context.config.heartbeat()) {
            joined = Some(Instant::now());
            source
                .join(&context.owner, context.leadership.leads(), ttl)
                .await?;
            let (lead, figures) = inspect::look(&source.db, &source.table, &context.name, ttl).await?;
            context.status.show(lead, figures);
        }
        tokio::select! {
            () = tokio::time::sleep(ttl / 10) => {}
            () = shutdown.cancelled() => return Ok(None),
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
