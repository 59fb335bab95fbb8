//! Paying and cancelling at once, in every order: in the end either no money was taken, or all of it was given back.

use crate::common::*;
use crate::gate::{At, Call, Gate};
use local_stack::cards;

async fn gated() -> (Stage, Gate) {
    let mut stage = Stage::new().await;
    let gate = Gate::before(&stage.sandbox.http_url().expect("serving")).await;
    stage.through(gate.url.clone());
    (stage, gate)
}

/// The order is cancelled while a call of the payment is held, on its way or on its way back.
#[tokio::test(flavor = "multi_thread")]
async fn cancelled_at_each_step_of_paying() {
    let (stage, gate) = gated().await;
    let replica = stage
        .replica_with(&[("provider.timeout", "20s"), ("payments.lease", "25s")])
        .await;
    replica.reads().await;
    for (call, at, charged) in [
        (Call::Create, At::BeforeProvider, false),
        (Call::Create, At::AfterProvider, false),
        (Call::Confirm, At::BeforeProvider, false),
        (Call::Confirm, At::AfterProvider, true),
    ] {
        let what = format!("{call:?} {at:?}");
        let order = Order::new();
        stage.publish_placed(&order, None).await;
        stage.until_known(&order).await;
        let held = gate.hold(call, at);
        let client = replica.client.clone();
        let paying = tokio::spawn(async move { client.pay(order.pay_by_card(cards::VISA)).await });
        held.arrived().await;
        stage.publish_cancelled(&order, 2).await;
        // The settler is at it as soon as the cancellation is known, while the call is still held.
        let settled = if charged { "refunded" } else { "failed" };
        stage.until_cancelled(&order).await;
        if call == Call::Confirm {
            stage.until_payments(&order, &[settled]).await;
        }
        held.release();
        let payment = paying.await.expect("no panic").expect("an answer");
        stage.until_payments(&order, &[settled]).await;
        let expected = if charged { (1, 1) } else { (0, 0) };
        assert_eq!(stage.ledger(&order).await, expected, "{what}");
        let events = stage.events(&order).await;
        if charged {
            assert_eq!(events, ["payment.received 1", "payment.refunded 2"], "{what}");
        } else {
            assert_eq!(events, ["payment.failed 1"], "{what}");
            let failure = payment.failure.expect("a failure");
            assert_eq!(
                (failure.reason(), failure.another_try),
                (FailureReason::OrderCancelled, false),
                "{what}"
            );
        }
    }
    stage.is_right().await;
    replica.stop().await;
}

/// The cancelling call is held while the payment goes on at another replica, and the other way round.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_and_a_confirmation_cross() {
    for (first, charged) in [(Call::Confirm, true), (Call::Cancel, false)] {
        let (stage, gate) = gated().await;
        let slow = [("provider.timeout", "20s"), ("payments.lease", "25s")];
        let replicas = [stage.replica_with(&slow).await, stage.replica_with(&slow).await];
        let order = Order::new();
        stage.publish_placed(&order, None).await;
        stage.until_known(&order).await;
        let confirm = gate.hold(Call::Confirm, At::BeforeProvider);
        let cancel = gate.hold(Call::Cancel, At::BeforeProvider);
        let client = replicas[0].client.clone();
        let paying = tokio::spawn(async move { client.pay(order.pay_by_card(cards::VISA)).await });
        confirm.arrived().await;
        stage.publish_cancelled(&order, 2).await;
        cancel.arrived().await;
        // Both are on their way to the provider: the one that is let go first wins there.
        let (winner, loser) = if first == Call::Confirm {
            (&confirm, &cancel)
        } else {
            (&cancel, &confirm)
        };
        winner.release();
        let settled = if charged { "refunded" } else { "failed" };
        stage.until_payments(&order, &[settled]).await;
        loser.release();
        paying.await.expect("no panic").expect("an answer");
        assert_eq!(
            stage.ledger(&order).await,
            if charged { (1, 1) } else { (0, 0) },
            "{first:?}"
        );
        stage.is_right().await;
        for replica in replicas {
            replica.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_before_and_after_paying() {
    let stage = Stage::new().await;
    let replicas = [stage.replica().await, stage.replica().await];

    // After: the money goes back. A refund that was begun by hand at the same time is the same one.
    let order = Order::new();
    stage.publish_placed(&order, None).await;
    let payment = replicas[0]
        .client
        .pay(order.pay_by_card(cards::VISA))
        .await
        .expect("paid");
    stage.publish_cancelled(&order, 2).await;
    let refunded = replicas[1]
        .client
        .refund(refund_request(&payment))
        .await
        .expect("refunded");
    assert_eq!(refunded.status(), PaymentStatus::Refunded);
    stage.until_cancelled(&order).await;
    assert_eq!(stage.ledger(&order).await, (1, 1));

    // Before: an order that names its method, cancelled in the same breath.
    let order = Order::new();
    let method = replicas[0].client.method(order.user, cards::VISA).await;
    stage.publish_placed(&order, Some(&method)).await;
    stage.publish_cancelled(&order, 2).await;
    stage.until_cancelled(&order).await;
    stage.is_right().await;
    let (charges, refunds) = stage.ledger(&order).await;
    assert_eq!(charges, refunds);
    let status = replicas[0]
        .client
        .pay(order.pay_by_card(cards::VISA))
        .await
        .expect_err("cancelled");
    check_status(&status, tonic::Code::FailedPrecondition, "ORDER_CANCELLED");

    // Both at once, many times, without anybody holding anything.
    let mut calls = tokio::task::JoinSet::new();
    let orders: Vec<Order> = (0..30).map(|_| Order::new()).collect();
    for (number, order) in orders.iter().copied().enumerate() {
        stage.publish_placed(&order, None).await;
        let client = replicas[number % 2].client.clone();
        let request = order.pay_by_card(&cards::fine(number as u64));
        calls.spawn(async move { client.pay(request).await });
        stage.publish_cancelled(&order, 2).await;
    }
    calls.join_all().await;
    for order in &orders {
        stage.until_cancelled(order).await;
    }
    stage.is_right().await;
    for order in &orders {
        let (charges, refunds) = stage.ledger(order).await;
        assert!(
            charges == refunds && charges <= 1,
            "{charges} charges, {refunds} refunds"
        );
    }
    for replica in replicas {
        replica.stop().await;
    }
}
