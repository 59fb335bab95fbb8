//! The views in PostgreSQL. Nothing else here names the schema.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write as _;

use chrono::{DateTime, Utc};
use consumer::{Incoming, Parking};
use diesel::QueryResult;
use diesel::deserialize::{self, FromSql, FromSqlRow};
use diesel::expression::AsExpression;
use diesel::pg::{Pg, PgValue};
use diesel::prelude::{
    BoolExpressionMethods as _, ExpressionMethods as _, OptionalExtension as _, QueryDsl as _, Queryable,
    QueryableByName, Selectable, SelectableHelper as _,
};
use diesel::serialize::{self, IsNull, Output, ToSql};
use diesel::sql_types;
use diesel_async::{AsyncPgConnection, RunQueryDsl as _};
use serde::{Deserialize, Serialize};
use service::db::{BoxFuture, Db, DbError};
use service::deadline::Deadline;
use uuid::Uuid;

use crate::domain::journey::{Journey, ParkedRecord, Step, Tells};
use crate::domain::{Failure, Item, Moves, OrderView, Payment, PaymentStatus, Reached, Status, View};
use crate::events::{self, Told};

/// Of one journey. An order has about ten; only failed payments can be many.
const MOST_STEPS: i64 = 1_000;
/// Parked records that a journey tells of.
const MOST_PARKED: usize = 100;

diesel::table! {
    order_views (order_id) {
        order_id -> Uuid,
        user_id -> Uuid,
        status -> SmallInt,
        items -> Jsonb,
        total_minor_units -> BigInt,
        currency_code -> Text,
        order_version -> BigInt,
        placed_at -> Timestamptz,
        updated_at -> Timestamptz,
        pay_by -> Nullable<Timestamptz>,
        cancel_reason -> Text,
        tracking_number -> Text,
        carrier -> Text,
        payment_id -> Nullable<Uuid>,
    }
}

