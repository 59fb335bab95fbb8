//! What events tell: addresses, orders, and what is to be answered.
//!
//! A mail's order may be known before its user's address, after it, or after the mail itself: topics arrive in any order relative to
//! each other. So rows stand for orders and users from the first time that anything names them, and whoever writes locks first the
//! orders that it names and then their users, in the order of their ids. Of two transactions that bring together what a mail needs,
//! the second sees what the first one wrote, and lets the mail go.

use std::collections::{BTreeMap, BTreeSet};

use diesel::prelude::QueryableByName;
use diesel::sql_types::{Array, Binary, Integer, Nullable, Text, Uuid as SqlUuid};
use diesel_async::{AsyncPgConnection, RunQueryDsl as _};
use uuid::Uuid;

use super::StoreError;
use crate::domain::{Email, MailId, Name, OrderId, UserId};

/// An event that a mail has to answer.
#[derive(Debug, Clone)]
pub struct ToAnswer {
    pub id: MailId,
    pub order_id: OrderId,
    pub event_type: String,
    pub schema_version: i32,
    /// Protobuf; personal.
    pub payload: Vec<u8>,
    pub traceparent: Option<String>,
    pub tracestate: Option<String>,
}

/// What a batch of events tells.
#[derive(Debug, Default)]
pub struct Told {
    /// Where users can be reached: the last that was said of each.
    pub addresses: BTreeMap<UserId, (Email, Name)>,
    /// Whose orders are, and their own addresses.
    pub orders: BTreeMap<OrderId, (UserId, Option<Email>)>,
    /// In the order of the events.
    pub to_answer: Vec<ToAnswer>,
}

impl Told {
    /// Whether there is nothing to be written.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty() && self.orders.is_empty() && self.to_answer.is_empty()
    }
}

#[derive(QueryableByName)]
struct OwnerRow {
    #[diesel(sql_type = Nullable<SqlUuid>)]
    user_id: Option<Uuid>,
}

/// Writes what events tell, in the caller's transaction. Returns how many mails may be sent by now that could not before.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn learn(conn: &mut AsyncPgConnection, told: &Told) -> Result<usize, StoreError> {
    let orders: BTreeSet<Uuid> = told
        .orders
        .keys()
        .chain(told.to_answer.iter().map(|mail| &mail.order_id))
        .map(|id| id.0)
        .collect();
    let orders: Vec<Uuid> = orders.into_iter().collect();
    let owners = lock_orders(conn, &orders).await?;
    let users: BTreeSet<Uuid> = told
        .addresses
        .keys()
        .chain(told.orders.values().map(|(user_id, _)| user_id))
        .map(|id| id.0)
        .chain(owners)
        .collect();
    let users: Vec<Uuid> = users.into_iter().collect();
    lock_users(conn, &users).await?;

    write_addresses(conn, &told.addresses).await?;
    write_orders(conn, &told.orders).await?;
    write_mails(conn, &told.to_answer).await?;
    let reached: Vec<Uuid> = told.addresses.keys().map(|id| id.0).collect();
    release(conn, &orders, &reached).await
}

/// Makes sure that there are rows for these orders, locks them, and returns whose they are, as far as that is known.
async fn lock_orders(conn: &mut AsyncPgConnection, ids: &[Uuid]) -> Result<Vec<Uuid>, StoreError> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    diesel::sql_query("INSERT INTO orders (order_id) SELECT unnest($1) ON CONFLICT DO NOTHING")
        .bind::<Array<SqlUuid>, _>(ids)
        .execute(conn)
        .await?;
    let rows: Vec<OwnerRow> = diesel::sql_query(
        "SELECT user_id FROM orders WHERE order_id = ANY ($1) ORDER BY order_id FOR UPDATE",
    )
    .bind::<Array<SqlUuid>, _>(ids)
    .load(conn)
    .await?;
    Ok(rows.into_iter().filter_map(|row| row.user_id).collect())
}

/// Makes sure that there are rows for these users, and locks them.
async fn lock_users(conn: &mut AsyncPgConnection, ids: &[Uuid]) -> Result<(), StoreError> {
    if ids.is_empty() {
        return Ok(());
    }
    for sql in [
        "INSERT INTO addressees (user_id) SELECT unnest($1) ON CONFLICT DO NOTHING",
        "SELECT FROM addressees WHERE user_id = ANY ($1) ORDER BY user_id FOR UPDATE",
    ] {
        diesel::sql_query(sql)
            .bind::<Array<SqlUuid>, _>(ids)
            .execute(conn)
            .await?;
    }
    Ok(())
}

