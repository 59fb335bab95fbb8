//! Orders in PostgreSQL: the only module that knows the schema, and the only one that writes.
//!
//! [`save`] is the only public write. It takes the new state together with its events, so state without event cannot be
//! written: the order's row, by which the version is checked, its history and the outbox, in one round trip.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use diesel::prelude::{
    AsChangeset, BoolExpressionMethods as _, ExpressionMethods, Identifiable, Insertable, OptionalExtension,
    QueryDsl, Queryable, Selectable, SelectableHelper,
};
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel::sql_types::Bool;
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use diesel_migrations::{EmbeddedMigrations, embed_migrations};
use event_store::{AppendError, Cause, Entity, NewEvent, StoredEvent};
use serde::{Deserialize, Serialize};
use service::db::DbError;
use uuid::Uuid;

use crate::codec::{self, DecodeError};
use crate::domain::{
    Cancellation, CancelledBy, Change, Currency, Event, Items, Line, Money, Order, OrderId, Payment,
    PaymentMethodId, ProductId, Shipment, Status, UserId,
};

/// Creates the table of orders.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!("../migrations/order");

/// The entity type of orders.
pub const ENTITY_TYPE: &str = contracts::catalogue::order::ENTITY_TYPE;

mod schema {
    diesel::table! {
        orders (order_id) {
            order_id -> Uuid,
            version -> BigInt,
            user_id -> Uuid,
            status -> Text,
            items -> Jsonb,
            total_minor_units -> BigInt,
            currency -> Text,
            user_email -> Nullable<Text>,
            payment_method_id -> Nullable<Uuid>,
            pay_by -> Timestamptz,
            created_at -> Timestamptz,
            updated_at -> Timestamptz,
            reserved_at -> Nullable<Timestamptz>,
            overdue_at -> Nullable<Timestamptz>,
            paid_at -> Nullable<Timestamptz>,
            payment_id -> Nullable<Uuid>,
            payment_brand -> Nullable<Text>,
            payment_last_four -> Nullable<Text>,
            confirmed_at -> Nullable<Timestamptz>,
            shipped_at -> Nullable<Timestamptz>,
            tracking_number -> Nullable<Text>,
            carrier -> Nullable<Text>,
            delivered_at -> Nullable<Timestamptz>,
            cancelled_at -> Nullable<Timestamptz>,
            cancelled_by -> Nullable<Text>,
            cancel_reason -> Nullable<Text>,
        }
    }
}

use schema::orders;

/// Why an order could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("order {0} has moved on")]
    Conflict(OrderId),
    #[error("column {column} of order {id} holds what no order can have")]
    Broken { id: OrderId, column: &'static str },
    #[error("version {version} of order {id} cannot be read")]
    Undecodable {
        id: OrderId,
        version: i64,
        source: DecodeError,
    },
    #[error(transparent)]
    Database(#[from] DbError),
}

impl From<DieselError> for StoreError {
    fn from(error: DieselError) -> Self {
        Self::Database(error.into())
    }
}

/// Whether a row is read to be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    None,
    /// Until the end of the transaction; whoever else wants to change it waits.
    Update,
    /// The same, if nobody else has it locked: then it is as if there were no such order.
    UpdateIfFree,
}

/// The order, if there is one.
///
/// # Errors
/// [`StoreError::Broken`] when the row cannot be an order's.
pub async fn load(
    conn: &mut AsyncPgConnection,
    id: OrderId,
    lock: Lock,
) -> Result<Option<Order>, StoreError> {
    let query = orders::table.find(id.0).select(OrderRow::as_select());
    let row = match lock {
        Lock::None => query.first(conn).await.optional()?,
        Lock::Update => query.for_update().first(conn).await.optional()?,
        Lock::UpdateIfFree => query.for_update().skip_locked().first(conn).await.optional()?,
    };
    row.map(OrderRow::into_order).transpose()
}

