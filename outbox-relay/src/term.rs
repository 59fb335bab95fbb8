//! One term as leader of an outbox: reads, publishes, saves.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ahash::{HashMap, HashSet};
use envelope::header;
use service::telemetry;
use slab::Slab;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::Span;

use crate::config::{Durability, Versions as VersionRule};
use crate::context::{Context, Memory, Suspect, TermError};
use crate::failpoints::{self, pass};
use crate::figures::Meter;
use crate::leadership::fewest;
use crate::protocol::{Cause, Entity, Follows, Tracker, Versions};
use crate::publisher::{PublishError, Publisher, TopicState};
use crate::record::{Record, is_topic_name, marker_headers};
use crate::row::OutboxRow;
use crate::source::ahead::{Ahead, FetchSize, Reader};
use crate::source::lease::{Lease, Member, QuarantineChanges};
use crate::source::quarantine::{Decision, Kept, Parked, Quarantine};
use crate::source::retention::{keep_removing, removed_to};
use crate::source::{Batch, Source, SourceError, check};
use crate::status::{Figures, Lead, Role};
use crate::time::Micros;

/// How often acknowledgements are collected while records are in flight.
const COLLECT: Duration = Duration::from_millis(1);
/// Holes mostly fill by themselves within this time; only then is a fence started.
const FENCE_DELAY: Duration = Duration::from_millis(20);
/// A fence that takes longer is told of, so often.
const FENCE_ALARM: Duration = Duration::from_secs(60);
/// How often the sequence is checked, and backlog and age are measured.
const INSPECT: Duration = Duration::from_secs(1);
/// How long records in flight may take to be acknowledged at a stop.
const DRAIN: Duration = Duration::from_secs(5);
/// Ranges above the floor that are saved at the most: what is beyond is published again after a crash.
const SAVED_RANGES: usize = 1_000;
/// Entities whose newest version is remembered, at least.
const VERSIONS: usize = 50_000;
/// Records waiting to be saved to the quarantine, and their bytes, at the most.
const PARKED_ROWS: usize = 1_000;
const PARKED_BYTES: usize = 4 << 20;
/// Records of a key of the quarantine that are published at once, and keys asked for at once.
const KEPT_ROWS: i64 = 200;
const DECIDED_KEYS: i64 = 100;
/// How long a topic must be missing before that is believed.
const PROPAGATION: Duration = Duration::from_secs(3);
/// How long to wait for somebody else to flush the log before doing it ourselves.
const FLUSH_PATIENCE: Duration = Duration::from_millis(5);
/// Fewer acknowledged rows than these are saved at leisure.
const FEW_ROWS: usize = 1_000;
/// The time is taken once for so many rows.
const CLOCK_ROWS: u32 = 64;

/// How a term ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    Shutdown,
    HandedOver,
}

/// A record that Kafka has not acknowledged yet.
struct InFlight {
    id: i64,
    entity: Entity,
    occurred_at: Option<Micros>,
    handed: Instant,
    /// What becomes of its row of the quarantine, if it has one.
    kept: Option<KeptAs>,
    /// Kept open until the acknowledgement.
    _span: Option<Box<Span>>,
}

/// What becomes of a row of the quarantine once Kafka has acknowledged its record.
#[derive(Debug, Clone, Copy)]
enum KeptAs {
    /// It goes.
    Released,
    /// The record was a marker.
    Skipped,
}

/// What to do with a record.
enum Verdict {
    Publish,
    /// One before it may still turn up: it is read again.
    Later,
    Freeze(Cause, String),
}

/// One term as leader.
pub(crate) struct Term<'a> {
    context: &'a Context,
    memory: &'a mut Memory,
    source: Source,
    /// Where there was much to read once.
    reader: Option<Arc<Reader>>,
    ahead: Option<Ahead>,
    publisher: Publisher,
    tracker: Tracker<String>,
    versions: Versions,
    lease: Lease,
    in_flight: Slab<InFlight>,
    /// Ids that the tracker is yet to be told of, once a second at least: told together they are neighbours mostly.
    acknowledged: Vec<i64>,
    /// The record that was handed over while nothing else was in flight.
    alone: Option<i64>,
    /// Entities in quarantine: type and keys.
    frozen: HashMap<String, HashSet<String>>,
    changes: QuarantineChanges,
    parked_bytes: usize,
    /// Entities of the quarantine that are being published.
    retried: VecDeque<(String, String)>,
    /// There is progress that is not saved.
    unsaved: bool,
    /// Acknowledged since the last save.
    unsaved_rows: usize,
    saved: Instant,
    /// Last acknowledgement, or moment at which nothing was in flight.
    moved: Instant,
    size: FetchSize,
    /// When a read last brought some.
    rows_came: Instant,
    holes_since: Option<Instant>,
    fence_since: Option<Instant>,
    fence_told: Option<Instant>,
    inspected: Option<Instant>,
    joined: Option<Instant>,
    members: Vec<Member>,
    /// Who is to lead next.
    wanted: Option<String>,
    meter: Meter,
    figures: Figures,
    figures_saved: Option<Instant>,
    _removal: AbortOnDropHandle<()>,
}

