use contracts::catalogue::{
    inventory as inventory_types, order as order_types, payment as payment_types, stock as stock_types,
};
use contracts::catalogue::{
    notification as notification_types, order_analytics as analytics_types, user as user_types,
};
use contracts::shop::analytics::events::v1::{OrderAnalyticsUpdated, ProductSales, SalesFigures, WindowSize};
use contracts::shop::analytics::v1::SalesWindow;
use contracts::shop::common::v1::Money;
use contracts::shop::inventory::events::v1::StockUpdated;
use contracts::shop::notification::events::v1::NotificationSent;
use contracts::shop::order::events::v1::{OrderCancelled, OrderLine, OrderPlaced};
use contracts::shop::order::v1::OrderItem;
use contracts::shop::payment::events::v1::{
    FailureReason, PaymentFailed, PaymentMethodSummary, PaymentReceived, PaymentRefunded,
};
use contracts::shop::payment::v1::PaymentFailure;
use envelope::header;
use prost::Message as _;
use uuid::Uuid;

use super::journeys;
use super::views::expected_view;
use super::*;
use crate::ledger::{Charge, Refund};
use crate::load::ToldTry;
use crate::plan::Outcome;

const USER: &str = "u";
const ORDERS: usize = 0;
const PAYMENTS: usize = 1;
const INVENTORY: usize = 2;
const STOCK: usize = 3;
const USERS: usize = 4;
const NOTIFICATIONS: usize = 5;
const ANALYTICS: usize = 6;
const EMAIL: &str = "u@example.org";
const PRODUCT: &str = "p";
/// Pieces of the product in each order.
const QUANTITY: i32 = 2;
/// How many pieces there were.
const STOCKED: i64 = 10;

/// Order a was paid; b was cancelled by its user; c was paid, and then cancelled by its user; d's card was declined, and nobody paid
/// it in time; e's stock was not to be had; f was paid and shipped.
fn parts() -> Parts {
    let mut parts = Parts {
        sources: vec![
            source(contracts::topics::ORDER),
            source(contracts::topics::PAYMENT),
            source(contracts::topics::INVENTORY),
            source(contracts::topics::STOCK),
            source(contracts::topics::USER),
            source(contracts::topics::NOTIFICATION),
            source(contracts::topics::ORDER_ANALYTICS),
        ],
        ..Parts::default()
    };
    parts.sign_up();
    parts.place("a");
    parts.pay("a", "pa");
    parts.place("b");
    parts.cancel("b", CancelledBy::User);
    parts.place("c");
    parts.pay("c", "pc");
    parts.cancel("c", CancelledBy::User);
    parts.refund("c");
    parts.place("d");
    parts.decline("d", "pd", FailureReason::Declined);
    parts.decline("d", "pe", FailureReason::NotPaidInTime);
    parts.cancel("d", CancelledBy::NotPaidInTime);
    parts.place("e");
    parts.reservations[4].status = "rejected".to_owned();
    parts.cancel("e", CancelledBy::OutOfStock);
    parts.place("f");
    parts.pay("f", "pf");
    parts.ship("f");
    parts.count_stock();
    parts.count_sales();
    parts.look();
    parts
}

fn source(topic: &'static str) -> Source {
    Source {
        topic,
        ..Source::default()
    }
}

impl Parts {
    fn event(&mut self, source: usize, entity_id: &str, version: i64, event_type: &str, payload: Vec<u8>) {
        let source = &mut self.sources[source];
        let event = EventRow {
            entity_type: event_type.split('.').next().unwrap_or_default().to_owned(),
            entity_id: entity_id.to_owned(),
            version,
            event_id: Uuid::new_v4(),
            event_type: event_type.to_owned(),
            schema_version: 1,
            payload,
            correlation_id: None,
            traceparent: None,
        };
        let row = OutboxRow {
            id: source.outbox.len() as i64 + 1,
            event: event.clone(),
            committed_at_us: 1_000_000,
        };
        source.records.push(record(&row, source.records.len() as i64));
        source.outbox.push(row);
        source.events.push(event.clone());
        let topic = source.topic;
        self.mail(&event);
        if ![contracts::topics::ORDER, contracts::topics::PAYMENT].contains(&topic) {
            return;
        }
        let mark = Mark {
            topic: topic.to_owned(),
            entity_id: entity_id.to_owned(),
            version,
            committed_at_us: 1_007_000,
        };
        self.view_marks.retain(|other| other.entity_id != entity_id);
        self.view_marks.push(mark);
    }