/// Those of these orders that there are, locked in the order of their ids until the end of the transaction.
///
/// # Errors
/// As [`load`].
pub async fn lock(
    conn: &mut AsyncPgConnection,
    ids: &BTreeSet<OrderId>,
) -> Result<BTreeMap<OrderId, Order>, StoreError> {
    let rows: Vec<OrderRow> = orders::table
        .filter(orders::order_id.eq_any(ids.iter().map(|id| id.0)))
        .order(orders::order_id)
        .select(OrderRow::as_select())
        .for_update()
        .load(conn)
        .await?;
    rows.into_iter()
        .map(|row| Ok((OrderId(row.order_id), row.into_order()?)))
        .collect()
}

/// An order that should have been paid, and where it stands among those.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Queryable)]
pub struct Due {
    pub pay_by: DateTime<Utc>,
    pub order_id: Uuid,
}

/// Pending orders that had to be paid by `now` and are not recorded as overdue yet, behind `after`, at most `limit`.
///
/// # Errors
/// Whatever keeps the database from answering.
pub async fn due(
    conn: &mut AsyncPgConnection,
    now: DateTime<Utc>,
    after: Option<Due>,
    limit: u16,
) -> Result<Vec<Due>, StoreError> {
    let mut query = orders::table
        // As it stands in the index: by a parameter, no plan that is kept could use it.
        .filter(diesel::dsl::sql::<Bool>("status = 'pending'"))
        .filter(orders::overdue_at.is_null())
        .filter(orders::pay_by.le(now))
        .order((orders::pay_by, orders::order_id))
        .select((orders::pay_by, orders::order_id))
        .limit(i64::from(limit))
        .into_boxed();
    if let Some(Due { pay_by, order_id }) = after {
        // The first condition is what the index is entered by; the second one tells orders of one moment apart.
        query = query
            .filter(orders::pay_by.ge(pay_by))
            .filter(orders::pay_by.gt(pay_by).or(orders::order_id.gt(order_id)));
    }
    Ok(query.load(conn).await?)
}

/// An event that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    pub event_id: Uuid,
    pub event_type: &'static str,
    pub entity_id: OrderId,
    pub version: i64,
}

/// Writes what a command did: the order's row, its events and their outbox rows, in the caller's transaction, which has locked
/// the order if there was one. Writes nothing when nothing happened.
///
/// # Errors
/// [`StoreError::Conflict`] when the order is not at the version that the change starts from.
pub async fn save(
    conn: &AsyncPgConnection,
    change: &Change,
    cause: &Cause,
) -> Result<Vec<Recorded>, StoreError> {
    let (order, before) = (change.order(), change.version_before());
    if change.events().is_empty() {
        return Ok(Vec::new());
    }
    let row = OrderRow::from(order);
    let state = async {
        let written = if before == 0 {
            let insert = diesel::insert_into(orders::table).values(&row);
            insert.execute(&mut &*conn).await
        } else {
            let target = orders::table.find(order.id.0).filter(orders::version.eq(before));
            diesel::update(target).set(&row).execute(&mut &*conn).await
        };
        match written {
            Ok(1) => Ok(()),
            Ok(_) | Err(DieselError::DatabaseError(DatabaseErrorKind::UniqueViolation, _)) => {
                Err(StoreError::Conflict(order.id))
            }
            Err(error) => Err(error.into()),
        }
    };
    let events: Vec<NewEvent> = change
        .events()
        .iter()
        .map(|event| codec::encode(order.id, event))
        .collect();
    let entity = Entity {
        entity_type: ENTITY_TYPE,
        entity_id: order.id.to_string(),
        topic: None,
    };
    let events_and_outbox = async {
        let appended = event_store::append(conn, &entity, before, &events, cause).await;
        appended.map_err(|error| match error {
            AppendError::Conflict => StoreError::Conflict(order.id),
            AppendError::Database(error) => error.into(),
        })
    };
    let ((), ids) = tokio::try_join!(biased; state, events_and_outbox)?;
    let recorded = |((version, event), event_id): ((i64, &NewEvent), Uuid)| Recorded {
        event_id,
        event_type: event.event_type,
        entity_id: order.id,
        version,
    };
    Ok((before + 1..).zip(&events).zip(ids).map(recorded).collect())
}