impl<'a> Term<'a> {
    pub(crate) fn new(
        context: &'a Context,
        source: Source,
        publisher: Publisher,
        lease: Lease,
        memory: &'a mut Memory,
    ) -> Self {
        let now = Instant::now();
        Self {
            context,
            memory,
            source,
            reader: None,
            ahead: None,
            publisher,
            tracker: Tracker::resume(lease.progress.clone()),
            versions: Versions::new(VERSIONS),
            lease,
            in_flight: Slab::new(),
            acknowledged: Vec::new(),
            alone: None,
            frozen: HashMap::default(),
            changes: QuarantineChanges::default(),
            parked_bytes: 0,
            retried: VecDeque::new(),
            unsaved: false,
            unsaved_rows: 0,
            // Due at once: a relay that crashes again and again must come forward all the same.
            saved: now.checked_sub(context.config.save_interval).unwrap_or(now),
            moved: now,
            size: FetchSize::first(&context.config),
            rows_came: now,
            holes_since: None,
            fence_since: None,
            fence_told: None,
            inspected: None,
            joined: None,
            members: Vec::new(),
            wanted: None,
            meter: Meter::default(),
            figures: Figures::default(),
            figures_saved: None,
            _removal: AbortOnDropHandle::new(tokio::spawn(keep_removing(
                context.name.clone(),
                context.config.clone(),
            ))),
        }
    }

