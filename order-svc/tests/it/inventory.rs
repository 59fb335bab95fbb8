//! What events of reservations do to orders, through real Kafka, before their payments and after them.

use crate::common::*;
use crate::payments::{Stage, is, metric, received, types_of};
use contracts::catalogue::inventory as types;
use contracts::shop::inventory::events::v1 as proto;
use contracts::shop::order::v1::{self as api, OrderStatus};
use envelope::Envelope;
use local_stack::testing::events::envelope;
use uuid::Uuid;

/// An event of a reservation, as inventory-svc would emit it.
type Event = (Envelope, Vec<u8>);

fn event(order_id: &str, version: i64, event_type: &str, payload: &impl prost::Message) -> Event {
    let envelope = envelope(types::ENTITY_TYPE, order_id, version, event_type);
    (envelope, payload.encode_to_vec())
}

fn reserved(order: &api::Order) -> Event {
    let reserved = proto::InventoryReserved {
        order_id: order.order_id.clone(),
        lines: vec![],
        reserved_at: order.updated_at,
    };
    event(&order.order_id, 1, types::RESERVED, &reserved)
}

fn rejected(order: &api::Order) -> Event {
    let rejected = proto::InventoryRejected {
        order_id: order.order_id.clone(),
        rejected_at: order.updated_at,
        ..Default::default()
    };
    event(&order.order_id, 1, types::REJECTED, &rejected)
}

