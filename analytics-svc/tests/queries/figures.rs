//! Figures under load, late and repeated events, kills and restarts: always those of the whole.

use std::collections::HashMap;
use std::sync::Arc;

use chrono::TimeDelta;
use contracts::shop::analytics::events::v1::WindowSize;
use local_stack::testing::{Folder, Process};

use crate::shop::{Event, Fate, Story, at, figures_of, publish};
use crate::stage::{Replica, Stage, span};

const SIZES: [WindowSize; 3] = [WindowSize::Minute, WindowSize::Hour, WindowSize::Day];

/// Requires the figures of all windows of these stories from this replica.
async fn assert_figures(replica: &Replica, stories: &[Story]) {
    for size in SIZES {
        let expected = figures_of(stories, size);
        let (start, windows) = match size {
            WindowSize::Minute => (at(-900), TimeDelta::minutes(1_500)),
            _ => (at(-86_400), TimeDelta::days(60)),
        };
        let request = span(size, start, start + windows);
        let answer = replica.summary(request).await.unwrap();
        assert_eq!(answer.windows.len(), expected.len(), "{size:?}");
        for (found, expected) in answer.windows.iter().zip(&expected) {
            assert_eq!(found, expected, "{size:?}");
        }
        let total = answer.total.unwrap();
        for figures in total.figures {
            let of = |windows: &[contracts::shop::analytics::v1::SalesWindow]| {
                let all = windows.iter().flat_map(|window| &window.figures);
                all.filter(|other| other.currency_code == figures.currency_code)
                    .map(|other| (other.orders_placed, other.revenue_minor_units))
                    .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
            };
            let sums = (figures.orders_placed, figures.revenue_minor_units);
            assert_eq!(sums, of(&expected), "{size:?}");
        }
    }
}

/// Requires that events told of every window, versions without gaps, nothing twice in a row, and the last of each as it is.
async fn assert_told(stage: &Stage, stories: &[Story]) {
    stage.all_told().await;
    let mut last = HashMap::new();
    for (entity, version, figures) in stage.told().await {
        let before = last.insert(entity.clone(), (version, figures.clone()));
        let (before, told) = before.unwrap_or_default();
        assert_eq!(version, before + 1, "{entity}");
        assert_ne!(figures, told, "{entity}");
    }
    let mut windows = 0;
    for size in SIZES {
        for window in figures_of(stories, size) {
            let start = contracts::wire::time(window.window_start.as_ref()).unwrap();
            let name = size
                .as_str_name()
                .trim_start_matches("WINDOW_SIZE_")
                .to_lowercase();
            let entity = format!("{name}/{}", start.format("%Y-%m-%dT%H:%M:%SZ"));
            assert_eq!(last[&entity].1, window.figures, "{entity}");
            windows += 1;
        }
    }
    assert_eq!(last.len(), windows);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_under_load_give_the_figures_of_the_whole_although_they_are_killed() {
    let stage = Arc::new(Stage::new().await);
    let stories: Arc<Vec<Story>> = Arc::new((0..600).map(Story::numbered).collect());
    let folder = Folder::create("analytics-kill");
    let start = async |instance: &str| {
        let mut builder = Process::builder("analytics-svc", folder.path()).instance(instance);
        for (key, value) in stage.settings() {
            builder = builder.set(key, value);
        }
        let builder = builder
            .set("events.interval", "20ms")
            .set("service.instance", instance)
            .set("consumer.batch_records", "20");
        builder.start().await.unwrap()
    };
    let mut processes = [start("one").await, start("two").await];
    for process in &mut processes {
        process.ready().await.unwrap();
    }
    let publishing = tokio::spawn({
        let (stage, stories) = (Arc::clone(&stage), Arc::clone(&stories));
        async move { publish(&stage, &stories).await }
    });
    // Each of them dies amid the load, the one after the other.
    for (number, marks) in [300, 700, 1_100].into_iter().enumerate() {
        local_stack::wait::until("some of it to be applied", crate::stage::LIMIT, || async {
            let rows = stage.rows("SELECT count(*)::text FROM consumer_marks").await;
            Ok((rows[0].parse::<i64>()? >= marks).then_some(()))
        })
        .await
        .unwrap();
        let process = &mut processes[number % 2];
        process.kill().unwrap();
        process.start().await.unwrap();
    }
    let published = publishing.await.unwrap();
    stage.applied(published).await;
    let replica = stage.replica().await;
    assert_figures(&replica, &stories).await;
    assert_told(&stage, &stories).await;
    assert_eq!(
        stage.rows("SELECT count(*)::text FROM parked_records").await,
        ["0"]
    );
    replica.stop().await;
    for process in &mut processes {
        process.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn money_may_come_before_its_order_and_everything_may_come_late() {
    let stage = Stage::new().await;
    let replicas = stage.two_replicas().await;
    // Long ago, and heard of only now.
    let story = Story::new(at(-40_000_000), Fate::Returned);
    let window = span(
        WindowSize::Hour,
        story.placed_at - TimeDelta::hours(1),
        story.placed_at + TimeDelta::hours(1),
    );
    let mut versions = 0;
    let mut publish = async |(envelope, payload): &Event| {
        stage.publish(envelope, payload).await;
        versions += 1;
        stage.applied(versions).await;
    };
    let (history, payment) = (story.history(), story.payments().remove(0));
    for event in &payment {
        publish(event).await;
    }
    let empty = replicas[0].summary(window.clone()).await.unwrap();
    assert_eq!(empty.windows, [], "nothing was placed");
    for (event, (placed, confirmed, cancelled, sold)) in history.iter().zip([
        (1, 0, 0, 0),
        (1, 0, 0, 0),
        (1, 0, 0, 0),
        (1, 1, 0, 2),
        (1, 1, 1, 0),
    ]) {
        publish(event).await;
        for replica in &replicas {
            let answer = replica.summary(window.clone()).await.unwrap();
            let figures = &answer.windows[0].figures[0];
            let best: i64 = figures.best_sellers.iter().map(|best| best.quantity).sum();
            assert_eq!(
                (
                    figures.orders_placed,
                    figures.orders_confirmed,
                    figures.orders_cancelled,
                    best
                ),
                (placed, confirmed, cancelled, sold)
            );
            assert_eq!(
                (figures.revenue_minor_units, figures.refunded_minor_units),
                (0, 500)
            );
        }
    }
    assert_eq!(
        replicas[1].summary(window).await.unwrap().windows,
        figures_of(&[story], WindowSize::Hour)
    );
    for replica in replicas {
        replica.stop().await;
    }
}
