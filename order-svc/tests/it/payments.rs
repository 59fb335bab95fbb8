//! What events of payments do to orders, through real Kafka.

use std::net::SocketAddr;

use crate::common::*;
use contracts::catalogue::payment as types;
use contracts::shop::common::v1::Money;
use contracts::shop::order::v1::order_service_client::OrderServiceClient;
use contracts::shop::order::v1::{self as api, OrderStatus};
use contracts::shop::payment::events::v1 as proto;
use diesel_async::{AsyncConnection as _, AsyncPgConnection};
use envelope::Envelope;
use local_stack::process::http_get;
use local_stack::testing::events::{Topic, envelope, headers};
use local_stack::testing::{self, Database, Folder, Process};
use order_svc::Config;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
use uuid::Uuid;

const PARTITIONS: i32 = 6;
/// All but the last digit.
const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319";

/// A database, topics of reservations and payments, and the group of the replicas on them.
pub(crate) struct Stage {
    pub(crate) database: Database,
    topic: Topic,
    inventory_topic: Topic,
    brokers: String,
    group: String,
}

/// An event of a payment, as payment-svc would emit it.
#[derive(Clone)]
pub(crate) struct PaymentEvent {
    pub(crate) envelope: Envelope,
    pub(crate) payload: Vec<u8>,
}

impl PaymentEvent {
    fn new(payment_id: Uuid, version: i64, event_type: &str, payload: &impl prost::Message) -> Self {
        Self {
            envelope: envelope(types::ENTITY_TYPE, &payment_id.to_string(), version, event_type),
            payload: payload.encode_to_vec(),
        }
    }
}

fn visa() -> Option<proto::PaymentMethodSummary> {
    Some(proto::PaymentMethodSummary {
        brand: "visa".into(),
        last_four: "4242".into(),
    })
}

/// All of an order's money was received.
pub(crate) fn received(order: &api::Order, payment_id: Uuid) -> PaymentEvent {
    received_amount(order, payment_id, order.total.clone())
}

fn received_amount(order: &api::Order, payment_id: Uuid, amount: Option<Money>) -> PaymentEvent {
    let event = proto::PaymentReceived {
        payment_id: payment_id.to_string(),
        order_id: order.order_id.clone(),
        amount,
        payment_method: visa(),
        provider_reference: "pi_1".into(),
        received_at: order.updated_at,
    };
    PaymentEvent::new(payment_id, 1, types::RECEIVED, &event)
}

pub(crate) fn failed(order: &api::Order, payment_id: Uuid, another_try: bool) -> PaymentEvent {
    let reason = if another_try {
        proto::FailureReason::Declined
    } else {
        proto::FailureReason::NotPaidInTime
    };
    let event = proto::PaymentFailed {
        payment_id: payment_id.to_string(),
        order_id: order.order_id.clone(),
        amount: order.total.clone(),
        payment_method: None,
        reason: reason.into(),
        another_try,
        provider_reference: None,
        failed_at: order.updated_at,
    };
    PaymentEvent::new(payment_id, 1, types::FAILED, &event)
}

fn refunded(order: &api::Order, payment_id: Uuid) -> PaymentEvent {
    let event = proto::PaymentRefunded {
        payment_id: payment_id.to_string(),
        order_id: order.order_id.clone(),
        amount: order.total.clone(),
        payment_method: visa(),
        provider_reference: "pi_1".into(),
        refund_reference: "re_1".into(),
        refunded_at: order.updated_at,
    };
    PaymentEvent::new(payment_id, 2, types::REFUNDED, &event)
}

impl Stage {
    pub(crate) async fn new() -> Self {
        Self::on(testing::kafka_brokers()).await
    }

    async fn on(brokers: String) -> Self {
        let topic = Topic::create(&brokers, "events.payment", PARTITIONS)
            .await
            .expect("a topic");
        let inventory_topic = Topic::create(&brokers, "events.inventory", PARTITIONS)
            .await
            .expect("a topic");
        Self {
            database: database().await,
            topic,
            inventory_topic,
            brokers,
            group: testing::unique("order-svc"),
        }
    }

