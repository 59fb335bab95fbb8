//! A worker: takes one batch at a time and brings it to an end.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{TimeDelta, Utc};
use diesel::result::Error as DieselError;
use diesel_async::pooled_connection::deadpool::{Object, Pool};
use diesel_async::{
    AnsiTransactionManager, AsyncPgConnection, SimpleAsyncConnection as _, TransactionManager as _,
};
use futures::FutureExt as _;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;
use uuid::Uuid;

use crate::config::{Config, Start};
use crate::handler::{self, BoxError, Handler, HandlerError, Incoming};
use crate::inbox;
use crate::intake::{Claim, End, Item, Settled};
use crate::lane::Lane;
use crate::marks::{self, Candidate, Generation, Key, Known, Marks, Plan, Why};
use crate::metrics::Metrics;
use crate::parked::{self, Body, NewParked};
use crate::record::{Decoded, RawRecord, Record, RecordError};
use crate::status::Status;
use crate::trace;

/// What all workers of a consumer share.
pub(crate) struct Shared<H> {
    pub(crate) config: Config,
    pub(crate) lane: Lane,
    pub(crate) pool: Pool<AsyncPgConnection>,
    pub(crate) handler: H,
    pub(crate) metrics: Metrics,
    pub(crate) status: Status,
    /// Asks workers to finish the attempt under way and to begin no other.
    pub(crate) stop: CancellationToken,
}

/// A batch that has come to an end.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) worker: usize,
    pub(crate) items: Vec<Settled>,
}

/// Why a record can never be handled as things stand.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the record is no event")]
    Unreadable(#[source] RecordError),
    #[error("it happened {0} seconds from now")]
    Future(i64),
    #[error("what the record says cannot be read")]
    Payload(#[source] BoxError),
    #[error("the handler refused the record")]
    Handler(#[source] BoxError),
}

impl Refusal {
    /// As it stands in the table and in metrics.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Unreadable(RecordError::TooLarge { .. }) => "too_large",
            Self::Unreadable(_) => "unreadable",
            Self::Future(_) => "future",
            Self::Payload(_) => "payload",
            Self::Handler(_) => "refused",
        }
    }
}

/// A record as far as it could be read.
pub(crate) enum Content<E> {
    Event(Record, E),
    /// Refused for what it says.
    Record(Record),
    Raw(Box<RawRecord>),
}

impl<E> Content<E> {
    /// Reads what was decoded, and says what is wrong with it if anything is.
    pub(crate) fn read<H: Handler<Event = E>>(
        decoded: Decoded,
        handler: &H,
        max_ahead: Duration,
    ) -> (Self, Option<Refusal>) {
        let record = match decoded {
            Decoded::Not(raw, error) => return (Self::Raw(raw), Some(Refusal::Unreadable(error))),
            Decoded::Record(record) => record,
        };
        let ahead = record.envelope.occurred_at - Utc::now();
        if ahead > TimeDelta::from_std(max_ahead).unwrap_or(TimeDelta::MAX) {
            return (Self::Record(record), Some(Refusal::Future(ahead.num_seconds())));
        }
        // One record that makes the reader panic must not end the process, again and again.
        let read = catch_unwind(AssertUnwindSafe(|| handler.read(&record)));
        match read.unwrap_or_else(|_| Err("the reader panicked".into())) {
            Ok(event) => (Self::Event(record, event), None),
            Err(error) => (Self::Record(record), Some(Refusal::Payload(error))),
        }
    }

    pub(crate) fn record(&self) -> Option<&Record> {
        match self {
            Self::Event(record, _) | Self::Record(record) => Some(record),
            Self::Raw(_) => None,
        }
    }

    pub(crate) fn body(&self) -> Body<'_> {
        match self {
            Self::Event(record, _) | Self::Record(record) => Body::Record(record),
            Self::Raw(raw) => Body::Raw(raw),
        }
    }

    pub(crate) fn incoming(&self) -> Option<Incoming<'_, E>> {
        match self {
            Self::Event(record, event) => Some(Incoming { record, event }),
            Self::Record(_) | Self::Raw(_) => None,
        }
    }

    fn topic(&self) -> &str {
        match self {
            Self::Event(record, _) | Self::Record(record) => &record.topic,
            Self::Raw(raw) => &raw.topic,
        }
    }

    fn entity(&self) -> Option<&str> {
        match self {
            Self::Event(record, _) | Self::Record(record) => Some(&record.envelope.entity_id),
            Self::Raw(raw) => raw.entity(),
        }
    }
}

