//! Proves a service's database right, or says what is wrong: every entity is rebuilt from its history and compared with its
//! row, and the history is compared with the outbox.
//!
//! All of it reads one repeatable-read snapshot, so the service may go on working meanwhile.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::time::{Duration, Instant};

use diesel::prelude::{ExpressionMethods, QueryDsl, QueryableByName, SelectableHelper};
use diesel::sql_types::{BigInt, Text};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use serde::Serialize;
use uuid::Uuid;

use crate::StoredEvent;
use crate::schema::events;

/// Rows read at a time.
const BATCH: i64 = 500;
/// Differences that are named; all are counted.
const NAMED: usize = 100;
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// The entities of a service, one type of them, as [`verify`] wants to know them.
pub trait Entities {
    /// A row of state. Its serialized form names the columns.
    type Row: PartialEq + Serialize + Send + Sync;
    /// The type of these entities in the event store.
    const ENTITY_TYPE: &'static str;
    /// SQL that gives the ids of all rows as text, in a column `id`.
    const IDS: &'static str;

    /// Rows in the order of their ids after `after`, at most `limit`.
    fn rows_after(
        conn: &mut AsyncPgConnection,
        after: Uuid,
        limit: i64,
    ) -> impl Future<Output = diesel::QueryResult<Vec<Self::Row>>> + Send;

    /// The entity's id.
    fn id(row: &Self::Row) -> Uuid;

    /// The row that a history leads to. `row` is the one there is, for what is not part of any event.
    ///
    /// # Errors
    /// What is wrong with the history.
    fn rebuild(row: &Self::Row, history: &[StoredEvent]) -> Result<Self::Row, String>;
}

/// What was found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Entities that have a row.
    pub entities: u64,
    pub events: u64,
    pub outbox_rows: u64,
    /// How many differences there are.
    pub differences: u64,
    /// The first of them.
    pub named: Vec<Difference>,
}

/// Something that should not be so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The entity, as far as it is known.
    pub entity_id: String,
    pub what: String,
}

impl Report {
    /// Notes that something about an entity should not be so.
    pub fn add(&mut self, entity_id: impl fmt::Display, what: impl Into<String>) {
        self.differences += 1;
        if self.named.len() < NAMED {
            self.named.push(Difference {
                entity_id: entity_id.to_string(),
                what: what.into(),
            });
        }
    }

    /// # Errors
    /// [`Unsound`] unless everything is as it should be.
    pub fn sound(&self) -> Result<(), Unsound> {
        match self.differences {
            0 => Ok(()),
            differences => Err(Unsound(differences)),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            entities,
            events,
            outbox_rows,
            differences,
            named,
        } = self;
        writeln!(
            f,
            "{entities} entities, {events} events, {outbox_rows} outbox rows: {differences} differences"
        )?;
        for Difference { entity_id, what } in named {
            writeln!(f, "  {entity_id}: {what}")?;
        }
        if *differences > named.len() as u64 {
            writeln!(f, "  … and {} more", differences - named.len() as u64)?;
        }
        Ok(())
    }
}

/// There are differences; the report has them.
#[derive(Debug, thiserror::Error)]
#[error("the database is not sound: {0} differences")]
pub struct Unsound(u64);

/// Verifies the whole database of a connection.
///
/// # Errors
/// Whatever keeps the database from answering. Differences are not errors: they are in the report.
pub async fn verify<E: Entities>(conn: &mut AsyncPgConnection) -> diesel::QueryResult<Report> {
    conn.build_transaction()
        .repeatable_read()
        .read_only()
        .run(async |conn| {
            let mut report = Report::default();
            check_entities::<E>(conn, &mut report).await?;
            check_outbox(conn, &mut report).await?;
            Ok(report)
        })
        .await
}

/// Rebuilds all entities of one type and compares, for services that have more to verify. The caller's transaction is its snapshot.
///
/// # Errors
/// As [`verify`].
pub async fn check_entities<E: Entities>(
    conn: &mut AsyncPgConnection,
    report: &mut Report,
) -> diesel::QueryResult<()> {
    compare_rows::<E>(conn, report).await?;
    find_orphans::<E>(conn, report).await
}

async fn compare_rows<E: Entities>(
    conn: &mut AsyncPgConnection,
    report: &mut Report,
) -> diesel::QueryResult<()> {
    let mut after = Uuid::nil();
    let mut reported = Instant::now();
    loop {
        let rows = E::rows_after(conn, after, BATCH).await?;
        let Some(last) = rows.last() else { return Ok(()) };
        after = E::id(last);
        let ids: Vec<String> = rows.iter().map(|row| E::id(row).to_string()).collect();
        let history: Vec<(String, StoredEvent)> = events::table
            .filter(events::entity_type.eq(E::ENTITY_TYPE))
            .filter(events::entity_id.eq_any(&ids))
            .order((events::entity_id, events::version))
            .select((events::entity_id, StoredEvent::as_select()))
            .load(conn)
            .await?;
        let mut histories: BTreeMap<String, Vec<StoredEvent>> = BTreeMap::new();
        for (id, event) in history {
            report.events += 1;
            histories.entry(id).or_default().push(event);
        }
        for (row, id) in rows.iter().zip(ids) {
            report.entities += 1;
            if let Err(what) = compare::<E>(row, histories.get(&id).map_or(&[], Vec::as_slice)) {
                report.add(&id, what);
            }
        }
        if reported.elapsed() > REPORT_EVERY {
            tracing::info!(
                entities = report.entities,
                differences = report.differences,
                "verifying"
            );
            reported = Instant::now();
        }
    }
}

