//! The PostgreSQL side of one outbox: the table's checks, the lease with its progress, the fence and the reads.
//!
//! The SQL and why it has just this form: `docs/outbox-protocol.md`.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures::{StreamExt as _, pin_mut};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls, Row, Statement};

use crate::config::TableName;
use crate::protocol::{Progress, RangeSet, Read};

/// Oldest PostgreSQL that has multiranges.
const OLDEST_SERVER: i32 = 140_000;

/// The columns that the relay reads, with their types, in the order of [`mod@column`].
const COLUMNS: [(&str, &str); 18] = [
    ("id", "bigint"),
    ("event_id", "uuid"),
    ("aggregate_type", "text"),
    ("aggregate_id", "text"),
    ("aggregate_version", "bigint"),
    ("event_type", "text"),
    ("schema_version", "integer"),
    ("topic", "text"),
    ("source", "text"),
    ("content_type", "text"),
    ("data_schema", "text"),
    ("correlation_id", "uuid"),
    ("causation_id", "uuid"),
    ("traceparent", "text"),
    ("tracestate", "text"),
    ("metadata", "jsonb"),
    ("occurred_at", "timestamp with time zone"),
    ("payload", "bytea"),
];

/// Positions of [`COLUMNS`] in a row.
pub(crate) mod column {
    pub(crate) const ID: usize = 0;
    pub(crate) const EVENT_ID: usize = 1;
    pub(crate) const AGGREGATE_TYPE: usize = 2;
    pub(crate) const AGGREGATE_ID: usize = 3;
    pub(crate) const AGGREGATE_VERSION: usize = 4;
    pub(crate) const EVENT_TYPE: usize = 5;
    pub(crate) const SCHEMA_VERSION: usize = 6;
    pub(crate) const TOPIC: usize = 7;
    pub(crate) const SOURCE: usize = 8;
    pub(crate) const CONTENT_TYPE: usize = 9;
    pub(crate) const DATA_SCHEMA: usize = 10;
    pub(crate) const CORRELATION_ID: usize = 11;
    pub(crate) const CAUSATION_ID: usize = 12;
    pub(crate) const TRACEPARENT: usize = 13;
    pub(crate) const TRACESTATE: usize = 14;
    pub(crate) const METADATA: usize = 15;
    pub(crate) const OCCURRED_AT: usize = 16;
    pub(crate) const PAYLOAD: usize = 17;
}

/// Why the database side failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    /// Goes away by itself, or with the server's return: connect again.
    #[error("PostgreSQL: {doing}")]
    Unavailable {
        doing: &'static str,
        source: tokio_postgres::Error,
    },
    #[error("PostgreSQL did not answer within {limit:?}: {doing}")]
    TimedOut { doing: &'static str, limit: Duration },
    /// Another server answers than the one whose ids are in memory: forget everything and load again.
    #[error("PostgreSQL was restarted or another server answers")]
    ServerChanged,
    /// Another leader has taken over, or wrote progress of which this one does not know.
    #[error("the lease is lost")]
    LeaseLost,
    /// The table or the server is not fit; somebody must act.
    #[error("{0}")]
    Unfit(String),
}

/// The lease as it was taken, with the progress of the leader before.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) epoch: i64,
    pub(crate) saves: i64,
    pub(crate) progress: Progress,
    /// On this process's clock, from before the statement was sent.
    pub(crate) expires: Instant,
}

/// What one read brought.
#[derive(Debug)]
pub(crate) struct Batch {
    /// In the order of their ids.
    pub(crate) rows: Vec<Row>,
    /// Size of the rows, as they came over the wire.
    pub(crate) bytes: usize,
    pub(crate) read: Read,
}

/// A connection to the database of one outbox.
pub(crate) struct Source {
    client: Client,
    connection: JoinHandle<()>,
    table: TableName,
    name: String,
    limit: Duration,
    read: Statement,
    list: Statement,
    save: Statement,
    /// `pg_postmaster_start_time()` as text: changes whenever another server process answers.
    server: String,
    /// The outbox and its sequence, whose locks tell of open writers.
    relations: Vec<u32>,
    sequence: u32,
}

