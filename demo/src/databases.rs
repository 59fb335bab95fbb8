//! What the databases say, read with plain SQL.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result};
use contracts::shop::common::v1::Money;
use contracts::shop::inventory::v1::Stock;
use contracts::shop::order::v1::{Order, OrderItem, OrderStatus};
use contracts::shop::payment::events::v1::FailureReason;
use contracts::shop::payment::v1::{Payment, PaymentFailure, PaymentStatus};
use contracts::shop::user::v1::User;
use contracts::wire::timestamp;
use local_stack::shop::{Addresses, Events, SERVICES};
use serde::Deserialize;
use tokio_postgres::types::ToSql;
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

/// How far a consumer has come with an entity.
#[derive(Debug, Clone)]
pub(crate) struct Mark {
    pub(crate) topic: String,
    pub(crate) entity_id: String,
    pub(crate) version: i64,
    /// When it, and the effect with it, committed, in microseconds since 1970.
    pub(crate) committed_at_us: i64,
}

/// What inventory-svc has decided about an order.
#[derive(Debug, Clone)]
pub(crate) struct Reservation {
    pub(crate) order_id: String,
    /// As the database has it: `reserved`, `rejected`, `committed` or `released`.
    pub(crate) status: String,
    pub(crate) version: i64,
}

/// A mail, as notification-svc knows it.
#[derive(Debug, Clone)]
pub(crate) struct MailRow {
    /// The id of the event that it answers.
    pub(crate) notification_id: Uuid,
    pub(crate) order_id: String,
    pub(crate) event_type: String,
    /// As the database has it: `waiting`, `pending`, `sending`, `sent`, `failed` or `unknown`.
    pub(crate) state: String,
}

/// How much has not come to its end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Open {
    /// Orders, payments and reservations.
    pub(crate) sagas: u64,
    /// Mails that are to be sent.
    pub(crate) mails: u64,
    /// Windows whose figures have changed since they were told of.
    pub(crate) windows: u64,
}

impl Open {
    pub(crate) fn sum(self) -> u64 {
        self.sagas + self.mails + self.windows
    }
}

/// Connections to all databases.
pub(crate) struct Databases(BTreeMap<String, Client>);

impl Databases {
    pub(crate) async fn connect(addresses: &Addresses) -> Result<Self> {
        let mut clients = BTreeMap::new();
        for (name, url) in &addresses.databases {
            clients.insert(name.clone(), local_stack::postgres::connect(url).await?);
        }
        Ok(Self(clients))
    }

    /// The connection to a database.
    pub(crate) fn client(&self, database: &str) -> Result<&Client> {
        let client = self.0.get(database);
        client.with_context(|| format!("there is no database {database}"))
    }

    async fn query(&self, database: &str, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        bounded(self.client(database)?.query(sql, parameters))
            .await
            .with_context(|| format!("in the database {database}"))
    }

    async fn number(&self, database: &str, sql: &str) -> Result<u64> {
        let rows = self.query(database, sql, &[]).await?;
        let row = rows.first().context("a count has a row")?;
        Ok(u64::try_from(row.get::<_, i64>(0))?)
    }

    /// How many events of a kind an outbox has.
    pub(crate) async fn outbox_count(&self, database: &str, entity_type: &str) -> Result<u64> {
        let sql = "SELECT count(*) FROM outbox WHERE aggregate_type = $1";
        let rows = self.query(database, sql, &[&entity_type]).await?;
        let row = rows.first().context("a count has a row")?;
        Ok(u64::try_from(row.get::<_, i64>(0))?)
    }

    /// How many events a consumer has taken in: its marks count versions from 1.
    pub(crate) async fn consumed(&self, database: &str) -> Result<u64> {
        let sql = "SELECT coalesce(sum(version), 0)::bigint FROM consumer_marks";
        self.number(database, sql).await
    }

    /// What consumers could not handle, in words.
    pub(crate) async fn parked(&self) -> Result<Vec<String>> {
        let sql = "SELECT format('%s parked %s/%s/%s as %s: %s', consumer, topic, partition, kafka_offset, error_kind, error) \
                   FROM parked_records WHERE state = 'parked' ORDER BY id LIMIT 10";
        let mut parked = Vec::new();
        for service in SERVICES.iter().filter(|service| !service.consumes.is_empty()) {
            if let Some(database) = service.database {
                let rows = self.query(database, sql, &[]).await?;
                parked.extend(rows.iter().map(|row| row.get::<_, String>(0)));
            }
        }
        Ok(parked)
    }