/// What differs between a row and what its history leads to.
fn compare<E: Entities>(row: &E::Row, history: &[StoredEvent]) -> Result<(), String> {
    if let Some((_, event)) = (1..)
        .zip(history)
        .find(|(version, event)| event.version != *version)
    {
        return Err(format!("its history has a gap before version {}", event.version));
    }
    let rebuilt = E::rebuild(row, history)?;
    if rebuilt == *row {
        return Ok(());
    }
    let columns = |row: &E::Row| match serde_json::to_value(row) {
        Ok(serde_json::Value::Object(columns)) => columns,
        _ => serde_json::Map::new(),
    };
    // Names only: the values may be personal.
    let (row, rebuilt) = (columns(row), columns(&rebuilt));
    let different: Vec<&str> = row
        .iter()
        .filter(|(name, value)| rebuilt.get(*name) != Some(value))
        .map(|(name, _)| name.as_str())
        .collect();
    Err(format!(
        "its row differs from its history in {}",
        different.join(", ")
    ))
}

#[derive(QueryableByName)]
struct Named {
    #[diesel(sql_type = Text)]
    entity_id: String,
    #[diesel(sql_type = Text)]
    what: String,
}

#[derive(QueryableByName)]
struct Count {
    #[diesel(sql_type = BigInt)]
    n: i64,
}

/// Histories without a row.
async fn find_orphans<E: Entities>(
    conn: &mut AsyncPgConnection,
    report: &mut Report,
) -> diesel::QueryResult<()> {
    let sql = format!(
        "SELECT entity_id, 'it has a history of ' || count(*) || ' events and no row' AS what FROM events e
         WHERE entity_type = $1 AND NOT EXISTS (SELECT FROM ({}) entities WHERE entities.id = e.entity_id)
         GROUP BY entity_id ORDER BY entity_id",
        E::IDS
    );
    let orphans: Vec<Named> = diesel::sql_query(sql)
        .bind::<Text, _>(E::ENTITY_TYPE)
        .load(conn)
        .await?;
    for Named { entity_id, what } in orphans {
        report.add(entity_id, what);
    }
    Ok(())
}

/// Checks that every event has one outbox row that says the same, and that the ids of the rows rise with the versions. The caller's
/// transaction is its snapshot.
///
/// # Errors
/// As [`verify`].
pub async fn check_outbox(conn: &mut AsyncPgConnection, report: &mut Report) -> diesel::QueryResult<()> {
    let count: Count = diesel::sql_query("SELECT count(*) AS n FROM outbox")
        .get_result(conn)
        .await?;
    report.outbox_rows = u64::try_from(count.n).unwrap_or(0);
    let differences: Vec<Named> = diesel::sql_query(
        "SELECT coalesce(e.entity_id, o.aggregate_id) AS entity_id,
                CASE WHEN o.event_id IS NULL THEN 'version ' || e.version || ' has no outbox row'
                     WHEN e.event_id IS NULL THEN 'outbox row ' || o.id || ' has no event'
                     ELSE 'outbox row ' || o.id || ' differs from version ' || e.version END AS what
         FROM events e FULL JOIN outbox o ON o.event_id = e.event_id
         WHERE e.event_id IS NULL OR o.event_id IS NULL
            OR (o.aggregate_type, o.aggregate_id, o.aggregate_version, o.event_type, o.schema_version, o.payload,
                o.occurred_at, o.correlation_id, o.causation_id, o.traceparent)
               IS DISTINCT FROM
               (e.entity_type, e.entity_id, e.version, e.event_type, e.schema_version, e.payload,
                e.occurred_at, e.correlation_id, e.causation_id, e.traceparent)
         UNION ALL
         SELECT min(aggregate_id), 'event ' || event_id || ' is in the outbox ' || count(*) || ' times'
         FROM outbox GROUP BY event_id HAVING count(*) > 1
         UNION ALL
         SELECT aggregate_id, 'outbox row ' || id || ' comes before that of an earlier version'
         FROM (SELECT aggregate_id, id,
                      lag(id) OVER (PARTITION BY aggregate_type, aggregate_id ORDER BY aggregate_version) AS before
               FROM outbox) ordered
         WHERE id < before
         ORDER BY entity_id, what",
    )
    .load(conn)
    .await?;
    for Named { entity_id, what } in differences {
        report.add(entity_id, what);
    }
    Ok(())
}