diesel::table! {
    order_payments (payment_id) {
        payment_id -> Uuid,
        order_id -> Uuid,
        status -> SmallInt,
        amount_minor_units -> BigInt,
        currency_code -> Text,
        brand -> Text,
        last_four -> Text,
        failure_reason -> Nullable<Integer>,
        another_try -> Nullable<Bool>,
        version -> BigInt,
        first_event_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    order_journey (order_id, event_id) {
        order_id -> Uuid,
        event_id -> Uuid,
        entity_id -> Uuid,
        version -> BigInt,
        occurred_at -> Timestamptz,
        kafka_offset -> BigInt,
        partition -> Integer,
        template -> Nullable<Integer>,
        topic -> Text,
        event_type -> Text,
        trace_id -> Nullable<Text>,
    }
}

/// The tables of this service; those of the consumer runtime come beside them.
pub const MIGRATIONS: diesel_migrations::EmbeddedMigrations =
    diesel_migrations::embed_migrations!("../migrations/order-query");

#[derive(Debug, Clone, Queryable, Selectable)]
#[diesel(table_name = order_views, check_for_backend(Pg))]
struct Row {
    order_id: Uuid,
    user_id: Uuid,
    status: i16,
    items: Items,
    total_minor_units: i64,
    currency_code: String,
    order_version: i64,
    placed_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    pay_by: Option<DateTime<Utc>>,
    cancel_reason: String,
    tracking_number: String,
    carrier: String,
    payment_id: Option<Uuid>,
}

#[derive(Debug, Clone, Queryable, Selectable)]
#[diesel(table_name = order_payments, check_for_backend(Pg))]
struct PaymentRow {
    payment_id: Uuid,
    order_id: Uuid,
    status: i16,
    amount_minor_units: i64,
    currency_code: String,
    brand: String,
    last_four: String,
    failure_reason: Option<i32>,
    another_try: Option<bool>,
    version: i64,
    first_event_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

#[derive(Debug, Clone, Queryable, Selectable)]
#[diesel(table_name = order_journey, check_for_backend(Pg))]
struct StepRow {
    event_id: Uuid,
    entity_id: Uuid,
    version: i64,
    occurred_at: DateTime<Utc>,
    kafka_offset: i64,
    partition: i32,
    template: Option<i32>,
    topic: String,
    event_type: String,
    trace_id: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct ItemRow {
    product_id: Uuid,
    quantity: i32,
    unit_price_minor_units: i64,
}

/// As JSON, without a tree of values in between.
#[derive(Debug, Clone, FromSqlRow, AsExpression)]
#[diesel(sql_type = sql_types::Jsonb)]
struct Items(Vec<ItemRow>);

impl ToSql<sql_types::Jsonb, Pg> for Items {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Pg>) -> serialize::Result {
        out.write_all(&[JSONB_VERSION])?;
        serde_json::to_writer(out, &self.0)?;
        Ok(IsNull::No)
    }
}

impl FromSql<sql_types::Jsonb, Pg> for Items {
    fn from_sql(value: PgValue<'_>) -> deserialize::Result<Self> {
        match value.as_bytes() {
            [JSONB_VERSION, json @ ..] => Ok(Self(serde_json::from_slice(json)?)),
            _ => Err("an unknown version of jsonb".into()),
        }
    }
}

/// The first byte of jsonb as it is sent.
const JSONB_VERSION: u8 = 1;

/// Where a page of a user's orders begins: behind this order, newest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Whole microseconds, as PostgreSQL keeps it.
    pub placed_at: DateTime<Utc>,
    pub order_id: Uuid,
}

impl Position {
    /// That of an order.
    pub fn of(view: &OrderView) -> Self {
        Self {
            placed_at: view.placed_at,
            order_id: view.order_id,
        }
    }
}

/// Writes the views of orders that are new.
///
/// From arrays, a column each: as VALUES, PostgreSQL takes longer to read the statement than to do it.
pub(crate) async fn begin(connection: &mut AsyncPgConnection, views: &[OrderView]) -> QueryResult<()> {
    use sql_types::{Array, BigInt, Jsonb, Nullable, SmallInt, Text, Timestamptz, Uuid};
    if views.is_empty() {
        return Ok(());
    }
    let rows: Vec<Row> = views.iter().map(Row::of).collect();
    diesel::sql_query(
        "INSERT INTO order_views (order_id, user_id, status, items, total_minor_units, currency_code, order_version, placed_at, \
                                  updated_at, pay_by, cancel_reason, tracking_number, carrier, payment_id) \
         SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
    )
    .bind::<Array<Uuid>, _>(column(&rows, |row| row.order_id))
    .bind::<Array<Uuid>, _>(column(&rows, |row| row.user_id))
    .bind::<Array<SmallInt>, _>(column(&rows, |row| row.status))
    .bind::<Array<Jsonb>, _>(column(&rows, |row| &row.items))
    .bind::<Array<BigInt>, _>(column(&rows, |row| row.total_minor_units))
    .bind::<Array<Text>, _>(column(&rows, |row| &row.currency_code))
    .bind::<Array<BigInt>, _>(column(&rows, |row| row.order_version))
    .bind::<Array<Timestamptz>, _>(column(&rows, |row| row.placed_at))
    .bind::<Array<Timestamptz>, _>(column(&rows, |row| row.updated_at))
    .bind::<Array<Nullable<Timestamptz>>, _>(column(&rows, |row| row.pay_by))
    .bind::<Array<Text>, _>(column(&rows, |row| &row.cancel_reason))
    .bind::<Array<Text>, _>(column(&rows, |row| &row.tracking_number))
    .bind::<Array<Text>, _>(column(&rows, |row| &row.carrier))
    .bind::<Array<Nullable<Uuid>>, _>(column(&rows, |row| row.payment_id))
    .execute(connection)
    .await?;
    Ok(())
}

/// Writes what became of orders, each once. Returns the position of one that has no view, if there is one: then nothing may be
/// committed.
pub(crate) async fn go_on(
    connection: &mut AsyncPgConnection,
    orders: &[(Uuid, Moves)],
) -> QueryResult<Option<usize>> {
    use sql_types::{Array, BigInt, Nullable, SmallInt, Text, Timestamptz, Uuid};
    if orders.is_empty() {
        return Ok(None);
    }
    let ids = column(orders, |(order_id, _)| *order_id);
    let written = diesel::sql_query(
        "UPDATE order_views v SET status = coalesce(m.status, v.status), order_version = m.order_version, updated_at = m.updated_at, \
             cancel_reason = coalesce(m.cancel_reason, v.cancel_reason), \
             tracking_number = coalesce(m.tracking_number, v.tracking_number), carrier = coalesce(m.carrier, v.carrier), \
             payment_id = coalesce(m.payment_id, v.payment_id) \
         FROM unnest($1, $2, $3, $4, $5, $6, $7, $8) \
             AS m(order_id, status, order_version, updated_at, cancel_reason, tracking_number, carrier, payment_id) \
         WHERE v.order_id = m.order_id",
    )
    .bind::<Array<Uuid>, _>(&ids)
    .bind::<Array<Nullable<SmallInt>>, _>(column(orders, |(_, moves)| moves.status.map(code)))
    .bind::<Array<BigInt>, _>(column(orders, |(_, moves)| moves.version))
    .bind::<Array<Timestamptz>, _>(column(orders, |(_, moves)| moves.updated_at))
    .bind::<Array<Nullable<Text>>, _>(column(orders, |(_, moves)| moves.cancel_reason.as_deref()))
    .bind::<Array<Nullable<Text>>, _>(column(orders, |(_, moves)| Some(moves.shipment.as_ref()?.tracking_number.as_str())))
    .bind::<Array<Nullable<Text>>, _>(column(orders, |(_, moves)| Some(moves.shipment.as_ref()?.carrier.as_str())))
    .bind::<Array<Nullable<Uuid>>, _>(column(orders, |(_, moves)| moves.payment_id))
    .execute(connection)
    .await?;
    if written == orders.len() {
        return Ok(None);
    }
    let known: HashSet<uuid::Uuid> = order_views::table
        .filter(order_views::order_id.eq_any(&ids))
        .select(order_views::order_id)
        .load(connection)
        .await?
        .into_iter()
        .collect();
    Ok(ids.iter().position(|order_id| !known.contains(order_id)))
}

/// A payment as a batch tells of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paying<'a> {
    /// When the first of its events in the batch happened: of a payment that is new, when it began, however its events are cut into
    /// batches.
    pub(crate) first_event_at: DateTime<Utc>,
    /// As the last one tells it.
    pub(crate) payment: &'a Payment,
}

