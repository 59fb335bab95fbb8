//! The loop that reads, hands out and keeps the books.

use std::sync::Arc;
use std::time::{Duration, Instant};

use diesel::QueryResult;
use diesel_async::AsyncPgConnection;
use diesel_async::pooled_connection::deadpool::Pool;
use futures::FutureExt as _;
use prometheus::Registry;
use rdkafka::Message as _;
use rdkafka::consumer::{Consumer as _, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Interval, MissedTickBehavior, interval, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::config::{Config, Start};
use crate::handler::Handler;
use crate::inbox;
use crate::intake::{Intake, Limits, PartitionId};
use crate::kafka::{self, Callbacks, Change};
use crate::lane::Lane;
use crate::metrics::Metrics;
use crate::parked;
use crate::record;
use crate::status::Status;
use crate::worker::{self, Finished, Shared};

/// The most records taken in before the loop looks at anything else.
const READ_AT_ONCE: usize = 512;
/// How often what is parked is counted.
const COUNT_EVERY: Duration = Duration::from_secs(5);
/// How often is looked for what is old enough to go, and how long after some the next goes.
const REMOVE_EVERY: Duration = Duration::from_secs(600);
const REMOVE_NEXT: Duration = Duration::from_secs(1);
/// How often partitions are looked at that end in something that is never delivered.
const PASS_EVERY: Duration = Duration::from_millis(100);
/// How long after an outage a client may find out that it fenced itself: brokers elect, load groups, and let members join.
const AFTER_OUTAGE: Duration = Duration::from_secs(60);

/// Reads topics and applies their events to a PostgreSQL database, each once.
///
/// See the [crate] for what it promises.
pub struct Consumer<H> {
    shared: Arc<Shared<H>>,
    client: StreamConsumer<Callbacks>,
    changes: mpsc::UnboundedReceiver<Change>,
}

/// Why a consumer cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The configuration; every problem is listed.
    #[error("the configuration cannot be used: {}", .0.join("; "))]
    Config(Vec<String>),
    /// librdkafka refuses a property, or cannot start.
    #[error("the Kafka client cannot be made")]
    Client(#[source] KafkaError),
    /// The registry has a consumer of this group already.
    #[error("the metrics cannot be registered")]
    Metrics(#[from] prometheus::Error),
}

/// Why a consumer ended although it was not asked to. The process should end, and be started again.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The client cannot go on; most often, another process uses the same `instance`.
    #[error("the Kafka client cannot go on")]
    Fatal(#[source] KafkaError),
    /// The topics cannot be subscribed to.
    #[error("the topics cannot be subscribed to")]
    Subscribe(#[source] KafkaError),
    /// A handler panicked.
    #[error("a worker died")]
    Worker(#[source] JoinError),
    /// A worker ended before it was told to.
    #[error("a worker left")]
    WorkerLeft,
}

impl<H: Handler> Consumer<H> {
    /// Makes a consumer; nothing is read before [`run`](Self::run).
    ///
    /// `pool` should have room for `config.workers` connections beside those that others take from it. The database needs the
    /// tables of [`MIGRATIONS`](crate::MIGRATIONS).
    ///
    /// # Errors
    /// When the configuration cannot be used.
    pub fn new(
        config: Config,
        pool: Pool<AsyncPgConnection>,
        handler: H,
        registry: &Registry,
    ) -> Result<Self, BuildError> {
        let metrics = Metrics::register(&config, registry)?;
        Self::on(Lane::Live, config, pool, handler, metrics, Status::default())
    }

    pub(crate) fn on(
        lane: Lane,
        config: Config,
        pool: Pool<AsyncPgConnection>,
        handler: H,
        metrics: Metrics,
        status: Status,
    ) -> Result<Self, BuildError> {
        let problems = config.problems();
        if !problems.is_empty() {
            return Err(BuildError::Config(problems));
        }
        let (client, changes) = kafka::connect(&config, &lane, &metrics).map_err(BuildError::Client)?;
        let stop = CancellationToken::new();
        Ok(Self {
            shared: Arc::new(Shared {
                config,
                lane,
                pool,
                handler,
                metrics,
                status,
                stop,
            }),
            client,
            changes,
        })
    }

    /// How this consumer is doing.
    pub fn status(&self) -> Status {
        self.shared.status.clone()
    }

    /// Reads and applies until `shutdown` is cancelled, then lets the batches under way end and commits their offsets, for
    /// at most twice `drain_timeout`.
    ///
    /// # Errors
    /// When it cannot go on. Nothing is lost: whoever runs next continues.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), RunError> {
        let Self {
            shared,
            client,
            changes,
        } = self;
        let _gauges = AbortOnDropHandle::new(tokio::spawn(count_parked(Arc::clone(&shared))));
        let _retention = AbortOnDropHandle::new(tokio::spawn(remove_old(Arc::clone(&shared))));
        let mut running = Running::start(shared, client, changes);
        let mut result = running.subscribe();
        while result.is_ok() && !shutdown.is_cancelled() {
            result = running.read_until(&shutdown).await;
            if let Err(RunError::Fatal(error)) = &result
                && running.fenced_itself(error)
            {
                result = running.join_anew().await;
            }
        }
        running.drain().await;
        result
    }
}

/// Keeps the gauges of what is parked up to date, for ever. While the database is away they stay as they were.
async fn count_parked<H: Handler>(shared: Arc<Shared<H>>) {
    loop {
        let count = async {
            let mut connection = shared.pool.get().await.ok()?;
            parked::figures(&mut connection, &shared.config.group).await.ok()
        };
        if let Ok(Some(figures)) = timeout(COUNT_EVERY, count).await {
            let metrics = &shared.metrics;
            metrics.parked_records.set(figures.records);
            metrics.parked_entities.set(figures.entities);
            metrics.oldest_parked_seconds.set(figures.oldest_seconds);
        }
        sleep(COUNT_EVERY).await;
    }
}

/// Removes what is kept for a time, for ever. What another instance removes at the same time is passed over.
async fn remove_old<H: Handler>(shared: Arc<Shared<H>>) {
    let config = &shared.config;
    loop {
        let remove = async {
            let mut connection = shared.pool.get().await.ok()?;
            let group = &config.group;
            let records = parked::remove_settled(&mut connection, group, config.keep_settled).await;
            let ids = inbox::remove_old(&mut connection, group, config.keep_seen).await;
            for error in [&records, &ids]
                .into_iter()
                .filter_map(|removed| removed.as_ref().err())
            {
                tracing::debug!(error.message = %error, "what is old was not removed this time");
            }
            let left = |removed: QueryResult<usize>, at_once| removed.is_ok_and(|removed| removed == at_once);
            Some(left(records, parked::REMOVE_AT_ONCE) || left(ids, inbox::REMOVE_AT_ONCE))
        };
        let removed = timeout(config.transaction_timeout, remove).await;
        let is_more = matches!(removed, Ok(Some(true)));
        sleep(if is_more { REMOVE_NEXT } else { REMOVE_EVERY }).await;
    }
}

/// A consumer that has workers.
struct Running<H: Handler> {
    shared: Arc<Shared<H>>,
    client: StreamConsumer<Callbacks>,
    books: Books,
    changes: mpsc::UnboundedReceiver<Change>,
    work: Vec<mpsc::Sender<Vec<crate::intake::Item>>>,
    finished: mpsc::Receiver<Finished>,
    workers: JoinSet<()>,
    pass: Interval,
}

/// What is known about the partitions; apart from the client, so that a message borrowed from that can be noted here.
struct Books {
    intake: Intake,
    topics: Vec<Arc<str>>,
    names: Vec<String>,
    starts: Vec<Start>,
    max_record_bytes: usize,
}

impl<H: Handler> Running<H> {
    fn start(
        shared: Arc<Shared<H>>,
        client: StreamConsumer<Callbacks>,
        changes: mpsc::UnboundedReceiver<Change>,
    ) -> Self {
        let config = &shared.config;
        // One batch per worker at a time: neither of these channels is ever full when it is sent to.
        let (finish, finished) = mpsc::channel(config.workers);
        let mut workers = JoinSet::new();
        let mut work = Vec::with_capacity(config.workers);
        for worker in 0..config.workers {
            let (sender, receiver) = mpsc::channel(1);
            work.push(sender);
            workers.spawn(worker::run(worker, Arc::clone(&shared), receiver, finish.clone()));
        }
        let names: Vec<String> = config.topics.iter().map(|topic| topic.name.clone()).collect();
        let books = Books {
            intake: Intake::new(Limits {
                workers: config.workers,
                batch_records: config.batch_records,
                linger: config.linger,
                in_flight_records: config.in_flight_records,
                in_flight_bytes: config.in_flight_bytes,
            }),
            topics: names.iter().map(|name| name.as_str().into()).collect(),
            names,
            starts: config.topics.iter().map(|topic| topic.start).collect(),
            max_record_bytes: config.max_record_bytes,
        };
        let mut pass = interval(PASS_EVERY);
        pass.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            shared,
            client,
            books,
            changes,
            work,
            finished,
            workers,
            pass,
        }
    }

    fn subscribe(&self) -> Result<(), RunError> {
        let names: Vec<&str> = self.books.names.iter().map(String::as_str).collect();
        self.client.subscribe(&names).map_err(RunError::Subscribe)
    }

    /// Whether the client was fenced by nobody but itself. When brokers are away for longer than the session, librdkafka gives up its
    /// member id and joins again; a commit that waited for the brokers then goes out without a member id, and the group takes it
    /// for one of another process of this name.
    fn fenced_itself(&self, error: &KafkaError) -> bool {
        error.rdkafka_error_code() == Some(RDKafkaErrorCode::FencedInstanceId)
            && self.client.context().missed_a_broker_within(AFTER_OUTAGE)
    }

    /// Goes on with a new client: librdkafka's does not recover from a fatal error.
    async fn join_anew(&mut self) -> Result<(), RunError> {
        tracing::warn!("the group has lost this member while brokers were away: it joins anew");
        let (client, changes) = kafka::connect(&self.shared.config, &self.shared.lane, &self.shared.metrics)
            .map_err(RunError::Fatal)?;
        let fenced = std::mem::replace(&mut self.client, client);
        self.changes = changes;
        // What is under way may still commit; it counts for nothing in the assignment that comes.
        let lost = Change::Revoked(self.books.intake.ids());
        self.change(lost);
        close(fenced, self.shared.config.drain_timeout).await;
        self.subscribe()
    }

    async fn read_until(&mut self, shutdown: &CancellationToken) -> Result<(), RunError> {
        loop {
            let due = self.books.intake.next_due();
            let Self {
                shared,
                client,
                books,
                changes,
                finished,
                workers,
                pass,
                ..
            } = self;
            // Changes of the assignment come before messages, since a message may be the first of a new assignment.
            let happened = tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                Some(change) = changes.recv() => Happened::Change(change),
                Some(ended) = workers.join_next() => {
                    return Err(ended.err().map_or(RunError::WorkerLeft, RunError::Worker));
                }
                Some(batch) = finished.recv() => Happened::Finished(batch),
                () = sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => Happened::Due,
                _ = pass.tick() => Happened::Pass,
                message = client.recv() => Happened::Read(books.read(shared, client, changes, message)),
            };
            match happened {
                Happened::Change(change) => self.change(change),
                Happened::Finished(batch) => {
                    self.finish(batch);
                    while let Ok(batch) = self.finished.try_recv() {
                        self.finish(batch);
                    }
                }
                Happened::Due => {}
                Happened::Pass => self.pass(),
                Happened::Read(error) => self.after_read(error)?,
            }
            self.hand_out()?;
            self.regulate();
        }
    }

    /// The client goes on by itself after everything but a fatal error: brokers away, topics not there yet. It has told its
    /// callback, which logs and counts.
    fn after_read(&self, error: Option<KafkaError>) -> Result<(), RunError> {
        match error {
            Some(error @ KafkaError::MessageConsumptionFatal(_)) => Err(RunError::Fatal(error)),
            Some(_) | None => Ok(()),
        }
    }

    fn change(&mut self, change: Change) {
        self.books.change(&self.shared, &self.client, change);
    }

    fn finish(&mut self, batch: Finished) {
        let advanced = self.books.intake.settle(batch.worker, &batch.items);
        self.store(&advanced);
    }

    /// Partitions that end in transaction markers, or in records of aborted transactions, are done to their end.
    fn pass(&mut self) {
        match kafka::positions(&self.books.names, &self.client) {
            Ok(positions) => {
                let passed = self.books.intake.pass(positions);
                self.store(&passed);
            }
            // It is asked again.
            Err(error) => tracing::debug!(error.message = %error, "the client does not know its positions"),
        }
    }

    /// Offsets to be committed in the background.
    fn store(&self, advanced: &[(PartitionId, i64)]) {
        if advanced.is_empty() {
            return;
        }
        for (id, next) in advanced {
            let topic = &self.books.names[id.topic];
            self.shared.status.reached(topic, id.partition, *next);
        }
        let stored =
            kafka::offsets(&self.books.names, advanced).and_then(|list| self.client.store_offsets(&list));
        if let Err(error) = stored {
            // The partition was lost at this very moment: its next owner repeats a little.
            tracing::debug!(error.message = %error, "offsets were not stored");
        }
    }

    fn hand_out(&mut self) -> Result<(), RunError> {
        for (worker, batch) in self.books.intake.batches(Instant::now()) {
            self.work[worker]
                .try_send(batch)
                .map_err(|_| RunError::WorkerLeft)?;
        }
        Ok(())
    }

    /// Back-pressure: partitions with too much in memory pause; reading itself never stops, since it keeps the membership.
    fn regulate(&mut self) {
        let flow = self.books.intake.flow();
        self.shared
            .metrics
            .in_flight_records
            .set(self.books.intake.in_flight() as i64);
        for (ids, pausing) in [(&flow.pause, true), (&flow.resume, false)] {
            if ids.is_empty() {
                continue;
            }
            let list = kafka::list(&self.books.names, ids);
            let result = if pausing {
                self.client.pause(&list)
            } else {
                self.client.resume(&list)
            };
            if let Err(error) = result {
                tracing::warn!(error.message = %error, "partitions were not paused or resumed");
            }
        }
    }

    /// Lets the batches under way end, and gives the partitions back.
    async fn drain(mut self) {
        self.shared.stop.cancel();
        self.books.intake.drop_all_waiting();
        let deadline = tokio::time::Instant::now() + self.shared.config.drain_timeout;
        while self.books.intake.any_busy() {
            let Self {
                client,
                changes,
                finished,
                workers,
                ..
            } = &mut self;
            let batch = tokio::select! {
                batch = timeout_at(deadline, finished.recv()) => batch,
                Some(change) = changes.recv() => {
                    self.change(change);
                    continue;
                }
                // One that died does not bring its batch to an end any more.
                Some(_) = workers.join_next() => break,
                // Keeps the membership; what is read now is read again by the next owner.
                _ = client.recv() => continue,
            };
            match batch {
                Ok(Some(batch)) => self.finish(batch),
                Ok(None) => break,
                Err(_) => {
                    tracing::warn!("batches under way were given up: they roll back and are read again");
                    break;
                }
            }
        }
        self.work.clear();
        self.workers.shutdown().await;
        let Self { client, shared, .. } = self;
        close(client, shared.config.drain_timeout).await;
    }
}

/// Closing commits the stored offsets and leaves the group; it blocks, for long when the brokers are away. A thread of its own, since the
/// process may end while it still tries.
async fn close(client: StreamConsumer<Callbacks>, patience: Duration) {
    let (done, closed) = oneshot::channel();
    let closing = std::thread::Builder::new()
        .name("kafka-close".into())
        .spawn(move || {
            drop(client);
            // Nobody listens once the patience has ended.
            let _ = done.send(());
        });
    if closing.is_err() || timeout(patience, closed).await.is_err() {
        tracing::warn!("the Kafka client did not close in time: the last offsets may not be committed");
    }
}

enum Happened {
    Change(Change),
    Finished(Finished),
    Due,
    Pass,
    Read(Option<KafkaError>),
}

impl Books {
    /// Takes in `first` and whatever else is there at once; returns the error at which it ended, if it did.
    fn read<H>(
        &mut self,
        shared: &Shared<H>,
        client: &StreamConsumer<Callbacks>,
        changes: &mut mpsc::UnboundedReceiver<Change>,
        first: Result<BorrowedMessage<'_>, KafkaError>,
    ) -> Option<KafkaError> {
        let now = Instant::now();
        let mut message = first;
        for left in (0..READ_AT_ONCE).rev() {
            // The assignment may have changed since the message before; that comes first.
            while let Ok(change) = changes.try_recv() {
                self.change(shared, client, change);
            }
            let full = match message {
                Ok(message) => self.admit(&message, now),
                Err(error) => return Some(error),
            };
            if full || left == 0 {
                break;
            }
            message = client.recv().now_or_never()?;
        }
        None
    }

    /// Whether its partition has to pause now.
    fn admit(&mut self, message: &BorrowedMessage<'_>, now: Instant) -> bool {
        let Some(topic) = self.names.iter().position(|name| name == message.topic()) else {
            return false;
        };
        let id = PartitionId {
            topic,
            partition: message.partition(),
        };
        let content = record::decode(
            &self.topics[topic],
            message,
            self.max_record_bytes,
            self.starts[topic],
        );
        self.intake
            .admit(id, message.offset(), record::size(message), content, now)
            && self.intake.is_full(id)
    }

    fn change<H>(&mut self, shared: &Shared<H>, client: &StreamConsumer<Callbacks>, change: Change) {
        let metrics = &shared.metrics;
        metrics.rebalances.inc();
        let (ids, what) = match &change {
            Change::Assigned(ids) => (ids, "assigned"),
            Change::Revoked(ids) => (ids, "revoked"),
        };
        let partitions: Vec<String> = ids
            .iter()
            .map(|id| format!("{}/{}", self.names[id.topic], id.partition))
            .collect();
        tracing::info!(
            messaging.consumer.group.name = shared.config.group,
            kafka.partitions = partitions.join(" "),
            "partitions {what}"
        );
        match change {
            Change::Assigned(ids) => {
                for id in &ids {
                    self.intake.assign(*id);
                }
                // A pause from an earlier assignment must not outlive it.
                if let Err(error) = client.resume(&kafka::list(&self.names, &ids)) {
                    tracing::warn!(error.message = %error, "new partitions were not resumed");
                }
            }
            Change::Revoked(ids) => {
                for id in ids {
                    self.intake.revoke(id);
                    let topic = &self.names[id.topic];
                    // Its lag is its next owner's to tell; fails when it never was told.
                    let _ = metrics
                        .lag_records
                        .remove_label_values(&[topic.as_str(), &id.partition.to_string()]);
                }
            }
        }
        metrics.assigned_partitions.set(self.intake.assigned() as i64);
    }
}
