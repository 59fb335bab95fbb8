//! `verify`: compares an outbox with its topics.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher as _, RandomState};

use rdkafka::message::Message as _;
use serde_json::json;
use tokio_postgres::types::Type;

use super::{Answer, CommandError, EXIT_DIFFERENCES, LIMIT, pick, topics};
use crate::config::{Config, Outbox, Versions};
use crate::database::Database;
use crate::protocol::RangeSet;
use crate::record::{Record, Rendering, select_list};
use crate::row::OutboxRow;
use crate::schema::{QUARANTINE, RELAY};
use crate::source::check;
use crate::source::retention::numbered_to;
use crate::sql::identifier;

const FETCH_ROWS: i64 = 5_000;
const FETCH_BYTES: usize = 8 << 20;
/// Ids that are named of each kind of difference.
const NAMED: usize = 20;

/// A row of the outbox, as little of it as will do.
#[derive(Debug, Clone)]
struct Expected {
    id: i64,
    /// Topic and key.
    entity: u64,
    payload: u64,
    /// Where versions count.
    version: Option<i64>,
    is_done: bool,
    /// Of the first record that has it, and of how many more.
    found: Option<u64>,
    repeats: u64,
}

#[derive(Debug, Default)]
struct Differences {
    /// Counted as published, and not on Kafka.
    missing: BTreeSet<i64>,
    /// First records of an entity that came in another order than their rows.
    out_of_order: BTreeSet<i64>,
    /// Records whose payload is not their row's, or whose repeats are not the same.
    changed: BTreeSet<i64>,
}

/// Compares every row that the outbox still has with the topics that rows name. It takes about 150 bytes of memory a row.
///
/// # Errors
/// When PostgreSQL or Kafka cannot be asked. Differences are no error but exit code [`EXIT_DIFFERENCES`].
pub async fn verify(config: &Config, name: Option<&str>) -> Result<Answer, CommandError> {
    let (name, outbox) = pick(config, name)?;
    let rendering = config.rendering(name, outbox);
    let db = Database::connect(&outbox.connection, "outbox-relay verify", LIMIT).await?;
    // What is done by now must be on Kafka: so this first, then the rows, then the topics.
    let done = done(&db, name, outbox).await?;
    let hasher = RandomState::new();
    // Ids below say nothing of the order in which rows were written.
    let numbered_to = numbered_to(&db, &outbox.table).await?;
    let mut rows = Rows {
        events: HashMap::new(),
        topics: BTreeSet::new(),
    };
    rows.read(&db, outbox, &rendering, &done, &hasher).await?;

    let producer = config.producer();
    let header = rendering.event_id_header();
    let (rows, records, unknown, out_of_order) = tokio::task::spawn_blocking(move || {
        let names: Vec<String> = rows.topics.iter().cloned().collect();
        let (mut records, mut unknown) = (0u64, 0u64);
        let mut newest: HashMap<u64, (Option<i64>, i64)> = HashMap::new();
        let mut out_of_order = BTreeSet::new();
        topics::read(&producer, &names, |message| {
            records += 1;
            let event = topics::header(message, header);
            let Some(row) = event.and_then(|event| rows.events.get_mut(event)) else {
                unknown += 1;
                return;
            };
            // A marker stands for its row.
            let payload = match topics::header(message, crate::record::SKIPPED_REASON) {
                Some(_) => row.payload,
                None => hasher.hash_one(message.payload()),
            };
            match row.found {
                Some(first) => {
                    row.repeats += 1;
                    if first != payload {
                        row.found = Some(u64::MAX);
                    }
                }
                None if row.id <= numbered_to => row.found = Some(payload),
                None => {
                    row.found = Some(payload);
                    let place = (row.version, row.id);
                    let last = newest.entry(row.entity).or_insert(place);
                    if *last > place {
                        out_of_order.insert(row.id);
                    }
                    *last = (*last).max(place);
                }
            }
        })?;
        Ok::<_, CommandError>((rows, records, unknown, out_of_order))
    })
    .await
    .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;

    let mut differences = Differences {
        out_of_order,
        ..Differences::default()
    };
    let (mut pending, mut repeated) = (0u64, 0u64);
    for row in rows.events.values() {
        repeated += row.repeats;
        match row.found {
            Some(payload) if payload != row.payload => {
                differences.changed.insert(row.id);
            }
            Some(_) => {}
            None if row.is_done => {
                differences.missing.insert(row.id);
            }
            None => pending += 1,
        }
    }
    Ok(answer(
        name,
        &rows,
        records,
        unknown,
        pending,
        repeated,
        &differences,
    ))
}