    /// What has not come to its end.
    pub(crate) async fn open(&self) -> Result<Open> {
        let orders = "SELECT count(*) FROM orders WHERE status IN ('pending', 'paid')";
        let payments = "SELECT count(*) FROM payments WHERE status IN ('pending', 'refund_pending')";
        let reservations = "SELECT count(*) FROM reservations WHERE status = 'reserved'";
        let mails = "SELECT count(*) FROM mails WHERE state IN ('waiting', 'pending', 'sending')";
        let windows = "SELECT count(*) FROM sales_changes";
        Ok(Open {
            sagas: self.number("orders", orders).await?
                + self.number("payments", payments).await?
                + self.number("inventory", reservations).await?,
            mails: self.number("notifications", mails).await?,
            windows: self.number("analytics", windows).await?,
        })
    }

    /// The rows of state of orders.
    pub(crate) async fn orders(&self, order_id: Option<&str>) -> Result<Vec<Order>> {
        let sql = "SELECT order_id::text, user_id::text, status, items, total_minor_units, currency, version, \
                          coalesce(user_email, ''), coalesce(payment_method_id::text, ''), pay_by, created_at, \
                          updated_at, coalesce(cancel_reason, ''), coalesce(tracking_number, ''), \
                          coalesce(carrier, ''), coalesce(payment_id::text, '') \
                   FROM orders WHERE $1::text IS NULL OR order_id::text = $1";
        let rows = self.query("orders", sql, &[&order_id]).await?;
        rows.iter().map(order).collect()
    }

    /// The rows of state of payments, oldest first.
    pub(crate) async fn payments(&self, order_id: Option<&str>) -> Result<Vec<Payment>> {
        let sql = "SELECT payment_id::text, order_id::text, user_id::text, status, amount_minor_units, currency, \
                          coalesce(brand, ''), coalesce(last_four, ''), failure_reason, another_try, \
                          coalesce(intent, ''), version, created_at, updated_at \
                   FROM payments WHERE $1::text IS NULL OR order_id::text = $1 ORDER BY created_at, payment_id";
        let rows = self.query("payments", sql, &[&order_id]).await?;
        rows.iter().map(payment).collect()
    }

    /// The stock of all products.
    pub(crate) async fn stock(&self) -> Result<Vec<Stock>> {
        let sql = "SELECT product_id::text, available, reserved, sold, version, updated_at FROM stock";
        let rows = self.query("inventory", sql, &[]).await?;
        let stock = |row: &Row| Stock {
            product_id: row.get(0),
            available: row.get(1),
            reserved: row.get(2),
            sold: row.get(3),
            version: row.get(4),
            updated_at: Some(timestamp(row.get(5))),
        };
        Ok(rows.iter().map(stock).collect())
    }

    /// The reservations of all orders.
    pub(crate) async fn reservations(&self) -> Result<Vec<Reservation>> {
        let sql = "SELECT order_id::text, status, version FROM reservations";
        let rows = self.query("inventory", sql, &[]).await?;
        let reservation = |row: &Row| Reservation {
            order_id: row.get(0),
            status: row.get(1),
            version: row.get(2),
        };
        Ok(rows.iter().map(reservation).collect())
    }

    /// The rows of state of users.
    pub(crate) async fn users(&self) -> Result<Vec<User>> {
        let sql =
            "SELECT user_id::text, email, first_name, last_name, version, created_at, updated_at FROM users";
        let rows = self.query("users", sql, &[]).await?;
        let user = |row: &Row| User {
            user_id: row.get(0),
            email: row.get(1),
            first_name: row.get(2),
            last_name: row.get(3),
            version: row.get(4),
            created_at: Some(timestamp(row.get(5))),
            updated_at: Some(timestamp(row.get(6))),
        };
        Ok(rows.iter().map(user).collect())
    }

    /// All mails.
    pub(crate) async fn mails(&self) -> Result<Vec<MailRow>> {
        let sql = "SELECT notification_id, order_id::text, event_type, state FROM mails";
        let rows = self.query("notifications", sql, &[]).await?;
        let mail = |row: &Row| MailRow {
            notification_id: row.get(0),
            order_id: row.get(1),
            event_type: row.get(2),
            state: row.get(3),
        };
        Ok(rows.iter().map(mail).collect())
    }