/// Writes payments as their last events tell them, whether they are new or not. Each payment once.
pub(crate) async fn save_payments(
    connection: &mut AsyncPgConnection,
    payments: &[Paying<'_>],
) -> QueryResult<()> {
    use sql_types::{Array, BigInt, Bool, Integer, Nullable, SmallInt, Text, Timestamptz, Uuid};
    if payments.is_empty() {
        return Ok(());
    }
    let rows: Vec<PaymentRow> = payments.iter().map(PaymentRow::of).collect();
    diesel::sql_query(
        "INSERT INTO order_payments (payment_id, order_id, status, amount_minor_units, currency_code, brand, last_four, \
                                     failure_reason, another_try, version, first_event_at, updated_at) \
         SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) \
         ON CONFLICT (payment_id) DO UPDATE SET status = excluded.status, failure_reason = excluded.failure_reason, \
             another_try = excluded.another_try, version = excluded.version, updated_at = excluded.updated_at",
    )
    .bind::<Array<Uuid>, _>(column(&rows, |row| row.payment_id))
    .bind::<Array<Uuid>, _>(column(&rows, |row| row.order_id))
    .bind::<Array<SmallInt>, _>(column(&rows, |row| row.status))
    .bind::<Array<BigInt>, _>(column(&rows, |row| row.amount_minor_units))
    .bind::<Array<Text>, _>(column(&rows, |row| &row.currency_code))
    .bind::<Array<Text>, _>(column(&rows, |row| &row.brand))
    .bind::<Array<Text>, _>(column(&rows, |row| &row.last_four))
    .bind::<Array<Nullable<Integer>>, _>(column(&rows, |row| row.failure_reason))
    .bind::<Array<Nullable<Bool>>, _>(column(&rows, |row| row.another_try))
    .bind::<Array<BigInt>, _>(column(&rows, |row| row.version))
    .bind::<Array<Timestamptz>, _>(column(&rows, |row| row.first_event_at))
    .bind::<Array<Timestamptz>, _>(column(&rows, |row| row.updated_at))
    .execute(connection)
    .await?;
    Ok(())
}

/// Writes where the events of a batch were read, whichever order they are about.
pub(crate) async fn go_along(
    connection: &mut AsyncPgConnection,
    batch: &[Incoming<'_, Told>],
) -> QueryResult<()> {
    use sql_types::{Array, BigInt, Integer, Nullable, Text, Timestamptz, Uuid};
    let mut steps = Vec::with_capacity(batch.len());
    for Incoming { record, event } in batch {
        if let Some(order_id) = event.order_id() {
            let template = match event {
                Told::Mail { template, .. } => Some(*template),
                _ => None,
            };
            // It was one when the event was read.
            let entity_id = events::entity_id(record)
                .map_err(|error| diesel::result::Error::SerializationError(error.into()))?;
            steps.push((order_id, entity_id, template, *record));
        }
    }
    if steps.is_empty() {
        return Ok(());
    }
    diesel::sql_query(
        "INSERT INTO order_journey (order_id, event_id, entity_id, version, occurred_at, kafka_offset, partition, template, topic, \
                                    event_type, trace_id) \
         SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT DO NOTHING",
    )
    .bind::<Array<Uuid>, _>(column(&steps, |(order_id, ..)| *order_id))
    .bind::<Array<Uuid>, _>(column(&steps, |(.., record)| record.envelope.event_id))
    .bind::<Array<Uuid>, _>(column(&steps, |(_, entity_id, ..)| *entity_id))
    .bind::<Array<BigInt>, _>(column(&steps, |(.., record)| record.envelope.version))
    .bind::<Array<Timestamptz>, _>(column(&steps, |(.., record)| record.envelope.occurred_at))
    .bind::<Array<BigInt>, _>(column(&steps, |(.., record)| record.offset))
    .bind::<Array<Integer>, _>(column(&steps, |(.., record)| record.partition))
    .bind::<Array<Nullable<Integer>>, _>(column(&steps, |(_, _, template, _)| *template))
    .bind::<Array<Text>, _>(column(&steps, |(.., record)| &*record.topic))
    .bind::<Array<Text>, _>(column(&steps, |(.., record)| record.envelope.event_type.as_str()))
    .bind::<Array<Nullable<Text>>, _>(column(&steps, |(.., record)| record.trace_id()))
    .execute(connection)
    .await?;
    Ok(())
}

/// A column of rows.
fn column<'r, R, T>(rows: &'r [R], value: impl Fn(&'r R) -> T) -> Vec<T> {
    rows.iter().map(value).collect()
}

/// One order of a user; `None` as well when it is someone else's.
///
/// # Errors
/// When the database does not answer in time.
pub async fn get(
    db: &Db,
    parking: &Parking,
    deadline: Deadline,
    user_id: Uuid,
    order_id: Uuid,
) -> Result<Option<View>, DbError> {
    let views = read(db, deadline, move |connection| {
        let parking = parking.clone();
        Box::pin(async move {
            let row: Option<Row> = order_views::table
                .filter(
                    order_views::order_id
                        .eq(order_id)
                        .and(order_views::user_id.eq(user_id)),
                )
                .select(Row::as_select())
                .first(connection)
                .await
                .optional()?;
            whole(connection, &parking, row.into_iter().collect()).await
        })
    });
    Ok(views.await?.pop())
}

/// A user's orders behind `after`, newest first, at most `limit`.
///
/// # Errors
/// When the database does not answer in time.
pub async fn list(
    db: &Db,
    parking: &Parking,
    deadline: Deadline,
    user_id: Uuid,
    status: Option<Status>,
    after: Option<Position>,
    limit: u16,
) -> Result<Vec<View>, DbError> {
    read(db, deadline, move |connection| {
        let parking = parking.clone();
        Box::pin(async move {
            let mut query = order_views::table
                .filter(order_views::user_id.eq(user_id))
                .select(Row::as_select())
                .order((order_views::placed_at.desc(), order_views::order_id.desc()))
                .limit(i64::from(limit))
                .into_boxed();
            if let Some(status) = status {
                query = query.filter(order_views::status.eq(code(status)));
            }
            if let Some(after) = after {
                // The first condition is what the index is entered by; the second one tells orders of one moment apart.
                query = query.filter(order_views::placed_at.le(after.placed_at)).filter(
                    order_views::placed_at
                        .lt(after.placed_at)
                        .or(order_views::order_id.lt(after.order_id)),
                );
            }
            let rows = query.load(connection).await?;
            whole(connection, &parking, rows).await
        })
    })
    .await
}

/// These orders with the payments of all of them, and whether anything about them is parked: a statement for each.
async fn whole(
    connection: &mut AsyncPgConnection,
    parking: &Parking,
    rows: Vec<Row>,
) -> QueryResult<Vec<View>> {
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let orders: Vec<Uuid> = rows.iter().map(|row| row.order_id).collect();
    let of_orders: Vec<PaymentRow> = order_payments::table
        .filter(order_payments::order_id.eq_any(&orders))
        .order((order_payments::first_event_at, order_payments::payment_id))
        .select(PaymentRow::as_select())
        .load(connection)
        .await?;
    let mut payments: HashMap<Uuid, Vec<Payment>> = HashMap::new();
    for row in of_orders {
        payments.entry(row.order_id).or_default().push(row.payment()?);
    }
    let parked = parked(connection, parking, &orders, 1).await?;
    let parked: HashSet<Uuid> = parked.into_iter().map(|(order_id, _)| order_id).collect();
    let view = |row: Row| {
        Ok(View {
            is_parked: parked.contains(&row.order_id),
            payments: payments.remove(&row.order_id).unwrap_or_default(),
            order: row.view()?,
        })
    };
    rows.into_iter().map(view).collect()
}

/// What is parked about these orders, at most `each` by each id that leads to one: by the orders themselves, by their payments as far as
/// those are known, by their events, which mails answer, and by what is correlated with them.
async fn parked(
    connection: &mut AsyncPgConnection,
    parking: &Parking,
    orders: &[Uuid],
    each: usize,
) -> QueryResult<Vec<(Uuid, consumer::Parked)>> {
    #[derive(QueryableByName)]
    struct Lead {
        #[diesel(sql_type = sql_types::Text)]
        id: String,
        #[diesel(sql_type = sql_types::Uuid)]
        order_id: Uuid,
    }
    if !parking.is_any(connection).await? {
        return Ok(Vec::new());
    }
    // The tables in the order of their names, as a swap takes them (decision 50).
    let leads: Vec<Lead> = diesel::sql_query(
        "SELECT event_id::text AS id, order_id FROM order_journey WHERE order_id = ANY ($1) \
         UNION SELECT payment_id::text, order_id FROM order_payments WHERE order_id = ANY ($1) \
         UNION SELECT payment_id::text, order_id FROM order_views WHERE order_id = ANY ($1) AND payment_id IS NOT NULL \
         UNION SELECT o::text, o FROM unnest($1) AS o",
    )
    .bind::<sql_types::Array<sql_types::Uuid>, _>(orders)
    .load(connection)
    .await?;
    let (ids, orders): (Vec<String>, Vec<Uuid>) =
        leads.into_iter().map(|lead| (lead.id, lead.order_id)).unzip();
    let each = i64::try_from(each).unwrap_or(i64::MAX);
    let found = parking.about(connection, &ids, each).await?;
    let mut by_id: HashMap<&str, Vec<Uuid>> = HashMap::new();
    for (id, order_id) in ids.iter().zip(orders) {
        by_id.entry(id).or_default().push(order_id);
    }
    let of_order = found.into_iter().flat_map(|found| {
        let orders = by_id.get(found.about.as_str()).into_iter().flatten();
        orders
            .map(|order_id| (*order_id, found.record.clone()))
            .collect::<Vec<_>>()
    });
    Ok(of_order.collect())
}

/// All that is known of what happened to an order, whoever's it is.
///
/// # Errors
/// When the database does not answer in time.
pub async fn journey(
    db: &Db,
    parking: &Parking,
    deadline: Deadline,
    order_id: Uuid,
) -> Result<Journey, DbError> {
    read(db, deadline, move |connection| {
        let parking = parking.clone();
        Box::pin(async move {
            let mut rows: Vec<StepRow> = order_journey::table
                .filter(order_journey::order_id.eq(order_id))
                .order((order_journey::occurred_at, order_journey::event_id))
                .limit(MOST_STEPS + 1)
                .select(StepRow::as_select())
                .load(connection)
                .await?;
            let is_cut = rows.len() as i64 > MOST_STEPS;
            rows.truncate(MOST_STEPS as usize);
            let found = parked(connection, &parking, &[order_id], MOST_PARKED).await?;
            let found: BTreeMap<i64, ParkedRecord> = found
                .into_iter()
                .map(|(_, record)| (record.id, parked_record(record)))
                .collect();
            let parked = found.into_values().take(MOST_PARKED).collect();
            let steps = rows.into_iter().map(StepRow::step).collect();
            Ok(Journey::new(steps, is_cut, parked))
        })
    })
    .await
}

fn parked_record(record: consumer::Parked) -> ParkedRecord {
    ParkedRecord {
        topic: record.topic,
        partition: record.partition,
        offset: record.offset,
        event_type: record.event_type,
        error_kind: record.error_kind,
        parked_at: record.parked_at,
    }
}

impl StepRow {
    fn step(self) -> Step {
        let tells = match (self.template, events::reservation_status(&self.event_type)) {
            (Some(template), _) => Tells::Mail(template),
            (None, Some(status)) => Tells::Reservation(status),
            (None, None) => Tells::Nothing,
        };
        Step {
            event_id: self.event_id,
            event_type: self.event_type,
            topic: self.topic,
            partition: self.partition,
            offset: self.kafka_offset,
            entity_id: self.entity_id,
            version: self.version,
            occurred_at: self.occurred_at,
            trace_id: self.trace_id,
            tells,
        }
    }
}

/// How far the views of these orders have come; those that there are.
///
/// # Errors
/// When the database does not answer in time.
pub async fn reached(
    db: &Db,
    parking: &Parking,
    deadline: Deadline,
    orders: Vec<Uuid>,
) -> Result<Vec<(Uuid, Reached)>, DbError> {
    #[derive(QueryableByName)]
    struct Found {
        #[diesel(sql_type = sql_types::Uuid)]
        order_id: Uuid,
        #[diesel(sql_type = sql_types::BigInt)]
        order_version: i64,
        #[diesel(sql_type = sql_types::BigInt)]
        payment_versions: i64,
    }
    let (found, parked) = read(db, deadline, move |connection| {
        let (orders, parking) = (orders.clone(), parking.clone());
        Box::pin(async move {
            let found: Vec<Found> = diesel::sql_query(
                "SELECT order_id, order_version, coalesce((SELECT sum(version)::bigint FROM order_payments p \
                 WHERE p.order_id = v.order_id), 0) AS payment_versions \
                 FROM order_views v WHERE order_id = ANY($1)",
            )
            .bind::<sql_types::Array<sql_types::Uuid>, _>(&orders)
            .load(connection)
            .await?;
            Ok((found, parked(connection, &parking, &orders, 1).await?))
        })
    })
    .await?;
    let parked: HashSet<Uuid> = parked.into_iter().map(|(order_id, _)| order_id).collect();
    let reached = |found: Found| {
        let reached = Reached {
            order: found.order_version,
            payments: found.payment_versions,
            parked: Some(parked.contains(&found.order_id)),
        };
        (found.order_id, reached)
    };
    Ok(found.into_iter().map(reached).collect())
}

/// Statements that change nothing.
async fn read<T, F>(db: &Db, deadline: Deadline, query: F) -> Result<T, DbError>
where
    T: Send,
    F: for<'c> Fn(&'c mut AsyncPgConnection) -> BoxFuture<'c, QueryResult<T>> + Send + Sync,
{
    db.read(deadline, &query, |connection, query| {
        Box::pin(async move { Ok(query(connection).await?) })
    })
    .await
}

impl Row {
    fn of(view: &OrderView) -> Self {
        let items = view
            .items
            .iter()
            .map(|item| ItemRow {
                product_id: item.product_id,
                quantity: item.quantity,
                unit_price_minor_units: item.unit_price_minor_units,
            })
            .collect();
        Self {
            order_id: view.order_id,
            user_id: view.user_id,
            status: code(view.status),
            items: Items(items),
            total_minor_units: view.total_minor_units,
            currency_code: view.currency_code.clone(),
            order_version: view.version,
            placed_at: view.placed_at,
            updated_at: view.updated_at,
            pay_by: view.pay_by,
            cancel_reason: view.cancel_reason.clone(),
            tracking_number: view.tracking_number.clone(),
            carrier: view.carrier.clone(),
            payment_id: view.payment_id,
        }
    }

    fn view(self) -> QueryResult<OrderView> {
        let unreadable = |error| diesel::result::Error::DeserializationError(error);
        Ok(OrderView {
            order_id: self.order_id,
            user_id: self.user_id,
            status: status(self.status).ok_or_else(|| unreadable("order_views.status".into()))?,
            items: self
                .items
                .0
                .into_iter()
                .map(|item| Item {
                    product_id: item.product_id,
                    quantity: item.quantity,
                    unit_price_minor_units: item.unit_price_minor_units,
                })
                .collect(),
            total_minor_units: self.total_minor_units,
            currency_code: self.currency_code,
            version: self.order_version,
            placed_at: self.placed_at,
            updated_at: self.updated_at,
            pay_by: self.pay_by,
            cancel_reason: self.cancel_reason,
            tracking_number: self.tracking_number,
            carrier: self.carrier,
            payment_id: self.payment_id,
        })
    }
}

impl PaymentRow {
    fn of(paying: &Paying<'_>) -> Self {
        let payment = paying.payment;
        let (status, failure) = match payment.status {
            PaymentStatus::Received => (1, None),
            PaymentStatus::Failed(failure) => (2, Some(failure)),
            PaymentStatus::Refunded => (3, None),
        };
        Self {
            payment_id: payment.payment_id,
            order_id: payment.order_id,
            status,
            amount_minor_units: payment.amount_minor_units,
            currency_code: payment.currency_code.clone(),
            brand: payment.brand.clone(),
            last_four: payment.last_four.clone(),
            failure_reason: failure.map(|failure| failure.reason),
            another_try: failure.map(|failure| failure.another_try),
            version: payment.version,
            first_event_at: paying.first_event_at,
            updated_at: payment.updated_at,
        }
    }

    fn payment(self) -> QueryResult<Payment> {
        let status = match (self.status, self.failure_reason, self.another_try) {
            (1, None, None) => PaymentStatus::Received,
            (2, Some(reason), Some(another_try)) => PaymentStatus::Failed(Failure { reason, another_try }),
            (3, None, None) => PaymentStatus::Refunded,
            _ => {
                let what = "order_payments.status".into();
                return Err(diesel::result::Error::DeserializationError(what));
            }
        };
        Ok(Payment {
            payment_id: self.payment_id,
            order_id: self.order_id,
            status,
            amount_minor_units: self.amount_minor_units,
            currency_code: self.currency_code,
            brand: self.brand,
            last_four: self.last_four,
            version: self.version,
            updated_at: self.updated_at,
        })
    }
}

fn code(status: Status) -> i16 {
    match status {
        Status::Pending => 1,
        Status::Paid => 2,
        Status::Confirmed => 3,
        Status::Shipped => 4,
        Status::Delivered => 5,
        Status::Cancelled => 6,
    }
}

fn status(code: i16) -> Option<Status> {
    [
        Status::Pending,
        Status::Paid,
        Status::Confirmed,
        Status::Shipped,
        Status::Delivered,
        Status::Cancelled,
    ]
    .into_iter()
    .find(|status| self::code(*status) == code)
}
