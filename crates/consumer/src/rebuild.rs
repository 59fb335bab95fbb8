//! Building a projection anew beside the live one, and putting it in its place.
//!
//! The new generation has tables in a schema of its own, made by the service's migrations, and marks and parked records of its own. It is
//! fed by the same runtime in a Kafka group of its own, so it goes on where it was when it is started again. Its indexes are made
//! at the end. See decisions 33 and 37.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use diesel::result::Error as DieselError;
use diesel::sql_types::{BigInt, Bool, Integer, Nullable, Text};
use diesel::{OptionalExtension as _, QueryResult, QueryableByName};
use diesel_async::pooled_connection::deadpool::{Object, Pool};
use diesel_async::{
    AnsiTransactionManager, AsyncMigrationHarness, AsyncPgConnection, RunQueryDsl as _,
    SimpleAsyncConnection as _, TransactionManager as _,
};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness as _};
use prometheus::Registry;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{Offset, TopicPartitionList};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::handler::{self, BoxError, Handler};
use crate::indexes;
use crate::lane::{Lane, quoted, swap_lock};
use crate::metrics::{Metrics, RebuildMetrics};
use crate::runtime::{BuildError, Consumer, RunError};
use crate::status::Status;

/// How often progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Deadline of a question to Kafka.
const KAFKA_LIMIT: Duration = Duration::from_secs(10);
/// The swap is tried when no more than so much of the rate is left to do: live workers wait for it.
const NEAR: Duration = Duration::from_millis(200);
/// How long a swap may hold the live workers up before it lets them go on.
const SWAP_LIMIT: Duration = Duration::from_secs(5);
/// How long the tables' readers are waited for.
const READERS_LIMIT: Duration = Duration::from_secs(2);
/// How long a group that seems to have members is waited for: a session and some.
const GROUP_LIMIT: Duration = Duration::from_secs(15);
/// Marks removed by one statement.
const REMOVE_AT_ONCE: i64 = 20_000;

/// A projection that can be built anew.
pub struct Rebuild<H> {
    config: Config,
    pool: Pool<AsyncPgConnection>,
    migrations: fn() -> EmbeddedMigrations,
    handler: Arc<H>,
    metrics: Metrics,
    figures: RebuildMetrics,
    status: Status,
}

