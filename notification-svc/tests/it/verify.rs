//! `verify` and the database's own rules: each is shown to notice what it is for.

use crate::common::*;

/// Turns triggers off, as only a superuser can; constraints still hold.
const UNGUARDED: &str = "SET session_replication_role = replica;";

#[tokio::test(flavor = "multi_thread")]
async fn tampering_is_noticed() {
    let stage = Stage::new().await;
    let mut replica = stage.start("replica").await;
    let order = Order::new();
    let placed = stage.tell_placed(&order, Some("ann@example.org")).await.event_id;
    stage.until(placed, "sent").await;
    replica.stop().await.expect("stopped");
    stage.is_right();
    stage
        .sql
        .batch_execute(
            "CREATE TABLE kept_mails AS TABLE mails; CREATE TABLE kept_events AS TABLE events; CREATE TABLE kept_outbox AS TABLE outbox",
        )
        .await
        .expect("kept");
    for (tamper, expected) in [
        (
            "UPDATE mails SET sent_at = now()",
            "its row differs from its history in sent_at",
        ),
        (
            "UPDATE mails SET event_type = 'order.confirmed'",
            "its history is that of another mail",
        ),
        (
            "UPDATE mails SET state = 'failed', sent_at = NULL, trouble = 'x'",
            "it has a history of 1 events and no row",
        ),
        ("DELETE FROM events", "it was sent once and has a history of 0"),
        ("DELETE FROM events", "has no event"),
        ("UPDATE events SET payload = '\\xff'", "cannot be read"),
        ("DELETE FROM outbox", "version 1 has no outbox row"),
    ] {
        stage
            .sql
            .batch_execute(&format!("{UNGUARDED} {tamper}"))
            .await
            .expect(tamper);
        let (sound, found, _) = stage.command(&["verify"]);
        assert!(!sound && found.contains(expected), "{tamper}: {found}");
        stage
            .sql
            .batch_execute(
                "DELETE FROM mails; DELETE FROM events; DELETE FROM outbox;
                 INSERT INTO mails OVERRIDING SYSTEM VALUE TABLE kept_mails; INSERT INTO events TABLE kept_events;
                 INSERT INTO outbox OVERRIDING SYSTEM VALUE TABLE kept_outbox",
            )
            .await
            .expect("restored");
        stage.is_right();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_refuses_what_no_mail_can_be() {
    let stage = Stage::new().await;
    let mut replica = stage.start("replica").await;
    let order = Order::new();
    let sent = stage.tell_placed(&order, Some("ann@example.org")).await.event_id;
    let order = Order::new();
    let unknown = stage
        .tell_placed(&order, Some("take-drop@example.org"))
        .await
        .event_id;
    let order = Order::new();
    let failed = stage
        .tell_placed(&order, Some("rcpt-550@example.org"))
        .await
        .event_id;
    let order = Order::new();
    let waiting = stage.tell_placed(&order, None).await.event_id;
    for (mail, state) in [
        (sent, "sent"),
        (unknown, "unknown"),
        (failed, "failed"),
        (waiting, "waiting"),
    ] {
        stage.until(mail, state).await;
    }
    replica.stop().await.expect("stopped");
    let pending = "state = 'pending', due_at = now(), attempt_id = NULL, attempt_by = NULL, lease_until = NULL, sent_at = NULL";
    let refused = "this change is refused";
    for (mail, change, by) in [
        // Never again by itself.
        (unknown, pending, refused),
        (failed, pending, refused),
        (sent, pending, refused),
        (unknown, "attempt_id = gen_random_uuid()", refused),
        (
            waiting,
            "state = 'sending', attempt_id = gen_random_uuid(), attempt_by = 'x', lease_until = now()",
            refused,
        ),
        (waiting, "state = 'sent', sent_at = now()", refused),
        (waiting, "event_type = 'order.confirmed'", refused),
        (waiting, "payload = ''", refused),
        (waiting, "order_id = gen_random_uuid()", refused),
        (waiting, "state = 'pending'", "mails_state"),
        (
            waiting,
            "state = 'pending', due_at = now(), attempt_id = gen_random_uuid()",
            "mails_state",
        ),
        (
            waiting,
            "state = 'pending', due_at = now(), trouble = 'ann@example.org'",
            "mails_trouble_check",
        ),
        (unknown, "state = 'sent'", "mails_state"),
        (
            unknown,
            "state = 'failed', attempt_id = NULL, attempt_by = NULL, lease_until = NULL, trouble = NULL",
            "mails_state",
        ),
    ] {
        let sql = format!("UPDATE mails SET {change} WHERE notification_id = '{mail}'");
        let error = stage.sql.batch_execute(&sql).await.expect_err(&sql);
        let error = error.as_db_error().expect("PostgreSQL's");
        assert!(
            error.constraint() == Some(by) || error.message().contains(by),
            "{sql}: {}",
            error.message()
        );
    }
    for (sql, by) in [
        ("DELETE FROM mails", "mails are for ever"),
        ("TRUNCATE mails CASCADE", "are for ever"),
        (
            "INSERT INTO mails (notification_id, order_id, event_type, schema_version, payload, state)
             SELECT gen_random_uuid(), order_id, 'order.completed', 1, '', 'waiting' FROM mails LIMIT 1",
            "mails_answered",
        ),
        (
            "INSERT INTO orders (order_id, email) VALUES (gen_random_uuid(), 'ann@example.org')",
            "orders_own_address",
        ),
        (
            "INSERT INTO addressees VALUES (gen_random_uuid(), 'ann@example.org', NULL)",
            "addressees_known",
        ),
    ] {
        let error = stage.sql.batch_execute(sql).await.expect_err(sql);
        let error = error.as_db_error().expect("PostgreSQL's");
        assert!(
            error.constraint() == Some(by) || error.message().contains(by),
            "{sql}: {}",
            error.message()
        );
    }
    // Somebody's decision opens the way, in the transaction that keeps it and in no other.
    let audit = format!(
        "INSERT INTO mails_audit (notification_id, action, state, trouble, reason, decided_by)
         VALUES ('{unknown}', 'resend', 'unknown', 'no_answer', 'x', 'op')"
    );
    let update = format!("UPDATE mails SET {pending} WHERE notification_id = '{unknown}'");
    stage.sql.batch_execute(&audit).await.expect("kept");
    stage
        .sql
        .batch_execute(&update)
        .await
        .expect_err("another transaction");
    stage
        .sql
        .batch_execute(&format!("BEGIN; {audit}; {update}; COMMIT"))
        .await
        .expect("decided");
    stage
        .sql
        .batch_execute("DELETE FROM mails_audit")
        .await
        .expect_err("for ever");
}

/// With a hundred thousand mails behind it, taking the next one is still a look into small indexes.
#[tokio::test(flavor = "multi_thread")]
async fn taking_a_mail_stays_quick() {
    let database = database().await;
    let sql = database.connect().await.expect("connected");
    sql.batch_execute(
        "INSERT INTO addressees SELECT gen_random_uuid(), 'u@example.org', 'U' FROM generate_series(1, 100);
         INSERT INTO orders SELECT gen_random_uuid(), user_id FROM addressees, generate_series(1, 500);
         INSERT INTO mails (notification_id, order_id, event_type, schema_version, payload, state, sent_at)
             SELECT gen_random_uuid(), order_id, 'order.placed', 1, '', 'sent', now() FROM orders, generate_series(1, 2);
         INSERT INTO mails (notification_id, order_id, event_type, schema_version, payload, state, due_at)
             SELECT gen_random_uuid(), order_id, 'order.placed', 1, '', 'pending', now() FROM orders LIMIT 500;
         ANALYZE mails; ANALYZE orders; ANALYZE addressees",
    )
    .await
    .expect("filled");
    let claim = notification_svc::store::CLAIM
        .replace("$1", "gen_random_uuid()")
        .replace("$2", "'test'")
        .replace("$3", "60");
    let rows = sql
        .query(&format!("EXPLAIN (ANALYZE, BUFFERS) {claim}"), &[])
        .await
        .expect("a plan");
    let plan: String = rows.iter().map(|row| row.get::<_, String>(0) + "\n").collect();
    assert!(plan.contains("mails_due"), "{plan}");
    for table in ["mails", "orders", "addressees"] {
        assert!(!plan.contains(&format!("Seq Scan on {table}")), "{plan}");
    }
}
