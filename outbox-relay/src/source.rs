//! The PostgreSQL side of one outbox: the reads and the fence; and in its modules the table's checks, the lease with its
//! progress, the quarantine and the removal of published rows.
//!
//! The SQL and why it has just this form: `docs/outbox-protocol.md`.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use crate::config::{Durability, Outbox, TableName};
use crate::database::{Database, DatabaseError, Prepared};
use crate::protocol::{RangeSet, Read, Seen};
use crate::record::select_list;
use crate::row::OutboxRow;
use crate::sql::literal;

pub(crate) mod ahead;
pub(crate) mod check;
pub(crate) mod lease;
pub(crate) mod quarantine;
pub(crate) mod retention;
#[cfg(test)]
mod schedules;

use check::Checked;

/// Why the database side failed.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Goes away by itself, or with the server's return: connect again.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// Another server answers than the one whose ids are in memory: forget everything and load again.
    #[error("PostgreSQL was restarted or another server answers")]
    ServerChanged,
    /// A standby can neither keep progress nor tell who writes.
    #[error(
        "the server is a standby: it is waited for until it is promoted, or another host of database_url answers"
    )]
    Standby,
    /// Another leader has taken over, or wrote progress of which this one does not know.
    #[error("the lease is lost")]
    LeaseLost,
    /// Rows are committed that are not on disk, however long one waits.
    #[error("rows are committed, and not as safe as `durability` asks for, for {0:?}")]
    NotDurable(Duration),
    /// The table or the server is not fit; somebody must act.
    #[error("{0}")]
    Unfit(String),
}

/// What one read brought.
#[derive(Debug)]
pub(crate) struct Batch {
    /// In the order of their ids.
    pub(crate) rows: Vec<OutboxRow>,
    /// Size of the rows, as they came over the wire.
    pub(crate) bytes: usize,
    pub(crate) read: Read,
    /// The end of the log after the read; what was read is safe once this is. `None`: there are no rows.
    pub(crate) log_end: Option<LogPosition>,
}

/// A position in the write-ahead log, and how far it is safe.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogPosition {
    pub(crate) inserted: i64,
    pub(crate) safe: i64,
}

/// A connection to the database of one outbox.
pub(crate) struct Source {
    pub(crate) db: Database,
    pub(crate) table: TableName,
    pub(crate) name: String,
    read: Prepared,
    /// For when there are no holes, which is mostly: planned in a third of the time.
    read_head: Prepared,
    list: Prepared,
    log: Log,
    save: Prepared,
    save_with_quarantine: Prepared,
    /// `pg_postmaster_start_time()` as text: changes whenever another server process answers.
    server: String,
    checked: Checked,
}

impl Source {
    /// Connects and checks the table.
    ///
    /// # Errors
    /// [`SourceError::Unfit`] when the table or the server cannot be relayed safely.
    pub(crate) async fn connect(name: &str, config: &Outbox) -> Result<Self, SourceError> {
        let limit = config.statement_timeout();
        let db = Database::connect(&config.connection, &format!("outbox-relay {name}"), limit).await?;
        let checked = check::check(&db, &config.table, &config.layout).await?;
        if config.durability == Durability::Replicated {
            check::sees_standbys(&db).await?;
        }
        let selection = select_list(&config.layout, &checked.types);
        let id = crate::sql::identifier(&config.layout.columns.id);
        let with_holes = read_sql(&config.table, &selection.list, &id, &ReadValues::parameters(true));
        let read = db.prepare("prepare the read", with_holes).await?;
        let head_only = read_sql(
            &config.table,
            &selection.list,
            &id,
            &ReadValues::parameters(false),
        );
        let read_head = db.prepare("prepare the read", head_only).await?;
        let list = "SELECT DISTINCT virtualtransaction, pg_postmaster_start_time()::text
               FROM pg_locks
              WHERE locktype = 'relation' AND granted AND mode = 'RowExclusiveLock'
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                AND relation = ANY($1) AND pid IS DISTINCT FROM pg_backend_pid()
                AND virtualtransaction !~ '/0$'
             UNION ALL SELECT NULL, pg_postmaster_start_time()::text";
        let list = db.prepare("prepare the listing", list.to_owned()).await?;
        let log = Log::prepare(&db, config.durability).await?;
        let (save, with_quarantine) = lease::save_sql(&config.table);
        let save = db.prepare("prepare the save", save).await?;
        let save_with_quarantine = db.prepare("prepare the save", with_quarantine).await?;
        let server = db
            .query_one(
                "ask which server this is",
                "SELECT pg_postmaster_start_time()::text",
                &[],
            )
            .await?
            .get(0);
        Ok(Self {
            db,
            table: config.table.clone(),
            name: name.to_owned(),
            read,
            read_head,
            list,
            log,
            save,
            save_with_quarantine,
            server,
            checked,
        })
    }

