//! Proves a database right, or says what is wrong: every order is rebuilt from its history and compared with its row, and
//! the history is compared with the outbox.
//!
//! All of it reads one repeatable-read snapshot, so the service may go on working meanwhile.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use diesel::QueryableByName;
use diesel::prelude::{ExpressionMethods, QueryDsl, SelectableHelper};
use diesel::sql_types::{BigInt, Text};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use event_store::StoredEvent;
use event_store::schema::events;
use serde::Serialize;
use service::config::Database;
use service::shutdown::BoxError;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::domain::{OrderId, rebuild};
use crate::store::{self, ENTITY_TYPE, OrderRow};

/// Orders read at a time.
const BATCH: i64 = 500;
/// Differences that are named; all are counted.
const NAMED: usize = 100;
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// What was found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub orders: u64,
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
    /// The order, as far as it is known.
    pub order_id: String,
    pub what: String,
}

impl Report {
    fn add(&mut self, order_id: impl fmt::Display, what: impl Into<String>) {
        self.differences += 1;
        if self.named.len() < NAMED {
            self.named.push(Difference {
                order_id: order_id.to_string(),
                what: what.into(),
            });
        }
    }

    /// Whether everything is as it should be.
    pub fn is_sound(&self) -> bool {
        self.differences == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            orders,
            events,
            outbox_rows,
            differences,
            named,
        } = self;
        writeln!(
            f,
            "{orders} orders, {events} events, {outbox_rows} outbox rows: {differences} differences"
        )?;
        for Difference { order_id, what } in named {
            writeln!(f, "  order {order_id}: {what}")?;
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

/// The command: verifies, prints the report on standard output, fails if something differs.
///
/// # Errors
/// [`Unsound`], or whatever keeps the database from answering.
#[expect(clippy::print_stdout, reason = "the report is the command's output")]
pub async fn command(config: &Database, json: bool, shutdown: CancellationToken) -> Result<(), BoxError> {
    let mut conn = service::db::connect_unbounded(config, "order-svc verify").await?;
    let report = tokio::select! {
        report = verify(&mut conn) => report?,
        () = shutdown.cancelled() => return Err("interrupted".into()),
    };
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    if report.is_sound() {
        Ok(())
    } else {
        Err(Unsound(report.differences).into())
    }
}

/// Verifies the whole database of a connection.
///
/// # Errors
/// Whatever keeps the database from answering. Differences are not errors: they are in the report.
pub async fn verify(conn: &mut AsyncPgConnection) -> diesel::QueryResult<Report> {
    conn.build_transaction()
        .repeatable_read()
        .read_only()
        .run(async |conn| {
            let mut report = Report::default();
            compare_orders(conn, &mut report).await?;
            find_orphans(conn, &mut report).await?;
            compare_outbox(conn, &mut report).await?;
            Ok(report)
        })
        .await
}

async fn compare_orders(conn: &mut AsyncPgConnection, report: &mut Report) -> diesel::QueryResult<()> {
    let mut after = Uuid::nil();
    let mut reported = Instant::now();
    loop {
        let rows = store::rows_after(conn, after, BATCH).await?;
        let Some(last) = rows.last() else { return Ok(()) };
        after = last.order_id;
        let ids: Vec<String> = rows.iter().map(|row| row.order_id.to_string()).collect();
        let history: Vec<(String, StoredEvent)> = events::table
            .filter(events::entity_type.eq(ENTITY_TYPE))
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
            report.orders += 1;
            if let Err(what) = compare_order(row, histories.get(&id).map_or(&[], Vec::as_slice)) {
                report.add(&id, what);
            }
        }
        if reported.elapsed() > REPORT_EVERY {
            tracing::info!(
                orders = report.orders,
                differences = report.differences,
                "verifying"
            );
            reported = Instant::now();
        }
    }
}

/// What differs between a row and what its history leads to.
fn compare_order(row: &OrderRow, history: &[StoredEvent]) -> Result<(), String> {
    if let Some((_, event)) = (1..)
        .zip(history)
        .find(|(version, event)| event.version != *version)
    {
        return Err(format!("its history has a gap before version {}", event.version));
    }
    let id = OrderId(row.order_id);
    let chained = |error: &dyn std::error::Error| match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    let decoded: Vec<_> = history
        .iter()
        .map(|event| store::decode(id, event))
        .collect::<Result<_, _>>()
        .map_err(|error| chained(&error))?;
    let rebuilt = rebuild(&decoded).map_err(|error| chained(&error))?;
    let rebuilt = OrderRow::from(&rebuilt.ok_or("it has a row and no history")?);
    if rebuilt == *row {
        return Ok(());
    }
    let columns = |row: &OrderRow| match serde_json::to_value(row) {
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
async fn find_orphans(conn: &mut AsyncPgConnection, report: &mut Report) -> diesel::QueryResult<()> {
    let orphans: Vec<Named> = diesel::sql_query(
        "SELECT entity_id, 'it has a history of ' || count(*) || ' events and no row' AS what FROM events e
         WHERE entity_type = 'order' AND NOT EXISTS (SELECT FROM orders o WHERE o.order_id::text = e.entity_id)
         GROUP BY entity_id ORDER BY entity_id",
    )
    .load(conn)
    .await?;
    for Named { entity_id, what } in orphans {
        report.add(entity_id, what);
    }
    Ok(())
}

/// Every event has one outbox row that says the same, and the ids of the rows rise with the versions.
async fn compare_outbox(conn: &mut AsyncPgConnection, report: &mut Report) -> diesel::QueryResult<()> {
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
