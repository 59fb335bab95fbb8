//! What events of orders do to stock, through real Kafka.

use std::collections::BTreeMap;

use crate::common::*;
use contracts::catalogue::order as types;
use contracts::shop::inventory::events::v1 as events;
use contracts::shop::order::events::v1 as proto;
use local_stack::process::http_get;
use prost::Message as _;
use tonic::Code;
use uuid::Uuid;

#[tokio::test(flavor = "multi_thread")]
async fn goods_are_held_sold_and_returned() {
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let (first, second) = (service.product(10).await, service.product(3).await);
    let mut order = Order::new();
    let mut told = vec![order.placed(&[(first, 4), (second, 3)])];
    stage.publish(&told[0]).await;
    stage.heard(&told).await;
    assert_eq!(service.counts(first).await, (6, 4, 0));
    assert_eq!(service.counts(second).await, (0, 3, 0));

    told.push(order.tell("order.of.the.future", &()));
    told.push(order.confirmed());
    for event in &told[1..] {
        stage.publish(event).await;
    }
    stage.heard(&told).await;
    assert_eq!(service.counts(first).await, (6, 0, 4));
    assert_eq!(service.counts(second).await, (0, 0, 3));

    // All of it again, as a relay repeats it, and then the end.
    told.push(order.cancelled());
    for event in &told {
        stage.publish(event).await;
    }
    stage.heard(&told).await;
    assert_eq!(service.counts(first).await, (10, 0, 0));
    assert_eq!(service.counts(second).await, (3, 0, 0));
    assert_eq!(
        stage.types_of(order.id).await,
        ["inventory.reserved", "inventory.committed", "inventory.released"]
    );
    assert_eq!(stage.types_of(first).await, ["stock.updated"; 4]);

    let sql = stage.database.connect().await.expect("connected");
    let rows = sql
        .query(
            "SELECT topic, causation_id, correlation_id, payload FROM outbox WHERE aggregate_id = $1 ORDER BY id",
            &[&order.id.to_string()],
        )
        .await
        .expect("rows");
    let causes = [&told[0], &told[2], &told[3]];
    for (row, cause) in rows.iter().zip(causes) {
        assert_eq!(row.get::<_, Option<&str>>(0), Some("events.inventory"));
        assert_eq!(row.get::<_, Uuid>(1), cause.envelope.event_id);
        assert_eq!(row.get::<_, Uuid>(2), order.id);
    }
    let released = events::InventoryReleased::decode(rows[2].get::<_, &[u8]>(3)).expect("Protobuf");
    assert!(released.was_sold);
    assert_eq!(released.lines.len(), 2);
    service.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_order_holds_nothing() {
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let (plenty, scarce, unknown) = (
        service.product(10).await,
        service.product(2).await,
        Uuid::new_v4(),
    );
    let mut order = Order::new();
    let told = [
        order.placed(&[(plenty, 1), (scarce, 3), (unknown, 1)]),
        order.cancelled(),
    ];
    for event in &told {
        stage.publish(event).await;
    }
    stage.heard(&told).await;
    assert_eq!(stage.types_of(order.id).await, ["inventory.rejected"]);
    assert_eq!(service.counts(plenty).await, (10, 0, 0));
    assert_eq!(service.counts(scarce).await, (2, 0, 0));
    let status = service.get(unknown).await.expect_err("nobody has made it");
    check_status(&status, Code::NotFound, "PRODUCT_NOT_FOUND");
    assert_eq!(stage.types_of(plenty).await.len(), 1, "nothing happened to it");

    let sql = stage.database.connect().await.expect("connected");
    let query = "SELECT payload FROM outbox WHERE event_type = 'inventory.rejected'";
    let row = sql.query_one(query, &[]).await.expect("a row");
    let rejected = events::InventoryRejected::decode(row.get::<_, &[u8]>(0)).expect("Protobuf");
    let short: Vec<_> = rejected
        .shortages
        .iter()
        .map(|short| (short.product_id.as_str(), short.wanted, short.available))
        .collect();
    assert_eq!(
        short,
        [
            (scarce.to_string().as_str(), 3, 2),
            (unknown.to_string().as_str(), 1, 0)
        ]
    );
    service.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_product_that_everybody_wants_changes_once_per_batch() {
    const ORDERS: usize = 400;
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let hot = service.product(300).await;
    service.stop().await;
    let told: Vec<OrderEvent> = (0..ORDERS).map(|_| Order::new().placed(&[(hot, 1)])).collect();
    // Everything is there, in one partition, before anyone reads it.
    for event in &told {
        stage.publish_to(event, 0).await;
    }
    let service = stage.start(&[("consumer.workers", "1")]).await;
    stage.heard(&told).await;
    assert_eq!(service.counts(hot).await, (0, 300, 0));
    let batches = service.get(hot).await.expect("known").version - 1;
    assert!(
        (1..=20).contains(&batches),
        "{ORDERS} orders changed it {batches} times"
    );
    let sql = stage.database.connect().await.expect("connected");
    // Who came first was served first.
    let first = told[..300].iter().map(|event| event.envelope.entity_id.clone());
    let query = "SELECT count(*) FROM reservations WHERE status = 'reserved' AND order_id::text = ANY($1)";
    let served = sql
        .query_one(query, &[&first.collect::<Vec<_>>()])
        .await
        .expect("a row");
    assert_eq!(served.get::<_, i64>(0), 300);
    let rejected = "SELECT count(*) FROM reservations WHERE status = 'rejected'";
    assert_eq!(count(&sql, rejected).await, 100);
    service.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_and_the_warehouse_want_the_same_products() {
    const ORDERS: usize = 240;
    const PRODUCTS: usize = 6;
    let stage = Stage::new().await;
    let [a, b] = stage.start_two().await;
    let mut products = Vec::new();
    for _ in 0..PRODUCTS {
        products.push(a.product(200).await);
    }
    let mut orders: Vec<Order> = (0..ORDERS).map(|_| Order::new()).collect();
    let mut told: Vec<OrderEvent> = Vec::new();
    // In one order of products and in the other one, so that nobody's own order would do.
    let place = |(n, order): (usize, &mut Order)| {
        let mut wanted: Vec<(Uuid, i32)> = (0..3)
            .map(|line| (products[(n + line) % PRODUCTS], 1 + ((n + line) % 4) as i32))
            .collect();
        if n % 2 == 1 {
            wanted.reverse();
        }
        order.placed(&wanted)
    };
    told.extend(orders.iter_mut().enumerate().map(place));
    let publish = futures::future::join_all(told.iter().map(|event| stage.publish(event)));
    // Meanwhile goods come in, and are counted.
    let deliveries = futures::future::join_all((0..120).map(|n| {
        let service = if n % 2 == 0 { &a } else { &b };
        service.adjust(adjust_request(products[n % PRODUCTS], 1))
    }));
    let (_, delivered) = futures::join!(publish, deliveries);
    for answer in delivered {
        answer.expect("adjusted");
    }
    stage.heard(&told).await;
    // What was held is sold; a third of it comes back, and a third of what was rejected is cancelled too.
    let sql = stage.database.connect().await.expect("connected");
    let reserved = "SELECT order_id FROM reservations WHERE status = 'reserved'";
    let reserved: Vec<Uuid> = sql
        .query(reserved, &[])
        .await
        .expect("rows")
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(
        reserved.len() > 50 && reserved.len() < ORDERS,
        "{} were reserved",
        reserved.len()
    );
    let mut more = Vec::new();
    for (n, order) in orders.iter_mut().enumerate() {
        if reserved.contains(&order.id) {
            more.push(order.confirmed());
        }
        if n % 3 == 0 {
            more.push(order.cancelled());
        }
    }
    // The events of one order in their order, those of all orders at once.
    let mut by_order: BTreeMap<&str, Vec<&OrderEvent>> = BTreeMap::new();
    for event in &more {
        by_order.entry(&event.envelope.entity_id).or_default().push(event);
    }
    let publish = by_order.into_values().map(async |events| {
        for event in events {
            stage.publish(event).await;
        }
    });
    futures::future::join_all(publish).await;
    stage.heard(&more).await;

    for product in &products {
        let (available, reserved, sold) = a.counts(*product).await;
        assert_eq!(available + reserved + sold, 220, "no piece was lost or made");
        assert_eq!(reserved, 0);
        assert!(available >= 0 && sold > 0);
    }
    for replica in [&a, &b] {
        assert!(metric(replica.admin, "consumer_messages_total").await > 0.0);
        // Nothing waited for each other in a circle.
        assert_eq!(metric(replica.admin, "consumer_retries_total").await, 0.0);
    }
    a.stop().await;
    b.stop().await;
    // Also that what is reserved and sold is what the reservations say.
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_never_be_taken_in_is_parked_and_stops_nobody_else() {
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let product = service.product(100).await;
    let garbage = OrderEvent {
        payload: vec![0xff],
        ..Order::new().placed(&[(product, 1)])
    };
    let mut of_another = Order::new().placed(&[(product, 1)]);
    of_another.envelope.entity_id = Uuid::now_v7().to_string();
    let mut too_new = Order::new().placed(&[(product, 1)]);
    too_new.envelope.schema_version = 2;
    let mut no_order = Order::new().placed(&[(product, 1)]);
    no_order.envelope.entity_id = "chair".to_owned();
    let bad = [
        (garbage, "the payload is not Protobuf"),
        (of_another, "the payload is of another entity"),
        (too_new, "there is no event order.placed of version 2"),
        (no_order, "the order id is not a UUID"),
        (
            Order::new().placed(&[]),
            "field items of the payload is missing or not valid",
        ),
        (Order::new().confirmed(), "nothing is held for it"),
    ];
    for (partition, (event, _)) in (0..PARTITIONS).zip(&bad) {
        stage.publish_to(event, partition).await;
    }
    let sql = stage.database.connect().await.expect("connected");
    for (event, why) in &bad {
        let entity = &event.envelope.entity_id;
        let asked = "SELECT error FROM parked_records WHERE entity_id = $1";
        until("it is parked", async || {
            let rows = sql.query(asked, &[entity]).await.expect("an answer");
            rows.iter().any(|row| row.get::<_, &str>(0).contains(why))
        })
        .await;
    }
    let (code, text) = http_get(service.admin, "/readyz").await.expect("an answer");
    assert_eq!(code, 200, "{text}");
    // Behind each of them, orders of others are served.
    let told: Vec<OrderEvent> = (0..PARTITIONS)
        .map(|_| Order::new().placed(&[(product, 1)]))
        .collect();
    for (partition, event) in (0..PARTITIONS).zip(&told) {
        stage.publish_to(event, partition).await;
    }
    stage.heard(&told).await;
    assert_eq!(service.counts(product).await, (94, 6, 0));
    service.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lie_in_a_batch_leaves_out_itself_alone() {
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let product = service.product(10).await;
    service.stop().await;
    let mut orders = [Order::new(), Order::new(), Order::new()];
    let mut told = vec![
        orders[0].placed(&[(product, 1)]),
        orders[1].confirmed(),
        orders[2].placed(&[(product, 2)]),
    ];
    // The second placing of an order, with other lines, and what comes behind it.
    told.push(orders[0].placed(&[(product, 5)]));
    told.push(orders[0].cancelled());
    for event in &told {
        stage.publish_to(event, 0).await;
    }
    let service = stage.start(&[("consumer.workers", "1")]).await;
    let sql = stage.database.connect().await.expect("connected");
    until("they are parked", async || {
        count(&sql, "SELECT count(*) FROM parked_records").await == 3
    })
    .await;
    stage.heard([&told[0], &told[2]]).await;
    assert_eq!(service.counts(product).await, (7, 3, 0));
    service.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn traces_go_on() {
    const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319";
    let stage = Stage::new().await;
    let folder = local_stack::testing::Folder::create("inventory-svc-orders");
    let service = stage.start(&[]).await;
    let product = service.product(10).await;
    service.stop().await;
    let mut process = stage.process(folder.path()).start().await.expect("started");
    let mut told = Vec::new();
    // Several at once, which may share a batch: each is a part of its own trace all the same.
    for number in 0..3 {
        let mut event = Order::new().placed(&[(product, 1)]);
        event.envelope.traceparent = Some(format!("00-{TRACE_ID}{number}-b7ad6b7169203331-01"));
        event.envelope.tracestate = Some("vendor=1".to_owned());
        stage.publish(&event).await;
        told.push(event);
    }
    stage.heard(&told).await;
    let sql = stage.database.connect().await.expect("connected");
    for (number, event) in told.iter().enumerate() {
        let query = "SELECT traceparent, tracestate FROM outbox WHERE aggregate_id = $1";
        let row = sql
            .query_one(query, &[&event.envelope.entity_id])
            .await
            .expect("a row");
        let trace_id = format!("{TRACE_ID}{number}");
        assert_eq!(service::telemetry::trace_id(row.get(0)), Some(trace_id.as_str()));
        assert_eq!(row.get::<_, Option<&str>>(1), Some("vendor=1"));
        until("it is logged", async || {
            let log = std::fs::read_to_string(process.log()).expect("a log");
            log.lines().any(|line| {
                line.contains("recorded inventory.reserved")
                    && line.contains(&event.envelope.entity_id)
                    && line.contains(&trace_id)
            })
        })
        .await;
    }
    let status = process.stop_within(LIMIT).await.expect("stopped");
    assert!(status.success(), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn news_that_matter_not_are_passed_over() {
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let product = service.product(10).await;
    let mut order = Order::new();
    let reserved = proto::OrderReserved {
        order_id: order.id.to_string(),
        reserved_at: None,
    };
    let told = [
        order.placed(&[(product, 10)]),
        order.tell(types::RESERVED, &reserved),
        order.tell(types::PAID, &proto::OrderPaid::default()),
        order.tell(types::OVERDUE, &proto::OrderOverdue::default()),
    ];
    for event in &told {
        stage.publish(event).await;
    }
    stage.heard(&told).await;
    assert_eq!(stage.types_of(order.id).await, ["inventory.reserved"]);
    assert_eq!(service.counts(product).await, (0, 10, 0));
    service.stop().await;
}
