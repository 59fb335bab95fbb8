//! `init`: makes or completes the tables, and says where the relay begins.

use std::collections::{BTreeSet, HashMap};
use std::str::FromStr;
use std::time::{Duration, Instant};

use rdkafka::config::ClientConfig;
use serde_json::json;

use super::{Answer, CommandError, pick, topics};
use crate::config::{Config, Connection, Outbox};
use crate::database::Database;
use crate::protocol::{Progress, Tracker};
use crate::record::{Record, Rendering};
use crate::schema::{self, Role};
use crate::source::Source;
use crate::source::lease::QuarantineChanges;
use crate::source::retention::numbered_to;

/// How long the whole script may take: an index on a large table takes minutes.
const SCRIPT_LIMIT: Duration = Duration::from_secs(3600);
/// How long to wait for transactions that are open.
const FENCE_LIMIT: Duration = Duration::from_secs(60);
const FETCH_ROWS: i64 = 5_000;
const FETCH_BYTES: usize = 8 << 20;
/// Nobody else may begin meanwhile.
const LEASE: Duration = Duration::from_secs(600);

/// Where the relay begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartAt {
    /// With the first row.
    Beginning,
    /// With what is committed from now on.
    End,
    /// With what the topics do not have: another relay has published the rest, and is stopped.
    Published,
    /// With the row behind this one.
    After(i64),
}

impl FromStr for StartAt {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "beginning" => Ok(Self::Beginning),
            "end" => Ok(Self::End),
            "published" => Ok(Self::Published),
            id => match id.parse() {
                Ok(id) if id >= 0 => Ok(Self::After(id)),
                _ => Err(
                    "must be beginning, end, published, or the id of the last row that is not to be published",
                ),
            },
        }
    }
}

/// What `init` is told besides the configuration.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// With the rights to make tables, where the relay's own role has none.
    pub database_url: Option<String>,
    pub relay_roles: Vec<String>,
    pub writer_roles: Vec<String>,
    pub start_at: Option<StartAt>,
}

/// The SQL that `init` would run.
///
/// # Errors
/// When the configuration has no such outbox.
pub fn sql(config: &Config, name: Option<&str>, options: &Options) -> Result<Answer, CommandError> {
    let (name, outbox) = pick(config, name)?;
    let script = script(outbox, options);
    Ok(Answer::new(json!({ "outbox": name, "sql": script }), script))
}

fn script(outbox: &Outbox, options: &Options) -> String {
    let relays = options.relay_roles.iter().map(|role| Role::Relay(role));
    let writers = options.writer_roles.iter().map(|role| Role::Writer(role));
    let roles: Vec<Role<'_>> = relays.chain(writers).collect();
    schema::script(&outbox.table, &outbox.layout, &roles)
}

/// Runs the script, which may run again at any time, and then sets where the relay begins, if asked.
///
/// # Errors
/// When the database does not take it, or the outbox has been relayed already and a start is given.
pub async fn init(config: &Config, name: Option<&str>, options: &Options) -> Result<Answer, CommandError> {
    let (name, outbox) = pick(config, name)?;
    let mut outbox = outbox.clone();
    if let Some(url) = &options.database_url {
        outbox.connection = Connection {
            url: url.clone().into(),
            ..outbox.connection
        };
    }
    let db = Database::connect(&outbox.connection, "outbox-relay init", SCRIPT_LIMIT).await?;
    db.script("make the outbox", &script(&outbox, options), SCRIPT_LIMIT)
        .await?;
    let Some(start_at) = options.start_at else {
        let text = format!("outbox {name}: table {} is as it must be", outbox.table);
        return Ok(Answer::new(
            json!({ "outbox": name, "table": outbox.table.to_string() }),
            text,
        ));
    };
    let started = start(config, name, &outbox, start_at).await?;
    let text = format!(
        "outbox {name}: table {} is as it must be; everything up to id {} counts as published, and {} rows above it; {} \
         rows are to be published",
        outbox.table, started.progress.floor, started.above, started.open
    );
    Ok(Answer::new(
        json!({
            "outbox": name, "table": outbox.table.to_string(), "floor": started.progress.floor,
            "published_above_floor": started.above, "to_publish": started.open,
        }),
        text,
    ))
}

struct Started {
    progress: Progress,
    above: i64,
    open: usize,
}

async fn start(
    config: &Config,
    name: &str,
    outbox: &Outbox,
    start_at: StartAt,
) -> Result<Started, CommandError> {
    let source = Source::connect(name, outbox).await?;
    let owner = format!("{} init", config.instance.name);
    let Some(mut lease) = source.acquire(&owner, None, LEASE).await? else {
        return Err(CommandError::Refused(format!(
            "outbox {name} is being relayed: stop its relays first"
        )));
    };
    let begun = lease.progress != Progress::default() || lease.epoch > 1;
    let result = if begun {
        Err(CommandError::Refused(format!(
            "outbox {name} was relayed already (epoch {}, floor {}): it goes on where it stopped. To begin elsewhere, give \
             it another name",
            lease.epoch - 1,
            lease.progress.floor
        )))
    } else {
        let rendering = config.rendering(name, outbox);
        find_progress(&source, &config.producer(), &rendering, start_at).await
    };
    let progress = match &result {
        Ok(started) => started.progress.clone(),
        Err(_) => lease.progress.clone(),
    };
    // In any case the lease is given up.
    source
        .save(
            &mut lease,
            &progress,
            Duration::ZERO,
            None,
            &QuarantineChanges::default(),
        )
        .await?;
    if result.is_err() && !begun {
        source.forget().await?;
    }
    result
}

