//! Records that cannot be handled, and the later ones of their entities: the table in which they wait, and their dead letters.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use chrono::{DateTime, SecondsFormat, Utc};
use diesel::sql_types::{
    Array, BigInt, Binary, Bool, Double, Integer, Jsonb, Nullable, Text, Timestamptz, Uuid as SqlUuid,
};
use diesel::{QueryResult, QueryableByName};
use diesel_async::{AsyncPgConnection, RunQueryDsl as _};
use envelope::Envelope;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::inbox::{self, Seen};
use crate::marks::Known;
use crate::record::{Header, RawRecord, Record};

/// What a dead letter's topic is called behind the name of the record's.
pub const DEAD_LETTER_SUFFIX: &str = "-dlt";
/// The most characters of an error that are kept.
const MAX_ERROR: usize = 1_000;
/// The most bytes of key and value that a dead letter has: with its headers it must fit where the record did, and Kafka's default for
/// producers is 1,000,012 in all.
const MAX_LETTER: usize = 900_000;
/// Settled records removed by one statement; each may have a large value.
pub(crate) const REMOVE_AT_ONCE: usize = 500;
/// The most bytes of headers that a dead letter repeats.
const MAX_HEADERS: usize = 8 << 10;

/// A record on its way into the table.
#[derive(Debug)]
pub(crate) struct NewParked<'a> {
    pub(crate) body: Body<'a>,
    pub(crate) error_kind: &'static str,
    pub(crate) error: String,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Body<'a> {
    Record(&'a Record),
    Raw(&'a RawRecord),
}

/// The place of a record in Kafka, by which it is known again. A topic that was made anew has other times at the same offsets.
pub(crate) type Place = (String, i32, i64, DateTime<Utc>);

impl<'a> Body<'a> {
    pub(crate) fn place(self) -> Place {
        let (topic, partition, offset, time) = match self {
            Self::Record(record) => (&record.topic, record.partition, record.offset, record.timestamp),
            Self::Raw(raw) => (&raw.topic, raw.partition, raw.offset, raw.timestamp),
        };
        let time = time.unwrap_or(DateTime::UNIX_EPOCH);
        (topic.as_ref().to_owned(), partition, offset, time)
    }

    fn envelope(self) -> Option<&'a Envelope> {
        match self {
            Self::Record(record) => Some(&record.envelope),
            Self::Raw(_) => None,
        }
    }

    fn entity(self) -> Option<&'a str> {
        match self {
            Self::Record(record) => Some(&record.envelope.entity_id),
            Self::Raw(raw) => raw.entity(),
        }
    }

    fn key(self) -> Option<&'a [u8]> {
        match self {
            Self::Record(record) => Some(record.envelope.entity_id.as_bytes()),
            Self::Raw(raw) => raw.key.as_deref(),
        }
    }

    fn value(self) -> Option<&'a [u8]> {
        match self {
            Self::Record(record) => Some(&record.payload),
            Self::Raw(raw) => raw.value.as_deref(),
        }
    }

    fn headers(self) -> Value {
        match self {
            // As they are written: of what was read, nothing else is kept.
            Self::Record(record) => {
                let mut headers = Vec::new();
                record
                    .envelope
                    .write(|name, value| headers.push(json!([name, String::from_utf8_lossy(value)])));
                Value::Array(headers)
            }
            Self::Raw(raw) => raw.headers.iter().map(header_to_json).collect(),
        }
    }
}

fn header_to_json((name, value): &Header) -> Value {
    let Some(value) = value else {
        return json!([name, null]);
    };
    match std::str::from_utf8(value) {
        Ok(text) if !text.contains('\0') => json!([name, text]),
        _ => json!([name, { "base64": BASE64.encode(value) }]),
    }
}

pub(crate) fn header_from_json(pair: &Value) -> Option<Header> {
    let name = pair.get(0)?.as_str()?.to_owned();
    let value = match pair.get(1)? {
        Value::String(text) => Some(text.clone().into_bytes()),
        Value::Object(object) => Some(BASE64.decode(object.get("base64")?.as_str()?).ok()?),
        _ => None,
    };
    Some((name, value))
}

/// Text that PostgreSQL takes and that fits into a header.
pub(crate) fn clean(text: &str) -> String {
    text.chars().filter(|c| *c != '\0').take(MAX_ERROR).collect()
}

/// What is known of a record when it parks.
const COLUMNS: &str = "topic, partition, kafka_offset, record_time, entity_id, version, event_id, event_type, key, value, headers, \
                       error_kind, error";

