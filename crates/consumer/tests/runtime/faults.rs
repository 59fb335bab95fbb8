//! Records that cannot be handled, a database that goes away, handlers that die.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use consumer::{HandlerError, RunError};
use envelope::header;
use local_stack::testing::{self, Folder};
use local_stack::wait;
use rdkafka::message::{Header, Headers as _, OwnedHeaders};

use crate::stage::{LIMIT, Stage, event, headers, nothing};

fn without(headers: &OwnedHeaders, name: &str) -> OwnedHeaders {
    headers
        .iter()
        .filter(|header| header.key != name)
        .fold(OwnedHeaders::new(), |kept, header| kept.insert(header))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_record_halts_its_own_partition_and_no_other() {
    const GOOD: i32 = 7;
    let stage = Stage::new(GOOD + 1).await;
    let fine = |entity: &str, version| headers(&event(entity, version));
    // In each partition, two good records, a bad one, and one more.
    for partition in 0..=GOOD {
        for version in [1, 2] {
            let entity = format!("p{partition}");
            let sent = (
                Some(entity.as_str()),
                Some(b"x".as_slice()),
                fine(&entity, version),
            );
            stage.produce(sent.0, sent.1, sent.2, Some(partition)).await;
        }
    }
    let bad = fine("bad", 1);
    stage.produce(Some("bad"), None, bad.clone(), Some(0)).await;
    stage
        .produce(Some("bad"), Some(b"x"), OwnedHeaders::new(), Some(1))
        .await;
    stage
        .produce(Some("bad"), Some(b"x"), without(&bad, header::CE_ID), Some(2))
        .await;
    let repeated = bad.clone().insert(Header {
        key: header::CE_ID,
        value: Some("x"),
    });
    stage.produce(Some("bad"), Some(b"x"), repeated, Some(3)).await;
    stage
        .produce(Some("other"), Some(b"x"), bad.clone(), Some(4))
        .await;
    stage.produce(None, Some(b"x"), bad, Some(5)).await;
    stage
        .produce(Some("p6"), Some(b"x"), fine("p6", 4), Some(6))
        .await;
    stage
        .produce(Some("refused"), Some(b"x"), fine("refused", 1), Some(GOOD))
        .await;
    for partition in 0..=GOOD {
        let entity = format!("p{partition}");
        let version = if partition == 6 { 5 } else { 3 };
        stage
            .produce(Some(&entity), Some(b"x"), fine(&entity, version), Some(partition))
            .await;
    }
    let refuse: crate::stage::Act = Arc::new(|seen: Vec<(String, i64)>| {
        Box::pin(async move {
            match seen.iter().position(|(entity, _)| entity == "refused") {
                Some(position) => Err(HandlerError::permanent(position, "not this one")),
                None => Ok(()),
            }
        })
    });
    let mut config = stage.config();
    config.workers = 2;
    let instance = stage.start_with("a", config, refuse);
    let problems = wait::until("every bad record to be found", LIMIT, || async {
        let problems = instance.status.problems();
        Ok((problems.len() == 8).then_some(problems))
    })
    .await
    .unwrap();
    for (partition, reason) in [
        (0, "it has no value"),
        (1, "header ce_specversion is missing"),
        (2, "header ce_id is missing"),
        (3, "header ce_id appears more than once"),
        (4, "its key is not the entity id"),
        (5, "it has no key"),
        (6, "version 4 of the entity came where 3 was expected"),
        (GOOD, "not this one"),
    ] {
        let place = format!("{}/{partition} is halted", stage.topic);
        assert!(
            problems
                .iter()
                .any(|problem| problem.contains(&place) && problem.contains(reason)),
            "{partition}: {problems:?}"
        );
    }
    assert_eq!(instance.metric("consumer_halted_partitions", ""), 8.0);
    // What stood before the bad records is done and committed, and no offset is behind one.
    wait::until("offsets up to the bad records", LIMIT, || async {
        Ok(stage
            .committed()
            .await
            .values()
            .all(|offset| *offset == 2)
            .then_some(()))
    })
    .await
    .unwrap();
    let effects = stage.effects().await.unwrap();
    assert!((0..=GOOD).all(|partition| {
        let mine = effects
            .iter()
            .filter(|(entity, _)| *entity == format!("p{partition}"));
        mine.map(|(_, version)| *version).take(2).eq([1, 2])
    }));
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_one_partition_is_halted_the_others_go_on() {
    let stage = Stage::new(2).await;
    stage
        .produce(Some("bad"), Some(b"x"), OwnedHeaders::new(), Some(0))
        .await;
    let instance = stage.start("a", nothing());
    wait::until("the halt", LIMIT, || async {
        Ok((!instance.status.problems().is_empty()).then_some(()))
    })
    .await
    .unwrap();
    for version in 1..=50 {
        stage
            .produce(
                Some("good"),
                Some(b"x"),
                headers(&event("good", version)),
                Some(1),
            )
            .await;
    }
    stage.complete(1, 50).await;
    instance.stop().await;
    // A restart comes to the same record, and loses nothing behind it.
    let instance = stage.start("b", nothing());
    wait::until("the halt again", LIMIT, || async {
        Ok((!instance.status.problems().is_empty()).then_some(()))
    })
    .await
    .unwrap();
    assert_eq!(stage.committed().await[&0], 0);
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unnamed_bad_record_is_found_and_the_rest_of_the_batch_is_applied() {
    let stage = Stage::new(2).await;
    let client = stage.database.connect().await.unwrap();
    client
        .batch_execute("ALTER TABLE effects ADD CHECK (entity <> 'bad')")
        .await
        .unwrap();
    for version in 1..=20 {
        stage
            .produce(
                Some("good"),
                Some(b"x"),
                headers(&event("good", version)),
                Some(1),
            )
            .await;
    }
    stage
        .produce(Some("bad"), Some(b"x"), headers(&event("bad", 1)), Some(0))
        .await;
    let mut config = stage.config();
    // One worker, so that both partitions share batches.
    config.workers = 1;
    let instance = stage.start_with("a", config, nothing());
    stage.complete(1, 20).await;
    wait::until("the halt", LIMIT, || async {
        Ok((!instance.status.problems().is_empty()).then_some(()))
    })
    .await
    .unwrap();
    assert!(instance.status.problems()[0].contains("violates check constraint"));
    instance.stop().await;
}

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
    instance.stop().await;
    drop(kafka);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_panics_ends_the_consumer_and_its_transaction() {
    let stage = Stage::new(1).await;
    stage.publish_all(2, 5).await;
    let panicked = Arc::new(AtomicBool::new(false));
    let act = {
        let panicked = Arc::clone(&panicked);
        Arc::new(move |seen: Vec<(String, i64)>| {
            let panicked = Arc::clone(&panicked);
            Box::pin(async move {
                // Effects and marks are written, the transaction is open.
                let third = seen.iter().any(|(_, version)| *version == 3);
                assert!(
                    !third || panicked.swap(true, Ordering::SeqCst),
                    "as the test wants it"
                );
                Ok(())
            }) as _
        })
    };
    let instance = stage.start("a", act);
    assert!(matches!(instance.ended().await, Err(RunError::Worker(_))));
    assert!(panicked.load(Ordering::SeqCst));
    let instance = stage.start("b", nothing());
    stage.complete(2, 5).await;
    instance.stop().await;
}
