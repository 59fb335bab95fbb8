//! WatchOrder: now, then every change, to the end.

use contracts::shop::order::v1::OrderStatus;
use contracts::shop::orderquery::v1 as wire;
use futures::StreamExt as _;
use tonic::{Code, Status, Streaming};
use uuid::Uuid;

use crate::stage::{
    LIMIT, Stage, assert_refused, cancelled, completed, confirmed, overdue, paid, placed, reserved, shipped,
    status_of,
};

async fn next(stream: &mut Streaming<wire::WatchOrderResponse>) -> Option<Result<wire::OrderView, Status>> {
    let answer = tokio::time::timeout(LIMIT, stream.next())
        .await
        .expect("an answer in time");
    answer.map(|answer| answer.map(|answer| answer.order.unwrap()))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_is_seen_from_every_replica_until_the_end() {
    let stage = Stage::new().await;
    let replicas = stage.two_replicas().await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    stage.publish(order, 1, placed(user, 1)).await;
    let mut streams = Vec::new();
    for replica in &replicas {
        replica.view(user, order, 1).await.unwrap();
        let mut stream = replica.watch(user, order).await.unwrap();
        assert_eq!(next(&mut stream).await.unwrap().unwrap().version, 1, "at once");
        streams.push(stream);
    }
    let way = [
        reserved(),
        overdue(),
        paid(Uuid::now_v7()),
        confirmed(),
        shipped(),
        completed(),
    ];
    for (version, event) in (2..).zip(way) {
        stage.publish(order, version, event).await;
        for stream in &mut streams {
            assert_eq!(next(stream).await.unwrap().unwrap().version, version);
        }
    }
    for stream in &mut streams {
        assert!(next(stream).await.is_none(), "delivered is the end");
    }
    // Watching it later shows the end and ends.
    let mut late = replicas[0].watch(user, order).await.unwrap();
    assert_eq!(
        status_of(&next(&mut late).await.unwrap().unwrap()),
        OrderStatus::Delivered
    );
    assert!(next(&mut late).await.is_none());
    for replica in replicas {
        replica.has_waiting(0).await;
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_that_does_not_read_gets_the_latest_state() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    stage.publish(order, 1, placed(user, 1)).await;
    replica.view(user, order, 1).await.unwrap();
    let mut stream = replica.watch(user, order).await.unwrap();
    stage.publish(order, 2, reserved()).await;
    stage.publish(order, 3, cancelled()).await;
    replica.view(user, order, 3).await.unwrap();
    let mut versions = Vec::new();
    while let Some(view) = next(&mut stream).await {
        versions.push(view.unwrap().version);
    }
    assert!(versions.is_sorted_by(|a, b| a < b), "{versions:?}");
    assert_eq!(versions.last(), Some(&3));
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_that_leaves_is_forgotten() {
    let stage = Stage::new().await;
    let replica = stage.replica_with("queries.max_waiting = 1").await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    stage.publish(order, 1, placed(user, 1)).await;
    replica.view(user, order, 1).await.unwrap();
    let mut stream = replica.watch(user, order).await.unwrap();
    next(&mut stream).await.unwrap().unwrap();
    replica.has_waiting(1).await;
    assert_refused(
        replica.watch(user, order).await,
        Code::ResourceExhausted,
        "TOO_MANY_WAITING",
    );
    drop(stream);
    replica.has_waiting(0).await;
    let mut stream = replica.watch(user, order).await.unwrap();
    next(&mut stream).await.unwrap().unwrap();
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_and_someone_elses_orders_are_not_found() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    stage.publish(order, 1, placed(user, 1)).await;
    replica.view(user, order, 1).await.unwrap();
    assert_refused(
        replica.watch(user, Uuid::now_v7()).await,
        Code::NotFound,
        "ORDER_NOT_FOUND",
    );
    assert_refused(
        replica.watch(Uuid::now_v7(), order).await,
        Code::NotFound,
        "ORDER_NOT_FOUND",
    );
    replica.has_waiting(0).await;
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_unavailable_when_its_replica_stops() {
    let stage = Stage::new().await;
    let [a, b] = stage.two_replicas().await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    stage.publish(order, 1, placed(user, 1)).await;
    a.view(user, order, 1).await.unwrap();
    let mut stream = a.watch(user, order).await.unwrap();
    next(&mut stream).await.unwrap().unwrap();
    a.begin_stop();
    assert_refused(next(&mut stream).await.unwrap(), Code::Unavailable, "STOPPING");
    a.stop().await;
    // The client goes on at the other one.
    let mut stream = b.watch(user, order).await.unwrap();
    assert_eq!(next(&mut stream).await.unwrap().unwrap().version, 1);
    stage.publish(order, 2, cancelled()).await;
    assert_eq!(
        status_of(&next(&mut stream).await.unwrap().unwrap()),
        OrderStatus::Cancelled
    );
    assert!(next(&mut stream).await.is_none());
    b.stop().await;
}
