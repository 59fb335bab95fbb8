//! Where mails go: topics arrive in any order relative to each other.

use crate::common::*;

#[tokio::test(flavor = "multi_thread")]
async fn an_orders_own_address_goes_first() {
    let stage = Stage::new().await;
    let mut replica = stage.start("replica").await;
    let order = Order::new();
    stage.tell_address(&order, "ann@example.org", "Ann").await;
    let own = stage.tell_placed(&order, Some("gift@example.org")).await;
    stage.until(own.event_id, "sent").await;
    assert_eq!(stage.the_mail(own.event_id).recipients, ["gift@example.org"]);
    // For its later mails too.
    let confirmed = stage.tell_confirmed(&order).await;
    stage.until(confirmed.event_id, "sent").await;
    assert_eq!(
        stage.the_mail(confirmed.event_id).recipients,
        ["gift@example.org"]
    );
    replica.stop().await.expect("stopped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mail_waits_for_its_address() {
    let stage = Stage::new().await;
    let mut replica = stage.start("replica").await;
    let order = Order::new();
    let placed = stage.tell_placed(&order, None).await;
    let confirmed = stage.tell_confirmed(&order).await;
    stage.until(placed.event_id, "waiting").await;
    stage.until(confirmed.event_id, "waiting").await;
    stage.tell_address(&order, "ann@example.org", "Ann").await;
    stage.until(confirmed.event_id, "sent").await;
    assert_eq!(stage.the_mail(placed.event_id).recipients, ["ann@example.org"]);

    // An order's mails go out in the order of what happened.
    let taken = stage.smtp.received().expect("mails");
    let ids: Vec<_> = taken.iter().map(|mail| mail.header("message-id")).collect();
    let of = |event: &envelope::Envelope| format!("<{}@shop.example>", event.event_id);
    assert_eq!(ids, [of(&placed), of(&confirmed)]);

    // A new address counts from when it is known.
    stage.tell_address(&order, "ann@new.example.org", "Ann").await;
    stage
        .until_count(
            "SELECT count(*) FROM addressees WHERE email = 'ann@new.example.org'",
            1,
        )
        .await;
    let refunded = stage.tell_refunded(&order).await;
    stage.until(refunded.event_id, "sent").await;
    assert_eq!(
        stage.the_mail(refunded.event_id).recipients,
        ["ann@new.example.org"]
    );
    replica.stop().await.expect("stopped");
    stage.is_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refund_may_be_heard_of_before_its_order() {
    let stage = Stage::new().await;
    let mut replica = stage.start("replica").await;
    for own in [None, Some("gift@example.org")] {
        let order = Order::new();
        let refunded = stage.tell_refunded(&order).await;
        stage.until(refunded.event_id, "waiting").await;
        stage.tell_address(&order, "ann@example.org", "Ann").await;
        stage
            .until_count(
                &format!(
                    "SELECT count(*) FROM addressees WHERE email IS NOT NULL AND user_id = '{}'",
                    order.user
                ),
                1,
            )
            .await;
        stage.until(refunded.event_id, "waiting").await;
        let placed = stage.tell_placed(&order, own).await;
        for event in [refunded, placed] {
            stage.until(event.event_id, "sent").await;
            let expected = own.unwrap_or("ann@example.org");
            assert_eq!(stage.the_mail(event.event_id).recipients, [expected]);
        }
    }
    replica.stop().await.expect("stopped");
    stage.is_right();
}

/// Addresses and orders that come at once, from topics of many partitions to two replicas: no mail is left waiting.
#[tokio::test(flavor = "multi_thread")]
async fn no_mail_misses_its_address() {
    let stage = Stage::new().await;
    let mut replicas = [stage.start("one").await, stage.start("two").await];
    let orders: Vec<Order> = (0..150).map(|_| Order::new()).collect();
    let tell_orders = async {
        for order in &orders {
            stage.tell_placed(order, None).await;
        }
    };
    let tell_addresses = async {
        for order in &orders {
            stage
                .tell_address(order, &format!("u{}@example.org", order.user.simple()), "Ann")
                .await;
        }
    };
    let tell_refunds = async {
        for order in &orders {
            stage.tell_refunded(order).await;
        }
    };
    tokio::join!(tell_orders, tell_addresses, tell_refunds);
    stage
        .until_count("SELECT count(*) FROM mails WHERE state = 'sent'", 300)
        .await;
    assert_eq!(stage.smtp.received().expect("mails").len(), 300);
    for replica in &mut replicas {
        replica.stop().await.expect("stopped");
    }
    stage.is_right();
}
