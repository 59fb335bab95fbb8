//! The figures built anew beside the live ones.

use std::collections::HashMap;
use std::sync::Arc;

use analytics_svc::projection::Projection;
use analytics_svc::store;
use chrono::TimeDelta;
use consumer::Rebuild;
use contracts::shop::analytics::events::v1::WindowSize;
use local_stack::wait;
use tokio_util::sync::CancellationToken;

use crate::shop::{Fate, Story, at, figures_of, publish};
use crate::stage::{LIMIT, Stage, span};

fn rebuild(stage: &Stage) -> Rebuild<Projection> {
    let mut config = stage.config("").projection;
    // Small, so that it can be interrupted.
    config.batch_records = 50;
    Rebuild::new(
        config,
        stage.db().pool().clone(),
        || store::MIGRATIONS,
        Projection,
        &prometheus::Registry::new(),
    )
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_result_is_the_same_and_tells_nothing_twice() {
    let stage = Stage::new().await;
    let replicas = stage.two_replicas().await;
    let stories: Vec<Story> = (0..200).map(Story::numbered).collect();
    let published = publish(&stage, &stories).await;
    stage.applied(published).await;
    stage.all_told().await;
    let (before, told) = (stage.dump().await, stage.told().await);
    let build = stage.rows("SELECT build::text FROM sales_builds").await;
    rebuild(&stage)
        .run(|_| {}, &CancellationToken::new())
        .await
        .unwrap();
    assert_ne!(stage.rows("SELECT build::text FROM sales_builds").await, build);
    assert!(stage.dump().await == before, "{:?}", stage.dump().await);
    stage.all_told().await;
    assert_eq!(stage.told().await, told);
    // And it goes on from there.
    let later = Story::new(at(1), Fate::Confirmed);
    let published = published + publish(&stage, std::slice::from_ref(&later)).await;
    stage.applied(published).await;
    stage.all_told().await;
    let news = stage.told().await.split_off(told.len());
    assert!(news.len() >= 3, "{news:?}");
    for (entity, version, _) in news {
        let last = told.iter().rev().find(|told| told.0 == entity).unwrap().1;
        assert!(version > last, "{entity}");
    }
    for replica in replicas {
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_wrong_is_right_and_told_again_although_it_is_killed_under_load() {
    let stage = Arc::new(Stage::new().await);
    let replicas = stage.two_replicas().await;
    let stories: Vec<Story> = (0..400).map(Story::numbered).collect();
    let published = publish(&stage, &stories).await;
    stage.applied(published).await;
    stage.all_told().await;
    let right = stage.told().await;
    // Figures that no event says: of a window that has others, and of one that has none.
    stage
        .run(
            "BEGIN; \
             UPDATE sales_figures SET orders_placed = 10 * orders_placed WHERE window_size = 3; \
             INSERT INTO sales_figures VALUES (2, '2020-02-02 02:00Z', 'EUR', 7, 0, 0, 0, 0); \
             INSERT INTO sales_changes SELECT DISTINCT window_size, window_start FROM sales_figures \
             WHERE window_size = 3 OR window_start < '2021-01-01'; \
             COMMIT",
        )
        .await;
    stage.all_told().await;
    let wrong = stage.told().await;
    assert!(wrong.len() >= right.len() + 3, "{}", wrong.len());

    // It dies on the way, twice.
    for marks in [100, 500] {
        let doomed = tokio::spawn({
            let rebuild = rebuild(&stage);
            async move { rebuild.run(|_| {}, &CancellationToken::new()).await }
        });
        wait::until("some of it to be done", LIMIT, || async {
            let sql = "SELECT count(*)::text FROM consumer_marks WHERE generation = 2";
            let done: i64 = stage.rows(sql).await[0].parse()?;
            Ok((done >= marks || doomed.is_finished()).then_some(()))
        })
        .await
        .unwrap();
        doomed.abort();
        let _ = doomed.await;
    }
    // And comes to its end while more orders come, of the same windows and of others.
    let more: Arc<Vec<Story>> = Arc::new((350..600).map(Story::numbered).collect());
    let publishing = tokio::spawn({
        let (stage, more) = (Arc::clone(&stage), Arc::clone(&more));
        async move { publish(&stage, &more).await }
    });
    rebuild(&stage)
        .run(|_| {}, &CancellationToken::new())
        .await
        .unwrap();
    let published = published + publishing.await.unwrap();
    stage.applied(published).await;
    stage.all_told().await;
    let all: Vec<Story> = [&stories[..], &more[..]].concat();
    for replica in &replicas {
        for (size, days) in [(WindowSize::Hour, 30), (WindowSize::Day, 400)] {
            let request = span(size, at(-86_400), at(-86_400) + TimeDelta::days(days));
            let answer = replica.summary(request).await.unwrap();
            assert_eq!(answer.windows, figures_of(&all, size));
        }
    }
    let mut last = HashMap::new();
    for (entity, version, figures) in stage.told().await {
        let (before, _) = last
            .insert(entity.clone(), (version, figures))
            .unwrap_or_default();
        assert_eq!(version, before + 1, "{entity}");
    }
    assert_eq!(last["hour/2020-02-02T02:00:00Z"], (2, Vec::new()));
    for window in figures_of(&all, WindowSize::Day) {
        let start = contracts::wire::time(window.window_start.as_ref()).unwrap();
        let entity = format!("day/{}", start.format("%Y-%m-%dT%H:%M:%SZ"));
        assert_eq!(last[&entity].1, window.figures, "{entity}");
    }
    for replica in replicas {
        replica.stop().await;
    }
}
