//! Stock and reservations in PostgreSQL: the only module that knows the schema, and the only one that writes.
//!
//! [`save`] is the only public write. It takes the new state together with its events, so state without event cannot be written: first
//! the rows, by conditional updates, then history and outbox. Whoever locks locks reservations first and then stock, each in the order
//! of their ids, so that nobody waits for each other in a circle.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use diesel::prelude::{
    ExpressionMethods, Insertable, OptionalExtension, QueryDsl, Queryable, Selectable, SelectableHelper,
};
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel::sql_types;
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use diesel_migrations::{EmbeddedMigrations, embed_migrations};
use event_store::{AppendError, Cause, Entity, Entry, NewEvent, StoredEvent};
use serde::{Deserialize, Serialize};
use service::db::DbError;
use uuid::Uuid;

use crate::codec::{self, DecodeError};
use crate::domain::reservation::{Event, Status};
use crate::domain::stock::Updated;
use crate::domain::{Changes, Counts, Line, Lines, OrderId, ProductId, Reservation, Shortage, Stock};

/// Creates the tables.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!("../migrations/inventory");

/// The entity type of reservations.
pub const RESERVATION: &str = contracts::catalogue::inventory::ENTITY_TYPE;
/// The entity type of the stock of products.
pub const STOCK: &str = contracts::catalogue::stock::ENTITY_TYPE;

mod schema {
    diesel::table! {
        stock (product_id) {
            product_id -> Uuid,
            version -> BigInt,
            available -> BigInt,
            reserved -> BigInt,
            sold -> BigInt,
            updated_at -> Timestamptz,
        }
    }

    diesel::table! {
        reservations (order_id) {
            order_id -> Uuid,
            version -> BigInt,
            status -> Text,
            lines -> Jsonb,
            shortages -> Nullable<Jsonb>,
            decided_at -> Timestamptz,
            committed_at -> Nullable<Timestamptz>,
            released_at -> Nullable<Timestamptz>,
        }
    }
}

use schema::{reservations, stock};

/// Why something could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("stock or a reservation has moved on")]
    Conflict,
    #[error("column {column} of the reservation of order {id} holds what no reservation can have")]
    Broken { id: OrderId, column: &'static str },
    #[error("version {version} of {entity} cannot be read")]
    Undecodable {
        entity: Uuid,
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
}

/// The stock of a product, if it is known.
///
/// # Errors
/// Whatever keeps the database from answering.
pub async fn load_stock(
    conn: &mut AsyncPgConnection,
    id: ProductId,
    lock: Lock,
) -> Result<Option<Stock>, StoreError> {
    let query = stock::table.find(id.0).select(StockRow::as_select());
    let row = match lock {
        Lock::None => query.first(conn).await.optional()?,
        Lock::Update => query.for_update().first(conn).await.optional()?,
    };
    Ok(row.map(StockRow::into_stock))
}

/// The stock of those of these products that are known, locked in the order of their ids until the end of the transaction.
///
/// # Errors
/// Whatever keeps the database from answering.
pub async fn lock_stock(
    conn: &mut AsyncPgConnection,
    ids: &BTreeSet<ProductId>,
) -> Result<BTreeMap<ProductId, Stock>, StoreError> {
    if ids.is_empty() {
        return Ok(BTreeMap::new());
    }
    let rows: Vec<StockRow> = stock::table
        .filter(stock::product_id.eq_any(ids.iter().map(|id| id.0)))
        .order(stock::product_id)
        .select(StockRow::as_select())
        .for_update()
        .load(conn)
        .await?;
    let stock = rows.into_iter().map(StockRow::into_stock);
    Ok(stock.map(|stock| (stock.product_id, stock)).collect())
}

/// Those of these orders' reservations that there are, locked in the order of their ids until the end of the transaction.
///
/// # Errors
/// [`StoreError::Broken`] when a row cannot be a reservation's.
pub async fn lock_reservations(
    conn: &mut AsyncPgConnection,
    ids: &BTreeSet<OrderId>,
) -> Result<BTreeMap<OrderId, Reservation>, StoreError> {
    let rows: Vec<ReservationRow> = reservations::table
        .filter(reservations::order_id.eq_any(ids.iter().map(|id| id.0)))
        .order(reservations::order_id)
        .select(ReservationRow::as_select())
        .for_update()
        .load(conn)
        .await?;
    rows.into_iter()
        .map(|row| Ok((OrderId(row.order_id), row.into_reservation()?)))
        .collect()
}

/// An event that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    pub event_id: Uuid,
    pub event_type: &'static str,
    pub entity_type: &'static str,
    pub entity_id: Uuid,
    pub version: i64,
    /// Which news caused it.
    pub cause: usize,
}

