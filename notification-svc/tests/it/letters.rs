//! What each mail says, how it is sent, and what is told of it.

use contracts::catalogue::order as orders;
use contracts::shop::order::events::v1 as order_events;
use local_stack::smtp::{self, Tls};

use crate::common::*;

/// Appears in texts that come from events.
const NASTY: &str = "<script>alert('x')</script> & \"co\"";
const ESCAPED: &str = "&#60;script&#62;alert(&#39;x&#39;)&#60;/script&#62; &#38; &#34;co&#34;";

#[tokio::test(flavor = "multi_thread")]
async fn every_mail_says_what_happened() {
    let stage = Stage::new().await;
    let mut replica = stage.start("replica").await;
    let order = Order::new();
    stage.tell_address(&order, "ann@example.org", "Ann").await;
    let placed = stage.tell_placed(&order, None).await;
    let confirmed = stage.tell_confirmed(&order).await;
    let shipped = order_events::OrderShipped {
        order_id: order.id.to_string(),
        tracking_number: "TRACK-1".into(),
        carrier: "Carrier".into(),
        shipped_at: None,
    };
    let shipped = stage.tell(&order, orders::SHIPPED, &shipped).await;
    let refunded = stage.tell_refunded(&order).await;
    let other = Order::new();
    let other_placed = stage.tell_placed(&other, Some("bea@example.org")).await;
    let cancelled = order_events::OrderCancelled {
        order_id: other.id.to_string(),
        cancelled_by: order_events::CancelledBy::OutOfStock.into(),
        reason: "no more of it".into(),
        cancelled_at: None,
    };
    let cancelled = stage.tell(&other, orders::CANCELLED, &cancelled).await;
    // Of no interest.
    stage
        .tell(
            &order,
            orders::COMPLETED,
            &order_events::OrderCompleted::default(),
        )
        .await;

    for (event, subject, parts, template) in [
        (
            &placed,
            "We have your order ",
            vec!["Hello Ann,", "2 x 5.00 EUR", "1 x 2.99 EUR", "Total: 12.99 EUR"],
            "TEMPLATE_ORDER_PLACED",
        ),
        (
            &confirmed,
            "Your order ",
            vec!["is confirmed"],
            "TEMPLATE_ORDER_CONFIRMED",
        ),
        (
            &shipped,
            "Your order ",
            vec!["is on its way with Carrier", "Tracking number: TRACK-1"],
            "TEMPLATE_ORDER_SHIPPED",
        ),
        (
            &refunded,
            "Your money for order ",
            vec!["we have sent 12.99 EUR back", "visa that ends in 4242"],
            "TEMPLATE_PAYMENT_REFUNDED",
        ),
        (
            &cancelled,
            "Your order ",
            vec![
                "Hello,",
                "is cancelled. Something in it is out of stock.",
                "Reason: no more of it",
            ],
            "TEMPLATE_ORDER_CANCELLED",
        ),
    ] {
        stage.until(event.event_id, "sent").await;
        let mail = stage.the_mail(event.event_id);
        let (order, to) = if event.event_id == cancelled.event_id {
            (&other, "bea@example.org")
        } else {
            (&order, "ann@example.org")
        };
        let id = order.id.to_string();
        assert!(mail.header("subject").starts_with(subject), "{mail:?}");
        assert!(mail.header("subject").contains(&id), "{mail:?}");
        assert_eq!((mail.header("from"), mail.header("to")), (FROM, to));
        assert_eq!(
            (mail.sender.as_str(), &mail.recipients[..]),
            ("shop@shop.example", &[to.to_owned()][..])
        );
        assert_eq!(mail.header("auto-submitted"), "auto-generated");
        assert!(
            mail.header("content-type").starts_with("multipart/alternative"),
            "{mail:?}"
        );
        assert!(mail.text.contains(&id) && mail.html.contains(&id), "{mail:?}");
        // HTML says the same, in tags.
        let words = strip_tags(&mail.html);
        for part in parts {
            assert!(mail.text.contains(part), "{part}: {}", mail.text);
            for word in part.split(' ').filter(|word| *word != "x") {
                assert!(words.contains(word), "{word} of {part}: {words}");
            }
        }
        for part in ["Yours,", "Shop"] {
            assert!(words.contains(part) && mail.text.contains(part), "{words}");
        }
        assert!(!mail.text.contains("\n\n\n"), "{}", mail.text);
        assert_eq!(
            (mail.encrypted, mail.login.as_str()),
            (true, smtp::USER),
            "by TLS and with a login"
        );

        // And the others are told, without the address.
        let query = "SELECT payload, correlation_id, traceparent FROM outbox WHERE aggregate_id = $1";
        let row = stage
            .sql
            .query_one(query, &[&event.event_id.to_string()])
            .await
            .expect("one");
        let told = contracts::catalogue::payload_json("notification.sent", 1, row.get(0)).expect("known");
        assert_eq!(told["notificationId"], event.event_id.to_string());
        assert_eq!(told["orderId"], id);
        assert_eq!(told["template"], template);
        assert!(
            told["sentAt"].is_string() && told.as_object().expect("an object").len() == 4,
            "{told}"
        );
        assert_eq!(row.get::<_, uuid::Uuid>(1), order.id);
        assert_eq!(stage.told_sent(event.event_id).await, 1);
    }
    stage.until(other_placed.event_id, "sent").await;
    assert_eq!(stage.smtp.received().expect("mails").len(), 6);

    // The mail continues the trace of what it answers.
    let query = "SELECT traceparent FROM outbox WHERE aggregate_id = $1";
    let row = stage
        .sql
        .query_one(query, &[&placed.event_id.to_string()])
        .await
        .expect("one");
    let trace: String = row.get(0);
    assert_eq!(
        service::telemetry::trace_id(&trace).expect("a trace"),
        order.id.simple().to_string()
    );
    replica.stop().await.expect("stopped");
    stage.is_right();
}

