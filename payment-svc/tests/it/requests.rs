//! Repeats, crowds, and orders that are not known yet.

use std::time::Duration;

use crate::common::*;
use crate::gate::{At, Call, Gate};
use contracts::shop::payment::v1 as api;
use contracts::shop::payment::v1::process_payment_request::Method;
use local_stack::cards::{self, Fault};
use tokio::task::JoinSet;
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_answers_with_the_payment_as_it_is() {
    let mut stage = Stage::new().await;
    let gate = Gate::before(&stage.sandbox.http_url().expect("serving")).await;
    stage.through(gate.url.clone());
    let replica = stage.replica().await;
    let order = stage.known_order().await;
    let request = order.pay_by_card(cards::VISA);

    // The first answer comes while the provider takes its time, and says so.
    let held = gate.hold(Call::Confirm, At::AfterProvider);
    let pending = replica
        .client
        .pay_within(request.clone(), Duration::from_millis(700))
        .await
        .expect("pending");
    assert_eq!(pending.status(), PaymentStatus::Pending);
    held.arrived().await;
    held.release();
    let repeated = replica.client.pay(request.clone()).await.expect("settled");
    assert_eq!(repeated.status(), PaymentStatus::Received);
    assert_eq!(repeated.payment_id, pending.payment_id);
    assert_eq!(gate.count(Call::Create), 1);
    assert_eq!(gate.count(Call::Other), 1, "the card was handed on once");

    // Another request under its id is refused, and nothing of it is done.
    let other = api::ProcessPaymentRequest {
        amount: Some(contracts::shop::common::v1::Money {
            minor_units: 1,
            ..order.amount()
        }),
        ..request.clone()
    };
    let status = replica.client.pay(other).await.expect_err("reused");
    check_status(&status, Code::AlreadyExists, "REQUEST_ID_REUSED");
    let by_method = api::ProcessPaymentRequest {
        method: Some(Method::PaymentMethodId(id())),
        ..request
    };
    let status = replica.client.pay(by_method).await.expect_err("reused");
    check_status(&status, Code::AlreadyExists, "REQUEST_ID_REUSED");

    // Refunds as well.
    let refund = refund_request(&repeated);
    let refunded = replica.client.refund(refund.clone()).await.expect("refunded");
    assert_eq!(refunded.status(), PaymentStatus::Refunded);
    assert_eq!(replica.client.refund(refund).await.expect("repeated"), refunded);
    let again = replica
        .client
        .refund(refund_request(&repeated))
        .await
        .expect("done before");
    assert_eq!(again, refunded);
    assert_eq!(stage.ledger(&order).await, (1, 1));
    stage.is_right().await;
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repeats_at_once_on_two_replicas_are_one_payment() {
    let stage = Stage::new().await;
    let replicas = [stage.replica().await, stage.replica().await];
    let order = stage.known_order().await;
    let request = order.pay_by_card(&cards::fault(Fault::Slow, Fault::None, 7));
    let mut calls = JoinSet::new();
    for number in 0..10 {
        let (client, request) = (replicas[number % 2].client.clone(), request.clone());
        calls.spawn(async move { client.pay(request).await.expect("an answer") });
    }
    let payments = calls.join_all().await;
    for payment in &payments {
        assert_eq!(payment.status(), PaymentStatus::Received);
        assert_eq!(payment.payment_id, payments[0].payment_id);
    }
    let method = api::CreatePaymentMethodRequest {
        request_id: id(),
        user_id: order.user.to_string(),
        card: Some(card(cards::VISA)),
    };
    let mut calls = JoinSet::new();
    for number in 0..10 {
        let (client, method) = (replicas[number % 2].client.clone(), method.clone());
        calls.spawn(async move { client.create_method(method).await.expect("created") });
    }
    let methods = calls.join_all().await;
    assert!(methods.iter().all(|method| *method == methods[0]), "{methods:?}");
    assert_eq!(stage.ledger(&order).await, (1, 0));
    stage.is_right().await;
    for replica in replicas {
        replica.stop().await;
    }
}

/// Twenty clients pay one order, each with a request of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_pays_an_order_once() {
    let stage = Stage::new().await;
    let replicas = [stage.replica().await, stage.replica().await];
    let order = stage.known_order().await;
    let method = replicas[0].client.method(order.user, cards::VISA).await;
    let mut calls = JoinSet::new();
    for number in 0..20 {
        let client = replicas[number % 2].client.clone();
        let request = if number % 4 < 2 {
            order.pay(Method::PaymentMethodId(method.clone()))
        } else {
            order.pay_by_card(&cards::fine(number as u64))
        };
        calls.spawn(async move { client.pay(request).await });
    }
    let answers = calls.join_all().await;
    let received = answers
        .iter()
        .filter(|answer| {
            answer
                .as_ref()
                .is_ok_and(|payment| payment.status() == PaymentStatus::Received)
        })
        .count();
    assert_eq!(received, 1, "{answers:?}");
    for status in answers.iter().filter_map(|answer| answer.as_ref().err()) {
        assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    }
    assert_eq!(stage.ledger(&order).await, (1, 0));
    let status = replicas[1]
        .client
        .pay(order.pay_by_card(cards::VISA))
        .await
        .expect_err("paid");
    check_status(&status, Code::FailedPrecondition, "ORDER_PAID");
    stage.is_right().await;
    for replica in replicas {
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_is_not_known_is_waited_for() {
    let stage = Stage::new().await;
    let replicas = [stage.replica().await, stage.replica().await];
    let order = Order::new();
    let request = order.pay_by_card(cards::VISA);
    let status = replicas[0]
        .client
        .pay_within(request.clone(), Duration::from_millis(500))
        .await
        .expect_err("not known");
    check_status(&status, Code::Unavailable, "ORDER_NOT_KNOWN_YET");

    // It arrives, at whichever replica reads it, while both are asked for it.
    let mut calls = JoinSet::new();
    for replica in &replicas {
        let (client, request) = (replica.client.clone(), request.clone());
        calls.spawn(async move { client.pay(request).await.expect("paid") });
    }
    stage.publish_placed(&order, None).await;
    for payment in calls.join_all().await {
        assert_eq!(payment.status(), PaymentStatus::Received);
    }
    assert_eq!(stage.ledger(&order).await, (1, 0));

    let stranger = api::ProcessPaymentRequest {
        user_id: id(),
        ..order.pay_by_card(cards::VISA)
    };
    let status = replicas[0]
        .client
        .pay(stranger)
        .await
        .expect_err("someone else's");
    check_status(&status, Code::NotFound, "ORDER_NOT_FOUND");
    stage.is_right().await;
    for replica in replicas {
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_wait_are_bounded() {
    let stage = Stage::new().await;
    let replica = stage.replica_with(&[("payments.max_waiting", "1")]).await;
    let begun = std::time::Instant::now();
    let mut waiting = JoinSet::new();
    for _ in 0..2 {
        let client = replica.client.clone();
        let request = Order::new().pay_by_card(cards::VISA);
        waiting.spawn(async move { client.pay(request).await.expect_err("not known") });
    }
    // One of them has no place, and learns it at once.
    let turned_away = waiting.join_next().await.expect("two").expect("no panic");
    check_status(&turned_away, Code::Unavailable, "ORDER_NOT_KNOWN_YET");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    waiting.abort_all();
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_paid_or_refunded_is_refused() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let check = async |order: &Order, request, reason| {
        let status = replica.client.pay(request).await.expect_err(reason);
        check_status(&status, Code::FailedPrecondition, reason);
        assert_eq!(stage.ledger(order).await, (0, 0), "{reason}");
    };
    let order = stage.known_order().await;
    for (minor_units, currency) in [(TOTAL - 1, "EUR"), (TOTAL + 1, "EUR"), (TOTAL, "USD")] {
        let mut request = order.pay_by_card(cards::VISA);
        request.amount = Some(contracts::shop::common::v1::Money {
            minor_units,
            currency_code: currency.into(),
        });
        check(&order, request, "WRONG_AMOUNT").await;
    }
    let cancelled = stage.known_order().await;
    let update = "UPDATE known_orders SET closed = true, cancelled = true WHERE order_id = $1";
    stage
        .sql
        .execute(update, &[&cancelled.id])
        .await
        .expect("updated");
    check(&cancelled, cancelled.pay_by_card(cards::VISA), "ORDER_CANCELLED").await;
    let closed = stage.known_order().await;
    let update = "UPDATE known_orders SET closed = true WHERE order_id = $1";
    stage.sql.execute(update, &[&closed.id]).await.expect("updated");
    check(&closed, closed.pay_by_card(cards::VISA), "PAYMENT_CLOSED").await;

    let failed = replica
        .client
        .pay(order.pay_by_card(cards::DECLINED))
        .await
        .expect("declined");
    let status = replica
        .client
        .refund(refund_request(&failed))
        .await
        .expect_err("nothing to refund");
    check_status(&status, Code::FailedPrecondition, "NOT_RECEIVED");
    let paid = replica
        .client
        .pay(order.pay_by_card(cards::VISA))
        .await
        .expect("paid");
    let mut stranger = refund_request(&paid);
    stranger.user_id = id();
    let status = replica.client.refund(stranger).await.expect_err("someone else's");
    check_status(&status, Code::NotFound, "PAYMENT_NOT_FOUND");
    replica
        .client
        .refund(refund_request(&paid))
        .await
        .expect("refunded");
    let status = replica
        .client
        .pay(order.pay_by_card(cards::VISA))
        .await
        .expect_err("refunded");
    check_status(&status, Code::FailedPrecondition, "PAYMENT_REFUNDED");
    assert_eq!(stage.ledger(&order).await, (1, 1));
    stage.is_right().await;
    replica.stop().await;
}

/// A client that goes away stops nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_payment_outlives_its_client() {
    let mut stage = Stage::new().await;
    let gate = Gate::before(&stage.sandbox.http_url().expect("serving")).await;
    stage.through(gate.url.clone());
    let replica = stage.replica().await;
    let order = stage.known_order().await;
    let held = gate.hold(Call::Create, At::BeforeProvider);
    let client = replica.client.clone();
    let request = order.pay_by_card(cards::VISA);
    let call = tokio::spawn(async move { client.pay(request).await });
    held.arrived().await;
    call.abort();
    held.release();
    stage.until_payments(&order, &["received"]).await;
    assert_eq!(gate.count(Call::Create), 1, "whoever began it went on");
    stage.is_right().await;
    replica.stop().await;
}
