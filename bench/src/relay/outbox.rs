//! Outbox tables and what is in them: 10,000 keys in turn, rows of about 500 bytes, all columns as the services fill them, and
//! JSON that compresses as orders do.

use anyhow::Result;
use tokio_postgres::Client;

use crate::servers::Servers;

/// The relay's own table, with its progress beside it.
const RELAY: &str = include_str!("../../../migrations/outbox/2026-01-01-000001_outbox/up.sql");

/// As Debezium's documentation has it.
const DEBEZIUM: &str =
    "CREATE TABLE IF NOT EXISTS outbox_events (id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL,
    aggregateid varchar(255) NOT NULL, type varchar(255) NOT NULL, payload jsonb)";

/// As Watermill makes it.
const WATERMILL: &str = "CREATE TABLE IF NOT EXISTS watermill_outbox (\"offset\" bigserial, uuid varchar(36) NOT NULL,
    created_at timestamp NOT NULL DEFAULT CURRENT_TIMESTAMP, payload json, metadata json, transaction_id xid8 NOT NULL,
    PRIMARY KEY (transaction_id, \"offset\"))";

/// The key of row `n`.
const KEY: &str = "md5((n % 10000)::text)::uuid::text";
/// The event of row `n`; `n` is in it, by which a consumer knows it again.
const PAYLOAD: &str = r#"'{"n": ' || n || ', "order_id": "' || md5((n % 10000)::text)::uuid || '", "customer": {"id": "'
    || gen_random_uuid() || '", "name": "'
    || (ARRAY['Anna','Bruno','Chloé','David','Elif','Farid','Greta','Hugo','Ines','Jonas','Katja','Liam','Mei','Noor','Olga','Pavel'])[1 + n * 7 % 16]
    || ' ' || (ARRAY['Meyer','Silva','Dubois','Novak','Yilmaz','Rossi','Schmidt','Larsen','Kowalski','Haddad','Tanaka','Okafor','Berg'])[1 + n * 11 % 13]
    || '"}, "lines": [{"sku": "SKU-' || n * 7919 % 99991 || '", "quantity": ' || 1 + n % 5 || ', "unit_price": ' || n * 31 % 90000 + 99
    || '}], "total": ' || (1 + n % 5) * (n * 31 % 90000 + 99) || ', "currency": "' || (ARRAY['EUR','EUR','USD','GBP'])[1 + n % 4] || '"}'"#;
const EVENT_TYPE: &str =
    "(ARRAY['order.placed','order.paid','order.confirmed','order.shipped'])[1 + n / 10000 % 4]";

/// A row of the relay's table from `n`, which comes from `source`.
fn relay_insert(source: &str, topic: &str) -> String {
    format!(
        "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, topic, source, content_type,
                             correlation_id, causation_id, traceparent, payload)
         SELECT gen_random_uuid(), 'order', {KEY}, n / 10000 + 1, {EVENT_TYPE}, {topic}, '/order-svc', 'application/json',
                gen_random_uuid(), gen_random_uuid(),
                '00-' || replace(gen_random_uuid()::text, '-', '') || '-' || substr(md5(n::text), 1, 16) || '-01',
                convert_to({PAYLOAD}, 'UTF8') FROM {source}"
    )
}

fn debezium_insert(source: &str) -> String {
    format!(
        "INSERT INTO outbox_events (id, aggregatetype, aggregateid, type, payload)
         SELECT gen_random_uuid(), 'order', {KEY}, {EVENT_TYPE}, ({PAYLOAD})::jsonb FROM {source}"
    )
}

/// Inserts the one row `$1`, in a transaction of its own.
pub(crate) fn relay_insert_one() -> String {
    relay_insert("(SELECT $1::bigint AS n) one", "NULL")
}

/// The same for Debezium's table.
pub(crate) fn debezium_insert_one() -> String {
    debezium_insert("(SELECT $1::bigint AS n) one")
}

fn series(from: u64, count: u64) -> String {
    format!("generate_series({from}::bigint, {}::bigint) n", from + count - 1)
}

/// Whether some keys are bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Poison {
    None,
    /// The first row of one key in a hundred names a topic that cannot be.
    OneInHundred,
}

/// A table of the relay's, in a database of its own.
pub(crate) struct Outbox {
    pub(crate) url: String,
    pub(crate) client: Client,
    pub(crate) rows: u64,
}

