//! What the mail server may answer, or not, at each step.

use crate::common::*;

/// Each address misbehaves in its own way; all at once, so that one does not hold up another.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_surely_not_taken_is_tried_again_or_refused() {
    let stage = Stage::new().await;
    let mut replica = stage.start("replica").await;
    let mut told = Vec::new();
    for (address, state, trouble) in [
        // For now.
        ("rcpt-451-once@example.org", "sent", ""),
        ("data-451-once@example.org", "sent", ""),
        ("rcpt-421-once@example.org", "sent", ""),
        ("rcpt-drop-once@example.org", "sent", ""),
        ("rcpt-hang-once@example.org", "sent", ""),
        // For good.
        ("rcpt-550@example.org", "failed", "recipient_refused"),
        ("data-554@example.org", "failed", "message_refused"),
        ("no address", "failed", "address_invalid"),
        // Handed over, and no answer: it may have been taken, or not.
        ("take-drop@example.org", "unknown", "no_answer"),
        ("take-hang@example.org", "unknown", "no_answer"),
        ("data-drop@example.org", "unknown", "no_answer"),
        ("data-hang@example.org", "unknown", "no_answer"),
        ("fine@example.org", "sent", ""),
    ] {
        let order = Order::new();
        let placed = stage.tell_placed(&order, Some(address)).await;
        told.push((placed.event_id, address, state, trouble));
    }
    for (mail, address, state, trouble) in &told {
        stage.until(*mail, state).await;
        assert_eq!(stage.trouble(*mail).await, *trouble, "{address}");
        let taken = stage.taken(*mail).len();
        let expected = usize::from(*state == "sent" || address.starts_with("take-"));
        assert_eq!(taken, expected, "{address}");
        assert_eq!(
            stage.told_sent(*mail).await,
            i64::from(*state == "sent"),
            "{address}"
        );
    }
    // Put off and put off again, and neither failed nor forgotten.
    let order = Order::new();
    let put_off = stage
        .tell_placed(&order, Some("rcpt-452@example.org"))
        .await
        .event_id;
    let query = format!("SELECT count(*) FROM mails WHERE notification_id = '{put_off}' AND tries > 2");
    stage.until_count(&query, 1).await;
    assert_eq!(stage.trouble(put_off).await, "recipient_deferred");

    // What is unknown stays so, also for who comes next.
    replica.stop().await.expect("stopped");
    let mut next = stage.start("next").await;
    let order = Order::new();
    let later = stage
        .tell_placed(&order, Some("later@example.org"))
        .await
        .event_id;
    stage.until(later, "sent").await;
    for (mail, address, state, _) in &told {
        stage.until(*mail, state).await;
        assert!(stage.taken(*mail).len() <= 1, "{address}");
    }
    next.stop().await.expect("stopped");
    stage.is_right();

    // Nothing personal, and nothing of what the mail server says, which may be.
    for name in ["replica", "next"] {
        let log = std::fs::read_to_string(stage.folder.path().join(format!("{name}.log"))).expect("a log");
        for personal in ["example.org", "no address", "as asked for"] {
            assert!(!log.contains(personal), "{personal} in {log}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn international_addresses_are_written_to() {
    let stage = Stage::new().await;
    let mut replica = stage.start("replica").await;
    let order = Order::new();
    let address = "\u{fc}nal@b\u{fc}cher.example";
    stage.tell_address(&order, address, "\u{dc}nal").await;
    let placed = stage.tell_placed(&order, None).await;
    stage.until(placed.event_id, "sent").await;
    let mail = stage.the_mail(placed.event_id);
    assert_eq!(mail.recipients, [address]);
    assert!(mail.text.starts_with("Hello \u{dc}nal,\n"), "{}", mail.text);
    replica.stop().await.expect("stopped");
}

/// At a stop, what is being sent is ended or given back.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_leaves_nothing_half_done() {
    let stage = Stage::new().await;
    let mut replica = stage
        .process("replica")
        .set("smtp.timeout", "60s")
        .set("smtp.data_timeout", "60s")
        .set("mails.lease", "130s")
        .set("mails.drain", "200ms")
        .start()
        .await
        .expect("started");
    let (before, after) = (Order::new(), Order::new());
    let before = stage
        .tell_placed(&before, Some("rcpt-hang-once@example.org"))
        .await
        .event_id;
    let after = stage
        .tell_placed(&after, Some("take-hang@example.org"))
        .await
        .event_id;
    stage.until(before, "sending").await;
    stage.until(after, "sending").await;
    local_stack::wait::until("the message is taken", LIMIT, || async {
        Ok((!stage.taken(after).is_empty()).then_some(()))
    })
    .await
    .expect("taken");
    assert!(replica.stop().await.expect("stopped").success());
    stage.until(before, "pending").await;
    assert_eq!(stage.trouble(before).await, "interrupted");
    stage.until(after, "unknown").await;
    let mut next = stage.start("next").await;
    stage.until(before, "sent").await;
    stage.the_mail(after);
    next.stop().await.expect("stopped");
}
