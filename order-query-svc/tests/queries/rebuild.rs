//! The views built anew beside the live ones.

use std::sync::Arc;
use std::time::Duration;

use consumer::{Rebuild, RebuildError, Run, Which};
use contracts::shop::notification::events::v1::Template;
use local_stack::testing::events::envelope;
use local_stack::wait;
use order_query_svc::projection::Projection;
use order_query_svc::store;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::stage::{
    LIMIT, Stage, cancelled, failed, held, mailed, paid, placed, projection, received, reserved,
};

fn rebuild(stage: &Stage) -> Rebuild<Projection> {
    let mut config = stage.config("").projection;
    // Small, so that it can be interrupted.
    config.batch_records = 50;
    Rebuild::new(
        config,
        stage.pool(),
        || store::MIGRATIONS,
        projection(),
        &prometheus::Registry::new(),
    )
    .unwrap()
}

/// Events of what [`publish_order`] publishes.
const PER_ORDER: i64 = 6;

/// Everything that the views and journeys say.
async fn dump(stage: &Stage) -> Vec<String> {
    let mut rows = stage.rows("SELECT v::text FROM order_views v ORDER BY 1").await;
    rows.extend(stage.rows("SELECT j::text FROM order_journey j ORDER BY 1").await);
    rows.extend(
        stage
            .rows("SELECT p::text FROM order_payments p ORDER BY 1")
            .await,
    );
    rows.extend(
        stage
            .rows(
                "SELECT format('%s %s %s %s', topic, entity_id, version, parked) FROM consumer_marks m \
                 WHERE generation = coalesce((SELECT live FROM consumer_generations g WHERE g.consumer = m.consumer), 1) \
                 ORDER BY 1",
            )
            .await,
    );
    rows
}

async fn publish_order(stage: &Stage, user: Uuid, number: i64) -> Uuid {
    let (order, payment) = (Uuid::now_v7(), Uuid::now_v7());
    stage.publish(order, 1, placed(user, number)).await;
    stage.publish(order, 2, reserved()).await;
    if number % 3 == 0 {
        stage
            .publish_payment(payment, 1, number, failed(order, 1, false))
            .await;
        stage.publish(order, 3, cancelled()).await;
    } else {
        stage.publish_payment(payment, 1, number, received(order)).await;
        stage.publish(order, 3, paid(payment)).await;
    }
    let mail = envelope(
        "notification",
        &Uuid::now_v7().to_string(),
        1,
        "notification.sent",
    );
    // The relay says it twice.
    for _ in 0..2 {
        let (_, sent) = mailed(order, Template::OrderPlaced);
        stage.mails.publish(&mail, &sent).await.unwrap();
    }
    stage.publish_reservation(order, 1, held(order)).await;
    order
}

