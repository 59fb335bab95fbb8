//! What an operator does about parked records: look, replay, discard.
//!
//! Everything happens in the table of parked records and under the lock of the entity's mark, one transaction per record; workers that
//! have later records of the entity at the same time wait for it, and decide again. The source topic is not touched.

use chrono::{DateTime, Utc};
use diesel::result::Error as DieselError;
use diesel::sql_types::{
    Array, BigInt, Binary, Bool, Integer, Jsonb, Nullable, Text, Timestamptz, Uuid as SqlUuid,
};
use diesel::{OptionalExtension as _, QueryResult, QueryableByName};
use diesel_async::pooled_connection::deadpool::{Object, Pool};
use diesel_async::{AnsiTransactionManager, AsyncPgConnection, RunQueryDsl as _, TransactionManager as _};
use serde::Serialize;
use serde_json::Value;
use tokio::time::timeout;
use uuid::Uuid;

use crate::config::{Config, Start};
use crate::handler::{self, BoxError, Handler, HandlerError};
use crate::inbox;
use crate::lane::Lane;
use crate::marks::Known;
use crate::parked::{self, Body, NewParked};
use crate::record::{Decoded, RawRecord};
use crate::worker::{Content, Refusal};

/// An operator's hand on the parked records of one consumer.
pub struct Redrive<H> {
    config: Config,
    pool: Pool<AsyncPgConnection>,
    handler: H,
}