    /// The transactions that may hold ids which they have not committed.
    pub(crate) async fn open_writers(&self) -> Result<BTreeSet<String>, SourceError> {
        let relations = vec![self.checked.table, self.checked.sequence];
        let (rows, _) = self
            .db
            .rows(
                "list open writers",
                &self.list,
                &[(&relations, Type::OID_ARRAY)],
                usize::MAX,
            )
            .await?;
        let mut writers = BTreeSet::new();
        for row in rows {
            if row.get::<_, &str>(1) != self.server {
                return Err(SourceError::ServerChanged);
            }
            writers.extend(row.get::<_, Option<String>>(0));
        }
        Ok(writers)
    }

    /// Up to `max_rows` rows, in the order of their ids, out of the holes and above the head. The row by which `max_bytes`
    /// are exceeded is the last: those behind it are left for the next read. While rows are `expected`, the end of the log
    /// is asked for in the same round trip.
    pub(crate) async fn read(
        &self,
        seen: &Seen,
        max_rows: i64,
        max_bytes: usize,
        expected: bool,
    ) -> Result<Batch, SourceError> {
        let read = self.select(seen, max_rows, max_bytes);
        let position = self.log.position(&self.db);
        let ((rows, bytes), log_end) = if expected {
            // Both go out at once; the position is asked for after the read.
            let (read, log_end) = futures::join!(read, position);
            (read?, Some(log_end?))
        } else {
            let read = read.await?;
            let log_end = if read.0.is_empty() {
                None
            } else {
                Some(position.await?)
            };
            (read, log_end)
        };
        Ok(batch(rows, bytes, log_end, max_rows, max_bytes))
    }

    async fn select(
        &self,
        seen: &Seen,
        max_rows: i64,
        max_bytes: usize,
    ) -> Result<(Vec<OutboxRow>, usize), SourceError> {
        let holes = multirange(seen.holes());
        let head = seen.head();
        let above = [
            (&head as _, Type::INT8),
            (&max_rows as _, Type::INT8),
            (&self.server as _, Type::TEXT),
        ];
        let all = [
            above[0].clone(),
            above[1].clone(),
            above[2].clone(),
            (&holes as _, Type::TEXT),
        ];
        let (prepared, params) = match seen.holes().is_empty() {
            true => (&self.read_head, &above[..]),
            false => (&self.read, &all[..]),
        };
        let (rows, bytes) = self
            .db
            .rows("read the outbox", prepared, params, max_bytes)
            .await?;
        Ok((rows.into_iter().map(OutboxRow::Selected).collect(), bytes))
    }

    /// Whether the log is safe up to there, by now.
    pub(crate) async fn is_safe(&self, position: i64) -> Result<bool, SourceError> {
        Ok(self.log.position(&self.db).await?.safe >= position)
    }

    /// The highest id that the sequence has given; `None` before the first. Checks that the server is still the same.
    pub(crate) async fn last_id_given(&self) -> Result<Option<i64>, SourceError> {
        let row = self
            .db
            .query_one(
                "ask the sequence",
                "SELECT pg_sequence_last_value($1::regclass), pg_postmaster_start_time()::text",
                &[(&self.checked.sequence, Type::OID)],
            )
            .await?;
        if row.get::<_, &str>(1) != self.server {
            return Err(SourceError::ServerChanged);
        }
        Ok(row.get(0))
    }