/// Stored events of an order after a version, oldest first.
///
/// # Errors
/// Whatever keeps the database from answering.
pub async fn history(
    conn: &mut AsyncPgConnection,
    id: OrderId,
    after_version: i64,
    limit: u16,
) -> Result<Vec<StoredEvent>, StoreError> {
    let events = event_store::load(
        conn,
        ENTITY_TYPE,
        &id.to_string(),
        after_version,
        i64::from(limit),
    )
    .await?;
    Ok(events)
}

/// The rows behind an order, in the order of their ids, at most `limit`.
///
/// # Errors
/// Whatever keeps the database from answering.
pub(crate) async fn rows_after(
    conn: &mut AsyncPgConnection,
    after: Uuid,
    limit: i64,
) -> diesel::QueryResult<Vec<OrderRow>> {
    orders::table
        .filter(orders::order_id.gt(after))
        .order(orders::order_id)
        .limit(limit)
        .select(OrderRow::as_select())
        .load(conn)
        .await
}

/// A stored event as the domain knows it.
///
/// # Errors
/// [`StoreError::Undecodable`]
pub fn decode(id: OrderId, stored: &StoredEvent) -> Result<Event, StoreError> {
    codec::decode(id, &stored.event_type, stored.schema_version, &stored.payload).map_err(|source| {
        StoreError::Undecodable {
            id,
            version: stored.version,
            source,
        }
    })
}

/// A row of `orders`.
#[derive(
    Debug, Clone, PartialEq, Eq, Queryable, Selectable, Identifiable, Insertable, AsChangeset, Serialize,
)]
#[diesel(table_name = orders)]
#[diesel(primary_key(order_id))]
#[diesel(treat_none_as_null = true)]
// NULL rather than DEFAULT, with which diesel would prepare every insert anew.
#[diesel(treat_none_as_default_value = false)]
#[diesel(check_for_backend(diesel::pg::Pg))]
pub(crate) struct OrderRow {
    pub(crate) order_id: Uuid,
    pub(crate) version: i64,
    user_id: Uuid,
    status: String,
    items: serde_json::Value,
    total_minor_units: i64,
    currency: String,
    user_email: Option<String>,
    payment_method_id: Option<Uuid>,
    pay_by: DateTime<Utc>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    reserved_at: Option<DateTime<Utc>>,
    overdue_at: Option<DateTime<Utc>>,
    paid_at: Option<DateTime<Utc>>,
    payment_id: Option<Uuid>,
    payment_brand: Option<String>,
    payment_last_four: Option<String>,
    confirmed_at: Option<DateTime<Utc>>,
    shipped_at: Option<DateTime<Utc>>,
    tracking_number: Option<String>,
    carrier: Option<String>,
    delivered_at: Option<DateTime<Utc>>,
    cancelled_at: Option<DateTime<Utc>>,
    cancelled_by: Option<String>,
    cancel_reason: Option<String>,
}

/// An element of the column `items`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ItemJson {
    product_id: Uuid,
    quantity: i32,
    unit_price: i64,
}

const STATUSES: [(Status, &str); 6] = [
    (Status::Pending, "pending"),
    (Status::Paid, "paid"),
    (Status::Confirmed, "confirmed"),
    (Status::Shipped, "shipped"),
    (Status::Delivered, "delivered"),
    (Status::Cancelled, "cancelled"),
];

const CANCELLED_BY: [(CancelledBy, &str); 5] = [
    (CancelledBy::User, "user"),
    (CancelledBy::OutOfStock, "out_of_stock"),
    (CancelledBy::NotPaidInTime, "not_paid_in_time"),
    (CancelledBy::PaymentFailed, "payment_failed"),
    (CancelledBy::Refund, "refund"),
];

