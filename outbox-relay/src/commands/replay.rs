//! `replay`: publishes rows again that were published, as long as the retention keeps them.

use std::str::FromStr;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde_json::json;
use tokio_postgres::types::Type;

use super::{Answer, CommandError, LIMIT, pick};
use crate::config::Config;
use crate::database::{Database, Param};
use crate::publisher::{Publisher, TopicState};
use crate::record::{Record, select_list};
use crate::row::OutboxRow;
use crate::schema::{QUARANTINE, RELAY};
use crate::source::check;
use crate::sql::identifier;

const FETCH_ROWS: i64 = 1_000;
const FETCH_BYTES: usize = 8 << 20;
/// Without any acknowledgement for so long, it is given up; it may be started again.
const STALL: Duration = Duration::from_secs(60);
const COLLECT: Duration = Duration::from_millis(1);

/// Which rows: all conditions that are given must hold.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    pub since: Option<Since>,
    pub key: Option<String>,
    pub ids: Option<Ids>,
}

/// A time, or how long ago.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Since(pub DateTime<Utc>);

impl FromStr for Since {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "must be a duration like 2h, or a time like 2026-01-31T12:00:00Z";
        if let Ok(ago) = humantime::parse_duration(text) {
            let ago = chrono::Duration::from_std(ago).map_err(|_| FORM)?;
            return Utc::now().checked_sub_signed(ago).map(Self).ok_or(FORM);
        }
        DateTime::parse_from_rfc3339(text)
            .map(|time| Self(time.with_timezone(&Utc)))
            .map_err(|_| FORM)
    }
}

/// `7`, or `7..9`, the last one included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    pub first: i64,
    pub last: i64,
}

impl FromStr for Ids {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (first, last) = text.split_once("..").unwrap_or((text, text));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if first <= last => Ok(Self { first, last }),
            _ => Err("must be an id like 7, or a range like 7..9, whose end is included"),
        }
    }
}

/// Publishes the selected rows again, in the order of their ids, the same bytes as before. Only what was published is:
/// what waits for the relay or in quarantine is left to it, and what was skipped stays skipped.
///
/// # Errors
/// When PostgreSQL or Kafka cannot be asked; what was published by then stays published.
pub async fn replay(
    config: &Config,
    name: Option<&str>,
    selection: &Selection,
    dry_run: bool,
) -> Result<Answer, CommandError> {
    let (name, outbox) = pick(config, name)?;
    if selection.since.is_none() && selection.key.is_none() && selection.ids.is_none() {
        return Err(CommandError::Usage(
            "say which rows: --since, --key or --ids".to_owned(),
        ));
    }
    let rendering = config.rendering(name, outbox);
    let db = Database::connect(&outbox.connection, "outbox-relay replay", LIMIT).await?;
    let checked = check::check(&db, &outbox.table, &outbox.layout).await?;
    let columns = &outbox.layout.columns;
    let id = identifier(&columns.id);
    if selection.since.is_some() && columns.occurred_at.is_none() {
        return Err(CommandError::Usage(
            "--since needs a column with the time: outbox.NAME.columns.occurred_at".to_owned(),
        ));
    }
    let text = format!(
        "SELECT x.* FROM (SELECT {list} FROM {table} t WHERE t.{id} > $1 AND t.{id} <= $5 ORDER BY t.{id}) x
          WHERE ($3::timestamptz IS NULL OR x.c16 >= $3) AND ($4::text IS NULL OR x.c3 = $4)
            AND EXISTS (SELECT FROM {relay} r WHERE r.name = $6 AND (x.c0 <= r.floor OR r.published @> x.c0))
            AND NOT EXISTS (SELECT FROM {quarantine} q WHERE q.name = $6 AND q.id = x.c0)
          ORDER BY x.c0 LIMIT $2",
        list = select_list(&outbox.layout, &checked.types).list,
        table = outbox.table.quoted(),
        relay = outbox.table.sibling(RELAY),
        quarantine = outbox.table.sibling(QUARANTINE),
    );
    let read = db.prepare("prepare to read the outbox", text).await?;
    let mut publisher = Publisher::new(&config.producer()).map_err(failed)?;
    let since = selection.since.map(|since| since.0);
    let mut last = selection.ids.map_or(0, |ids| ids.first - 1);
    let upper = selection.ids.map_or(i64::MAX, |ids| ids.last);
    let (mut count, mut first_id) = (0u64, None);
    loop {
        let params: Vec<Param<'_>> = vec![
            (&last, Type::INT8),
            (&FETCH_ROWS, Type::INT8),
            (&since, Type::TIMESTAMPTZ),
            (&selection.key, Type::TEXT),
            (&upper, Type::INT8),
            (&name, Type::TEXT),
        ];
        let (rows, _) = db.rows("read the outbox", &read, &params, FETCH_BYTES).await?;
        let rows: Vec<OutboxRow> = rows.into_iter().map(OutboxRow::Selected).collect();
        let Some(newest) = rows.last() else { break };
        first_id = first_id.or_else(|| rows.first().map(OutboxRow::id));
        last = newest.id();
        count += rows.len() as u64;
        if dry_run {
            continue;
        }
        let (mut waiting, mut moved) = (0, Instant::now());
        let stalled = |moved: Instant| match moved.elapsed() > STALL {
            true => Err(CommandError::Refused(format!(
                "Kafka acknowledged nothing for {STALL:?}; rows up to about {last} were replayed"
            ))),
            false => Ok(()),
        };
        for row in &rows {
            let mut record = Record::from_row(row, &rendering);
            if publisher.topic(&record.topic).await.map_err(failed)? != TopicState::There {
                return Err(CommandError::Refused(format!(
                    "topic {} does not take records; {} rows were replayed",
                    record.topic,
                    count - rows.len() as u64
                )));
            }
            while !publisher.send(&mut record, token_of(row)).map_err(failed)? {
                let acknowledged = collect(&mut publisher)?;
                if acknowledged > 0 {
                    moved = Instant::now();
                }
                stalled(moved)?;
                waiting -= acknowledged;
                tokio::time::sleep(COLLECT).await;
            }
            waiting += 1;
        }
        while waiting > 0 {
            let acknowledged = collect(&mut publisher)?;
            waiting -= acknowledged;
            if acknowledged > 0 {
                moved = Instant::now();
            }
            stalled(moved)?;
            tokio::time::sleep(COLLECT).await;
        }
    }
    publisher.abandon().await;
    let verb = if dry_run {
        "would be published again"
    } else {
        "were published again"
    };
    let text = match first_id {
        Some(first) => format!("{count} rows of outbox {name}, ids {first} to {last}, {verb}"),
        None => format!("no row of outbox {name} matches that was published and is still there"),
    };
    Ok(Answer::new(
        json!({
            "outbox": name, "rows": count, "dry_run": dry_run, "first_id": first_id,
            "last_id": first_id.map(|_| last),
        }),
        text,
    ))
}

/// Here a record's token is its id. Ids start at 1; a table whose ids do not is refused at start.
fn token_of(row: &OutboxRow) -> usize {
    usize::try_from(row.id()).unwrap_or_default()
}

fn id_of(token: usize) -> i64 {
    i64::try_from(token).unwrap_or(i64::MAX)
}

fn collect(publisher: &mut Publisher) -> Result<usize, CommandError> {
    let mut deliveries = publisher.collect();
    match deliveries.failure(id_of) {
        Some(failure) => Err(failed(failure)),
        None => Ok(deliveries.acknowledged.len()),
    }
}

fn failed(error: crate::publisher::PublishError) -> CommandError {
    CommandError::Refused(service::telemetry::chain(&error).to_string())
}