/// Why nothing could be done. What was done before it stays done.
#[derive(Debug, thiserror::Error)]
pub enum RedriveError {
    #[error("the database cannot be reached")]
    Connection(#[source] BoxError),
    #[error("the database did not do it")]
    Database(#[source] DieselError),
    #[error("it took too long")]
    Deadline,
    #[error("the handler is waiting for something: try again later")]
    Waiting(#[source] BoxError),
    #[error("no record {0} is parked")]
    NotParked(i64),
    #[error("record {first} of the same entity comes before record {id}")]
    NotFirst { id: i64, first: i64 },
    #[error("generation {0} is being built: wait for its end, or abandon it")]
    Rebuilding(i32),
    #[error("a reason must be given")]
    NoReason,
}

impl From<DieselError> for RedriveError {
    fn from(error: DieselError) -> Self {
        Self::Database(error)
    }
}

/// Which parked records are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// Those of all entities.
    All,
    /// Those of the entities of these records.
    Of(Vec<i64>),
}

/// Whether anything is to be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// Yes.
    Real,
    /// Everything is done, and rolled back.
    Dry,
}

/// A record in the table, without its key, value and headers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, QueryableByName)]
pub struct Parked {
    #[diesel(sql_type = BigInt)]
    pub id: i64,
    #[diesel(sql_type = Text)]
    pub topic: String,
    #[diesel(sql_type = Integer)]
    pub partition: i32,
    #[diesel(sql_type = BigInt, column_name = kafka_offset)]
    pub offset: i64,
    /// `None`: it has no key that names an entity.
    #[diesel(sql_type = Nullable<Text>)]
    pub entity_id: Option<String>,
    /// `None`: its envelope cannot be read.
    #[diesel(sql_type = Nullable<BigInt>)]
    pub version: Option<i64>,
    #[diesel(sql_type = Nullable<SqlUuid>)]
    pub event_id: Option<Uuid>,
    #[diesel(sql_type = Nullable<Text>)]
    pub event_type: Option<String>,
    #[diesel(sql_type = Text)]
    pub error_kind: String,
    #[diesel(sql_type = Text)]
    pub error: String,
    #[diesel(sql_type = Integer)]
    pub attempts: i32,
    #[diesel(sql_type = Timestamptz)]
    pub parked_at: DateTime<Utc>,
    /// `parked`, `replayed`, `repeated`, `discarded`, `superseded`.
    #[diesel(sql_type = Text)]
    pub state: String,
    #[diesel(sql_type = Integer)]
    pub generation: i32,
}

/// The columns of [`Parked`].
pub(crate) const PARKED: &str = "id, topic, partition, kafka_offset, entity_id, version, event_id, event_type, error_kind, error, attempts, \
                      parked_at, state, generation";

/// A record in the table, and what was decided about it.
#[derive(Debug, Clone, Serialize)]
pub struct Shown {
    #[serde(flatten)]
    pub record: Parked,
    pub headers: Value,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub audit: Vec<Audit>,
}

/// A decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, QueryableByName)]
pub struct Audit {
    #[diesel(sql_type = Timestamptz)]
    pub at: DateTime<Utc>,
    #[diesel(sql_type = Text)]
    pub decided_by: String,
    #[diesel(sql_type = Text)]
    pub action: String,
    #[diesel(sql_type = Text)]
    pub outcome: String,
    #[diesel(sql_type = Nullable<Text>)]
    pub reason: Option<String>,
}

/// What became of a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outcome {
    pub id: i64,
    #[serde(flatten)]
    pub end: End,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum End {
    /// Its effect is there now.
    Replayed,
    /// Its effect, or that of the same version, was there before.
    Repeated,
    Discarded,
    /// It cannot be handled yet, so the later ones of its entity wait on.
    Failed {
        /// As in the table of parked records.
        kind: &'static str,
        error: String,
    },
}

/// Topic and entity.
type Entity = (String, String);

#[derive(Debug, Clone, QueryableByName)]
struct Waiting {
    #[diesel(sql_type = BigInt)]
    id: i64,
    #[diesel(sql_type = Nullable<BigInt>)]
    version: Option<i64>,
}

#[derive(Debug, Clone, QueryableByName)]
struct MarkRow {
    #[diesel(sql_type = BigInt)]
    version: i64,
    #[diesel(sql_type = Nullable<SqlUuid>)]
    event_id: Option<Uuid>,
}

#[derive(QueryableByName)]
struct RawRow {
    #[diesel(sql_type = Text)]
    topic: String,
    #[diesel(sql_type = Integer)]
    partition: i32,
    #[diesel(sql_type = BigInt)]
    kafka_offset: i64,
    #[diesel(sql_type = Timestamptz)]
    record_time: DateTime<Utc>,
    #[diesel(sql_type = Nullable<Binary>)]
    key: Option<Vec<u8>>,
    #[diesel(sql_type = Nullable<Binary>)]
    value: Option<Vec<u8>>,
    #[diesel(sql_type = Jsonb)]
    headers: Value,
}

impl RawRow {
    fn raw(self) -> RawRecord {
        let headers = self.headers.as_array().into_iter().flatten();
        RawRecord {
            topic: self.topic.into(),
            partition: self.partition,
            offset: self.kafka_offset,
            timestamp: Some(self.record_time).filter(|time| *time != DateTime::UNIX_EPOCH),
            key: self.key,
            value: self.value,
            headers: headers.filter_map(parked::header_from_json).collect(),
        }
    }
}

/// Whose turn it is among those that wait.
fn turn(waiting: &[Waiting], mark: i64, start: Start) -> Option<&Waiting> {
    let repeated = |row: &&Waiting| row.version.is_some_and(|version| version <= mark);
    let next = |row: &&Waiting| row.version == Some(mark + 1);
    let first = waiting.first()?;
    let any_first = start == Start::Baseline && mark == 0;
    let is_held_up = first.version.is_some() && !any_first;
    waiting
        .iter()
        .find(repeated)
        // One whose predecessor came later than itself.
        .or_else(|| is_held_up.then(|| waiting.iter().find(next)).flatten())
        .or(Some(first))
}

/// A transaction of one step, or of a whole dry run.
struct Step<'a, H> {
    redrive: &'a Redrive<H>,
    connection: Object<AsyncPgConnection>,
    generation: i32,
}

/// What a record's effect is to be told to, once it has committed.
type Told<H> = Option<(Content<<H as Handler>::Event>, <H as Handler>::Effect)>;

impl<H: Handler> Redrive<H> {
    /// `config` and `handler` are those that the consumer runs with.
    pub fn new(config: Config, pool: Pool<AsyncPgConnection>, handler: H) -> Self {
        Self {
            config,
            pool,
            handler,
        }
    }