    /// Orders, shipments and refunds are told of by mail.
    fn mail(&mut self, event: &EventRow) {
        let told = [
            order_types::PLACED,
            order_types::CONFIRMED,
            order_types::SHIPPED,
            order_types::CANCELLED,
            payment_types::REFUNDED,
        ];
        if !told.contains(&event.event_type.as_str()) {
            return;
        }
        let order_id = event.entity_id.trim_start_matches('p').to_owned();
        self.mails.push(MailRow {
            notification_id: event.event_id,
            order_id: order_id.clone(),
            event_type: event.event_type.clone(),
            state: "sent".to_owned(),
        });
        self.received.push(Mail {
            sender: "shop@shop.example".to_owned(),
            recipients: vec![EMAIL.to_owned()],
            headers: vec![(
                "message-id".to_owned(),
                format!("<{}@shop.example>", event.event_id),
            )],
            text: format!("Order {order_id}"),
            html: format!("<p>Order {order_id}</p>"),
            encrypted: true,
            login: local_stack::smtp::USER.to_owned(),
        });
        let id = event.event_id.to_string();
        let sent = NotificationSent {
            notification_id: id.clone(),
            order_id,
            ..NotificationSent::default()
        };
        self.event(
            NOTIFICATIONS,
            &id,
            1,
            notification_types::SENT,
            sent.encode_to_vec(),
        );
    }

    fn sign_up(&mut self) {
        let user = User {
            user_id: USER.to_owned(),
            email: EMAIL.to_owned(),
            version: 1,
            ..User::default()
        };
        self.event(USERS, USER, 1, user_types::CREATED, vec![9]);
        self.users.push(ToldUser {
            user: user.clone(),
            emails: vec![EMAIL.to_owned()],
        });
        self.user_answers.push(user.clone());
        self.user_rows.push(user);
    }

    /// All orders were placed in the first minute of 1970, and three of them were confirmed, one of which was cancelled.
    fn count_sales(&mut self) {
        let figures = SalesFigures {
            currency_code: "EUR".to_owned(),
            orders_placed: 6,
            orders_confirmed: 3,
            orders_cancelled: 4,
            revenue_minor_units: 10,
            refunded_minor_units: 5,
            best_sellers: vec![ProductSales {
                product_id: PRODUCT.to_owned(),
                quantity: 4,
                revenue_minor_units: 12,
            }],
        };
        let sizes = [WindowSize::Minute, WindowSize::Hour, WindowSize::Day];
        for (size, name) in sizes.into_iter().zip(["minute", "hour", "day"]) {
            let window = format!("{name}/1970-01-01T00:00:00Z");
            let updated = OrderAnalyticsUpdated {
                window_size: size.into(),
                figures: vec![figures.clone()],
                ..OrderAnalyticsUpdated::default()
            };
            self.event(
                ANALYTICS,
                &window,
                1,
                analytics_types::UPDATED,
                updated.encode_to_vec(),
            );
            self.windows.push((window, 1));
            for instance in 0..2 {
                self.summaries.push(Answer {
                    instance,
                    size,
                    windows: vec![SalesWindow {
                        window_size: size.into(),
                        window_start: Some(prost_types::Timestamp::default()),
                        figures: vec![figures.clone()],
                        conversion: 0.5,
                    }],
                });
            }
        }
    }

    fn place(&mut self, id: &str) {
        let order = Order {
            order_id: id.to_owned(),
            user_id: USER.to_owned(),
            status: OrderStatus::Pending.into(),
            items: vec![OrderItem {
                product_id: PRODUCT.to_owned(),
                quantity: QUANTITY,
                ..OrderItem::default()
            }],
            total: Some(money()),
            version: 1,
            ..Order::default()
        };
        let placed = OrderPlaced {
            order_id: id.to_owned(),
            items: vec![OrderLine {
                product_id: PRODUCT.to_owned(),
                quantity: QUANTITY,
                unit_price_minor_units: 3,
            }],
            total: Some(money()),
            created_at: Some(prost_types::Timestamp::default()),
            ..OrderPlaced::default()
        };
        self.event(ORDERS, id, 1, order_types::PLACED, placed.encode_to_vec());
        self.event(INVENTORY, id, 1, inventory_types::RESERVED, vec![5]);
        self.reservations.push(Reservation {
            order_id: id.to_owned(),
            status: "reserved".to_owned(),
            version: 1,
        });
        self.told.push(ToldOrder {
            placed: order.clone(),
            ..ToldOrder::default()
        });
        self.orders.push(order);
    }