    /// Whether any row is above the floor, and its age in seconds by the database's clock, where rows have a time.
    pub(crate) async fn oldest_above(
        &self,
        floor: i64,
        layout: &crate::config::Layout,
    ) -> Result<Option<f64>, SourceError> {
        let Some(time) = &layout.columns.occurred_at else {
            return Ok(None);
        };
        let id = crate::sql::identifier(&layout.columns.id);
        let query = format!(
            "SELECT coalesce((SELECT greatest(0, extract(epoch FROM clock_timestamp() - t.{}::timestamptz))::float8
                                FROM {} t WHERE t.{id} > $1 ORDER BY t.{id} LIMIT 1), 0)",
            crate::sql::identifier(time),
            self.table.quoted()
        );
        let row = self
            .db
            .query_one("ask for the oldest row", &query, &[(&floor, Type::INT8)])
            .await?;
        Ok(Some(row.get(0)))
    }
}

/// How far the log is, and how far it is safe.
struct Log(Option<Prepared>);

impl Log {
    async fn prepare(db: &Database, durability: Durability) -> Result<Self, SourceError> {
        let text = match durability {
            Durability::Committed => return Ok(Self(None)),
            Durability::Flushed => {
                "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint, (pg_current_wal_flush_lsn() - '0/0')::bigint"
            }
            // Without a synchronous standby nothing is replicated, and everything waits for one.
            Durability::Replicated => {
                "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint,
                        (SELECT coalesce(min(flush_lsn) - '0/0', 0)::bigint FROM pg_stat_replication
                          WHERE sync_state IN ('sync', 'quorum'))"
            }
        };
        let prepared = db.prepare("prepare the position of the log", text.to_owned());
        Ok(Self(Some(prepared.await?)))
    }

    async fn position(&self, db: &Database) -> Result<LogPosition, SourceError> {
        let Some(log) = &self.0 else {
            return Ok(LogPosition { inserted: 0, safe: 0 });
        };
        let row = db.first("ask for the position of the log", log, &[]).await?;
        Ok(row.map_or(
            LogPosition {
                inserted: i64::MAX,
                safe: 0,
            },
            |row| LogPosition {
                inserted: row.get(0),
                safe: row.get(1),
            },
        ))
    }
}

fn batch(
    rows: Vec<OutboxRow>,
    bytes: usize,
    log_end: Option<LogPosition>,
    max_rows: i64,
    max_bytes: usize,
) -> Batch {
    let last_id = rows.last().map(OutboxRow::id);
    let full = bytes > max_bytes || i64::try_from(rows.len()).is_ok_and(|count| count >= max_rows);
    Batch {
        rows,
        bytes,
        read: Read { full, last_id },
        log_end,
    }
}

/// What stands in a read for its values: a COPY has no parameters.
struct ReadValues {
    head: String,
    limit: String,
    server: String,
    /// `None`: there are no holes.
    holes: Option<String>,
}

impl ReadValues {
    fn parameters(with_holes: bool) -> Self {
        let [head, limit, server] = ["$1", "$2", "$3"].map(str::to_owned);
        Self {
            head,
            limit,
            server,
            holes: with_holes.then(|| "$4::text::int8multirange".to_owned()),
        }
    }

    fn literals(seen: &Seen, max_rows: i64, server: &str) -> Self {
        let holes = seen.holes();
        Self {
            head: seen.head().to_string(),
            limit: max_rows.to_string(),
            server: literal(server),
            holes: (!holes.is_empty()).then(|| format!("{}::int8multirange", literal(&multirange(holes)))),
        }
    }
}

