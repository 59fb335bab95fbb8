//! What the databases say, in plain SQL.

use std::collections::BTreeMap;

use anyhow::Result;
use local_stack::wait;
use tokio_postgres::{Client, Row as SqlRow};

use crate::PATIENCE;
use crate::check::{Event, Order, Row, Step};

/// The outbox, in the order of its ids.
pub async fn outbox(client: &Client) -> Result<Vec<Row>> {
    outbox_rows(client, "outbox").await
}

/// A table with the columns of an outbox, in the order of its ids.
pub async fn outbox_rows(client: &Client, table: &str) -> Result<Vec<Row>> {
    let sql = format!(
        "SELECT id, event_id::text, aggregate_id, aggregate_version, event_type, coalesce(payload, ''), xmin::text
           FROM {table} ORDER BY id"
    );
    let rows = client.query(&sql, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| Row {
            id: row.get(0),
            event: event(row, 1),
        })
        .collect())
}

/// The event store.
pub async fn events(client: &Client) -> Result<Vec<Event>> {
    let sql = "SELECT event_id::text, entity_id, version, event_type, payload, xmin::text FROM events";
    let rows = client.query(sql, &[]).await?;
    Ok(rows.iter().map(|row| event(row, 0)).collect())
}

fn event(row: &SqlRow, first: usize) -> Event {
    Event {
        event_id: row.get(first),
        entity: row.get(first + 1),
        version: row.get(first + 2),
        kind: row.get(first + 3),
        payload: row.get(first + 4),
        transaction: row.get(first + 5),
    }
}

/// The rows of state, as far as their versions go.
pub async fn orders(client: &Client) -> Result<Vec<Order>> {
    let sql = "SELECT order_id::text, version, xmin::text FROM orders";
    let rows = client.query(sql, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| Order {
            order_id: row.get(0),
            version: row.get(1),
            transaction: row.get(2),
        })
        .collect())
}

/// Every order as its row of state has it, in the columns that the read model shows.
pub async fn states(client: &Client) -> Result<BTreeMap<String, String>> {
    let sql = "SELECT order_id::text, jsonb_build_object( \
                   'user_id', user_id, 'status', status, 'total', total_minor_units, 'currency', currency, \
                   'version', version, 'placed_at', extract(epoch FROM created_at), \
                   'updated_at', extract(epoch FROM updated_at), 'pay_by', extract(epoch FROM pay_by), \
                   'cancel_reason', coalesce(cancel_reason, ''), 'tracking', coalesce(tracking_number, ''), \
                   'carrier', coalesce(carrier, ''), \
                   'items', (SELECT jsonb_agg(jsonb_build_array(i -> 'product_id', i -> 'quantity', i -> 'unit_price') \
                                              ORDER BY place) \
                             FROM jsonb_array_elements(items) WITH ORDINALITY AS l(i, place)))::text FROM orders";
    table(client, sql, &[]).await
}

/// Every order as the read model has it, in the same form.
pub async fn views(client: &Client) -> Result<BTreeMap<String, String>> {
    let sql = "SELECT order_id::text, jsonb_build_object( \
                   'user_id', user_id, 'total', total_minor_units, 'currency', currency_code, \
                   'status', (ARRAY['pending', 'paid', 'confirmed', 'shipped', 'delivered', 'cancelled'])[status], \
                   'version', order_version, 'placed_at', extract(epoch FROM placed_at), \
                   'updated_at', extract(epoch FROM updated_at), 'pay_by', extract(epoch FROM pay_by), \
                   'cancel_reason', cancel_reason, 'tracking', tracking_number, 'carrier', carrier, \
                   'items', (SELECT jsonb_agg(jsonb_build_array(i -> 'product_id', i -> 'quantity', \
                                                                i -> 'unit_price_minor_units') ORDER BY place) \
                             FROM jsonb_array_elements(items) WITH ORDINALITY AS l(i, place)))::text FROM order_views";
    table(client, sql, &[]).await
}