/// Writes what was decided: rows, events and outbox rows, in the caller's transaction. `cause` gives the cause of an event from which
/// news caused it and from its own entity type and id.
///
/// # Errors
/// [`StoreError::Conflict`] when something is not at the version that its change starts from.
pub async fn save(
    conn: &mut AsyncPgConnection,
    changes: &Changes,
    cause: impl Fn(usize, &'static str, Uuid) -> Cause,
) -> Result<Vec<Recorded>, StoreError> {
    save_reservations(conn, changes).await?;
    save_stock(conn, changes).await?;

    let mut pending: Vec<Pending> = Vec::new();
    for change in &changes.reservations {
        let order_id = change.reservation().order_id;
        for (version, (event, news)) in (change.version_before() + 1..).zip(change.events()) {
            pending.push(Pending {
                entity: Entity {
                    entity_type: RESERVATION,
                    entity_id: order_id.to_string(),
                    topic: Some(contracts::topics::INVENTORY),
                },
                id: order_id.0,
                version,
                event: codec::encode_reservation(order_id, event),
                cause: cause(*news, RESERVATION, order_id.0),
                news: *news,
            });
        }
    }
    for change in &changes.stock {
        let Stock {
            product_id, version, ..
        } = *change.stock();
        if let Some(event) = change.event() {
            pending.push(Pending {
                entity: Entity {
                    entity_type: STOCK,
                    entity_id: product_id.to_string(),
                    topic: None,
                },
                id: product_id.0,
                version,
                event: codec::encode_stock(product_id, event),
                cause: cause(change.cause(), STOCK, product_id.0),
                news: change.cause(),
            });
        }
    }
    let entries: Vec<Entry<'_>> = pending.iter().map(Pending::entry).collect();
    let ids = event_store::append_all(conn, &entries)
        .await
        .map_err(|error| match error {
            AppendError::Conflict => StoreError::Conflict,
            AppendError::Database(error) => error.into(),
        })?;
    let recorded = |(pending, event_id): (&Pending, Uuid)| Recorded {
        event_id,
        event_type: pending.event.event_type,
        entity_type: pending.entity.entity_type,
        entity_id: pending.id,
        version: pending.version,
        cause: pending.news,
    };
    Ok(pending.iter().zip(ids).map(recorded).collect())
}

/// An event that is to be written.
struct Pending {
    entity: Entity,
    id: Uuid,
    version: i64,
    event: NewEvent,
    cause: Cause,
    news: usize,
}

impl Pending {
    fn entry(&self) -> Entry<'_> {
        Entry {
            entity: &self.entity,
            version: self.version,
            event: &self.event,
            cause: &self.cause,
        }
    }
}

