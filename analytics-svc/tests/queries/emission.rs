//! Events that tell of windows: coalesced, in turn, none lost.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use analytics_svc::emitter::{Emitter, Step};
use local_stack::wait;
use prometheus::IntCounter;

use crate::shop::{Fate, Story, at, publish};
use crate::stage::{LIMIT, Stage};

#[tokio::test(flavor = "multi_thread")]
async fn a_window_is_told_of_at_once_then_not_for_a_while_and_its_last_change_always() {
    let stage = Stage::new().await;
    let replica = stage.replica_with("events.interval = \"1h\"").await;
    let stories: Vec<Story> = (0..4).map(|n| Story::new(at(n), Fate::Confirmed)).collect();
    let mut published = publish(&stage, &stories[..1]).await;
    stage.applied(published).await;
    wait::until("a first event of each window", LIMIT, || async {
        let entities: BTreeSet<String> = stage.told().await.into_iter().map(|told| told.0).collect();
        Ok((entities.len() == 3).then_some(()))
    })
    .await
    .unwrap();
    published += publish(&stage, &stories[1..]).await;
    stage.applied(published).await;
    replica.stop().await;
    let told = stage.told().await;
    assert_eq!(told.len(), 3, "{told:?}");

    // Still not, and when the time has come once for all that has changed meanwhile.
    let emitted = IntCounter::new("emitted", "Events.").unwrap();
    let patient = Emitter::new(stage.db(), Duration::from_secs(3600), emitted.clone());
    let nothing = Step::Done {
        looked: 0,
        emitted: 0,
    };
    assert_eq!(patient.step().await.unwrap(), nothing);
    let emitter = Emitter::new(stage.db(), Duration::ZERO, emitted.clone());
    let all = Step::Done {
        looked: 3,
        emitted: 3,
    };
    assert_eq!(emitter.step().await.unwrap(), all);
    assert_eq!(emitter.step().await.unwrap(), nothing);
    assert_eq!(emitted.get(), 3);
    let told = stage.told().await;
    for (entity, version, figures) in &told[3..] {
        assert_eq!((*version, figures[0].orders_confirmed), (2, 4), "{entity}");
    }
    let entities: Vec<&str> = told[3..].iter().map(|told| told.0.as_str()).collect();
    let latest_first = [
        "minute/2026-03-01T23:45:00Z",
        "hour/2026-03-01T23:00:00Z",
        "day/2026-03-01T00:00:00Z",
    ];
    assert_eq!(entities, latest_first);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_tell_no_more_often_than_one_may() {
    let stage = Arc::new(Stage::new().await);
    let setting = "events.interval = \"100ms\"";
    let replicas = [
        stage.replica_with(setting).await,
        stage.replica_with(setting).await,
    ];
    let stories: Vec<Story> = (0..200)
        .map(|n| Story::new(at(n % 50), Fate::Confirmed))
        .collect();
    let published = publish(&stage, &stories).await;
    stage.applied(published).await;
    stage.all_told().await;
    let gaps = stage
        .rows(
            "SELECT gap::text FROM (SELECT occurred_at - lag(occurred_at) OVER (PARTITION BY aggregate_id ORDER BY id) \
             AS gap FROM outbox) gaps WHERE gap < interval '100 milliseconds'",
        )
        .await;
    assert_eq!(gaps, [""; 0]);
    let told = stage.told().await;
    assert_eq!(told.last().unwrap().2[0].orders_confirmed, 200);
    assert!(told.len() < 200, "not one event per order: {}", told.len());
    for replica in replicas {
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_under_way_holds_nobody_up_and_is_told_of_afterwards() {
    let stage = Stage::new().await;
    let emitter = stage.emitter();
    let mut batch = stage.database.connect().await.unwrap();
    let batch = batch.transaction().await.unwrap();
    batch
        .batch_execute(
            "INSERT INTO sales_changes VALUES (2, '2026-03-01 23:00Z'); \
             INSERT INTO sales_figures VALUES (2, '2026-03-01 23:00Z', 'EUR', 1, 0, 0, 0, 0)",
        )
        .await
        .unwrap();
    let nothing = Step::Done {
        looked: 0,
        emitted: 0,
    };
    assert_eq!(emitter.step().await.unwrap(), nothing);
    batch.commit().await.unwrap();
    let one = Step::Done {
        looked: 1,
        emitted: 1,
    };
    assert_eq!(emitter.step().await.unwrap(), one);

    // Changed while another one is under way, and to what was told already: nothing is told twice.
    let mut other = stage.database.connect().await.unwrap();
    let turn = other.transaction().await.unwrap();
    turn.batch_execute(
        "SELECT FROM emission_turn FOR UPDATE; INSERT INTO sales_changes VALUES (2, '2026-03-01 23:00Z')",
    )
    .await
    .unwrap();
    assert_eq!(emitter.step().await.unwrap(), Step::Busy);
    turn.commit().await.unwrap();
    let same = Step::Done {
        looked: 1,
        emitted: 0,
    };
    assert_eq!(emitter.step().await.unwrap(), same);
    assert_eq!(stage.told().await.len(), 1);
}