/// Why an attempt did not commit.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the database did not do it")]
    Database(#[source] DieselError),
    #[error("no database connection")]
    Connection(#[source] BoxError),
    #[error("the deadline of {0:?} passed")]
    Deadline(Duration),
    #[error("the handler is waiting for something")]
    Waiting(#[source] BoxError),
    #[error("another instance moved a mark")]
    Conflict,
    /// Nothing was done: the marks have to be read.
    #[error("a mark is not where it was presumed to be")]
    Presumption,
    /// The record at this position can never be handled.
    #[error("a record was refused")]
    Refused(usize, #[source] BoxError),
    /// One of the records can never be handled, it is not known which.
    #[error("a record was refused")]
    SomeRefused(#[source] BoxError),
}

/// Brings batches to their end until `work` is closed.
pub(crate) async fn run<H: Handler>(
    worker: usize,
    shared: Arc<Shared<H>>,
    mut work: mpsc::Receiver<Vec<Item>>,
    finished: mpsc::Sender<Finished>,
) {
    let memory = Memory::default();
    while let Some(batch) = work.recv().await {
        let batch = Batch::new(worker, &shared, &memory, batch).run().await;
        if finished.send(batch).await.is_err() {
            return;
        }
    }
}

/// What a worker remembers of marks, so that it need not read them. All of it may be wrong: the database decides.
#[derive(Debug, Default)]
struct Memory(Mutex<Remembered>);

#[derive(Debug, Default)]
struct Remembered {
    /// Marks were where they were presumed to be. Not so at first, since what was done last before a crash comes again.
    trusts: bool,
    /// Entities found parked, whose later records come all the time.
    parked: HashSet<(String, String)>,
}

impl Memory {
    /// Forgotten all at once beyond so many: that costs a few reads.
    const MOST_PARKED: usize = 50_000;

    fn lock(&self) -> MutexGuard<'_, Remembered> {
        // Nothing in here panics between two changes that belong together.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The marks that are taken for granted, and whose have to be read; nothing when all have to be.
    fn presume<'e>(&self, records: &[Candidate<'e>], config: &Config) -> Option<(Marks<'e>, Vec<Key<'e>>)> {
        let memory = self.lock();
        if !memory.trusts {
            return None;
        }
        let is_parked = |(topic, entity): &Key<'_>| {
            !memory.parked.is_empty()
                && memory
                    .parked
                    .contains(&((*topic).to_owned(), (*entity).to_owned()))
        };
        Some(marks::presume(records, is_parked, |topic| config.start(topic)))
    }

    /// One was not where it was presumed to be.
    fn was_wrong(&self) {
        self.lock().trusts = false;
    }

    /// After a commit: `plan` is what was done.
    fn learn(&self, plan: &Plan<'_>) {
        let mut memory = self.lock();
        // Repeats come in rows, and each would have been presumed wrongly.
        memory.trusts = plan.repeats.is_empty();
        for ((topic, entity), _) in plan.advances.iter().filter(|(_, advance)| advance.to.parked) {
            if memory.parked.len() >= Self::MOST_PARKED {
                memory.parked.clear();
            }
            memory.parked.insert(((*topic).to_owned(), (*entity).to_owned()));
        }
    }
}

/// A record of a batch.
struct Entry<E> {
    claim: Arc<Claim>,
    offset: i64,
    size: usize,
    content: Content<E>,
    refusal: Option<Refusal>,
    end: End,
}

/// A batch on its way.
struct Batch<'a, H: Handler> {
    worker: usize,
    shared: &'a Shared<H>,
    memory: &'a Memory,
    entries: Vec<Entry<H::Event>>,
    pause: Duration,
    failures: u32,
}

impl<'a, H: Handler> Batch<'a, H> {
    fn new(worker: usize, shared: &'a Shared<H>, memory: &'a Memory, items: Vec<Item>) -> Self {
        let read = |item: Item| {
            let (content, refusal) = Content::read(item.content, &shared.handler, shared.config.max_ahead);
            Entry {
                claim: item.claim,
                offset: item.offset,
                size: item.size,
                content,
                refusal,
                end: End::Left,
            }
        };
        Self {
            worker,
            shared,
            memory,
            entries: items.into_iter().map(read).collect(),
            pause: shared.config.backoff.0,
            failures: 0,
        }
    }