/// Why it did not come to its end. Started again, it goes on where it was.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    #[error("the database cannot be reached")]
    Connection(#[source] BoxError),
    #[error("the database did not do it")]
    Database(#[from] DieselError),
    #[error("another process is at it")]
    Busy,
    #[error("the tables of the new generation could not be made")]
    Migrations(#[source] BoxError),
    #[error("the consumer cannot be made")]
    Build(#[from] BuildError),
    #[error("the consumer ended")]
    Run(#[from] RunError),
    #[error("Kafka did not answer")]
    Kafka(#[from] KafkaError),
    #[error("it was asked to stop")]
    Stopped,
    /// The new generation would be less than the old one. See `dlt list --settled` for what they are.
    #[error("{0} entities are parked in generation {1} that the live one has applied: nothing was swapped")]
    Parked(i64, i32),
    #[error("nothing is being built")]
    Nothing,
    #[error("a task died")]
    Task(#[from] tokio::task::JoinError),
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// The generation that is being built.
    pub generation: i32,
    /// Records that are done, over all partitions.
    pub done: u64,
    /// Records that the topics have.
    pub total: u64,
    /// Records a second, since the process began.
    pub rate: f64,
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rebuilt {
    /// The one that is live now.
    pub generation: i32,
    /// Records that this process handled.
    pub records: u64,
    /// From its start to the swap.
    pub took: Duration,
    /// For how long live workers were held up.
    pub swap: Duration,
}

#[derive(QueryableByName)]
struct Generations {
    #[diesel(sql_type = Integer)]
    live: i32,
    #[diesel(sql_type = Nullable<Integer>)]
    rebuilding: Option<i32>,
}

#[derive(QueryableByName)]
struct Count {
    #[diesel(sql_type = BigInt)]
    count: i64,
}

type Offsets = BTreeMap<(String, i32), i64>;

impl<H: Handler> Rebuild<H> {
    /// `config` is the live consumer's; `pool` has room for its workers and three more. `migrations` make the projection's tables in
    /// the first schema of the search path, and nothing else; those of this crate are not among them. Progress, rate and what a consumer
    /// counts go to `registry`.
    ///
    /// # Errors
    /// When the registry has the metrics of this consumer already.
    pub fn new(
        config: Config,
        pool: Pool<AsyncPgConnection>,
        migrations: fn() -> EmbeddedMigrations,
        handler: H,
        registry: &Registry,
    ) -> Result<Self, BuildError> {
        Ok(Self {
            metrics: Metrics::register(&config, registry)?,
            figures: RebuildMetrics::register(&config.group, registry)?,
            status: Status::default(),
            config: Config {
                // Its members come and go with this process.
                instance: None,
                ..config
            },
            pool,
            migrations,
            handler: Arc::new(handler),
        })
    }

    /// How its consumer is doing.
    pub fn status(&self) -> Status {
        self.status.clone()
    }

    /// Builds, catches up, swaps. `told` hears of the progress about every second. Needs a multi-thread runtime.
    ///
    /// # Errors
    /// The live generation is untouched then, and what was built stays for the next run.
    pub async fn run(
        &self,
        told: impl FnMut(Progress),
        shutdown: &CancellationToken,
    ) -> Result<Rebuilt, RebuildError> {
        let mut alone = self.alone().await?;
        let result = self.build(&mut alone, told, shutdown).await;
        release(alone).await;
        result
    }

    async fn build(
        &self,
        alone: &mut AsyncPgConnection,
        mut told: impl FnMut(Progress),
        shutdown: &CancellationToken,
    ) -> Result<Rebuilt, RebuildError> {
        let begun = Instant::now();
        let mut told = |progress| {
            self.figures.tell(progress);
            told(progress);
        };
        self.status.forget_positions();
        let generation = self.begin(alone).await?;
        self.remove_old_marks(alone).await?;
        let schema = self.schema(generation);
        self.make_tables(&schema).await?;
        indexes::take_away(alone, &schema).await?;
        let mut is_indexed = false;
        let lane = Lane::Rebuild {
            generation,
            schema: schema.clone(),
        };
        let topics = Topics::new(&self.config, &lane)?;
        let first = topics.committed().await?;
        // Where the feed began.
        let mut reached = first.clone();
        let mut feed = self.feed(&lane)?;
        let mut last_told = Instant::now();
        loop {
            let ends = topics.ends().await?;
            let positions = feed.positions(&reached);
            let progress = progress(generation, &first, &positions, &ends, begun.elapsed());
            if last_told.elapsed() >= Duration::from_secs(1) {
                told(progress);
                last_told = Instant::now();
            }
            let left = progress.total.saturating_sub(progress.done);
            if left as f64 <= progress.rate * NEAR.as_secs_f64() && !is_indexed {
                // Nobody is to wait for the tables with a deadline meanwhile.
                feed.stop().await?;
                reached = feed.positions(&reached);
                indexes::make(alone, &schema).await?;
                is_indexed = true;
                feed = self.feed(&lane)?;
            } else if left as f64 <= progress.rate * NEAR.as_secs_f64() {
                match self.swap(&topics, &reached, feed, generation, &schema).await? {
                    Swap::Done(swap) => {
                        told(Progress {
                            done: progress.total,
                            ..progress
                        });
                        if let Err(error) = self.remove_old_marks(alone).await {
                            let error = handler::chain(&error);
                            tracing::warn!(
                                error.message = error,
                                "marks of the old generation are left: the next rebuild removes them"
                            );
                        }
                        self.delete_group(&lane).await;
                        return Ok(Rebuilt {
                            generation,
                            records: progress.total.saturating_sub(sum(&first, &ends)),
                            took: begun.elapsed(),
                            swap,
                        });
                    }
                    Swap::NotYet(again) => feed = again,
                    Swap::Drained => feed = self.feed(&lane)?,
                }
            }
            tokio::select! {
                () = sleep(LOOK_EVERY) => {}
                () = shutdown.cancelled() => {
                    feed.stop().await?;
                    return Err(RebuildError::Stopped);
                }
                ended = &mut feed.task => return Err(ended?.err().map_or(RebuildError::Stopped, RebuildError::Run)),
            }
        }
    }

    /// Gives up what is being built.
    ///
    /// # Errors
    /// [`RebuildError::Nothing`] when nothing is.
    pub async fn abandon(&self) -> Result<i32, RebuildError> {
        let mut alone = self.alone().await?;
        let result = self.give_up(&mut alone).await;
        release(alone).await;
        result
    }

    async fn give_up(&self, alone: &mut AsyncPgConnection) -> Result<i32, RebuildError> {
        let generations = self.generations(alone).await?;
        let generation = generations
            .and_then(|found| found.rebuilding)
            .ok_or(RebuildError::Nothing)?;
        let schema = quoted(&self.schema(generation));
        let drop = format!("DROP SCHEMA IF EXISTS {schema} CASCADE");
        alone.batch_execute(&drop).await?;
        // No decision was taken about any of these.
        diesel::sql_query("DELETE FROM parked_records WHERE consumer = $1 AND generation = $2")
            .bind::<Text, _>(&self.config.group)
            .bind::<Integer, _>(generation)
            .execute(alone)
            .await?;
        diesel::sql_query("UPDATE consumer_generations SET rebuilding = NULL, changed_at = clock_timestamp() WHERE consumer = $1")
            .bind::<Text, _>(&self.config.group)
            .execute(alone)
            .await?;
        self.remove_old_marks(alone).await?;
        let schema = self.schema(generation);
        self.delete_group(&Lane::Rebuild { generation, schema }).await;
        Ok(generation)
    }

    /// Nobody reads by it any more. Kafka refuses while a process that died seems to be a member, so that is waited for.
    async fn delete_group(&self, lane: &Lane) {
        let group = lane.group(&self.config.group);
        let until = Instant::now() + GROUP_LIMIT;
        loop {
            let Err(error) = self.try_to_delete(&group).await else {
                return;
            };
            if error != KafkaError::AdminOp(RDKafkaErrorCode::NonEmptyGroup) || Instant::now() > until {
                tracing::warn!(
                    messaging.consumer.group.name = group,
                    error.message = %error,
                    "the group of the rebuild is left in Kafka, where it does no harm"
                );
                return;
            }
            sleep(LOOK_EVERY).await;
        }
    }

    async fn try_to_delete(&self, group: &str) -> Result<(), KafkaError> {
        let admin: AdminClient<DefaultClientContext> = self.config.client().create()?;
        let options = AdminOptions::new()
            .request_timeout(Some(KAFKA_LIMIT))
            .operation_timeout(Some(KAFKA_LIMIT));
        let answers = admin.delete_groups(&[group], &options).await?;
        match answers.into_iter().next() {
            // It never came to commit anything.
            Some(Err((_, RDKafkaErrorCode::GroupIdNotFound))) | Some(Ok(_)) | None => Ok(()),
            Some(Err((_, code))) => Err(KafkaError::AdminOp(code)),
        }
    }

    /// A connection that says that nobody else is at it, for as long as it lives.
    async fn alone(&self) -> Result<AsyncPgConnection, RebuildError> {
        #[derive(QueryableByName)]
        struct Got {
            #[diesel(sql_type = Bool)]
            got: bool,
        }
        // Never back into the pool, where it would keep the lock.
        let mut connection = Object::take(self.connection().await?);
        let Got { got } = diesel::sql_query("SELECT pg_try_advisory_lock($1) AS got")
            // Not the lock that a swap takes.
            .bind::<BigInt, _>(swap_lock(&format!("rebuild of {}", self.config.group)))
            .get_result(&mut connection)
            .await?;
        if got {
            Ok(connection)
        } else {
            Err(RebuildError::Busy)
        }
    }

    async fn connection(&self) -> Result<Object<AsyncPgConnection>, RebuildError> {
        timeout(self.config.transaction_timeout, self.pool.get())
            .await
            .map_err(|late| RebuildError::Connection(late.into()))?
            .map_err(|error| RebuildError::Connection(error.into()))
    }

    async fn generations(&self, connection: &mut AsyncPgConnection) -> QueryResult<Option<Generations>> {
        diesel::sql_query("SELECT live, rebuilding FROM consumer_generations WHERE consumer = $1")
            .bind::<Text, _>(&self.config.group)
            .get_result(connection)
            .await
            .optional()
    }

    /// The generation that is being built already, or a new one.
    async fn begin(&self, connection: &mut AsyncPgConnection) -> Result<i32, RebuildError> {
        #[derive(QueryableByName)]
        struct Row {
            #[diesel(sql_type = Integer)]
            rebuilding: i32,
        }
        let row: Row = diesel::sql_query(
            "INSERT INTO consumer_generations AS g (consumer, live, rebuilding, last) VALUES ($1, 1, 2, 2) \
             ON CONFLICT (consumer) DO UPDATE SET rebuilding = coalesce(g.rebuilding, g.last + 1), \
                 last = coalesce(g.rebuilding, g.last + 1), changed_at = clock_timestamp() \
             RETURNING rebuilding",
        )
        .bind::<Text, _>(&self.config.group)
        .get_result(connection)
        .await?;
        Ok(row.rebuilding)
    }

    /// Where the tables of a generation are made. Consumers of one database differ by the hash of their names.
    fn schema(&self, generation: i32) -> String {
        format!("rebuild_{generation}_{:016x}", swap_lock(&self.config.group))
    }

    async fn make_tables(&self, schema: &str) -> Result<(), RebuildError> {
        let mut connection = Object::take(self.connection().await?);
        let schema = quoted(schema);
        // That schema alone: the migrations that the live tables have had are not to be seen.
        let prepare = format!("CREATE SCHEMA IF NOT EXISTS {schema}; SET search_path = {schema}");
        connection.batch_execute(&prepare).await?;
        let mut harness = AsyncMigrationHarness::new(connection);
        harness
            .run_pending_migrations((self.migrations)())
            .map_err(RebuildError::Migrations)?;
        Ok(())
    }

    fn feed(&self, lane: &Lane) -> Result<Feed, RebuildError> {
        let consumer = Consumer::on(
            lane.clone(),
            self.config.clone(),
            self.pool.clone(),
            Arc::clone(&self.handler),
            self.metrics.clone(),
            self.status.clone(),
        )?;
        let status = self.status();
        let stop = CancellationToken::new();
        let task = tokio::spawn(consumer.run(stop.clone()));
        Ok(Feed { status, stop, task })
    }

    /// Holds the live workers up, does what is left, and puts the new generation in the place of the old one; or lets them go on.
    async fn swap(
        &self,
        topics: &Topics,
        first: &Offsets,
        mut feed: Feed,
        generation: i32,
        schema: &str,
    ) -> Result<Swap, RebuildError> {
        let mut connection = self.connection().await?;
        let limit = SWAP_LIMIT.as_millis();
        let begin = format!(
            "BEGIN; SET LOCAL statement_timeout = {0}; SET LOCAL lock_timeout = {0}; \
             SET LOCAL idle_in_transaction_session_timeout = {1}",
            limit,
            2 * (limit + self.config.drain_timeout.as_millis()),
        );
        let lock = format!("SELECT pg_advisory_xact_lock({})", swap_lock(&self.config.group));
        let locked = async {
            AnsiTransactionManager::begin_transaction_sql(&mut *connection, &begin).await?;
            handler::speak_english(&mut connection).await?;
            connection.batch_execute(&lock).await
        };
        if let Err(error) = locked.await {
            // It may be in a transaction that failed.
            drop(Object::take(connection));
            return if is_lock_timeout(&error) {
                Ok(Swap::NotYet(feed))
            } else {
                Err(error.into())
            };
        }
        let held = Instant::now();
        // From here on the live generation stands still, and has applied no more than there is now.
        let ends = topics.ends().await?;
        while !is_past(&feed.positions(first), &ends) {
            if held.elapsed() > SWAP_LIMIT || feed.task.is_finished() {
                AnsiTransactionManager::rollback_transaction(&mut *connection).await?;
                return Ok(Swap::NotYet(feed));
            }
            sleep(Duration::from_millis(5)).await;
        }
        feed.stop().await?;
        let Count { count: parked } = diesel::sql_query(
            "SELECT count(*) AS count FROM ( \
                 SELECT topic, coalesce(entity_id, partition || '/' || kafka_offset) FROM parked_records \
                 WHERE consumer = $1 AND generation = $2 AND state = 'parked' \
                 EXCEPT \
                 SELECT topic, coalesce(entity_id, partition || '/' || kafka_offset) FROM parked_records p \
                 WHERE consumer = $1 AND state = 'parked' \
                   AND generation = (SELECT live FROM consumer_generations WHERE consumer = $1)) more",
        )
        .bind::<Text, _>(&self.config.group)
        .bind::<Integer, _>(generation)
        .get_result(&mut connection)
        .await?;
        if parked > 0 {
            AnsiTransactionManager::rollback_transaction(&mut *connection).await?;
            return Err(RebuildError::Parked(parked, generation));
        }
        let swapped = self.put_in_place(&mut connection, generation, schema).await;
        if let Err(error) = swapped {
            AnsiTransactionManager::rollback_transaction(&mut *connection).await?;
            if is_lock_timeout(&error) {
                tracing::warn!("readers of the old tables are in the way: the swap is tried again");
                return Ok(Swap::Drained);
            }
            return Err(error.into());
        }
        AnsiTransactionManager::commit_transaction(&mut *connection).await?;
        Ok(Swap::Done(held.elapsed()))
    }

    async fn put_in_place(
        &self,
        connection: &mut AsyncPgConnection,
        generation: i32,
        schema: &str,
    ) -> QueryResult<()> {
        let group = &self.config.group;
        let readers = READERS_LIMIT.as_millis();
        connection
            .batch_execute(&format!("SET LOCAL lock_timeout = {readers}"))
            .await?;
        connection
            .batch_execute(&include_str!("swap.sql").replace("{schema}", &schema.replace('\'', "''")))
            .await?;
        diesel::sql_query(
            "UPDATE parked_records SET state = 'superseded', settled_at = clock_timestamp() \
             WHERE consumer = $1 AND state = 'parked' AND generation <> $2",
        )
        .bind::<Text, _>(group)
        .bind::<Integer, _>(generation)
        .execute(connection)
        .await?;
        diesel::sql_query(
            "UPDATE consumer_generations SET live = $2, rebuilding = NULL, changed_at = clock_timestamp() WHERE consumer = $1",
        )
        .bind::<Text, _>(group)
        .bind::<Integer, _>(generation)
        .execute(connection)
        .await?;
        Ok(())
    }

    /// Marks and event ids of generations that are neither live nor being built, a few at a time.
    async fn remove_old_marks(&self, connection: &mut AsyncPgConnection) -> Result<(), RebuildError> {
        let Some(Generations { live, rebuilding }) = self.generations(connection).await? else {
            return Ok(());
        };
        let mut tables = ["consumer_marks", "consumer_inbox"].into_iter();
        let mut table = tables.next();
        while let Some(name) = table {
            let removed = diesel::sql_query(format!(
                "DELETE FROM {name} WHERE ctid = ANY(ARRAY(SELECT ctid FROM {name} \
                 WHERE consumer = $1 AND generation <> $2 AND generation <> $3 LIMIT $4))",
            ))
            .bind::<Text, _>(&self.config.group)
            .bind::<Integer, _>(live)
            .bind::<Integer, _>(rebuilding.unwrap_or(live))
            .bind::<BigInt, _>(REMOVE_AT_ONCE)
            .execute(connection)
            .await?;
            if (removed as i64) < REMOVE_AT_ONCE {
                table = tables.next();
            }
        }
        Ok(())
    }
}

/// Lets others at it now; when this fails, PostgreSQL does so once it notices that the connection is gone.
async fn release(mut alone: AsyncPgConnection) {
    let released = alone.batch_execute("SELECT pg_advisory_unlock_all()").await;
    if let Err(error) = released {
        tracing::debug!(error.message = %error, "the lock was not released");
    }
}

enum Swap {
    /// For so long live workers were held up.
    Done(Duration),
    NotYet(Feed),
    /// The same, after the consumer was stopped.
    Drained,
}

/// The consumer of the new generation.
struct Feed {
    status: Status,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), RunError>>,
}

impl Feed {
    async fn stop(&mut self) -> Result<(), RebuildError> {
        self.stop.cancel();
        Ok((&mut self.task).await??)
    }

    /// How far each partition is done, given how far it was at the start.
    fn positions(&self, first: &Offsets) -> Offsets {
        let mut positions = first.clone();
        positions.extend(self.status.positions());
        positions
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn is_past(positions: &Offsets, ends: &Offsets) -> bool {
    ends.iter()
        .all(|(place, end)| positions.get(place).copied().unwrap_or(0) >= *end)
}

fn sum(of: &Offsets, ends: &Offsets) -> u64 {
    ends.iter()
        .map(|(place, end)| of.get(place).copied().unwrap_or(0).min(*end).unsigned_abs())
        .sum()
}

fn progress(generation: i32, first: &Offsets, now: &Offsets, ends: &Offsets, took: Duration) -> Progress {
    let done = sum(now, ends);
    Progress {
        generation,
        done,
        total: sum(ends, ends),
        rate: (done - sum(first, ends).min(done)) as f64 / took.as_secs_f64().max(0.001),
    }
}

fn is_lock_timeout(error: &DieselError) -> bool {
    matches!(error, DieselError::DatabaseError(_, information) if information.message().contains("lock timeout"))
}

/// Questions to Kafka about the topics as they are.
struct Topics {
    client: Arc<BaseConsumer>,
    names: Vec<String>,
}

impl Topics {
    fn new(config: &Config, lane: &Lane) -> Result<Self, RebuildError> {
        let mut client = config.client();
        // Never a member of it: it only asks.
        client.set("group.id", lane.group(&config.group));
        Ok(Self {
            client: Arc::new(client.create()?),
            names: config.topics.iter().map(|topic| topic.name.clone()).collect(),
        })
    }

    /// Where partitions end, but for what belongs to open transactions; those without records are left out.
    async fn ends(&self) -> Result<Offsets, RebuildError> {
        self.ask(|client, names| {
            let mut ends = Offsets::new();
            for (topic, partition) in partitions(client, names)? {
                let (low, high) = client.fetch_watermarks(&topic, partition, KAFKA_LIMIT)?;
                if high > low {
                    ends.insert((topic, partition), high);
                }
            }
            Ok(ends)
        })
        .await
    }

    /// How far the group has come.
    async fn committed(&self) -> Result<Offsets, RebuildError> {
        self.ask(|client, names| {
            let mut list = TopicPartitionList::new();
            for (topic, partition) in partitions(client, names)? {
                list.add_partition(&topic, partition);
            }
            let committed = client.committed_offsets(list, KAFKA_LIMIT)?;
            let known = committed
                .elements()
                .iter()
                .filter_map(|element| match element.offset() {
                    Offset::Offset(offset) => {
                        Some(((element.topic().to_owned(), element.partition()), offset))
                    }
                    _ => None,
                })
                .collect();
            Ok(known)
        })
        .await
    }

    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&BaseConsumer, &[String]) -> Result<T, KafkaError> + Send + 'static,
    ) -> Result<T, RebuildError> {
        let (client, names) = (Arc::clone(&self.client), self.names.clone());
        Ok(tokio::task::spawn_blocking(move || question(&client, &names)).await??)
    }
}

fn partitions(client: &BaseConsumer, names: &[String]) -> Result<Vec<(String, i32)>, KafkaError> {
    let mut partitions = Vec::new();
    for name in names {
        let metadata = client.fetch_metadata(Some(name), KAFKA_LIMIT)?;
        for topic in metadata.topics() {
            partitions.extend(
                topic
                    .partitions()
                    .iter()
                    .map(|partition| (topic.name().to_owned(), partition.id())),
            );
        }
    }
    Ok(partitions)
}
