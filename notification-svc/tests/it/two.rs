//! Several replicas under load, and events that come again.

use std::collections::BTreeMap;

use crate::common::*;

/// How often each message was taken, by its id.
fn taken(stage: &Stage) -> BTreeMap<String, usize> {
    let mut taken = BTreeMap::new();
    for mail in stage.smtp.received().expect("mails") {
        *taken.entry(mail.header("message-id").to_owned()).or_default() += 1;
    }
    taken
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_the_work_and_send_each_mail_once() {
    let stage = Stage::new().await;
    let mut replicas = [stage.start("one").await, stage.start("two").await];
    for number in 0..200 {
        let order = Order::new();
        stage
            .tell_placed(&order, Some(&format!("u{number}@example.org")))
            .await;
        stage.tell_confirmed(&order).await;
    }
    stage
        .until_count("SELECT count(*) FROM mails WHERE state = 'sent'", 400)
        .await;
    let taken = taken(&stage);
    assert_eq!(taken.len(), 400);
    assert!(taken.values().all(|times| *times == 1), "{taken:?}");
    stage.until_count("SELECT count(*) FROM outbox", 400).await;
    // Both had a hand in it.
    for replica in &mut replicas {
        let log = std::fs::read_to_string(replica.log()).expect("a log");
        assert!(
            log.contains("recorded notification.sent"),
            "{} did nothing",
            replica.name()
        );
        replica.stop().await.expect("stopped");
    }
    stage.is_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_is_killed_again_and_again() {
    let stage = Stage::new().await;
    let mut killed = stage.start("killed").await;
    let mut steady = stage.start("steady").await;
    for number in 0..120 {
        let order = Order::new();
        stage
            .tell_placed(&order, Some(&format!("u{number}@example.org")))
            .await;
        if number % 30 == 29 {
            killed.kill().expect("killed");
            killed.start().await.expect("started again");
        }
    }
    stage
        .until_count(
            "SELECT count(*) FROM mails WHERE state IN ('sent', 'unknown')",
            120,
        )
        .await;
    let taken = taken(&stage);
    assert!(taken.values().all(|times| *times == 1), "{taken:?}");
    // Whatever was not taken is unknown, and what is sent was taken.
    let row = stage
        .sql
        .query_one("SELECT count(*) FROM mails WHERE state = 'sent'", &[])
        .await
        .expect("answered");
    let sent = usize::try_from(row.get::<_, i64>(0)).expect("few");
    assert!(
        (sent..=120).contains(&taken.len()),
        "{sent} sent, {} taken",
        taken.len()
    );
    for replica in [&mut killed, &mut steady] {
        replica.stop().await.expect("stopped");
    }
    stage.is_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_come_again_change_nothing() {
    let stage = Stage::new().await;
    let mut replica = stage.start("replica").await;
    let order = Order::new();
    let address = stage.tell_address(&order, "ann@example.org", "Ann").await;
    let placed = stage.tell_placed(&order, None).await;
    let confirmed = stage.tell_confirmed(&order).await;
    stage.until(confirmed.event_id, "sent").await;

    // As a relay repeats them after a crash.
    use prost::Message as _;
    let user = contracts::shop::user::events::v1::UserCreated {
        user_id: order.user.to_string(),
        email: "ann@example.org".into(),
        first_name: "Ann".into(),
        last_name: "Lastname".into(),
        created_at: None,
    };
    let payload = order.placed(None).encode_to_vec();
    stage
        .users
        .publish(&address, &user.encode_to_vec())
        .await
        .expect("published");
    stage.orders.publish(&placed, &payload).await.expect("published");
    // Behind a group that forgot how far it was.
    replica.stop().await.expect("stopped");
    let mut replica = stage
        .process("again")
        .set("consumer.group", local_stack::testing::unique("notification-svc"))
        .start()
        .await
        .expect("started");
    let other = Order::new();
    let last = stage.tell_placed(&other, Some("bea@example.org")).await;
    stage.until(last.event_id, "sent").await;
    stage.until_count("SELECT count(*) FROM mails", 3).await;
    let taken = taken(&stage);
    assert!(
        taken.len() == 3 && taken.values().all(|times| *times == 1),
        "{taken:?}"
    );
    stage.until_count("SELECT count(*) FROM outbox", 3).await;
    replica.stop().await.expect("stopped");
    stage.is_right();
}
