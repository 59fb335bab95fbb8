//! A whole consumer: how many orders were placed, by day.
//!
//! ```text
//! cargo run --release -p consumer --example totals -- localhost:9092 events.order postgres://app@localhost/totals
//! ```

use std::collections::BTreeMap;

use chrono::NaiveDate;
use consumer::{BoxError, Config, Consumer, Handler, HandlerError, Incoming, Record, RunError, Topic};
use diesel::sql_types::{Array, BigInt, Date};
use diesel_async::pooled_connection::AsyncDieselConnectionManager;
use diesel_async::pooled_connection::deadpool::Pool;
use diesel_async::{AsyncConnection as _, AsyncMigrationHarness, AsyncPgConnection, RunQueryDsl as _};
use diesel_migrations::MigrationHarness as _;
use tokio_util::sync::CancellationToken;

/// The figures, in a table.
struct OrdersByDay;

impl Handler for OrdersByDay {
    /// The day, of events that count.
    type Event = Option<NaiveDate>;
    type Effect = ();

    fn read(&self, record: &Record) -> Result<Option<NaiveDate>, BoxError> {
        let envelope = &record.envelope;
        match (envelope.event_type.as_str(), envelope.schema_version) {
            ("order.placed", 1) => Ok(Some(envelope.occurred_at.date_naive())),
            // What a later version means is not known: it waits for code that knows it.
            ("order.placed", version) => Err(format!("major version {version} is not known").into()),
            _ => Ok(None),
        }
    }

    async fn apply(
        &self,
        connection: &mut AsyncPgConnection,
        batch: &[Incoming<'_, Option<NaiveDate>>],
    ) -> Result<(), HandlerError> {
        let mut placed: BTreeMap<NaiveDate, i64> = BTreeMap::new();
        for day in batch.iter().filter_map(|incoming| *incoming.event) {
            *placed.entry(day).or_default() += 1;
        }
        let (days, orders): (Vec<NaiveDate>, Vec<i64>) = placed.into_iter().unzip();
        // One statement for the batch. The version marks see to it that nothing is added twice.
        diesel::sql_query(
            "INSERT INTO orders_by_day AS o (day, orders) SELECT * FROM unnest($1, $2) \
             ON CONFLICT (day) DO UPDATE SET orders = o.orders + excluded.orders",
        )
        .bind::<Array<Date>, _>(days)
        .bind::<Array<BigInt>, _>(orders)
        .execute(connection)
        .await?;
        Ok(())
    }
}

/// Makes the tables that are missing.
pub(crate) async fn prepare(database_url: &str) -> Result<(), BoxError> {
    let connection = AsyncPgConnection::establish(database_url).await?;
    let mut harness = AsyncMigrationHarness::new(connection);
    harness.run_pending_migrations(consumer::MIGRATIONS)?;
    let table = "CREATE TABLE IF NOT EXISTS orders_by_day (day date PRIMARY KEY, orders bigint NOT NULL)";
    diesel::sql_query(table)
        .execute(&mut harness.into_inner())
        .await?;
    Ok(())
}

/// Counts until `shutdown`.
pub(crate) async fn count(
    brokers: &str,
    topic: &str,
    database_url: &str,
    group: &str,
    shutdown: CancellationToken,
) -> Result<(), BoxError> {
    let config = Config::new(brokers, group, vec![Topic::from_beginning(topic)]);
    let manager = AsyncDieselConnectionManager::<AsyncPgConnection>::new(database_url);
    let pool = Pool::builder(manager).max_size(config.workers).build()?;
    let consumer = Consumer::new(config, pool, OrdersByDay, &prometheus::Registry::new())?;
    let ended: Result<(), RunError> = consumer.run(shutdown).await;
    Ok(ended?)
}

#[tokio::main]
#[cfg_attr(test, expect(dead_code, reason = "the test has a main of its own"))]
async fn main() -> Result<(), BoxError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [brokers, topic, database_url] = &arguments[..] else {
        return Err("usage: totals BROKERS TOPIC DATABASE_URL".into());
    };
    prepare(database_url).await?;
    let shutdown = CancellationToken::new();
    let on_signal = shutdown.clone();
    tokio::spawn(async move {
        // Without signals it runs until it is killed, which is as good.
        if tokio::signal::ctrl_c().await.is_ok() {
            on_signal.cancel();
        }
    });
    count(brokers, topic, database_url, "orders-by-day", shutdown).await
}