impl Drop for Source {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// How long the server keeps a connection of ours that went silent, and the other way round.
const KEEPALIVE: Duration = Duration::from_secs(10);

impl Source {
    /// Connects, sets the session up and checks the table. `limit` bounds each statement.
    ///
    /// # Errors
    /// [`SourceError::Unfit`] when the table or the server cannot be relayed safely.
    pub(crate) async fn connect(
        config: &tokio_postgres::Config,
        table: &TableName,
        name: &str,
        limit: Duration,
    ) -> Result<Self, SourceError> {
        let mut config = config.clone();
        config
            .application_name(format!("outbox-relay {name}"))
            .connect_timeout(limit)
            .tcp_user_timeout(limit.max(Duration::from_secs(5)))
            .keepalives_idle(KEEPALIVE);
        let (client, connection) = within(limit, "connect", config.connect(NoTls)).await?;
        // Ends with the client; its error reaches us through the statement that it broke.
        let connection = tokio::spawn(async move {
            let _ = connection.await;
        });
        // A generic plan made while the table was small would later scan and sort all of it: the head is always
        // reached through the primary key. What the planner must do all the same counts as so expensive then that it
        // would compile each statement, for half a second: no JIT.
        let session = format!(
            "SET plan_cache_mode = force_custom_plan; SET enable_seqscan = off; SET enable_bitmapscan = off;
             SET enable_sort = off; SET jit = off; SET search_path = pg_catalog; SET statement_timeout = {}; SET synchronous_commit = on",
            limit.as_millis()
        );
        within(limit, "set the session up", client.batch_execute(&session)).await?;
        let relations = check(&client, table, limit).await?;

        let progress_table = table.sibling_quoted("outbox_relay");
        let read = read_sql(table);
        let list = "SELECT DISTINCT virtualtransaction, pg_postmaster_start_time()::text
               FROM pg_locks
              WHERE locktype = 'relation' AND granted AND mode = 'RowExclusiveLock'
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                AND relation = ANY($1) AND pid IS DISTINCT FROM pg_backend_pid()
                AND virtualtransaction !~ '/0$'
             UNION ALL SELECT NULL, pg_postmaster_start_time()::text";
        let save = format!(
            "UPDATE {progress_table}
                SET floor = $1, published = $2::text::int8multirange, saves = saves + 1, saved_at = clock_timestamp(),
                    expires_at = clock_timestamp() + $3::bigint * interval '1 microsecond'
              WHERE name = $4 AND epoch = $5 AND saves = $6 AND floor <= $1
                AND pg_postmaster_start_time()::text = $7"
        );
        let read = within(limit, "prepare the read", client.prepare(&read)).await?;
        let list = within(limit, "prepare the listing", client.prepare(list)).await?;
        let save = match timeout(limit, client.prepare(&save)).await {
            Ok(Err(error)) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => {
                return Err(SourceError::Unfit(format!(
                    "the table {progress_table} is missing: run the outbox migrations"
                )));
            }
            Ok(prepared) => prepared.map_err(|source| unavailable("prepare the save", source))?,
            Err(_) => {
                return Err(SourceError::TimedOut {
                    doing: "prepare the save",
                    limit,
                });
            }
        };
        let server = within(
            limit,
            "ask which server this is",
            client.query_one("SELECT pg_postmaster_start_time()::text", &[]),
        )
        .await?
        .get(0);
        Ok(Self {
            client,
            connection,
            table: table.clone(),
            name: name.to_owned(),
            limit,
            read,
            list,
            save,
            server,
            sequence: relations[1],
            relations,
        })
    }

