//! Records that Kafka does not take, with those behind them of the same key: kept as they would be published.

use super::*;
use crate::database::Param;
use crate::record::{HeaderPair, Record};
use crate::schema::QUARANTINE;

/// Payloads of records of the quarantine that are read at once, give or take one.
const KEPT_BYTES: i64 = 4 << 20;

/// A record on its way into the quarantine.
#[derive(Debug, Clone)]
pub(crate) struct Parked {
    pub(crate) id: i64,
    pub(crate) aggregate_type: String,
    pub(crate) key: String,
    pub(crate) version: Option<i64>,
    pub(crate) topic: String,
    /// `[[name, value], …]`
    pub(crate) headers: String,
    pub(crate) payload: Option<Vec<u8>>,
    /// `None`: it waits behind another one.
    pub(crate) problem: Option<String>,
    /// Its key is being retried, and it goes with the others.
    pub(crate) is_retried: bool,
}

impl Parked {
    pub(crate) fn new(record: &Record<'_>, problem: Option<String>, is_retried: bool) -> Self {
        Self {
            id: record.id,
            aggregate_type: record.aggregate_type.to_owned(),
            key: record.key.to_owned(),
            version: record.version,
            topic: record.topic.clone().into_owned(),
            headers: serde_json::Value::from_iter(
                record
                    .header_pairs()
                    .into_iter()
                    .map(|(name, value)| serde_json::json!([name, value])),
            )
            .to_string(),
            payload: record.payload.map(<[u8]>::to_vec),
            problem,
            is_retried,
        }
    }

    /// About what it takes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.payload.as_ref().map_or(0, Vec::len) + self.headers.len() + self.key.len() + 256
    }
}

/// The fields of parked records as arrays, for one statement.
pub(super) struct Columns<'a> {
    ids: Vec<i64>,
    types: Vec<&'a str>,
    keys: Vec<&'a str>,
    versions: Vec<Option<i64>>,
    topics: Vec<&'a str>,
    headers: Vec<&'a str>,
    payloads: Vec<Option<&'a [u8]>>,
    problems: Vec<Option<&'a str>>,
    retried: Vec<bool>,
}

pub(super) fn columns(parked: &[Parked]) -> Columns<'_> {
    Columns {
        ids: parked.iter().map(|p| p.id).collect(),
        types: parked.iter().map(|p| p.aggregate_type.as_str()).collect(),
        keys: parked.iter().map(|p| p.key.as_str()).collect(),
        versions: parked.iter().map(|p| p.version).collect(),
        topics: parked.iter().map(|p| p.topic.as_str()).collect(),
        headers: parked.iter().map(|p| p.headers.as_str()).collect(),
        payloads: parked.iter().map(|p| p.payload.as_deref()).collect(),
        problems: parked.iter().map(|p| p.problem.as_deref()).collect(),
        retried: parked.iter().map(|p| p.is_retried).collect(),
    }
}

impl Columns<'_> {
    pub(super) fn params(&self) -> [Param<'_>; 9] {
        [
            (&self.ids, Type::INT8_ARRAY),
            (&self.types, Type::TEXT_ARRAY),
            (&self.keys, Type::TEXT_ARRAY),
            (&self.versions, Type::INT8_ARRAY),
            (&self.topics, Type::TEXT_ARRAY),
            (&self.headers, Type::TEXT_ARRAY),
            (&self.payloads, Type::BYTEA_ARRAY),
            (&self.problems, Type::TEXT_ARRAY),
            (&self.retried, Type::BOOL_ARRAY),
        ]
    }
}

/// What an operator has decided about the first record of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    Retry,
    /// A marker takes its place.
    Skip {
        reason: String,
    },
}

/// A record of the quarantine.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) id: i64,
    pub(crate) topic: String,
    pub(crate) version: Option<i64>,
    pub(crate) headers: Vec<HeaderPair>,
    pub(crate) payload: Option<Vec<u8>>,
    pub(crate) decision: Option<Decision>,
}

