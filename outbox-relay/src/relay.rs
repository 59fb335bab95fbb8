//! The relay of one outbox: takes the lease, reads, publishes, saves, until it is told to stop.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use ahash::RandomState;
use chrono::{DateTime, Utc};
use rdkafka::config::ClientConfig;
use secrecy::ExposeSecret as _;
use service::telemetry;
use tokio_util::sync::CancellationToken;
use tracing::Span;

use crate::config::Outbox;
use crate::metrics::OutboxMetrics;
use crate::protocol::Tracker;
use crate::publisher::{PublishError, Publisher};
use crate::record::{Record, RecordError};
use crate::source::{Batch, Lease, Source, SourceError, column};
use crate::status::{Role, Status};

/// How often acknowledgements are collected while records are in flight.
const COLLECT: Duration = Duration::from_millis(1);
/// Holes mostly fill by themselves within this time; only then is a fence started.
const FENCE_DELAY: Duration = Duration::from_millis(20);
/// How often the sequence is checked, and backlog and age are measured.
const INSPECT: Duration = Duration::from_secs(1);
/// How long records in flight may take to be acknowledged at a stop.
const DRAIN: Duration = Duration::from_secs(5);
/// Ranges above the floor that are saved at the most: what is beyond is published again after a crash.
const SAVED_RANGES: usize = 1_000;
/// Rows of the first read of a term, and of one after a read that took too long.
const FIRST_FETCH: i64 = 500;
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
    #[error("outbox row {id} cannot be published")]
    Record { id: i64, source: RecordError },
    #[error("the sequence of the outbox was set back: it gave {given}, and {seen} was seen already")]
    SequenceSetBack { given: i64, seen: i64 },
}

impl TermError {
    /// Whether waiting does not help.
    fn is_permanent(&self) -> bool {
        match self {
            Self::Source(error) => matches!(error, SourceError::Unfit(_)),
            Self::Publish(error) => matches!(error, PublishError::Permanent { .. }),
            Self::Record { .. } | Self::SequenceSetBack { .. } => true,
        }
    }
}

/// The relay of one outbox.
pub(crate) struct Relay {
    pub(crate) name: String,
    pub(crate) config: Outbox,
    pub(crate) producer: ClientConfig,
    pub(crate) max_record_bytes: usize,
    /// Name of this process among those that may lead.
    pub(crate) owner: String,
    /// Whether a span is made for each record.
    pub(crate) traced: bool,
    pub(crate) metrics: OutboxMetrics,
    pub(crate) status: Status,
}

