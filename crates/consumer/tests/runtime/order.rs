//! Each effect once, in order, and offsets behind them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use consumer::{Config, HandlerError, Topic};
use local_stack::wait;
use tokio::sync::Semaphore;

use crate::stage::{LIMIT, Stage, event, headers, nothing};

#[tokio::test(flavor = "multi_thread")]
async fn repeats_are_absorbed_and_order_holds() {
    let stage = Stage::new(3).await;
    stage.publish_all(10, 8).await;
    // All of it once more, as after a crash of the relay.
    stage.publish_all(10, 8).await;
    let instance = stage.start("a", nothing());
    stage.publish("last", 1).await;
    stage.all_committed(161).await;
    let effects: Vec<_> = stage
        .reached(81)
        .await
        .into_iter()
        .filter(|(entity, _)| entity != "last")
        .collect();
    crate::stage::assert_each_once_in_order(&effects, 10, 8);
    assert_eq!(instance.metric("consumer_messages_total", "applied"), 81.0);
    assert_eq!(instance.metric("consumer_messages_total", "repeat"), 80.0);
    // Published again with event ids of their own, the last version of each was seen in another event.
    assert!(instance.metric("consumer_ghosts_total", "") >= 10.0);
    assert_eq!(instance.status.problems(), Vec::<String>::new());
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn offsets_are_never_ahead_of_effects_when_it_dies() {
    let stage = Stage::new(2).await;
    stage.publish_all(12, 20).await;
    let gate = Arc::new(Semaphore::new(0));
    let batch_by_batch = {
        let gate = Arc::clone(&gate);
        Arc::new(move |_: Vec<(String, i64)>| {
            let gate = Arc::clone(&gate);
            Box::pin(async move {
                gate.acquire().await.unwrap().forget();
                Ok(())
            }) as _
        })
    };
    for round in 0..4 {
        let mut config = stage.config();
        config
            .properties
            .insert("auto.commit.interval.ms".into(), "10".into());
        let before = stage.effects().await.unwrap().len();
        gate.add_permits(5);
        let instance = stage.start_with(&format!("round-{round}"), config, batch_by_batch.clone());
        // It dies with a transaction of each worker open.
        stage.reached(before + 5).await;
        instance.abort().await;
        let committed: i64 = stage.committed().await.values().sum();
        // Everything up to a committed offset is an effect; so there are never more committed than effects.
        let effects = stage.effects().await.unwrap().len() as i64;
        assert!(committed <= effects, "{committed} committed, {effects} effects");
    }
    let instance = stage.start("last", nothing());
    stage.complete(12, 20).await;
    stage.all_committed(240).await;
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_worker_holds_back_its_offsets_and_nothing_else() {
    let stage = Stage::new(1).await;
    let gate = Arc::new(Semaphore::new(0));
    let act = {
        let gate = Arc::clone(&gate);
        Arc::new(move |seen: Vec<(String, i64)>| {
            let gate = Arc::clone(&gate);
            Box::pin(async move {
                if seen.iter().any(|(entity, _)| entity == "stuck") {
                    let _ = gate.acquire().await;
                }
                Ok(())
            }) as _
        })
    };
    let mut config = stage.config();
    // Long enough for the stuck transaction to be let go by hand.
    config.transaction_timeout = LIMIT;
    config.idle_transaction_timeout = LIMIT;
    // The oldest record of the partition.
    stage.publish("stuck", 1).await;
    let instance = stage.start_with("a", config, act);
    stage.publish_all(8, 3).await;
    // Those of the entities that share the stuck worker wait with it.
    let done = wait::until("the other workers to finish", LIMIT, || async {
        let done = stage.effects().await?.len();
        let waiting = instance.metric("consumer_in_flight_records", "") as usize;
        Ok((done > 0 && done + waiting == 25).then_some(done))
    })
    .await
    .unwrap();
    assert!(done < 25);
    assert_eq!(stage.committed().await[&0], 0, "the oldest record is not done");
    gate.add_permits(1);
    stage.reached(25).await;
    stage.all_committed(25).await;
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_partition_pauses_and_memory_stays_bounded() {
    let stage = Stage::new(1).await;
    let gate = Arc::new(Semaphore::new(0));
    let act = {
        let gate = Arc::clone(&gate);
        Arc::new(move |_: Vec<(String, i64)>| {
            let gate = Arc::clone(&gate);
            Box::pin(async move {
                gate.acquire().await.unwrap().forget();
                Ok(())
            }) as _
        })
    };
    stage.publish_all(20, 40).await;
    let mut config = stage.config();
    config.transaction_timeout = LIMIT;
    config.idle_transaction_timeout = LIMIT;
    let limit = config.in_flight_records as f64;
    // Polling must go on while it is paused, or the membership would be lost.
    config
        .properties
        .insert("max.poll.interval.ms".into(), "6000".into());
    let instance = stage.start_with("a", config, act);
    wait::until("memory to fill", LIMIT, || async {
        Ok((instance.metric("consumer_in_flight_records", "") >= limit).then_some(()))
    })
    .await
    .unwrap();
    let full_since = tokio::time::Instant::now();
    while full_since.elapsed() < Duration::from_secs(7) {
        let held = instance.metric("consumer_in_flight_records", "");
        assert!(held < limit + 20.0, "{held} in memory");
        gate.add_permits(1);
        tokio::task::yield_now().await;
        let before = stage.effects().await.unwrap().len();
        if before == 800 {
            break;
        }
    }
    gate.add_permits(10_000);
    stage.complete(20, 40).await;
    assert_eq!(
        instance.metric("consumer_rebalances_total", ""),
        1.0,
        "the membership was kept"
    );
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graceful_stop_finishes_and_commits_what_is_under_way() {
    let stage = Stage::new(2).await;
    stage.publish_all(6, 5).await;
    let instance = stage.start("a", nothing());
    stage.reached(1).await;
    instance.stop().await;
    let effects = stage.effects().await.unwrap().len() as i64;
    let committed: i64 = stage.committed().await.values().sum();
    // Records behind one that was not finished may be done without being committed.
    assert!(
        committed <= effects && committed > 0,
        "{committed} committed, {effects} effects"
    );
    let instance = stage.start("b", nothing());
    stage.complete(6, 5).await;
    instance.stop().await;
    stage.all_committed(30).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_baseline_takes_the_first_version_it_sees() {
    let stage = Stage::new(1).await;
    for version in [5, 6, 7] {
        stage.publish("old", version).await;
    }
    let config = Config {
        topics: vec![Topic::baseline(&stage.topic)],
        ..stage.config()
    };
    let instance = stage.start_with("a", config, nothing());
    let versions: Vec<i64> = stage
        .reached(3)
        .await
        .into_iter()
        .map(|(_, version)| version)
        .collect();
    assert_eq!(versions, [5, 6, 7]);
    // From there on, a gap is one.
    stage.publish("old", 9).await;
    assert_eq!(stage.parks(1).await[0].kind, "gap");
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_hides_a_database_error_loses_nothing() {
    let stage = Stage::new(1).await;
    stage.publish_all(3, 2).await;
    let (consumer, _) = {
        let handler_failed = Arc::new(AtomicBool::new(false));
        hiding::consumer(&stage, handler_failed)
    };
    let shutdown = tokio_util::sync::CancellationToken::new();
    let task = tokio::spawn(consumer.run(shutdown.clone()));
    stage.complete(3, 2).await;
    shutdown.cancel();
    task.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn transient_errors_of_a_handler_are_waited_out() {
    let stage = Stage::new(1).await;
    stage.publish_all(2, 3).await;
    let away = Arc::new(AtomicBool::new(true));
    let act = {
        let away = Arc::clone(&away);
        Arc::new(move |_: Vec<(String, i64)>| {
            let away = Arc::clone(&away);
            Box::pin(async move {
                if away.load(Ordering::SeqCst) {
                    return Err(HandlerError::Transient("the provider is away".into()));
                }
                Ok(())
            }) as _
        })
    };
    let instance = stage.start("a", act);
    wait::until("retries", LIMIT, || async {
        Ok((instance.metric("consumer_retries_total", "") >= 5.0).then_some(()))
    })
    .await
    .unwrap();
    assert!(
        instance
            .status
            .problems()
            .iter()
            .any(|problem| problem.contains("the provider is away"))
    );
    assert_eq!(stage.effects().await.unwrap(), []);
    away.store(false, Ordering::SeqCst);
    stage.complete(2, 3).await;
    assert_eq!(stage.parked().await.unwrap(), []);
    wait::until("it to be well again", LIMIT, || async {
        Ok(instance.status.problems().is_empty().then_some(()))
    })
    .await
    .unwrap();
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_of_any_type_advance_the_mark() {
    let stage = Stage::new(1).await;
    stage.publish("a", 1).await;
    let mut unknown = event("a", 2);
    unknown.event_type = "order.not.invented.yet".into();
    unknown.schema_version = 99;
    stage.produce(Some("a"), Some(b""), headers(&unknown), None).await;
    stage.publish("a", 3).await;
    let instance = stage.start("a", nothing());
    stage.complete(1, 3).await;
    instance.stop().await;
}

/// A handler that swallows a database error once, which leaves its transaction aborted.
mod hiding {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use consumer::{BoxError, Consumer, Handler, HandlerError, Incoming, Record};
    use diesel_async::pooled_connection::AsyncDieselConnectionManager;
    use diesel_async::pooled_connection::deadpool::Pool;
    use diesel_async::{AsyncPgConnection, RunQueryDsl as _};
    use prometheus::Registry;

    use crate::stage::{Recorder, Stage, nothing};

    pub(super) struct Hiding {
        inner: Recorder,
        failed: Arc<AtomicBool>,
    }

    impl Handler for Hiding {
        type Event = ();
        type Effect = ();

        fn read(&self, record: &Record) -> Result<(), BoxError> {
            self.inner.read(record)
        }

        async fn apply(
            &self,
            connection: &mut AsyncPgConnection,
            batch: &[Incoming<'_, ()>],
        ) -> Result<(), HandlerError> {
            self.inner.apply(connection, batch).await?;
            if !self.failed.swap(true, Ordering::SeqCst) {
                let hidden = diesel::sql_query("SELECT 1 / 0").execute(connection).await;
                assert!(hidden.is_err());
            }
            Ok(())
        }
    }

    pub(super) fn consumer(stage: &Stage, failed: Arc<AtomicBool>) -> (Consumer<Hiding>, Registry) {
        let manager = AsyncDieselConnectionManager::<AsyncPgConnection>::new(stage.database.url());
        let pool = Pool::builder(manager).max_size(4).build().unwrap();
        let registry = Registry::new();
        let handler = Hiding {
            inner: Recorder {
                name: "hiding".to_owned(),
                act: nothing(),
            },
            failed,
        };
        (
            Consumer::new(stage.config(), pool, handler, &registry).unwrap(),
            registry,
        )
    }
}
