//! Two instances that share a group, and may both hold a record.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use consumer::{HandlerError, RunError};
use local_stack::wait;
use tokio_util::sync::CancellationToken;

use crate::stage::{Act, Instance, LIMIT, Stage, event, headers, metric, nothing};

async fn has_partitions(instance: &Instance, at_least: f64) {
    wait::until("partitions to be assigned", LIMIT, || async {
        Ok((instance.metric("consumer_assigned_partitions", "") >= at_least).then_some(()))
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_come_and_go_under_load() {
    let stage = Arc::new(Stage::new(4).await);
    let publishing = {
        let stage = Arc::clone(&stage);
        tokio::spawn(async move { stage.publish_all(16, 60).await })
    };
    let a = stage.start("a", nothing());
    has_partitions(&a, 1.0).await;
    let b = stage.start("b", nothing());
    has_partitions(&b, 1.0).await;
    stage.reached(100).await;
    a.stop().await;
    let c = stage.start("c", nothing());
    has_partitions(&c, 1.0).await;
    b.abort().await;
    publishing.await.unwrap();
    stage.complete(16, 60).await;
    stage.all_committed(960).await;
    c.stop().await;
    // Both really had a part in it.
    let client = stage.database.connect().await.unwrap();
    let rows = client
        .query("SELECT DISTINCT instance FROM effects", &[])
        .await
        .unwrap();
    assert!(rows.len() >= 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn rebalances_without_end_change_nothing_of_what_takes_effect() {
    const ENTITIES: usize = 100;
    const ROUNDS: usize = 8;
    let stage = Arc::new(Stage::new(6).await);
    let enough = CancellationToken::new();
    // Versions in order, every third of them twice, one entity in a hundred bad from its third on.
    let publishing = tokio::spawn({
        let (stage, enough) = (Arc::clone(&stage), enough.clone());
        async move {
            // No faster than they can be handled on a machine that has more to do.
            let mut pace = tokio::time::interval(Duration::from_millis(100));
            for version in 1.. {
                pace.tick().await;
                let sent = (0..ENTITIES).map(async |entity| {
                    let name = format!("e{entity}");
                    let is_bad = version == 3 && entity % 100 == 50;
                    let payload: &[u8] = if is_bad { b"unreadable" } else { b"payload" };
                    let envelope = event(&name, version);
                    for _ in 0..=usize::from(version % 3 == 0) {
                        stage
                            .produce(Some(&name), Some(payload), headers(&envelope), None)
                            .await;
                    }
                });
                futures::future::join_all(sent).await;
                if enough.is_cancelled() {
                    return version;
                }
            }
            0
        }
    });
    let staying = stage.start_with("stays", stage.roomy(), nothing());
    let client = stage.database.connect().await.unwrap();
    for round in 0..ROUNDS {
        let done = stage.effects().await.unwrap().len();
        let other = stage.start_with(&format!("round-{round}"), stage.roomy(), nothing());
        has_partitions(&other, 1.0).await;
        // Something is done in this assignment, and some of it dies before it is whole.
        stage.reached(done + 50).await;
        let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                    WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL";
        client.query_one(kill, &[]).await.unwrap();
        if round % 2 == 0 {
            other.stop().await;
        } else {
            other.abort().await;
        }
    }
    enough.cancel();
    let versions = publishing.await.unwrap();
    assert!(versions > 3, "{versions}");
    assert!(staying.metric("consumer_rebalances_total", "") >= ROUNDS as f64);
    let repeats = versions / 3;
    stage.all_committed(ENTITIES as i64 * (versions + repeats)).await;
    let expected = stage.expected().await;
    assert_eq!(expected["e50"], [1, 2]);
    assert_eq!(stage.by_entity().await, expected);
    let parked = stage.parked().await.unwrap();
    let bad: Vec<_> = parked.iter().filter(|row| row.kind != "behind").collect();
    assert_eq!(bad.len(), 1, "nothing that was only transient: {bad:?}");
    assert_eq!(parked.len() as i64, versions - 2, "each version once");
    staying.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_static_member_gets_its_partitions_back_without_a_rebalance() {
    let stage = Stage::new(2).await;
    let named = |name: &str| {
        let mut config = stage.config();
        config.instance = Some(name.to_owned());
        config
    };
    let a = stage.start_with("a", named("a"), nothing());
    let b = stage.start_with("b", named("b"), nothing());
    has_partitions(&a, 1.0).await;
    has_partitions(&b, 1.0).await;
    wait::until("one partition each", LIMIT, || async {
        Ok((a.metric("consumer_assigned_partitions", "") == 1.0).then_some(()))
    })
    .await
    .unwrap();
    let before = b.metric("consumer_rebalances_total", "");
    a.stop().await;
    let a = stage.start_with("a", named("a"), nothing());
    has_partitions(&a, 1.0).await;
    stage.publish_all(8, 3).await;
    stage.complete(8, 3).await;
    assert_eq!(b.metric("consumer_rebalances_total", ""), before);
    a.stop().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_of_the_same_name_fences_the_first() {
    let stage = Stage::new(1).await;
    let mut config = stage.config();
    config.instance = Some("the-only-one".to_owned());
    let first = stage.start_with("first", config.clone(), nothing());
    has_partitions(&first, 1.0).await;
    let second = stage.start_with("second", config, nothing());
    assert!(matches!(first.ended().await, Err(RunError::Fatal(_))));
    stage.publish_all(2, 2).await;
    stage.complete(2, 2).await;
    second.stop().await;
}

/// An instance whose process stands still in the middle of a transaction, past the time that the group waits for it.
///
/// It has a thread of its own, which the handler blocks: nothing of it runs, and it cannot notice anything.
struct Frozen {
    released: Arc<AtomicBool>,
    reached: Arc<AtomicBool>,
    shutdown: CancellationToken,
    registry: prometheus::Registry,
    thread: std::thread::JoinHandle<()>,
}

fn freeze(stage: &Stage, idle_transaction_timeout: Duration) -> Frozen {
    let released = Arc::new(AtomicBool::new(false));
    let reached = Arc::new(AtomicBool::new(false));
    let act: Act = {
        let (released, reached) = (Arc::clone(&released), Arc::clone(&reached));
        Arc::new(move |_| {
            // Effects and marks are written, nothing is committed.
            reached.store(true, Ordering::SeqCst);
            while !released.load(Ordering::SeqCst) {
                std::thread::park_timeout(Duration::from_millis(5));
            }
            Box::pin(async { Ok::<(), HandlerError>(()) })
        })
    };
    let mut config = stage.config();
    config.idle_transaction_timeout = idle_transaction_timeout;
    config.transaction_timeout = LIMIT;
    config
        .properties
        .insert("max.poll.interval.ms".into(), "6000".into());
    let (consumer, registry) = stage.consumer("zombie", config, act);
    let shutdown = CancellationToken::new();
    let thread = std::thread::spawn({
        let shutdown = shutdown.clone();
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(consumer.run(shutdown)).unwrap();
        }
    });
    Frozen {
        released,
        reached,
        shutdown,
        registry,
        thread,
    }
}

impl Frozen {
    async fn is_frozen(&self) {
        wait::until("the zombie to stand still", LIMIT, || async {
            Ok(self.reached.load(Ordering::SeqCst).then_some(()))
        })
        .await
        .unwrap();
    }

    fn thaw(&self) {
        self.released.store(true, Ordering::SeqCst);
    }

    async fn end(self) {
        self.shutdown.cancel();
        tokio::task::spawn_blocking(|| self.thread.join().unwrap())
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_that_holds_the_marks_is_cut_off_and_changes_nothing() {
    let stage = Stage::new(1).await;
    stage.publish_all(5, 4).await;
    let zombie = freeze(&stage, Duration::from_secs(1));
    zombie.is_frozen().await;
    let heir = stage.start("heir", nothing());
    // The heir gets the partition, waits for the marks, and has them once PostgreSQL ends the zombie's transaction.
    stage.complete(5, 4).await;
    zombie.thaw();
    // What the zombie believes to have done never happened; it comes back, tries again, and finds repeats.
    stage.publish_all(1, 4).await;
    wait::until("the zombie to be back", LIMIT, || async {
        let idle = metric(&zombie.registry, "consumer_in_flight_records", "") == 0.0;
        Ok((idle && metric(&zombie.registry, "consumer_retries_total", "") > 0.0).then_some(()))
    })
    .await
    .unwrap();
    zombie.end().await;
    heir.stop().await;
    stage.complete(5, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_that_commits_while_its_heir_waits_has_done_it_alone() {
    let stage = Stage::new(1).await;
    stage.publish_all(1, 4).await;
    let zombie = freeze(&stage, LIMIT);
    zombie.is_frozen().await;
    let heir = stage.start("heir", nothing());
    let client = stage.database.connect().await.unwrap();
    wait::until("the heir to wait for the marks", LIMIT, || async {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        Ok((client.query_one(waiting, &[]).await?.get::<_, i64>(0) > 0).then_some(()))
    })
    .await
    .unwrap();
    zombie.thaw();
    wait::until("the heir to see that it was late", LIMIT, || async {
        Ok((heir.metric("consumer_errors_total", "conflict") > 0.0).then_some(()))
    })
    .await
    .unwrap();
    stage.complete(1, 4).await;
    stage.all_committed(4).await;
    zombie.end().await;
    heir.stop().await;
    stage.complete(1, 4).await;
}