async fn find_progress(
    source: &Source,
    producer: &ClientConfig,
    rendering: &Rendering,
    start_at: StartAt,
) -> Result<Started, CommandError> {
    let progress = |floor| Progress {
        floor,
        ..Progress::default()
    };
    match start_at {
        StartAt::Beginning => {
            return Ok(Started {
                progress: progress(0),
                above: 0,
                open: 0,
            });
        }
        StartAt::After(id) => {
            let given = source.last_id_given().await?.unwrap_or(0);
            if id > given {
                return Err(CommandError::Refused(format!(
                    "--start-at {id}: the highest id that was given is {given}"
                )));
            }
            return Ok(Started {
                progress: progress(id),
                above: 0,
                open: 0,
            });
        }
        StartAt::End | StartAt::Published => {}
    }
    let by_event_id = start_at == StartAt::Published;
    let mut committed = Committed {
        with_late: by_event_id,
        ..Committed::default()
    };
    let mut tracker = Tracker::resume(Progress::default());
    read_all(source, rendering, &mut tracker, by_event_id, &mut committed).await?;
    let open = if by_event_id {
        let producer = producer.clone();
        let numbered_to = numbered_to(&source.db, &source.table).await?;
        let found = tokio::task::spawn_blocking(move || published(&producer, &committed, numbered_to))
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        for id in &found.published {
            tracker.published(*id);
        }
        found.open
    } else {
        for id in &committed.ids {
            tracker.published(*id);
        }
        committed.late
    };
    // All of it: what is left out would be published again.
    let progress = tracker.progress(usize::MAX);
    Ok(Started {
        above: progress.published.id_count(),
        progress,
        open,
    })
}

/// The rows that are committed.
#[derive(Debug, Default)]
struct Committed {
    ids: Vec<i64>,
    /// Whether those count that were committed only while the others were read.
    with_late: bool,
    /// How many there are, where they do not.
    late: usize,
    /// Event id to row and entity, where topics are to be searched for them.
    events: HashMap<String, (i64, String)>,
    topics: BTreeSet<String>,
}

/// Reads every row and closes every hole, as a relay would.
async fn read_all(
    source: &Source,
    rendering: &Rendering,
    tracker: &mut Tracker<String>,
    by_event_id: bool,
    committed: &mut Committed,
) -> Result<(), CommandError> {
    let began = Instant::now();
    let mut is_complete = false;
    loop {
        if tracker.wants_listing() {
            tracker.list(source.open_writers().await?);
        }
        let passed = tracker.fence_is_passed();
        let batch = source
            .read(tracker.seen(), FETCH_ROWS, FETCH_BYTES, false)
            .await?;
        let mut fresh = false;
        for row in &batch.rows {
            let is_late = is_complete || row.id() <= tracker.head();
            if !tracker.observe(row.id()) {
                continue;
            }
            fresh = true;
            if is_late && !committed.with_late {
                committed.late += 1;
                continue;
            }
            committed.ids.push(row.id());
            if by_event_id {
                let record = Record::from_row(row, rendering);
                let entity = format!("{}/{}", record.aggregate_type, record.key);
                let Some(event) = record.header(rendering.event_id_header()) else {
                    return Err(CommandError::Refused(format!(
                        "row {} has no event id",
                        record.id
                    )));
                };
                committed.events.insert(event.to_owned(), (record.id, entity));
                committed.topics.insert(record.topic.into_owned());
            }
        }
        is_complete |= !batch.read.full;
        if passed {
            tracker.end_fence(batch.read);
        }
        if !fresh && !batch.read.full {
            if tracker.holes().is_empty() {
                return Ok(());
            }
            if began.elapsed() > FENCE_LIMIT {
                return Err(CommandError::Refused(format!(
                    "transactions that wrote to {} are open for more than {FENCE_LIMIT:?}; end them and try again (pg_locks, \
                     pg_prepared_xacts)",
                    source.table
                )));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

struct Found {
    published: Vec<i64>,
    open: usize,
}

/// The rows that the topics have. Of one entity these must be its first ones.
fn published(
    producer: &ClientConfig,
    committed: &Committed,
    numbered_to: i64,
) -> Result<Found, CommandError> {
    let mut seen: BTreeSet<i64> = BTreeSet::new();
    let names: Vec<String> = committed.topics.iter().cloned().collect();
    topics::read(producer, &names, |message| {
        let event =
            topics::header(message, "id").or_else(|| topics::header(message, envelope::header::CE_ID));
        if let Some((id, _)) = event.and_then(|event| committed.events.get(event)) {
            seen.insert(*id);
        }
    })?;
    let mut rows: Vec<(i64, &str)> = committed
        .events
        .values()
        .map(|(id, entity)| (*id, entity.as_str()))
        .collect();
    rows.sort_unstable();
    let mut open_entities: HashMap<&str, i64> = HashMap::new();
    let (mut published, mut open) = (Vec::new(), 0);
    for (id, entity) in rows {
        if !seen.contains(&id) {
            if id <= numbered_to {
                return Err(CommandError::Refused(format!(
                    "row {id} is not on Kafka, and was written before the table had ids in the order of the inserts (these \
                     begin behind {numbered_to}): let the other relay publish it first; or, when its topic has dropped it \
                     since, take the row out of the table before init. Nothing was changed"
                )));
            }
            open += 1;
            open_entities.entry(entity).or_insert(id);
        } else if let Some(before) = open_entities.get(entity) {
            return Err(CommandError::Refused(format!(
                "row {id} is on Kafka, and row {before} of the same entity, which comes before it, is not: is the other relay \
                 still running, or did it lose a row? Nothing was changed"
            )));
        } else {
            published.push(id);
        }
    }
    Ok(Found { published, open })
}
