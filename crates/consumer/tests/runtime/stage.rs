//! A database, a topic, and consumers on them that write down what they do.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use consumer::{
    BoxError, Config, Consumer, Handler, HandlerError, Incoming, Rebuild, Record, Redrive, RunError, Status,
    Topic,
};
use diesel::sql_types::{Array, BigInt, Text};
use diesel_async::pooled_connection::AsyncDieselConnectionManager;
use diesel_async::pooled_connection::deadpool::Pool;
use diesel_async::{AsyncConnection as _, AsyncMigrationHarness, AsyncPgConnection, RunQueryDsl as _};
use diesel_migrations::MigrationHarness as _;
use envelope::Envelope;
pub(crate) use local_stack::testing::events::headers;
use local_stack::testing::{self, Database, events};
use local_stack::wait;
use prometheus::Registry;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Headers as _, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// The table `effects`.
const EFFECTS: consumer::Migrations = diesel_migrations::embed_migrations!("tests/migrations");

/// What happens inside a handler's transaction, after the effects were written.
pub(crate) type Act = Arc<
    dyn Fn(Vec<(String, i64)>) -> Pin<Box<dyn Future<Output = Result<(), HandlerError>> + Send>>
        + Send
        + Sync,
>;

pub(crate) fn nothing() -> Act {
    Arc::new(|_| Box::pin(async { Ok(()) }))
}

/// Writes every event that it is given into the table `effects`, which would also take one twice.
pub(crate) struct Recorder {
    pub(crate) name: String,
    pub(crate) act: Act,
}

impl Handler for Recorder {
    type Event = ();
    type Effect = ();

    fn read(&self, record: &Record) -> Result<(), BoxError> {
        match record.payload.as_slice() {
            b"unreadable" => Err("the payload is no payload".into()),
            b"panic" => panic!("as the test wants it"),
            _ => Ok(()),
        }
    }

    async fn apply(
        &self,
        connection: &mut AsyncPgConnection,
        batch: &[Incoming<'_, ()>],
    ) -> Result<(), HandlerError> {
        let (entities, versions): (Vec<&str>, Vec<i64>) = batch
            .iter()
            .map(|Incoming { record, .. }| (record.envelope.entity_id.as_str(), number(record)))
            .unzip();
        diesel::sql_query(
            "INSERT INTO effects (entity, version, instance) \
             SELECT entity, version, $3 FROM unnest($1, $2) WITH ORDINALITY AS e(entity, version, n) ORDER BY n",
        )
        .bind::<Array<Text>, _>(&entities)
        .bind::<Array<BigInt>, _>(&versions)
        .bind::<Text, _>(&self.name)
        .execute(connection)
        .await?;
        let seen = entities.into_iter().map(str::to_owned).zip(versions);
        (self.act)(seen.collect()).await
    }
}

/// The version of an event, or what its payload says where there is none.
fn number(record: &Record) -> i64 {
    match record.envelope.version {
        0 => String::from_utf8_lossy(&record.payload).parse().unwrap(),
        version => version,
    }
}

/// Refuses this entity's records for good, by their position.
pub(crate) fn refusing(bad: &'static str) -> Act {
    Arc::new(move |seen: Vec<(String, i64)>| {
        Box::pin(async move {
            match seen.iter().position(|(entity, _)| entity == bad) {
                Some(position) => Err(HandlerError::permanent(position, "not this one")),
                None => Ok(()),
            }
        })
    })
}

/// How a transaction of a producer ends.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Transaction {
    Committed,
    Aborted,
}

/// A row of the table of parked records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ParkedRow {
    pub(crate) entity: Option<String>,
    pub(crate) version: Option<i64>,
    pub(crate) kind: String,
    pub(crate) error: String,
    pub(crate) state: String,
}

/// Where a test takes place.
pub(crate) struct Stage {
    pub(crate) database: Database,
    pub(crate) brokers: String,
    pub(crate) topic: String,
    pub(crate) group: String,
    events: events::Topic,
    /// Of the consumers, if it is not the superuser.
    role: Option<&'static str>,
}

impl Stage {
    pub(crate) async fn new(partitions: i32) -> Self {
        Self::with(partitions, &testing::postgres_url(), testing::kafka_brokers()).await
    }