    /// What is parked, first what was parked first, at most `limit`; with `settled`, also what was.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn list(&self, settled: bool, limit: i64) -> Result<Vec<Parked>, RedriveError> {
        let mut step = self.begin().await?;
        // OFFSET 0: what waits is found by its index and then put in order, not looked for among all that was settled.
        let from = if settled {
            "parked_records WHERE consumer = $1".to_owned()
        } else {
            let generation = step.generation;
            format!(
                "(SELECT * FROM parked_records WHERE consumer = $1 AND generation = {generation} AND state = 'parked' OFFSET 0) w"
            )
        };
        let rows = diesel::sql_query(format!("SELECT {PARKED} FROM {from} ORDER BY id LIMIT $2"))
            .bind::<Text, _>(&self.config.group)
            .bind::<BigInt, _>(limit)
            .load(&mut step.connection)
            .await?;
        step.roll_back().await?;
        Ok(rows)
    }

    /// A record with all that is known of it; also one that is no longer parked.
    ///
    /// # Errors
    /// [`RedriveError::NotParked`] when it never was.
    pub async fn show(&self, id: i64) -> Result<Shown, RedriveError> {
        let mut step = self.begin().await?;
        let record: Option<Parked> = diesel::sql_query(format!(
            "SELECT {PARKED} FROM parked_records WHERE consumer = $1 AND id = $2"
        ))
        .bind::<Text, _>(&self.config.group)
        .bind::<BigInt, _>(id)
        .get_result(&mut step.connection)
        .await
        .optional()?;
        let record = record.ok_or(RedriveError::NotParked(id))?;
        let raw = step.raw(id).await?;
        let audit = diesel::sql_query(
            "SELECT at, decided_by, action, outcome, reason FROM parked_audit WHERE parked_id = $1 ORDER BY id",
        )
        .bind::<BigInt, _>(id)
        .load(&mut step.connection)
        .await?;
        step.roll_back().await?;
        Ok(Shown {
            record,
            headers: raw.headers,
            key: raw.key,
            value: raw.value,
            audit,
        })
    }

    /// Hands parked records to the handler again, those of each entity in their order, up to the first that still fails.
    ///
    /// # Errors
    /// When the database or the handler's dependencies are away; what was replayed until then stays so.
    pub async fn replay(&self, which: &Which, run: Run, by: &str) -> Result<Vec<Outcome>, RedriveError> {
        let mut outcomes = Vec::new();
        for id in self.without_entity(which).await? {
            let error = "it has no key that names an entity: it can only be discarded".to_owned();
            let end = End::Failed {
                kind: "unreadable",
                error,
            };
            outcomes.push(Outcome { id, end });
        }
        for entity in self.entities(which).await? {
            match run {
                Run::Real => self.replay_entity(&entity, by, &mut outcomes).await?,
                Run::Dry => self.try_entity(&entity, &mut outcomes).await?,
            }
        }
        Ok(outcomes)
    }

    /// Gives up the first record of its entity: it counts as handled. What waits behind it is replayed.
    ///
    /// # Errors
    /// When it is not the first, or no reason is given.
    pub async fn discard(&self, id: i64, reason: &str, by: &str) -> Result<Vec<Outcome>, RedriveError> {
        if reason.trim().is_empty() {
            return Err(RedriveError::NoReason);
        }
        let mut step = self.begin_to_change().await?;
        let row: Option<Parked> = diesel::sql_query(format!(
            "SELECT {PARKED} FROM parked_records \
             WHERE consumer = $1 AND generation = $2 AND id = $3 AND state = 'parked'"
        ))
        .bind::<Text, _>(&self.config.group)
        .bind::<Integer, _>(step.generation)
        .bind::<BigInt, _>(id)
        .get_result(&mut step.connection)
        .await
        .optional()?;
        let row = row.ok_or(RedriveError::NotParked(id))?;
        let entity = row.entity_id.map(|entity| (row.topic, entity));
        if let Some(entity) = &entity {
            let mark = step.lock(entity).await?;
            let waiting = step.waiting(entity).await?;
            let first = turn(&waiting, mark.version, self.config.start(&entity.0));
            match first.map(|first| first.id) {
                None => return Err(RedriveError::NotParked(id)),
                Some(first) if first != id => return Err(RedriveError::NotFirst { id, first }),
                Some(_) => {}
            }
            let to = match (row.version, row.event_id) {
                (Some(version), Some(event_id)) if version > mark.version => MarkRow {
                    version,
                    event_id: Some(event_id),
                },
                // Its source does not count.
                (None, Some(event_id)) => {
                    step.note_seen(&entity.0, event_id).await?;
                    MarkRow {
                        version: mark.version + 1,
                        event_id: Some(event_id),
                    }
                }
                _ => mark,
            };
            step.move_mark(entity, &to, waiting.len() > 1).await?;
        }
        step.settle(id, "discarded").await?;
        step.audit(id, "discard", "discarded", Some(reason), by).await?;
        step.commit().await?;
        let end = End::Discarded;
        let mut outcomes = vec![Outcome { id, end }];
        if let Some(entity) = entity {
            self.replay_entity(&entity, by, &mut outcomes).await?;
        }
        Ok(outcomes)
    }

    async fn replay_entity(
        &self,
        entity: &Entity,
        by: &str,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), RedriveError> {
        loop {
            let mut step = self.begin_to_change().await?;
            let Some((outcome, told)) = step.next(entity).await? else {
                return step.roll_back().await;
            };
            let id = outcome.id;
            let failed = match &outcome.end {
                End::Failed { kind, error } => {
                    step.roll_back().await?;
                    step = self.begin_to_change().await?;
                    step.failed(id, kind, error).await?;
                    step.audit(id, "replay", error, None, by).await?;
                    true
                }
                end => {
                    let text = if *end == End::Repeated {
                        "repeated"
                    } else {
                        "replayed"
                    };
                    step.audit(id, "replay", text, None, by).await?;
                    false
                }
            };
            step.commit().await?;
            if let Some((content, effect)) = told
                && let Some(incoming) = content.incoming()
            {
                self.handler.committed(&[incoming], effect);
            }
            outcomes.push(outcome);
            if failed {
                return Ok(());
            }
        }
    }

    /// All of an entity in one transaction, rolled back.
    async fn try_entity(&self, entity: &Entity, outcomes: &mut Vec<Outcome>) -> Result<(), RedriveError> {
        let mut step = self.begin_to_change().await?;
        while let Some((outcome, _)) = step.next(entity).await? {
            let failed = matches!(outcome.end, End::Failed { .. });
            outcomes.push(outcome);
            if failed {
                break;
            }
        }
        step.roll_back().await
    }

    async fn entities(&self, which: &Which) -> Result<Vec<Entity>, RedriveError> {
        #[derive(QueryableByName)]
        struct Row {
            #[diesel(sql_type = Text)]
            topic: String,
            #[diesel(sql_type = Text)]
            entity_id: String,
        }
        let mut step = self.begin().await?;
        let (all, ids) = chosen(which);
        let rows: Vec<Row> = diesel::sql_query(
            "SELECT topic, entity_id FROM parked_records \
             WHERE consumer = $1 AND generation = $2 AND state = 'parked' AND entity_id IS NOT NULL AND ($3 OR id = ANY($4)) \
             GROUP BY topic, entity_id ORDER BY min(id)",
        )
        .bind::<Text, _>(&self.config.group)
        .bind::<Integer, _>(step.generation)
        .bind::<Bool, _>(all)
        .bind::<Array<BigInt>, _>(ids)
        .load(&mut step.connection)
        .await?;
        step.roll_back().await?;
        Ok(rows.into_iter().map(|row| (row.topic, row.entity_id)).collect())
    }

    /// Those that stand alone. Also tells of ids that nothing is parked under.
    async fn without_entity(&self, which: &Which) -> Result<Vec<i64>, RedriveError> {
        #[derive(QueryableByName)]
        struct Row {
            #[diesel(sql_type = BigInt)]
            id: i64,
            #[diesel(sql_type = Bool)]
            alone: bool,
        }
        let mut step = self.begin().await?;
        let (all, ids) = chosen(which);
        let rows: Vec<Row> = diesel::sql_query(
            "SELECT id, entity_id IS NULL AS alone FROM parked_records \
             WHERE consumer = $1 AND generation = $2 AND state = 'parked' AND (($3 AND entity_id IS NULL) OR id = ANY($4)) \
             ORDER BY id",
        )
        .bind::<Text, _>(&self.config.group)
        .bind::<Integer, _>(step.generation)
        .bind::<Bool, _>(all)
        .bind::<Array<BigInt>, _>(ids)
        .load(&mut step.connection)
        .await?;
        step.roll_back().await?;
        if let Some(missing) = ids.iter().find(|id| !rows.iter().any(|row| row.id == **id)) {
            return Err(RedriveError::NotParked(*missing));
        }
        Ok(rows.iter().filter(|row| row.alone).map(|row| row.id).collect())
    }

    async fn begin_to_change(&self) -> Result<Step<'_, H>, RedriveError> {
        #[derive(QueryableByName)]
        struct Row {
            #[diesel(sql_type = Integer)]
            rebuilding: i32,
        }
        let mut step = self.begin().await?;
        let rebuilding: Option<Row> = diesel::sql_query(
            "SELECT rebuilding FROM consumer_generations WHERE consumer = $1 AND rebuilding IS NOT NULL",
        )
        .bind::<Text, _>(&self.config.group)
        .get_result(&mut step.connection)
        .await
        .optional()?;
        match rebuilding {
            Some(row) => Err(RedriveError::Rebuilding(row.rebuilding)),
            None => Ok(step),
        }
    }

    async fn begin(&self) -> Result<Step<'_, H>, RedriveError> {
        #[derive(QueryableByName)]
        struct Row {
            #[diesel(sql_type = Integer)]
            generation: i32,
        }
        let begun = async {
            let connection = self.pool.get().await;
            let mut connection = connection.map_err(|error| RedriveError::Connection(error.into()))?;
            let begin = Lane::Live.begin(&self.config);
            AnsiTransactionManager::begin_transaction_sql(&mut *connection, &begin).await?;
            handler::speak_english(&mut connection).await?;
            let Row { generation } = diesel::sql_query(
                "SELECT coalesce((SELECT live FROM consumer_generations WHERE consumer = $1), 1) AS generation",
            )
            .bind::<Text, _>(&self.config.group)
            .get_result(&mut connection)
            .await?;
            Ok(Step {
                redrive: self,
                connection,
                generation,
            })
        };
        // Statements have their deadline from the transaction on.
        timeout(self.config.transaction_timeout, begun)
            .await
            .map_err(|_| RedriveError::Deadline)?
    }
}