    fn order(&mut self, id: &str) -> &mut Order {
        self.orders
            .iter_mut()
            .find(|order| order.order_id == id)
            .expect("placed")
    }

    /// inventory-svc has heard of the order's end, unless it has nothing of it.
    fn reservation_ends(&mut self, id: &str, status: &str, event_type: &str) {
        let of_order = |reservation: &&mut Reservation| reservation.order_id == id;
        let reservation = self.reservations.iter_mut().find(of_order).expect("placed");
        if reservation.status != "rejected" {
            reservation.status = status.to_owned();
            reservation.version += 1;
            let version = reservation.version;
            self.event(INVENTORY, id, version, event_type, vec![6]);
        }
    }

    fn ship(&mut self, id: &str) {
        let order = self.order(id);
        order.version += 1;
        order.status = OrderStatus::Shipped.into();
        order.carrier = "Post".to_owned();
        let order = order.clone();
        self.event(ORDERS, id, order.version, order_types::SHIPPED, vec![7]);
        let told = self.told.iter_mut().find(|told| told.placed.order_id == id);
        told.expect("placed").shipped = Some(order);
    }

    /// What is left of the product.
    fn count_stock(&mut self) {
        let of_order =
            |order: &&Order| [OrderStatus::Confirmed, OrderStatus::Shipped].contains(&order.status());
        let sold = i64::from(QUANTITY) * count(self.orders.iter().filter(of_order).count()) as i64;
        let stock = Stock {
            product_id: PRODUCT.to_owned(),
            available: STOCKED - sold,
            sold,
            version: 1,
            ..Stock::default()
        };
        let updated = StockUpdated {
            product_id: PRODUCT.to_owned(),
            available: stock.available,
            sold,
            ..StockUpdated::default()
        };
        self.event(STOCK, PRODUCT, 1, stock_types::UPDATED, updated.encode_to_vec());
        self.stocked.insert(PRODUCT.to_owned(), STOCKED);
        self.stock_answers.push(stock.clone());
        self.stock.push(stock);
    }

    fn pay(&mut self, order_id: &str, id: &str) {
        let intent = format!("pi_{id}");
        let received = PaymentReceived {
            payment_id: id.to_owned(),
            order_id: order_id.to_owned(),
            amount: Some(money()),
            payment_method: Some(method()),
            provider_reference: intent.clone(),
            received_at: None,
        };
        self.event(PAYMENTS, id, 1, payment_types::RECEIVED, received.encode_to_vec());
        let payment = Payment {
            status: PaymentStatus::Received.into(),
            provider_reference: intent.clone(),
            ..payment(order_id, id)
        };
        self.tried(order_id, Outcome::Approved, &payment);
        self.payments.push(payment);
        self.ledger.charges.push(Charge {
            id: format!("ch_{id}"),
            payment_intent: intent,
            amount: 5,
            currency: "eur".to_owned(),
            payment_id: Some(id.to_owned()),
            order_id: Some(order_id.to_owned()),
        });
        self.event(ORDERS, order_id, 2, order_types::PAID, vec![4]);
        self.event(ORDERS, order_id, 3, order_types::CONFIRMED, vec![5]);
        let order = self.order(order_id);
        order.version = 3;
        order.status = OrderStatus::Confirmed.into();
        order.payment_id = id.to_owned();
        self.reservation_ends(order_id, "committed", inventory_types::COMMITTED);
    }

    fn decline(&mut self, order_id: &str, id: &str, reason: FailureReason) {
        let another_try = reason != FailureReason::NotPaidInTime;
        let failed = PaymentFailed {
            payment_id: id.to_owned(),
            order_id: order_id.to_owned(),
            amount: Some(money()),
            payment_method: Some(method()),
            reason: reason.into(),
            another_try,
            provider_reference: None,
            failed_at: None,
        };
        self.event(PAYMENTS, id, 1, payment_types::FAILED, failed.encode_to_vec());
        let payment = Payment {
            status: PaymentStatus::Failed.into(),
            failure: Some(PaymentFailure {
                reason: reason.into(),
                another_try,
            }),
            ..payment(order_id, id)
        };
        if another_try {
            self.tried(order_id, Outcome::Declined, &payment);
        }
        self.payments.push(payment);
    }

