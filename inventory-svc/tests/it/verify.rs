//! `verify` and the database's own rules: each is shown to notice what it is for.

use crate::common::*;
use uuid::Uuid;

/// Turns triggers off, as only a superuser can; constraints still hold.
const UNGUARDED: &str = "SET session_replication_role = replica;";

/// Keeps copies of the tables that are tampered with, and puts everything back.
const KEEP: &str =
    "CREATE TABLE kept_stock AS TABLE stock; CREATE TABLE kept_reservations AS TABLE reservations;
                    CREATE TABLE kept_events AS TABLE events; CREATE TABLE kept_outbox AS TABLE outbox;";
const RESTORE: &str = "DELETE FROM stock; INSERT INTO stock TABLE kept_stock; DROP TABLE kept_stock;
                       DELETE FROM reservations; INSERT INTO reservations TABLE kept_reservations; DROP TABLE kept_reservations;
                       DELETE FROM events; INSERT INTO events TABLE kept_events; DROP TABLE kept_events;
                       DELETE FROM outbox; INSERT INTO outbox OVERRIDING SYSTEM VALUE TABLE kept_outbox; DROP TABLE kept_outbox;";

/// One order that is confirmed and one that is rejected, of a product of which 7 of 10 pieces are left.
async fn stage() -> (Stage, Uuid) {
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let product = service.product(10).await;
    let (mut sold, mut rejected) = (Order::new(), Order::new());
    let told = [
        sold.placed(&[(product, 3)]),
        rejected.placed(&[(product, 11)]),
        sold.confirmed(),
    ];
    for event in &told {
        stage.publish(event).await;
    }
    stage.heard(&told).await;
    assert_eq!(service.counts(product).await, (7, 0, 3));
    service.stop().await;
    (stage, product)
}

