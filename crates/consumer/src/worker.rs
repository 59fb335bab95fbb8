//! A worker: takes one batch at a time and brings it to an end.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use diesel::result::Error as DieselError;
use diesel_async::pooled_connection::deadpool::{Object, Pool};
use diesel_async::{
    AnsiTransactionManager, AsyncPgConnection, SimpleAsyncConnection as _, TransactionManager as _,
};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::config::{Config, Start};
use crate::handler::{self, BoxError, Handler, HandlerError};
use crate::intake::{Claim, End, Item, Settled};
use crate::marks;
use crate::metrics::Metrics;
use crate::record::{Record, RecordError};
use crate::status::Status;
use crate::trace;

/// What all workers of a consumer share.
pub(crate) struct Shared<H> {
    pub(crate) config: Config,
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
    pub(crate) halts: Vec<Halt>,
}

/// A record that stops its partition.
#[derive(Debug)]
pub(crate) struct Halt {
    pub(crate) claim: Arc<Claim>,
    pub(crate) offset: i64,
    pub(crate) refusal: Refusal,
    /// Event id, type, entity id and trace id, where known.
    pub(crate) event: Option<EventName>,
}

/// What a log line says about an event.
#[derive(Debug)]
pub(crate) struct EventName {
    pub(crate) id: String,
    pub(crate) kind: String,
    pub(crate) entity: String,
    pub(crate) trace_id: String,
}

