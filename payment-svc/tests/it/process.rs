//! The binary: configuration, migration, signals.

use std::process::Command;

use crate::common::*;
use local_stack::cards;
use local_stack::testing::Database;

const BINARY: &str = env!("CARGO_BIN_EXE_payment-svc");

fn payment_svc(url: &str) -> Command {
    let mut command = Command::new(BINARY);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PAYMENT_SVC_")) {
        command.env_remove(name);
    }
    command
        .env("PAYMENT_SVC_DATABASE__URL", url)
        .env("PAYMENT_SVC_KAFKA__BROKERS", "localhost:1")
        .env("PAYMENT_SVC_PROVIDER__SECRET_KEY", "sk_test_hunter3");
    command
}

#[test]
fn bad_configuration_is_reported_whole() {
    let output = payment_svc("mysql://hunter2@x")
        .arg("check-config")
        .env("PAYMENT_SVC_GRPC__LISTEN", "nowhere")
        .env("PAYMENT_SVC_PAYMENTS__COLOUR", "blue")
        .output()
        .expect("run");
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(78), "{text}");
    for part in ["grpc.listen", "payments.colour", "database.url"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("hunter"), "{text}");
    let output = payment_svc("postgres://u@h/d")
        .arg("check-config")
        .output()
        .expect("run");
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn migrations_at_once_are_safe() {
    let database = Database::empty().await;
    let url = database.url();
    let runs: Vec<_> = (0..3)
        .map(|_| {
            let mut command = payment_svc(&url);
            command.arg("migrate");
            tokio::task::spawn_blocking(move || command.output().expect("run"))
        })
        .collect();
    for run in runs {
        let output = run.await.expect("no panic");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let sql = database.connect().await.expect("connected");
    let row = sql
        .query_one("SELECT count(*) FROM payments", &[])
        .await
        .expect("a table");
    assert_eq!(row.get::<_, i64>(0), 0);
}

/// What the database must refuse, whatever the service does.
#[tokio::test(flavor = "multi_thread")]
async fn the_database_holds_the_rules() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let order = stage.known_order().await;
    let paid = replica
        .client
        .pay(order.pay_by_card(cards::VISA))
        .await
        .expect("paid");
    let pending = stage.known_order().await;
    let payment_id = paid.payment_id;
    let same = "SELECT gen_random_uuid(), 0, order_id, user_id, amount_minor_units, currency, payment_method_id, brand,
                last_four, 'pending', NULL, NULL, NULL, NULL, now(), now(), now(), 1, 0, gen_random_uuid(), NULL, NULL
                FROM payments";
    let other_user = "SELECT gen_random_uuid(), 0, o.order_id, o.user_id, o.total_minor_units, o.currency,
                      p.payment_method_id, p.brand, p.last_four, 'pending', NULL, NULL, NULL, NULL, now(), now(), now(),
                      1, 0, gen_random_uuid(), NULL, NULL FROM payments p, known_orders o";
    let failed = "SELECT gen_random_uuid(), 1, order_id, user_id, amount_minor_units - 1, currency, NULL, NULL, NULL,
                  'failed', NULL, NULL, 'declined', true, now(), now(), NULL, 1, 0, gen_random_uuid(), NULL, NULL
                  FROM payments";
    for (statement, constraint) in [
        (format!("INSERT INTO payments {same}"), "payments_one_per_order"),
        (
            format!(
                "INSERT INTO payments {other_user} WHERE o.order_id = '{}'",
                pending.id
            ),
            "payments_own_method",
        ),
        (format!("INSERT INTO payments {failed}"), "payments_order"),
        (
            "UPDATE payments SET status = 'pending', version = 0, next_step_at = now()".into(),
            "refused",
        ),
        (
            "UPDATE payments SET status = 'refund_pending'".into(),
            "payments_status",
        ),
        ("UPDATE payments SET intent = 'pi_other'".into(), "refused"),
        ("UPDATE payments SET amount_minor_units = 1".into(), "refused"),
        ("DELETE FROM payments".into(), "refused"),
        ("TRUNCATE payments CASCADE".into(), "refused"),
        ("UPDATE known_orders SET total_minor_units = 1".into(), "refused"),
        (
            "UPDATE known_orders SET cancelled = true".into(),
            "known_orders_closed",
        ),
        ("DELETE FROM known_orders".into(), "refused"),
        ("UPDATE payment_methods SET last_four = '0000'".into(), "refused"),
    ] {
        let error = stage.sql.batch_execute(&statement).await.expect_err(&statement);
        let error = error.as_db_error().expect("PostgreSQL's");
        let told = format!("{} {}", error.constraint().unwrap_or_default(), error.message());
        assert!(told.contains(constraint), "{statement}: {told}");
    }
    let cancel = "UPDATE known_orders SET closed = true, cancelled = true";
    stage.sql.batch_execute(cancel).await.expect("forwards");
    let back = stage
        .sql
        .batch_execute("UPDATE known_orders SET cancelled = false")
        .await;
    back.expect_err("backwards");
    let found = replica
        .client
        .get(&order.user.to_string(), &payment_id)
        .await
        .expect("found");
    assert_eq!(found.status(), PaymentStatus::Received);
    replica.stop().await;
}