impl Relay {
    /// Relays until `shutdown`, through every transient error.
    ///
    /// # Errors
    /// A permanent error, which stops this outbox.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> Result<(), Stopped> {
        let mut backoff = *BACKOFF.start();
        let mut own_epoch = None;
        loop {
            let began = Instant::now();
            let ended = self.lead(&mut own_epoch, &shutdown).await;
            self.metrics.leader.set(0);
            self.metrics.in_flight.set(0);
            self.metrics.lease_remaining.set(0.0);
            let error = match ended {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
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

    /// One term: from taking the lease to losing it, an error, or shutdown.
    async fn lead(&self, own_epoch: &mut Option<i64>, shutdown: &CancellationToken) -> Result<(), TermError> {
        let connect = self
            .config
            .database_url
            .expose_secret()
            .parse()
            .map_err(|_| SourceError::Unfit("database_url cannot be read".to_owned()))?;
        let source = Source::connect(
            &connect,
            &self.config.table,
            &self.name,
            self.config.statement_timeout(),
        )
        .await?;
        let lease = loop {
            if let Some(lease) = source
                .acquire(&self.owner, *own_epoch, self.config.lease_ttl)
                .await?
            {
                break lease;
            }
            if self.status.role() != Role::Standby {
                tracing::info!(outbox = self.name, "standing by: another relay leads");
                self.status.set(Role::Standby);
            }
            tokio::select! {
                () = tokio::time::sleep(self.config.lease_ttl / 10) => {}
                () = shutdown.cancelled() => return Ok(()),
            }
        };
        *own_epoch = Some(lease.epoch);
        self.metrics.leader_changes.inc();
        self.metrics.leader.set(1);
        tracing::info!(
            outbox = self.name,
            relay.epoch = lease.epoch,
            relay.floor = lease.progress.floor,
            "leading"
        );
        self.status.set(Role::Leading);

        let publisher = Publisher::new(&self.producer, self.max_record_bytes)?;
        let mut term = Term {
            relay: self,
            tracker: Tracker::resume(lease.progress.clone()),
            source,
            publisher,
            lease,
            in_flight: HashMap::default(),
            unsaved: false,
            // Due at once: a relay that crashes again and again must come forward all the same.
            saved: Instant::now()
                .checked_sub(self.config.save_interval)
                .unwrap_or_else(Instant::now),
            moved: Instant::now(),
            fetch_rows: FIRST_FETCH,
            holes_since: None,
            fence_since: None,
            inspected: None,
        };
        let ended = term.run(shutdown).await;
        term.end(ended).await
    }
}

/// A record that Kafka has not acknowledged yet.
struct InFlight {
    occurred_at: DateTime<Utc>,
    handed: Instant,
    /// Kept open until the acknowledgement.
    _span: Option<Span>,
}

/// One term as leader.
struct Term<'a> {
    relay: &'a Relay,
    source: Source,
    publisher: Publisher,
    tracker: Tracker<String>,
    lease: Lease,
    in_flight: HashMap<i64, InFlight, RandomState>,
    /// There is progress that is not saved.
    unsaved: bool,
    saved: Instant,
    /// Last acknowledgement, or moment at which nothing was in flight.
    moved: Instant,
    fetch_rows: i64,
    holes_since: Option<Instant>,
    fence_since: Option<Instant>,
    inspected: Option<Instant>,
}

impl Term<'_> {
    async fn run(&mut self, shutdown: &CancellationToken) -> Result<(), TermError> {
        let config = &self.relay.config;
        let mut pause = config.poll_min;
        while !shutdown.is_cancelled() {
            self.tick().await?;
            let full = self.poll(shutdown).await?;
            self.inspect(full.is_none()).await?;
            match full {
                Some(true) => {
                    pause = config.poll_min;
                    continue;
                }
                Some(false) => pause = config.poll_min,
                // Slowly: between two rows of a steady trickle it stays short.
                None => pause = (pause * 5 / 4).min(config.poll_max),
            }
            self.rest(pause, shutdown).await?;
        }
        Ok(())
    }

    /// Reads once and hands over what is new. `None` when nothing was; otherwise whether there may be more at once.
    async fn poll(&mut self, shutdown: &CancellationToken) -> Result<Option<bool>, TermError> {
        self.advance_fence().await?;
        let may_end_fence = self.tracker.fence_is_passed();
        let began = Instant::now();
        let config = &self.relay.config;
        let Batch { rows, bytes, read } = self
            .source
            .read(
                self.tracker.holes(),
                self.tracker.head(),
                self.fetch_rows,
                config.fetch_bytes,
            )
            .await?;
        self.relay.metrics.fetch.observe(began.elapsed().as_secs_f64());
        if bytes > config.fetch_bytes {
            self.fetch_rows = i64::try_from(rows.len()).unwrap_or(FIRST_FETCH).max(1);
        } else if read.full && bytes <= config.fetch_bytes / 2 {
            self.fetch_rows = (self.fetch_rows * 2).min(config.fetch_rows.into());
        }
        self.relay.status.progressed(self.moved.elapsed());

        let began = Instant::now();
        let mut fresh = 0;
        for row in &rows {
            let id = row.get(column::ID);
            if !self.tracker.observe(id) {
                continue;
            }
            fresh += 1;
            let mut record = Record::from_row(row, &self.relay.config.topic)
                .map_err(|source| TermError::Record { id, source })?;
            if !self.hand_over(&mut record, shutdown).await? {
                return Ok(None);
            }
        }
        if may_end_fence {
            let dead = self.tracker.end_fence(read);
            self.unsaved |= dead > 0;
            if let Some(since) = self.fence_since.take_if(|_| !self.tracker.fence_is_passed()) {
                self.relay
                    .metrics
                    .fence_wait
                    .observe(since.elapsed().as_secs_f64());
            }
        }
        if fresh == 0 {
            return Ok(None);
        }
        self.relay.metrics.produce.observe(began.elapsed().as_secs_f64());
        self.relay.metrics.batch.observe(f64::from(fresh));
        Ok(Some(read.full))
    }

