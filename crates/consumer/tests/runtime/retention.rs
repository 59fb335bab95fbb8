//! What is kept for a time goes then, and no more than that.

use std::time::Duration;

use consumer::{Config, Run, Topic, Which};
use local_stack::wait;
use uuid::Uuid;

use crate::stage::{LIMIT, Stage, nothing, refusing};

const DAY: Duration = Duration::from_secs(24 * 3600);

#[tokio::test(flavor = "multi_thread")]
async fn settled_records_go_in_their_time_and_discarded_ones_stay() {
    let stage = Stage::new(1).await;
    for version in 1..=4 {
        stage.publish("bad", version).await;
    }
    let instance = stage.start("a", refusing("bad"));
    stage.parks(4).await;
    stage.all_committed(4).await;
    instance.stop().await;
    let redrive = stage.redrive(nothing());
    let first = redrive.list(false, 1).await.unwrap()[0].id;
    redrive.discard(first, "because", "operator").await.unwrap();
    stage.publish("waiting", 2).await;
    let client = stage.database.connect().await.unwrap();
    // All but version 4 were settled long ago.
    client
        .batch_execute("UPDATE parked_records SET settled_at = now() - interval '3 days' WHERE version < 4")
        .await
        .unwrap();
    let config = Config {
        keep_settled: 2 * DAY,
        ..stage.config()
    };
    let instance = stage.start_with("b", config, nothing());
    let left =
        "SELECT coalesce(string_agg(version || ' ' || state, ', ' ORDER BY id), '') FROM parked_records";
    wait::until("what is old to go", LIMIT, || async {
        let left: String = client.query_one(left, &[]).await?.get(0);
        Ok((left == "1 discarded, 4 replayed, 2 parked").then_some(()))
    })
    .await
    .unwrap();
    let audit = stage.number("SELECT count(*) FROM parked_audit").await;
    assert_eq!(audit, 2, "what was decided goes and stays with its record");
    // It is done with still.
    let again = redrive
        .replay(&Which::Of(vec![first]), Run::Dry, "operator")
        .await;
    assert!(again.is_err(), "{again:?}");
    stage.publish("bad", 5).await;
    stage.all_committed(6).await;
    assert_eq!(stage.versions("bad").await, [2, 3, 4, 5]);
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn event_ids_are_kept_for_as_long_as_is_said() {
    let stage = Stage::new(1).await;
    let (old, young) = (Uuid::now_v7(), Uuid::now_v7());
    let config = Config {
        topics: vec![Topic::by_event_id(&stage.topic)],
        keep_seen: 2 * DAY,
        ..stage.config()
    };
    stage.publish_uncounted("a", old, "1").await;
    stage.publish_uncounted("a", young, "2").await;
    let instance = stage.start_with("a", config.clone(), nothing());
    stage.all_committed(2).await;
    instance.stop().await;
    let client = stage.database.connect().await.unwrap();
    let age = "UPDATE consumer_inbox SET seen_at = now() - interval '3 days' WHERE event_id = $1";
    client.execute(age, &[&old]).await.unwrap();
    let instance = stage.start_with("b", config, nothing());
    wait::until("the old one to go", LIMIT, || async {
        let left: Vec<Uuid> = client
            .query("SELECT event_id FROM consumer_inbox", &[])
            .await?
            .iter()
            .map(|row| row.get(0))
            .collect();
        Ok((left == [young]).then_some(()))
    })
    .await
    .unwrap();
    stage.publish_uncounted("a", young, "2").await;
    stage.all_committed(3).await;
    assert_eq!(stage.versions("a").await, [1, 2]);
    instance.stop().await;
}