    pub(crate) async fn with(partitions: i32, postgres_url: &str, brokers: String) -> Self {
        let events = events::Topic::create(&brokers, "events.order", partitions)
            .await
            .unwrap();
        Self::on(postgres_url, brokers, events).await
    }

    /// On a topic that takes records of 16 MiB and some.
    pub(crate) async fn with_large_records(partitions: i32) -> Self {
        let brokers = testing::kafka_brokers();
        let events = events::Topic::create_for(&brokers, "events.order", partitions, 20 << 20)
            .await
            .unwrap();
        Self::on(&testing::postgres_url(), brokers, events).await
    }

    async fn on(postgres_url: &str, brokers: String, events: events::Topic) -> Self {
        let database = Database::create_on(postgres_url, "consumer-2026-01-06-000004 effects", migrate).await;
        Self {
            database,
            brokers,
            topic: events.name().to_owned(),
            group: testing::unique("view"),
            events,
            role: None,
        }
    }

    /// With consumers that connect as this role.
    pub(crate) fn with_role(self, role: &'static str) -> Self {
        Self {
            role: Some(role),
            ..self
        }
    }

    /// Small bounds, so that a little load reaches them.
    pub(crate) fn config(&self) -> Config {
        let mut config = Config::new(
            &self.brokers,
            &self.group,
            vec![Topic::from_beginning(&self.topic)],
        );
        config.batch_records = 7;
        config.in_flight_records = 60;
        config.transaction_timeout = Duration::from_secs(10);
        config.drain_timeout = Duration::from_secs(5);
        config.properties = [("session.timeout.ms", "6000"), ("heartbeat.interval.ms", "500")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into();
        config
    }

    /// With room for a load: a pause throws away what the client has fetched ahead, and small bounds make many.
    pub(crate) fn roomy(&self) -> Config {
        Config {
            batch_records: 100,
            in_flight_records: 10_000,
            ..self.config()
        }
    }

    pub(crate) async fn publish(&self, entity: &str, version: i64) {
        let envelope = event(entity, version);
        self.produce(Some(entity), Some(b"payload"), headers(&envelope), None)
            .await;
    }

    /// An event without a version, and with a payload that says which it is.
    pub(crate) async fn publish_uncounted(&self, entity: &str, id: Uuid, payload: &str) {
        let envelope = Envelope {
            event_id: id,
            ..event(entity, 0)
        };
        self.produce(Some(entity), Some(payload.as_bytes()), headers(&envelope), None)
            .await;
    }

    /// Anything at all; returns partition and offset.
    pub(crate) async fn produce(
        &self,
        key: Option<&str>,
        value: Option<&[u8]>,
        headers: OwnedHeaders,
        partition: Option<i32>,
    ) -> (i32, i64) {
        self.events.produce(key, value, headers, partition).await.unwrap()
    }

    /// Versions 1 to `versions` of `entities` entities, interleaved.
    pub(crate) async fn publish_all(&self, entities: usize, versions: i64) {
        for version in 1..=versions {
            let sent = (0..entities).map(|entity| async move {
                self.publish(&format!("e{entity}"), version).await;
            });
            futures::future::join_all(sent).await;
        }
    }

    pub(crate) fn start(&self, name: &str, act: Act) -> Instance {
        self.start_with(name, self.config(), act)
    }

    /// The names of the groups that Kafka knows and that belong to this stage.
    pub(crate) async fn groups(&self) -> Vec<String> {
        let (brokers, own) = (self.brokers.clone(), self.group.clone());
        let ask = move || -> rdkafka::error::KafkaResult<Vec<String>> {
            let client: BaseConsumer = ClientConfig::new().set("bootstrap.servers", brokers).create()?;
            let groups = client.fetch_group_list(None, LIMIT)?;
            let names = groups.groups().iter().map(|group| group.name().to_owned());
            Ok(names.filter(|name| name.starts_with(&own)).collect())
        };
        tokio::task::spawn_blocking(ask).await.unwrap().unwrap()
    }

    pub(crate) fn start_with(&self, name: &str, config: Config, act: Act) -> Instance {
        let (consumer, registry) = self.consumer(name, config, act);
        let status = consumer.status();
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(consumer.run(shutdown.clone()));
        Instance {
            status,
            registry,
            shutdown,
            task,
        }
    }

    pub(crate) fn consumer(&self, name: &str, config: Config, act: Act) -> (Consumer<Recorder>, Registry) {
        let url = match self.role {
            Some(role) => self.database.url().replacen("postgres@", &format!("{role}@"), 1),
            None => self.database.url(),
        };
        let manager = AsyncDieselConnectionManager::<AsyncPgConnection>::new(url);
        let pool = Pool::builder(manager).max_size(config.workers).build().unwrap();
        let registry = Registry::new();
        let handler = Recorder {
            name: name.to_owned(),
            act,
        };
        (Consumer::new(config, pool, handler, &registry).unwrap(), registry)
    }

    /// An operator's hand on what is parked.
    pub(crate) fn redrive(&self, act: Act) -> Redrive<Recorder> {
        self.redrive_with(self.config(), act)
    }

    pub(crate) fn redrive_with(&self, config: Config, act: Act) -> Redrive<Recorder> {
        let manager = AsyncDieselConnectionManager::<AsyncPgConnection>::new(self.database.url());
        let pool = Pool::builder(manager).max_size(2).build().unwrap();
        let name = "redrive".to_owned();
        Redrive::new(config, pool, Recorder { name, act })
    }

    /// The effects built anew.
    pub(crate) fn rebuild(&self, act: Act, registry: &Registry) -> Rebuild<Recorder> {
        self.rebuild_with(self.config(), act, registry)
    }

    pub(crate) fn rebuild_with(&self, config: Config, act: Act, registry: &Registry) -> Rebuild<Recorder> {
        let manager = AsyncDieselConnectionManager::<AsyncPgConnection>::new(self.database.url());
        let pool = Pool::builder(manager)
            .max_size(config.workers + 3)
            .build()
            .unwrap();
        let name = "rebuild".to_owned();
        Rebuild::new(config, pool, || EFFECTS, Recorder { name, act }, registry).unwrap()
    }

    /// The first versions of these entities in one transaction of the topic, on one partition.
    pub(crate) async fn transaction(&self, partition: i32, entities: &[&str], end: Transaction) {
        let (brokers, topic) = (self.brokers.clone(), self.topic.clone());
        let entities: Vec<String> = entities.iter().map(|entity| (*entity).to_owned()).collect();
        let run = move || -> rdkafka::error::KafkaResult<()> {
            let producer: BaseProducer = ClientConfig::new()
                .set("bootstrap.servers", brokers)
                .set("transactional.id", testing::unique("writer"))
                .create()?;
            producer.init_transactions(LIMIT)?;
            producer.begin_transaction()?;
            for entity in &entities {
                let record = BaseRecord::to(&topic)
                    .partition(partition)
                    .key(entity)
                    .payload("payload")
                    .headers(headers(&event(entity, 1)));
                producer.send(record).map_err(|(error, _)| error)?;
            }
            producer.flush(LIMIT)?;
            match end {
                Transaction::Committed => producer.commit_transaction(LIMIT),
                Transaction::Aborted => producer.abort_transaction(LIMIT),
            }
        };
        tokio::task::spawn_blocking(run).await.unwrap().unwrap();
    }

    /// What is or was parked, in the order in which it was.
    pub(crate) async fn parked(&self) -> Result<Vec<ParkedRow>> {
        let sql = "SELECT entity_id, version, error_kind, error, state FROM parked_records ORDER BY id";
        let rows = self.database.connect().await?.query(sql, &[]).await?;
        let row = |row: &tokio_postgres::Row| ParkedRow {
            entity: row.get(0),
            version: row.get(1),
            kind: row.get(2),
            error: row.get(3),
            state: row.get(4),
        };
        Ok(rows.iter().map(row).collect())
    }

    /// Waits until so many records were parked, and no more.
    pub(crate) async fn parks(&self, count: usize) -> Vec<ParkedRow> {
        wait::until(&format!("{count} parked records"), LIMIT, || async {
            let parked = self.parked().await?;
            Ok((parked.len() >= count).then_some(parked))
        })
        .await
        .unwrap()
    }

    /// One number from the database.
    pub(crate) async fn number(&self, sql: &str) -> i64 {
        let client = self.database.connect().await.unwrap();
        client.query_one(sql, &[]).await.unwrap().get(0)
    }

    /// The versions of an entity that took effect, in their order.
    pub(crate) async fn versions(&self, entity: &str) -> Vec<i64> {
        let effects = self.effects().await.unwrap();
        let mine = effects.into_iter().filter(|(id, _)| id == entity);
        mine.map(|(_, version)| version).collect()
    }

    /// Every effect, in the order in which they were written.
    pub(crate) async fn effects(&self) -> Result<Vec<(String, i64)>> {
        let client = self.database.connect().await?;
        let rows = client
            .query("SELECT entity, version::bigint FROM effects ORDER BY n", &[])
            .await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// Waits for `count` effects.
    pub(crate) async fn reached(&self, count: usize) -> Vec<(String, i64)> {
        wait::until(&format!("{count} effects"), LIMIT, || async {
            let effects = self.effects().await?;
            Ok((effects.len() >= count).then_some(effects))
        })
        .await
        .unwrap()
    }

    /// Waits for versions 1 to `versions` of `entities` entities and requires each once and in order; then for every
    /// offset to be committed.
    pub(crate) async fn complete(&self, entities: usize, versions: i64) {
        let count = entities * usize::try_from(versions).unwrap();
        assert_each_once_in_order(&self.reached(count).await, entities, versions);
    }

    /// What the topic says should have taken effect, by a fold that knows nothing of the consumer: of each entity the first occurrences of its
    /// versions, in the order of the topic, up to a payload that cannot be read.
    pub(crate) async fn expected(&self) -> BTreeMap<String, Vec<i64>> {
        let (brokers, topic) = (self.brokers.clone(), self.topic.clone());
        let read = move || -> rdkafka::error::KafkaResult<BTreeMap<String, Vec<i64>>> {
            let client: BaseConsumer = ClientConfig::new()
                .set("bootstrap.servers", brokers)
                .set("group.id", "nobody's")
                .create()?;
            let metadata = client.fetch_metadata(Some(&topic), LIMIT)?;
            let mut list = TopicPartitionList::new();
            let mut left = 0;
            for partition in metadata.topics()[0].partitions() {
                list.add_partition_offset(&topic, partition.id(), Offset::Beginning)?;
                left += client.fetch_watermarks(&topic, partition.id(), LIMIT)?.1;
            }
            client.assign(&list)?;
            let mut folded: BTreeMap<String, (Vec<i64>, bool)> = BTreeMap::new();
            for _ in 0..left {
                let message = client.poll(LIMIT).unwrap()?;
                let key = String::from_utf8_lossy(message.key().unwrap()).into_owned();
                let headers = message.headers().unwrap();
                let version = headers.iter().find(|header| header.key == "aggregate-version");
                let version = String::from_utf8_lossy(version.unwrap().value.unwrap())
                    .parse()
                    .unwrap();
                let (versions, is_parked) = folded.entry(key).or_default();
                if *is_parked || versions.contains(&version) {
                    continue;
                }
                match message.payload() {
                    Some(b"unreadable") => *is_parked = true,
                    _ => versions.push(version),
                }
            }
            Ok(folded
                .into_iter()
                .map(|(entity, (versions, _))| (entity, versions))
                .collect())
        };
        tokio::task::spawn_blocking(read).await.unwrap().unwrap()
    }

    /// The versions of each entity that took effect, in their order.
    pub(crate) async fn by_entity(&self) -> BTreeMap<String, Vec<i64>> {
        let mut found: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for (entity, version) in self.effects().await.unwrap() {
            found.entry(entity).or_default().push(version);
        }
        found
    }

    /// The committed offset of each partition, 0 where there is none.
    pub(crate) async fn committed(&self) -> BTreeMap<i32, i64> {
        let (brokers, group, topic) = (self.brokers.clone(), self.group.clone(), self.topic.clone());
        let ask = move || -> rdkafka::error::KafkaResult<BTreeMap<i32, i64>> {
            let client: BaseConsumer = ClientConfig::new()
                .set("bootstrap.servers", brokers)
                .set("group.id", group)
                .create()?;
            let metadata = client.fetch_metadata(Some(&topic), LIMIT)?;
            let mut list = TopicPartitionList::new();
            for partition in metadata.topics()[0].partitions() {
                list.add_partition(&topic, partition.id());
            }
            let committed = client.committed_offsets(list, LIMIT)?;
            Ok(committed
                .elements()
                .iter()
                .map(|element| {
                    let offset = match element.offset() {
                        Offset::Offset(offset) => offset,
                        _ => 0,
                    };
                    (element.partition(), offset)
                })
                .collect())
        };
        tokio::task::spawn_blocking(ask).await.unwrap().unwrap()
    }

    /// Commits the beginning of every partition, which takes a group without members.
    pub(crate) async fn rewind(&self) {
        let (brokers, group, topic) = (self.brokers.clone(), self.group.clone(), self.topic.clone());
        let partitions: Vec<i32> = self.committed().await.into_keys().collect();
        let commit = move || -> rdkafka::error::KafkaResult<()> {
            let client: BaseConsumer = ClientConfig::new()
                .set("bootstrap.servers", brokers)
                .set("group.id", group)
                .create()?;
            let mut list = TopicPartitionList::new();
            for partition in &partitions {
                list.add_partition_offset(&topic, *partition, Offset::Offset(0))?;
            }
            client.commit(&list, rdkafka::consumer::CommitMode::Sync)
        };
        tokio::task::spawn_blocking(commit).await.unwrap().unwrap();
    }

    /// Waits until this many records, over all partitions, are committed as done.
    pub(crate) async fn all_committed(&self, records: i64) {
        wait::until("all offsets committed", LIMIT, || async {
            Ok((self.committed().await.values().sum::<i64>() == records).then_some(()))
        })
        .await
        .unwrap();
    }
}

/// A running consumer. Dropping it ends it in the middle of whatever it does.
pub(crate) struct Instance {
    pub(crate) status: Status,
    registry: Registry,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), RunError>>,
}

impl Instance {
    /// Ends it as it should be ended.
    pub(crate) async fn stop(mut self) {
        self.shutdown.cancel();
        (&mut self.task).await.unwrap().unwrap();
    }

