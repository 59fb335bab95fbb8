//! Payments in the views of their orders.

use contracts::shop::order::v1::OrderStatus;
use contracts::shop::orderquery::v1 as wire;
use contracts::shop::payment::events::v1::FailureReason;
use contracts::shop::payment::v1::PaymentStatus;
use futures::StreamExt as _;
use local_stack::wait;
use tonic::Streaming;
use uuid::Uuid;

use crate::stage::{
    LIMIT, Replica, Stage, at, cancelled, failed, paid, placed, received, refunded, status_of,
};

const DECLINED: i32 = FailureReason::Declined as i32;

/// The order, once its view shows payments at these versions.
async fn view_with(replica: &Replica, user: Uuid, order: Uuid, versions: &[i64]) -> wire::OrderView {
    wait::until("the payments", LIMIT, || async {
        let view = replica.view(user, order, 1).await?;
        Ok((versions_of(&view) == versions).then_some(view))
    })
    .await
    .unwrap()
}

fn versions_of(view: &wire::OrderView) -> Vec<i64> {
    view.payments.iter().map(|payment| payment.version).collect()
}

fn statuses_of(view: &wire::OrderView) -> Vec<PaymentStatus> {
    view.payments.iter().map(wire::PaymentView::status).collect()
}

async fn next(stream: &mut Streaming<wire::WatchOrderResponse>) -> Option<wire::OrderView> {
    let answer = tokio::time::timeout(LIMIT, stream.next())
        .await
        .expect("an answer in time");
    answer.map(|answer| answer.unwrap().order.unwrap())
}

