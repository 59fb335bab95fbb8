//! WatchSales: now, then every change, from window to window.

use analytics_svc::domain::{Size, Window};
use analytics_svc::feed::Feed;
use chrono::{DateTime, TimeDelta, Utc};
use contracts::shop::analytics::events::v1::{SalesFigures, WindowSize};
use contracts::shop::analytics::v1 as wire;
use futures::{FutureExt as _, StreamExt as _};
use tonic::{Code, Status, Streaming};

use crate::shop::{Event, Fate, Story, at};
use crate::stage::{LIMIT, Stage, assert_bad_fields, assert_refused};

async fn next(stream: &mut Streaming<wire::WatchSalesResponse>) -> Option<Result<wire::SalesWindow, Status>> {
    let answer = tokio::time::timeout(LIMIT, stream.next())
        .await
        .expect("an answer in time");
    answer.map(|answer| answer.map(|answer| answer.window.unwrap()))
}

async fn figures(stream: &mut Streaming<wire::WatchSalesResponse>) -> Vec<SalesFigures> {
    next(stream).await.unwrap().unwrap().figures
}

/// A moment of this day that is not about to end.
async fn today() -> DateTime<Utc> {
    loop {
        let now = Utc::now();
        let left = Window::of(Size::Day, now).start() + TimeDelta::days(1) - now;
        if left > TimeDelta::seconds(90) {
            return now;
        }
        tokio::time::sleep(left.to_std().unwrap()).await;
    }
}

async fn publish(stage: &Stage, (envelope, payload): &Event) {
    stage.publish(envelope, payload).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_is_seen_from_every_replica() {
    let stage = Stage::new().await;
    let replicas = stage.two_replicas().await;
    let now = today().await;
    let mut streams = Vec::new();
    for replica in &replicas {
        let mut stream = replica.watch(WindowSize::Day, "").await.unwrap();
        let first = next(&mut stream).await.unwrap().unwrap();
        assert_eq!(first.window_size, i32::from(WindowSize::Day));
        assert_eq!(
            contracts::wire::time(first.window_start.as_ref()).unwrap(),
            Window::of(Size::Day, now).start()
        );
        assert_eq!((first.figures.len(), first.conversion), (0, 0.0), "at once");
        streams.push(stream);
    }
    let story = Story::new(now, Fate::Returned);
    let (history, payment) = (story.history(), story.payments().remove(0));
    // One that changes nothing in between is not seen.
    let steps = [
        (vec![&history[0]], (1, 0, 0, 0)),
        (vec![&history[1], &payment[0]], (1, 0, 0, 500)),
        (vec![&history[2], &history[3]], (1, 1, 0, 500)),
        (vec![&history[4]], (1, 1, 1, 500)),
        (vec![&payment[1]], (1, 1, 1, 0)),
    ];
    for (events, expected) in steps {
        for event in events {
            publish(&stage, event).await;
        }
        for stream in &mut streams {
            let now = &figures(stream).await[0];
            let counts = (
                now.orders_placed,
                now.orders_confirmed,
                now.orders_cancelled,
                now.revenue_minor_units,
            );
            assert_eq!(counts, expected);
        }
    }
    for replica in replicas {
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_currency_is_no_news() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let now = today().await;
    let mut euros = replica.watch(WindowSize::Day, "EUR").await.unwrap();
    let mut all = replica.watch(WindowSize::Day, "").await.unwrap();
    assert_eq!(figures(&mut euros).await, []);
    assert_eq!(figures(&mut all).await, []);
    let yen = Story {
        currency: "JPY",
        ..Story::new(now, Fate::Pending)
    };
    publish(&stage, &yen.history()[0]).await;
    assert_eq!(figures(&mut all).await[0].currency_code, "JPY");
    publish(&stage, &Story::new(now, Fate::Pending).history()[0]).await;
    assert_eq!(figures(&mut all).await.len(), 2);
    let seen = figures(&mut euros).await;
    assert_eq!((seen.len(), seen[0].currency_code.as_str()), (1, "EUR"));
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_are_bounded_and_forgotten_when_they_leave() {
    let stage = Stage::new().await;
    let replica = stage.replica_with("queries.max_watching = 1").await;
    assert_bad_fields(
        replica.watch(WindowSize::Unspecified, "Euro").await,
        &["window_size", "currency_code"],
    );
    let mut stream = replica.watch(WindowSize::Minute, "").await.unwrap();
    next(&mut stream).await.unwrap().unwrap();
    replica.has_watching(1).await;
    assert_refused(
        replica.watch(WindowSize::Hour, "").await,
        Code::ResourceExhausted,
        "TOO_MANY_WATCHING",
    );
    drop(stream);
    replica.has_watching(0).await;
    let mut stream = replica.watch(WindowSize::Minute, "").await.unwrap();
    next(&mut stream).await.unwrap().unwrap();
    replica.begin_stop();
    let end = loop {
        // A minute may have ended.
        match next(&mut stream).await.unwrap() {
            Ok(_) => {}
            end => break end,
        }
    };
    assert_refused(end, Code::Unavailable, "STOPPING");
    drop(stream);
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_question_serves_all_and_the_next_window_follows() {
    let stage = Stage::new().await;
    let db = stage.db();
    let feed = Feed::new(1_000);
    let minute = at(0);
    stage
        .run("INSERT INTO sales_figures VALUES (1, '2026-03-01 23:45Z', 'EUR', 1, 0, 0, 0, 0)")
        .await;
    assert!(!feed.look(&db, minute).await.unwrap(), "nobody watches");
    let mut watchers: Vec<_> = (0..1_000).map(|_| feed.enter(Size::Minute).unwrap()).collect();
    for (second, figures) in [(5, 1), (60, 0)] {
        let now = minute + TimeDelta::seconds(second);
        assert!(feed.look(&db, now).await.unwrap());
        for watcher in &mut watchers {
            let seen = watcher.next().now_or_never().expect("it is there");
            assert_eq!(seen.window, Window::of(Size::Minute, now));
            assert_eq!(seen.figures.len(), figures);
        }
        // The same again is no news.
        assert!(feed.look(&db, now).await.unwrap());
        for watcher in &mut watchers {
            assert_eq!(watcher.changed().now_or_never(), None);
        }
    }
    // Whoever comes after a time without anybody gets nothing from before.
    drop(watchers);
    assert!(!feed.look(&db, minute).await.unwrap());
    let mut late = feed.enter(Size::Minute).unwrap();
    assert!(late.next().now_or_never().is_none());
    assert!(feed.look(&db, minute).await.unwrap());
    assert_eq!(late.next().await.figures.len(), 1);
}
