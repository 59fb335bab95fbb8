//! The provider killed, frozen, or not letting us in: payments wait, and are settled when it is back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::*;
use local_stack::cards;
use local_stack::process::http_get;
use local_stack::wait;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

#[tokio::test(flavor = "multi_thread")]
async fn the_provider_is_killed_and_frozen() {
    let mut stage = Stage::new().await;
    let replica = stage.replica().await;
    for freeze in [false, true] {
        let mut orders = Vec::new();
        // Methods are kept before, so that payments can begin while the provider is away.
        for _ in 0..5 {
            let order = Order::new();
            let method = replica.client.method(order.user, cards::VISA).await;
            orders.push((order, method));
        }
        if freeze {
            stage.sandbox.pause().expect("frozen");
        } else {
            stage.sandbox.kill().expect("killed");
        }
        for (order, method) in &orders {
            stage.publish_placed(order, Some(method)).await;
            stage.publish_reserved(order, 2).await;
        }
        // Somebody pays by himself: pending, and no error.
        let (order, method) = &orders[0];
        stage.until_payments(order, &["pending"]).await;
        let by_hand = order.pay(
            contracts::shop::payment::v1::process_payment_request::Method::PaymentMethodId(method.clone()),
        );
        let status = replica.client.pay(by_hand).await.expect_err("under way");
        check_status(&status, tonic::Code::FailedPrecondition, "PAYMENT_IN_PROGRESS");
        let other = stage.known_order().await;
        let status = replica
            .client
            .pay_within(other.pay_by_card(cards::VISA), Duration::from_secs(5))
            .await
            .expect_err("no provider");
        check_status(&status, tonic::Code::Unavailable, "PROVIDER_UNAVAILABLE");
        for (order, _) in &orders {
            let tried = "SELECT delays > 1 FROM payments WHERE order_id = $1";
            stage.until("it was tried", tried, order.id).await;
        }
        if freeze {
            stage.sandbox.resume().expect("resumed");
        } else {
            stage.sandbox.start().await.expect("started again");
        }
        for (order, _) in &orders {
            stage.until_payments(order, &["received"]).await;
            assert_eq!(stage.ledger(order).await, (1, 0), "freeze: {freeze}");
        }
    }
    stage.is_right().await;
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_not_accepted_fails_no_payment() {
    let stage = Stage::new().await;
    let outside = stage
        .replica_with(&[("provider.secret_key", "sk_test_wrong")])
        .await;
    let inside = stage.replica().await;
    let order = stage.known_order().await;
    let method = inside.client.method(order.user, cards::VISA).await;
    inside.stop().await;
    let request =
        order.pay(contracts::shop::payment::v1::process_payment_request::Method::PaymentMethodId(method));
    let pending = outside
        .client
        .pay_within(request, Duration::from_secs(1))
        .await
        .expect("an answer");
    assert_eq!(pending.status(), PaymentStatus::Pending);
    wait::until("readiness tells", LIMIT, || async {
        let (status, body) = http_get(outside.admin, "/readyz").await?;
        Ok((status == 503 && body.contains("provider")).then_some(()))
    })
    .await
    .expect("not ready");
    outside.stop().await;
    let inside = stage.replica().await;
    stage.until_payments(&order, &["received"]).await;
    stage.is_right().await;
    inside.stop().await;
}

/// A replica that is not ready gets no calls, so it has to find out by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_lets_us_in_again_is_noticed_without_a_call() {
    let open = Arc::new(AtomicBool::new(false));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("listening"));
    let door = tokio::spawn(serve_door(listener, Arc::clone(&open)));
    let stage = Stage::new().await;
    let replica = stage.replica_with(&[("provider.base_url", &url)]).await;
    let order = Order::new();
    let refused = replica.client.try_method(order.user, cards::VISA).await;
    check_status(
        &refused.expect_err("shut out"),
        tonic::Code::Unavailable,
        "PROVIDER_UNAVAILABLE",
    );
    for (what, status) in [("it is not ready", 503), ("it is ready again", 200)] {
        wait::until(what, LIMIT, || async {
            let (found, _) = http_get(replica.admin, "/readyz").await?;
            Ok((found == status).then_some(()))
        })
        .await
        .expect(what);
        open.store(true, Ordering::Relaxed);
    }
    replica.stop().await;
    door.abort();
}

/// A provider with no charges, which refuses every request until it is open.
async fn serve_door(listener: TcpListener, open: Arc<AtomicBool>) {
    loop {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let mut request = vec![0; 64 << 10];
        let _ = stream.read(&mut request).await;
        let (status, body) = if open.load(Ordering::Relaxed) {
            ("200 OK", r#"{"object":"list","data":[],"has_more":false}"#)
        } else {
            ("403 Forbidden", r#"{"error":{"type":"invalid_request_error"}}"#)
        };
        let length = body.len();
        let answer =
            format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
        let _ = stream.write_all(answer.as_bytes()).await;
    }
}

/// Metrics say what is going on.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_pending_shows() {
    let mut stage = Stage::new().await;
    let replica = stage.replica().await;
    let order = stage.known_order().await;
    let method = replica.client.method(order.user, cards::VISA).await;
    stage.sandbox.kill().expect("killed");
    let other = Order {
        id: uuid::Uuid::new_v4(),
        ..order
    };
    stage.publish_placed(&other, Some(&method)).await;
    stage.publish_reserved(&other, 2).await;
    let shows = async |what: &'static str, holds: fn(&str) -> bool| {
        wait::until(what, LIMIT, || async {
            let (_, metrics) = http_get(replica.admin, "/metrics").await?;
            Ok(metrics.lines().any(holds).then_some(()))
        })
        .await
        .expect(what);
    };
    shows("one is pending", |line| line == "payments_pending 1").await;
    shows("its age grows", |line| {
        line.strip_prefix("oldest_pending_age_seconds ")
            .is_some_and(|age| age.parse::<f64>().is_ok_and(|age| age > 0.0))
    })
    .await;
    stage.sandbox.start().await.expect("started again");
    shows("none is pending", |line| line == "payments_pending 0").await;
    shows("one was received", |line| {
        line == "payments_total{status=\"received\"} 1"
    })
    .await;
    replica.stop().await;
}

/// A process that is asked to stop does not wait for a provider that does not answer; the next one goes on.
#[tokio::test(flavor = "multi_thread")]
async fn stopping_does_not_wait_for_the_provider() {
    let mut stage = Stage::new().await;
    let replica = stage.replica().await;
    let order = Order::new();
    let method = replica.client.method(order.user, cards::VISA).await;
    stage.sandbox.pause().expect("frozen");
    stage.publish_placed(&order, Some(&method)).await;
    stage.publish_reserved(&order, 2).await;
    let tried = "SELECT delays > 0 FROM payments WHERE order_id = $1";
    stage.until("it was tried", tried, order.id).await;
    let begun = std::time::Instant::now();
    replica.stop().await;
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    stage.sandbox.resume().expect("resumed");
    let replica = stage.replica().await;
    stage.until_payments(&order, &["received"]).await;
    assert_eq!(stage.ledger(&order).await, (1, 0));
    stage.is_right().await;
    replica.stop().await;
}
