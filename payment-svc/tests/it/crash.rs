//! kill -9 between any two steps: what was begun is brought to its end by whoever comes next, without a client.

use std::time::Duration;

use crate::common::*;
use local_stack::cards;
use local_stack::testing::Process;
use payment_svc::failpoints as points;

async fn start(stage: &Stage, instance: &str, failpoint: Option<&str>) -> Process {
    let failpoints = failpoint
        .map(|point| format!("{point}=return"))
        .unwrap_or_default();
    stage
        .process(instance)
        .env("FAILPOINTS", failpoints)
        .start()
        .await
        .expect("started")
}

fn client(process: &Process) -> Client {
    Client::new(&process.grpc_url().expect("listening"))
}

/// It ends as if killed, at the point.
async fn dies(process: &mut Process, point: &str) {
    let status = process
        .wait(LIMIT)
        .await
        .unwrap_or_else(|error| panic!("{point}: {error:#}"));
    assert!(!status.success(), "{point}: {status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_paying() {
    let stage = Stage::new().await;
    for point in [
        points::PAYMENT_STORED,
        points::BEFORE_CREATE,
        points::AFTER_CREATE,
        points::INTENT_STORED,
        points::BEFORE_CONFIRM,
        points::AFTER_CONFIRM,
        points::OUTCOME_STORED,
    ] {
        let order = stage.known_order().await;
        let request = order.pay_by_card(cards::VISA);
        let mut killed = start(&stage, "killed", Some(point)).await;
        client(&killed).pay(request.clone()).await.expect_err(point);
        dies(&mut killed, point).await;
        let mut next = start(&stage, "next", None).await;
        stage.until_payments(&order, &["received"]).await;
        assert_eq!(stage.ledger(&order).await, (1, 0), "{point}");
        assert_eq!(stage.events(&order).await, ["payment.received 1"], "{point}");

        // The client finds out by asking again.
        let payment = client(&next).pay(request).await.expect(point);
        assert_eq!(payment.status(), PaymentStatus::Received, "{point}");
        next.stop().await.expect("stopped");
    }
    stage.is_right().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_refunding() {
    let stage = Stage::new().await;
    for point in [
        points::REFUND_STORED,
        points::BEFORE_REFUND,
        points::AFTER_REFUND,
        points::REFUND_OUTCOME_STORED,
    ] {
        let order = stage.known_order().await;
        let mut killed = start(&stage, "killed", Some(point)).await;
        let payment = client(&killed)
            .pay(order.pay_by_card(cards::VISA))
            .await
            .expect("paid");
        let request = refund_request(&payment);
        client(&killed).refund(request.clone()).await.expect_err(point);
        dies(&mut killed, point).await;
        let mut next = start(&stage, "next", None).await;
        stage.until_payments(&order, &["refunded"]).await;
        assert_eq!(stage.ledger(&order).await, (1, 1), "{point}");
        assert_eq!(
            stage.events(&order).await,
            ["payment.received 1", "payment.refunded 2"],
            "{point}"
        );
        let payment = client(&next).refund(request).await.expect(point);
        assert_eq!(payment.status(), PaymentStatus::Refunded, "{point}");
        next.stop().await.expect("stopped");
    }
    stage.is_right().await;
}

/// An order that names its method, read by a process that dies before it has committed, and by one that dies while it charges.
#[tokio::test(flavor = "multi_thread")]
async fn killed_while_charging_what_was_ordered() {
    let stage = Stage::new().await;
    let order = Order::new();
    let mut process = start(&stage, "first", None).await;
    let method = client(&process).method(order.user, cards::VISA).await;
    process.stop().await.expect("stopped");
    stage.publish_placed(&order, Some(&method)).await;
    stage.publish_reserved(&order, 2).await;
    for point in [
        points::ORDERS_BEFORE_COMMIT,
        points::AFTER_CREATE,
        points::AFTER_CONFIRM,
    ] {
        let mut killed = start(&stage, "killed", Some(point)).await;
        dies(&mut killed, point).await;
    }
    let mut next = start(&stage, "next", None).await;
    stage.until_payments(&order, &["received"]).await;
    assert_eq!(stage.ledger(&order).await, (1, 0));

    // Cancelled then: the refund is begun by the event, and outlives its process too.
    next.stop().await.expect("stopped");
    stage.publish_cancelled(&order, 3).await;
    for point in [points::ORDERS_BEFORE_COMMIT, points::AFTER_REFUND] {
        let mut killed = start(&stage, "killed", Some(point)).await;
        dies(&mut killed, point).await;
    }
    let mut next = start(&stage, "next", None).await;
    stage.until_payments(&order, &["refunded"]).await;
    assert_eq!(stage.ledger(&order).await, (1, 1));
    next.stop().await.expect("stopped");
    stage.is_right().await;
}

/// Two replicas, one of which is killed again and again while orders are paid.
#[tokio::test(flavor = "multi_thread")]
async fn killed_again_and_again() {
    let stage = Stage::new().await;
    let mut killed = start(&stage, "killed", None).await;
    let mut steady = start(&stage, "steady", None).await;
    let (to_killed, to_steady) = (client(&killed), client(&steady));
    let mut orders = Vec::new();
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..40u64 {
        let order = stage.known_order().await;
        orders.push(order);
        let client = if number % 2 == 0 {
            to_killed.clone()
        } else {
            to_steady.clone()
        };
        let request = order.pay_by_card(&cards::fine(number));
        calls.spawn(async move {
            // Whatever the first answer was: the same request, until there is one.
            loop {
                match client.pay_within(request.clone(), Duration::from_secs(5)).await {
                    Ok(payment) if payment.status() == PaymentStatus::Received => return,
                    Ok(_) | Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        });
        if number % 10 == 9 {
            killed.kill().expect("killed");
            killed.start().await.expect("started again");
        }
    }
    tokio::time::timeout(LIMIT, calls.join_all())
        .await
        .expect("all are paid");
    for order in &orders {
        assert_eq!(stage.ledger(order).await, (1, 0));
    }
    for process in [&mut killed, &mut steady] {
        process.stop().await.expect("stopped");
    }
    stage.is_right().await;
}