/// One statement, one snapshot: holes and head in two would show version 2 without version 1. The outer limit keeps what
/// is above a hole from overtaking it. The server is compared once per statement, not per row.
fn read_sql(table: &TableName, columns: &str, id: &str, values: &ReadValues) -> String {
    let table = table.quoted();
    let ReadValues {
        head,
        limit,
        server,
        holes,
    } = values;
    let above = format!("SELECT {columns} FROM {table} t WHERE t.{id} > {head}");
    let is_server = format!("pg_postmaster_start_time()::text = {server}");
    match holes {
        None => format!("{above} AND {is_server} ORDER BY t.{id} LIMIT {limit}"),
        Some(holes) => format!(
            "SELECT * FROM (
               (SELECT o.* FROM unnest({holes}) g(r) CROSS JOIN LATERAL
                 (SELECT {columns} FROM {table} t WHERE t.{id} >= lower(g.r) AND t.{id} < upper(g.r)
                   ORDER BY t.{id} LIMIT {limit}) o)
               UNION ALL
               ({above} ORDER BY t.{id} LIMIT {limit})) x
             WHERE {is_server}
             ORDER BY c0 LIMIT {limit}"
        ),
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// PostgreSQL's text form of an int8multirange.
pub(crate) fn multirange(ranges: &RangeSet) -> String {
    use std::fmt::Write as _;
    let mut text = String::from("{");
    for range in ranges.iter() {
        if text.len() > 1 {
            text.push(',');
        }
        // Writing to a string cannot fail.
        let _ = write!(text, "[{},{})", range.start, range.end);
    }
    text.push('}');
    text
}

#[cfg(test)]
mod tests {
    use local_stack::testing::Database as TestDatabase;

    use super::*;
    use crate::config::{Connection, Layout};

    #[test]
    fn ranges_are_written_as_postgresql_reads_them() {
        assert_eq!(multirange(&RangeSet::default()), "{}");
        assert_eq!(multirange(&[1..3, 7..8].into_iter().collect()), "{[1,3),[7,8)}");
    }

    /// Prepared while the table is empty, the read must not turn into a scan, or be compiled, once there are rows.
    #[tokio::test]
    async fn the_read_reaches_the_head_through_the_primary_key() {
        let database = TestDatabase::empty().await;
        let client = database.connect().await.expect("connected");
        let schema = crate::schema::script(&TableName::default(), &Layout::default(), &[]);
        client.batch_execute(&schema).await.expect("created");
        let limit = Duration::from_secs(20);
        let db = Database::connect(&Connection::plain(database.url()), "test", limit)
            .await
            .expect("connected");
        let checked = check::check(&db, &TableName::default(), &Layout::default())
            .await
            .expect("fit");
        let columns = select_list(&Layout::default(), &checked.types).list;
        let explain = format!(
            "EXPLAIN (ANALYZE, COSTS OFF) {}",
            read_sql(
                &TableName::default(),
                &columns,
                "id",
                &ReadValues::parameters(true)
            )
        );
        let explain = db.prepare("prepare", explain).await.expect("prepared");
        client
            .batch_execute(
                "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source)
                 SELECT gen_random_uuid(), 't', 'k', n, 'x', '/x' FROM generate_series(1, 50000) n",
            )
            .await
            .expect("inserted");
        let server = "whichever".to_owned();
        for _ in 0..8 {
            let params = [
                (&49_990i64 as _, Type::INT8),
                (&500i64 as _, Type::INT8),
                (&server as _, Type::TEXT),
                (&"{[3,5),[100,200)}" as _, Type::TEXT),
            ];
            let (plan, _) = db
                .rows("explain", &explain, &params, usize::MAX)
                .await
                .expect("explained");
            let plan: Vec<&str> = plan.iter().map(|row| row.get(0)).collect();
            let plan = plan.join("\n");
            assert_eq!(plan.matches("Index Scan using outbox_pkey").count(), 2, "{plan}");
            assert!(plan.contains("One-Time Filter"), "{plan}");
            assert!(!plan.contains("Seq Scan") && !plan.contains("JIT"), "{plan}");
        }
    }
}