    fn tried(&mut self, order_id: &str, outcome: Outcome, payment: &Payment) {
        let told = self.told.iter_mut().find(|told| told.placed.order_id == order_id);
        told.expect("placed").tries.push(ToldTry {
            outcome,
            payment: Some(payment.clone()),
        });
    }

    fn cancel(&mut self, id: &str, by: CancelledBy) {
        let order = self.order(id);
        order.version += 1;
        order.status = OrderStatus::Cancelled.into();
        let order = order.clone();
        let cancelled = OrderCancelled {
            order_id: id.to_owned(),
            cancelled_by: by.into(),
            ..OrderCancelled::default()
        };
        self.event(
            ORDERS,
            id,
            order.version,
            order_types::CANCELLED,
            cancelled.encode_to_vec(),
        );
        self.reservation_ends(id, "released", inventory_types::RELEASED);
        if by == CancelledBy::User {
            let told = self.told.iter_mut().find(|told| told.placed.order_id == id);
            told.expect("placed").cancelled = Some(order);
        }
    }

    fn refund(&mut self, order_id: &str) {
        let payment = self.payments.last_mut().expect("paid");
        payment.status = PaymentStatus::Refunded.into();
        payment.version = 2;
        let payment = payment.clone();
        let refunded = PaymentRefunded {
            payment_id: payment.payment_id.clone(),
            order_id: order_id.to_owned(),
            amount: Some(money()),
            payment_method: Some(method()),
            provider_reference: payment.provider_reference.clone(),
            refund_reference: "re_1".to_owned(),
            refunded_at: None,
        };
        self.event(
            PAYMENTS,
            &payment.payment_id,
            2,
            payment_types::REFUNDED,
            refunded.encode_to_vec(),
        );
        self.ledger.refunds.push(Refund {
            id: "re_1".to_owned(),
            payment_intent: payment.provider_reference,
            amount: 5,
            currency: "eur".to_owned(),
            status: "succeeded".to_owned(),
            payment_id: Some(payment.payment_id),
            order_id: Some(order_id.to_owned()),
        });
    }

    /// What the read model answers about where events have been.
    fn follow_journeys(&mut self) {
        self.journeys.clear();
        for (order_id, events) in journeys::expected(self) {
            let journey = GetOrderJourneyResponse {
                events,
                ..GetOrderJourneyResponse::default()
            };
            self.journeys.insert(order_id, journey);
        }
    }

    /// What the services answer.
    fn look(&mut self) {
        self.answers = self.payments.clone();
        for order in &self.orders {
            let of_order = |payment: &&Payment| payment.order_id == order.order_id;
            let payments: Vec<&Payment> = self.payments.iter().filter(of_order).collect();
            let view = expected_view(order, &payments);
            self.views.push(view.clone());
            self.lists.entry(USER.to_owned()).or_default().push(view);
        }
        self.follow_journeys();
    }
}

fn money() -> Money {
    Money {
        minor_units: 5,
        currency_code: "EUR".to_owned(),
    }
}

fn method() -> PaymentMethodSummary {
    PaymentMethodSummary {
        brand: "visa".to_owned(),
        last_four: "4242".to_owned(),
    }
}

fn payment(order_id: &str, id: &str) -> Payment {
    Payment {
        payment_id: id.to_owned(),
        order_id: order_id.to_owned(),
        user_id: USER.to_owned(),
        amount: Some(money()),
        brand: method().brand,
        last_four: method().last_four,
        version: 1,
        ..Payment::default()
    }
}

fn record(row: &OutboxRow, offset: i64) -> Record {
    let event = &row.event;
    let headers = [
        (header::CE_SPECVERSION, "1.0".to_owned()),
        (header::CE_ID, event.event_id.to_string()),
        (header::CE_TYPE, event.event_type.clone()),
        (
            header::CE_SUBJECT,
            format!("{}/{}", event.entity_type, event.entity_id),
        ),
        (header::AGGREGATE_VERSION, event.version.to_string()),
        (header::SCHEMA_VERSION, "1".to_owned()),
        (header::OUTBOX_ID, row.id.to_string()),
    ];
    Record {
        partition: 0,
        offset,
        appended_at_ms: 1_003,
        key: Some(event.entity_id.clone().into_bytes()),
        payload: Some(event.payload.clone()),
        headers: headers
            .map(|(name, value)| (name.to_owned(), Some(value.into_bytes())))
            .into(),
    }
}