#[derive(QueryableByName)]
struct Inserted {
    #[diesel(sql_type = Text)]
    topic: String,
    #[diesel(sql_type = Integer)]
    partition: i32,
    #[diesel(sql_type = BigInt)]
    kafka_offset: i64,
}

/// Writes the records into the table, those of an entity in their order; returns the positions of those that were not there yet.
pub(crate) async fn insert(
    connection: &mut AsyncPgConnection,
    consumer: &str,
    generation: i32,
    records: &[NewParked<'_>],
) -> QueryResult<Vec<usize>> {
    let places: Vec<Place> = records.iter().map(|record| record.body.place()).collect();
    let envelopes = records.iter().map(|record| record.body.envelope());
    let inserted: Vec<Inserted> = diesel::sql_query(format!(
        "INSERT INTO parked_records (consumer, generation, {COLUMNS}) \
         SELECT $1, $2, {COLUMNS} \
         FROM unnest($3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15) WITH ORDINALITY AS g({COLUMNS}, n) \
         WHERE NOT EXISTS (SELECT FROM parked_records p WHERE p.consumer = $1 AND p.generation = $2 AND p.topic = g.topic \
                              AND p.entity_id = g.entity_id AND p.version = g.version AND p.state = 'parked' OFFSET 0) \
         ORDER BY n ON CONFLICT DO NOTHING RETURNING topic, partition, kafka_offset"
    ))
    .bind::<Text, _>(consumer)
    .bind::<Integer, _>(generation)
    .bind::<Array<Text>, _>(places.iter().map(|place| place.0.as_str()).collect::<Vec<_>>())
    .bind::<Array<Integer>, _>(places.iter().map(|place| place.1).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(places.iter().map(|place| place.2).collect::<Vec<_>>())
    .bind::<Array<Timestamptz>, _>(places.iter().map(|place| place.3).collect::<Vec<_>>())
    .bind::<Array<Nullable<Text>>, _>(records.iter().map(|record| record.body.entity()).collect::<Vec<_>>())
    .bind::<Array<Nullable<BigInt>>, _>(envelopes.clone().map(|e| version(e?)).collect::<Vec<_>>())
    .bind::<Array<Nullable<SqlUuid>>, _>(envelopes.clone().map(|e| Some(e?.event_id)).collect::<Vec<_>>())
    .bind::<Array<Nullable<Text>>, _>(envelopes.map(|e| Some(e?.event_type.as_str())).collect::<Vec<_>>())
    .bind::<Array<Nullable<Binary>>, _>(records.iter().map(|record| record.body.key()).collect::<Vec<_>>())
    .bind::<Array<Nullable<Binary>>, _>(records.iter().map(|record| record.body.value()).collect::<Vec<_>>())
    .bind::<Array<Jsonb>, _>(records.iter().map(|record| record.body.headers()).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(records.iter().map(|record| record.error_kind).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(records.iter().map(|record| clean(&record.error)).collect::<Vec<_>>())
    .load(connection)
    .await?;
    let inserted: HashSet<(String, i32, i64)> = inserted
        .into_iter()
        .map(|row| (row.topic, row.partition, row.kafka_offset))
        .collect();
    let is_new = |position: &usize| {
        let (topic, partition, offset, _) = &places[*position];
        inserted.contains(&(topic.clone(), *partition, *offset))
    };
    Ok((0..records.len()).filter(is_new).collect())
}

/// A dead letter's own part: what is not simply the record's or its envelope's.
struct Letter<'a> {
    envelope: Option<&'a Envelope>,
    topic: String,
    partition: i32,
    offset: i64,
    timestamp: Option<i64>,
    key: String,
    /// Where it is not the key.
    original_key: Option<String>,
    /// Where they are no envelope.
    headers: Option<String>,
    payload: Option<&'a [u8]>,
    /// How long the value is, where it is left out.
    left_out: Option<i64>,
}

impl<'a> Letter<'a> {
    fn of(body: Body<'a>) -> Self {
        let (topic, partition, offset, _) = body.place();
        let (key, value) = (body.key(), body.value());
        let is_large = key.map_or(0, <[u8]>::len) + value.map_or(0, <[u8]>::len) > MAX_LETTER;
        let (payload, left_out) = match value {
            Some(value) if is_large => (None, i64::try_from(value.len()).ok()),
            value => (value, None),
        };
        let (time, headers) = match body {
            Body::Record(record) => (record.timestamp, None),
            Body::Raw(raw) => (raw.timestamp, Some(body.headers().to_string())),
        };
        let too_large = |headers: String| match headers.len() {
            0..=MAX_HEADERS => headers,
            _ => "too large: see parked_records".to_owned(),
        };
        let text_key = body.entity();
        Self {
            envelope: body.envelope(),
            key: text_key.map_or_else(|| format!("{topic}/{partition}/{offset}"), str::to_owned),
            original_key: match (text_key, key) {
                (None, Some(key)) => Some(BASE64.encode(&key[..key.len().min(MAX_HEADERS)])),
                _ => None,
            },
            topic,
            partition,
            offset,
            timestamp: time.map(|time| time.timestamp_millis()),
            headers: headers.map(too_large),
            payload,
            left_out,
        }
    }
}

/// Writes a dead letter for each of these records. One that is too large goes without its value. `attempt` counts how often it was
/// tried until it parked or failed again.
pub(crate) async fn write_dead_letters(
    connection: &mut AsyncPgConnection,
    consumer: &str,
    records: &[&NewParked<'_>],
    attempt: i32,
) -> QueryResult<()> {
    const COLUMNS: &str = "event_id, aggregate_type, aggregate_id, aggregate_version, event_type, schema_version, topic, source, \
        content_type, data_schema, correlation_id, causation_id, traceparent, tracestate, metadata, occurred_at, payload, \
        dlt_original_topic, dlt_original_partition, dlt_original_offset, dlt_original_timestamp, dlt_original_id, \
        dlt_original_headers, dlt_original_key, dlt_original_bytes, dlt_error_kind, processing_error";
    if records.is_empty() {
        return Ok(());
    }
    let letters: Vec<Letter<'_>> = records.iter().map(|record| Letter::of(record.body)).collect();
    let of_envelopes = letters.iter().map(|letter| letter.envelope);
    let texts = |of: fn(&Envelope) -> Option<&str>| -> Vec<Option<&str>> {
        of_envelopes.clone().map(|envelope| of(envelope?)).collect()
    };
    let ids = |of: fn(&Envelope) -> Option<Uuid>| -> Vec<Option<Uuid>> {
        of_envelopes.clone().map(|envelope| of(envelope?)).collect()
    };
    let columns: Vec<String> = (4..4 + COLUMNS.split(',').count())
        .map(|number| format!("${number}"))
        .collect();
    diesel::sql_query(format!(
        "INSERT INTO dead_letters ({COLUMNS}, dlt_consumer, dlt_attempt, failed_at) SELECT {COLUMNS}, $1, $2, $3 \
         FROM unnest({}) WITH ORDINALITY AS g({COLUMNS}, n) ORDER BY n",
        columns.join(", "),
    ))
    .bind::<Text, _>(consumer)
    .bind::<Integer, _>(attempt)
    .bind::<Text, _>(Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true))
    .bind::<Array<SqlUuid>, _>(letters.iter().map(|_| Uuid::now_v7()).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(of_envelopes.clone().map(|e| e.map_or("", |e| e.entity_type.as_str())).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(letters.iter().map(|letter| letter.key.as_str()).collect::<Vec<_>>())
    .bind::<Array<Nullable<BigInt>>, _>(of_envelopes.clone().map(|e| version(e?)).collect::<Vec<_>>())
    .bind::<Array<Nullable<Text>>, _>(texts(|e| Some(&e.event_type)))
    .bind::<Array<Nullable<Integer>>, _>(of_envelopes.clone().map(|e| Some(e?.schema_version)).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(letters.iter().map(|letter| format!("{}{DEAD_LETTER_SUFFIX}", letter.topic)).collect::<Vec<_>>())
    .bind::<Array<Nullable<Text>>, _>(texts(|e| Some(&e.source)))
    .bind::<Array<Nullable<Text>>, _>(texts(|e| Some(&e.content_type)))
    .bind::<Array<Nullable<Text>>, _>(texts(|e| e.data_schema.as_deref()))
    .bind::<Array<Nullable<SqlUuid>>, _>(ids(|e| e.correlation_id))
    .bind::<Array<Nullable<SqlUuid>>, _>(ids(|e| e.causation_id))
    .bind::<Array<Nullable<Text>>, _>(texts(|e| e.traceparent.as_deref()))
    .bind::<Array<Nullable<Text>>, _>(texts(|e| e.tracestate.as_deref()))
    .bind::<Array<Jsonb>, _>(of_envelopes.clone().map(|e| e.map_or_else(|| json!({}), |e| json!(e.metadata))).collect::<Vec<_>>())
    .bind::<Array<Nullable<Timestamptz>>, _>(of_envelopes.clone().map(|e| Some(e?.occurred_at)).collect::<Vec<_>>())
    .bind::<Array<Nullable<Binary>>, _>(letters.iter().map(|letter| letter.payload).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(letters.iter().map(|letter| letter.topic.as_str()).collect::<Vec<_>>())
    .bind::<Array<Integer>, _>(letters.iter().map(|letter| letter.partition).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(letters.iter().map(|letter| letter.offset).collect::<Vec<_>>())
    .bind::<Array<Nullable<BigInt>>, _>(letters.iter().map(|letter| letter.timestamp).collect::<Vec<_>>())
    .bind::<Array<Nullable<SqlUuid>>, _>(ids(|e| Some(e.event_id)))
    .bind::<Array<Nullable<Text>>, _>(letters.iter().map(|letter| letter.headers.as_deref()).collect::<Vec<_>>())
    .bind::<Array<Nullable<Text>>, _>(letters.iter().map(|letter| letter.original_key.as_deref()).collect::<Vec<_>>())
    .bind::<Array<Nullable<BigInt>>, _>(letters.iter().map(|letter| letter.left_out).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(records.iter().map(|record| record.error_kind).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(records.iter().map(|record| clean(&record.error)).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

/// The version of an event, if its source counts.
fn version(envelope: &Envelope) -> Option<i64> {
    Some(envelope.version).filter(|version| *version != 0)
}

/// What the table says of records from before.
#[derive(Debug, Default)]
pub(crate) struct Before {
    /// Without a version, by their places; whether they were discarded.
    places: HashMap<Place, bool>,
    /// Discarded versions, by topic and entity.
    versions: HashSet<(String, String, i64)>,
    /// Of sources that do not count versions.
    events: Seen,
}

impl Before {
    pub(crate) fn of(&self, body: Body<'_>) -> Known {
        let discarded = match body {
            Body::Raw(_) => self.places.get(&body.place()).copied(),
            Body::Record(record) if record.envelope.version == 0 => {
                let event = (record.topic.as_ref().to_owned(), record.envelope.event_id);
                return self.events.get(&event).copied().unwrap_or(Known::Nothing);
            }
            // As nearly always: nothing was given up.
            Body::Record(_) if self.versions.is_empty() => None,
            Body::Record(record) => {
                let entity = record.envelope.entity_id.clone();
                let version = (record.topic.as_ref().to_owned(), entity, record.envelope.version);
                self.versions.contains(&version).then_some(true)
            }
        };
        match discarded {
            None => Known::Nothing,
            Some(false) => Known::Parked,
            Some(true) => Known::Discarded,
        }
    }
}

/// Looks up, by one look into an index each (decision 35), what marks do not tell: records without a version, events of sources that do not count, and, where `discarded` is asked for, versions that were given up.
pub(crate) async fn look_up(
    connection: &mut AsyncPgConnection,
    consumer: &str,
    generation: i32,
    bodies: &[Body<'_>],
    discarded: bool,
) -> QueryResult<Before> {
    #[derive(QueryableByName)]
    struct PlaceRow {
        #[diesel(sql_type = Text)]
        topic: String,
        #[diesel(sql_type = Integer)]
        partition: i32,
        #[diesel(sql_type = BigInt)]
        kafka_offset: i64,
        #[diesel(sql_type = Timestamptz)]
        record_time: DateTime<Utc>,
        #[diesel(sql_type = Bool)]
        discarded: bool,
    }
    #[derive(QueryableByName)]
    struct VersionRow {
        #[diesel(sql_type = Text)]
        topic: String,
        #[diesel(sql_type = Text)]
        entity_id: String,
        #[diesel(sql_type = BigInt)]
        version: i64,
    }
    let mut before = Before::default();
    let places: Vec<Place> = bodies
        .iter()
        .filter(|body| matches!(body, Body::Raw(_)))
        .map(|body| body.place())
        .collect();
    if !places.is_empty() {
        let rows: Vec<PlaceRow> = diesel::sql_query(
            "SELECT k.*, p.discarded \
             FROM unnest($3, $4, $5, $6) AS k(topic, partition, kafka_offset, record_time) \
             CROSS JOIN generate_series(1, $2) AS g(generation) CROSS JOIN LATERAL ( \
                 SELECT p.state = 'discarded' AS discarded FROM parked_records p \
                 WHERE p.consumer = $1 AND p.generation = g.generation AND p.topic = k.topic AND p.partition = k.partition \
                   AND p.kafka_offset = k.kafka_offset AND p.record_time = k.record_time \
                   AND (p.generation = $2 OR p.state = 'discarded') OFFSET 0) p",
        )
        .bind::<Text, _>(consumer)
        .bind::<Integer, _>(generation)
        .bind::<Array<Text>, _>(places.iter().map(|place| place.0.as_str()).collect::<Vec<_>>())
        .bind::<Array<Integer>, _>(places.iter().map(|place| place.1).collect::<Vec<_>>())
        .bind::<Array<BigInt>, _>(places.iter().map(|place| place.2).collect::<Vec<_>>())
        .bind::<Array<Timestamptz>, _>(places.iter().map(|place| place.3).collect::<Vec<_>>())
        .load(connection)
        .await?;
        for row in rows {
            let place = (row.topic, row.partition, row.kafka_offset, row.record_time);
            *before.places.entry(place).or_default() |= row.discarded;
        }
    }
    let uncounted: Vec<inbox::Event<'_>> = bodies
        .iter()
        .filter_map(|body| match body {
            Body::Record(record) if record.envelope.version == 0 => Some((
                record.topic.as_ref(),
                record.envelope.entity_id.as_str(),
                record.envelope.event_id,
            )),
            Body::Record(_) | Body::Raw(_) => None,
        })
        .collect();
    if !uncounted.is_empty() {
        before.events = inbox::look_up(connection, consumer, generation, &uncounted).await?;
    }
    if discarded {
        let keys = bodies.iter().filter_map(|body| match body {
            Body::Record(record) => Some((record.topic.as_ref(), record.envelope.entity_id.as_str())),
            Body::Raw(_) => None,
        });
        let (topics, entities): (Vec<&str>, Vec<&str>) = keys.collect::<BTreeSet<_>>().into_iter().unzip();
        let rows: Vec<VersionRow> = diesel::sql_query(
            "SELECT k.*, p.version FROM unnest($2, $3) AS k(topic, entity_id) CROSS JOIN LATERAL ( \
                 SELECT version FROM parked_records p WHERE p.consumer = $1 AND p.state = 'discarded' AND p.topic = k.topic \
                    AND p.entity_id = k.entity_id AND p.version IS NOT NULL OFFSET 0) p",
        )
        .bind::<Text, _>(consumer)
        .bind::<Array<Text>, _>(topics)
        .bind::<Array<Text>, _>(entities)
        .load(connection)
        .await?;
        let rows = rows.into_iter();
        before.versions = rows.map(|row| (row.topic, row.entity_id, row.version)).collect();
    }
    Ok(before)
}

/// Removes some of the records that were settled so long ago, with what was decided about them; returns how many. Discarded ones stay:
/// rebuilds pass over them.
pub(crate) async fn remove_settled(
    connection: &mut AsyncPgConnection,
    consumer: &str,
    settled_for: Duration,
) -> QueryResult<usize> {
    diesel::sql_query(
        "DELETE FROM parked_records WHERE id IN (SELECT id FROM parked_records \
         WHERE consumer = $1 AND state IN ('replayed', 'repeated', 'superseded') \
           AND settled_at < now() - make_interval(secs => $2) \
         LIMIT $3 FOR UPDATE SKIP LOCKED)",
    )
    .bind::<Text, _>(consumer)
    .bind::<Double, _>(settled_for.as_secs_f64())
    .bind::<BigInt, _>(REMOVE_AT_ONCE as i64)
    .execute(connection)
    .await
}

/// How much is parked.
#[derive(Debug, QueryableByName)]
pub(crate) struct Figures {
    #[diesel(sql_type = BigInt)]
    pub(crate) records: i64,
    #[diesel(sql_type = BigInt)]
    pub(crate) entities: i64,
    /// Since the first of them was parked.
    #[diesel(sql_type = BigInt)]
    pub(crate) oldest_seconds: i64,
}

/// How much is parked in the generation that is served.
pub(crate) async fn figures(connection: &mut AsyncPgConnection, consumer: &str) -> QueryResult<Figures> {
    diesel::sql_query(
        "SELECT count(*) AS records, count(DISTINCT (topic, coalesce(entity_id, id::text))) AS entities, \
                coalesce(extract(epoch FROM clock_timestamp() - min(parked_at)), 0)::bigint AS oldest_seconds \
         FROM parked_records WHERE consumer = $1 AND state = 'parked' \
          AND generation = coalesce((SELECT live FROM consumer_generations WHERE consumer = $1), 1)",
    )
    .bind::<Text, _>(consumer)
    .get_result(connection)
    .await
}