    pub(crate) async fn run(&mut self, shutdown: &CancellationToken) -> Result<Ended, TermError> {
        // Writers who cannot wait for the next poll say so, after their commit.
        self.source
            .db
            .listen(self.source.table.name())
            .await
            .map_err(SourceError::from)?;
        self.load_quarantine().await?;
        let loose =
            check::loose_grants(&self.source.db, &self.source.table, &self.context.config.layout).await?;
        if !loose.is_empty() {
            tracing::warn!(
                outbox = self.context.name,
                grants = loose.join("; "),
                "others than the table's owner may do what breaks the outbox's promises: outbox-relay init --writer-role \
                 grants what a writer needs"
            );
        }
        let config = &self.context.config;
        let mut pause = config.poll_min;
        let mut is_shown = false;
        while !shutdown.is_cancelled() {
            self.tick().await?;
            let full = self.poll(shutdown).await?;
            // Not before: through an outage one term follows the other, and none of them is ready.
            if !is_shown {
                is_shown = true;
                self.context.status.set(Role::Leading);
            }
            self.work_off(shutdown).await?;
            self.inspect(full.is_none()).await?;
            if self.hands_over().await? {
                return Ok(Ended::HandedOver);
            }
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
        Ok(Ended::Shutdown)
    }

    /// Learns which entities are frozen, and tells the quarantine of records of its own that were refused.
    async fn load_quarantine(&mut self) -> Result<(), TermError> {
        for entity in self.source.frozen().await? {
            self.freeze(&entity.0, &entity.1);
        }
        // Those that were only accused go alone the next time, as rows of the outbox do.
        let suspects = self.memory.suspects.iter();
        let condemned = suspects.filter(|(_, suspect)| matches!(suspect, Suspect::Condemned(_)));
        let condemned: Vec<i64> = condemned.map(|(id, _)| *id).collect();
        for (entity, id) in self.source.in_quarantine(condemned).await? {
            if let Some(Suspect::Condemned(problem)) = self.memory.suspects.remove(&id) {
                self.source.refused_again(&entity, id, &problem).await?;
            }
        }
        self.notice_decisions().await
    }

    /// Learns which keys are to be published after all.
    async fn notice_decisions(&mut self) -> Result<(), TermError> {
        if self.frozen.is_empty() {
            return Ok(());
        }
        for entity in self.source.decided(DECIDED_KEYS).await? {
            if self.retried.contains(&entity) {
                continue;
            }
            // Rows that came since the decision go too: were they all that is left when this relay stops, nobody would
            // go on with them.
            if !self.changes.is_empty() {
                self.save(self.context.config.lease_ttl).await?;
            }
            self.source.retry_rows_behind(&entity).await?;
            self.retried.push_back(entity);
        }
        Ok(())
    }

    /// Reads once and hands over what is new. `None` when nothing was; otherwise whether there may be more at once.
    async fn poll(&mut self, shutdown: &CancellationToken) -> Result<Option<bool>, TermError> {
        self.advance_fence().await?;
        let began = Instant::now();
        let (batch, passed) = self.fetch().await?;
        self.context.metrics.fetch.observe(began.elapsed().as_secs_f64());
        if let Some(log_end) = batch.log_end
            && !batch.rows.is_empty()
            && log_end.safe < log_end.inserted
        {
            self.until_safe(log_end.inserted).await?;
        }
        self.size.learn(&batch);
        let Batch { rows, read, .. } = batch;
        self.context.status.progressed(self.moved.elapsed());
        if read.full && self.ahead.is_none() {
            self.fetch_ahead(&rows).await?;
        }
        if !rows.is_empty() {
            pass(failpoints::AFTER_FETCH);
        }

        let began = Instant::now();
        let mut fresh = 0;
        let mut now = began;
        for row in &rows {
            if !self.tracker.is_new(row.id()) {
                continue;
            }
            // Asking for the time costs as much as some headers do.
            if fresh % CLOCK_ROWS == 0 {
                now = Instant::now();
            }
            let mut record = Record::from_row(row, &self.context.rendering);
            if !self.publish_at_once(&mut record, now)? && !self.take(record, passed, shutdown).await? {
                return Ok(None);
            }
            fresh += 1;
        }
        // Whatever was the matter, records go through again.
        self.memory.breaker.close();
        if passed {
            let dead = self.tracker.end_fence(read);
            self.unsaved |= !dead.is_empty();
            if let Some(ahead) = &self.ahead {
                ahead.died(&dead);
            }
            if let Some(since) = self.fence_since.take_if(|_| !self.tracker.fence_is_passed()) {
                let waited = since.elapsed().as_secs_f64();
                self.context.metrics.fence_wait.observe(waited);
                pass(failpoints::FENCE_PASSED);
            }
        }
        if fresh == 0 {
            return Ok(None);
        }
        self.context
            .metrics
            .produce
            .observe(began.elapsed().as_secs_f64());
        self.context.metrics.batch.observe(f64::from(fresh));
        Ok(Some(read.full))
    }

    /// The next rows, and whether the fence was passed when their read began.
    async fn fetch(&mut self) -> Result<(Batch, bool), TermError> {
        if let Some(ahead) = &mut self.ahead {
            ahead.passed(self.tracker.passed_fence());
            if let Some((batch, fence)) = ahead.next(self.tracker.seen()).await {
                let batch = batch?;
                if !batch.read.full {
                    self.ahead = None;
                }
                return Ok((batch, fence.is_some() && fence == self.tracker.passed_fence()));
            }
            self.ahead = None;
        }
        let passed = self.tracker.fence_is_passed();
        let FetchSize { rows, max_bytes, .. } = self.size;
        let seen = self.tracker.seen();
        let expected = self.rows_came.elapsed() <= self.context.config.poll_max;
        let batch = self.source.read(seen, rows, max_bytes, expected).await?;
        if !batch.rows.is_empty() {
            self.rows_came = Instant::now();
        }
        Ok((batch, passed))
    }

    /// Begins to read what comes after `rows`, while they are handed over.
    async fn fetch_ahead(&mut self, rows: &[OutboxRow]) -> Result<(), TermError> {
        let mut seen = self.tracker.seen().clone();
        for row in rows {
            seen.observe(row.id());
        }
        let reader = match &self.reader {
            Some(reader) => Arc::clone(reader),
            None => {
                let reader = Arc::new(Reader::connect(&self.source, &self.context.config).await?);
                self.reader.insert(reader).clone()
            }
        };
        self.ahead = Some(Ahead::start(reader, seen, self.size));
        Ok(())
    }

    /// Hands a record over if nothing is special about it and there is room: the way of nearly all of them, without a future
    /// that would cost more than the rest. `false`: [`Self::take`] knows what to do.
    fn publish_at_once(&mut self, record: &mut Record<'_>, now: Instant) -> Result<bool, TermError> {
        let entity = self.versions.entity(record.aggregate_type, record.key);
        let is_plain = !self.context.traced
            && self.memory.suspects.is_empty()
            && record.problem.is_none()
            && record.bytes <= self.context.max_record_bytes
            && !self.is_frozen((record.aggregate_type, record.key))
            && self
                .checked_version(record)
                .is_none_or(|version| self.versions.check(entity, version) == Follows::Well)
            && self.publisher.knows(&record.topic)
            && !self.lease_is_short(now);
        if !is_plain || !self.hand_to_kafka(record, entity, None, &mut None, now)? {
            return Ok(false);
        }
        self.memory.breaker.saw();
        self.tracker.observe(record.id);
        if let Some(version) = record.version {
            self.versions.saw(entity, version);
        }
        Ok(true)
    }

    /// Publishes, parks or puts off a record. `false` at shutdown.
    async fn take(
        &mut self,
        mut record: Record<'_>,
        passed: bool,
        shutdown: &CancellationToken,
    ) -> Result<bool, TermError> {
        let entity = (record.aggregate_type, record.key);
        if self.is_frozen(entity) {
            self.tracker.observe(record.id);
            self.memory.suspects.remove(&record.id);
            let is_retried = self.retried.iter().any(|(kind, key)| (&**kind, &**key) == entity);
            self.park(Parked::new(&record, None, is_retried)).await?;
            return Ok(true);
        }
        self.memory.breaker.saw();
        let known = self.versions.entity(record.aggregate_type, record.key);
        match self.judge(&record, known, passed).await? {
            Verdict::Later => Ok(true),
            Verdict::Publish => {
                self.tracker.observe(record.id);
                if let Some(version) = record.version {
                    self.versions.saw(known, version);
                }
                self.hand_over(&mut record, shutdown).await
            }
            Verdict::Freeze(cause, problem) => {
                if !self.memory.breaker.may_freeze(cause, Instant::now()) {
                    return Err(TermError::Outage {
                        id: record.id,
                        problem,
                    });
                }
                tracing::error!(
                    outbox = self.context.name,
                    outbox.id = record.id,
                    problem,
                    "an entity is frozen: its rows wait in quarantine, the others flow"
                );
                // What is before it of its entity must be on Kafka when it is kept: after a crash nobody knows of what was in
                // flight, and the quarantine may be worked off before that is read again.
                if !self
                    .settle_those(|before| before.entity == known, shutdown)
                    .await?
                {
                    return Ok(false);
                }
                self.memory.suspects.remove(&record.id);
                self.tracker.observe(record.id);
                self.freeze(entity.0, entity.1);
                self.park(Parked::new(&record, Some(problem), false)).await?;
                Ok(true)
            }
        }
    }

    /// Whether a record can be published now, before any record after it is handed over.
    async fn judge(
        &mut self,
        record: &Record<'_>,
        entity: Entity,
        passed: bool,
    ) -> Result<Verdict, TermError> {
        if let Some(Suspect::Condemned(problem)) = self.memory.suspects.get(&record.id) {
            return Ok(Verdict::Freeze(Cause::Surroundings, problem.clone()));
        }
        if let Some((cause, problem)) = self.refusal(record).await? {
            return Ok(Verdict::Freeze(cause, problem));
        }
        let Some(version) = self.checked_version(record) else {
            return Ok(Verdict::Publish);
        };
        match self.versions.check(entity, version) {
            Follows::Well => Ok(Verdict::Publish),
            Follows::Again { last } => Ok(Verdict::Freeze(
                Cause::Record,
                format!(
                    "its version is {version}, and {last} was published already: did it lock the entity first?"
                ),
            )),
            Follows::WithGap { last } => {
                // It stays a hole, and is read again.
                self.tracker.given(record.id);
                if self.tracker.may_turn_up_below(record.id, passed) {
                    return Ok(Verdict::Later);
                }
                Ok(Verdict::Freeze(
                    Cause::Record,
                    format!(
                        "its version is {version}, and the one before it is {last}: what is between is missing"
                    ),
                ))
            }
        }
    }

    /// The version, where versions promise something.
    fn checked_version(&self, record: &Record<'_>) -> Option<i64> {
        let checked = self.context.config.versions == VersionRule::Contiguous;
        record.version.filter(|_| checked)
    }

    /// Why Kafka would not take a record.
    async fn refusal(&mut self, record: &Record<'_>) -> Result<Option<(Cause, String)>, TermError> {
        if let Some(problem) = &record.problem {
            return Ok(Some((Cause::Record, problem.clone())));
        }
        let limit = self.context.max_record_bytes;
        if record.bytes > limit {
            let problem = format!(
                "its record has {} bytes, and message.max.bytes is {limit}",
                record.bytes
            );
            return Ok(Some((Cause::Record, problem)));
        }
        let topic = &record.topic;
        if !is_topic_name(topic) {
            let problem = format!("its topic {topic:?} is not a name that Kafka takes");
            return Ok(Some((Cause::Record, problem)));
        }
        let problem = match self.topic_state(topic).await? {
            TopicState::There => return Ok(None),
            TopicState::Missing => format!(
                "topic {topic} does not exist: create it, for example with `outbox-relay create-topics {topic}=6`"
            ),
            TopicState::Forbidden => format!("the broker does not let the relay write to topic {topic}"),
        };
        Ok(Some((Cause::Surroundings, problem)))
    }

    /// Whether a topic takes records. Brokers do not all know at once of one that was just made.
    async fn topic_state(&mut self, topic: &str) -> Result<TopicState, TermError> {
        let began = Instant::now();
        loop {
            let state = self.publisher.topic(topic).await?;
            if state != TopicState::Missing {
                self.memory.missing_topics.remove(topic);
                return Ok(state);
            }
            if self.memory.missing_topics.contains(topic) {
                return Ok(state);
            }
            if began.elapsed() >= PROPAGATION {
                self.memory.missing_topics.insert(topic.to_owned());
                return Ok(state);
            }
            tokio::time::sleep(PROPAGATION / 50).await;
            self.tick().await?;
        }
    }

    fn is_frozen(&self, (kind, key): (&str, &str)) -> bool {
        !self.frozen.is_empty() && self.frozen.get(kind).is_some_and(|keys| keys.contains(key))
    }

    fn freeze(&mut self, kind: &str, key: &str) {
        self.frozen
            .entry(kind.to_owned())
            .or_default()
            .insert(key.to_owned());
    }

    async fn park(&mut self, parked: Parked) -> Result<(), TermError> {
        self.parked_bytes += parked.bytes();
        self.changes.parked.push(parked);
        self.unsaved = true;
        pass(failpoints::PARKED);
        if self.changes.parked.len() >= PARKED_ROWS || self.parked_bytes >= PARKED_BYTES {
            self.save(self.context.config.lease_ttl).await?;
        }
        Ok(())
    }

    /// Hands one record over, once there is room; one that was refused before goes alone. `false` at shutdown: the
    /// record, and all after it, stay in the outbox.
    async fn hand_over(
        &mut self,
        record: &mut Record<'_>,
        shutdown: &CancellationToken,
    ) -> Result<bool, TermError> {
        let is_suspect = !self.memory.suspects.is_empty() && self.memory.suspects.contains_key(&record.id);
        if !is_suspect {
            return self.send(record, None, shutdown).await;
        }
        let sent = self.send_alone(record, None, shutdown).await?;
        if sent {
            self.memory.suspects.remove(&record.id);
        }
        Ok(sent)
    }

    /// Hands a record over while nothing else is in flight, and waits for its acknowledgement.
    async fn send_alone(
        &mut self,
        record: &mut Record<'_>,
        kept: Option<KeptAs>,
        shutdown: &CancellationToken,
    ) -> Result<bool, TermError> {
        if !self.settle(shutdown).await? {
            return Ok(false);
        }
        self.alone = Some(record.id);
        let sent = self.send(record, kept, shutdown).await? && self.settle(shutdown).await?;
        self.alone = None;
        Ok(sent)
    }

    /// Waits until nothing is in flight. `false` at shutdown.
    async fn settle(&mut self, shutdown: &CancellationToken) -> Result<bool, TermError> {
        self.settle_those(|_| true, shutdown).await
    }

    /// Waits until none of these records is in flight. `false` at shutdown.
    async fn settle_those(
        &mut self,
        those: impl Fn(&InFlight) -> bool,
        shutdown: &CancellationToken,
    ) -> Result<bool, TermError> {
        while self.in_flight.iter().any(|(_, record)| those(record)) {
            if shutdown.is_cancelled() {
                return Ok(false);
            }
            tokio::time::sleep(COLLECT).await;
            self.tick().await?;
        }
        Ok(true)
    }

    async fn send(
        &mut self,
        record: &mut Record<'_>,
        kept: Option<KeptAs>,
        shutdown: &CancellationToken,
    ) -> Result<bool, TermError> {
        let entity = self.versions.entity(record.aggregate_type, record.key);
        let mut span = self.context.traced.then(|| Box::new(send_span(record)));
        loop {
            self.keep_lease().await?;
            if self.hand_to_kafka(record, entity, kept, &mut span, Instant::now())? {
                return Ok(true);
            }
            // Room is made for many: were each place that becomes free taken at once, records would go to the broker one by
            // one, in requests of their own, and stay with that.
            let low = self.in_flight.len() / 2;
            loop {
                if shutdown.is_cancelled() {
                    return Ok(false);
                }
                tokio::time::sleep(COLLECT).await;
                self.tick().await?;
                if self.in_flight.len() <= low {
                    break;
                }
            }
        }
    }

    /// `false`: there is no room. Otherwise the span stays open until the acknowledgement.
    fn hand_to_kafka(
        &mut self,
        record: &mut Record<'_>,
        entity: Entity,
        kept: Option<KeptAs>,
        span: &mut Option<Box<Span>>,
        now: Instant,
    ) -> Result<bool, TermError> {
        let token = self.in_flight.vacant_key();
        if !self.publisher.send(record, token)? {
            return Ok(false);
        }
        if self.in_flight.is_empty() {
            self.moved = now;
        }
        // Under the key that was vacant, and is the token of its delivery.
        self.in_flight.insert(InFlight {
            id: record.id,
            entity,
            occurred_at: record.occurred_at,
            handed: now,
            kept,
            _span: span.take(),
        });
        pass(failpoints::AFTER_HAND_OVER);
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
            let since = *self.fence_since.get_or_insert_with(Instant::now);
            let writers = self.source.open_writers().await?;
            if since.elapsed() >= FENCE_ALARM && self.fence_told.is_none_or(|at| at.elapsed() >= FENCE_ALARM)
            {
                self.fence_told = Some(Instant::now());
                tracing::warn!(
                    outbox = self.context.name,
                    transactions = writers.iter().map(String::as_str).collect::<Vec<_>>().join(" "),
                    seconds = since.elapsed().as_secs(),
                    "a transaction that wrote to the outbox stays open (virtualtransaction of pg_locks; -1/N is a prepared \
                     one): the floor waits for it, and published rows are kept; set idle_in_transaction_session_timeout"
                );
            }
            self.tracker.list(writers);
            pass(failpoints::IN_FENCE);
            if self.tracker.fence_is_passed() {
                self.holes_since = None;
                self.fence_told = None;
            }
        }
        Ok(())
    }