fn name_of<T: Copy + PartialEq>(names: &[(T, &'static str)], value: T) -> String {
    names
        .iter()
        .find(|(known, _)| *known == value)
        .map_or("", |(_, name)| name)
        .to_owned()
}

fn value_of<T: Copy>(names: &[(T, &'static str)], name: &str) -> Option<T> {
    names
        .iter()
        .find(|(_, known)| *known == name)
        .map(|(value, _)| *value)
}

impl From<&Order> for OrderRow {
    fn from(order: &Order) -> Self {
        let item = |line: &Line| ItemJson {
            product_id: line.product_id.0,
            quantity: line.quantity,
            unit_price: line.unit_price,
        };
        let items: Vec<ItemJson> = order.items.lines().iter().map(item).collect();
        let total = order.items.total();
        let (payment, paid_at) = order.paid.clone().unzip();
        let (shipment, shipped_at) = order.shipped.clone().unzip();
        let (cancellation, cancelled_at) = order.cancelled.clone().unzip();
        Self {
            order_id: order.id.0,
            version: order.version,
            user_id: order.user_id.0,
            status: name_of(&STATUSES, order.status),
            items: serde_json::json!(items),
            total_minor_units: total.minor_units(),
            currency: total.currency().code().to_owned(),
            user_email: order.user_email.clone(),
            payment_method_id: order.payment_method_id.map(|id| id.0),
            pay_by: order.pay_by,
            created_at: order.created_at,
            updated_at: order.updated_at,
            reserved_at: order.reserved_at,
            overdue_at: order.overdue_at,
            paid_at,
            payment_id: payment.as_ref().map(|payment| payment.payment_id),
            payment_brand: payment.as_ref().map(|payment| payment.brand.clone()),
            payment_last_four: payment.map(|payment| payment.last_four),
            confirmed_at: order.confirmed_at,
            shipped_at,
            tracking_number: shipment.as_ref().map(|shipment| shipment.tracking_number.clone()),
            carrier: shipment.map(|shipment| shipment.carrier),
            delivered_at: order.delivered_at,
            cancelled_at,
            cancelled_by: cancellation
                .as_ref()
                .map(|cancellation| name_of(&CANCELLED_BY, cancellation.by)),
            cancel_reason: cancellation.map(|cancellation| cancellation.reason),
        }
    }
}

impl OrderRow {
    fn into_order(self) -> Result<Order, StoreError> {
        let id = OrderId(self.order_id);
        let broken = |column| StoreError::Broken { id, column };
        let currency = Currency::from_code(&self.currency).ok_or(broken("currency"))?;
        let items: Vec<ItemJson> = serde_json::from_value(self.items).map_err(|_| broken("items"))?;
        let line = |item: ItemJson| Line {
            product_id: ProductId(item.product_id),
            quantity: item.quantity,
            unit_price: item.unit_price,
        };
        let items =
            Items::new(items.into_iter().map(line).collect(), currency).map_err(|_| broken("items"))?;
        if Money::new(self.total_minor_units, currency) != Some(items.total()) {
            return Err(broken("total_minor_units"));
        }
        let paid = match (
            self.paid_at,
            self.payment_id,
            self.payment_brand,
            self.payment_last_four,
        ) {
            (Some(at), Some(payment_id), Some(brand), Some(last_four)) => Some((
                Payment {
                    payment_id,
                    amount: items.total(),
                    brand,
                    last_four,
                },
                at,
            )),
            (None, None, None, None) => None,
            _ => return Err(broken("paid_at")),
        };
        let shipped = match (self.shipped_at, self.tracking_number, self.carrier) {
            (Some(at), Some(tracking_number), Some(carrier)) => Some((
                Shipment {
                    tracking_number,
                    carrier,
                },
                at,
            )),
            (None, None, None) => None,
            _ => return Err(broken("shipped_at")),
        };
        let cancelled = match (self.cancelled_at, self.cancelled_by, self.cancel_reason) {
            (Some(at), Some(by), Some(reason)) => {
                let by = value_of(&CANCELLED_BY, &by).ok_or(broken("cancelled_by"))?;
                Some((Cancellation { by, reason }, at))
            }
            (None, None, None) => None,
            _ => return Err(broken("cancelled_at")),
        };
        Ok(Order {
            id,
            user_id: UserId(self.user_id),
            items,
            user_email: self.user_email,
            payment_method_id: self.payment_method_id.map(PaymentMethodId),
            pay_by: self.pay_by,
            status: value_of(&STATUSES, &self.status).ok_or(broken("status"))?,
            version: self.version,
            created_at: self.created_at,
            updated_at: self.updated_at,
            reserved_at: self.reserved_at,
            overdue_at: self.overdue_at,
            paid,
            confirmed_at: self.confirmed_at,
            shipped,
            delivered_at: self.delivered_at,
            cancelled,
        })
    }
}