/// The next answer that shows payments at these versions.
async fn next_with(stream: &mut Streaming<wire::WatchOrderResponse>, versions: &[i64]) -> wire::OrderView {
    loop {
        let view = next(stream).await.expect("not the end");
        if versions_of(&view) == versions {
            return view;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_shows_every_payment_oldest_first() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    // Made in this order, but it is what happened first that comes first.
    let [last, second, first] = [Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7()];
    stage.publish(order, 1, placed(user, 1)).await;
    let declined = failed(order, DECLINED, true);
    stage.publish_payment(second, 1, 20, declined.clone()).await;
    stage.publish_payment(first, 1, 10, declined).await;
    let view = view_with(&replica, user, order, &[1, 1]).await;
    let payment = &view.payments[0];
    assert_eq!(
        (payment.status(), payment.payment_id.as_str()),
        (PaymentStatus::Failed, &*first.to_string())
    );
    let failure = payment.failure.expect("a failure");
    assert_eq!(
        (failure.reason(), failure.another_try),
        (FailureReason::Declined, true)
    );
    assert_eq!((payment.brand.as_str(), payment.last_four.as_str()), ("", ""));

    stage.publish_payment(last, 1, 30, received(order)).await;
    let view = view_with(&replica, user, order, &[1, 1, 1]).await;
    let payment = &view.payments[2];
    assert_eq!(
        (payment.status(), payment.payment_id.as_str()),
        (PaymentStatus::Received, &*last.to_string())
    );
    assert_eq!(
        (payment.brand.as_str(), payment.last_four.as_str()),
        ("visa", "4242")
    );
    assert_eq!(payment.amount.as_ref().unwrap().minor_units, 750);
    assert_eq!(
        (payment.failure, status_of(&view)),
        (None, OrderStatus::Pending),
        "what order-svc makes of it comes by itself"
    );

    // Types of the future are passed over, as are reasons.
    let future = ("payment.of.the.future", b"\xff".to_vec());
    stage.publish_payment(last, 2, 40, future).await;
    stage.publish_payment(last, 3, 50, refunded(order)).await;
    let of_the_future = Uuid::now_v7();
    stage
        .publish_payment(of_the_future, 1, 60, failed(order, 1234, false))
        .await;
    let view = view_with(&replica, user, order, &[1, 1, 3, 1]).await;
    assert_eq!(
        statuses_of(&view)[2..],
        [PaymentStatus::Refunded, PaymentStatus::Failed]
    );
    assert_eq!(view.payments[2].updated_at.unwrap().seconds, at(50).timestamp());
    assert_eq!(view.payments[3].failure.unwrap().reason, 1234);
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happened_first_comes_first_also_when_all_of_it_comes_at_once() {
    let stage = Stage::new().await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    let [second, first] = [Uuid::now_v7(), Uuid::now_v7()];
    stage.publish(order, 1, placed(user, 1)).await;
    stage.publish_payment(first, 1, 10, received(order)).await;
    stage
        .publish_payment(second, 1, 20, failed(order, DECLINED, true))
        .await;
    stage.publish_payment(first, 2, 30, refunded(order)).await;
    // Only now, so that one batch has both events of the first.
    let replica = stage.replica().await;
    let view = view_with(&replica, user, order, &[2, 1]).await;
    assert_eq!(view.payments[0].payment_id, first.to_string());
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn payments_may_come_before_their_order() {
    let stage = Stage::new().await;
    let replicas = stage.two_replicas().await;
    let user = Uuid::now_v7();
    let orders: Vec<Uuid> = (0..12).map(|_| Uuid::now_v7()).collect();
    for order in &orders {
        let payment = Uuid::now_v7();
        stage.publish_payment(payment, 1, 1, received(*order)).await;
        stage.publish_payment(payment, 2, 2, refunded(*order)).await;
    }
    let sql = stage.database.connect().await.unwrap();
    wait::until("all payments", LIMIT, || async {
        let query = "SELECT count(*) FROM order_payments WHERE status = 3";
        let count: i64 = sql.query_one(query, &[]).await?.get(0);
        Ok((count == 12).then_some(()))
    })
    .await
    .unwrap();
    for order in &orders {
        stage.publish(*order, 1, placed(user, 1)).await;
    }
    for replica in &replicas {
        for order in &orders {
            let view = replica.view(user, *order, 1).await.unwrap();
            assert_eq!(statuses_of(&view), [PaymentStatus::Refunded]);
        }
    }
    for replica in replicas {
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_shows_the_payments_of_each_order() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let user = Uuid::now_v7();
    let orders: Vec<Uuid> = (0..5).map(|_| Uuid::now_v7()).collect();
    for (number, order) in (0..).zip(&orders) {
        stage.publish(*order, 1, placed(user, number)).await;
        for second in 0..number {
            let declined = failed(*order, DECLINED, true);
            stage.publish_payment(Uuid::now_v7(), 1, second, declined).await;
        }
    }
    for (number, order) in orders.iter().enumerate() {
        view_with(&replica, user, *order, &vec![1; number]).await;
    }
    let mut request = wire::ListOrdersRequest {
        user_id: user.to_string(),
        page_size: 2,
        ..Default::default()
    };
    let mut shown = Vec::new();
    loop {
        let page = replica.list(request.clone()).await.unwrap();
        shown.extend(page.orders);
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            break;
        }
    }
    let counts: Vec<usize> = shown.iter().map(|view| view.payments.len()).collect();
    assert_eq!(counts, [4, 3, 2, 1, 0]);
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_sees_payments_whichever_replica_applies_them() {
    let stage = Stage::new().await;
    let replicas = stage.two_replicas().await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    stage.publish(order, 1, placed(user, 1)).await;
    let mut streams = Vec::new();
    for replica in &replicas {
        replica.view(user, order, 1).await.unwrap();
        let mut stream = replica.watch(user, order).await.unwrap();
        assert!(next(&mut stream).await.unwrap().payments.is_empty());
        streams.push(stream);
    }
    let mut versions = Vec::new();
    for second in 0..8 {
        let declined = failed(order, DECLINED, true);
        stage.publish_payment(Uuid::now_v7(), 1, second, declined).await;
        versions.push(1);
        for stream in &mut streams {
            let view = next(stream).await.unwrap();
            assert_eq!((view.version, versions_of(&view)), (1, versions.clone()));
        }
    }
    let payment = Uuid::now_v7();
    stage.publish_payment(payment, 1, 10, received(order)).await;
    versions.push(1);
    for stream in &mut streams {
        assert_eq!(versions_of(&next(stream).await.unwrap()), versions);
    }
    stage.publish(order, 2, paid(payment)).await;
    for stream in &mut streams {
        assert_eq!(status_of(&next(stream).await.unwrap()), OrderStatus::Paid);
    }
    drop(streams);
    for replica in replicas {
        replica.has_waiting(0).await;
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_order_is_watched_until_its_money_is_back() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let user = Uuid::now_v7();

    // Nobody paid, or nobody any more: it ends with the cancellation.
    let order = Uuid::now_v7();
    stage.publish(order, 1, placed(user, 1)).await;
    replica.view(user, order, 1).await.unwrap();
    let mut stream = replica.watch(user, order).await.unwrap();
    stage
        .publish_payment(Uuid::now_v7(), 1, 1, failed(order, DECLINED, false))
        .await;
    next_with(&mut stream, &[1]).await;
    stage.publish(order, 2, cancelled()).await;
    assert_eq!(
        status_of(&next(&mut stream).await.unwrap()),
        OrderStatus::Cancelled
    );
    assert!(next(&mut stream).await.is_none());

    // It was paid, which is not even known here from the payment itself.
    let (order, payment) = (Uuid::now_v7(), Uuid::now_v7());
    stage.publish(order, 1, placed(user, 1)).await;
    stage.publish(order, 2, paid(payment)).await;
    stage.publish(order, 3, cancelled()).await;
    replica.view(user, order, 3).await.unwrap();
    let mut stream = replica.watch(user, order).await.unwrap();
    let view = next(&mut stream).await.unwrap();
    assert_eq!(
        (status_of(&view), versions_of(&view)),
        (OrderStatus::Cancelled, vec![])
    );
    stage.publish_payment(payment, 1, 1, received(order)).await;
    assert_eq!(
        statuses_of(&next(&mut stream).await.unwrap()),
        [PaymentStatus::Received]
    );
    stage.publish_payment(payment, 2, 2, refunded(order)).await;
    assert_eq!(
        statuses_of(&next(&mut stream).await.unwrap()),
        [PaymentStatus::Refunded]
    );
    assert!(next(&mut stream).await.is_none());
    replica.has_waiting(0).await;

    // Money that came too late to pay the order: known before the cancellation is, it is waited for.
    let (order, payment) = (Uuid::now_v7(), Uuid::now_v7());
    stage.publish(order, 1, placed(user, 1)).await;
    stage.publish_payment(payment, 1, 1, received(order)).await;
    view_with(&replica, user, order, &[1]).await;
    let mut stream = replica.watch(user, order).await.unwrap();
    next(&mut stream).await.unwrap();
    stage.publish(order, 2, cancelled()).await;
    assert_eq!(
        status_of(&next(&mut stream).await.unwrap()),
        OrderStatus::Cancelled
    );
    stage.publish_payment(payment, 2, 2, refunded(order)).await;
    next_with(&mut stream, &[2]).await;
    assert!(next(&mut stream).await.is_none());
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payment_that_cannot_be_understood_is_parked_alone() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    let garbage = (received(order).0, vec![0xff]);
    stage.publish_payment(Uuid::now_v7(), 1, 1, garbage).await;
    wait::until("it to be parked", LIMIT, || async {
        let errors = stage.rows("SELECT error FROM parked_records").await;
        Ok(errors
            .iter()
            .any(|error| error.contains("the payload is not what its type says"))
            .then_some(()))
    })
    .await
    .unwrap();
    replica.readiness(200, "ok").await;
    stage.publish(order, 1, placed(user, 1)).await;
    replica.view(user, order, 1).await.unwrap();
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn payments_of_orders_are_looked_up_by_an_index() {
    let stage = Stage::new().await;
    let client = stage.database.connect().await.unwrap();
    client
        .batch_execute(
            "INSERT INTO order_payments \
             SELECT gen_random_uuid(), ('00000000-0000-0000-0000-' || lpad((n / 2)::text, 12, '0'))::uuid, \
                    1, 1, 'EUR', 'visa', '4242', NULL, NULL, 1, now(), now() \
             FROM generate_series(1, 40000) n; \
             INSERT INTO order_views \
             SELECT ('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid, gen_random_uuid(), \
                    1, '[]', 1, 'EUR', 1, now(), now(), NULL, '', '', '', NULL \
             FROM generate_series(1, 20000) n; \
             ANALYZE order_payments, order_views;",
        )
        .await
        .unwrap();
    let orders = "ARRAY(SELECT ('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid FROM generate_series(1, 50) n)";
    for (what, statement) in [
        (
            "a page",
            format!(
                "SELECT * FROM order_payments WHERE order_id = ANY({orders}) ORDER BY first_event_at, payment_id"
            ),
        ),
        (
            "those that are awaited",
            format!(
                "SELECT order_id, order_version, coalesce((SELECT sum(version)::bigint FROM order_payments p \
                 WHERE p.order_id = v.order_id), 0) FROM order_views v WHERE order_id = ANY({orders})"
            ),
        ),
    ] {
        let rows = client.query(&format!("EXPLAIN {statement}"), &[]).await.unwrap();
        let plan: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let plan = plan.join("\n");
        assert!(plan.contains("order_payments_by_order"), "{what}: {plan}");
        assert!(!plan.contains("Seq Scan"), "{what}: {plan}");
    }
}