fn kept(row: &Row) -> Kept {
    let headers: serde_json::Value = row.get(3);
    let pairs = headers.as_array().into_iter().flatten().filter_map(|pair| {
        let text = |position: usize| pair.get(position)?.as_str().map(str::to_owned);
        Some((text(0)?, text(1)))
    });
    let reason: Option<String> = row.get(6);
    Kept {
        id: row.get(0),
        topic: row.get(1),
        version: row.get(2),
        headers: pairs.collect(),
        payload: row.get(4),
        decision: match row.get(5) {
            "retry" => Some(Decision::Retry),
            "skip" => Some(Decision::Skip {
                reason: reason.unwrap_or_default(),
            }),
            _ => None,
        },
    }
}

/// A key in quarantine, for people.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct FrozenKey {
    pub(crate) aggregate_type: String,
    pub(crate) key: String,
    pub(crate) topic: String,
    pub(crate) rows: i64,
    pub(crate) first_id: i64,
    pub(crate) first_version: Option<i64>,
    pub(crate) since_seconds: f64,
    pub(crate) problem: String,
    /// `frozen`, `retrying` or `skipping`.
    pub(crate) state: String,
    pub(crate) attempts: i32,
}

/// One record in quarantine, for people; no payload.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct FrozenRow {
    pub(crate) id: i64,
    pub(crate) version: Option<i64>,
    pub(crate) topic: String,
    pub(crate) payload_bytes: Option<i32>,
    pub(crate) state: String,
    pub(crate) problem: Option<String>,
    pub(crate) attempts: i32,
    pub(crate) reason: Option<String>,
    pub(crate) decided_by: Option<String>,
    pub(crate) headers: serde_json::Value,
}

impl Source {
    /// The keys in quarantine: type and key.
    pub(crate) async fn frozen(&self) -> Result<Vec<(String, String)>, SourceError> {
        let text = format!(
            "SELECT DISTINCT aggregate_type, key FROM {} WHERE name = $1 AND state <> 'skipped'",
            self.table.sibling(QUARANTINE)
        );
        let rows = self
            .db
            .query("load the quarantine", &text, &[(&self.name, Type::TEXT)])
            .await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// Which of these rows are in quarantine, with their entities.
    pub(crate) async fn in_quarantine(
        &self,
        ids: Vec<i64>,
    ) -> Result<Vec<((String, String), i64)>, SourceError> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let text = format!(
            "SELECT aggregate_type, key, id FROM {} WHERE name = $1 AND id = ANY($2) AND state <> 'skipped'",
            self.table.sibling(QUARANTINE)
        );
        let params = [(&self.name as _, Type::TEXT), (&ids as _, Type::INT8_ARRAY)];
        let rows = self.db.query("look into the quarantine", &text, &params).await?;
        Ok(rows
            .iter()
            .map(|row| ((row.get(0), row.get(1)), row.get(2)))
            .collect())
    }