    fn config(&self, settings: &[(&str, &str)]) -> Config {
        let mut all = vec![
            ("kafka.brokers", self.brokers.as_str()),
            ("consumer.payment_topic", self.topic.name()),
            ("consumer.inventory_topic", self.inventory_topic.name()),
            ("consumer.group", &self.group),
        ];
        all.extend(settings);
        config(&self.database.url(), &all)
    }

    pub(crate) async fn start(&self, settings: &[(&str, &str)]) -> Running {
        start_with(self.config(settings)).await
    }

    /// Two replicas, each with some of the partitions.
    pub(crate) async fn start_two(&self, settings: &[(&str, &str)]) -> [Running; 2] {
        let replicas = [self.start(settings).await, self.start(settings).await];
        for replica in &replicas {
            until("partitions are assigned", async || {
                metric(replica.admin, "consumer_assigned_partitions").await == f64::from(PARTITIONS)
            })
            .await;
        }
        replicas
    }

    pub(crate) async fn publish(&self, event: &PaymentEvent) {
        self.topic
            .publish(&event.envelope, &event.payload)
            .await
            .expect("published");
    }

    /// Publishes an event of a reservation.
    pub(crate) async fn publish_inventory(&self, envelope: &Envelope, payload: &[u8]) {
        let published = self.inventory_topic.publish(envelope, payload).await;
        published.expect("published");
    }

    /// Waits until this event and those before it in its partition have been taken in.
    pub(crate) async fn heard(&self, event: &PaymentEvent) {
        self.heard_of(&event.envelope).await;
    }

    /// The same of any event.
    pub(crate) async fn heard_of(&self, envelope: &Envelope) {
        let sql = self.database.connect().await.expect("connected");
        let (entity, version) = (&envelope.entity_id, envelope.version);
        let query = "SELECT count(*) FROM consumer_marks WHERE entity_id = $1 AND version >= $2";
        until("the event is taken in", async || {
            let row = sql.query_one(query, &[entity, &version]).await.expect(query);
            row.get::<_, i64>(0) == 1
        })
        .await;
    }

    pub(crate) async fn assert_sound(&self) {
        let mut conn = AsyncPgConnection::establish(&self.database.url())
            .await
            .expect("connected");
        let report = order_svc::verify::verify(&mut conn).await.expect("verified");
        assert!(report.sound().is_ok(), "{report}");
    }
}

/// The sum of a metric over its labels.
pub(crate) async fn metric(admin: SocketAddr, name: &str) -> f64 {
    let (_, text) = http_get(admin, "/metrics").await.expect("metrics");
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        rest.starts_with([' ', '{'])
            .then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
    });
    values.sum()
}