#[test]
fn what_went_well_reconciles() {
    let (figures, problems) = reconcile(&parts(), Vec::new());
    assert_eq!(problems, Vec::<String>::new());
    let expected = Figures {
        placed: 6,
        cancelled: 4,
        out_of_stock: 1,
        shipped: 1,
        paid: 3,
        declined: 1,
        refunded: 1,
        outbox_rows: 55,
        kafka_records: 55,
        lost: 0,
        repeated: 0,
        out_of_order: 0,
        projected: 6,
        charges_match: true,
        refunds_match: true,
        stock_conserved: true,
        mails_match: true,
        mails_sent: 15,
        mails_unknown: 0,
        analytics_match: true,
        sagas_open: 0,
        kafka_p50_ms: 3.0,
        kafka_p99_ms: 3.0,
        view_p50_ms: 7.0,
        view_p99_ms: 7.0,
        reconciled: true,
    };
    assert_eq!(figures, expected);
}

#[test]
fn an_identical_repeat_is_counted_and_allowed() {
    let mut parts = parts();
    let records = &mut parts.sources[PAYMENTS].records;
    let again = Record {
        offset: 9,
        ..records[1].clone()
    };
    records.push(again);
    let (figures, _) = reconcile(&parts, Vec::new());
    assert!(figures.reconciled);
    assert_eq!(
        (figures.repeated, figures.kafka_records, figures.out_of_order),
        (1, 56, 0)
    );
}

#[track_caller]
fn broken(spoil: impl FnOnce(&mut Parts)) -> Figures {
    let mut parts = parts();
    spoil(&mut parts);
    let (figures, problems) = reconcile(&parts, Vec::new());
    assert!(!figures.reconciled && !problems.is_empty(), "not noticed");
    figures
}

#[test]
fn events_that_do_not_fit_are_noticed() {
    for source in [ORDERS, PAYMENTS, INVENTORY] {
        assert_eq!(
            broken(|parts| drop(parts.sources[source].records.remove(1))).lost,
            1
        );
        broken(|parts| parts.sources[source].records[0].payload = None);
        broken(|parts| parts.sources[source].records[0].key = Some(b"b".to_vec()));
        broken(|parts| parts.sources[source].records[0].headers[1].1 = Some(b"other".to_vec()));
        broken(|parts| parts.sources[source].records[0].headers[6].1 = Some(b"99".to_vec()));
        broken(|parts| {
            let mut again = parts.sources[source].records[0].clone();
            again.payload = Some(vec![9]);
            parts.sources[source].records.push(again);
        });
        broken(|parts| drop(parts.sources[source].events.pop()));
        broken(|parts| drop(parts.sources[source].outbox.pop()));
        broken(|parts| parts.sources[source].events[0].payload = vec![9]);
    }
    assert_eq!(
        broken(|parts| parts.sources[ORDERS].records.swap(0, 1)).out_of_order,
        1
    );
    assert_eq!(
        broken(|parts| parts.sources[ORDERS].records[1].partition = 1).out_of_order,
        1
    );
}

#[test]
fn orders_that_do_not_fit_are_noticed() {
    broken(|parts| parts.orders[0].version = 4);
    broken(|parts| drop(parts.orders.pop()));
    broken(|parts| drop(parts.told.pop()));
    broken(|parts| parts.told[0].placed.user_email = "other".to_owned());
    broken(|parts| parts.told[1].cancelled = None);
    broken(|parts| parts.order("b").cancel_reason = "other".to_owned());
    broken(|parts| parts.order("a").status = OrderStatus::Pending.into());
    broken(|parts| parts.order("a").payment_id = "pc".to_owned());
    // A user who was told that he had cancelled, and whom the saga cancelled for want of money.
    broken(|parts| {
        let order = parts.order("d").clone();
        parts.told[3].cancelled = Some(order);
    });
    // Cancelled for want of stock, and it was to be had.
    broken(|parts| parts.reservations[4].status = "released".to_owned());
    broken(|parts| parts.told[5].shipped = None);
    broken(|parts| parts.order("f").carrier = "other".to_owned());
    broken(|parts| parts.order("a").status = OrderStatus::Paid.into());
    // Cancelled for want of money, and nobody has said so.
    broken(|parts| parts.payments[3].failure = Some(PaymentFailure::default()));
}