#[tokio::test(flavor = "multi_thread")]
async fn the_result_is_the_same_and_takes_over_under_load_although_it_is_killed() {
    const ORDERS: i64 = 400;
    let stage = Arc::new(Stage::new().await);
    let replicas = stage.two_replicas().await;
    let user = Uuid::now_v7();
    // One that was given up, and one that is parked.
    let (given_up, parked) = (Uuid::now_v7(), Uuid::now_v7());
    for order in [given_up, parked] {
        stage.publish(order, 1, placed(user, 1)).await;
        stage
            .publish(order, 2, ("order.paid", b"\xff\xff".to_vec()))
            .await;
        stage.publish(order, 3, reserved()).await;
    }
    let listed = wait::until("both to be parked", LIMIT, || async {
        let listed = stage.redrive().list(false, 100).await?;
        Ok((listed.len() == 4).then_some(listed))
    })
    .await
    .unwrap();
    let first = listed
        .iter()
        .find(|row| row.entity_id.as_deref() == Some(&given_up.to_string()));
    stage
        .redrive()
        .discard(first.unwrap().id, "a test", "tester")
        .await
        .unwrap();
    let publish = async |from: i64| {
        let numbers: Vec<i64> = (from..from + ORDERS).collect();
        for few in numbers.chunks(50) {
            futures::future::join_all(few.iter().map(|number| publish_order(&stage, user, *number))).await;
        }
    };
    publish(0).await;
    let apart = 3 + 1;
    stage.applied(ORDERS * PER_ORDER + apart).await;

    // Something that no event says, and that a rebuild must therefore not have.
    let client = stage.database.connect().await.unwrap();
    let right = dump(&stage).await;
    client
        .batch_execute(
            "UPDATE order_views SET carrier = 'nobody'; UPDATE order_journey SET topic = 'nobody' WHERE version = 1; \
             DELETE FROM order_journey WHERE version = 2",
        )
        .await
        .unwrap();

    // It dies on the way, twice.
    for marks in [100, 600] {
        let doomed = tokio::spawn({
            let rebuild = rebuild(&stage);
            async move { rebuild.run(|_| {}, &CancellationToken::new()).await }
        });
        wait::until("some of it to be done", LIMIT, || async {
            let sql = "SELECT count(*)::text FROM consumer_marks WHERE generation = 2";
            let done: i64 = stage.rows(sql).await[0].parse()?;
            Ok((done >= marks || doomed.is_finished()).then_some(()))
        })
        .await
        .unwrap();
        doomed.abort();
        let _ = doomed.await;
    }
    let view = replicas[0].view(user, given_up, 0).await.unwrap();
    assert_eq!(view.version, 3, "the old one serves");
    let refused = stage.redrive().replay(&Which::All, Run::Real, "tester").await;
    assert!(
        refused.is_err()
            || stage
                .rows("SELECT rebuilding::text FROM consumer_generations")
                .await
                .is_empty()
    );

    // And comes to its end while more events come.
    let more = tokio::spawn({
        let stage = Arc::clone(&stage);
        async move {
            for number in 0..ORDERS {
                publish_order(&stage, user, 1_000 + number).await;
            }
        }
    });
    let told = std::sync::Mutex::new(Vec::new());
    let rebuilt = rebuild(&stage)
        .run(
            |progress| told.lock().unwrap().push(progress),
            &CancellationToken::new(),
        )
        .await
        .unwrap();
    assert_eq!(rebuilt.generation, 2);
    assert!(rebuilt.swap < Duration::from_secs(6), "{rebuilt:?}");
    let last = *told.lock().unwrap().last().unwrap();
    assert_eq!(last.done, last.total);
    more.await.unwrap();
    stage.applied(2 * ORDERS * PER_ORDER + apart).await;
    let now = dump(&stage).await;
    for row in &right {
        assert!(now.contains(row), "{row}");
    }
    assert_eq!(
        stage
            .rows(
                "SELECT 'x' FROM order_views WHERE carrier <> '' UNION ALL SELECT 'x' FROM order_journey WHERE topic = 'nobody'"
            )
            .await,
        [""; 0]
    );
    // The live one reads and writes the new tables: every order, from any replica.
    let order = publish_order(&stage, user, 5_000).await;
    for replica in &replicas {
        assert_eq!(replica.view(user, order, 3).await.unwrap().version, 3);
    }
    // No second dead letters; what is parked is parked still, and can be given up.
    assert_eq!(stage.rows("SELECT count(*)::text FROM dead_letters").await, ["4"]);
    let listed = stage.redrive().list(false, 100).await.unwrap();
    assert_eq!(
        listed.iter().map(|row| row.version).collect::<Vec<_>>(),
        [Some(2), Some(3)]
    );
    assert!(
        listed
            .iter()
            .all(|row| row.generation == 2 && row.entity_id == Some(parked.to_string()))
    );
    stage
        .redrive()
        .discard(listed[0].id, "a test", "tester")
        .await
        .unwrap();
    assert_eq!(replicas[1].view(user, parked, 3).await.unwrap().version, 3);
    assert_eq!(
        stage
            .rows("SELECT DISTINCT generation::text FROM consumer_marks")
            .await,
        ["2"]
    );
    for replica in replicas {
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_does_not_take_over_when_it_knows_less() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let user = Uuid::now_v7();
    let (order, spoiled) = (publish_order(&stage, user, 1).await, Uuid::now_v7());
    // The live one knows it from elsewhere, as it were: the topic has it damaged.
    stage
        .publish(spoiled, 1, ("order.placed", b"\xff\xff".to_vec()))
        .await;
    stage.applied(PER_ORDER).await;
    wait::until("it to be parked", LIMIT, || async {
        Ok((stage.redrive().list(false, 9).await?.len() == 1).then_some(()))
    })
    .await
    .unwrap();
    let client = stage.database.connect().await.unwrap();
    client
        .batch_execute("UPDATE parked_records SET state = 'replayed', settled_at = now()")
        .await
        .unwrap();
    let before = dump(&stage).await;
    let refused = rebuild(&stage).run(|_| {}, &CancellationToken::new()).await;
    assert!(matches!(refused, Err(RebuildError::Parked(1, 2))), "{refused:?}");
    assert_eq!(dump(&stage).await, before);
    assert_eq!(rebuild(&stage).abandon().await.unwrap(), 2);
    assert!(matches!(
        rebuild(&stage).abandon().await,
        Err(RebuildError::Nothing)
    ));
    assert_eq!(
        stage
            .rows("SELECT nspname::text FROM pg_namespace WHERE nspname LIKE 'rebuild%'")
            .await,
        [""; 0]
    );
    assert_eq!(replica.view(user, order, 3).await.unwrap().version, 3);
    replica.stop().await;
}
