//! Events that this service can never apply, as they come by wire.

use contracts::catalogue::order as types;
use envelope::Envelope;
use local_stack::testing::events::envelope;
use local_stack::wait;
use uuid::Uuid;

use crate::stage::{LIMIT, Stage, placed, reserved};

/// An unknown field of nested groups, deeper than any decoder should follow.
fn nested(depth: usize) -> Vec<u8> {
    let (_, mut payload) = placed(Uuid::from_u128(7), 1);
    // Field 100, begin and end of group: tags (100 << 3) | 3 and (100 << 3) | 4.
    payload.extend([0xa3, 0x06].repeat(depth));
    payload.extend([0xa4, 0x06].repeat(depth));
    payload
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_applied_is_parked_and_others_go_on() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let user = Uuid::now_v7();
    let id = Uuid::now_v7;
    let first = |event_type: &str, entity: &str| envelope(types::ENTITY_TYPE, entity, 1, event_type);
    let (_, fine) = placed(user, 1);
    // As a schema registry would have it.
    let magic = [&[0, 0, 0, 0, 7, 0][..], &fine].concat();
    let bad: Vec<(Envelope, Vec<u8>, &str)> = vec![
        (
            first(types::PLACED, &id().to_string()),
            vec![0xff; 3],
            "the payload is not what its type says",
        ),
        (
            first(types::PLACED, &id().to_string()),
            magic,
            "the payload is not what its type says",
        ),
        (
            first(types::PLACED, &id().to_string()),
            nested(10_000),
            "the payload is not what its type says",
        ),
        (
            Envelope {
                schema_version: 2,
                ..first(types::PLACED, &id().to_string())
            },
            fine.clone(),
            "major version 2 of the payload's schema is not known",
        ),
        (
            first(types::PLACED, "no-uuid"),
            fine.clone(),
            "its entity's id is not a UUID",
        ),
        (
            first(types::RESERVED, &id().to_string()),
            reserved().1,
            "the order was not placed before this event",
        ),
    ];
    for (envelope, payload, _) in &bad {
        stage.publish_as(envelope, payload).await;
    }
    let parked = wait::until("all to be parked", LIMIT, || async {
        let rows = stage
            .rows("SELECT entity_id || ' ' || error FROM parked_records")
            .await;
        Ok((rows.len() == bad.len()).then_some(rows))
    })
    .await
    .unwrap();
    for (envelope, _, why) in &bad {
        let mine = |row: &&String| row.starts_with(&envelope.entity_id) && row.contains(why);
        assert!(parked.iter().any(|row| mine(&row)), "{why}: {parked:?}");
    }
    replica.readiness(200, "ok").await;

    // What is only not known yet passes: types, fields, and what they say of an order that goes on.
    let order = Uuid::now_v7();
    let unknown_field = [&fine[..], &[0xa0, 0x06, 0x01]].concat();
    stage.publish(order, 1, (types::PLACED, unknown_field)).await;
    let invented = Envelope {
        schema_version: 9,
        ..envelope(types::ENTITY_TYPE, &order.to_string(), 2, "order.invented")
    };
    stage.publish_as(&invented, &[0xff]).await;
    stage.publish(order, 3, reserved()).await;
    let view = replica.view(user, order, 3).await.unwrap();
    assert_eq!(view.version, 3);
    replica.stop().await;
}