/// The types of an order's events, oldest first.
pub(crate) async fn types_of(service: &Running, order: &api::Order) -> Vec<String> {
    let history = service
        .history(&order.user_id, &order.order_id, 0, "")
        .await
        .expect("there");
    history.events.into_iter().map(|event| event.r#type).collect()
}

pub(crate) async fn is(service: &Running, order: &api::Order, status: OrderStatus) {
    until(status.as_str_name(), async || {
        let seen = service.get(&order.user_id, &order.order_id).await.expect("there");
        seen.status() == status
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn money_that_is_received_pays_its_order_once() {
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let order = service.place(place_request()).await.expect("placed");
    let payment = Uuid::now_v7();
    let event = received(&order, payment);
    stage.publish(&event).await;
    is(&service, &order, OrderStatus::Paid).await;
    let paid = service.get(&order.user_id, &order.order_id).await.expect("there");
    assert_eq!((paid.version, &paid.payment_id), (2, &payment.to_string()));

    // The event again, as a relay repeats it: the next event of the payment comes after it.
    stage.publish(&event).await;
    let next = PaymentEvent::new(payment, 2, "payment.of.the.future", &());
    stage.publish(&next).await;
    stage.heard(&next).await;
    let history = service
        .history(&order.user_id, &order.order_id, 0, "")
        .await
        .expect("there");
    let [_, told] = history.events.as_slice() else {
        panic!("{history:?}")
    };
    assert_eq!((told.r#type.as_str(), told.version), ("order.paid", 2));
    assert_eq!(told.correlation_id, order.order_id);
    assert_eq!(told.causation_id, event.envelope.event_id.to_string());
    let shown: serde_json::Value = serde_json::from_str(&told.payload_json).expect("JSON");
    assert_eq!(shown["paymentMethod"]["lastFour"], "4242");

    let sql = stage.database.connect().await.expect("connected");
    let published = "SELECT count(*) FROM outbox WHERE event_type = 'order.paid'";
    assert_eq!(count(&sql, published).await, 1);
    service.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_event_does_what_it_should() {
    use OrderStatus::{Cancelled, Paid, Pending};
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let payment = Uuid::now_v7;
    type Events = fn(&api::Order, [Uuid; 2]) -> Vec<PaymentEvent>;
    let table: [(&str, bool, Events, OrderStatus, &str); 8] = [
        (
            "failed, with another try",
            false,
            |order, [a, b]| vec![failed(order, a, true), failed(order, b, true)],
            Pending,
            "",
        ),
        (
            "failed, then received",
            false,
            |order, [a, b]| vec![failed(order, a, true), received(order, b)],
            Paid,
            "",
        ),
        (
            "failed for good",
            false,
            |order, [a, b]| vec![failed(order, a, true), failed(order, b, false)],
            Cancelled,
            "the payment failed",
        ),
        (
            "received and given back",
            false,
            |order, [a, _]| vec![received(order, a), refunded(order, a)],
            Cancelled,
            "the payment was given back",
        ),
        (
            "received after the user cancelled",
            true,
            |order, [a, _]| vec![received(order, a)],
            Cancelled,
            "changed my mind",
        ),
        (
            "the same, given back",
            true,
            |order, [a, _]| vec![received(order, a), refunded(order, a)],
            Cancelled,
            "changed my mind",
        ),
        (
            "failed for good after the user cancelled",
            true,
            |order, [a, _]| vec![failed(order, a, false)],
            Cancelled,
            "changed my mind",
        ),
        (
            "late news of a failed one",
            false,
            |order, [a, b]| vec![received(order, a), failed(order, b, true)],
            Paid,
            "",
        ),
    ];
    for (what, cancelled, events, status, reason) in table {
        let order = service.place(place_request()).await.expect("placed");
        if cancelled {
            service.cancel(cancel_request(&order)).await.expect("cancelled");
        }
        // One after the other: their payments are on several partitions.
        for event in events(&order, [payment(), payment()]) {
            stage.publish(&event).await;
            stage.heard(&event).await;
        }
        let seen = service.get(&order.user_id, &order.order_id).await.expect("there");
        assert_eq!(
            (seen.status(), seen.cancel_reason.as_str()),
            (status, reason),
            "{what}"
        );
    }
    service.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_share_the_payments_of_the_same_orders() {
    const ORDERS: usize = 60;
    let stage = Stage::new().await;
    let [a, b] = stage.start_two(&[]).await;
    let mut events: Vec<Vec<PaymentEvent>> = Vec::new();
    let mut orders = Vec::new();
    for _ in 0..ORDERS {
        let order = a.place(place_request()).await.expect("placed");
        let payments: [Uuid; 4] = std::array::from_fn(|_| Uuid::now_v7());
        let mut of_order = vec![received(&order, payments[0])];
        // News for which the order is locked, and which has nothing to say any more.
        of_order.extend(
            payments[1..]
                .iter()
                .map(|payment| refunded_first(&order, *payment)),
        );
        events.push(of_order);
        orders.push(order);
    }
    // Every second round goes the other way, so that batches meet the same orders in different orders.
    for round in 0..4 {
        let mut of_round: Vec<&PaymentEvent> = events.iter().map(|of_order| &of_order[round]).collect();
        if round % 2 == 1 {
            of_round.reverse();
        }
        futures::future::join_all(of_round.into_iter().map(|event| stage.publish(event))).await;
    }
    for event in events.iter().flatten() {
        stage.heard(event).await;
    }
    for order in &orders {
        assert_eq!(types_of(&a, order).await, ["order.placed", "order.paid"]);
    }
    for replica in [&a, &b] {
        // Nothing waited for each other in a circle.
        assert_eq!(metric(replica.admin, "consumer_retries_total").await, 0.0);
    }
    a.stop().await;
    b.stop().await;
    stage.assert_sound().await;
}

/// The refund of a payment that order-svc has not heard of.
fn refunded_first(order: &api::Order, payment_id: Uuid) -> PaymentEvent {
    let mut event = refunded(order, payment_id);
    event.envelope.version = 1;
    event
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_never_be_taken_in_is_loud_and_stops_no_command() {
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let order = service.place(place_request()).await.expect("placed");
    let unknown = api::Order {
        order_id: id(),
        ..order.clone()
    };
    let cent = Money {
        minor_units: 1,
        currency_code: "EUR".into(),
    };
    let paid = service.place(place_request()).await.expect("placed");
    let first = received(&paid, Uuid::now_v7());
    stage.publish(&first).await;
    stage.heard(&first).await;
    let payment = Uuid::now_v7();
    let garbage = PaymentEvent {
        envelope: envelope(types::ENTITY_TYPE, &payment.to_string(), 1, types::RECEIVED),
        payload: vec![0xff],
    };
    let mut of_another = received(&order, Uuid::now_v7());
    of_another.envelope.entity_id = Uuid::now_v7().to_string();
    let mut too_new = received(&order, Uuid::now_v7());
    too_new.envelope.schema_version = 2;
    let bad = [
        (received(&unknown, Uuid::now_v7()), "there is no such order"),
        (
            received_amount(&order, Uuid::now_v7(), Some(cent)),
            "the payment is not of the order's amount",
        ),
        (
            received(&paid, Uuid::now_v7()),
            "the order was paid by another payment",
        ),
        (garbage, "the payload is not what its type says"),
        (of_another, "the payload is of another entity than the record"),
        (too_new, "major version 2 of the payload's schema is not known"),
    ];
    for (partition, (event, _)) in (0..PARTITIONS).zip(&bad) {
        let key = Some(event.envelope.entity_id.as_str());
        let headers = headers(&event.envelope);
        stage
            .topic
            .produce(key, Some(&event.payload), headers, Some(partition))
            .await
            .expect("published");
    }
    let sql = stage.database.connect().await.expect("connected");
    for (event, why) in &bad {
        let entity = &event.envelope.entity_id;
        let asked = "SELECT error FROM parked_records WHERE entity_id = $1 AND version = 1";
        until("it is parked", async || {
            let rows = sql.query(asked, &[entity]).await.expect("an answer");
            rows.iter().any(|row| row.get::<_, &str>(0).contains(why))
        })
        .await;
    }
    let (code, text) = http_get(service.admin, "/readyz").await.expect("an answer");
    assert_eq!(code, 200, "{text}");
    serves_commands(&service).await;
    // Behind each of them, payments of others take effect.
    let later = service.place(place_request()).await.expect("placed");
    let event = received(&later, Uuid::now_v7());
    for partition in 0..PARTITIONS {
        let key = Some(event.envelope.entity_id.as_str());
        let sent = stage.topic.produce(
            key,
            Some(&event.payload),
            headers(&event.envelope),
            Some(partition),
        );
        sent.await.expect("published");
    }
    is(&service, &later, OrderStatus::Paid).await;
    service.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_cannot_be_read_holds_up_no_other_of_its_batch() {
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let good = service.place(place_request()).await.expect("placed");
    let broken = service.place(place_request()).await.expect("placed");
    service.stop().await;
    let sql = stage.database.connect().await.expect("connected");
    sql.batch_execute(&format!(
        "SET session_replication_role = replica; UPDATE orders SET currency = 'XXX' WHERE order_id = '{}'",
        broken.order_id
    ))
    .await
    .expect("tampered");
    // Both are there, in one partition, before anyone reads them.
    for order in [&good, &broken] {
        let event = received(order, Uuid::now_v7());
        let (key, headers) = (event.envelope.entity_id.as_str(), headers(&event.envelope));
        let topic = &stage.topic;
        let sent = topic.produce(Some(key), Some(&event.payload), headers, Some(0));
        sent.await.expect("published");
    }
    let service = stage.start(&[("consumer.workers", "1")]).await;
    is(&service, &good, OrderStatus::Paid).await;
    until("the other one is parked", async || {
        let rows = sql.query("SELECT error FROM parked_records", &[]).await;
        rows.expect("an answer").len() == 1
    })
    .await;
    service.stop().await;
}

/// Commands are done, and whoever asks for health is sent here.
async fn serves_commands(service: &Running) {
    let order = service.place(place_request()).await.expect("placed");
    service.cancel(cancel_request(&order)).await.expect("cancelled");
    let request = HealthCheckRequest::default();
    let health = HealthClient::new(service.channel.clone()).check(request).await;
    let health = health.expect("an answer").into_inner();
    assert_eq!(health.status(), ServingStatus::Serving);
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_do_without_kafka_and_payments_come_with_it() {
    let folder = Folder::create("order-svc-no-kafka");
    let mut kafka = testing::private_kafka(&folder).await.expect("started");
    let stage = Stage::on(kafka.brokers()).await;
    kafka.stop().await.expect("stopped");

    let service = stage.start(&[]).await;
    serves_commands(&service).await;
    let order = service.place(place_request()).await.expect("placed");
    kafka.start().await.expect("started again");
    stage.publish(&received(&order, Uuid::now_v7())).await;
    is(&service, &order, OrderStatus::Paid).await;
    service.stop().await;

    // And it ends without Kafka, too.
    let service = stage.start(&[("consumer.drain_timeout", "1s")]).await;
    until("partitions are assigned", async || {
        metric(service.admin, "consumer_assigned_partitions").await == f64::from(2 * PARTITIONS)
    })
    .await;
    kafka.kill().expect("killed");
    serves_commands(&service).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payments_trace_goes_on_and_is_logged() {
    let stage = Stage::new().await;
    let folder = Folder::create("order-svc-payments");
    let mut process = Process::builder("order-svc", folder.path())
        .set("database.url", stage.database.url())
        .set("kafka.brokers", &stage.brokers)
        .set("consumer.payment_topic", stage.topic.name())
        .set("consumer.inventory_topic", stage.inventory_topic.name())
        .set("consumer.group", &stage.group)
        .start()
        .await
        .expect("started");
    let url = process.grpc_url().expect("listening");
    let mut client = OrderServiceClient::connect(url).await.expect("connected");
    let mut orders = Vec::new();
    // Several at once, which share a batch: each is a part of its own trace all the same.
    for number in 0..3 {
        let placed = client.place_order(place_request()).await.expect("placed");
        let order = placed.into_inner().order.expect("an order");
        let mut event = received(&order, Uuid::now_v7());
        let trace_id = format!("{TRACE_ID}{number}");
        event.envelope.traceparent = Some(format!("00-{trace_id}-b7ad6b7169203331-01"));
        event.envelope.tracestate = Some("vendor=1".to_owned());
        stage.publish(&event).await;
        orders.push((order, event, trace_id));
    }
    let sql = stage.database.connect().await.expect("connected");
    for (order, event, trace_id) in orders {
        stage.heard(&event).await;
        let query =
            "SELECT traceparent, tracestate FROM outbox WHERE aggregate_id = $1 AND aggregate_version = 2";
        let row = sql.query_one(query, &[&order.order_id]).await.expect("a row");
        assert_eq!(service::telemetry::trace_id(row.get(0)), Some(trace_id.as_str()));
        assert_eq!(row.get::<_, Option<&str>>(1), Some("vendor=1"));
        until("it is logged", async || {
            let log = std::fs::read_to_string(process.log()).expect("a log");
            log.lines().any(|line| {
                line.contains("recorded order.paid")
                    && line.contains(&order.order_id)
                    && line.contains(&trace_id)
            })
        })
        .await;
    }
    let status = process.stop_within(LIMIT).await.expect("stopped");
    assert!(status.success(), "{status}");
}