    /// Takes the lease if nobody else holds it, under a new epoch, with the progress saved so far. `own_epoch` is the
    /// last epoch that this very process led: it need not wait for a lease of its own to expire.
    ///
    /// # Errors
    /// [`SourceError::Unfit`] when the progress belongs to another cluster.
    pub(crate) async fn acquire(
        &self,
        owner: &str,
        own_epoch: Option<i64>,
        ttl: Duration,
    ) -> Result<Option<Lease>, SourceError> {
        let relay = self.table.sibling_quoted("outbox_relay");
        let cluster: i64 = within(
            self.limit,
            "ask for the system identifier",
            self.client
                .query_one("SELECT system_identifier FROM pg_control_system()", &[]),
        )
        .await?
        .get(0);
        let insert =
            format!("INSERT INTO {relay} (name, system_identifier) VALUES ($1, $2) ON CONFLICT DO NOTHING");
        self.execute("make the relay's row", &insert, &[&self.name, &cluster])
            .await?;
        let before = Instant::now();
        let update = format!(
            "UPDATE {relay}
                SET epoch = epoch + 1, owner = $2,
                    expires_at = clock_timestamp() + $3::bigint * interval '1 microsecond'
              WHERE name = $1 AND (expires_at < clock_timestamp() OR (owner = $2 AND epoch = $5))
          RETURNING epoch, saves, floor, coalesce(system_identifier, $4),
                    (SELECT coalesce(array_agg(lower(r)), '{{}}') FROM unnest(published) r),
                    (SELECT coalesce(array_agg(upper(r)), '{{}}') FROM unnest(published) r)"
        );
        let params: [&(dyn ToSql + Sync); 5] = [&self.name, &owner, &micros(ttl), &cluster, &own_epoch];
        let row = within(
            self.limit,
            "take the lease",
            self.client.query_opt(&update, &params),
        )
        .await?;
        let Some(row) = row else { return Ok(None) };
        let saved_cluster: i64 = row.get(3);
        if saved_cluster != cluster {
            return Err(SourceError::Unfit(format!(
                "the progress of outbox {} belongs to cluster {saved_cluster}, and this is {cluster}: the database \
                 was restored or copied. When it is really the one to relay from now on: UPDATE {relay} SET \
                 system_identifier = {cluster} WHERE name = '{}'",
                self.name, self.name
            )));
        }
        let (starts, ends): (Vec<i64>, Vec<i64>) = (row.get(4), row.get(5));
        let published: RangeSet = starts
            .into_iter()
            .zip(ends)
            .map(|(start, end)| start..end)
            .collect();
        Ok(Some(Lease {
            epoch: row.get(0),
            saves: row.get(1),
            progress: Progress {
                floor: row.get(2),
                published,
            },
            expires: before + ttl,
        }))
    }

    /// Saves progress and renews the lease, which a `ttl` of zero gives up. Updates `lease`.
    ///
    /// # Errors
    /// [`SourceError::LeaseLost`] when the row has moved on; after any other error too the outcome is unknown, and the
    /// progress must be loaded again.
    pub(crate) async fn save(
        &self,
        lease: &mut Lease,
        progress: &Progress,
        ttl: Duration,
    ) -> Result<(), SourceError> {
        let before = Instant::now();
        let published = multirange(&progress.published);
        let updated = within(
            self.limit,
            "save the progress",
            self.client.execute(
                &self.save,
                &[
                    &progress.floor,
                    &published,
                    &micros(ttl),
                    &self.name,
                    &lease.epoch,
                    &lease.saves,
                    &self.server,
                ],
            ),
        )
        .await?;
        if updated == 0 {
            return Err(SourceError::LeaseLost);
        }
        lease.saves += 1;
        lease.expires = before + ttl;
        Ok(())
    }

    /// The transactions that may hold ids which they have not committed.
    pub(crate) async fn open_writers(&self) -> Result<BTreeSet<String>, SourceError> {
        let rows = within(
            self.limit,
            "list open writers",
            self.client.query(&self.list, &[&self.relations]),
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
    /// are exceeded is the last: those behind it are left for the next read.
    pub(crate) async fn read(
        &self,
        holes: &RangeSet,
        head: i64,
        max_rows: i64,
        max_bytes: usize,
    ) -> Result<Batch, SourceError> {
        let doing = "read the outbox";
        let read = async {
            let holes = multirange(holes);
            let params: [&(dyn ToSql + Sync); 4] = [&holes, &head, &max_rows, &self.server];
            let rows = self.client.query_raw(&self.read, params).await?;
            pin_mut!(rows);
            let (mut taken, mut bytes) = (Vec::new(), 0);
            while let Some(row) = rows.next().await {
                let row = row?;
                bytes += row.raw_size_bytes();
                taken.push(row);
                if bytes > max_bytes {
                    break;
                }
            }
            Ok((taken, bytes))
        };
        let (rows, bytes) = within(self.limit, doing, read).await?;
        let last_id = rows.last().map(|row| row.get(column::ID));
        let full = bytes > max_bytes || i64::try_from(rows.len()).is_ok_and(|count| count >= max_rows);
        Ok(Batch {
            rows,
            bytes,
            read: Read { full, last_id },
        })
    }

    /// The highest id that the sequence has given; `None` before the first. Checks that the server is still the same.
    pub(crate) async fn last_id_given(&self) -> Result<Option<i64>, SourceError> {
        let row = within(
            self.limit,
            "ask the sequence",
            self.client.query_one(
                "SELECT pg_sequence_last_value($1::oid::regclass), pg_postmaster_start_time()::text",
                &[&self.sequence],
            ),
        )
        .await?;
        if row.get::<_, &str>(1) != self.server {
            return Err(SourceError::ServerChanged);
        }
        Ok(row.get(0))
    }

    /// Age in seconds of the first row above the floor, by the database's clock; zero when there is none.
    pub(crate) async fn age_above(&self, floor: i64) -> Result<f64, SourceError> {
        let query = format!(
            "SELECT coalesce((SELECT greatest(0, extract(epoch FROM clock_timestamp() - occurred_at))::float8
                                FROM {} WHERE id > $1 ORDER BY id LIMIT 1), 0)",
            self.table.quoted()
        );
        Ok(within(
            self.limit,
            "ask for the oldest row",
            self.client.query_one(&query, &[&floor]),
        )
        .await?
        .get(0))
    }