    /// Keys about which somebody has decided.
    pub(crate) async fn decided(&self, limit: i64) -> Result<Vec<(String, String)>, SourceError> {
        let text = format!(
            "SELECT DISTINCT aggregate_type, key FROM {} WHERE name = $1 AND state IN ('retry', 'skip') LIMIT $2",
            self.table.sibling(QUARANTINE)
        );
        let params = [(&self.name as _, Type::TEXT), (&limit as _, Type::INT8)];
        let rows = self.db.query("look for decisions", &text, &params).await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// Rows of a key that is being retried are part of that.
    pub(crate) async fn retry_rows_behind(&self, entity: &(String, String)) -> Result<(), SourceError> {
        let text = format!(
            "UPDATE {} SET state = 'retry' WHERE name = $1 AND aggregate_type = $2 AND key = $3 AND state = 'frozen'",
            self.table.sibling(QUARANTINE)
        );
        let params = [
            (&self.name as _, Type::TEXT),
            (&entity.0 as _, Type::TEXT),
            (&entity.1 as _, Type::TEXT),
        ];
        self.db.execute("retry what is behind", &text, &params).await?;
        Ok(())
    }

    /// The first records of a key, in the order in which they must be published.
    pub(crate) async fn kept(
        &self,
        entity: &(String, String),
        by_version: bool,
        limit: i64,
    ) -> Result<Vec<Kept>, SourceError> {
        // As many as fit, and one at least.
        let text = format!(
            "SELECT id, topic, version, headers, payload, state, reason
               FROM (SELECT f.*, sum(octet_length(payload)) OVER (ORDER BY {order}) - octet_length(payload) AS bytes_before
                       FROM (SELECT * FROM {table}
                              WHERE name = $1 AND aggregate_type = $2 AND key = $3 AND state <> 'skipped'
                              ORDER BY {order} LIMIT $4) f) k
              WHERE coalesce(bytes_before, 0) < $5 ORDER BY {order}",
            table = self.table.sibling(QUARANTINE),
            order = order(by_version)
        );
        let params = [
            (&self.name as _, Type::TEXT),
            (&entity.0 as _, Type::TEXT),
            (&entity.1 as _, Type::TEXT),
            (&limit as _, Type::INT8),
            (&KEPT_BYTES as _, Type::INT8),
        ];
        let rows = self.db.query("read the quarantine", &text, &params).await?;
        Ok(rows.iter().map(kept).collect())
    }

    /// A record was refused again: its key stays frozen.
    pub(crate) async fn refused_again(
        &self,
        entity: &(String, String),
        id: i64,
        problem: &str,
    ) -> Result<(), SourceError> {
        let text = format!(
            "UPDATE {} SET state = 'frozen', attempts = attempts + (id = $4)::int,
                    problem = CASE WHEN id = $4 THEN $5 ELSE problem END
              WHERE name = $1 AND aggregate_type = $2 AND key = $3 AND state <> 'skipped'
                AND (id = $4 OR state <> 'frozen')",
            self.table.sibling(QUARANTINE)
        );
        let params = [
            (&self.name as _, Type::TEXT),
            (&entity.0 as _, Type::TEXT),
            (&entity.1 as _, Type::TEXT),
            (&id as _, Type::INT8),
            (&problem as _, Type::TEXT),
        ];
        self.db.execute("note a refusal", &text, &params).await?;
        Ok(())
    }
}

/// Versions count where they are checked; ids do otherwise.
fn order(by_version: bool) -> &'static str {
    if by_version { "version, id" } else { "id" }
}

/// The quarantine of one outbox, as operators use it.
pub(crate) struct Quarantine<'a> {
    pub(crate) db: &'a Database,
    pub(crate) table: &'a TableName,
    pub(crate) name: &'a str,
    pub(crate) by_version: bool,
}

