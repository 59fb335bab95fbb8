//! kill -9 between any two steps: no mail is lost or sent twice, and one that may have been sent is unknown.

use notification_svc::failpoints as points;

use crate::common::*;

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_reading_events() {
    let stage = Stage::new().await;
    let order = Order::new();
    let placed = stage.tell_placed(&order, Some("ann@example.org")).await.event_id;
    let point = points::EVENTS_BEFORE_COMMIT;
    let mut killed = stage.start_to_die("killed", point).await;
    dies(&mut killed, point).await;
    stage.until_count("SELECT count(*) FROM mails", 0).await;
    let mut next = stage.start("next").await;
    stage.until(placed, "sent").await;
    stage.the_mail(placed);
    next.stop().await.expect("stopped");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_between_the_mail_server_and_sent() {
    let stage = Stage::new().await;
    for (point, taken) in [(points::MAIL_TAKEN, 1), (points::MAIL_CLAIMED, 0)] {
        let order = Order::new();
        let placed = stage.tell_placed(&order, Some("ann@example.org")).await.event_id;
        let mut killed = stage.start_to_die("killed", point).await;
        dies(&mut killed, point).await;
        assert_eq!(stage.taken(placed).len(), taken, "{point}");
        stage.until(placed, "sending").await;

        // Whoever comes next finds the lease passed, says so, and sends what comes after.
        let mut next = stage.start("next").await;
        let confirmed = stage.tell_confirmed(&order).await.event_id;
        stage.until(placed, "unknown").await;
        assert_eq!(stage.trouble(placed).await, "lease_passed");
        stage.until(confirmed, "sent").await;
        let (_, listed, _) = stage.command(&["mails", "list", "--state", "unknown", "--json"]);
        let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
        let listed = listed.as_array().expect("a list");
        assert!(
            listed
                .iter()
                .any(|mail| mail["notification_id"] == placed.to_string()
                    && mail["attempt_by"].is_string()
                    && mail["trouble"] == "lease_passed"),
            "{listed:?}"
        );
        assert_eq!(stage.taken(placed).len(), taken, "not sent again");
        assert_eq!(stage.told_sent(placed).await, 0);
        next.stop().await.expect("stopped");
        stage.is_right();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_after_sent() {
    let stage = Stage::new().await;
    let order = Order::new();
    let placed = stage.tell_placed(&order, Some("ann@example.org")).await.event_id;
    let point = points::OUTCOME_STORED;
    let mut killed = stage.start_to_die("killed", point).await;
    dies(&mut killed, point).await;
    stage.until(placed, "sent").await;
    let mut next = stage.start("next").await;
    let confirmed = stage.tell_confirmed(&order).await.event_id;
    stage.until(confirmed, "sent").await;
    stage.the_mail(placed);
    assert_eq!(stage.told_sent(placed).await, 1);
    next.stop().await.expect("stopped");
    stage.is_right();
}

/// A process that was stopped beyond its lease does not send what it holds when it comes back: time has run out by then.
#[tokio::test(flavor = "multi_thread")]
async fn stopped_beyond_the_lease() {
    let stage = Stage::new().await;
    let mut stopped = stage.start("stopped").await;
    let order = Order::new();
    let held = stage
        .tell_placed(&order, Some("rcpt-hang-once@example.org"))
        .await
        .event_id;
    stage.until(held, "sending").await;
    stopped.pause().expect("paused");
    let mut next = stage.start("next").await;
    stage.until(held, "unknown").await;
    stopped.resume().expect("resumed");
    let confirmed = stage.tell_confirmed(&order).await.event_id;
    stage.until(confirmed, "sent").await;
    for replica in [&mut stopped, &mut next] {
        replica.stop().await.expect("stopped");
    }
    stage.until(held, "unknown").await;
    assert!(stage.taken(held).is_empty());
    stage.is_right();
}
