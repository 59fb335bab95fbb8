//! Events that this service can never apply, as they come by wire.

use contracts::catalogue::{order as types, payment as payment_types};
use contracts::shop::analytics::events::v1::WindowSize;
use envelope::Envelope;
use local_stack::testing::events::envelope;
use local_stack::wait;
use uuid::Uuid;

use crate::shop::{Fate, Story, at, figures_of};
use crate::stage::{LIMIT, Stage, span};

/// Waits until this many records are parked, and gives entity and reason of each.
async fn parked(stage: &Stage, count: usize) -> Vec<String> {
    wait::until("all to be parked", LIMIT, || async {
        let rows = stage
            .rows("SELECT entity_id || ' ' || error FROM parked_records ORDER BY id")
            .await;
        Ok((rows.len() == count).then_some(rows))
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_applied_is_parked_and_changes_nothing() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let id = || Uuid::now_v7().to_string();
    let order = |event_type: &str| envelope(types::ENTITY_TYPE, &id(), 1, event_type);
    let payment = |event_type: &str| envelope(payment_types::ENTITY_TYPE, &id(), 1, event_type);
    let story = Story::new(at(0), Fate::Confirmed);
    let fine = story.placed();
    let with_lines = |lines| {
        Story {
            lines,
            ..story.clone()
        }
        .placed()
    };
    let refund = Story::new(at(0), Fate::Returned).payments().remove(0).remove(1).1;
    let unpriced = Story {
        currency: "euro",
        ..story.clone()
    };
    let money = unpriced.payments().remove(0).remove(0).1;
    let bad: Vec<(Envelope, Vec<u8>, &str)> = vec![
        (
            order(types::PLACED),
            vec![0xff; 3],
            "the payload is not what its type says",
        ),
        (
            order(types::CONFIRMED),
            vec![0xff; 3],
            "the payload is not what its type says",
        ),
        (
            payment(payment_types::RECEIVED),
            vec![0xff; 3],
            "the payload is not what its type says",
        ),
        (
            Envelope {
                schema_version: 2,
                ..order(types::PLACED)
            },
            fine.clone(),
            "major version 2 of the payload's schema is not known",
        ),
        (
            envelope(types::ENTITY_TYPE, "no-uuid", 1, types::PLACED),
            fine.clone(),
            "its entity's id is not a UUID",
        ),
        (
            envelope("user", &id(), 1, "user.created"),
            vec![],
            "it is of an entity that this service does not know",
        ),
        (
            order(types::PLACED),
            unpriced.placed(),
            "field total is missing or malformed",
        ),
        (
            order(types::PLACED),
            with_lines(vec![(1, -1, -5)]),
            "field items is missing or malformed",
        ),
        (
            order(types::PLACED),
            // More than an i64 in all, with a total that fits.
            with_lines(vec![(1, 1, i64::MAX), (1, 1, 1), (2, -1, 1)]),
            "field items is missing or malformed",
        ),
        (
            order(types::PLACED),
            Story::new(at(-2_000_000_000), Fate::Pending).placed(),
            "field created_at is missing or malformed",
        ),
        (
            order(types::CONFIRMED),
            vec![],
            "the order was not placed before this event",
        ),
        (
            payment(payment_types::RECEIVED),
            vec![],
            "field order_id is missing or malformed",
        ),
        (
            payment(payment_types::RECEIVED),
            money,
            "field amount is missing or malformed",
        ),
        (
            payment(payment_types::REFUNDED),
            refund,
            "more was given back than was received",
        ),
    ];
    for (envelope, payload, _) in &bad {
        stage.publish(envelope, payload).await;
    }
    let parked = parked(&stage, bad.len()).await;
    for (envelope, _, why) in &bad {
        let mine = |row: &&String| row.starts_with(&envelope.entity_id) && row.contains(why);
        assert!(parked.iter().any(|row| mine(&row)), "{why}: {parked:?}");
    }
    assert_eq!(stage.dump().await, [""; 0]);
    assert_eq!(stage.told().await, []);
    replica.readiness(200, "ok").await;

    // What is only not known yet passes: types, fields, and what they say of an order that goes on.
    let mut history = story.history();
    history[0].1.extend([0xa0, 0x06, 0x01]);
    history[1].0.event_type = "order.invented".to_owned();
    history[1].0.schema_version = 9;
    history[1].1 = vec![0xff];
    for (envelope, payload) in &history {
        stage.publish(envelope, payload).await;
    }
    stage.applied(4).await;
    let answer = replica.summary(span(WindowSize::Hour, at(-3600), at(3600))).await;
    let figures = &answer.unwrap().windows[0].figures[0];
    assert_eq!((figures.orders_placed, figures.orders_confirmed), (1, 1));
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sum_that_does_not_fit_parks_what_would_make_it_and_nothing_else() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let rich = |second| Story {
        lines: vec![(1, 1, i64::MAX)],
        ..Story::new(at(second), Fate::Confirmed)
    };
    let (first, second) = (rich(0), rich(1));
    let (elsewhere, small) = (rich(5_000_000), Story::new(at(2), Fate::Cancelled));
    let mut versions = 0;
    for story in [&first, &elsewhere, &small] {
        for (envelope, payload) in [story.history(), story.payments().remove(0)].concat() {
            stage.publish(&envelope, &payload).await;
            versions += 1;
        }
    }
    stage.applied(versions).await;
    let before = stage.rows("SELECT f::text FROM sales_figures f ORDER BY 1").await;
    let [history, payment] = [second.history(), second.payments().remove(0)];
    stage.publish(&payment[0].0, &payment[0].1).await;
    stage.applied(versions + 1).await; // Its order is not known, so it counts nowhere yet.
    stage.publish(&history[0].0, &history[0].1).await;
    let reasons = parked(&stage, 1).await;
    assert!(reasons[0].contains(&second.order.to_string()), "{reasons:?}");
    let now = stage.rows("SELECT f::text FROM sales_figures f ORDER BY 1").await;
    assert_eq!(now, before, "nothing of it was counted");
    // Others go on, in the same windows.
    let other = Story::new(at(3), Fate::Pending);
    let (envelope, payload) = &other.history()[0];
    stage.publish(envelope, payload).await;
    stage.applied(versions + 2).await;
    let hour = span(WindowSize::Hour, at(-3600), at(3600));
    let expected = figures_of(&[first, small, other], WindowSize::Hour);
    assert_eq!(replica.summary(hour).await.unwrap().windows, expected);
    // A total may be too large although each window's figures are not.
    let days = span(WindowSize::Day, at(-90_000), at(90 * 86_400));
    let answer = replica.summary(days).await;
    crate::stage::assert_refused(answer, tonic::Code::OutOfRange, "TOTAL_TOO_LARGE");
    replica.stop().await;
}