    async fn execute(
        &self,
        doing: &'static str,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, SourceError> {
        within(self.limit, doing, self.client.execute(sql, params)).await
    }
}

/// One statement, one snapshot: holes and head in two would show version 2 without version 1. The outer limit keeps what
/// is above a hole from overtaking it. The server is compared once per statement, not per row.
fn read_sql(table: &TableName) -> String {
    let columns: Vec<&str> = COLUMNS.iter().map(|(name, _)| *name).collect();
    let (columns, table) = (columns.join(", "), table.quoted());
    format!(
        "SELECT * FROM (
           (SELECT o.* FROM unnest($1::text::int8multirange) g(r) CROSS JOIN LATERAL
             (SELECT {columns} FROM {table} WHERE id >= lower(g.r) AND id < upper(g.r) ORDER BY id LIMIT $3) o)
           UNION ALL
           (SELECT {columns} FROM {table} WHERE id > $2 ORDER BY id LIMIT $3)) x
         WHERE pg_postmaster_start_time()::text = $4
         ORDER BY id LIMIT $3"
    )
}

fn unavailable(doing: &'static str, source: tokio_postgres::Error) -> SourceError {
    SourceError::Unavailable { doing, source }
}

async fn within<T>(
    limit: Duration,
    doing: &'static str,
    work: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, SourceError> {
    match timeout(limit, work).await {
        Ok(result) => result.map_err(|source| unavailable(doing, source)),
        Err(_) => Err(SourceError::TimedOut { doing, limit }),
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// PostgreSQL's text form of an int8multirange.
fn multirange(ranges: &RangeSet) -> String {
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

/// Refuses a table on which the protocol would not hold. Returns the relations whose locks tell of open writers: the
/// table, then its sequence.
async fn check(client: &Client, table: &TableName, limit: Duration) -> Result<Vec<u32>, SourceError> {
    let ask = |sql: &'static str, params: Vec<String>| async move {
        let params: Vec<&(dyn ToSql + Sync)> = params.iter().map(|p| p as &(dyn ToSql + Sync)).collect();
        within(limit, "check the outbox table", client.query(sql, &params)).await
    };
    let unfit = |problem: String| Err(SourceError::Unfit(format!("outbox table {table}: {problem}")));

    let server = ask(
        "SELECT current_setting('server_version_num')::int, current_setting('server_version')",
        vec![],
    )
    .await?;
    if server[0].get::<_, i32>(0) < OLDEST_SERVER {
        let version: &str = server[0].get(1);
        return unfit(format!("PostgreSQL {version} is too old, 14 or newer is needed"));
    }

    let found = ask(
        "SELECT c.oid, c.relkind::text, coalesce(pg_get_serial_sequence(format('%I.%I', n.nspname, c.relname), 'id'), '')
           FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
          WHERE n.nspname = $1::text AND c.relname = $2::text",
        vec![table.schema().to_owned(), table.name().to_owned()],
    )
    .await?;
    let Some(found) = found.first() else {
        return unfit("it does not exist: run the outbox migrations".to_owned());
    };
    let (oid, kind, sequence): (u32, &str, &str) = (found.get(0), found.get(1), found.get(2));
    if kind != "r" {
        return unfit(format!("it is not an ordinary table (relkind {kind})"));
    }
    if sequence.is_empty() {
        return unfit("its column id owns no sequence: it must be GENERATED ALWAYS AS IDENTITY".to_owned());
    }

    let columns = ask(
        "SELECT attname::text, format_type(atttypid, NULL), attidentity::text
           FROM pg_attribute WHERE attrelid = $1::text::oid AND attnum > 0 AND NOT attisdropped",
        vec![oid.to_string()],
    )
    .await?;
    for (name, kind) in COLUMNS {
        match columns.iter().find(|row| row.get::<_, &str>(0) == name) {
            None => return unfit(format!("the column {name} ({kind}) is missing")),
            Some(row) if row.get::<_, &str>(1) != kind => {
                return unfit(format!(
                    "the column {name} is {}, and must be {kind}",
                    row.get::<_, &str>(1)
                ));
            }
            Some(row) if name == "id" && row.get::<_, &str>(2) != "a" => {
                return unfit(
                    "the column id must be GENERATED ALWAYS AS IDENTITY: writers could supply ids".to_owned(),
                );
            }
            Some(_) => {}
        }
    }

    let sequence = ask(
        "SELECT seqrelid, seqcache, seqincrement, seqcycle FROM pg_sequence WHERE seqrelid = $1::text::regclass",
        vec![sequence.to_owned()],
    )
    .await?;
    let Some(sequence) = sequence.first() else {
        return unfit("its sequence cannot be read".to_owned());
    };
    let (sequence, cache, increment, cycle): (u32, i64, i64, bool) =
        (sequence.get(0), sequence.get(1), sequence.get(2), sequence.get(3));
    if cache != 1 {
        return unfit(format!(
            "its sequence has CACHE {cache}: ids would not rise with the order of inserts; use 1"
        ));
    }
    if increment != 1 || cycle {
        return unfit("its sequence must have INCREMENT 1 and NO CYCLE".to_owned());
    }

    let unusual = ask(
        "SELECT 'a primary key or unique index on id alone is missing'
          WHERE NOT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
                             WHERE i.indrelid = $1::text::oid AND i.indisunique AND i.indisvalid AND i.indnatts = 1
                               AND i.indpred IS NULL AND a.attname = 'id')
         UNION ALL
         SELECT format('trigger %I runs before each insert: it could draw an id out of order', tgname)
           FROM pg_trigger WHERE tgrelid = $1::text::oid AND NOT tgisinternal AND tgenabled <> 'D'
            AND tgtype & 4 = 4 AND tgtype & 2 = 2
         UNION ALL
         SELECT 'row security hides rows from the relay'
           FROM pg_class WHERE oid = $1::text::oid AND relrowsecurity AND row_security_active(oid)
         UNION ALL
         SELECT 'a logical replication subscription writes to it: its ids come from elsewhere'
           FROM pg_subscription_rel WHERE srrelid = $1::text::oid",
        vec![oid.to_string()],
    )
    .await?;
    if let Some(problem) = unusual.first() {
        return unfit(problem.get(0));
    }

    Ok(vec![oid, sequence])
}

#[cfg(test)]
mod tests {
    use local_stack::testing::Database;

    use super::*;

    #[test]
    fn ranges_are_written_as_postgresql_reads_them() {
        assert_eq!(multirange(&RangeSet::default()), "{}");
        assert_eq!(multirange(&[1..3, 7..8].into_iter().collect()), "{[1,3),[7,8)}");
    }

    /// Prepared while the table is empty, the read must not turn into a scan, or be compiled, once there are rows.
    #[tokio::test]
    async fn the_read_reaches_the_head_through_the_primary_key() {
        let database = Database::empty().await;
        let client = database.connect().await.expect("connected");
        let schema = include_str!("../../migrations/outbox/2026-01-01-000001_outbox/up.sql");
        client.batch_execute(schema).await.expect("created");
        let config = database.url().parse().expect("a URL");
        let limit = Duration::from_secs(20);
        let source = Source::connect(&config, &TableName::default(), "test", limit)
            .await
            .expect("connected");
        let explain = format!("EXPLAIN (ANALYZE, COSTS OFF) {}", read_sql(&TableName::default()));
        let explain = source.client.prepare(&explain).await.expect("prepared");
        client
            .batch_execute(
                "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source)
                 SELECT gen_random_uuid(), 't', 'k', n, 'x', '/x' FROM generate_series(1, 50000) n",
            )
            .await
            .expect("inserted");
        for _ in 0..8 {
            let params: [&(dyn ToSql + Sync); 4] =
                [&"{[3,5),[100,200)}", &49_990i64, &500i64, &source.server];
            let plan = source.client.query(&explain, &params).await.expect("explained");
            let plan: Vec<&str> = plan.iter().map(|row| row.get(0)).collect();
            let plan = plan.join("\n");
            assert_eq!(plan.matches("Index Scan using outbox_pkey").count(), 2, "{plan}");
            assert!(plan.contains("One-Time Filter"), "{plan}");
            assert!(!plan.contains("Seq Scan") && !plan.contains("JIT"), "{plan}");
        }
    }
}
