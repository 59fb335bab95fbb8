//! What the databases say, read with plain SQL.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result};
use contracts::shop::common::v1::Money;
use contracts::shop::order::v1::{Order, OrderItem, OrderStatus};
use contracts::wire::timestamp;
use serde::Deserialize;
use tokio_postgres::{Client, Row};
use uuid::Uuid;

const QUERY_LIMIT: Duration = Duration::from_secs(60);

/// An event, as the event store has it and the outbox should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EventRow {
    pub(crate) entity_type: String,
    pub(crate) entity_id: String,
    pub(crate) version: i64,
    pub(crate) event_id: Uuid,
    pub(crate) event_type: String,
    pub(crate) schema_version: i32,
    pub(crate) payload: Vec<u8>,
    pub(crate) correlation_id: Option<Uuid>,
    pub(crate) traceparent: Option<String>,
}

#[derive(Debug, Clone)]
pub(crate) struct OutboxRow {
    pub(crate) id: i64,
    pub(crate) event: EventRow,
    /// When its transaction committed, in microseconds since 1970.
    pub(crate) committed_at_us: i64,
}

/// When a row of the read model was last written.
#[derive(Debug, Clone)]
pub(crate) struct Committed {
    pub(crate) order_id: String,
    pub(crate) version: i64,
    pub(crate) committed_at_us: i64,
}

/// Connections to both databases.
pub(crate) struct Databases {
    pub(crate) orders: Client,
    pub(crate) order_query: Client,
}

impl Databases {
    pub(crate) async fn connect(orders: &str, order_query: &str) -> Result<Self> {
        Ok(Self {
            orders: local_stack::postgres::connect(orders).await?,
            order_query: local_stack::postgres::connect(order_query).await?,
        })
    }

    /// How many rows the outbox has.
    pub(crate) async fn outbox_count(&self) -> Result<u64> {
        let row = bounded(self.orders.query_one("SELECT count(*) FROM outbox", &[])).await?;
        Ok(u64::try_from(row.get::<_, i64>(0))?)
    }

    /// How many events the read model has taken in.
    pub(crate) async fn projected_events(&self) -> Result<u64> {
        let sql = "SELECT coalesce(sum(order_version), 0)::bigint FROM order_views";
        let row = bounded(self.order_query.query_one(sql, &[])).await?;
        Ok(u64::try_from(row.get::<_, i64>(0))?)
    }

    /// The rows of state; all, or that of one order.
    pub(crate) async fn state(&self, order_id: Option<&str>) -> Result<Vec<Order>> {
        let sql = "SELECT order_id::text, user_id::text, status, items, total_minor_units, currency, version, \
                          coalesce(user_email, ''), coalesce(payment_method_id::text, ''), pay_by, created_at, \
                          updated_at, coalesce(cancel_reason, ''), coalesce(tracking_number, ''), \
                          coalesce(carrier, ''), coalesce(payment_id::text, '') \
                   FROM orders WHERE $1::text IS NULL OR order_id::text = $1";
        let rows = bounded(self.orders.query(sql, &[&order_id])).await?;
        rows.iter().map(order).collect()
    }

    /// The event store; whole, or of one order.
    pub(crate) async fn events(&self, order_id: Option<&str>) -> Result<Vec<EventRow>> {
        let sql = "SELECT entity_type, entity_id, version, event_id, event_type, schema_version, payload, \
                          correlation_id, traceparent \
                   FROM events WHERE $1::text IS NULL OR entity_id = $1 ORDER BY entity_id, version";
        let rows = bounded(self.orders.query(sql, &[&order_id])).await?;
        Ok(rows.iter().map(|row| event(row, 0)).collect())
    }

    /// The outbox in the order of its ids; whole, or of one order.
    pub(crate) async fn outbox(&self, order_id: Option<&str>) -> Result<Vec<OutboxRow>> {
        let sql = "SELECT id, (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::bigint, \
                          aggregate_type, aggregate_id, aggregate_version, event_id, event_type, schema_version, \
                          payload, correlation_id, traceparent \
                   FROM outbox WHERE $1::text IS NULL OR aggregate_id = $1 ORDER BY id";
        let rows = bounded(self.orders.query(sql, &[&order_id])).await?;
        Ok(rows
            .iter()
            .map(|row| OutboxRow {
                id: row.get(0),
                committed_at_us: row.get::<_, Option<i64>>(1).unwrap_or_default(),
                event: event(row, 2),
            })
            .collect())
    }

    /// When each row of the read model was last written; all, or that of one order.
    pub(crate) async fn view_commits(&self, order_id: Option<&str>) -> Result<Vec<Committed>> {
        let sql = "SELECT order_id::text, order_version, \
                          (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::bigint \
                   FROM order_views WHERE $1::text IS NULL OR order_id::text = $1";
        let rows = bounded(self.order_query.query(sql, &[&order_id])).await?;
        Ok(rows
            .iter()
            .map(|row| Committed {
                order_id: row.get(0),
                version: row.get(1),
                committed_at_us: row.get::<_, Option<i64>>(2).unwrap_or_default(),
            })
            .collect())
    }
}

/// An element of the column `items`.
#[derive(Deserialize)]
struct Item {
    product_id: Uuid,
    quantity: i32,
    unit_price: i64,
}

/// From the columns that [`Databases::state`] selects.
fn order(row: &Row) -> Result<Order> {
    let order_id: String = row.get(0);
    let status: String = row.get(2);
    let status = OrderStatus::from_str_name(&format!("ORDER_STATUS_{}", status.to_uppercase()))
        .with_context(|| format!("order {order_id} has the status {status:?}"))?;
    let items: Vec<Item> = serde_json::from_value(row.get(3))
        .with_context(|| format!("the items of order {order_id} are not understood"))?;
    let items = items.into_iter().map(|item| OrderItem {
        product_id: item.product_id.to_string(),
        quantity: item.quantity,
        unit_price_minor_units: item.unit_price,
    });
    Ok(Order {
        order_id,
        user_id: row.get(1),
        status: status.into(),
        items: items.collect(),
        total: Some(Money {
            minor_units: row.get(4),
            currency_code: row.get(5),
        }),
        version: row.get(6),
        user_email: row.get(7),
        payment_method_id: row.get(8),
        pay_by: Some(timestamp(row.get(9))),
        created_at: Some(timestamp(row.get(10))),
        updated_at: Some(timestamp(row.get(11))),
        cancel_reason: row.get(12),
        tracking_number: row.get(13),
        carrier: row.get(14),
        payment_id: row.get(15),
    })
}

/// From the columns that begin at `first`.
fn event(row: &Row, first: usize) -> EventRow {
    EventRow {
        entity_type: row.get(first),
        entity_id: row.get(first + 1),
        version: row.get(first + 2),
        event_id: row.get(first + 3),
        event_type: row.get(first + 4),
        schema_version: row.get(first + 5),
        payload: row.get::<_, Option<Vec<u8>>>(first + 6).unwrap_or_default(),
        correlation_id: row.get(first + 7),
        traceparent: row.get(first + 8),
    }
}

async fn bounded<T>(query: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T> {
    let answer = tokio::time::timeout(QUERY_LIMIT, query).await;
    answer
        .with_context(|| format!("the database has not answered within {QUERY_LIMIT:?}"))?
        .context("a query failed")
}