    /// How many of a metric's label sets have a value.
    pub(crate) fn samples(&self, name: &str) -> usize {
        let families = self.registry.gather();
        let family = families.iter().find(|family| family.name() == name);
        family.map_or(0, |family| family.get_metric().len())
    }

    /// Ends it without letting anything finish.
    pub(crate) async fn abort(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }

    /// How it ended by itself.
    pub(crate) async fn ended(mut self) -> Result<(), RunError> {
        tokio::time::timeout(LIMIT, &mut self.task)
            .await
            .unwrap()
            .unwrap()
    }

    /// The sum of a metric over its labels, or over those that contain `label`.
    pub(crate) fn metric(&self, name: &str, label: &str) -> f64 {
        metric(&self.registry, name, label)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) fn metric(registry: &Registry, name: &str, label: &str) -> f64 {
    let families = registry.gather();
    let family = families.iter().find(|family| family.name() == name);
    family
        .into_iter()
        .flat_map(|family| family.get_metric())
        .filter(|metric| label.is_empty() || metric.get_label().iter().any(|pair| pair.value() == label))
        .map(|metric| metric.get_counter().get_value() + metric.get_gauge().get_value())
        .sum()
}

#[track_caller]
pub(crate) fn assert_each_once_in_order(effects: &[(String, i64)], entities: usize, versions: i64) {
    let mut seen: BTreeMap<&str, Vec<i64>> = BTreeMap::new();
    for (entity, version) in effects {
        seen.entry(entity).or_default().push(*version);
    }
    assert_eq!(seen.len(), entities);
    for (entity, found) in seen {
        assert_eq!(found, (1..=versions).collect::<Vec<_>>(), "{entity}");
    }
}

pub(crate) fn event(entity: &str, version: i64) -> Envelope {
    Envelope {
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
        ..events::envelope("order", entity, version, "order.placed")
    }
}

async fn migrate(url: String) -> Result<()> {
    let connection = AsyncPgConnection::establish(&url).await?;
    let mut harness = AsyncMigrationHarness::new(connection);
    for migrations in [consumer::MIGRATIONS, EFFECTS] {
        harness
            .run_pending_migrations(migrations)
            .map_err(anyhow::Error::from_boxed)?;
    }
    Ok(())
}