async fn write_addresses(
    conn: &mut AsyncPgConnection,
    addresses: &BTreeMap<UserId, (Email, Name)>,
) -> Result<(), StoreError> {
    if addresses.is_empty() {
        return Ok(());
    }
    let ids: Vec<Uuid> = addresses.keys().map(|id| id.0).collect();
    let emails: Vec<&str> = addresses.values().map(|(email, _)| email.as_str()).collect();
    let names: Vec<&str> = addresses.values().map(|(_, name)| name.as_str()).collect();
    diesel::sql_query(
        "UPDATE addressees SET email = new.email, first_name = new.first_name
         FROM unnest($1, $2, $3) new (user_id, email, first_name) WHERE addressees.user_id = new.user_id",
    )
    .bind::<Array<SqlUuid>, _>(ids)
    .bind::<Array<Text>, _>(emails)
    .bind::<Array<Text>, _>(names)
    .execute(conn)
    .await?;
    Ok(())
}

async fn write_orders(
    conn: &mut AsyncPgConnection,
    orders: &BTreeMap<OrderId, (UserId, Option<Email>)>,
) -> Result<(), StoreError> {
    if orders.is_empty() {
        return Ok(());
    }
    let ids: Vec<Uuid> = orders.keys().map(|id| id.0).collect();
    let users: Vec<Uuid> = orders.values().map(|(user_id, _)| user_id.0).collect();
    let emails: Vec<Option<&str>> = orders
        .values()
        .map(|(_, email)| email.as_ref().map(Email::as_str))
        .collect();
    diesel::sql_query(
        "UPDATE orders SET user_id = new.user_id, email = new.email
         FROM unnest($1, $2, $3) new (order_id, user_id, email) WHERE orders.order_id = new.order_id",
    )
    .bind::<Array<SqlUuid>, _>(ids)
    .bind::<Array<SqlUuid>, _>(users)
    .bind::<Array<Nullable<Text>>, _>(emails)
    .execute(conn)
    .await?;
    Ok(())
}

/// Mails that are there already stay as they are: an event has one.
async fn write_mails(conn: &mut AsyncPgConnection, mails: &[ToAnswer]) -> Result<(), StoreError> {
    if mails.is_empty() {
        return Ok(());
    }
    diesel::sql_query(
        "INSERT INTO mails (notification_id, order_id, event_type, schema_version, payload, traceparent, tracestate, state)
         SELECT notification_id, order_id, event_type, schema_version, payload, traceparent, tracestate, 'waiting'
         FROM unnest($1, $2, $3, $4, $5, $6, $7) WITH ORDINALITY
              new (notification_id, order_id, event_type, schema_version, payload, traceparent, tracestate, place)
         ORDER BY place ON CONFLICT DO NOTHING",
    )
    .bind::<Array<SqlUuid>, _>(mails.iter().map(|mail| mail.id.0).collect::<Vec<_>>())
    .bind::<Array<SqlUuid>, _>(mails.iter().map(|mail| mail.order_id.0).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(mails.iter().map(|mail| &mail.event_type).collect::<Vec<_>>())
    .bind::<Array<Integer>, _>(mails.iter().map(|mail| mail.schema_version).collect::<Vec<_>>())
    .bind::<Array<Binary>, _>(mails.iter().map(|mail| &mail.payload).collect::<Vec<_>>())
    .bind::<Array<Nullable<Text>>, _>(mails.iter().map(|mail| &mail.traceparent).collect::<Vec<_>>())
    .bind::<Array<Nullable<Text>>, _>(mails.iter().map(|mail| &mail.tracestate).collect::<Vec<_>>())
    .execute(conn)
    .await?;
    Ok(())
}

/// Lets those mails go that have an address now: of these orders, and of the orders of these users.
async fn release(conn: &mut AsyncPgConnection, orders: &[Uuid], users: &[Uuid]) -> Result<usize, StoreError> {
    let mut released = 0;
    for (whose, ids) in [("orders.order_id", orders), ("orders.user_id", users)] {
        if ids.is_empty() {
            continue;
        }
        let sql = format!(
            "UPDATE mails SET state = 'pending', due_at = due_in(0)
             FROM orders JOIN addressees USING (user_id)
             WHERE mails.order_id = orders.order_id AND mails.state = 'waiting'
               AND coalesce(orders.email, addressees.email) IS NOT NULL AND {whose} = ANY ($1)"
        );
        released += diesel::sql_query(sql)
            .bind::<Array<SqlUuid>, _>(ids)
            .execute(conn)
            .await?;
    }
    Ok(released)
}