fn chosen(which: &Which) -> (bool, &[i64]) {
    match which {
        Which::All => (true, &[]),
        Which::Of(ids) => (false, ids),
    }
}

impl<H: Handler> Step<'_, H> {
    /// Settles the record of the entity whose turn it is, in this transaction; nothing when none waits. One that failed may leave
    /// the transaction aborted.
    async fn next(&mut self, entity: &Entity) -> Result<Option<(Outcome, Told<H>)>, RedriveError> {
        let config = &self.redrive.config;
        let mark = self.lock(entity).await?;
        let waiting = self.waiting(entity).await?;
        let start = config.start(&entity.0);
        let Some(turn) = turn(&waiting, mark.version, start) else {
            return Ok(None);
        };
        let id = turn.id;
        let more = waiting.len() > 1;
        let failed = |kind, error: String| {
            let end = End::Failed { kind, error };
            Ok(Some((Outcome { id, end }, None)))
        };
        let refused = |refusal: &Refusal| failed(refusal.kind(), handler::chain(refusal));
        let raw = self.raw(id).await?.raw();
        let decoded = raw.decode(config.max_record_bytes, start);
        let (content, refusal) = Content::read(decoded, &self.redrive.handler, config.max_ahead);
        let Some(envelope) = content.record().map(|record| &record.envelope) else {
            return refusal.as_ref().map_or(Ok(None), refused);
        };
        let (event_id, is_counted) = (envelope.event_id, envelope.version != 0);
        let (version, is_repeat) = if is_counted {
            (envelope.version, envelope.version <= mark.version)
        } else {
            (mark.version + 1, self.is_seen(entity, event_id).await?)
        };
        if is_repeat {
            self.settle(id, "repeated").await?;
            self.move_mark(entity, &mark, more).await?;
            let end = End::Repeated;
            return Ok(Some((Outcome { id, end }, None)));
        }
        let expected = mark.version + 1;
        if version > expected && !(start == Start::Baseline && mark.version == 0) {
            let error = format!("version {version} of the entity is there, and {expected} is missing");
            return failed("gap", error);
        }
        if let Some(refusal) = &refusal {
            return refused(refusal);
        }
        let Some(incoming) = content.incoming() else {
            // What is not refused was read.
            return Ok(None);
        };
        let to = MarkRow {
            version,
            event_id: Some(event_id),
        };
        self.move_mark(entity, &to, more).await?;
        self.settle(id, "replayed").await?;
        if !is_counted {
            self.note_seen(&entity.0, event_id).await?;
        }
        let batch = [incoming];
        let applied = self.redrive.handler.apply(&mut self.connection, &batch);
        let applied = timeout(config.transaction_timeout, applied)
            .await
            .map_err(|_| RedriveError::Deadline)?;
        let effect = match applied {
            Ok(effect) => effect,
            Err(HandlerError::Database(error)) if handler::is_permanent(&error) => {
                return refused(&Refusal::Handler(error.into()));
            }
            Err(HandlerError::Database(error)) => return Err(error.into()),
            Err(HandlerError::Transient(error)) => return Err(RedriveError::Waiting(error)),
            Err(HandlerError::Permanent { source, .. }) => return refused(&Refusal::Handler(source)),
        };
        let end = End::Replayed;
        Ok(Some((Outcome { id, end }, Some((content, effect)))))
    }

    /// Of an event whose source does not count.
    async fn is_seen(&mut self, (topic, entity): &Entity, event_id: Uuid) -> QueryResult<bool> {
        let (consumer, generation) = (&self.redrive.config.group, self.generation);
        let event = (topic.as_str(), entity.as_str(), event_id);
        let seen = inbox::look_up(&mut self.connection, consumer, generation, &[event]).await?;
        Ok(seen.into_values().any(|known| known == Known::Seen))
    }

    async fn note_seen(&mut self, topic: &str, event_id: Uuid) -> QueryResult<()> {
        let (consumer, generation) = (&self.redrive.config.group, self.generation);
        // Whether it was noted before: what it stands for is decided under the lock of the mark.
        inbox::insert(&mut self.connection, consumer, generation, &[(topic, event_id)]).await?;
        Ok(())
    }

    /// Locks the entity's mark: workers that have records of it wait from here on.
    async fn lock(&mut self, (topic, entity): &Entity) -> QueryResult<MarkRow> {
        diesel::sql_query(
            "SELECT version, event_id FROM consumer_marks \
             WHERE consumer = $1 AND generation = $2 AND topic = $3 AND entity_id = $4 FOR UPDATE",
        )
        .bind::<Text, _>(&self.redrive.config.group)
        .bind::<Integer, _>(self.generation)
        .bind::<Text, _>(topic)
        .bind::<Text, _>(entity)
        .get_result(&mut self.connection)
        .await
    }

    async fn waiting(&mut self, (topic, entity): &Entity) -> QueryResult<Vec<Waiting>> {
        diesel::sql_query(
            "SELECT id, version FROM parked_records \
             WHERE consumer = $1 AND generation = $2 AND topic = $3 AND entity_id = $4 AND state = 'parked' ORDER BY id",
        )
        .bind::<Text, _>(&self.redrive.config.group)
        .bind::<Integer, _>(self.generation)
        .bind::<Text, _>(topic)
        .bind::<Text, _>(entity)
        .load(&mut self.connection)
        .await
    }

    async fn move_mark(&mut self, (topic, entity): &Entity, to: &MarkRow, parked: bool) -> QueryResult<()> {
        diesel::sql_query(
            "UPDATE consumer_marks SET version = $5, event_id = $6, parked = $7 \
             WHERE consumer = $1 AND generation = $2 AND topic = $3 AND entity_id = $4",
        )
        .bind::<Text, _>(&self.redrive.config.group)
        .bind::<Integer, _>(self.generation)
        .bind::<Text, _>(topic)
        .bind::<Text, _>(entity)
        .bind::<BigInt, _>(to.version)
        .bind::<Nullable<SqlUuid>, _>(to.event_id)
        .bind::<Bool, _>(parked)
        .execute(&mut self.connection)
        .await?;
        Ok(())
    }

    async fn raw(&mut self, id: i64) -> QueryResult<RawRow> {
        diesel::sql_query(
            "SELECT topic, partition, kafka_offset, record_time, key, value, headers FROM parked_records WHERE id = $1",
        )
        .bind::<BigInt, _>(id)
        .get_result(&mut self.connection)
        .await
    }

    async fn settle(&mut self, id: i64, state: &str) -> QueryResult<()> {
        diesel::sql_query(
            "UPDATE parked_records SET state = $2, settled_at = clock_timestamp() WHERE id = $1",
        )
        .bind::<BigInt, _>(id)
        .bind::<Text, _>(state)
        .execute(&mut self.connection)
        .await?;
        Ok(())
    }

    /// Notes one attempt more, with a dead letter that says so: decision 38.
    async fn failed(&mut self, id: i64, kind: &'static str, error: &str) -> QueryResult<()> {
        #[derive(QueryableByName)]
        struct Row {
            #[diesel(sql_type = Integer)]
            attempts: i32,
        }
        let noted: Option<Row> = diesel::sql_query(
            "UPDATE parked_records SET attempts = attempts + 1, error_kind = $2, error = $3 WHERE id = $1 AND state = 'parked' \
             RETURNING attempts",
        )
        .bind::<BigInt, _>(id)
        .bind::<Text, _>(kind)
        .bind::<Text, _>(parked::clean(error))
        .get_result(&mut self.connection)
        .await
        .optional()?;
        // Somebody else settled it meanwhile.
        let Some(Row { attempts }) = noted else {
            return Ok(());
        };
        let config = &self.redrive.config;
        let raw = self.raw(id).await?.raw();
        let start = config.start(&raw.topic);
        let decoded = raw.decode(config.max_record_bytes, start);
        let body = match &decoded {
            Decoded::Record(record) => Body::Record(record),
            Decoded::Not(raw, _) => Body::Raw(raw),
        };
        let letter = NewParked {
            body,
            error_kind: kind,
            error: error.to_owned(),
        };
        parked::write_dead_letters(&mut self.connection, &config.group, &[&letter], attempts).await
    }

    async fn audit(
        &mut self,
        id: i64,
        action: &str,
        outcome: &str,
        reason: Option<&str>,
        by: &str,
    ) -> QueryResult<()> {
        diesel::sql_query(
            "INSERT INTO parked_audit (parked_id, action, outcome, reason, decided_by) VALUES ($1, $2, $3, $4, $5)",
        )
        .bind::<BigInt, _>(id)
        .bind::<Text, _>(action)
        .bind::<Text, _>(parked::clean(outcome))
        .bind::<Nullable<Text>, _>(reason.map(parked::clean))
        .bind::<Text, _>(by)
        .execute(&mut self.connection)
        .await?;
        Ok(())
    }

    async fn commit(mut self) -> Result<(), RedriveError> {
        Ok(AnsiTransactionManager::commit_transaction(&mut *self.connection).await?)
    }

    async fn roll_back(mut self) -> Result<(), RedriveError> {
        Ok(AnsiTransactionManager::rollback_transaction(&mut *self.connection).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(waiting: &[(i64, Option<i64>)], mark: i64, start: Start, expect: Option<i64>) {
        let waiting: Vec<Waiting> = waiting
            .iter()
            .map(|(id, version)| Waiting {
                id: *id,
                version: *version,
            })
            .collect();
        assert_eq!(turn(&waiting, mark, start).map(|row| row.id), expect);
    }

    #[test]
    fn the_first_has_its_turn_unless_another_one_has_to_go_before() {
        use Start::{Baseline, Beginning};
        check(&[], 3, Beginning, None);
        check(&[(1, Some(4)), (2, Some(5))], 3, Beginning, Some(1));
        // The one that was missing came later.
        check(&[(1, Some(5)), (2, Some(4))], 3, Beginning, Some(2));
        // It never came.
        check(&[(1, Some(6)), (2, Some(5))], 3, Beginning, Some(1));
        // What is there already goes first, wherever it is.
        check(&[(1, Some(4)), (2, Some(3))], 3, Beginning, Some(2));
        // One that cannot be read holds its place.
        check(&[(1, None), (2, Some(4))], 3, Beginning, Some(1));
        check(&[(1, Some(9)), (2, Some(1))], 0, Baseline, Some(1));
    }
}