    /// Windows that events have told of, by the names that events give them, with the version of the last one.
    pub(crate) async fn windows(&self) -> Result<Vec<(String, i64)>> {
        let sql = "SELECT (ARRAY['minute', 'hour', 'day'])[window_size] || '/' \
                          || to_char(window_start AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), version \
                   FROM window_emissions";
        let rows = self.query("analytics", sql, &[]).await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// The events of a kind; all, or those about one order, whose id is the correlation id. Those that are not stored are in the outbox
    /// alone.
    pub(crate) async fn events(
        &self,
        database: &str,
        kind: Events,
        order_id: Option<Uuid>,
    ) -> Result<Vec<EventRow>> {
        if !kind.stored {
            let rows = self.outbox(database, kind.entity_type, order_id).await?;
            return Ok(rows.into_iter().map(|row| row.event).collect());
        }
        let sql = "SELECT entity_type, entity_id, version, event_id, event_type, schema_version, payload, \
                          correlation_id, traceparent \
                   FROM events WHERE entity_type = $1 AND ($2::uuid IS NULL OR correlation_id = $2) \
                   ORDER BY occurred_at, entity_id, version";
        let rows = self.query(database, sql, &[&kind.entity_type, &order_id]).await?;
        Ok(rows.iter().map(|row| event(row, 0)).collect())
    }

    /// The same of an outbox, in the order of its ids.
    pub(crate) async fn outbox(
        &self,
        database: &str,
        entity_type: &str,
        order_id: Option<Uuid>,
    ) -> Result<Vec<OutboxRow>> {
        let sql = "SELECT id, (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::bigint, \
                          aggregate_type, aggregate_id, aggregate_version, event_id, event_type, schema_version, \
                          payload, correlation_id, traceparent \
                   FROM outbox WHERE aggregate_type = $1 AND ($2::uuid IS NULL OR correlation_id = $2) ORDER BY id";
        let rows = self.query(database, sql, &[&entity_type, &order_id]).await?;
        Ok(rows
            .iter()
            .map(|row| OutboxRow {
                id: row.get(0),
                committed_at_us: row.get::<_, Option<i64>>(1).unwrap_or_default(),
                event: event(row, 2),
            })
            .collect())
    }

    /// How far a consumer has come with each entity.
    pub(crate) async fn marks(&self, database: &str) -> Result<Vec<Mark>> {
        let sql = "SELECT topic, entity_id, version, \
                          (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::bigint \
                   FROM consumer_marks";
        let rows = self.query(database, sql, &[]).await?;
        Ok(rows
            .iter()
            .map(|row| Mark {
                topic: row.get(0),
                entity_id: row.get(1),
                version: row.get(2),
                committed_at_us: row.get::<_, Option<i64>>(3).unwrap_or_default(),
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

/// From the columns that [`Databases::orders`] selects.
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

/// From the columns that [`Databases::payments`] selects.
fn payment(row: &Row) -> Result<Payment> {
    let payment_id: String = row.get(0);
    let status: String = row.get(3);
    let status = PaymentStatus::from_str_name(&format!("PAYMENT_STATUS_{}", status.to_uppercase()))
        .with_context(|| format!("payment {payment_id} has the status {status:?}"))?;
    let failure = match row.get::<_, Option<String>>(8) {
        None => None,
        Some(reason) => {
            let reason = FailureReason::from_str_name(&format!("FAILURE_REASON_{}", reason.to_uppercase()))
                .with_context(|| format!("payment {payment_id} failed for the reason {reason:?}"))?;
            Some(PaymentFailure {
                reason: reason.into(),
                another_try: row.get::<_, Option<bool>>(9).unwrap_or_default(),
            })
        }
    };
    Ok(Payment {
        payment_id,
        order_id: row.get(1),
        user_id: row.get(2),
        status: status.into(),
        amount: Some(Money {
            minor_units: row.get(4),
            currency_code: row.get(5),
        }),
        brand: row.get(6),
        last_four: row.get(7),
        failure,
        provider_reference: row.get(10),
        version: row.get(11),
        created_at: Some(timestamp(row.get(12))),
        updated_at: Some(timestamp(row.get(13))),
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
