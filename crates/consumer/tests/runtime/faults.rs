//! A database or a broker that goes away: waited for, and nothing is parked.

use std::sync::Arc;
use std::time::Duration;

use local_stack::testing::{self, Folder};
use local_stack::wait;

use crate::stage::{Act, LIMIT, Stage, nothing};

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_goes_away_is_waited_for() {
    let folder = Folder::create("consumer-outage");
    let mut postgres = testing::private_postgres(&folder).await.unwrap();
    let stage = Stage::with(2, &postgres.url("postgres"), testing::kafka_brokers()).await;
    stage.publish_all(5, 4).await;
    let instance = stage.start("a", nothing());
    stage.complete(5, 4).await;
    postgres.kill().unwrap();
    for version in 5..=9 {
        for entity in 0..5 {
            stage.publish(&format!("e{entity}"), version).await;
        }
    }
    let problems = wait::until("the outage to be noticed", LIMIT, || async {
        let problems = instance.status.problems();
        Ok((!problems.is_empty()).then_some(problems))
    })
    .await
    .unwrap();
    assert!(
        problems.iter().all(|problem| problem.contains("is waiting")),
        "{problems:?}"
    );
    postgres.start().await.unwrap();
    stage.complete(5, 9).await;
    wait::until("it to be well again", LIMIT, || async {
        Ok(instance.status.problems().is_empty().then_some(()))
    })
    .await
    .unwrap();
    stage.all_committed(45).await;
    assert_eq!(stage.parked().await.unwrap(), []);
    instance.stop().await;
    drop(stage);
    drop(postgres);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_goes_away_is_waited_for() {
    let folder = Folder::create("consumer-broker");
    let mut kafka = testing::private_kafka(&folder).await.unwrap();
    let stage = Stage::with(2, &testing::postgres_url(), kafka.brokers()).await;
    stage.publish_all(4, 3).await;
    let instance = stage.start("a", nothing());
    stage.complete(4, 3).await;
    kafka.kill().unwrap();
    wait::until("the client to notice", LIMIT, || async {
        Ok((instance.metric("consumer_errors_total", "kafka") > 0.0).then_some(()))
    })
    .await
    .unwrap();
    kafka.start().await.unwrap();
    for version in 4..=6 {
        for entity in 0..4 {
            stage.publish(&format!("e{entity}"), version).await;
        }
    }
    stage.complete(4, 6).await;
    assert_eq!(instance.status.problems(), Vec::<String>::new());
    assert_eq!(stage.parked().await.unwrap(), []);
    instance.stop().await;
    drop(kafka);
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_that_die_at_any_moment_leave_all_or_nothing() {
    let stage = Stage::new(4).await;
    // It takes its time, effects and marks written, so that it is caught at it.
    let slow: Act = Arc::new(|_| {
        Box::pin(async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            Ok(())
        })
    });
    let instance = stage.start("a", slow);
    let client = stage.database.connect().await.unwrap();
    let killed = {
        let published = stage.publish_all(20, 30);
        tokio::pin!(published);
        let mut killed = 0_i64;
        loop {
            tokio::select! {
                () = &mut published => break killed,
                () = tokio::time::sleep(Duration::from_millis(7)) => {}
            }
            // Between effect and mark, between mark and commit, wherever they are.
            let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                        WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL";
            killed += client.query_one(kill, &[]).await.unwrap().get::<_, i64>(0);
        }
    };
    assert!(killed > 0, "none was killed");
    stage.complete(20, 30).await;
    stage.all_committed(600).await;
    assert_eq!(stage.parked().await.unwrap(), []);
    instance.stop().await;
}