/// The last event of each order by the outbox: version and event id.
pub async fn last_events(client: &Client) -> Result<BTreeMap<String, String>> {
    let sql = "SELECT DISTINCT ON (aggregate_id) aggregate_id, aggregate_version || ' ' || event_id FROM outbox \
               ORDER BY aggregate_id, aggregate_version DESC";
    table(client, sql, &[]).await
}

/// The marks of a consumer, in the same form.
pub async fn marks(client: &Client, consumer: &str) -> Result<BTreeMap<String, String>> {
    let sql = "SELECT entity_id, version || ' ' || event_id FROM consumer_marks WHERE consumer = $1";
    table(client, sql, &[&consumer]).await
}

async fn table(
    client: &Client,
    sql: &str,
    parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
) -> Result<BTreeMap<String, String>> {
    let rows = client.query(sql, parameters).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Writes down, from now on, every step that a view or a mark takes, in the transaction that takes it.
pub async fn record_steps(client: &Client) -> Result<()> {
    client
        .batch_execute(
            "CREATE TABLE steps (seq bigserial PRIMARY KEY, what text, entity text, before bigint, after bigint,
                                 transaction text DEFAULT pg_current_xact_id()::text);
             CREATE FUNCTION record_view() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 INSERT INTO steps (what, entity, before, after) VALUES
                     ('view', NEW.order_id::text, CASE TG_OP WHEN 'UPDATE' THEN OLD.order_version ELSE 0 END, NEW.order_version);
                 RETURN NULL;
             END $$;
             CREATE FUNCTION record_mark() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 INSERT INTO steps (what, entity, before, after) VALUES
                     ('mark', NEW.entity_id, CASE TG_OP WHEN 'UPDATE' THEN OLD.version ELSE 0 END, NEW.version);
                 RETURN NULL;
             END $$;
             CREATE TRIGGER record_view AFTER INSERT OR UPDATE ON order_views FOR EACH ROW EXECUTE FUNCTION record_view();
             CREATE TRIGGER record_mark AFTER INSERT OR UPDATE ON consumer_marks FOR EACH ROW EXECUTE FUNCTION record_mark();",
        )
        .await?;
    Ok(())
}

/// What was written down: steps of the views, and of the marks.
pub async fn steps(client: &Client) -> Result<(Vec<Step>, Vec<Step>)> {
    let mut both = Vec::new();
    for what in ["view", "mark"] {
        let sql = "SELECT entity, before, after, transaction FROM steps WHERE what = $1 ORDER BY seq";
        let rows = client.query(sql, &[&what]).await?;
        let steps = rows.iter().map(|row| Step {
            entity: row.get(0),
            from: row.get(1),
            to: row.get(2),
            transaction: row.get(3),
        });
        both.push(steps.collect());
    }
    let marks = both.pop().unwrap_or_default();
    Ok((both.pop().unwrap_or_default(), marks))
}

/// A number.
pub async fn count(client: &Client, sql: &str) -> Result<i64> {
    Ok(client.query_one(sql, &[]).await?.get(0))
}

/// Waits until the relay has saved that everything in the outbox is published.
pub async fn published(orders: &Client) -> Result<()> {
    let sql = "SELECT coalesce((SELECT max(floor) FROM outbox_relay), 0) >= coalesce((SELECT max(id) FROM outbox), 0)";
    wait::until("the outbox is published", PATIENCE, || async {
        let done: bool = orders.query_one(sql, &[]).await?.get(0);
        Ok(done.then_some(()))
    })
    .await
}

/// Waits until the read model has taken in as many events as there are in the outbox.
pub async fn projected(orders: &Client, order_query: &Client) -> Result<()> {
    wait::until("the outbox is projected", PATIENCE, || async {
        let events = count(orders, "SELECT count(*) FROM outbox").await?;
        let sql = "SELECT coalesce(sum(order_version), 0)::bigint FROM order_views";
        Ok((count(order_query, sql).await? >= events).then_some(()))
    })
    .await
}