    /// Hands one record over, once there is room. `false` at shutdown: the record, and all after it, stay in the outbox.
    async fn hand_over(
        &mut self,
        record: &mut Record<'_>,
        shutdown: &CancellationToken,
    ) -> Result<bool, TermError> {
        self.publisher.admit(record).await?;
        loop {
            self.keep_lease().await?;
            if self.publisher.send(record)? {
                break;
            }
            if shutdown.is_cancelled() {
                return Ok(false);
            }
            tokio::time::sleep(COLLECT).await;
            self.tick().await?;
        }
        let span = self.relay.traced.then(|| send_span(record));
        let handed = Instant::now();
        if self.in_flight.is_empty() {
            self.moved = handed;
        }
        self.in_flight.insert(
            record.id,
            InFlight {
                occurred_at: record.occurred_at,
                handed,
                _span: span,
            },
        );
        Ok(true)
    }

    /// Lists the open writers when holes have stayed for a while.
    async fn advance_fence(&mut self) -> Result<(), TermError> {
        if self.tracker.holes().is_empty() {
            self.holes_since = None;
        }
        if !self.tracker.wants_listing() {
            return Ok(());
        }
        let since = *self.holes_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= FENCE_DELAY {
            self.fence_since.get_or_insert_with(Instant::now);
            self.tracker.list(self.source.open_writers().await?);
            if self.tracker.fence_is_passed() {
                self.holes_since = None;
            }
        }
        Ok(())
    }

    /// Collects acknowledgements, notices a stall, keeps the lease, saves.
    async fn tick(&mut self) -> Result<(), TermError> {
        let metrics = &self.relay.metrics;
        let acknowledged = self.publisher.collect()?;
        if !acknowledged.is_empty() {
            let now = Instant::now();
            let wall = Utc::now();
            for id in &acknowledged {
                self.tracker.published(*id);
                if let Some(record) = self.in_flight.remove(id) {
                    metrics
                        .ack
                        .observe(now.duration_since(record.handed).as_secs_f64());
                    let age = (wall - record.occurred_at).to_std().unwrap_or_default();
                    metrics.end_to_end.observe(age.as_secs_f64());
                }
            }
            metrics.published.inc_by(acknowledged.len() as u64);
            self.moved = now;
            self.unsaved = true;
        }
        metrics
            .in_flight
            .set(i64::try_from(self.in_flight.len()).unwrap_or(i64::MAX));
        if self.in_flight.is_empty() {
            self.moved = Instant::now();
        } else if self.moved.elapsed() > self.relay.config.delivery_timeout {
            return Err(PublishError::Stalled(self.relay.config.delivery_timeout).into());
        }
        if self.unsaved && self.saved.elapsed() >= self.relay.config.save_interval {
            self.save(self.relay.config.lease_ttl).await?;
        }
        self.keep_lease().await
    }

    /// Renews the lease once a third of it has gone, and refuses to go on when too little of it is left.
    async fn keep_lease(&mut self) -> Result<(), TermError> {
        let ttl = self.relay.config.lease_ttl;
        let left = self.lease.expires.saturating_duration_since(Instant::now());
        if left < ttl - ttl / 3 {
            self.save(ttl).await?;
            if self.lease.expires.saturating_duration_since(Instant::now()) < self.relay.config.lease_margin()
            {
                return Err(SourceError::LeaseLost.into());
            }
        }
        Ok(())
    }