#[test]
fn mails_that_do_not_fit_are_noticed() {
    let found = [
        broken(|parts| drop(parts.mails.pop())),
        broken(|parts| parts.mails[0].state = "pending".to_owned()),
        broken(|parts| parts.mails[0].state = "failed".to_owned()),
        broken(|parts| parts.mails[0].event_type = order_types::SHIPPED.to_owned()),
        // Never sent, sent twice, and sent to somebody else.
        broken(|parts| drop(parts.received.pop())),
        broken(|parts| parts.received.extend(parts.received.first().cloned())),
        broken(|parts| parts.received[0].recipients = vec!["other@example.org".to_owned()]),
        // To the user, and the order has an address of its own.
        broken(|parts| {
            parts.order("a").user_email = "own@example.org".to_owned();
            parts.told[0].placed.user_email = "own@example.org".to_owned();
        }),
        broken(|parts| parts.received[0].encrypted = false),
        broken(|parts| parts.received[0].html = String::new()),
        broken(|parts| parts.received[0].headers.clear()),
        broken(|parts| drop(parts.sources[NOTIFICATIONS].events.pop())),
    ];
    assert!(found.iter().all(|figures| !figures.mails_match));
}

#[test]
fn a_mail_that_nobody_knows_of_is_allowed() {
    for is_there in [true, false] {
        let mut parts = parts();
        // The last one answers the last event of all.
        let unknown = parts.mails.last_mut().expect("mails");
        unknown.state = "unknown".to_owned();
        for of in [
            |source: &mut Source| drop(source.events.pop()),
            |source: &mut Source| drop(source.outbox.pop()),
            |source: &mut Source| drop(source.records.pop()),
        ] {
            of(&mut parts.sources[NOTIFICATIONS]);
        }
        parts.follow_journeys();
        if !is_there {
            parts.received.pop();
        }
        let (figures, problems) = reconcile(&parts, Vec::new());
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!((figures.mails_sent, figures.mails_unknown), (14, 1));
    }
}

#[test]
fn analytics_that_do_not_fit_are_noticed() {
    let found = [
        broken(|parts| parts.summaries[0].windows[0].figures[0].orders_placed = 7),
        broken(|parts| parts.summaries[5].windows[0].figures[0].best_sellers[0].quantity = 5),
        broken(|parts| parts.summaries[3].windows[0].conversion = 0.4),
        broken(|parts| parts.summaries[2].windows.clear()),
        broken(|parts| drop(parts.summaries.pop())),
        broken(|parts| parts.sources[ANALYTICS].records.clear()),
        broken(|parts| parts.sources[ANALYTICS].records[1].payload = Some(Vec::new())),
        broken(|parts| drop(parts.sources[PAYMENTS].records.remove(0))),
    ];
    assert!(found.iter().all(|figures| !figures.analytics_match));
}

#[test]
fn users_that_do_not_fit_are_noticed() {
    broken(|parts| parts.user_rows[0].email = "other@example.org".to_owned());
    broken(|parts| parts.user_answers[0].first_name = "Other".to_owned());
    broken(|parts| drop(parts.users.pop()));
    broken(|parts| drop(parts.user_rows.pop()));
}

#[test]
fn what_has_not_ended_is_noticed() {
    let open = Open {
        sagas: 2,
        ..Open::default()
    };
    assert_eq!(broken(|parts| parts.open = open).sagas_open, 2);
    broken(|parts| parts.open.mails = 1);
}

#[test]
fn payments_that_do_not_fit_are_noticed() {
    broken(|parts| parts.payments[0].status = PaymentStatus::Pending.into());
    broken(|parts| parts.payments[1].status = PaymentStatus::RefundPending.into());
    broken(|parts| parts.payments[0].amount = None);
    broken(|parts| parts.payments[0].last_four = "1111".to_owned());
    broken(|parts| drop(parts.payments.remove(2)));
    broken(|parts| parts.answers[0].version = 7);
    // Told otherwise than it is.
    broken(|parts| parts.told[3].tries[0].payment = parts.told[0].tries[0].payment.clone());
    broken(|parts| parts.told[0].tries[0].outcome = Outcome::Blocked);
    broken(|parts| parts.told[0].tries.clear());
    broken(|parts| parts.told[3].tries[0].outcome = Outcome::Approved);
}

