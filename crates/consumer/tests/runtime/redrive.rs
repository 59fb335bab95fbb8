//! What an operator does about parked records.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use consumer::{End, Outcome, RedriveError, Run, Which};
use local_stack::wait;
use rdkafka::message::OwnedHeaders;
use tokio::sync::Semaphore;

use crate::stage::{Act, LIMIT, Stage, event, headers, nothing, refusing};

const BY: &str = "operator";

fn ends(outcomes: &[Outcome]) -> Vec<End> {
    outcomes.iter().map(|outcome| outcome.end.clone()).collect()
}

/// Entity `bad` is parked from version 1 to 3, and `good` is not.
async fn parked_at_one() -> Stage {
    let stage = Stage::new(1).await;
    stage.publish_all(1, 2).await;
    for version in 1..=3 {
        stage.publish("bad", version).await;
    }
    let instance = stage.start("a", refusing("bad"));
    stage.parks(3).await;
    stage.all_committed(5).await;
    instance.stop().await;
    stage
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_takes_effect_in_order_and_the_entity_is_free_again() {
    let stage = parked_at_one().await;
    let redrive = stage.redrive(nothing());
    let listed = redrive.list(false, 100).await.unwrap();
    let versions: Vec<Option<i64>> = listed.iter().map(|row| row.version).collect();
    assert_eq!(versions, [Some(1), Some(2), Some(3)]);
    // Any of them stands for its entity.
    let which = Which::Of(vec![listed[2].id]);

    let tried = redrive.replay(&which, Run::Dry, BY).await.unwrap();
    assert_eq!(ends(&tried), [End::Replayed, End::Replayed, End::Replayed]);
    assert_eq!(stage.versions("bad").await, [0; 0]);
    assert_eq!(redrive.list(false, 100).await.unwrap(), listed);

    let replayed = redrive.replay(&which, Run::Real, BY).await.unwrap();
    assert_eq!(replayed, tried);
    assert_eq!(stage.versions("bad").await, [1, 2, 3]);
    assert_eq!(redrive.list(false, 100).await.unwrap(), []);
    assert_eq!(redrive.replay(&Which::All, Run::Real, BY).await.unwrap(), []);
    let shown = redrive.show(listed[0].id).await.unwrap();
    assert_eq!(shown.record.state, "replayed");
    assert_eq!(shown.value.as_deref(), Some(&b"payload"[..]));
    assert_eq!(
        (shown.audit[0].action.as_str(), shown.audit[0].decided_by.as_str()),
        ("replay", BY)
    );

    // Later records go the usual way, and the old ones are repeats.
    stage.rewind().await;
    stage.publish("bad", 4).await;
    let instance = stage.start("b", nothing());
    stage.all_committed(6).await;
    assert_eq!(stage.versions("bad").await, [1, 2, 3, 4]);
    assert_eq!(stage.number("SELECT count(*) FROM dead_letters").await, 3);
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_fails_again_leaves_all_in_place_and_says_so() {
    let stage = parked_at_one().await;
    let redrive = stage.redrive(refusing("bad"));
    for run in [Run::Dry, Run::Real] {
        let outcomes = redrive.replay(&Which::All, run, BY).await.unwrap();
        assert!(
            matches!(&ends(&outcomes)[..], [End::Failed { error, .. }] if error.contains("not this one")),
            "{outcomes:?}"
        );
    }
    let listed = redrive.list(false, 100).await.unwrap();
    let attempts: Vec<i32> = listed.iter().map(|row| row.attempts).collect();
    assert_eq!(attempts, [2, 1, 1]);
    assert_eq!(stage.versions("bad").await, [0; 0]);
    let audit = redrive.show(listed[0].id).await.unwrap().audit;
    assert_eq!(audit.len(), 1, "a dry run leaves no trace");
    assert!(audit[0].outcome.contains("not this one"));
    // The topic hears of it too, of the dry run it does not.
    let letters = "SELECT format('%s %s %s', dlt_attempt, dlt_original_id, dlt_error_kind) FROM dead_letters \
                   WHERE aggregate_version = 1 AND aggregate_id = 'bad' ORDER BY id";
    let client = stage.database.connect().await.unwrap();
    let rows = client.query(letters, &[]).await.unwrap();
    let letters: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let id = listed[0].event_id.unwrap();
    assert_eq!(letters, [format!("1 {id} refused"), format!("2 {id} refused")]);
    let other = "SELECT count(DISTINCT (event_id, failed_at)) FROM dead_letters WHERE dlt_original_id = $1";
    assert_eq!(client.query_one(other, &[&id]).await.unwrap().get::<_, i64>(0), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn discard_gives_up_the_first_and_drains_what_waits_behind() {
    let stage = parked_at_one().await;
    let redrive = stage.redrive(nothing());
    let ids: Vec<i64> = redrive
        .list(false, 100)
        .await
        .unwrap()
        .iter()
        .map(|row| row.id)
        .collect();
    let early = redrive.discard(ids[1], "because", BY).await;
    assert!(
        matches!(early, Err(RedriveError::NotFirst { first, .. }) if first == ids[0]),
        "{early:?}"
    );
    assert!(matches!(
        redrive.discard(ids[0], " ", BY).await,
        Err(RedriveError::NoReason)
    ));
    let outcomes = redrive.discard(ids[0], "because", BY).await.unwrap();
    assert_eq!(ends(&outcomes), [End::Discarded, End::Replayed, End::Replayed]);
    assert_eq!(stage.versions("bad").await, [2, 3]);
    assert!(matches!(
        redrive.discard(ids[0], "because", BY).await,
        Err(RedriveError::NotParked(_))
    ));
    let audit = redrive.show(ids[0]).await.unwrap().audit;
    assert_eq!(audit[0].reason.as_deref(), Some("because"));
    // It stays given up, however often it comes.
    stage.rewind().await;
    stage.publish("bad", 4).await;
    let instance = stage.start("b", nothing());
    stage.all_committed(6).await;
    assert_eq!(stage.versions("bad").await, [2, 3, 4]);
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_is_closed_by_the_one_that_was_missing_or_given_up() {
    let stage = Stage::new(1).await;
    for version in [1, 3, 4] {
        stage.publish("late", version).await;
        stage.publish("lost", version).await;
    }
    stage.publish("late", 2).await;
    let instance = stage.start("a", nothing());
    stage.parks(5).await;
    stage.all_committed(7).await;
    let redrive = stage.redrive(nothing());
    let outcomes = redrive.replay(&Which::All, Run::Real, BY).await.unwrap();
    assert_eq!(stage.versions("late").await, [1, 2, 3, 4]);
    assert!(
        matches!(&ends(&outcomes)[3..], [End::Failed { error, .. }] if error.contains("2 is missing")),
        "{outcomes:?}"
    );
    let first = redrive.list(false, 100).await.unwrap()[0].id;
    redrive.discard(first, "2 was never published", BY).await.unwrap();
    assert_eq!(stage.versions("lost").await, [1, 4]);
    stage.publish("lost", 5).await;
    stage.publish("late", 5).await;
    stage.all_committed(9).await;
    assert_eq!(stage.versions("lost").await, [1, 4, 5]);
    assert_eq!(stage.versions("late").await, [1, 2, 3, 4, 5]);
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_can_only_be_discarded() {
    let stage = Stage::new(1).await;
    stage.publish("bare", 1).await;
    stage
        .produce(Some("bare"), Some(b"x"), OwnedHeaders::new(), None)
        .await;
    stage.publish("bare", 2).await;
    stage
        .produce(None, Some(b"x"), headers(&event("keyless", 1)), None)
        .await;
    let instance = stage.start("a", nothing());
    stage.parks(3).await;
    let redrive = stage.redrive(nothing());
    let listed = redrive.list(false, 100).await.unwrap();
    assert_eq!((listed[0].version, &listed[2].entity_id), (None, &None));
    let outcomes = redrive.replay(&Which::All, Run::Real, BY).await.unwrap();
    assert!(
        outcomes
            .iter()
            .all(|outcome| matches!(outcome.end, End::Failed { .. })),
        "{outcomes:?}"
    );
    for id in [listed[0].id, listed[2].id] {
        redrive.discard(id, "nobody knows what it was", BY).await.unwrap();
    }
    assert_eq!(stage.versions("bare").await, [1, 2]);
    stage.publish("bare", 3).await;
    stage.all_committed(5).await;
    assert_eq!(stage.versions("bare").await, [1, 2, 3]);
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_operators_at_the_same_time_replay_each_record_once() {
    let stage = Arc::new(parked_at_one().await);
    let (entered, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
    let act: Act = {
        let (entered, gate) = (Arc::clone(&entered), Arc::clone(&gate));
        Arc::new(move |_| {
            entered.fetch_add(1, Ordering::SeqCst);
            let gate = Arc::clone(&gate);
            Box::pin(async move {
                let _ = gate.acquire().await;
                Ok(())
            })
        })
    };
    let replay = || {
        let redrive = stage.redrive(Arc::clone(&act));
        tokio::spawn(async move { redrive.replay(&Which::All, Run::Real, BY).await })
    };
    let first = replay();
    wait::until("the first to be at it", LIMIT, || async {
        Ok((entered.load(Ordering::SeqCst) == 1).then_some(()))
    })
    .await
    .unwrap();
    let second = replay();
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    wait::until("the second to wait for it", LIMIT, || async {
        Ok((stage.number(waiting).await > 0).then_some(()))
    })
    .await
    .unwrap();
    gate.add_permits(100);
    for replayed in [first, second] {
        replayed.await.unwrap().unwrap();
    }
    assert_eq!(stage.versions("bad").await, [1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn redrive_and_workers_at_the_same_time_keep_the_order() {
    const LAST: i64 = 120;
    let stage = Arc::new(Stage::new(1).await);
    stage
        .produce(
            Some("busy"),
            Some(b"unreadable"),
            headers(&event("busy", 1)),
            None,
        )
        .await;
    let instance = stage.start("a", nothing());
    stage.parks(1).await;
    let publishing = tokio::spawn({
        let stage = Arc::clone(&stage);
        async move {
            for version in 2..=LAST {
                stage.publish("busy", version).await;
            }
        }
    });
    stage.parks(5).await;
    let redrive = stage.redrive(nothing());
    let first = redrive.list(false, 1).await.unwrap()[0].id;
    redrive.discard(first, "while more arrive", BY).await.unwrap();
    publishing.await.unwrap();
    stage.all_committed(LAST).await;
    // None is left behind by the last look.
    redrive.replay(&Which::All, Run::Real, BY).await.unwrap();
    assert_eq!(stage.versions("busy").await, (2..=LAST).collect::<Vec<_>>());
    assert_eq!(
        stage
            .number("SELECT count(*) FROM consumer_marks WHERE parked")
            .await,
        0
    );
    instance.stop().await;
}