async fn publish(stage: &Stage, (envelope, payload): &Event) {
    stage.publish_inventory(envelope, payload).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_is_confirmed_by_whichever_comes_last() {
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    // The reservation, then the payment.
    let order = service.place(place_request()).await.expect("placed");
    let held = reserved(&order);
    publish(&stage, &held).await;
    stage.heard_of(&held.0).await;
    assert_eq!(
        types_of(&service, &order).await,
        ["order.placed", "order.reserved"]
    );
    let seen = service.get(&order.user_id, &order.order_id).await.expect("there");
    assert_eq!(seen.status(), OrderStatus::Pending);
    stage.publish(&received(&order, Uuid::now_v7())).await;
    is(&service, &order, OrderStatus::Confirmed).await;
    assert_eq!(
        types_of(&service, &order).await,
        ["order.placed", "order.reserved", "order.paid", "order.confirmed"]
    );

    // The payment, then the reservation, and that again.
    let order = service.place(place_request()).await.expect("placed");
    stage.publish(&received(&order, Uuid::now_v7())).await;
    is(&service, &order, OrderStatus::Paid).await;
    let held = reserved(&order);
    publish(&stage, &held).await;
    publish(&stage, &held).await;
    is(&service, &order, OrderStatus::Confirmed).await;
    // What is committed and released says nothing new.
    let committed = event(
        &order.order_id,
        2,
        types::COMMITTED,
        &proto::InventoryCommitted::default(),
    );
    publish(&stage, &committed).await;
    stage.heard_of(&committed.0).await;
    let history = service
        .history(&order.user_id, &order.order_id, 0, "")
        .await
        .expect("there");
    let told: Vec<&str> = history.events.iter().map(|event| event.r#type.as_str()).collect();
    assert_eq!(
        told,
        ["order.placed", "order.paid", "order.reserved", "order.confirmed"]
    );
    // The event that completed the pair caused both, in one transaction.
    for event in &history.events[2..] {
        assert_eq!(event.causation_id, held.0.event_id.to_string());
    }
    let sql = stage.database.connect().await.expect("connected");
    let transactions = "SELECT count(DISTINCT xmin::text) FROM outbox WHERE aggregate_version IN (3, 4)
                        AND event_type <> 'order.paid' GROUP BY aggregate_id ORDER BY 1 DESC LIMIT 1";
    assert_eq!(count(&sql, transactions).await, 1);
    service.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_without_stock_is_cancelled_before_and_after_its_payment() {
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let (unpaid, paid, withdrawn) = (
        service.place(place_request()).await.expect("placed"),
        service.place(place_request()).await.expect("placed"),
        service.place(place_request()).await.expect("placed"),
    );
    stage.publish(&received(&paid, Uuid::now_v7())).await;
    is(&service, &paid, OrderStatus::Paid).await;
    service
        .cancel(cancel_request(&withdrawn))
        .await
        .expect("cancelled");
    for order in [&unpaid, &paid, &withdrawn] {
        let told = rejected(order);
        publish(&stage, &told).await;
        stage.heard_of(&told.0).await;
        let seen = service.get(&order.user_id, &order.order_id).await.expect("there");
        assert_eq!(seen.status(), OrderStatus::Cancelled);
    }
    let by = |order: &api::Order| {
        format!(
            "SELECT count(*) FROM orders WHERE order_id = '{}' AND cancelled_by = 'out_of_stock'",
            order.order_id
        )
    };
    let sql = stage.database.connect().await.expect("connected");
    for (order, out_of_stock) in [(&unpaid, 1), (&paid, 1), (&withdrawn, 0)] {
        assert_eq!(count(&sql, &by(order)).await, out_of_stock);
    }
    assert_eq!(
        types_of(&service, &paid).await,
        ["order.placed", "order.paid", "order.cancelled"]
    );
    let seen = service
        .get(&unpaid.user_id, &unpaid.order_id)
        .await
        .expect("there");
    assert_eq!(seen.cancel_reason, "out of stock");
    // Money that comes now changes nothing here: payment-svc gives it back.
    let late = received(&unpaid, Uuid::now_v7());
    stage.publish(&late).await;
    stage.heard(&late).await;
    assert_eq!(
        types_of(&service, &unpaid).await,
        ["order.placed", "order.cancelled"]
    );
    service.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_hear_of_the_stock_and_the_money_of_the_same_orders() {
    const ORDERS: usize = 80;
    let stage = Stage::new().await;
    let [a, b] = stage.start_two(&[]).await;
    let mut orders = Vec::new();
    for _ in 0..ORDERS {
        orders.push(a.place(place_request()).await.expect("placed"));
    }
    // Each topic tells of the same orders in another order, both at once.
    let payments = async {
        for order in &orders {
            stage.publish(&received(order, Uuid::now_v7())).await;
        }
    };
    let reservations = async {
        for order in orders.iter().rev() {
            publish(&stage, &reserved(order)).await;
        }
    };
    futures::join!(payments, reservations);
    for order in &orders {
        is(&b, order, OrderStatus::Confirmed).await;
        let told = types_of(&a, order).await;
        assert_eq!((told.len(), told[3].as_str()), (4, "order.confirmed"));
    }
    for replica in [&a, &b] {
        // Nothing waited for each other in a circle.
        assert_eq!(metric(replica.admin, "consumer_retries_total").await, 0.0);
    }
    a.stop().await;
    b.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_never_be_taken_in_is_parked() {
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let order = service.place(place_request()).await.expect("placed");
    let unknown = api::Order {
        order_id: id(),
        ..order.clone()
    };
    let garbage = (
        envelope(types::ENTITY_TYPE, &id(), 1, types::REJECTED),
        vec![0xff],
    );
    let mut of_another = reserved(&order);
    of_another.0.entity_id = id();
    let mut too_new = reserved(&order);
    too_new.0.entity_id = id();
    too_new.0.schema_version = 2;
    let bad = [
        (reserved(&unknown), "there is no such order"),
        (garbage, "the payload is not what its type says"),
        (of_another, "the payload is of another entity than the record"),
        (too_new, "major version 2 of the payload's schema is not known"),
    ];
    let sql = stage.database.connect().await.expect("connected");
    for (event, why) in &bad {
        publish(&stage, event).await;
        let asked = "SELECT error FROM parked_records WHERE entity_id = $1";
        until("it is parked", async || {
            let rows = sql.query(asked, &[&event.0.entity_id]).await.expect("an answer");
            rows.iter().any(|row| row.get::<_, &str>(0).contains(why))
        })
        .await;
    }
    let held = reserved(&order);
    publish(&stage, &held).await;
    stage.heard_of(&held.0).await;
    assert_eq!(
        types_of(&service, &order).await,
        ["order.placed", "order.reserved"]
    );
    service.stop().await;
    stage.assert_sound().await;
}

/// An order that is confirmed, for tests of what comes afterwards.
pub(crate) async fn confirmed(stage: &Stage, service: &Running) -> api::Order {
    let order = service.place(place_request()).await.expect("placed");
    publish(stage, &reserved(&order)).await;
    stage.publish(&received(&order, Uuid::now_v7())).await;
    is(service, &order, OrderStatus::Confirmed).await;
    service.get(&order.user_id, &order.order_id).await.expect("there")
}