    /// Collects acknowledgements, notices a stall, keeps the lease, saves.
    async fn tick(&mut self) -> Result<(), TermError> {
        let metrics = &self.context.metrics;
        let mut deliveries = self.publisher.collect();
        if !deliveries.acknowledged.is_empty() {
            let (now, wall) = (Instant::now(), Micros::now());
            let (acks, ages) = (metrics.ack.local(), metrics.end_to_end.local());
            for token in &deliveries.acknowledged {
                let Some(record) = self.in_flight.try_remove(*token) else {
                    continue;
                };
                self.acknowledged.push(record.id);
                match record.kept {
                    None => {}
                    Some(KeptAs::Released) => self.changes.released.push(record.id),
                    Some(KeptAs::Skipped) => self.changes.skipped.push(record.id),
                }
                if record.kept.is_some() {
                    pass(failpoints::RELEASED);
                }
                acks.observe(now.duration_since(record.handed).as_secs_f64());
                if let Some(occurred_at) = record.occurred_at {
                    let age = wall.seconds_since(occurred_at);
                    ages.observe(age);
                    self.meter.took(age);
                }
            }
            metrics.published.inc_by(deliveries.acknowledged.len() as u64);
            self.meter.published(deliveries.acknowledged.len() as u64);
            self.moved = now;
            self.unsaved = true;
            self.unsaved_rows += deliveries.acknowledged.len();
        }
        let id = |token| self.in_flight.get(token).map_or(0, |record: &InFlight| record.id);
        if let Some(failure) = deliveries.failure(id) {
            return Err(match (failure, self.alone) {
                (PublishError::Refused { source, .. }, Some(id)) => PublishError::Refused {
                    ids: vec![id],
                    certain: true,
                    source,
                },
                (other, _) => other,
            }
            .into());
        }
        metrics
            .in_flight
            .set(i64::try_from(self.in_flight.len()).unwrap_or(i64::MAX));
        if self.in_flight.is_empty() {
            self.moved = Instant::now();
        } else if self.moved.elapsed() > self.context.config.delivery_timeout {
            return Err(PublishError::Stalled(self.context.config.delivery_timeout).into());
        }
        if self.unsaved && self.saved.elapsed() >= self.save_pause() {
            self.save(self.context.config.lease_ttl).await?;
        }
        self.keep_lease().await
    }

