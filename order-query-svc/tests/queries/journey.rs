//! Where an order's events have been, and what is parked about it.

use std::collections::BTreeMap;

use consumer::{Run, Which};
use contracts::catalogue::{inventory, notification, order as types, payment as payment_types};
use contracts::shop::notification::events::v1::Template;
use contracts::shop::orderquery::v1 as wire;
use envelope::Envelope;
use futures::StreamExt as _;
use local_stack::testing::events::{Topic, envelope, headers};
use local_stack::wait;
use rdkafka::message::OwnedHeaders;
use tonic::Code;
use uuid::Uuid;

use crate::stage::{
    Event, LIMIT, Replica, Stage, assert_bad_field, assert_refused, at, cancelled, failed, held, mailed,
    paid, placed, received, reserved, sold,
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// Publishes an event that happened at that second, and says how it has to be told.
async fn publish(topic: &Topic, envelope: Envelope, second: i64, payload: &[u8]) -> wire::JourneyEvent {
    let envelope = Envelope {
        occurred_at: at(second),
        traceparent: Some(format!("00-{TRACE}-b7ad6b7169203331-01")),
        ..envelope
    };
    let key = Some(envelope.entity_id.as_str());
    let produced = topic.produce(key, Some(payload), headers(&envelope), None).await;
    let (partition, offset) = produced.unwrap();
    wire::JourneyEvent {
        event_id: envelope.event_id.to_string(),
        entity_id: envelope.entity_id,
        event_type: envelope.event_type,
        version: envelope.version,
        occurred_at: Some(contracts::wire::timestamp(at(second))),
        topic: topic.name().to_owned(),
        partition,
        offset,
        trace_id: TRACE.to_owned(),
    }
}

/// An order with all that belongs to it.
struct Case {
    user: Uuid,
    order: Uuid,
    payment: Uuid,
    /// The placing, which a mail answers.
    placing: Uuid,
    /// By the second at which it happened.
    told: BTreeMap<i64, wire::JourneyEvent>,
}

impl Case {
    fn new() -> Self {
        Self {
            user: Uuid::now_v7(),
            order: Uuid::now_v7(),
            payment: Uuid::now_v7(),
            placing: Uuid::now_v7(),
            told: BTreeMap::new(),
        }
    }

    async fn tell(
        &mut self,
        topic: &Topic,
        entity: (&str, Uuid),
        event_id: Uuid,
        version: i64,
        second: i64,
        (event_type, payload): Event,
    ) {
        let envelope = Envelope {
            event_id,
            correlation_id: Some(self.order),
            ..envelope(entity.0, &entity.1.to_string(), version, event_type)
        };
        let told = publish(topic, envelope, second, &payload).await;
        self.told.insert(second, told);
    }

    /// All events of one source.
    async fn publish(&mut self, stage: &Stage, source: usize) {
        let (order, payment, new) = (self.order, self.payment, Uuid::now_v7);
        match source {
            0 => {
                let entity = (types::ENTITY_TYPE, order);
                let topic = &stage.orders;
                let placed = placed(self.user, 1);
                self.tell(topic, entity, self.placing, 1, 1, placed).await;
                self.tell(topic, entity, new(), 2, 4, reserved()).await;
                self.tell(topic, entity, new(), 3, 6, paid(payment)).await;
                let future = ("order.of.the.future", Vec::new());
                self.tell(topic, entity, new(), 4, 9, future).await;
            }
            1 => {
                let entity = (payment_types::ENTITY_TYPE, payment);
                self.tell(&stage.payments, entity, new(), 1, 5, received(order))
                    .await;
                let future = ("payment.of.the.future", Vec::new());
                self.tell(&stage.payments, entity, new(), 2, 10, future).await;
            }
            2 => {
                let entity = (inventory::ENTITY_TYPE, order);
                self.tell(&stage.reservations, entity, new(), 1, 2, held(order))
                    .await;
                self.tell(&stage.reservations, entity, new(), 2, 7, sold(order))
                    .await;
                let future = ("inventory.of.the.future", Vec::new());
                self.tell(&stage.reservations, entity, new(), 3, 11, future).await;
            }
            _ => {
                let entity = (notification::ENTITY_TYPE, self.placing);
                let sent = mailed(order, Template::OrderPlaced);
                self.tell(&stage.mails, entity, new(), 1, 3, sent).await;
                let future = ("notification.of.the.future", Vec::new());
                self.tell(&stage.mails, entity, new(), 2, 12, future).await;
            }
        }
    }
}

/// Versions of one case, source by source.
const VERSIONS: [i64; 4] = [4, 2, 3, 2];

/// All orders in which four sources may come.
fn permutations() -> Vec<[usize; 4]> {
    let all = (0..256).map(|n| [n & 3, n >> 2 & 3, n >> 4 & 3, n >> 6]);
    all.filter(|order| (0..4).all(|source| order.contains(&source)))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journey_is_whole_in_whatever_order_its_sources_come() {
    let stage = Stage::new().await;
    let [replica, other] = stage.two_replicas().await;
    let mut cases: Vec<([usize; 4], Case)> = permutations()
        .into_iter()
        .map(|sources| (sources, Case::new()))
        .collect();
    assert_eq!(cases.len(), 24);
    let mut versions = 0;
    for step in 0..4 {
        for (sources, case) in &mut cases {
            case.publish(&stage, sources[step]).await;
            versions += VERSIONS[sources[step]];
        }
        // Until here they have come, and the next ones have not.
        stage.applied(versions).await;
        for (sources, case) in &cases {
            let answer = replica.journey(case.user, case.order).await;
            if !sources[..=step].contains(&0) {
                // Nobody knows whose it is.
                assert_refused(answer, Code::NotFound, "ORDER_NOT_FOUND");
                continue;
            }
            let journey = answer.unwrap();
            let expected: Vec<_> = case.told.values().cloned().collect();
            assert_eq!(journey.events, expected, "{sources:?}, {step}");
            assert!(!journey.more_events && journey.parked.is_empty());
        }
    }
    for (_, case) in &cases {
        let journey = other.journey(case.user, case.order).await.unwrap();
        assert_eq!(
            journey.reservation,
            Some(wire::ReservationView {
                status: wire::ReservationStatus::Committed.into(),
                version: 2,
                updated_at: Some(contracts::wire::timestamp(at(7))),
            })
        );
        assert_eq!(
            journey.mails,
            [wire::MailView {
                template: Template::OrderPlaced.into(),
                answers_event_id: case.placing.to_string(),
                sent_at: Some(contracts::wire::timestamp(at(3))),
            }]
        );
        assert!(!other.view(case.user, case.order, 0).await.unwrap().parked);
        // Someone else's.
        let answer = other.journey(Uuid::now_v7(), case.order).await;
        assert_refused(answer, Code::NotFound, "ORDER_NOT_FOUND");
    }
    replica.stop().await;
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_leaves_the_first_place_and_what_is_not_traced_says_so() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    let envelope = envelope(types::ENTITY_TYPE, &order.to_string(), 1, types::PLACED);
    let (_, payload) = placed(user, 1);
    let first = publish(&stage.orders, envelope.clone(), 1, &payload).await;
    stage.applied(1).await;
    let repeat = publish(&stage.orders, envelope, 1, &payload).await;
    assert!(repeat.offset > first.offset);
    stage.publish(order, 2, reserved()).await;
    replica.view(user, order, 2).await.unwrap();
    let journey = replica.journey(user, order).await.unwrap();
    assert_eq!(journey.events[0], first);
    assert_eq!(
        (journey.events.len(), journey.events[1].trace_id.as_str()),
        (2, "")
    );
    assert_eq!((journey.reservation, journey.mails.len()), (None, 0));
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_are_checked_and_a_version_is_waited_for() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    let request = |user_id: &str, order_id: &str, at_least_version| wire::GetOrderJourneyRequest {
        user_id: user_id.to_owned(),
        order_id: order_id.to_owned(),
        at_least_version,
    };
    let (user_text, order_text) = (user.to_string(), order.to_string());
    for (request, field) in [
        (request("", &order_text, 0), "user_id"),
        (request(&user_text, "x", 0), "order_id"),
        (request(&user_text, &order_text, -1), "at_least_version"),
    ] {
        assert_bad_field(replica.client.clone().get_order_journey(request).await, field);
    }
    let asked = tokio::spawn({
        let mut client = replica.client.clone();
        let request = request(&user_text, &order_text, 2);
        async move { client.get_order_journey(request).await }
    });
    replica.has_waiting(1).await;
    stage.publish(order, 1, placed(user, 1)).await;
    stage.publish(order, 2, reserved()).await;
    let journey = asked.await.unwrap().unwrap().into_inner();
    assert_eq!(journey.events.len(), 2);
    replica.stop().await;
}

/// Topics, offsets and kinds of what a journey says is parked.
async fn parked(replica: &Replica, user: Uuid, order: Uuid) -> Vec<(String, String, String)> {
    let journey = replica.journey(user, order).await.unwrap();
    let parked = journey.parked.into_iter();
    parked
        .map(|record| (record.topic, record.event_type, record.error_kind))
        .collect()
}

/// Waits until so many records of the order are parked, and says what they are.
async fn parks(replica: &Replica, user: Uuid, order: Uuid, count: usize) -> Vec<(String, String, String)> {
    let found = wait::until("it to be parked", LIMIT, || async {
        let found = parked(replica, user, order).await;
        Ok((found.len() == count).then_some(found))
    });
    let found = found.await.unwrap();
    let view = replica.view(user, order, 0).await.unwrap();
    assert_eq!(view.parked, count > 0);
    let list = wire::ListOrdersRequest {
        user_id: user.to_string(),
        ..Default::default()
    };
    let listed = replica.list(list).await.unwrap().orders;
    let listed = listed
        .iter()
        .find(|view| view.order_id == order.to_string())
        .unwrap();
    assert_eq!(listed.parked, count > 0);
    found
}

fn told(topic: &Topic, event_type: &str, kind: &str) -> (String, String, String) {
    (topic.name().to_owned(), event_type.to_owned(), kind.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_order_says_so_until_it_was_replayed_or_given_up() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let (user, order, beside) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
    for order in [order, beside] {
        stage.publish(order, 1, placed(user, 1)).await;
        replica.view(user, order, 1).await.unwrap();
    }
    let mut watch = replica.watch(user, order).await.unwrap();
    let mut next = async || {
        let answer = tokio::time::timeout(LIMIT, watch.next()).await.unwrap();
        answer.unwrap().unwrap().order.unwrap()
    };
    assert!(!next().await.parked);

    // One is missing, and comes late.
    stage.publish(order, 3, paid(Uuid::now_v7())).await;
    parks(&replica, user, order, 1).await;
    let seen = next().await;
    assert_eq!((seen.parked, seen.version), (true, 1), "who watches is told");
    stage.publish(order, 2, reserved()).await;
    let found = parks(&replica, user, order, 2).await;
    let orders = &stage.orders;
    assert_eq!(
        found,
        [
            told(orders, types::PAID, "gap"),
            told(orders, types::RESERVED, "behind")
        ]
    );
    parks(&replica, user, beside, 0).await;
    stage
        .redrive()
        .replay(&Which::All, Run::Real, "tester")
        .await
        .unwrap();
    parks(&replica, user, order, 0).await;
    let journey = replica.journey(user, order).await.unwrap();
    assert_eq!(
        journey.events.len(),
        3,
        "what was replayed is told like everything else"
    );
    assert!(journey.events[2].offset < journey.events[1].offset);
    while next().await.parked {}

    // One that can only be given up.
    stage
        .publish(order, 4, (types::CONFIRMED, b"\xff".to_vec()))
        .await;
    let found = parks(&replica, user, order, 1).await;
    assert_eq!(found, [told(orders, types::CONFIRMED, "payload")]);
    let listed = stage.redrive().list(false, 10).await.unwrap();
    stage
        .redrive()
        .discard(listed[0].id, "a test", "tester")
        .await
        .unwrap();
    parks(&replica, user, order, 0).await;
    stage.publish(order, 5, cancelled()).await;
    replica.view(user, order, 5).await.unwrap();
    let journey = replica.journey(user, order).await.unwrap();
    let versions: Vec<i64> = journey.events.iter().map(|event| event.version).collect();
    assert_eq!(versions, [1, 2, 3, 5], "what was given up was not taken in");
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_parked_of_payments_reservations_and_mails_is_told_of_their_order() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let (user, beside) = (Uuid::now_v7(), Uuid::now_v7());
    stage.publish(beside, 1, placed(user, 1)).await;
    let rubbish = Some(&b"x"[..]);
    let bare = async |topic: &Topic, key: Uuid| {
        // Nothing but the key says what it is.
        let key = key.to_string();
        let produced = topic.produce(Some(&key), rubbish, OwnedHeaders::new(), None);
        produced.await.unwrap();
    };
    let correlated = async |topic: &Topic, entity_type: &str, event_type: &str, order: Uuid| {
        // Its key leads nowhere.
        let envelope = Envelope {
            correlation_id: Some(order),
            ..envelope(entity_type, &Uuid::now_v7().to_string(), 1, event_type)
        };
        topic.publish(&envelope, b"\xff").await.unwrap();
    };
    let mut orders = Vec::new();
    for source in 0..7 {
        let (order, payment, placing) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
        let envelope = Envelope {
            event_id: placing,
            ..envelope(types::ENTITY_TYPE, &order.to_string(), 1, types::PLACED)
        };
        stage.publish_as(&envelope, &placed(user, 1).1).await;
        replica.view(user, order, 1).await.unwrap();
        let (payments, mails) = (&stage.payments, &stage.mails);
        let found = match source {
            // A payment that is known from before.
            0 => {
                stage.publish_payment(payment, 1, 5, failed(order, 1, true)).await;
                bare(payments, payment).await;
                told(payments, "", "unreadable")
            }
            // One that the order knows.
            1 => {
                stage.publish(order, 2, paid(payment)).await;
                bare(payments, payment).await;
                told(payments, "", "unreadable")
            }
            // One that nobody has heard of.
            2 => {
                let event_type = payment_types::FAILED;
                correlated(payments, payment_types::ENTITY_TYPE, event_type, order).await;
                told(payments, event_type, "payload")
            }
            3 => {
                bare(&stage.reservations, order).await;
                told(&stage.reservations, "", "unreadable")
            }
            // A mail that answers what is known.
            4 => {
                bare(mails, placing).await;
                told(mails, "", "unreadable")
            }
            5 => {
                correlated(mails, notification::ENTITY_TYPE, notification::SENT, order).await;
                told(mails, notification::SENT, "payload")
            }
            _ => {
                bare(&stage.orders, order).await;
                told(&stage.orders, "", "unreadable")
            }
        };
        assert_eq!(parks(&replica, user, order, 1).await, [found]);
        orders.push(order);
    }
    for order in &orders {
        parks(&replica, user, *order, 1).await;
    }
    parks(&replica, user, beside, 0).await;
    // A correlation id that is no id is nobody's, however long it is.
    let envelope = envelope(types::ENTITY_TYPE, "long", 1, types::PLACED);
    let long = headers(&envelope).insert(rdkafka::message::Header {
        key: "correlation-id",
        value: Some(&"9".repeat(9_000)),
    });
    stage
        .orders
        .produce(Some("long"), rubbish, long, None)
        .await
        .unwrap();
    wait::until("it to be parked", LIMIT, || async {
        Ok((stage.redrive().list(false, 100).await?.len() == 8).then_some(()))
    })
    .await
    .unwrap();
    replica.stop().await;
}

/// Scans from one end to the other, and entries read by way of indexes.
async fn reads(client: &tokio_postgres::Client) -> BTreeMap<String, (i64, i64)> {
    let sql = "SELECT relname::text, seq_scan, \
                      (SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes i WHERE i.relid = t.relid) \
               FROM pg_stat_user_tables t \
               WHERE relname IN ('order_journey', 'order_payments', 'order_views', 'parked_records')";
    let rows = client.query(sql, &[]).await.unwrap();
    let row = |row: &tokio_postgres::Row| (row.get(0), (row.get(1), row.get(2)));
    rows.iter().map(row).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_query_reads_a_whole_table() {
    const ROWS: i64 = 100_000;
    let stage = Stage::new().await;
    let client = stage.database.connect().await.unwrap();
    let config = stage.config("").projection;
    // Of many orders and ever more failed payments; one in a hundred is parked.
    client
        .batch_execute(&format!(
            "INSERT INTO order_views \
                 SELECT gen_random_uuid(), gen_random_uuid(), 1, '[]', 1, 'EUR', 1, now(), now(), NULL, '', '', '', NULL \
                 FROM generate_series(1, {ROWS}); \
             INSERT INTO order_payments SELECT gen_random_uuid(), order_id, 1, 1, 'EUR', '', '', NULL, NULL, 1, now(), now() \
                 FROM order_views; \
             INSERT INTO order_journey SELECT order_id, gen_random_uuid(), order_id, n, now(), n, 1, NULL, 'events.order', 'x', NULL \
                 FROM order_views, generate_series(1, 6) n; \
             INSERT INTO parked_records (consumer, generation, topic, partition, kafka_offset, record_time, entity_id, headers, \
                                         error_kind, error, state, settled_at) \
                 SELECT '{0}', 1, '{1}', 9, row_number() OVER (), now(), order_id::text, \
                        jsonb_build_array(jsonb_build_array('correlation-id', gen_random_uuid()::text)), 'refused', 'bad', \
                        CASE WHEN row_number() OVER () % 10 = 0 THEN 'parked' ELSE 'replayed' END, \
                        CASE WHEN row_number() OVER () % 10 = 0 THEN NULL ELSE now() END \
                 FROM order_views",
            config.group,
            stage.orders.name()
        ))
        .await
        .unwrap();
    let replica = stage.replica().await;
    let (user, order) = (Uuid::now_v7(), Uuid::now_v7());
    stage.publish(order, 1, placed(user, 1)).await;
    replica.view(user, order, 1).await.unwrap();
    // As after a bulk load, and with figures.
    for _ in 0..2 {
        let before = reads(&client).await;
        stage.publish(order, 2, (types::PAID, b"\xff".to_vec())).await;
        parks(&replica, user, order, 1).await;
        let mut watch = replica.watch(user, order).await.unwrap();
        assert!(watch.next().await.unwrap().unwrap().order.unwrap().parked);
        drop(watch);
        // Connections tell what they read when they have been idle for a while.
        let after = wait::until("the figures", LIMIT, || async {
            let after = reads(&client).await;
            Ok((after["order_journey"].1 > before["order_journey"].1).then_some(after))
        })
        .await
        .unwrap();
        for (table, (scans, entries)) in after {
            let (scans_before, entries_before) = before[&table];
            assert_eq!(scans, scans_before, "{table} was read from one end to the other");
            let entries = entries - entries_before;
            assert!(entries < ROWS / 10, "{table}: {entries} entries");
        }
        client.batch_execute("ANALYZE").await.unwrap();
    }
    replica.stop().await;
}