/// Why a record can never be handled as things stand.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the record cannot be read")]
    Undecodable(#[from] RecordError),
    #[error("version {found} of the entity came where {expected} was expected")]
    Gap { expected: i64, found: i64 },
    #[error("the handler refused the record")]
    Handler(#[source] BoxError),
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
    /// The record at this position can never be handled.
    #[error("a record was refused")]
    Refused(usize, #[source] BoxError),
    /// One of the records can never be handled, it is not known which.
    #[error("a record was refused")]
    SomeRefused(#[source] BoxError),
}

/// Positions of a batch that committed, by what became of them.
#[derive(Debug, Default)]
struct Committed {
    done: Vec<usize>,
    gaps: Vec<marks::Gap>,
}

/// Brings batches to their end until `work` is closed.
pub(crate) async fn run<H: Handler>(
    worker: usize,
    shared: Arc<Shared<H>>,
    mut work: mpsc::Receiver<Vec<Item>>,
    finished: mpsc::Sender<Finished>,
) {
    while let Some(batch) = work.recv().await {
        let batch = Batch::new(worker, &shared, batch).run().await;
        if finished.send(batch).await.is_err() {
            return;
        }
    }
}

/// A batch on its way.
struct Batch<'a, H> {
    worker: usize,
    shared: &'a Shared<H>,
    records: Vec<(Arc<Claim>, usize, Option<Record>)>,
    offsets: Vec<i64>,
    ends: Vec<End>,
    halts: Vec<Halt>,
    pause: Duration,
    failures: u32,
}

impl<'a, H: Handler> Batch<'a, H> {
    fn new(worker: usize, shared: &'a Shared<H>, items: Vec<Item>) -> Self {
        let mut batch = Self {
            worker,
            shared,
            offsets: items.iter().map(|item| item.offset).collect(),
            ends: vec![End::Left; items.len()],
            records: Vec::with_capacity(items.len()),
            halts: Vec::new(),
            pause: shared.config.backoff.0,
            failures: 0,
        };
        for item in items {
            let record = match item.content {
                Ok(record) => Some(record),
                Err(error) => {
                    batch.refuse(&item.claim, item.offset, error.into(), None);
                    None
                }
            };
            batch.records.push((item.claim, item.size, record));
        }
        batch
    }

    async fn run(mut self) -> Finished {
        let all: Vec<usize> = (0..self.records.len()).collect();
        let span = {
            let records: Vec<&Record> = self.open(&all).into_iter().map(|(_, record)| record).collect();
            trace::process_span(&self.shared.config.group, &records)
        };
        let mut groups = VecDeque::from([all]);
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

    /// Attempts the records of a group together; returns the groups that are to be tried next in its place.
    async fn step(&mut self, group: Vec<usize>) -> Vec<Vec<usize>> {
        let open = self.open(&group);
        if open.is_empty() {
            return Vec::new();
        }
        let positions: Vec<usize> = open.iter().map(|(position, _)| *position).collect();
        let records: Vec<&Record> = open.into_iter().map(|(_, record)| record).collect();
        match self.attempt(&records).await {
            Ok(committed) => {
                let found: Vec<i64> = committed
                    .gaps
                    .iter()
                    .map(|gap| records[gap.position].envelope.version)
                    .collect();
                for done in committed.done {
                    self.ends[positions[done]] = End::Done;
                }
                for (gap, found) in committed.gaps.into_iter().zip(found) {
                    self.refuse_at(
                        positions[gap.position],
                        Refusal::Gap {
                            expected: gap.expected,
                            found,
                        },
                    );
                }
                if std::mem::take(&mut self.failures) > 0 {
                    self.shared.status.recovered(self.worker);
                    self.pause = self.shared.config.backoff.0;
                    tracing::info!(consumer.worker = self.worker, "the batch went through");
                }
                Vec::new()
            }
            Err(Failure::Refused(position, source)) if position < positions.len() => {
                self.refuse_at(positions[position], Refusal::Handler(source));
                vec![positions]
            }
            Err(Failure::Refused(_, source) | Failure::SomeRefused(source)) => {
                if let [position] = positions[..] {
                    self.refuse_at(position, Refusal::Handler(source));
                    return Vec::new();
                }
                // One at a time, it shows itself; the others are not held up by it.
                positions.into_iter().map(|position| vec![position]).collect()
            }
            Err(Failure::Conflict) => {
                self.shared.metrics.error("conflict");
                self.shared.metrics.retries.inc();
                vec![positions]
            }
            Err(failure) => {
                self.wait_out(&failure).await;
                vec![positions]
            }
        }
    }

    /// The records among `group` that are still ours and stand behind no record that stops their partition.
    fn open(&self, group: &[usize]) -> Vec<(usize, &Record)> {
        group
            .iter()
            .filter_map(|position| {
                let (claim, _, record) = &self.records[*position];
                claim
                    .permits(self.offsets[*position])
                    .then_some((*position, record.as_ref()?))
            })
            .collect()
    }

    fn refuse_at(&mut self, position: usize, refusal: Refusal) {
        let (claim, _, record) = &self.records[position];
        let claim = Arc::clone(claim);
        let event = record.as_ref().map(|record| EventName {
            id: record.envelope.event_id.to_string(),
            kind: record.envelope.event_type.clone(),
            entity: record.envelope.entity_id.clone(),
            trace_id: trace::trace_id(record).to_owned(),
        });
        self.refuse(&claim, self.offsets[position], refusal, event);
    }

    /// The one place where a record that can never be handled ends up. For now it stops its partition; parking the record and the
    /// later ones of its entity goes here.
    fn refuse(&mut self, claim: &Arc<Claim>, offset: i64, refusal: Refusal, event: Option<EventName>) {
        self.shared.metrics.error("refused");
        // At once, so that what stands behind it is let go of here and by the other workers.
        claim.halt(offset);
        self.halts.push(Halt {
            claim: Arc::clone(claim),
            offset,
            refusal,
            event,
        });
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

    async fn attempt(&self, records: &[&Record]) -> Result<Committed, Failure> {
        let deadline = self.shared.config.transaction_timeout;
        let mut connection = timeout(deadline, self.shared.pool.get())
            .await
            .map_err(|_| Failure::Deadline(deadline))?
            .map_err(|error| Failure::Connection(error.into()))?;
        let result = timeout(deadline, self.transact(&mut connection, records))
            .await
            .unwrap_or(Err(Failure::Deadline(deadline)));
        if matches!(result, Err(Failure::Database(_) | Failure::Deadline(_))) {
            // It may hold an open transaction, and locks with it: close it rather than give it back.
            drop(Object::take(connection));
        }
        result
    }

    /// Marks and effects in one transaction.
    async fn transact(
        &self,
        connection: &mut AsyncPgConnection,
        records: &[&Record],
    ) -> Result<Committed, Failure> {
        let begun = Instant::now();
        let config = &self.shared.config;
        let begin = format!(
            "BEGIN; SET LOCAL statement_timeout = {}; SET LOCAL idle_in_transaction_session_timeout = {}",
            config.transaction_timeout.as_millis(),
            config.idle_transaction_timeout.as_millis(),
        );
        AnsiTransactionManager::begin_transaction_sql(connection, &begin)
            .await
            .map_err(Failure::Database)?;
        let (plan, effect) = match self.apply(connection, records).await {
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
        Ok(self.committed(plan, effect, records, begun.elapsed()))
    }

    /// What is to be done with the records, and the effect of those that are fresh, if any is.
    async fn apply<'r>(
        &self,
        connection: &mut AsyncPgConnection,
        records: &[&'r Record],
    ) -> Result<(marks::Plan<'r>, Option<H::Effect>), Failure> {
        let config = &self.shared.config;
        let read = marks::read(connection, &config.group, records)
            .await
            .map_err(Failure::Database)?;
        let start = |topic: &str| {
            config
                .topics
                .iter()
                .find(|known| known.name == topic)
                .map_or(Start::Beginning, |known| known.start)
        };
        let plan = marks::plan(records, &read, start);
        if plan.fresh.is_empty() {
            return Ok((plan, None));
        }
        let moved = marks::advance(connection, &config.group, &plan.advances)
            .await
            .map_err(Failure::Database)?;
        if !moved {
            return Err(Failure::Conflict);
        }
        let fresh: Vec<&Record> = plan.fresh.iter().map(|position| records[*position]).collect();
        let effect = self
            .shared
            .handler
            .handle(connection, &fresh)
            .await
            .map_err(|error| match error {
                HandlerError::Database(error) if handler::is_permanent(&error) => {
                    Failure::SomeRefused(error.into())
                }
                HandlerError::Database(error) => Failure::Database(error),
                HandlerError::Transient(error) => Failure::Waiting(error),
                HandlerError::Permanent { position, source } => match plan.fresh.get(position) {
                    Some(position) => Failure::Refused(*position, source),
                    None => Failure::SomeRefused(source),
                },
            })?;
        // A handler that swallowed a database error left the transaction aborted, and PostgreSQL answers COMMIT of such a
        // transaction with a rollback and no error. This statement fails then.
        connection
            .batch_execute("SELECT 1")
            .await
            .map_err(Failure::Database)?;
        Ok((plan, Some(effect)))
    }

    /// Says what has just committed, to everyone who wants to know.
    fn committed(
        &self,
        plan: marks::Plan<'_>,
        effect: Option<H::Effect>,
        records: &[&Record],
        took: Duration,
    ) -> Committed {
        let metrics = &self.shared.metrics;
        for position in &plan.ghosts {
            let record = records[*position];
            metrics.ghosts.inc();
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
        let fresh: Vec<&Record> = plan.fresh.iter().map(|position| records[*position]).collect();
        let now = Utc::now();
        for record in &fresh {
            let age = (now - record.envelope.occurred_at).as_seconds_f64().max(0.0);
            metrics
                .end_to_end_seconds
                .with_label_values(&[&*record.topic])
                .observe(age);
            metrics
                .messages
                .with_label_values(&[&*record.topic, "applied"])
                .inc();
            tracing::debug!(
                event.id = %record.envelope.event_id,
                event.r#type = record.envelope.event_type,
                entity.id = record.envelope.entity_id,
                entity.version = record.envelope.version,
                trace_id = trace::trace_id(record),
                "event applied"
            );
        }
        for position in &plan.repeats {
            metrics
                .messages
                .with_label_values(&[&*records[*position].topic, "repeat"])
                .inc();
        }
        metrics.batch_records.observe(records.len() as f64);
        metrics.batch_seconds.observe(took.as_secs_f64());
        if let Some(effect) = effect {
            self.shared.handler.committed(&fresh, effect);
        }
        let mut done = plan.fresh;
        done.extend(plan.repeats);
        Committed {
            done,
            gaps: plan.gaps,
        }
    }

    fn finish(self) -> Finished {
        let items = self
            .records
            .into_iter()
            .zip(self.offsets)
            .zip(self.ends)
            .map(|(((claim, size, _), offset), end)| Settled {
                claim,
                offset,
                size,
                end,
            })
            .collect();
        Finished {
            worker: self.worker,
            items,
            halts: self.halts,
        }
    }
}

impl Halt {
    /// Why, in one line.
    pub(crate) fn reason(&self) -> String {
        let mut reason = handler::chain(&self.refusal);
        let _ = write!(reason, " (offset {})", self.offset);
        reason
    }
}