    async fn run(mut self) -> Finished {
        let span = {
            let records: Vec<&Record> = self.entries.iter().filter_map(|e| e.content.record()).collect();
            trace::process_span(&self.shared.config.group, &records)
        };
        let mut groups = VecDeque::from([(0..self.entries.len()).collect::<Vec<_>>()]);
        while let Some(group) = groups.pop_front() {
            for rest in self.step(group).instrument(span.clone()).await.into_iter().rev() {
                groups.push_front(rest);
            }
            if self.failures > 0 && self.shared.stop.is_cancelled() {
                break;
            }
        }
        if self.failures > 0 {
            self.shared.status.recovered(self.worker);
        }
        self.finish()
    }

    /// Attempts the records of a group together; returns the groups that are to be tried next in its place, in their order.
    async fn step(&mut self, mut group: Vec<usize>) -> Vec<Vec<usize>> {
        // Those of partitions that were lost meanwhile are let go of.
        group.retain(|position| self.entries[*position].claim.stands());
        if group.is_empty() {
            return Vec::new();
        }
        match self.attempt(&group).await {
            Ok(()) => {
                for position in group {
                    self.entries[position].end = End::Done;
                }
                if std::mem::take(&mut self.failures) > 0 {
                    self.shared.status.recovered(self.worker);
                    self.pause = self.shared.config.backoff.0;
                    tracing::info!(consumer.worker = self.worker, "the batch went through");
                }
                Vec::new()
            }
            Err(Failure::Conflict) => {
                self.shared.metrics.error("conflict");
                self.shared.metrics.retries.inc();
                vec![group]
            }
            Err(Failure::Presumption) => {
                self.memory.was_wrong();
                vec![group]
            }
            Err(Failure::Refused(position, source)) if position < group.len() => {
                self.refuse(group[position], source);
                vec![group]
            }
            Err(Failure::Refused(_, source) | Failure::SomeRefused(source)) => match group[..] {
                [position] if self.entries[position].refusal.is_none() => {
                    self.refuse(position, source);
                    vec![group]
                }
                [_] => {
                    // Not even parking it works, so it has to wait.
                    self.wait_out(&Failure::SomeRefused(source)).await;
                    vec![group]
                }
                _ => {
                    self.shared.metrics.retries.inc();
                    let second = group.split_off(group.len() / 2);
                    vec![group, second]
                }
            },
            Err(failure) => {
                self.wait_out(&failure).await;
                vec![group]
            }
        }
    }

    /// From now on it is to be parked.
    fn refuse(&mut self, position: usize, source: BoxError) {
        self.shared.metrics.error("refused");
        self.shared.metrics.retries.inc();
        self.entries[position].refusal = Some(Refusal::Handler(source));
    }

    /// Sits out a failure that is not the records' fault.
    async fn wait_out(&mut self, failure: &Failure) {
        let kind = match failure {
            Failure::Deadline(_) => "timeout",
            Failure::Waiting(_) => "handler",
            _ => "database",
        };
        self.shared.metrics.error(kind);
        self.shared.metrics.retries.inc();
        let reason = handler::chain(failure);
        if self.failures == 0 {
            tracing::warn!(
                consumer.worker = self.worker,
                error.kind = kind,
                error.message = reason,
                "a batch cannot be applied for now; it is tried again until it can"
            );
        }
        self.failures = self.failures.saturating_add(1);
        self.shared.status.stalled(self.worker, reason);
        // Whether stopping or pausing: the caller looks.
        let _ = timeout(self.pause, self.shared.stop.cancelled()).await;
        self.pause = (self.pause * 2).min(self.shared.config.backoff.1);
    }