impl Outbox {
    /// An empty one.
    pub(crate) async fn create(servers: &Servers, database: &str) -> Result<Self> {
        Ok(Self {
            url: servers.url(database),
            client: create(servers, database, RELAY).await?,
            rows: 0,
        })
    }

    /// Adds rows.
    pub(crate) async fn fill(&mut self, count: u64, poison: Poison) -> Result<()> {
        let topic = match poison {
            Poison::None => "NULL",
            // The one name that the table's constraint lets through and Kafka does not take.
            Poison::OneInHundred => "CASE WHEN n < 10000 AND n % 100 = 0 THEN '.' END",
        };
        let (from, end) = (self.rows, self.rows + count);
        const AT_ONCE: u64 = 500_000;
        let mut next = from;
        while next < end {
            let part = AT_ONCE.min(end - next);
            self.client
                .batch_execute(&relay_insert(&series(next, part), topic))
                .await?;
            next += part;
        }
        self.rows = end;
        Ok(())
    }

    /// As after autovacuum and a checkpoint, so that the first to read does not do their work.
    pub(crate) async fn settle(&self) -> Result<()> {
        settle(&self.client, "outbox").await
    }

    /// Makes a relay begin behind row id `floor`. What else its tables have been through stays in them.
    pub(crate) async fn begin_at(&self, floor: u64) -> Result<()> {
        self.client
            .batch_execute(&format!(
                "DELETE FROM outbox_relay_members; DELETE FROM outbox_relay_quarantine; DELETE FROM outbox_relay_floors;
                 INSERT INTO outbox_relay (name, outbox, floor) VALUES ('bench', 'public.outbox', {floor})
                     ON CONFLICT (name) DO UPDATE SET floor = excluded.floor, published = '{{}}', expires_at = '-infinity'"
            ))
            .await?;
        Ok(())
    }

    /// Where the relay is.
    pub(crate) async fn floor(&self) -> Result<u64> {
        let row = self
            .client
            .query_one("SELECT coalesce(max(floor), 0) FROM outbox_relay", &[])
            .await?;
        Ok(u64::try_from(row.get::<_, i64>(0))?)
    }

    /// The mean size of a row as it is stored, in bytes.
    pub(crate) async fn row_bytes(&self) -> Result<f64> {
        let sql = "SELECT avg(pg_column_size(t.*))::float8 FROM (SELECT * FROM outbox LIMIT 10000) t";
        Ok(self.client.query_one(sql, &[]).await?.get(0))
    }
}

async fn settle(client: &Client, table: &str) -> Result<()> {
    client.batch_execute(&format!("VACUUM (ANALYZE) {table}")).await?;
    client.batch_execute("CHECKPOINT").await?;
    Ok(())
}

/// A new database with this schema.
async fn create(servers: &Servers, database: &str, schema: &str) -> Result<Client> {
    servers.postgres.create_database(database).await?;
    let client = servers.connect(database).await?;
    client.batch_execute(schema).await?;
    Ok(client)
}

/// Debezium's table.
pub(crate) async fn create_debezium(servers: &Servers, database: &str) -> Result<Client> {
    create(servers, database, DEBEZIUM).await
}

/// Rows into an emptied table of Debezium's, a thousand a transaction: few transactions spare it work.
pub(crate) async fn fill_debezium(client: &Client, count: u64) -> Result<()> {
    let insert = debezium_insert("generate_series(i::bigint, least(i + 999, ROWS - 1)::bigint) n")
        .replace("ROWS", &count.to_string());
    client
        .batch_execute(&format!(
            "DO $$ BEGIN FOR i IN 0..{} BY 1000 LOOP {insert}; COMMIT; END LOOP; END $$",
            count - 1
        ))
        .await?;
    settle(client, "outbox_events").await
}

/// Watermill's table.
pub(crate) async fn create_watermill(servers: &Servers, database: &str) -> Result<Client> {
    create(servers, database, WATERMILL).await
}

/// Rows into an emptied table of Watermill's.
pub(crate) async fn fill_watermill(client: &Client, count: u64) -> Result<()> {
    client.batch_execute("TRUNCATE watermill_outbox").await?;
    client
        .batch_execute(&format!(
            "INSERT INTO watermill_outbox (uuid, payload, metadata, transaction_id)
             SELECT gen_random_uuid(), ({PAYLOAD})::json, json_build_object('key', {KEY}), pg_current_xact_id() FROM {}",
            series(0, count)
        ))
        .await?;
    settle(client, "watermill_outbox").await
}
