//! GetOrderView: one's own writes, from any replica.

use std::time::Duration;

use contracts::shop::order::v1::OrderStatus;
use contracts::shop::orderquery::v1 as wire;
use local_stack::testing::{self, Folder};
use local_stack::wait;
use tonic::Code;
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::stage::{
    LIMIT, Replica, Stage, assert_bad_field, assert_refused, at, cancelled, completed, confirmed, overdue,
    paid, placed, reserved, shipped, status_of,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_view_follows_every_event_of_its_order() {
    let stage = Stage::new().await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    let replica = stage.replica().await;
    let way = [
        (placed(user, 1), OrderStatus::Pending),
        (reserved(), OrderStatus::Pending),
        (overdue(), OrderStatus::Pending),
        (paid(Uuid::now_v7()), OrderStatus::Paid),
        (confirmed(), OrderStatus::Confirmed),
        (("order.of.the.future", b"\xff".to_vec()), OrderStatus::Confirmed),
        (shipped(), OrderStatus::Shipped),
        (completed(), OrderStatus::Delivered),
    ];
    for (version, (event, status)) in (1..).zip(way) {
        stage.publish(order, version, event).await;
        let view = replica.view(user, order, version).await.unwrap();
        assert_eq!((view.version, status_of(&view)), (version, status));
        assert_eq!(view.updated_at.unwrap().seconds, at(version).timestamp());
    }
    let view = replica.view(user, order, 0).await.unwrap();
    assert_eq!(
        (view.order_id, view.user_id),
        (order.to_string(), user.to_string())
    );
    assert_eq!(
        (view.tracking_number.as_str(), view.carrier.as_str()),
        ("T-1", "DHL")
    );
    assert_eq!(
        (
            view.items.len(),
            view.items[0].quantity,
            view.items[0].unit_price_minor_units
        ),
        (1, 3, 250)
    );
    assert_eq!(view.total.unwrap().minor_units, 750);
    assert_eq!(view.placed_at.unwrap().seconds, at(1).timestamp());
    assert_eq!(view.pay_by.unwrap().seconds, at(901).timestamp());
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_replica_waits_for_a_version_whoever_applies_it() {
    let stage = Stage::new().await;
    let [a, b] = stage.two_replicas().await;
    // Orders on all partitions, so that each replica waits for what the other one applies.
    let user = Uuid::now_v7();
    let orders: Vec<Uuid> = (0..12).map(|_| Uuid::now_v7()).collect();
    let waiting = |replica: &'static str| {
        orders
            .iter()
            .map(move |order| (replica, *order))
            .collect::<Vec<_>>()
    };
    let asked: Vec<_> = waiting("a").into_iter().chain(waiting("b")).collect();
    let answers = async {
        let calls = asked.iter().map(|(name, order)| {
            let replica = if *name == "a" { &a } else { &b };
            replica.view(user, *order, 2)
        });
        futures::future::join_all(calls).await
    };
    let publishing = async {
        // All of them wait, for orders that are not even there.
        a.has_waiting(12).await;
        b.has_waiting(12).await;
        for order in &orders {
            stage.publish(*order, 1, placed(user, 1)).await;
        }
        for order in &orders {
            stage.publish(*order, 2, cancelled()).await;
        }
    };
    let (answers, ()) = tokio::join!(answers, publishing);
    for answer in answers {
        let view = answer.unwrap();
        assert_eq!((view.version, status_of(&view)), (2, OrderStatus::Cancelled));
        assert_eq!(view.cancel_reason, "too slow");
    }
    a.has_waiting(0).await;
    b.has_waiting(0).await;
    a.stop().await;
    // The one that is left takes over.
    let order = Uuid::now_v7();
    stage.publish(order, 1, placed(user, 2)).await;
    b.view(user, order, 1).await.unwrap();
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_does_not_come_is_answered_at_the_deadline() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    stage.publish(order, 1, placed(user, 1)).await;
    replica.view(user, order, 1).await.unwrap();
    let soon = Duration::from_millis(700);
    for (asks, asked, version) in [
        ("too high", (user, order), 2),
        ("far too high", (user, order), i64::MAX),
        ("unknown", (user, Uuid::now_v7()), 1),
        // Exactly as if it were unknown.
        ("someone else's", (Uuid::now_v7(), order), 1),
    ] {
        let answer = replica.view_within(asked.0, asked.1, version, soon).await;
        let status = assert_refused(answer, Code::DeadlineExceeded, "VERSION_NOT_REACHED");
        assert!(status.get_details_retry_info().is_some(), "{asks}");
    }
    assert_refused(
        replica.view(user, Uuid::now_v7(), 0).await,
        Code::NotFound,
        "ORDER_NOT_FOUND",
    );
    assert_refused(
        replica.view(Uuid::now_v7(), order, 0).await,
        Code::NotFound,
        "ORDER_NOT_FOUND",
    );
    replica.has_waiting(0).await;
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_is_bounded_and_ends_at_shutdown() {
    let stage = Stage::new().await;
    let replica = stage.replica_with("queries.max_waiting = 1").await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    let first = replica.view(user, order, 1);
    let rest = async {
        replica.has_waiting(1).await;
        assert_refused(
            replica.view(user, order, 1).await,
            Code::ResourceExhausted,
            "TOO_MANY_WAITING",
        );
        replica.begin_stop();
    };
    let (first, ()) = tokio::join!(first, rest);
    let status = assert_refused(first, Code::Unavailable, "STOPPING");
    assert!(status.get_details_retry_info().is_some());
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_names_its_field_and_the_server_still_serves() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let good = Uuid::now_v7().to_string();
    for bad in [
        "",
        "nil",
        "\0",
        &Uuid::nil().to_string(),
        &"a".repeat(10_000),
        &good.replace('-', ""),
    ] {
        let get = |user_id: &str, order_id: &str, at_least_version| {
            let request = wire::GetOrderViewRequest {
                user_id: user_id.to_owned(),
                order_id: order_id.to_owned(),
                at_least_version,
            };
            let mut client = replica.client.clone();
            async move { client.get_order_view(request).await }
        };
        assert_bad_field(get(bad, &good, 0).await, "user_id");
        assert_bad_field(get(&good, bad, 0).await, "order_id");
        assert_bad_field(get(&good, &good, -1).await, "at_least_version");
        let list = wire::ListOrdersRequest {
            user_id: bad.to_owned(),
            ..Default::default()
        };
        assert_bad_field(replica.list(list).await, "user_id");
        if !bad.is_empty() {
            let page_token = bad.to_owned();
            let list = wire::ListOrdersRequest {
                user_id: good.clone(),
                page_token,
                ..Default::default()
            };
            assert_bad_field(replica.list(list).await, "page_token");
        }
        let watch = |user_id: &str, order_id: &str| {
            let request = wire::WatchOrderRequest {
                user_id: user_id.to_owned(),
                order_id: order_id.to_owned(),
            };
            let mut client = replica.client.clone();
            async move { client.watch_order(request).await.map(|_| ()) }
        };
        assert_bad_field(watch(bad, &good).await, "user_id");
        assert_bad_field(watch(&good, bad).await, "order_id");
    }
    let list = |status, page_size| wire::ListOrdersRequest {
        user_id: good.clone(),
        status,
        page_size,
        page_token: String::new(),
    };
    assert_bad_field(replica.list(list(99, 0)).await, "status");
    assert_bad_field(replica.list(list(-1, 0)).await, "status");
    assert_bad_field(replica.list(list(0, -1)).await, "page_size");
    let oversized = wire::ListOrdersRequest {
        page_token: "A".repeat(1 << 20),
        ..list(0, 0)
    };
    let refused = replica.list(oversized).await.expect_err("too large");
    assert!(
        matches!(refused.code(), Code::OutOfRange | Code::ResourceExhausted),
        "{refused:?}"
    );
    assert_eq!(replica.list(list(0, i32::MAX)).await.unwrap().orders, []);
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_down_is_unavailable_and_comes_back_without_a_restart() {
    let folder = Folder::create("order-query-outage");
    let mut postgres = testing::private_postgres(&folder).await.unwrap();
    let stage = Stage::on(&postgres.url("postgres")).await;
    let replica = stage.replica().await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    stage.publish(order, 1, placed(user, 1)).await;
    replica.view(user, order, 1).await.unwrap();
    postgres.kill().unwrap();
    let status = replica.view(user, order, 0).await.expect_err("down");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.get_details_retry_info().is_some());
    stage.publish(order, 2, cancelled()).await;
    replica.readiness(503, "database").await;
    postgres.start().await.unwrap();
    let view = again(&replica, user, order, 2).await;
    assert_eq!(status_of(&view), OrderStatus::Cancelled);
    replica.readiness(200, "ok").await;
    replica.stop().await;
    drop(stage);
    drop(postgres);
}

/// Asks until it is answered, as a client does that is told to retry.
async fn again(replica: &Replica, user: Uuid, order: Uuid, version: i64) -> wire::OrderView {
    wait::until("an answer", LIMIT, || async {
        match replica
            .view_within(user, order, version, Duration::from_secs(5))
            .await
        {
            Ok(view) => Ok(Some(view)),
            Err(status) if matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded) => Ok(None),
            Err(status) => Err(anyhow::Error::from(status)),
        }
    })
    .await
    .unwrap()
}
