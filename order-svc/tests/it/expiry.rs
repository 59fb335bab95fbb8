//! Orders that are not paid in time.

use crate::common::*;
use crate::payments::{PaymentEvent, Stage, failed, is, metric, received, types_of};
use contracts::shop::order::v1::{self as api, OrderStatus};
use uuid::Uuid;

/// Orders are overdue a second after they were placed, which is soon found.
const SOON: [(&str, &str); 2] = [("orders.pay_within", "1s"), ("orders.expiry_interval", "10ms")];

async fn place(service: &Running, count: usize) -> Vec<api::Order> {
    let mut orders = Vec::new();
    for _ in 0..count {
        orders.push(service.place(place_request()).await.expect("placed"));
    }
    orders
}

async fn overdue(sql: &tokio_postgres::Client) -> i64 {
    count(sql, "SELECT count(*) FROM orders WHERE overdue_at IS NOT NULL").await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overdue_order_is_recorded_once_and_its_payments_decide() {
    const ORDERS: usize = 40;
    let stage = Stage::new().await;
    let [a, b] = stage.start_two(&SOON).await;
    let orders = place(&a, ORDERS).await;
    let sql = stage.database.connect().await.expect("connected");
    until("all are overdue", async || overdue(&sql).await == ORDERS as i64).await;
    for order in &orders {
        assert_eq!(types_of(&b, order).await, ["order.placed", "order.overdue"]);
        let seen = a.get(&order.user_id, &order.order_id).await.expect("there");
        // Time alone does not cancel.
        assert_eq!((seen.status(), seen.version), (OrderStatus::Pending, 2));
    }
    let early = "SELECT count(*) FROM events WHERE event_type = 'order.overdue' AND occurred_at < \
                 (SELECT pay_by FROM orders WHERE order_id::text = entity_id)";
    assert_eq!(count(&sql, early).await, 0);

    let answers: Vec<PaymentEvent> = (0..)
        .zip(&orders)
        .map(|(number, order)| match number % 2 {
            0 => failed(order, Uuid::now_v7(), false),
            _ => received(order, Uuid::now_v7()),
        })
        .collect();
    for answer in &answers {
        stage.publish(answer).await;
    }
    for (number, order) in orders.iter().enumerate() {
        let (status, reason, last) = match number % 2 {
            0 => (OrderStatus::Cancelled, "not paid in time", "order.cancelled"),
            _ => (OrderStatus::Paid, "", "order.paid"),
        };
        is(&a, order, status).await;
        let seen = b.get(&order.user_id, &order.order_id).await.expect("there");
        assert_eq!(seen.cancel_reason, reason);
        assert_eq!(types_of(&b, order).await, ["order.placed", "order.overdue", last]);
    }
    a.stop().await;
    b.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_paid_or_cancelled_in_time_is_not_overdue() {
    let stage = Stage::new().await;
    let service = stage.start(&[("orders.pay_within", "4s"), SOON[1]]).await;
    let orders = place(&service, 3).await;
    let paid = received(&orders[0], Uuid::now_v7());
    stage.publish(&paid).await;
    stage.heard(&paid).await;
    service
        .cancel(cancel_request(&orders[1]))
        .await
        .expect("cancelled");
    let sql = stage.database.connect().await.expect("connected");
    until("the third is overdue", async || overdue(&sql).await > 0).await;
    assert_eq!(
        types_of(&service, &orders[0]).await,
        ["order.placed", "order.paid"]
    );
    assert_eq!(
        types_of(&service, &orders[1]).await,
        ["order.placed", "order.cancelled"]
    );
    assert_eq!(
        types_of(&service, &orders[2]).await,
        ["order.placed", "order.overdue"]
    );
    // An overdue order can still be cancelled by its user.
    service
        .cancel(cancel_request(&orders[2]))
        .await
        .expect("cancelled");
    service.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_kafka_orders_expire_but_none_is_cancelled() {
    let database = database().await;
    let service = start_with(config(&database.url(), &SOON)).await;
    let orders = place(&service, 5).await;
    let sql = database.connect().await.expect("connected");
    until("all are overdue", async || overdue(&sql).await == 5).await;
    for order in &orders {
        is(&service, order, OrderStatus::Pending).await;
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_that_are_locked_or_broken_hold_up_no_other() {
    let database = database().await;
    let service = start_with(config(
        &database.url(),
        &[SOON[0], ("orders.expiry_interval", "1h")],
    ))
    .await;
    let orders = place(&service, 250).await;
    service.stop().await;
    let sql = database.connect().await.expect("connected");
    let (locked, broken) = (&orders[0].order_id, &orders[1].order_id);
    sql.batch_execute(&format!(
        "SET session_replication_role = replica; UPDATE orders SET currency = 'XXX' WHERE order_id = '{broken}';
         BEGIN; SELECT FROM orders WHERE order_id = '{locked}' FOR UPDATE"
    ))
    .await
    .expect("tampered");
    let service = start_with(config(&database.url(), &SOON)).await;
    let observer = database.connect().await.expect("connected");
    until("all others are overdue", async || overdue(&observer).await == 248).await;
    sql.batch_execute("COMMIT").await.expect("released");
    until("the locked one is, too", async || overdue(&observer).await == 249).await;
    assert_eq!(metric(service.admin, "consumer_assigned_partitions").await, 0.0);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn looking_for_overdue_orders_is_one_range_of_an_index() {
    let database = database().await;
    let sql = database.connect().await.expect("connected");
    sql.batch_execute(
        "INSERT INTO orders SELECT gen_random_uuid(), 1, gen_random_uuid(), 'pending',
             '[{\"product_id\": \"00000000-0000-0000-0000-000000000001\", \"quantity\": 1, \"unit_price\": 1}]', 1, 'EUR',
             NULL, NULL, now() + n * interval '1 second', now() - interval '1 day', now()
         FROM generate_series(-1000, 20000) n; ANALYZE orders;",
    )
    .await
    .expect("filled");
    let due = "SELECT pay_by, order_id FROM orders WHERE status = 'pending' AND overdue_at IS NULL AND pay_by <= now()";
    let behind = "AND pay_by >= now() - interval '1 minute'
                  AND (pay_by > now() - interval '1 minute' OR order_id > gen_random_uuid())";
    for filter in ["", behind] {
        let statement = format!("EXPLAIN {due} {filter} ORDER BY pay_by, order_id LIMIT 200");
        let rows = sql.query(&statement, &[]).await.expect("explained");
        let plan: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let plan = plan.join("\n");
        assert!(plan.contains("Index Only Scan using orders_to_be_paid"), "{plan}");
        assert!(
            !plan.contains("Sort") && !plan.contains("Filter: (status"),
            "{plan}"
        );
    }
}