    /// How long after a save the next one is due. Reads wait for a save's way to the disk, so that where rows trickle, the saves
    /// would be what the slowest hundredth of them waits for; and few would be repeated.
    fn save_pause(&self) -> Duration {
        let is_little = self.unsaved_rows < FEW_ROWS && self.changes.is_empty();
        self.context.config.save_interval * if is_little { 4 } else { 1 }
    }

    fn lease_is_short(&self, now: Instant) -> bool {
        let ttl = self.context.config.lease_ttl;
        self.lease.expires.saturating_duration_since(now) < ttl - ttl / 3
    }

    /// Tells the tracker what was acknowledged.
    fn note_published(&mut self) {
        self.tracker.all_published(&mut self.acknowledged);
        self.acknowledged.clear();
    }

    /// Renews the lease once a third of it has gone, and refuses to go on when too little of it is left.
    async fn keep_lease(&mut self) -> Result<(), TermError> {
        let ttl = self.context.config.lease_ttl;
        if self.lease_is_short(Instant::now()) {
            self.save(ttl).await?;
            if self.lease.expires.saturating_duration_since(Instant::now())
                < self.context.config.lease_margin()
            {
                return Err(SourceError::LeaseLost.into());
            }
        }
        Ok(())
    }

    async fn save(&mut self, ttl: Duration) -> Result<(), TermError> {
        pass(failpoints::BEFORE_SAVE);
        // What is parked is done with as soon as the same statement has kept it.
        self.acknowledged
            .extend(self.changes.parked.iter().map(|parked| parked.id));
        self.note_published();
        let progress = self.tracker.progress(SAVED_RANGES);
        let due = self.figures_saved.is_none_or(|at| at.elapsed() >= INSPECT);
        let figures = if due {
            serde_json::to_string(&self.figures).ok()
        } else {
            None
        };
        let wanted = self
            .source
            .save(&mut self.lease, &progress, ttl, figures.as_deref(), &self.changes)
            .await?;
        pass(failpoints::AFTER_SAVE);
        if due {
            self.figures_saved = Some(Instant::now());
        }
        self.wanted = wanted;
        self.changes = QuarantineChanges::default();
        self.parked_bytes = 0;
        self.saved = Instant::now();
        self.unsaved = false;
        self.unsaved_rows = 0;
        let metrics = &self.context.metrics;
        metrics.lease_remaining.set(ttl.as_secs_f64());
        metrics.floor_lag.set(self.tracker.head() - self.tracker.floor());
        Ok(())
    }