/// A payment continues its caller's trace, and so does its refund with its own caller's.
#[tokio::test(flavor = "multi_thread")]
async fn traces_are_continued() {
    const TRACES: [&str; 2] = [
        "0af7651916cd43dd8448eb211c80319c",
        "1bf7651916cd43dd8448eb211c80319d",
    ];
    let stage = Stage::new().await;
    let mut process = stage.process("traced").start().await.expect("started");
    process.ready().await.expect("ready");
    let client = Client::new(&process.grpc_url().expect("listening"));
    let order = stage.known_order().await;
    let request = order.pay_by_card(cards::VISA);
    let request_id = request.request_id.clone();
    let paid = client.within_trace(TRACES[0]).pay(request).await.expect("paid");
    let refund = refund_request(&paid);
    client
        .within_trace(TRACES[1])
        .refund(refund.clone())
        .await
        .expect("refunded");
    let query = "SELECT traceparent, causation_id::text FROM outbox WHERE correlation_id = $1 ORDER BY id";
    let rows = stage.sql.query(query, &[&order.id]).await.expect("answered");
    assert_eq!(rows.len(), 2);
    for ((row, trace), request_id) in rows.iter().zip(TRACES).zip([request_id, refund.request_id]) {
        let traceparent: String = row.get(0);
        assert_eq!(service::telemetry::trace_id(&traceparent), Some(trace));
        assert_eq!(row.get::<_, String>(1), request_id);
    }
    let status = process.stop().await.expect("stopped");
    assert!(status.success(), "{status}");
}

/// Looking for work stays cheap with many payments that are done.
#[tokio::test(flavor = "multi_thread")]
async fn due_payments_are_found_by_their_index() {
    let stage = Stage::new().await;
    let many = "
        INSERT INTO payment_methods SELECT id, id, 'pm_1', 'visa', '4242', 1, 2040, now() FROM gen_random_uuid() id;
        INSERT INTO known_orders
        SELECT gen_random_uuid(), user_id, 100, 'EUR', NULL, false, false, false, 1
        FROM payment_methods, generate_series(1, 20000);
        INSERT INTO payments
        SELECT gen_random_uuid(), 1, o.order_id, o.user_id, 100, 'EUR', m.payment_method_id, 'visa', '4242', 'received',
               'pi_' || o.order_id, NULL, NULL, NULL, now(), now(), NULL, 1, 0, gen_random_uuid(), NULL, NULL
        FROM known_orders o JOIN payment_methods m USING (user_id);
        ANALYZE;";
    stage.sql.batch_execute(many).await.expect("inserted");
    let query = payment_svc::store::CLAIM_DUE
        .replace("$1", "30")
        .replace("$2", "8");
    let rows = stage
        .sql
        .query(&format!("EXPLAIN {query}"), &[])
        .await
        .expect("explained");
    let plan: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let plan = plan.join("\n");
    assert!(
        plan.contains("Index Scan using payments_due") && !plan.contains("Seq Scan"),
        "{plan}"
    );
}