/// From arrays, a column each: as VALUES, PostgreSQL takes longer to read the statement than to do it.
async fn save_reservations(conn: &mut AsyncPgConnection, changes: &Changes) -> Result<(), StoreError> {
    use sql_types::{Array, BigInt, Jsonb, Nullable, Text, Timestamptz, Uuid};
    let (new, known): (Vec<_>, Vec<_>) = changes
        .reservations
        .iter()
        .map(|change| {
            (
                change.version_before(),
                ReservationRow::from(change.reservation()),
            )
        })
        .partition(|(before, _)| *before == 0);
    if !new.is_empty() {
        let written = diesel::sql_query(
            "INSERT INTO reservations (order_id, version, status, lines, shortages, decided_at, committed_at, released_at) \
             SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind::<Array<Uuid>, _>(column(&new, |(_, row)| row.order_id))
        .bind::<Array<BigInt>, _>(column(&new, |(_, row)| row.version))
        .bind::<Array<Text>, _>(column(&new, |(_, row)| &row.status))
        .bind::<Array<Jsonb>, _>(column(&new, |(_, row)| &row.lines))
        .bind::<Array<Nullable<Jsonb>>, _>(column(&new, |(_, row)| row.shortages.as_ref()))
        .bind::<Array<Timestamptz>, _>(column(&new, |(_, row)| row.decided_at))
        .bind::<Array<Nullable<Timestamptz>>, _>(column(&new, |(_, row)| row.committed_at))
        .bind::<Array<Nullable<Timestamptz>>, _>(column(&new, |(_, row)| row.released_at))
        .execute(conn)
        .await;
        all_written(written, new.len())?;
    }
    if !known.is_empty() {
        let written = diesel::sql_query(
            "UPDATE reservations r SET version = c.version, status = c.status, committed_at = c.committed_at, \
                 released_at = c.released_at \
             FROM unnest($1, $2, $3, $4, $5, $6) c (order_id, before, version, status, committed_at, released_at) \
             WHERE r.order_id = c.order_id AND r.version = c.before",
        )
        .bind::<Array<Uuid>, _>(column(&known, |(_, row)| row.order_id))
        .bind::<Array<BigInt>, _>(column(&known, |(before, _)| *before))
        .bind::<Array<BigInt>, _>(column(&known, |(_, row)| row.version))
        .bind::<Array<Text>, _>(column(&known, |(_, row)| &row.status))
        .bind::<Array<Nullable<Timestamptz>>, _>(column(&known, |(_, row)| row.committed_at))
        .bind::<Array<Nullable<Timestamptz>>, _>(column(&known, |(_, row)| row.released_at))
        .execute(conn)
        .await;
        all_written(written, known.len())?;
    }
    Ok(())
}

/// One row per product, however many orders wanted it.
async fn save_stock(conn: &mut AsyncPgConnection, changes: &Changes) -> Result<(), StoreError> {
    use sql_types::{Array, BigInt, Timestamptz, Uuid};
    let changed = changes.stock.iter().filter(|change| change.event().is_some());
    let (new, known): (Vec<_>, Vec<_>) = changed
        .map(|change| StockRow::from(change.stock()))
        .partition(|row| row.version == 1);
    for row in &new {
        let written = diesel::insert_into(stock::table).values(row).execute(conn).await;
        all_written(written, 1)?;
    }
    if !known.is_empty() {
        let written = diesel::sql_query(
            "UPDATE stock s SET version = c.version, available = c.available, reserved = c.reserved, sold = c.sold, \
                 updated_at = c.updated_at \
             FROM unnest($1, $2, $3, $4, $5, $6) c (product_id, version, available, reserved, sold, updated_at) \
             WHERE s.product_id = c.product_id AND s.version = c.version - 1",
        )
        .bind::<Array<Uuid>, _>(column(&known, |row| row.product_id))
        .bind::<Array<BigInt>, _>(column(&known, |row| row.version))
        .bind::<Array<BigInt>, _>(column(&known, |row| row.available))
        .bind::<Array<BigInt>, _>(column(&known, |row| row.reserved))
        .bind::<Array<BigInt>, _>(column(&known, |row| row.sold))
        .bind::<Array<Timestamptz>, _>(column(&known, |row| row.updated_at))
        .execute(conn)
        .await;
        all_written(written, known.len())?;
    }
    Ok(())
}

/// A column of rows.
fn column<'r, R, T>(rows: &'r [R], value: impl Fn(&'r R) -> T) -> Vec<T> {
    rows.iter().map(value).collect()
}

fn all_written(written: diesel::QueryResult<usize>, expected: usize) -> Result<(), StoreError> {
    match written {
        Ok(written) if written == expected => Ok(()),
        Ok(_) | Err(DieselError::DatabaseError(DatabaseErrorKind::UniqueViolation, _)) => {
            Err(StoreError::Conflict)
        }
        Err(error) => Err(error.into()),
    }
}

/// A stored event of a reservation as the domain knows it.
///
/// # Errors
/// [`StoreError::Undecodable`]
pub fn decode_reservation(id: OrderId, stored: &StoredEvent) -> Result<Event, StoreError> {
    codec::decode_reservation(id, &stored.event_type, stored.schema_version, &stored.payload)
        .map_err(|source| undecodable(id.0, stored, source))
}

/// A stored event of a product's stock as the domain knows it.
///
/// # Errors
/// [`StoreError::Undecodable`]
pub fn decode_stock(id: ProductId, stored: &StoredEvent) -> Result<Updated, StoreError> {
    codec::decode_stock(id, &stored.event_type, stored.schema_version, &stored.payload)
        .map_err(|source| undecodable(id.0, stored, source))
}

fn undecodable(entity: Uuid, stored: &StoredEvent, source: DecodeError) -> StoreError {
    StoreError::Undecodable {
        entity,
        version: stored.version,
        source,
    }
}

/// A row of `stock`.
#[derive(Debug, Clone, PartialEq, Eq, Queryable, Selectable, Insertable, Serialize)]
#[diesel(table_name = stock)]
#[diesel(check_for_backend(diesel::pg::Pg))]
pub(crate) struct StockRow {
    pub(crate) product_id: Uuid,
    version: i64,
    available: i64,
    reserved: i64,
    sold: i64,
    updated_at: DateTime<Utc>,
}

impl From<&Stock> for StockRow {
    fn from(stock: &Stock) -> Self {
        Self {
            product_id: stock.product_id.0,
            version: stock.version,
            available: stock.counts.available,
            reserved: stock.counts.reserved,
            sold: stock.counts.sold,
            updated_at: stock.updated_at,
        }
    }
}

impl StockRow {
    /// The rows in the order of their ids, at most `limit`.
    pub(crate) async fn after(
        conn: &mut AsyncPgConnection,
        after: Uuid,
        limit: i64,
    ) -> diesel::QueryResult<Vec<Self>> {
        stock::table
            .filter(stock::product_id.gt(after))
            .order(stock::product_id)
            .limit(limit)
            .select(Self::as_select())
            .load(conn)
            .await
    }

    fn into_stock(self) -> Stock {
        Stock {
            product_id: ProductId(self.product_id),
            version: self.version,
            counts: Counts {
                available: self.available,
                reserved: self.reserved,
                sold: self.sold,
            },
            updated_at: self.updated_at,
        }
    }
}

/// A row of `reservations`.
#[derive(Debug, Clone, PartialEq, Eq, Queryable, Selectable, Serialize)]
#[diesel(table_name = reservations)]
#[diesel(check_for_backend(diesel::pg::Pg))]
pub(crate) struct ReservationRow {
    pub(crate) order_id: Uuid,
    version: i64,
    status: String,
    lines: serde_json::Value,
    shortages: Option<serde_json::Value>,
    decided_at: DateTime<Utc>,
    committed_at: Option<DateTime<Utc>>,
    released_at: Option<DateTime<Utc>>,
}

/// An element of the column `lines`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LineJson {
    product_id: Uuid,
    quantity: i32,
}