impl Quarantine<'_> {
    /// Keys and rows.
    pub(crate) async fn counts(&self) -> Result<(i64, i64), SourceError> {
        let text = format!(
            "SELECT count(DISTINCT (aggregate_type, key)), count(*) FROM {} WHERE name = $1 AND state <> 'skipped'",
            self.table.sibling(QUARANTINE)
        );
        let row = self
            .db
            .query_one("count the quarantine", &text, &[(&self.name, Type::TEXT)])
            .await?;
        Ok((row.get(0), row.get(1)))
    }

    /// The keys that have been there longest.
    pub(crate) async fn keys(&self, limit: i64) -> Result<Vec<FrozenKey>, SourceError> {
        let text = format!(
            "SELECT k.aggregate_type, k.key, f.topic, k.rows, f.id, f.version, k.since::float8,
                    coalesce(f.problem, 'its key was frozen'), f.state, f.attempts
               FROM (SELECT aggregate_type, key, count(*) AS rows, min(id) AS first,
                            max(extract(epoch FROM clock_timestamp() - frozen_at)) AS since
                       FROM {table} WHERE name = $1 AND state <> 'skipped' GROUP BY 1, 2) k
              CROSS JOIN LATERAL (
                    SELECT * FROM {table} q WHERE q.name = $1 AND q.aggregate_type = k.aggregate_type AND q.key = k.key
                       AND q.state <> 'skipped' ORDER BY {order} LIMIT 1) f
              ORDER BY k.since DESC, k.first LIMIT $2",
            table = self.table.sibling(QUARANTINE),
            order = order(self.by_version),
        );
        let params = [(&self.name as _, Type::TEXT), (&limit as _, Type::INT8)];
        let rows = self.db.query("list the quarantine", &text, &params).await?;
        Ok(rows
            .iter()
            .map(|row| FrozenKey {
                aggregate_type: row.get(0),
                key: row.get(1),
                topic: row.get(2),
                rows: row.get(3),
                first_id: row.get(4),
                first_version: row.get(5),
                since_seconds: row.get(6),
                problem: row.get(7),
                state: match row.get(8) {
                    "retry" => "retrying",
                    "skip" => "skipping",
                    _ => "frozen",
                }
                .to_owned(),
                attempts: row.get(9),
            })
            .collect())
    }

    /// Every row of a key, those that were skipped included.
    pub(crate) async fn rows(&self, key: &str, limit: i64) -> Result<Vec<FrozenRow>, SourceError> {
        let text = format!(
            "SELECT id, version, topic, octet_length(payload), state, problem, attempts, reason, decided_by, headers
               FROM {} WHERE name = $1 AND key = $2 ORDER BY aggregate_type, {} LIMIT $3",
            self.table.sibling(QUARANTINE),
            order(self.by_version)
        );
        let params = [
            (&self.name as _, Type::TEXT),
            (&key as _, Type::TEXT),
            (&limit as _, Type::INT8),
        ];
        let rows = self
            .db
            .query("show a key of the quarantine", &text, &params)
            .await?;
        Ok(rows
            .iter()
            .map(|row| FrozenRow {
                id: row.get(0),
                version: row.get(1),
                topic: row.get(2),
                payload_bytes: row.get(3),
                state: row.get(4),
                problem: row.get(5),
                attempts: row.get(6),
                reason: row.get(7),
                decided_by: row.get(8),
                headers: row.get(9),
            })
            .collect())
    }

    /// Asks the leader to publish a key again, or all of them. Returns how many keys.
    pub(crate) async fn retry(
        &self,
        aggregate_type: Option<&str>,
        key: Option<&str>,
        by: &str,
    ) -> Result<i64, SourceError> {
        let text = format!(
            // All rows of a key: should this relay stop in the middle, the next one goes on.
            "WITH first AS (
                SELECT DISTINCT ON (aggregate_type, key) aggregate_type, key, state FROM {table}
                 WHERE name = $1 AND state <> 'skipped' AND ($2::text IS NULL OR aggregate_type = $2)
                   AND ($3::text IS NULL OR key = $3)
                 ORDER BY aggregate_type, key, {order}),
             asked AS (
                UPDATE {table} q SET state = 'retry', decided_by = $4, decided_at = clock_timestamp()
                  FROM first f
                 WHERE q.name = $1 AND q.aggregate_type = f.aggregate_type AND q.key = f.key AND q.state <> 'skipped'
                   AND f.state <> 'skip'
             RETURNING q.aggregate_type, q.key)
             SELECT count(DISTINCT (aggregate_type, key)) FROM asked",
            table = self.table.sibling(QUARANTINE),
            order = order(self.by_version)
        );
        let params = [
            (&self.name as _, Type::TEXT),
            (&aggregate_type as _, Type::TEXT),
            (&key as _, Type::TEXT),
            (&by as _, Type::TEXT),
        ];
        Ok(self.db.query_one("ask for a retry", &text, &params).await?.get(0))
    }

    /// Asks the leader to publish a marker instead of a row, which must be the first of its key. Returns whether it is.
    pub(crate) async fn skip(&self, id: i64, reason: &str, by: &str) -> Result<bool, SourceError> {
        let text = format!(
            "WITH first AS (
                SELECT q.aggregate_type, q.key FROM {table} q
                 WHERE q.name = $1 AND q.id = $2 AND q.state <> 'skipped'
                   AND q.id = (SELECT f.id FROM {table} f
                                WHERE f.name = $1 AND f.aggregate_type = q.aggregate_type AND f.key = q.key
                                  AND f.state <> 'skipped' ORDER BY {order} LIMIT 1)),
             behind AS (
                UPDATE {table} q SET state = 'retry', decided_by = $4, decided_at = clock_timestamp()
                  FROM first f
                 WHERE q.name = $1 AND q.aggregate_type = f.aggregate_type AND q.key = f.key AND q.id <> $2
                   AND q.state = 'frozen')
             UPDATE {table} q SET state = 'skip', reason = $3, decided_by = $4, decided_at = clock_timestamp()
               FROM first WHERE q.name = $1 AND q.id = $2",
            table = self.table.sibling(QUARANTINE),
            order = order(self.by_version)
        );
        let params = [
            (&self.name as _, Type::TEXT),
            (&id as _, Type::INT8),
            (&reason as _, Type::TEXT),
            (&by as _, Type::TEXT),
        ];
        Ok(self.db.execute("ask for a skip", &text, &params).await? == 1)
    }
}
