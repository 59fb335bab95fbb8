//! A database or a broker that goes away: waited for, and nothing is parked.

use std::sync::Arc;
use std::time::Duration;

use consumer::{Config, Topic};
use local_stack::testing::{self, Folder};
use local_stack::{Postgres, wait};

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
    stage.publish_all(4, 30).await;
    let slow: Act = Arc::new(|_| {
        Box::pin(async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            Ok(())
        })
    });
    let instance = stage.start("a", slow);
    // In the middle of its work.
    stage.reached(10).await;
    kafka.kill().unwrap();
    assert!(stage.effects().await.unwrap().len() < 120);
    wait::until("the client to notice", LIMIT, || async {
        Ok((instance.metric("consumer_errors_total", "kafka") > 0.0).then_some(()))
    })
    .await
    .unwrap();
    kafka.start().await.unwrap();
    for version in 31..=33 {
        for entity in 0..4 {
            stage.publish(&format!("e{entity}"), version).await;
        }
    }
    stage.complete(4, 33).await;
    stage.all_committed(132).await;
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

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
async fn a_value_that_does_not_fit_parks_in_whatever_language_the_database_says_so() {
    let folder = Folder::create("consumer-language");
    let builder = Postgres::builder(folder.path().join("postgres"))
        .fsync(false)
        .language("de");
    let postgres = builder.start().await.unwrap();
    let stage = Stage::with(1, &postgres.url("postgres"), testing::kafka_brokers()).await;
    let client = stage.database.connect().await.unwrap();
    let refused = client.simple_query("SELECT 100000::smallint").await.unwrap_err();
    if refused.as_db_error().unwrap().message().contains("out of range") {
        // As in the images of containers, from which translations were left out.
        eprintln!("skipped: PostgreSQL's translations are not installed here");
        return;
    }
    let role = "CREATE ROLE app LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public TO app; \
                ALTER TABLE effects ALTER COLUMN version TYPE smallint";
    client.batch_execute(role).await.unwrap();
    let config = Config {
        topics: vec![Topic::baseline(&stage.topic)],
        ..stage.config()
    };
    stage.publish("good", 1).await;
    stage.publish("bad", 40_000).await;
    stage.publish("good", 2).await;
    // Who may not choose the language cannot tell, and waits.
    let stage = stage.with_role("app");
    let instance = stage.start_with("a", config, nothing());
    wait::until("it to wait", LIMIT, || async {
        Ok((instance.metric("consumer_errors_total", "database") >= 3.0).then_some(()))
    })
    .await
    .unwrap();
    assert_eq!(stage.parked().await.unwrap(), []);
    let grant = "GRANT SET ON PARAMETER lc_messages TO app";
    client.batch_execute(grant).await.unwrap();
    let parked = stage.parks(1).await;
    assert_eq!(
        (parked[0].entity.as_deref(), parked[0].kind.as_str()),
        (Some("bad"), "refused")
    );
    stage.all_committed(3).await;
    assert_eq!(stage.versions("good").await, [1, 2]);
    instance.stop().await;
    drop(stage);
    drop(postgres);
}