#[tokio::test(flavor = "multi_thread")]
async fn tampering_is_noticed() {
    let (stage, _) = stage().await;
    let sound = report(&stage.database).await;
    assert!(sound.sound().is_ok(), "{sound}");
    assert_eq!((sound.entities, sound.events), (3, sound.outbox_rows));
    let sql = stage.database.connect().await.expect("connected");
    for (tamper, expected) in [
        (
            "UPDATE stock SET available = 8",
            "its row differs from its history in available",
        ),
        (
            "UPDATE stock SET sold = 2, reserved = 1",
            "its row differs from its history in reserved, sold",
        ),
        (
            "UPDATE stock SET sold = 2, reserved = 1",
            "1 are reserved and 2 sold, and by its reservations it is 0 and 3",
        ),
        (
            "UPDATE stock SET version = 9",
            "its row differs from its history in version",
        ),
        ("DELETE FROM stock", "events and no row"),
        (
            "DELETE FROM stock",
            "0 are reserved and 0 sold, and by its reservations it is 0 and 3",
        ),
        (
            "UPDATE reservations SET lines = jsonb_set(lines, '{0,quantity}', '4') WHERE status = 'committed'",
            "its row differs from its history in lines",
        ),
        (
            "UPDATE reservations SET shortages = jsonb_set(shortages, '{0,available}', '9') WHERE status = 'rejected'",
            "its row differs from its history in shortages",
        ),
        (
            "UPDATE reservations SET decided_at = '2026-01-01' WHERE status = 'rejected'",
            "its row differs from its history in decided_at",
        ),
        (
            "DELETE FROM reservations WHERE status = 'committed'",
            "it has a history of 2 events and no row",
        ),
        (
            "DELETE FROM events WHERE event_type = 'inventory.reserved'",
            "its history has a gap before version 2",
        ),
        (
            "DELETE FROM events WHERE event_type = 'inventory.committed'",
            "its row differs from its history in",
        ),
        (
            "DELETE FROM events WHERE event_type = 'inventory.rejected'",
            "it has a row and no history",
        ),
        (
            "UPDATE events SET payload = '\\xff' WHERE event_type = 'stock.updated'",
            "cannot be read: the payload is not Protobuf",
        ),
        (
            "DELETE FROM outbox WHERE event_type = 'inventory.rejected'",
            "version 1 has no outbox row",
        ),
        (
            "UPDATE outbox SET payload = '\\x00' WHERE event_type = 'inventory.committed'",
            "differs from version 2",
        ),
    ] {
        sql.batch_execute(&format!("{UNGUARDED} {KEEP} {tamper}"))
            .await
            .expect(tamper);
        let found = report(&stage.database).await;
        sql.batch_execute(RESTORE).await.expect("restored");
        assert!(found.sound().is_err(), "{tamper} was not noticed");
        assert!(found.to_string().contains(expected), "{tamper}: {found}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_refuses_what_cannot_be() {
    let (stage, product) = stage().await;
    let service = stage.start(&[]).await;
    let mut order = Order::new();
    let told = [order.placed(&[(product, 2)])];
    stage.publish(&told[0]).await;
    stage.heard(&told).await;
    service.stop().await;
    let sql = stage.database.connect().await.expect("connected");
    let next = "UPDATE stock SET version = version + 1";
    let held = format!(
        "UPDATE reservations SET version = 2, status = 'committed', committed_at = now() WHERE order_id = '{}'",
        order.id
    );
    let insert = "INSERT INTO reservations (order_id, version, status, lines, decided_at)
                  SELECT gen_random_uuid(), 1, 'reserved', lines, now() FROM (SELECT";
    let line = "{\"product_id\": \"0190bbbb-0000-7000-8000-000000000001\", \"quantity\": 1}";
    for (change, by) in [
        // Constraints.
        (format!("{next}, available = -1, sold = 9"), "stock_available_check"),
        (format!("{next}, reserved = -1, available = 8"), "stock_reserved_check"),
        (format!("{next}, sold = -1, available = 9"), "stock_sold_check"),
        (format!("{insert} '[]'::jsonb AS lines) x"), "reservations_lines_check"),
        (format!("{insert} '{{}}'::jsonb AS lines) x"), "reservations_lines_check"),
        (format!("{insert} '[{{\"quantity\": 1}}]'::jsonb AS lines) x"), "reservations_lines_check"),
        (format!("{insert} jsonb_set('[{line}]', '{{0,quantity}}', '0') AS lines) x"), "reservations_lines_check"),
        (format!("{insert} jsonb_set('[{line}]', '{{0,quantity}}', '10001') AS lines) x"), "reservations_lines_check"),
        (format!("{insert} jsonb_set('[{line}]', '{{0,quantity}}', '\"1\"') AS lines) x"), "reservations_lines_check"),
        (format!("{insert} '[{line}, {line}]'::jsonb AS lines) x"), "reservations_lines_check"),
        (held.replace("'committed'", "'eaten'"), "reservations_status"),
        (held.replace("version = 2", "version = 3"), "reservations_status"),
        (held.replace("committed_at = now()", "committed_at = NULL"), "reservations_status"),
        (held.replace("'committed'", "'released'"), "reservations_status"),
        (held.replace("now()", "'2026-01-01'"), "reservations_check"),
        (
            "INSERT INTO reservations (order_id, version, status, lines, decided_at)
             SELECT gen_random_uuid(), 1, 'rejected', lines, now() FROM reservations LIMIT 1".to_owned(),
            "reservations_shortages",
        ),
        (
            "INSERT INTO reservations (order_id, version, status, lines, shortages, decided_at)
             SELECT gen_random_uuid(), 1, 'rejected', lines, jsonb_set(shortages, '{0,available}', '11'), now()
             FROM reservations WHERE status = 'rejected'".to_owned(),
            "reservations_shortages",
        ),
        // Guards.
        ("UPDATE stock SET available = 6".to_owned(), "this change is refused"),
        ("UPDATE stock SET version = version + 2, available = 6".to_owned(), "this change is refused"),
        (format!("{next}, reserved = reserved - 1"), "this change is refused"),
        (format!("{next}, sold = sold + 1, reserved = reserved - 2"), "this change is refused"),
        (format!("{next}, updated_at = '2026-01-01'"), "this change is refused"),
        ("INSERT INTO stock VALUES (gen_random_uuid(), 1, 1, 1, 0, now())".to_owned(), "this beginning is refused"),
        ("INSERT INTO stock VALUES (gen_random_uuid(), 2, 1, 0, 0, now())".to_owned(), "this beginning is refused"),
        (
            "UPDATE reservations SET version = version + 1 WHERE status = 'rejected'".to_owned(),
            "this change is refused",
        ),
        (
            "UPDATE reservations SET version = 3, committed_at = now() WHERE status = 'committed'".to_owned(),
            "this change is refused",
        ),
        (held.replace("version = 2", "version = 1"), "this change is refused"),
        (held.replace("version = 2,", "version = 2, decided_at = now(),"), "this change is refused"),
        ("DELETE FROM stock".to_owned(), "is for ever"),
        ("TRUNCATE stock".to_owned(), "is for ever"),
        ("DELETE FROM reservations".to_owned(), "is for ever"),
        ("TRUNCATE reservations".to_owned(), "is for ever"),
    ] {
        let error = sql.batch_execute(&change).await.expect_err(&change);
        let text = error.as_db_error().map(ToString::to_string).unwrap_or_default();
        let constraint = error.as_db_error().and_then(|error| error.constraint()).unwrap_or_default();
        assert!(constraint == by || text.contains(by), "{change}: {constraint}: {text}");
    }
    // And what can be, it takes.
    for change in [
        format!("{next}, available = 0"),
        format!("{next}, reserved = reserved - 2, sold = sold + 2"),
        held,
        "UPDATE reservations SET version = 3, status = 'released', released_at = now() WHERE status = 'committed'".to_owned(),
    ] {
        sql.batch_execute(&change).await.expect(&change);
    }
}
