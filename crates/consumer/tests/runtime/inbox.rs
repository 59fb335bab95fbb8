//! A source that does not count the versions of its entities.

use consumer::{Config, End, Run, Topic, Which};
use prometheus::Registry;
use rdkafka::message::OwnedHeaders;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::stage::{Stage, nothing};

fn config(stage: &Stage) -> Config {
    Config {
        topics: vec![Topic::by_event_id(&stage.topic)],
        ..stage.config()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_is_known_by_its_id_over_restarts_rebalances_and_rebuilds() {
    const ENTITIES: usize = 6;
    const EVENTS: usize = 10;
    let stage = Stage::new(3).await;
    let ids: Vec<Uuid> = (0..ENTITIES * EVENTS).map(|_| Uuid::now_v7()).collect();
    let publish = async |number: usize| {
        let (entity, event) = (number % ENTITIES, number / ENTITIES);
        let (name, payload) = (format!("e{entity}"), (event + 1).to_string());
        stage.publish_uncounted(&name, ids[number], &payload).await;
    };
    // Each comes twice in a row, and once more much later.
    for number in 0..ids.len() {
        publish(number).await;
        publish(number).await;
    }
    let first = stage.start_with("a", config(&stage), nothing());
    stage.reached(20).await;
    let second = stage.start_with("b", config(&stage), nothing());
    for number in 0..ids.len() / 2 {
        publish(number).await;
    }
    stage.reached(40).await;
    first.abort().await;
    let all = ids.len() as i64 * 5 / 2;
    stage.complete(ENTITIES, EVENTS as i64).await;
    stage.all_committed(all).await;
    second.stop().await;
    // As if nothing had ever been committed to Kafka.
    stage.rewind().await;
    let third = stage.start_with("c", config(&stage), nothing());
    stage.all_committed(all).await;
    stage.complete(ENTITIES, EVENTS as i64).await;
    assert_eq!(third.metric("consumer_messages_total", "repeat"), all as f64);
    let rebuild = stage.rebuild_with(config(&stage), nothing(), &Registry::new());
    rebuild.run(|_| {}, &CancellationToken::new()).await.unwrap();
    stage.complete(ENTITIES, EVENTS as i64).await;
    assert_eq!(
        stage
            .number("SELECT count(*) FROM consumer_inbox WHERE generation = 2")
            .await,
        60
    );
    assert_eq!(stage.number("SELECT count(*) FROM consumer_inbox").await, 60);
    third.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_record_parks_with_its_entity_and_is_discarded_or_replayed_in_order() {
    let stage = Stage::new(1).await;
    let ids: Vec<Uuid> = (0..4).map(|_| Uuid::now_v7()).collect();
    stage.publish_uncounted("a", ids[0], "1").await;
    stage.publish_uncounted("a", ids[1], "unreadable").await;
    stage.publish_uncounted("a", ids[2], "3").await;
    // Again, while they wait.
    stage.publish_uncounted("a", ids[1], "unreadable").await;
    stage.publish_uncounted("a", ids[2], "3").await;
    stage.publish_uncounted("b", Uuid::now_v7(), "1").await;
    stage
        .produce(Some("bare"), Some(b"x"), OwnedHeaders::new(), None)
        .await;
    let instance = stage.start_with("a", config(&stage), nothing());
    stage.all_committed(7).await;
    assert_eq!(
        (stage.versions("a").await, stage.versions("b").await),
        (vec![1], vec![1])
    );
    let parked = stage.parked().await.unwrap();
    let mut kinds: Vec<_> = parked
        .iter()
        .map(|row| (row.entity.as_deref(), row.kind.as_str()))
        .collect();
    // Those of an entity are in order.
    kinds.sort_by_key(|(entity, _)| *entity);
    assert_eq!(
        kinds,
        [
            (Some("a"), "payload"),
            (Some("a"), "behind"),
            (Some("bare"), "unreadable")
        ]
    );

    let redrive = stage.redrive_with(config(&stage), nothing());
    let outcomes = redrive.replay(&Which::All, Run::Real, "operator").await.unwrap();
    assert!(
        outcomes
            .iter()
            .all(|outcome| matches!(outcome.end, End::Failed { .. })),
        "{outcomes:?}"
    );
    let listed = redrive.list(false, 100).await.unwrap();
    let first = listed
        .iter()
        .find(|row| row.entity_id.as_deref() == Some("a"))
        .unwrap()
        .id;
    redrive.discard(first, "nobody knows", "operator").await.unwrap();
    assert_eq!(stage.versions("a").await, [1, 3]);
    // It is free again, and nothing that was is so twice.
    for id in &ids[..3] {
        stage.publish_uncounted("a", *id, "9").await;
    }
    stage.publish_uncounted("a", ids[3], "4").await;
    stage.all_committed(11).await;
    assert_eq!(stage.versions("a").await, [1, 3, 4]);
    // A rebuild passes over what was discarded.
    let rebuild = stage.rebuild_with(config(&stage), nothing(), &Registry::new());
    rebuild.run(|_| {}, &CancellationToken::new()).await.unwrap();
    assert_eq!(stage.versions("a").await, [1, 3, 4]);
    assert_eq!(stage.number("SELECT count(*) FROM dead_letters").await, 5);
    instance.stop().await;
}