fn answer(
    name: &str,
    rows: &Rows,
    records: u64,
    unknown: u64,
    pending: u64,
    repeated: u64,
    differences: &Differences,
) -> Answer {
    let Differences {
        missing,
        out_of_order,
        changed,
    } = differences;
    let named = |ids: &BTreeSet<i64>| ids.iter().take(NAMED).copied().collect::<Vec<i64>>();
    let json = json!({
        "outbox": name, "rows": rows.events.len(), "records": records, "pending": pending,
        "missing": missing.len(), "missing_ids": named(missing),
        "out_of_order": out_of_order.len(), "out_of_order_ids": named(out_of_order),
        "changed": changed.len(), "changed_ids": named(changed),
        "repeated": repeated, "records_without_row": unknown,
    });
    let line = |label: &str, count: u64, what: &str| format!("  {label:<20} {count:>12}  {what}");
    let with_ids = |what: &str, ids: &BTreeSet<i64>| {
        let ids: Vec<String> = ids.iter().take(NAMED).map(i64::to_string).collect();
        if ids.is_empty() {
            what.to_owned()
        } else {
            format!("{what}: {}", ids.join(" "))
        }
    };
    let count = |ids: &BTreeSet<i64>| ids.len() as u64;
    let text = [
        format!("outbox {name}"),
        line("rows", rows.events.len() as u64, "that the outbox still has"),
        line("records", records, "in their topics"),
        line(
            "pending",
            pending,
            "rows that are still to be published, or wait in quarantine",
        ),
        line(
            "missing",
            count(missing),
            &with_ids("rows that count as published and are not on Kafka", missing),
        ),
        line(
            "out of order",
            count(out_of_order),
            &with_ids(
                "rows that came before an earlier one of their entity",
                out_of_order,
            ),
        ),
        line(
            "changed",
            count(changed),
            &with_ids("rows whose records have another payload", changed),
        ),
        line("repeated", repeated, "records seen again, the same bytes"),
        line(
            "without row",
            unknown,
            "records of rows that were removed, or of somebody else",
        ),
    ]
    .join("\n");
    let is_sound = missing.is_empty() && out_of_order.is_empty() && changed.is_empty();
    Answer::new(json, text).with_code(if is_sound { 0 } else { EXIT_DIFFERENCES })
}

/// What counts as published.
struct Done {
    floor: i64,
    published: RangeSet,
    quarantined: BTreeSet<i64>,
}

async fn done(db: &Database, name: &str, outbox: &Outbox) -> Result<Done, CommandError> {
    let text = format!(
        "SELECT floor, (SELECT coalesce(array_agg(lower(r)), '{{}}') FROM unnest(published) r),
                (SELECT coalesce(array_agg(upper(r)), '{{}}') FROM unnest(published) r),
                (SELECT coalesce(array_agg(id), '{{}}') FROM {} WHERE name = $1 AND state <> 'skipped')
           FROM {} WHERE name = $1",
        outbox.table.sibling(QUARANTINE),
        outbox.table.sibling(RELAY)
    );
    let rows = db
        .query("ask for the progress", &text, &[(&name, Type::TEXT)])
        .await?;
    let Some(row) = rows.first() else {
        return Err(CommandError::Refused(format!("outbox {name} was never relayed")));
    };
    let (starts, ends): (Vec<i64>, Vec<i64>) = (row.get(1), row.get(2));
    Ok(Done {
        floor: row.get(0),
        published: starts
            .into_iter()
            .zip(ends)
            .map(|(start, end)| start..end)
            .collect(),
        quarantined: row.get::<_, Vec<i64>>(3).into_iter().collect(),
    })
}

struct Rows {
    /// By event id.
    events: HashMap<String, Expected>,
    topics: BTreeSet<String>,
}

impl Rows {
    async fn read(
        &mut self,
        db: &Database,
        outbox: &Outbox,
        rendering: &Rendering,
        done: &Done,
        hasher: &RandomState,
    ) -> Result<(), CommandError> {
        let checked = check::check(db, &outbox.table, &outbox.layout).await?;
        let id = identifier(&outbox.layout.columns.id);
        let text = format!(
            "SELECT {} FROM {} t WHERE t.{id} > $1 ORDER BY t.{id} LIMIT $2",
            select_list(&outbox.layout, &checked.types).list,
            outbox.table.quoted()
        );
        let read = db.prepare("prepare to read the outbox", text).await?;
        let header = rendering.event_id_header();
        let mut last = 0;
        loop {
            let params = [(&last as _, Type::INT8), (&FETCH_ROWS as _, Type::INT8)];
            let (rows, _) = db.rows("read the outbox", &read, &params, FETCH_BYTES).await?;
            let rows: Vec<OutboxRow> = rows.into_iter().map(OutboxRow::Selected).collect();
            let Some(newest) = rows.last() else { return Ok(()) };
            last = newest.id();
            for row in &rows {
                let record = Record::from_row(row, rendering);
                let Some(event) = record.header(header) else {
                    continue;
                };
                let expected = Expected {
                    id: record.id,
                    entity: hasher.hash_one((&record.topic, record.key)),
                    payload: hasher.hash_one(record.payload),
                    version: record.version.filter(|_| outbox.versions == Versions::Contiguous),
                    is_done: (record.id <= done.floor || done.published.contains(record.id))
                        && !done.quarantined.contains(&record.id),
                    found: None,
                    repeats: 0,
                };
                self.events.insert(event.to_owned(), expected);
                self.topics.insert(record.topic.into_owned());
            }
        }
    }
}