/// An element of the column `shortages`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ShortageJson {
    product_id: Uuid,
    wanted: i32,
    available: i64,
}

impl From<&Reservation> for ReservationRow {
    fn from(reservation: &Reservation) -> Self {
        let line = |line: &Line| LineJson {
            product_id: line.product_id.0,
            quantity: line.quantity,
        };
        let shortage = |shortage: &Shortage| ShortageJson {
            product_id: shortage.product_id.0,
            wanted: shortage.wanted,
            available: shortage.available,
        };
        let lines: Vec<LineJson> = reservation.lines.iter().map(line).collect();
        let (status, shortages) = match &reservation.status {
            Status::Reserved => ("reserved", None),
            Status::Rejected(shortages) => {
                let shortages: Vec<ShortageJson> = shortages.iter().map(shortage).collect();
                ("rejected", Some(serde_json::json!(shortages)))
            }
            Status::Committed => ("committed", None),
            Status::Released => ("released", None),
        };
        Self {
            order_id: reservation.order_id.0,
            version: reservation.version,
            status: status.to_owned(),
            lines: serde_json::json!(lines),
            shortages,
            decided_at: reservation.decided_at,
            committed_at: reservation.committed_at,
            released_at: reservation.released_at,
        }
    }
}

impl ReservationRow {
    /// The rows in the order of their ids, at most `limit`.
    pub(crate) async fn after(
        conn: &mut AsyncPgConnection,
        after: Uuid,
        limit: i64,
    ) -> diesel::QueryResult<Vec<Self>> {
        reservations::table
            .filter(reservations::order_id.gt(after))
            .order(reservations::order_id)
            .limit(limit)
            .select(Self::as_select())
            .load(conn)
            .await
    }

