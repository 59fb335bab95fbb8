//! Removal of published rows once they are older than the retention: by id range, on a connection of its own.

use tokio::time::sleep;

use super::*;
use crate::schema::{FLOORS, RELAY, REMOVED, remove_function};

/// Ids of one removal at the most: a few milliseconds.
const BATCH: i64 = 5_000;
/// Floors remembered per retention: rows stay up to so much longer, 1 / STEPS of it.
const STEPS: u32 = 50;
const INTERVAL: std::ops::RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(60);

/// Removes what is due, again and again, until it is dropped. An error is told and waited out: late removal costs space,
/// and nothing else.
pub(crate) async fn keep_removing(name: String, config: Outbox) {
    let Some(retention) = config.retention else { return };
    let interval = (retention / STEPS).clamp(*INTERVAL.start(), *INTERVAL.end());
    let mut db = None;
    loop {
        if let Err(error) = remove_due(&mut db, &name, &config, retention).await {
            db = None;
            tracing::warn!(
                outbox = name,
                error = %service::telemetry::chain(&error),
                "published rows could not be removed; they take space until they can"
            );
        }
        sleep(interval).await;
    }
}

async fn remove_due(
    db: &mut Option<Database>,
    name: &str,
    config: &Outbox,
    retention: Duration,
) -> Result<(), SourceError> {
    let db = match db {
        Some(db) => db,
        none => {
            let application = format!("outbox-relay {name} retention");
            none.insert(
                Database::connect(&config.connection, &application, config.statement_timeout()).await?,
            )
        }
    };
    let (relay, floors) = (config.table.sibling(RELAY), config.table.sibling(FLOORS));
    // A floor is worth remembering when it moved, and the last one is some time ago.
    let remember = format!(
        "INSERT INTO {floors} (name, floor)
         SELECT r.name, r.floor FROM {relay} r
          WHERE r.name = $1
            AND NOT EXISTS (SELECT FROM {floors} f WHERE f.name = $1
                               AND (f.floor >= r.floor
                                    OR f.reached_at > clock_timestamp() - $2::bigint * interval '1 microsecond'))"
    );
    let spacing = micros(retention / STEPS);
    db.execute(
        "remember the floor",
        &remember,
        &[(&name, Type::TEXT), (&spacing, Type::INT8)],
    )
    .await?;
    let due = format!(
        "SELECT max(floor) FROM {floors}
          WHERE name = $1 AND reached_at < clock_timestamp() - $2::bigint * interval '1 microsecond'"
    );
    let due: Option<i64> = db
        .query_one(
            "ask which rows are due for removal",
            &due,
            &[(&name, Type::TEXT), (&micros(retention), Type::INT8)],
        )
        .await?
        .get(0);
    let Some(due) = due else { return Ok(()) };
    let remove = format!("SELECT {}($1, $2)", remove_function(&config.table));
    let mut before = None;
    loop {
        let began = Instant::now();
        let removed: i64 = db
            .query_one(
                "remove published rows",
                &remove,
                &[(&due, Type::INT8), (&BATCH, Type::INT8)],
            )
            .await?
            .get(0);
        // Another relay of this table may be behind: then it goes no further now.
        if removed >= due || before == Some(removed) {
            break;
        }
        before = Some(removed);
        crate::failpoints::pass(crate::failpoints::IN_REMOVAL);
        // Half of the time at the most.
        sleep(began.elapsed()).await;
    }
    let forget = format!("DELETE FROM {floors} WHERE name = $1 AND floor < $2");
    db.execute(
        "forget floors",
        &forget,
        &[(&name, Type::TEXT), (&due, Type::INT8)],
    )
    .await?;
    Ok(())
}

/// How far rows of this table were removed.
pub(crate) async fn removed_to(db: &Database, table: &TableName) -> Result<i64, SourceError> {
    let text = format!(
        "SELECT coalesce((SELECT removed_to FROM {} WHERE outbox = $1), 0)",
        table.sibling(REMOVED)
    );
    let outbox = table.to_string();
    let row = db
        .query_one("ask how far rows were removed", &text, &[(&outbox, Type::TEXT)])
        .await?;
    Ok(row.get(0))
}

/// Up to which id rows were numbered when the column was added: as they lie in the table, not as they were written. 0
/// where the table always had its ids.
pub(crate) async fn numbered_to(db: &Database, table: &TableName) -> Result<i64, SourceError> {
    let text = format!(
        "SELECT coalesce((SELECT r.numbered_to FROM {} r WHERE r.outbox = $1), 0)",
        table.sibling(REMOVED)
    );
    let outbox = table.to_string();
    let row = db
        .query_one(
            "ask which rows were numbered later",
            &text,
            &[(&outbox, Type::TEXT)],
        )
        .await?;
    Ok(row.get(0))
}