    async fn attempt(&self, group: &[usize]) -> Result<(), Failure> {
        let entries: Vec<&Entry<H::Event>> = group.iter().map(|position| &self.entries[*position]).collect();
        let deadline = self.shared.config.transaction_timeout;
        let mut connection = timeout(deadline, self.shared.pool.get())
            .await
            .map_err(|_| Failure::Deadline(deadline))?
            .map_err(|error| Failure::Connection(error.into()))?;
        let attempt = AssertUnwindSafe(self.transact(&mut connection, &entries)).catch_unwind();
        let result = match timeout(deadline, attempt).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => {
                drop(Object::take(connection));
                return Err(Failure::SomeRefused("the handler panicked".into()));
            }
            Err(_) => Err(Failure::Deadline(deadline)),
        };
        if matches!(result, Err(Failure::Database(_) | Failure::Deadline(_))) {
            // It may hold an open transaction, and locks with it: close it rather than give it back.
            drop(Object::take(connection));
        }
        result
    }

    /// Marks, effects and parked records in one transaction.
    async fn transact(
        &self,
        connection: &mut AsyncPgConnection,
        entries: &[&Entry<H::Event>],
    ) -> Result<(), Failure> {
        let begun = Instant::now();
        let begin = self.shared.lane.begin(&self.shared.config);
        AnsiTransactionManager::begin_transaction_sql(connection, &begin)
            .await
            .map_err(Failure::Database)?;
        if self.failures > 0 {
            self.speak_english(connection).await.map_err(Failure::Database)?;
        }
        let applied = match self.apply(connection, entries).await {
            Ok(applied) => applied,
            Err(failure) => {
                // A connection that cannot roll back is broken, and the pool discards it.
                let _ = AnsiTransactionManager::rollback_transaction(connection).await;
                return Err(failure);
            }
        };
        AnsiTransactionManager::commit_transaction(connection)
            .await
            .map_err(Failure::Database)?;
        self.memory.learn(&applied.plan);
        self.committed(applied, entries, begun.elapsed());
        Ok(())
    }

    /// What failed may have been refused in another language than the one that is understood.
    async fn speak_english(&self, connection: &mut AsyncPgConnection) -> Result<(), DieselError> {
        if !handler::speak_english(connection).await? && self.failures == 1 {
            tracing::warn!(
                consumer.worker = self.worker,
                "the database's messages may not be English, and this role may not set lc_messages: should a value not fit, its record \
                 is waited for instead of parked"
            );
        }
        Ok(())
    }

    async fn apply<'e>(
        &self,
        connection: &mut AsyncPgConnection,
        entries: &[&'e Entry<H::Event>],
    ) -> Result<Applied<'e, H>, Failure> {
        let Shared { config, lane, .. } = self.shared;
        let bodies: Vec<Body<'_>> = entries.iter().map(|entry| entry.content.body()).collect();
        let candidate = |entry: &&'e Entry<H::Event>| Candidate {
            topic: entry.content.topic(),
            entity: entry.content.entity(),
            event: entry
                .content
                .record()
                .map(|record| (record.envelope.version, record.envelope.event_id)),
            refused: entry.refusal.is_some(),
            known: Known::Nothing,
        };
        let mut candidates: Vec<Candidate<'e>> = entries.iter().map(candidate).collect();
        let presumed = self.memory.presume(&candidates, config);
        let is_presumed = presumed.is_some();
        let (mut marks, unknown) = presumed.unwrap_or_else(|| {
            let keys = candidates
                .iter()
                .filter_map(|candidate| Some((candidate.topic, candidate.entity?)));
            (Marks::default(), keys.collect())
        });
        let mut generation = match lane.generation() {
            Generation::Of(generation) => Some(generation),
            Generation::Live => None,
        };
        if !unknown.is_empty() || candidates.iter().any(|candidate| candidate.entity.is_none()) {
            let read = marks::read(connection, &config.group, lane.generation(), unknown)
                .await
                .map_err(Failure::Database)?;
            generation = Some(read.generation);
            marks.extend(read.marks);
        }
        if let Some(generation) = generation {
            let before = parked::look_up(connection, &config.group, generation, &bodies, lane.is_rebuild())
                .await
                .map_err(Failure::Database)?;
            for (candidate, body) in candidates.iter_mut().zip(&bodies) {
                candidate.known = before.of(*body);
            }
        }
        let plan = marks::plan(&candidates, &marks, |topic| config.start(topic));
        if !plan.advances.is_empty() {
            // Before the handler: whoever has the same records waits here, and has done nothing yet.
            let moved = marks::advance(connection, &config.group, lane.generation(), &plan.advances)
                .await
                .map_err(permanent_or_not)?;
            generation = match moved {
                Some(generation) => Some(generation),
                None if is_presumed => return Err(Failure::Presumption),
                None => return Err(Failure::Conflict),
            };
        }
        if let Some(generation) = generation {
            self.note_seen(connection, entries, &plan, generation).await?;
        }
        let effect = self.effect(connection, entries, &plan).await?;
        let parked = match generation {
            Some(generation) => self.park(connection, entries, &plan, generation).await?,
            // Nothing was read, and no mark was moved: there was nothing to do.
            None => Vec::new(),
        };
        if effect.is_some() {
            // A handler that swallowed a database error left the transaction aborted, and PostgreSQL answers COMMIT of such
            // a transaction with a rollback and no error. This statement fails then.
            connection
                .batch_execute("SELECT 1")
                .await
                .map_err(Failure::Database)?;
        }
        Ok(Applied { plan, effect, parked })
    }

    /// Notes the ids of events that marks do not tell from others.
    async fn note_seen(
        &self,
        connection: &mut AsyncPgConnection,
        entries: &[&Entry<H::Event>],
        plan: &Plan<'_>,
        generation: i32,
    ) -> Result<(), Failure> {
        let counted = plan.fresh.iter().chain(&plan.discarded);
        let seen: Vec<(&str, Uuid)> = counted
            .filter_map(|position| entries[*position].content.record())
            .filter(|record| record.envelope.version == 0)
            .map(|record| (record.topic.as_ref(), record.envelope.event_id))
            .collect();
        if seen.is_empty() {
            return Ok(());
        }
        let noted = inbox::insert(connection, &self.shared.config.group, generation, &seen)
            .await
            .map_err(permanent_or_not)?;
        if noted { Ok(()) } else { Err(Failure::Conflict) }
    }

    /// That of the records that are fresh, if any is.
    async fn effect(
        &self,
        connection: &mut AsyncPgConnection,
        entries: &[&Entry<H::Event>],
        plan: &Plan<'_>,
    ) -> Result<Option<H::Effect>, Failure> {
        if plan.fresh.is_empty() {
            return Ok(None);
        }
        let fresh = incoming(entries, plan);
        let effect = self.shared.handler.apply(connection, &fresh).await;
        effect.map(Some).map_err(|error| match error {
            HandlerError::Database(error) => permanent_or_not(error),
            HandlerError::Transient(error) => Failure::Waiting(error),
            HandlerError::Permanent { position, source } => match plan.fresh.get(position) {
                Some(position) => Failure::Refused(*position, source),
                None => Failure::SomeRefused(source),
            },
        })
    }

    /// Parks what is to be parked; returns the records for which that is new, with the kind of their error.
    async fn park(
        &self,
        connection: &mut AsyncPgConnection,
        entries: &[&Entry<H::Event>],
        plan: &Plan<'_>,
        generation: i32,
    ) -> Result<Vec<(usize, &'static str, String)>, Failure> {
        let Shared { config, lane, .. } = self.shared;
        let new: Vec<NewParked<'_>> = plan
            .parks
            .iter()
            .map(|park| {
                let entry = &entries[park.position];
                let (error_kind, error) = match (&entry.refusal, park.why) {
                    (Some(refusal), _) => (refusal.kind(), handler::chain(refusal)),
                    (None, Why::Gap { expected }) => ("gap", gap(entry.content.record(), expected)),
                    (None, Why::Behind | Why::Refused) => {
                        ("behind", "an earlier record of its entity is parked".to_owned())
                    }
                };
                NewParked {
                    body: entry.content.body(),
                    error_kind,
                    error,
                }
            })
            .collect();
        if new.is_empty() {
            return Ok(Vec::new());
        }
        let inserted = parked::insert(connection, &config.group, generation, &new)
            .await
            .map_err(permanent_or_not)?;
        if !lane.is_rebuild() {
            let letters: Vec<&NewParked<'_>> = inserted.iter().map(|position| &new[*position]).collect();
            parked::write_dead_letters(connection, &config.group, &letters, 1)
                .await
                .map_err(permanent_or_not)?;
        }
        let told = inserted.into_iter().map(|position| {
            let NewParked {
                error_kind, error, ..
            } = &new[position];
            (plan.parks[position].position, *error_kind, error.clone())
        });
        Ok(told.collect())
    }

    /// Says what has just committed, to everyone who wants to know.
    fn committed(&self, applied: Applied<'_, H>, entries: &[&Entry<H::Event>], took: Duration) {
        let Applied { plan, effect, parked } = applied;
        let Shared { metrics, lane, .. } = self.shared;
        for position in &plan.ghosts {
            metrics.ghosts.inc();
            if let Some(record) = entries[*position].content.record() {
                tracing::error!(
                    event.id = %record.envelope.event_id,
                    event.r#type = record.envelope.event_type,
                    entity.id = record.envelope.entity_id,
                    entity.version = record.envelope.version,
                    messaging.destination.name = &*record.topic,
                    messaging.kafka.offset = record.offset,
                    trace_id = trace::trace_id(record),
                    "this version of the entity was seen in another event: its history was rewritten upstream"
                );
            }
        }
        let fresh = incoming(entries, &plan);
        let now = Utc::now();
        let mut ages: BTreeMap<&str, prometheus::Histogram> = BTreeMap::new();
        for Incoming { record, .. } in &fresh {
            let age = (now - record.envelope.occurred_at).as_seconds_f64().max(0.0);
            let of_topic = ages
                .entry(&*record.topic)
                .or_insert_with(|| metrics.end_to_end_seconds.with_label_values(&[&*record.topic]));
            of_topic.observe(age);
            tracing::debug!(
                event.id = %record.envelope.event_id,
                event.r#type = record.envelope.event_type,
                entity.id = record.envelope.entity_id,
                entity.version = record.envelope.version,
                trace_id = trace::trace_id(record),
                "event applied"
            );
        }
        for (position, kind, error) in &parked {
            metrics.parked.with_label_values(&[kind]).inc();
            if !lane.is_rebuild() {
                metrics.dead_letters.inc();
            }
            tell_parked(&entries[*position].content, kind, error);
        }
        let done = parked.iter().map(|(position, ..)| position);
        let mut outcomes: BTreeMap<(&str, &str), u64> = BTreeMap::new();
        for (outcome, positions) in [
            ("applied", plan.fresh.iter().collect::<Vec<_>>()),
            ("repeat", plan.repeats.iter().collect()),
            ("discarded", plan.discarded.iter().collect()),
            ("parked", done.collect()),
        ] {
            for position in positions {
                let topic = entries[*position].content.topic();
                *outcomes.entry((topic, outcome)).or_default() += 1;
            }
        }
        for ((topic, outcome), count) in outcomes {
            metrics
                .messages
                .with_label_values(&[topic, outcome])
                .inc_by(count);
        }
        metrics.batch_records.observe(entries.len() as f64);
        metrics.batch_seconds.observe(took.as_secs_f64());
        if let Some(effect) = effect {
            self.shared.handler.committed(&fresh, effect);
        }
    }

    fn finish(self) -> Finished {
        let settled = |entry: Entry<H::Event>| Settled {
            claim: entry.claim,
            offset: entry.offset,
            size: entry.size,
            end: entry.end,
        };
        Finished {
            worker: self.worker,
            items: self.entries.into_iter().map(settled).collect(),
        }
    }
}