    fn into_reservation(self) -> Result<Reservation, StoreError> {
        let id = OrderId(self.order_id);
        let broken = |column| StoreError::Broken { id, column };
        let lines: Vec<LineJson> = serde_json::from_value(self.lines).map_err(|_| broken("lines"))?;
        let line = |line: LineJson| Line {
            product_id: ProductId(line.product_id),
            quantity: line.quantity,
        };
        let lines = Lines::new(lines.into_iter().map(line).collect()).map_err(|_| broken("lines"))?;
        let shortage = |shortage: ShortageJson| Shortage {
            product_id: ProductId(shortage.product_id),
            wanted: shortage.wanted,
            available: shortage.available,
        };
        let status = match (self.status.as_str(), self.shortages) {
            ("reserved", None) => Status::Reserved,
            ("rejected", Some(shortages)) => {
                let shortages: Vec<ShortageJson> =
                    serde_json::from_value(shortages).map_err(|_| broken("shortages"))?;
                Status::Rejected(shortages.into_iter().map(shortage).collect())
            }
            ("committed", None) => Status::Committed,
            ("released", None) => Status::Released,
            _ => return Err(broken("status")),
        };
        Ok(Reservation {
            order_id: id,
            version: self.version,
            lines,
            status,
            decided_at: self.decided_at,
            committed_at: self.committed_at,
            released_at: self.released_at,
        })
    }
}

/// What the stock of a product says and what its reservations say, where they differ.
#[derive(Debug, diesel::QueryableByName)]
pub(crate) struct Unbalanced {
    #[diesel(sql_type = sql_types::Uuid)]
    pub(crate) product_id: Uuid,
    #[diesel(sql_type = sql_types::Text)]
    pub(crate) what: String,
}

/// Products of which other quantities are reserved or sold than their reservations say.
pub(crate) async fn unbalanced(conn: &mut AsyncPgConnection) -> diesel::QueryResult<Vec<Unbalanced>> {
    diesel::sql_query(
        "SELECT product_id, \
                format('%s are reserved and %s sold, and by its reservations it is %s and %s', \
                       coalesce(reserved, 0), coalesce(sold, 0), coalesce(held, 0), coalesce(taken, 0)) AS what \
         FROM stock FULL JOIN ( \
             SELECT (line ->> 'product_id')::uuid AS product_id, \
                    sum((line ->> 'quantity')::bigint) FILTER (WHERE status = 'reserved') AS held, \
                    sum((line ->> 'quantity')::bigint) FILTER (WHERE status = 'committed') AS taken \
             FROM reservations, jsonb_array_elements(lines) line \
             WHERE status IN ('reserved', 'committed') GROUP BY 1) held USING (product_id) \
         WHERE (coalesce(reserved, 0), coalesce(sold, 0)) <> (coalesce(held, 0), coalesce(taken, 0)) \
         ORDER BY product_id",
    )
    .load(conn)
    .await
}
