//! A projection built anew beside the live one.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use consumer::{RebuildError, RedriveError, Run, Which};
use local_stack::wait;
use prometheus::Registry;
use tokio_util::sync::CancellationToken;

use crate::stage::{Act, LIMIT, Stage, Transaction, event, headers, metric, nothing, refusing};

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_where_partitions_end_in_what_is_never_delivered() {
    let stage = Stage::new(4).await;
    // A record, a commit; records, an abort; an abort alone; nothing at all.
    stage.transaction(0, &["a", "b"], Transaction::Committed).await;
    stage.transaction(1, &["c"], Transaction::Committed).await;
    stage.transaction(1, &["lost"], Transaction::Aborted).await;
    stage.transaction(2, &["lost"], Transaction::Aborted).await;
    let instance = stage.start("a", nothing());
    // Markers have offsets too.
    stage.all_committed(3 + 4 + 2).await;
    wait::until("the lag to be told as none", LIMIT, || async {
        let lag = instance.metric("consumer_lag_records", "");
        Ok((instance.samples("consumer_lag_records") == 3 && lag == 0.0).then_some(()))
    })
    .await
    .unwrap();
    assert_eq!(instance.metric("consumer_messages_total", ""), 3.0);

    let registry = Registry::new();
    let rebuild = stage.rebuild(nothing(), &registry);
    let shutdown = CancellationToken::new();
    let rebuilt = tokio::time::timeout(LIMIT, rebuild.run(|_| {}, &shutdown));
    assert_eq!(rebuilt.await.unwrap().unwrap().generation, 2);
    for (name, value) in [
        ("consumer_rebuild_generation", 2.0),
        ("consumer_rebuild_done_records", 9.0),
        ("consumer_rebuild_total_records", 9.0),
        ("consumer_messages_total", 3.0),
    ] {
        assert_eq!(metric(&registry, name, ""), value, "{name}");
    }
    let mut effects = stage.effects().await.unwrap();
    effects.sort_unstable();
    assert_eq!(effects, ["a", "b", "c"].map(|entity| (entity.to_owned(), 1)));
    assert_eq!(
        stage
            .number("SELECT count(*) FROM effects WHERE instance <> 'rebuild'")
            .await,
        0
    );
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_group_is_left_in_kafka() {
    let stage = Stage::new(2).await;
    stage.publish_all(4, 5).await;
    let instance = stage.start("a", nothing());
    stage.complete(4, 5).await;
    let groups = [stage.group.clone()];
    // One that comes to its end, and one that is given up on its way.
    let rebuild = stage.rebuild(nothing(), &Registry::new());
    rebuild.run(|_| {}, &CancellationToken::new()).await.unwrap();
    assert_eq!(stage.groups().await, groups);
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    let doomed = stage.rebuild(
        Arc::new(move |_| {
            stop.cancel();
            Box::pin(async { Ok(()) })
        }),
        &Registry::new(),
    );
    let stopped = doomed.run(|_| {}, &shutdown).await;
    assert!(matches!(stopped, Err(RebuildError::Stopped)), "{stopped:?}");
    assert_eq!(stage.groups().await.len(), 2);
    assert_eq!(doomed.abandon().await.unwrap(), 3);
    assert_eq!(stage.groups().await, groups);
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_takes_over_under_load_with_what_was_given_up_and_what_is_parked() {
    const ENTITIES: usize = 40;
    let stage = Arc::new(Stage::new(3).await);
    for version in 1..=3 {
        for entity in ["parked", "given-up"] {
            let payload: &[u8] = if version == 2 { b"unreadable" } else { b"payload" };
            let envelope = headers(&event(entity, version));
            stage.produce(Some(entity), Some(payload), envelope, None).await;
        }
    }
    let instance = stage.start_with("live", stage.roomy(), nothing());
    stage.parks(4).await;
    let redrive = stage.redrive(nothing());
    let listed = redrive.list(false, 100).await.unwrap();
    let given_up = listed
        .iter()
        .find(|row| row.entity_id.as_deref() == Some("given-up"))
        .unwrap();
    redrive.discard(given_up.id, "because", "operator").await.unwrap();
    let enough = CancellationToken::new();
    let publishing = tokio::spawn({
        let (stage, enough) = (Arc::clone(&stage), enough.clone());
        async move {
            let mut pace = tokio::time::interval(Duration::from_millis(50));
            for version in 1.. {
                pace.tick().await;
                let sent =
                    (0..ENTITIES).map(async |entity| stage.publish(&format!("e{entity}"), version).await);
                futures::future::join_all(sent).await;
                if enough.is_cancelled() {
                    return version;
                }
            }
            0
        }
    });
    stage.reached(500).await;
    // While it is built, nobody decides anything.
    let refused = Arc::new(Mutex::new(Vec::new()));
    let act: Act = {
        let (refused, stage) = (Arc::clone(&refused), Arc::clone(&stage));
        Arc::new(move |_| {
            let (refused, redrive) = (Arc::clone(&refused), stage.redrive(nothing()));
            Box::pin(async move {
                let is_first = refused.lock().unwrap().is_empty();
                if is_first {
                    let tried = redrive.replay(&Which::All, Run::Real, "operator").await;
                    refused.lock().unwrap().push(tried);
                }
                Ok(())
            })
        })
    };
    let rebuild = stage.rebuild_with(stage.roomy(), act, &Registry::new());
    let shutdown = CancellationToken::new();
    let rebuilt = tokio::time::timeout(LIMIT, rebuild.run(|_| {}, &shutdown));
    rebuilt.await.unwrap().unwrap();
    let before = stage.effects().await.unwrap().len();
    stage.reached(before + 5 * ENTITIES).await;
    enough.cancel();
    let versions = publishing.await.unwrap();
    assert!(
        matches!(refused.lock().unwrap()[0], Err(RedriveError::Rebuilding(2))),
        "{refused:?}"
    );
    stage.all_committed(6 + ENTITIES as i64 * versions).await;
    let mut expected = stage.expected().await;
    expected.insert("given-up".to_owned(), vec![1, 3]);
    assert_eq!(stage.by_entity().await, expected);
    // No second dead letters; what is parked is so in the new generation, and nothing else is.
    assert_eq!(stage.number("SELECT count(*) FROM dead_letters").await, 4);
    let waiting = "SELECT count(*) FROM parked_records WHERE state = 'parked' AND generation = 2 AND entity_id = 'parked'";
    assert_eq!(stage.number(waiting).await, 2);
    assert_eq!(
        stage
            .number("SELECT count(*) FROM parked_records WHERE state = 'parked'")
            .await,
        2
    );
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_does_not_take_over_what_it_could_not_apply() {
    let stage = Stage::new(1).await;
    stage.publish_all(3, 2).await;
    let instance = stage.start("live", nothing());
    stage.complete(3, 2).await;
    stage.all_committed(6).await;
    let rebuild = stage.rebuild(refusing("e1"), &Registry::new());
    let refused = rebuild.run(|_| {}, &CancellationToken::new()).await;
    assert!(matches!(refused, Err(RebuildError::Parked(1, 2))), "{refused:?}");
    stage.complete(3, 2).await;
    assert_eq!(stage.number("SELECT count(*) FROM dead_letters").await, 0);
    assert_eq!(rebuild.abandon().await.unwrap(), 2);
    assert_eq!(stage.number("SELECT count(*) FROM parked_records").await, 0);
    stage.publish("e1", 3).await;
    stage.reached(7).await;
    assert_eq!(stage.versions("e1").await, [1, 2, 3]);
    instance.stop().await;
}
