//! What events of orders lead to.

use crate::common::*;
use crate::gate::{At, Call, Gate};
use contracts::catalogue::order as types;
use contracts::shop::order::events::v1 as events;
use contracts::shop::payment::events::v1::PaymentFailed;
use local_stack::cards::{self, Fault};
use prost::Message as _;

/// Reason and last word of an order's failed payments, in the order of the outbox.
async fn failures(stage: &Stage, order: &Order) -> Vec<(FailureReason, bool)> {
    let query =
        "SELECT payload FROM outbox WHERE correlation_id = $1 AND event_type = 'payment.failed' ORDER BY id";
    let rows = stage.sql.query(query, &[&order.id]).await.expect("answered");
    rows.iter()
        .map(|row| {
            let failed = PaymentFailed::decode(row.get::<_, &[u8]>(0)).expect("decodes");
            assert_eq!(failed.amount, Some(order.amount()));
            (failed.reason(), failed.another_try)
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_names_its_method_is_charged() {
    let stage = Stage::new().await;
    let replicas = [stage.replica().await, stage.replica().await];
    let orders: Vec<Order> = (0..20).map(|_| Order::new()).collect();
    for order in &orders {
        let method = replicas[0].client.method(order.user, cards::VISA).await;
        stage.publish_placed(order, Some(&method)).await;
        stage.publish_reserved(order, 2).await;
    }
    for order in &orders {
        stage.until_payments(order, &["received"]).await;
        assert_eq!(stage.ledger(order).await, (1, 0));
        assert_eq!(stage.events(order).await, ["payment.received 1"]);
        // The event continues the trace of the one that caused it.
        let query = "SELECT o.traceparent, o.causation_id = p.causation_id, e.traceparent = o.traceparent
                     FROM outbox o JOIN payments p ON p.payment_id::text = o.aggregate_id
                     JOIN events e ON e.event_id = o.event_id WHERE o.correlation_id = $1";
        let row = stage.sql.query_one(query, &[&order.id]).await.expect("one");
        assert_eq!(row.get::<_, String>(0), traceparent(order));
        assert!(row.get::<_, bool>(1) && row.get::<_, bool>(2));
    }
    stage.is_right().await;
    for replica in replicas {
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_names_a_method_that_its_user_does_not_have() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let stranger = replica.client.method(Order::new().user, cards::VISA).await;
    for method in [id(), stranger] {
        let order = Order::new();
        stage.publish_placed(&order, Some(&method)).await;
        stage.publish_reserved(&order, 2).await;
        stage.until_payments(&order, &["failed"]).await;
        assert_eq!(
            failures(&stage, &order).await,
            [(FailureReason::UnknownPaymentMethod, true)]
        );
        // It may still be paid otherwise.
        let paid = replica
            .client
            .pay(order.pay_by_card(cards::VISA))
            .await
            .expect("paid");
        assert_eq!(paid.status(), PaymentStatus::Received);
    }
    stage.is_right().await;
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_charged_before_its_stock_is_held() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let order = Order::new();
    let method = replica.client.method(order.user, cards::VISA).await;
    stage.publish_placed(&order, Some(&method)).await;
    stage.until_known(&order).await;
    stage.until_payments(&order, &[]).await;
    stage.publish_reserved(&order, 2).await;
    stage.until_payments(&order, &["received"]).await;
    stage.is_right().await;
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn charging_need_not_wait_where_nobody_holds_stock() {
    let stage = Stage::new().await;
    let replica = stage.replica_with(&[("payments.charge_at", "placed")]).await;
    let order = Order::new();
    let method = replica.client.method(order.user, cards::VISA).await;
    stage.publish_placed(&order, Some(&method)).await;
    stage.until_payments(&order, &["received"]).await;
    stage.publish_reserved(&order, 2).await;
    stage.is_right().await;
    assert_eq!(stage.ledger(&order).await, (1, 0));
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_without_stock_is_refunded_or_never_charged() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    // Paid before anybody has said whether its stock is to be had.
    let (paid, waiting) = (Order::new(), Order::new());
    let method = replica.client.method(waiting.user, cards::VISA).await;
    stage.publish_placed(&paid, None).await;
    stage.publish_placed(&waiting, Some(&method)).await;
    let payment = replica
        .client
        .pay(paid.pay_by_card(cards::VISA))
        .await
        .expect("paid");
    assert_eq!(payment.status(), PaymentStatus::Received);
    stage.publish_cancelled(&paid, 2).await;
    stage.publish_cancelled(&waiting, 2).await;
    stage.until_payments(&paid, &["refunded"]).await;
    stage.until_cancelled(&waiting).await;
    stage.until_payments(&waiting, &[]).await;
    stage.is_right().await;
    assert_eq!(stage.ledger(&paid).await, (1, 1));
    assert_eq!(stage.ledger(&waiting).await, (0, 0));
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overdue_order_gets_an_answer() {
    let mut stage = Stage::new().await;
    let gate = Gate::before(&stage.sandbox.http_url().expect("serving")).await;
    stage.through(gate.url.clone());
    let slow = [("provider.timeout", "20s"), ("payments.lease", "25s")];
    let replica = stage.replica_with(&slow).await;

    // Nobody has paid, and nobody will.
    let order = Order::new();
    stage.publish_placed(&order, None).await;
    stage.publish_overdue(&order, 2).await;
    stage.until_payments(&order, &["failed"]).await;
    assert_eq!(
        failures(&stage, &order).await,
        [(FailureReason::NotPaidInTime, false)]
    );
    let status = replica
        .client
        .pay(order.pay_by_card(cards::VISA))
        .await
        .expect_err("closed");
    check_status(&status, tonic::Code::FailedPrecondition, "PAYMENT_CLOSED");

    // Somebody tried, and failed: the same.
    let order = Order::new();
    stage.publish_placed(&order, None).await;
    replica
        .client
        .pay(order.pay_by_card(cards::DECLINED))
        .await
        .expect("declined");
    stage.publish_overdue(&order, 2).await;
    stage.until_payments(&order, &["failed", "failed"]).await;
    assert_eq!(
        failures(&stage, &order).await,
        [
            (FailureReason::Declined, true),
            (FailureReason::NotPaidInTime, false)
        ]
    );

    // It is paid: that was said already.
    let order = Order::new();
    stage.publish_placed(&order, None).await;
    replica
        .client
        .pay(order.pay_by_card(cards::VISA))
        .await
        .expect("paid");
    stage.publish_overdue(&order, 2).await;
    let closed = "SELECT closed FROM known_orders WHERE order_id = $1";
    stage.until("the order is closed", closed, order.id).await;
    assert_eq!(stage.events(&order).await, ["payment.received 1"]);

    // Somebody is paying: that decides, whichever way it goes.
    for (number, status, events) in [
        (cards::VISA, "received", "payment.received 1"),
        (cards::DECLINED, "failed", "payment.failed 1"),
    ] {
        let order = Order::new();
        stage.publish_placed(&order, None).await;
        stage.until_known(&order).await;
        let held = gate.hold(Call::Confirm, At::BeforeProvider);
        let client = replica.client.clone();
        let paying = tokio::spawn(async move { client.pay(order.pay_by_card(number)).await });
        held.arrived().await;
        stage.publish_overdue(&order, 2).await;
        stage.until("the order is closed", closed, order.id).await;
        assert!(stage.events(&order).await.is_empty(), "not decided yet");
        held.release();
        paying.await.expect("no panic").expect("an answer");
        stage.until_payments(&order, &[status]).await;
        assert_eq!(stage.events(&order).await, [events]);
        if status == "failed" {
            assert_eq!(failures(&stage, &order).await, [(FailureReason::Declined, false)]);
        }
    }

    // The last word was said by a card that is blocked: it is not said twice.
    let order = Order::new();
    stage.publish_placed(&order, None).await;
    replica
        .client
        .pay(order.pay_by_card(cards::STOLEN))
        .await
        .expect("declined");
    stage.publish_overdue(&order, 2).await;
    stage.publish_cancelled(&order, 3).await;
    stage.until_cancelled(&order).await;
    assert_eq!(
        failures(&stage, &order).await,
        [(FailureReason::CardBlocked, false)]
    );
    stage.is_right().await;
    replica.stop().await;
}

/// Repeats change nothing, unknown types are passed over, and a record that cannot be read is parked alone.
#[tokio::test(flavor = "multi_thread")]
async fn repeats_and_strange_records() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let order = Order::new();
    let method = replica
        .client
        .method(order.user, cards::fault(Fault::None, Fault::None, 3).as_str())
        .await;
    for _ in 0..3 {
        stage.publish_placed(&order, Some(&method)).await;
    }
    stage
        .publish(&order, 2, "order.painted", &events::OrderConfirmed::default())
        .await;
    for _ in 0..2 {
        stage.publish_reserved(&order, 3).await;
    }
    stage
        .publish(&order, 4, types::CONFIRMED, &events::OrderConfirmed::default())
        .await;
    let query = "SELECT version = 4 FROM known_orders WHERE order_id = $1";
    stage.until("all of it is read", query, order.id).await;
    stage.until_payments(&order, &["received"]).await;
    assert_eq!(stage.ledger(&order).await, (1, 0));

    let strange = Order::new();
    stage
        .publish(&strange, 1, types::PLACED, &events::OrderPlaced::default())
        .await;
    let query = "SELECT error_kind = 'payload' FROM parked_records WHERE entity_id = $1::uuid::text";
    stage.until("it is parked", query, strange.id).await;
    // Orders behind it go on, and nobody is told that this process is unwell.
    let later = Order::new();
    stage.publish_placed(&later, Some(&method)).await;
    let query = "SELECT true FROM known_orders WHERE order_id = $1";
    stage.until("the order behind it is known", query, later.id).await;
    let ready = local_stack::process::http_get(replica.admin, "/readyz").await;
    assert_eq!(ready.expect("an answer").0, 200);
    stage.is_right().await;
    replica.stop().await;
}