    /// Waits until what was read is as safe as it must be: with `synchronous_commit = off` a row is seen before it is on
    /// disk, and may be gone after a crash. A commit of our own takes all that is before it to the disk.
    async fn until_safe(&mut self, position: i64) -> Result<(), TermError> {
        let began = Instant::now();
        let limit = self.context.config.statement_timeout();
        let mut forced = self.context.config.durability != Durability::Flushed;
        while !self.source.is_safe(position).await? {
            if began.elapsed() > limit {
                return Err(SourceError::NotDurable(limit).into());
            }
            if !forced && began.elapsed() > FLUSH_PATIENCE {
                forced = true;
                self.save(self.context.config.lease_ttl).await?;
            }
            self.tick().await?;
            sleep(COLLECT / 4).await;
        }
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
            // The lease is kept however long the pause is.
            let slice = match self.in_flight.is_empty() {
                true => left.min(self.context.config.lease_ttl / 10),
                false => left.min(COLLECT),
            };
            let is_woken = tokio::select! {
                () = sleep(slice) => false,
                () = self.source.db.notified() => true,
                () = shutdown.cancelled() => false,
            };
            self.tick().await?;
            if is_woken {
                return Ok(());
            }
        }
    }

    /// Publishes some records of an entity whose first one an operator wants tried again or skipped.
    async fn work_off(&mut self, shutdown: &CancellationToken) -> Result<(), TermError> {
        let Some(entity) = self.retried.pop_front() else {
            return Ok(());
        };
        // What waits to be saved belongs behind what is kept, and what is published no longer does.
        if !self.changes.is_empty() {
            self.save(self.context.config.lease_ttl).await?;
        }
        let by_version = self.context.config.versions == VersionRule::Contiguous;
        let kept = self.source.kept(&entity, by_version, KEPT_ROWS).await?;
        if kept.is_empty() {
            tracing::info!(outbox = self.context.name, "an entity is out of quarantine");
            if let Some(keys) = self.frozen.get_mut(&entity.0) {
                keys.remove(&entity.1);
            }
            self.frozen.retain(|_, keys| !keys.is_empty());
            let entity = self.versions.entity(&entity.0, &entity.1);
            self.versions.forget(entity);
            return Ok(());
        }
        for (position, row) in kept.iter().enumerate() {
            if !self.publish_kept(&entity, row, position == 0, shutdown).await? {
                self.settle(shutdown).await?;
                return Ok(());
            }
        }
        if self.settle(shutdown).await? {
            self.retried.push_back(entity);
        }
        Ok(())
    }

    /// Publishes a record of the quarantine, or the marker for it. `false`: it is refused still, or this is a shutdown.
    async fn publish_kept(
        &mut self,
        entity: &(String, String),
        row: &Kept,
        is_first: bool,
        shutdown: &CancellationToken,
    ) -> Result<bool, TermError> {
        let skip = match &row.decision {
            Some(Decision::Skip { reason }) => Some(marker_headers(&row.headers, reason)),
            _ => None,
        };
        // Not a tombstone: what the key stands for must not go with the row.
        let payload = if skip.is_some() {
            Some(&[][..])
        } else {
            row.payload.as_deref()
        };
        let headers = skip.as_ref().unwrap_or(&row.headers);
        let mut record = Record::kept(
            row.id,
            (&entity.0, &entity.1),
            &row.topic,
            row.version,
            headers,
            payload,
        );
        if let Some((_, problem)) = self.refusal(&record).await? {
            if skip.is_some() {
                tracing::warn!(
                    outbox = self.context.name,
                    outbox.id = row.id,
                    problem,
                    "a row is skipped without a marker: there is no topic to put it into"
                );
                self.changes.skipped.push(row.id);
                self.unsaved = true;
                return Ok(true);
            }
            self.source.refused_again(entity, row.id, &problem).await?;
            return Ok(false);
        }
        let kept = Some(match skip {
            Some(_) => KeptAs::Skipped,
            None => KeptAs::Released,
        });
        let is_suspect = self.memory.suspects.contains_key(&row.id);
        if !is_first && !is_suspect {
            return self.send(&mut record, kept, shutdown).await;
        }
        let sent = self.send_alone(&mut record, kept, shutdown).await?;
        if sent {
            self.memory.suspects.remove(&row.id);
        }
        Ok(sent)
    }

    /// Checks the sequence, and measures backlog and age. While `idle`, ids that nobody committed are looked into too.
    async fn inspect(&mut self, idle: bool) -> Result<(), TermError> {
        if self.inspected.is_some_and(|at| at.elapsed() < INSPECT) {
            return Ok(());
        }
        self.inspected = Some(Instant::now());
        self.note_published();
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
            Some(0.0)
        } else {
            self.source
                .oldest_above(self.tracker.first_open() - 1, &self.context.config.layout)
                .await?
        };
        let quarantine = Quarantine {
            db: &self.source.db,
            table: &self.source.table,
            name: &self.context.name,
            by_version: false,
        };
        let (keys, rows) = if self.frozen.is_empty() && self.figures.quarantined_keys == 0 {
            (0, 0)
        } else {
            quarantine.counts().await?
        };
        self.notice_decisions().await?;
        if self
            .joined
            .is_none_or(|at| at.elapsed() >= self.context.config.heartbeat())
        {
            self.joined = Some(Instant::now());
            let leads = self.context.leadership.leads();
            self.members = self
                .source
                .join(&self.context.owner, leads, self.context.config.lease_ttl)
                .await?;
        }
        let metrics = &self.context.metrics;
        metrics.backlog.set(backlog);
        metrics.oldest_age.set(age.unwrap_or_default());
        metrics.quarantined_keys.set(keys);
        metrics.quarantined_rows.set(rows);
        let measured = self.meter.measure();
        self.figures = Figures {
            head: self.tracker.head(),
            holes: self.tracker.holes().id_count(),
            backlog_rows: backlog,
            oldest_age_seconds: age,
            in_flight: self.in_flight.len(),
            rate_rows_per_second: measured.rate,
            latency_p50_seconds: measured.p50,
            latency_p99_seconds: measured.p99,
            published_total: measured.total,
            quarantined_keys: keys,
            quarantined_rows: rows,
        };
        let lead = Lead {
            leader: Some(self.context.owner.clone()),
            epoch: Some(self.lease.epoch),
            lease_seconds: Some(
                self.lease
                    .expires
                    .saturating_duration_since(Instant::now())
                    .as_secs_f64(),
            ),
            members: self.members.clone(),
            floor: Some(self.tracker.floor()),
            removed_to: Some(removed_to(&self.source.db, &self.source.table).await?),
            seen_seconds: Some(0.0),
        };
        self.context.status.show(lead, Some(self.figures.clone()));
        Ok(())
    }

    /// Whether another replica is to lead from now on: because somebody asked, or because it leads fewer outboxes.
    async fn hands_over(&mut self) -> Result<bool, TermError> {
        let me = &self.context.owner;
        let next = match self.wanted.take() {
            Some(wanted) => {
                // Who asks may know of one that came since they were listed.
                self.members = self.source.members(self.context.config.lease_ttl).await?;
                let named = self
                    .members
                    .iter()
                    .find(|member| member.instance == wanted && member.instance != *me);
                let next = match named {
                    None if wanted.is_empty() => fewest(me, &self.members),
                    named => named,
                };
                let Some(next) = next else {
                    tracing::warn!(
                        outbox = self.context.name,
                        wanted,
                        "not handed over: there is no such other replica"
                    );
                    self.source.want(&self.lease, None).await?;
                    return Ok(false);
                };
                next.instance.clone()
            }
            None => {
                let heartbeat = self.context.config.heartbeat();
                match self
                    .context
                    .leadership
                    .who_should_lead(me, &self.members, heartbeat)
                {
                    Some(next) => next,
                    None => return Ok(false),
                }
            }
        };
        tracing::info!(outbox = self.context.name, to = next, "handing over");
        self.source.want(&self.lease, Some(&next)).await?;
        Ok(true)
    }

    /// Ends the term: what is in flight may still be acknowledged, what was is saved, the lease is given up.
    pub(crate) async fn end(mut self, ended: Result<Ended, TermError>) -> Result<Ended, TermError> {
        let source_failed = matches!(ended, Err(TermError::Source(_)));
        if !source_failed && !matches!(ended, Err(TermError::Publish(_))) {
            self.drain().await;
        }
        self.ahead = None;
        let unsaved = |error: &SourceError| {
            tracing::warn!(
                error = %telemetry::chain(error),
                "progress was not saved at the end of a term: some rows will be published again"
            );
        };
        let saved = match source_failed {
            true => false,
            false => match self.save(self.context.config.lease_ttl).await {
                Ok(()) => true,
                Err(TermError::Source(error)) => {
                    unsaved(&error);
                    false
                }
                Err(_) => false,
            },
        };
        let Self {
            context,
            source,
            publisher,
            tracker,
            mut lease,
            ..
        } = self;
        // Nothing is on its way any more when the next leader begins, which then need not wait for the lease to expire.
        publisher.abandon().await;
        if saved {
            let progress = tracker.progress(SAVED_RANGES);
            let nothing = QuarantineChanges::default();
            if let Err(error) = source
                .save(&mut lease, &progress, Duration::ZERO, None, &nothing)
                .await
            {
                unsaved(&error);
            }
            if matches!(ended, Ok(Ended::Shutdown))
                && let Err(error) = source.leave(&context.owner).await
            {
                tracing::debug!(outbox = context.name, error = %telemetry::chain(&error), "left without a word");
            }
        }
        ended
    }

    async fn drain(&mut self) {
        let deadline = Instant::now() + DRAIN.min(self.context.config.lease_ttl);
        while !self.in_flight.is_empty() && Instant::now() < deadline {
            tokio::time::sleep(COLLECT).await;
            if let Err(error) = self.tick().await {
                tracing::warn!(
                    outbox = self.context.name,
                    error = %telemetry::chain(&error),
                    "records in flight were not acknowledged at the end of a term: they will be published again"
                );
                return;
            }
        }
    }
}

/// Sleeps, also for less than the millisecond in which the runtime's timers count.
async fn sleep(duration: Duration) {
    const COARSE: Duration = Duration::from_millis(2);
    if duration >= COARSE {
        return tokio::time::sleep(duration).await;
    }
    // It never fails; were it cancelled at the runtime's end, nobody would be here any more.
    let _ = tokio::task::spawn_blocking(move || std::thread::sleep(duration)).await;
}

/// The span of one record on its way, a child of the command that caused the event. The record's own headers keep the
/// command's context: were they changed to this span, a repeat would not be the same bytes.
fn send_span(record: &Record<'_>) -> Span {
    let text = |name| record.header(name).unwrap_or_default();
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
        messaging.message.id = text(header::CE_ID),
        event.r#type = text(header::CE_TYPE),
        event.version = record.version,
    );
    telemetry::set_parent(
        &span,
        record.header(header::TRACEPARENT),
        record.header(header::TRACESTATE),
    );
    span
}
