//! `verify` and the database's own rules: each is shown to notice what it is for.

use crate::common::*;
use diesel_async::{AsyncConnection as _, AsyncPgConnection};
use order_svc::verify::{Report, verify};

/// Turns triggers off, as only a superuser can; constraints still hold.
const UNGUARDED: &str = "SET session_replication_role = replica;";

async fn report(url: &str) -> Report {
    let mut conn = AsyncPgConnection::establish(url).await.expect("connected");
    verify(&mut conn).await.expect("verified")
}

#[tokio::test(flavor = "multi_thread")]
async fn tampering_is_noticed() {
    for (tamper, expected) in [
        ("UPDATE orders SET version = 3 WHERE status = 'cancelled'", "its row differs from its history in version"),
        ("UPDATE orders SET cancel_reason = 'x' WHERE status = 'cancelled'", "its row differs from its history in cancel_reason"),
        ("UPDATE orders SET user_id = order_id WHERE status = 'pending'", "its row differs from its history in user_id"),
        (
            "UPDATE orders SET total_minor_units = 1, items = jsonb_set(items, '{0,quantity}', '7') WHERE status = 'pending'",
            "its row differs from its history in items, total_minor_units",
        ),
        ("DELETE FROM orders WHERE status = 'cancelled'", "it has a history of 2 events and no row"),
        ("DELETE FROM events WHERE event_type = 'order.cancelled'", "its row differs from its history in"),
        ("DELETE FROM events WHERE event_type = 'order.cancelled'", "has no event"),
        ("DELETE FROM events WHERE event_type = 'order.placed' AND entity_id IN (SELECT order_id::text FROM orders WHERE version = 2)",
         "its history has a gap before version 2"),
        ("DELETE FROM events WHERE entity_id IN (SELECT order_id::text FROM orders WHERE version = 1)", "it has a row and no history"),
        ("UPDATE events SET payload = '\\xff' WHERE event_type = 'order.cancelled'", "cannot be read: the payload is not Protobuf"),
        ("UPDATE events SET event_type = 'order.reserved' WHERE event_type = 'order.placed'", "cannot be read"),
        ("DELETE FROM outbox WHERE event_type = 'order.cancelled'", "version 2 has no outbox row"),
        ("UPDATE outbox SET payload = '\\x00' WHERE event_type = 'order.cancelled'", "differs from version 2"),
        ("UPDATE outbox SET aggregate_version = 9 WHERE event_type = 'order.cancelled'", "differs from version 2"),
        ("UPDATE outbox SET traceparent = 'x' WHERE event_type = 'order.cancelled'", "differs from version 2"),
        (
            "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source, payload)
             SELECT event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source, payload FROM outbox
             WHERE event_type = 'order.cancelled'",
            "is in the outbox 2 times",
        ),
        (
            "UPDATE outbox SET event_id = o.event_id, aggregate_version = o.aggregate_version FROM outbox o
             WHERE outbox.aggregate_id = o.aggregate_id AND outbox.id <> o.id",
            "comes before that of an earlier version",
        ),
    ] {
        let database = database().await;
        let service = start(&database).await;
        service.place(place_request()).await.expect("placed");
        let order = service.place(place_request()).await.expect("placed");
        service.cancel(cancel_request(&order)).await.expect("cancelled");
        service.stop().await;
        let sound = report(&database.url()).await;
        assert!(sound.sound().is_ok(), "{sound}");
        assert_eq!((sound.entities, sound.events, sound.outbox_rows), (2, 3, 3));

        let sql = database.connect().await.expect("connected");
        sql.batch_execute(&format!("{UNGUARDED} {tamper}")).await.expect(tamper);
        let found = report(&database.url()).await;
        assert!(found.sound().is_err(), "{tamper} was not noticed");
        assert!(found.to_string().contains(expected), "{tamper}: {found}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_refuses_what_no_order_can_be() {
    let database = database().await;
    let service = start(&database).await;
    let order = service.place(place_request()).await.expect("placed");
    let cancelled = service.place(place_request()).await.expect("placed");
    service
        .cancel(cancel_request(&cancelled))
        .await
        .expect("cancelled");
    service.stop().await;
    let sql = database.connect().await.expect("connected");
    let row = format!("WHERE order_id = '{}'", order.order_id);
    let next = "version = version + 1";
    let paid =
        "paid_at = now(), payment_id = gen_random_uuid(), payment_brand = 'visa', payment_last_four = '4242'";
    let ended_by = |by| format!("cancelled_at = now(), cancelled_by = '{by}', cancel_reason = ''");
    for (change, by) in [
        // Constraints.
        (format!("UPDATE orders SET {next}, status = 'eaten' {row}"), "orders_status"),
        (format!("UPDATE orders SET {next}, status = 'paid' {row}"), "orders_status"),
        (format!("UPDATE orders SET {next}, paid_at = now() {row}"), "orders_payment"),
        (format!("UPDATE orders SET {next}, {paid} {row}"), "orders_status"),
        (format!("UPDATE orders SET {next}, status = 'paid', reserved_at = now(), {paid} {row}"), "orders_confirmed"),
        (format!("UPDATE orders SET {next}, status = 'shipped' {row}"), "orders_status"),
        (format!("UPDATE orders SET {next}, status = 'cancelled' {row}"), "orders_status"),
        (format!("UPDATE orders SET {next}, tracking_number = 'x' {row}"), "orders_shipment"),
        (format!("UPDATE orders SET {next}, cancel_reason = 'x' {row}"), "orders_cancellation"),
        (format!("UPDATE orders SET {next}, overdue_at = pay_by - interval '1us' {row}"), "orders_overdue"),
        (format!("UPDATE orders SET {next}, status = 'cancelled', {} {row}", ended_by("chance")), "orders_cancelled_by_check"),
        (format!("UPDATE orders SET {next}, status = 'cancelled', {} {row}", ended_by("not_paid_in_time")), "orders_unpaid"),
        (
            format!("UPDATE orders SET {next}, status = 'cancelled', overdue_at = pay_by, {}, {paid} {row}",
                    ended_by("not_paid_in_time")),
            "orders_unpaid",
        ),
        (
            format!("UPDATE orders SET {next}, status = 'cancelled', {}, {paid} {row}", ended_by("payment_failed")),
            "orders_unpaid",
        ),
        (format!("UPDATE orders SET {next}, status = 'cancelled', {} {row}", ended_by("refund")), "orders_unpaid"),
        (
            format!("INSERT INTO orders SELECT gen_random_uuid(), 1, user_id, status, '[]', total_minor_units, currency,
                     user_email, payment_method_id, pay_by, created_at, updated_at FROM orders {row}"),
            "orders_items",
        ),
        (
            format!("INSERT INTO orders SELECT gen_random_uuid(), 1, user_id, status, items, 0, currency,
                     user_email, payment_method_id, pay_by, created_at, updated_at FROM orders {row}"),
            "orders_total_minor_units_check",
        ),
        (
            format!("INSERT INTO orders SELECT gen_random_uuid(), 1, user_id, status,
                     jsonb_set(items, '{{0,quantity}}', '10001'), total_minor_units, currency,
                     user_email, payment_method_id, pay_by, created_at, updated_at FROM orders {row}"),
            "orders_items",
        ),
        // Guards.
        (format!("UPDATE orders SET reserved_at = now() {row}"), "this change is refused"),
        (format!("UPDATE orders SET {next}, total_minor_units = 5 {row}"), "this change is refused"),
        (format!("UPDATE orders SET {next}, user_id = order_id {row}"), "this change is refused"),
        (format!("UPDATE orders SET {next} WHERE order_id = '{}'", cancelled.order_id), "this change is refused"),
        (format!("DELETE FROM orders {row}"), "orders are for ever"),
        ("TRUNCATE orders".to_owned(), "orders are for ever"),
    ] {
        let error = sql.batch_execute(&change).await.expect_err(&change);
        let text = error.as_db_error().map(ToString::to_string).unwrap_or_default();
        let constraint = error.as_db_error().and_then(|error| error.constraint()).unwrap_or_default();
        assert!(constraint == by || text.contains(by), "{change}: {text}");
    }
    // And what an order can be, it takes.
    for change in [
        "reserved_at = now()",
        "overdue_at = pay_by",
        &format!("status = 'confirmed', confirmed_at = now(), {paid}"),
        &format!("status = 'cancelled', {}", ended_by("refund")),
    ] {
        sql.batch_execute(&format!("UPDATE orders SET {next}, {change} {row}"))
            .await
            .expect(change);
    }
}