    async fn save(&mut self, ttl: Duration) -> Result<(), TermError> {
        let progress = self.tracker.progress(SAVED_RANGES);
        self.source.save(&mut self.lease, &progress, ttl).await?;
        self.saved = Instant::now();
        self.unsaved = false;
        let metrics = &self.relay.metrics;
        metrics.lease_remaining.set(ttl.as_secs_f64());
        metrics.floor_lag.set(self.tracker.head() - self.tracker.floor());
        Ok(())
    }

    /// Waits, while acknowledgements are collected.
    async fn rest(&mut self, pause: Duration, shutdown: &CancellationToken) -> Result<(), TermError> {
        let until = Instant::now() + pause;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || shutdown.is_cancelled() {
                return Ok(());
            }
            let slice = if self.in_flight.is_empty() {
                left
            } else {
                left.min(COLLECT)
            };
            tokio::select! {
                () = tokio::time::sleep(slice) => {}
                () = shutdown.cancelled() => {}
            }
            self.tick().await?;
        }
    }

    /// Checks the sequence, and measures backlog and age. While `idle`, ids that nobody committed are looked into too.
    async fn inspect(&mut self, idle: bool) -> Result<(), TermError> {
        if self.inspected.is_some_and(|at| at.elapsed() < INSPECT) {
            return Ok(());
        }
        self.inspected = Some(Instant::now());
        let seen = self.tracker.head();
        let given = self.source.last_id_given().await?.unwrap_or(0);
        if given < seen {
            return Err(TermError::SequenceSetBack { given, seen });
        }
        if idle {
            self.tracker.given(given);
        }
        let backlog = self.tracker.unfinished() + given - self.tracker.head();
        let age = if backlog == 0 {
            0.0
        } else {
            self.source.age_above(self.tracker.floor()).await?
        };
        self.relay.metrics.backlog.set(backlog);
        self.relay.metrics.oldest_age.set(age);
        Ok(())
    }

    /// Ends the term: what is in flight may still be acknowledged, what was is saved, the lease is given up.
    async fn end(mut self, ended: Result<(), TermError>) -> Result<(), TermError> {
        let source_failed = matches!(ended, Err(TermError::Source(_)));
        let producer_failed = matches!(
            ended,
            Err(TermError::Publish(
                PublishError::Transient { .. } | PublishError::Stalled(_)
            ))
        );
        if !source_failed && !producer_failed {
            self.drain().await;
        }
        let Self {
            relay,
            source,
            publisher,
            tracker,
            mut lease,
            ..
        } = self;
        publisher.abandon().await;
        if !source_failed {
            // The next leader need not wait. If this fails, it waits for the lease to expire.
            let progress = tracker.progress(SAVED_RANGES);
            if let Err(error) = source.save(&mut lease, &progress, Duration::ZERO).await {
                tracing::warn!(
                    outbox = relay.name,
                    error = %telemetry::chain(&error),
                    "progress was not saved at the end of a term: some rows will be published again"
                );
            }
        }
        ended
    }

    async fn drain(&mut self) {
        let deadline = Instant::now() + DRAIN.min(self.relay.config.lease_ttl);
        while !self.in_flight.is_empty() && Instant::now() < deadline {
            tokio::time::sleep(COLLECT).await;
            if let Err(error) = self.tick().await {
                tracing::warn!(
                    outbox = self.relay.name,
                    error = %telemetry::chain(&error),
                    "records in flight were not acknowledged at the end of a term: they will be published again"
                );
                return;
            }
        }
    }
}

/// The span of one record on its way, a child of the command that caused the event. The record's own headers keep the
/// command's context: were they changed to this span, a repeat would not be the same bytes.
fn send_span(record: &Record<'_>) -> Span {
    let span = tracing::info_span!(
        parent: None,
        "send",
        otel.name = %format_args!("send {}", record.topic),
        otel.kind = "producer",
        messaging.system = "kafka",
        messaging.operation.name = "send",
        messaging.operation.type = "send",
        messaging.destination.name = %record.topic,
        messaging.kafka.message.key = record.key,
        messaging.message.id = %record.event_id,
        event.r#type = record.event_type,
        event.version = record.version,
    );
    telemetry::set_parent(&span, record.traceparent, record.tracestate);
    span
}