/// What an attempt did, as soon as it has committed.
struct Applied<'e, H: Handler> {
    plan: Plan<'e>,
    effect: Option<H::Effect>,
    parked: Vec<(usize, &'static str, String)>,
}

/// The records to apply.
fn incoming<'e, E>(entries: &[&'e Entry<E>], plan: &Plan<'_>) -> Vec<Incoming<'e, E>> {
    // Only what was read is fresh.
    let fresh = plan.fresh.iter();
    fresh
        .filter_map(|position| entries[*position].content.incoming())
        .collect()
}

fn permanent_or_not(error: DieselError) -> Failure {
    if handler::is_permanent(&error) {
        Failure::SomeRefused(error.into())
    } else {
        Failure::Database(error)
    }
}

fn gap(record: Option<&Record>, expected: i64) -> String {
    let found = record.map_or(0, |record| record.envelope.version);
    format!("version {found} of the entity came where {expected} was expected")
}

fn tell_parked<E>(content: &Content<E>, kind: &str, error: &str) {
    let (topic, partition, offset, _) = content.body().place();
    let record = content.record();
    macro_rules! tell {
        ($level:ident, $message:literal) => {
            tracing::$level!(
                messaging.destination.name = topic,
                messaging.destination.partition.id = partition,
                messaging.kafka.offset = offset,
                event.id = record.map(|record| record.envelope.event_id.to_string()),
                event.r#type = record.map(|record| record.envelope.event_type.as_str()),
                entity.id = content.entity(),
                trace_id = record.map(trace::trace_id),
                error.kind = kind,
                error.message = error,
                $message
            )
        };
    }
    if kind == "behind" {
        tell!(info, "a record is parked behind an earlier one of its entity");
    } else {
        tell!(
            error,
            "a record cannot be handled: it is parked with its entity, the others go on"
        );
    }
}

impl Config {
    /// What to take for the first version of an entity in this topic.
    pub(crate) fn start(&self, topic: &str) -> Start {
        let known = self.topics.iter().find(|known| known.name == topic);
        known.map_or(Start::Beginning, |known| known.start)
    }
}