#[test]
fn a_ledger_that_does_not_fit_is_noticed() {
    let charges = [
        broken(|parts| drop(parts.ledger.charges.pop())),
        broken(|parts| parts.ledger.charges[0].amount = 6),
        broken(|parts| parts.ledger.charges[0].currency = "usd".to_owned()),
        broken(|parts| parts.ledger.charges[0].payment_intent = "pi_other".to_owned()),
        broken(|parts| parts.ledger.charges[0].order_id = None),
        broken(|parts| {
            let twice = parts.ledger.charges[0].clone();
            parts.ledger.charges.push(twice);
        }),
    ];
    assert!(
        charges
            .iter()
            .all(|figures| !figures.charges_match && figures.refunds_match)
    );
    let refunds = [
        broken(|parts| parts.ledger.refunds.clear()),
        broken(|parts| parts.ledger.refunds[0].amount = 4),
        broken(|parts| parts.ledger.refunds[0].status = "failed".to_owned()),
        broken(|parts| parts.ledger.refunds[0].order_id = Some("a".to_owned())),
        broken(|parts| {
            let twice = parts.ledger.refunds[0].clone();
            parts.ledger.refunds.push(twice);
        }),
    ];
    assert!(
        refunds
            .iter()
            .all(|figures| figures.charges_match && !figures.refunds_match)
    );
}

#[test]
fn stock_that_does_not_fit_is_noticed() {
    let spoils: [fn(&mut Parts); 12] = [
        |parts| parts.stock[0].available += 1,
        // A piece that is held by nobody, or sold to nobody.
        |parts| {
            parts.stock[0].available -= 1;
            parts.stock[0].reserved += 1;
        },
        |parts| {
            parts.stock[0].available -= 1;
            parts.stock[0].sold += 1;
        },
        |parts| {
            parts.stocked.insert(PRODUCT.to_owned(), STOCKED + 1);
        },
        |parts| parts.stocked.clear(),
        |parts| parts.stock.clear(),
        |parts| parts.stock_answers[0].version = 7,
        |parts| parts.sources[STOCK].records[0].payload = Some(vec![0xff]),
        |parts| parts.sources[STOCK].records.clear(),
        |parts| parts.reservations[0].status = "reserved".to_owned(),
        |parts| parts.reservations[1].status = "committed".to_owned(),
        |parts| drop(parts.reservations.pop()),
    ];
    for spoil in spoils {
        assert!(!broken(spoil).stock_conserved);
    }
}

#[test]
fn views_that_do_not_fit_are_noticed() {
    assert_eq!(broken(|parts| drop(parts.views.pop())).projected, 5);
    assert_eq!(broken(|parts| parts.views[1].version = 1).projected, 5);
    assert_eq!(broken(|parts| parts.views[3].payments.clear()).projected, 5);
    assert_eq!(broken(|parts| parts.lists.clear()).projected, 0);
    broken(|parts| {
        let twice = parts.views[0].clone();
        parts.lists.entry(USER.to_owned()).or_default().push(twice);
    });
}

#[test]
fn journeys_that_do_not_fit_are_noticed() {
    let events = |parts: &Parts| parts.journeys["a"].events.len();
    let parts = parts();
    // Placed, paid, confirmed; received; reserved, committed; two mails.
    assert_eq!(events(&parts), 8);
    let spoils: [fn(&mut GetOrderJourneyResponse); 6] = [
        |journey| drop(journey.events.pop()),
        |journey| journey.events.push(journey.events[0].clone()),
        |journey| journey.events[1].offset += 1,
        |journey| journey.events[1].trace_id = "other".to_owned(),
        |journey| journey.events.swap(0, 1),
        |journey| journey.parked.push(Default::default()),
    ];
    for spoil in spoils {
        broken(|parts| spoil(parts.journeys.get_mut("a").expect("there")));
    }
    broken(|parts| drop(parts.journeys.remove("b")));
}

#[test]
fn problems_of_the_load_count() {
    let (figures, _) = reconcile(&parts(), vec!["a repeated request got another answer".to_owned()]);
    assert!(!figures.reconciled);
}