/// What a reader of HTML sees.
fn strip_tags(html: &str) -> String {
    let texts = html.split('<').filter_map(|part| part.split_once('>'));
    texts.map(|(_, text)| text).collect::<Vec<_>>().join(" ")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_from_events_is_escaped() {
    let stage = Stage::with(Tls::StartTls).await;
    let mut replica = stage.start("replica").await;
    let order = Order::new();
    stage.tell_address(&order, "ann@example.org", NASTY).await;
    stage.tell_placed(&order, None).await;
    let shipped = order_events::OrderShipped {
        order_id: order.id.to_string(),
        tracking_number: NASTY.into(),
        carrier: format!("{NASTY}\r\nBcc: eve@example.org"),
        shipped_at: None,
    };
    let shipped = stage.tell(&order, orders::SHIPPED, &shipped).await;
    let other = Order::new();
    stage.tell_placed(&other, Some("bea@example.org")).await;
    let cancelled = order_events::OrderCancelled {
        order_id: other.id.to_string(),
        cancelled_by: order_events::CancelledBy::User.into(),
        reason: format!("{NASTY} \u{fc}"),
        cancelled_at: None,
    };
    let cancelled = stage.tell(&other, orders::CANCELLED, &cancelled).await;
    for (event, times) in [(shipped, 3), (cancelled, 1)] {
        stage.until(event.event_id, "sent").await;
        let mail = stage.the_mail(event.event_id);
        assert!(!mail.html.contains("<script"), "{}", mail.html);
        assert_eq!(mail.html.matches(ESCAPED).count(), times, "{}", mail.html);
        // Plain text is plain.
        assert_eq!(mail.text.matches(NASTY).count(), times, "{}", mail.text);
        assert_eq!(mail.header("bcc"), "");
        assert_eq!(mail.recipients.len(), 1);
        assert!(mail.encrypted, "by STARTTLS");
    }
    replica.stop().await.expect("stopped");
}
