//! Each RPC's good path, and what commands leave in the database.

use crate::common::*;
use chrono::{DateTime, Utc};
use contracts::shop::order::v1::{OrderStatus, PlaceOrderRequest};
use diesel_async::{AsyncConnection as _, AsyncPgConnection};
use order_svc::domain::{Change, Command, OrderId, Payment, Shipment};
use order_svc::store::{self, Lock, StoreError};
use tonic::Code;
use uuid::Uuid;

#[tokio::test(flavor = "multi_thread")]
async fn an_order_is_placed_cancelled_and_remembered() {
    let database = database().await;
    let service = start(&database).await;
    let request = place_request();
    let placed = service.place(request.clone()).await.expect("placed");

    assert_eq!(placed.status(), OrderStatus::Pending);
    assert_eq!(
        (placed.version, &placed.user_id, &placed.items),
        (1, &request.user_id, &request.items)
    );
    assert_eq!(
        (&placed.user_email, &placed.payment_method_id),
        (&request.user_email, &request.payment_method_id)
    );
    let total = placed.total.clone().expect("a total");
    assert_eq!((total.minor_units, total.currency_code.as_str()), (1299, "EUR"));
    let seconds = |time: &Option<prost_types::Timestamp>| time.as_ref().expect("a time").seconds;
    assert_eq!(seconds(&placed.pay_by) - seconds(&placed.created_at), 30 * 60);
    assert_eq!(
        service
            .get(&request.user_id, &placed.order_id)
            .await
            .expect("there"),
        placed
    );

    let cancelled = service.cancel(cancel_request(&placed)).await.expect("cancelled");
    assert_eq!(cancelled.status(), OrderStatus::Cancelled);
    assert_eq!(
        (cancelled.version, cancelled.cancel_reason.as_str()),
        (2, "changed my mind")
    );
    assert_eq!(
        service
            .get(&request.user_id, &placed.order_id)
            .await
            .expect("there"),
        cancelled
    );

    let history = service
        .history(&request.user_id, &placed.order_id, 0, "")
        .await
        .expect("there");
    let seen: Vec<_> = history
        .events
        .iter()
        .map(|event| (event.r#type.as_str(), event.version))
        .collect();
    assert_eq!(seen, [("order.placed", 1), ("order.cancelled", 2)]);
    assert_eq!(history.next_page_token, "");
    let placed_event = &history.events[0];
    assert_eq!(
        (&placed_event.correlation_id, &placed_event.causation_id),
        (&placed.order_id, &request.request_id)
    );
    let payload: serde_json::Value = serde_json::from_str(&placed_event.payload_json).expect("JSON");
    assert_eq!(payload["total"]["minorUnits"], "1299");

    let sql = database.connect().await.expect("connected");
    let rows = sql
        .query("SELECT event_id, aggregate_id, aggregate_version, event_type, source, data_schema FROM outbox ORDER BY id", &[])
        .await
        .expect("rows");
    for (row, event) in rows.iter().zip(&history.events) {
        assert_eq!(row.get::<_, Uuid>(0).to_string(), event.event_id);
        assert_eq!(row.get::<_, String>(1), placed.order_id);
        assert_eq!(
            (row.get::<_, i64>(2), row.get::<_, String>(3)),
            (event.version, event.r#type.clone())
        );
        assert_eq!(row.get::<_, String>(4), "/order-svc");
        assert!(row.get::<_, String>(5).starts_with("shop.order.events.v1.Order"));
    }
    assert_eq!(rows.len(), 2);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn history_is_paged() {
    let database = database().await;
    let service = start(&database).await;
    let order = service.place(place_request()).await.expect("placed");
    service.cancel(cancel_request(&order)).await.expect("cancelled");

    let first = service
        .history(&order.user_id, &order.order_id, 1, "")
        .await
        .expect("first");
    assert_eq!(first.events.len(), 1);
    let second = service
        .history(&order.user_id, &order.order_id, 1, &first.next_page_token)
        .await
        .expect("second");
    assert_eq!(
        (second.events[0].version, second.next_page_token.as_str()),
        (2, "")
    );

    let other = service.place(place_request()).await.expect("placed");
    let status = service
        .history(&other.user_id, &other.order_id, 1, &first.next_page_token)
        .await
        .expect_err("another order's");
    check_status(&status, Code::InvalidArgument, "INVALID_REQUEST");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_gets_the_first_response() {
    let database = database().await;
    let service = start(&database).await;
    let request = place_request();
    let first = service.place(request.clone()).await.expect("placed");
    let cancel = cancel_request(&first);
    let cancelled = service.cancel(cancel.clone()).await.expect("cancelled");

    assert_eq!(
        service.place(request.clone()).await.expect("repeat"),
        first,
        "as it was then"
    );
    assert_eq!(service.cancel(cancel.clone()).await.expect("repeat"), cancelled);

    // Another content under the same id.
    let mut other = request.clone();
    other.items[0].quantity += 1;
    check_status(
        &service.place(other).await.expect_err("reused"),
        Code::AlreadyExists,
        "REQUEST_ID_REUSED",
    );
    let mut other = cancel.clone();
    other.reason = "another".into();
    check_status(
        &service.cancel(other).await.expect_err("reused"),
        Code::AlreadyExists,
        "REQUEST_ID_REUSED",
    );

    // The id belongs to a user and a method.
    let another_user = PlaceOrderRequest {
        user_id: id(),
        ..request.clone()
    };
    assert_ne!(
        service.place(another_user).await.expect("placed").order_id,
        first.order_id
    );
    let mut same_id = cancel_request(&first);
    same_id.request_id = request.request_id;
    check_status(
        &service.cancel(same_id).await.expect_err("done"),
        Code::FailedPrecondition,
        "ORDER_CANCELLED",
    );

    let sql = database.connect().await.expect("connected");
    assert_eq!(count(&sql, "SELECT count(*) FROM orders").await, 2);
    assert_eq!(count(&sql, "SELECT count(*) FROM outbox").await, 3);
    assert_eq!(
        count(&sql, "SELECT count(*) FROM requests WHERE response IS NULL").await,
        0
    );
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repeats_at_once_give_one_order() {
    let database = database().await;
    let service = start(&database).await;
    let request = place_request();
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let (mut client, request) = (service.client.clone(), request.clone());
            tokio::spawn(async move { client.place_order(request).await })
        })
        .collect();
    let mut orders = Vec::new();
    for call in calls {
        orders.push(call.await.expect("no panic").expect("placed").into_inner());
    }
    assert!(orders.windows(2).all(|pair| pair[0] == pair[1]), "{orders:?}");
    let sql = database.connect().await.expect("connected");
    assert_eq!(count(&sql, "SELECT count(*) FROM orders").await, 1);
    assert_eq!(count(&sql, "SELECT count(*) FROM outbox").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancels_at_once_have_one_winner() {
    let database = database().await;
    let service = start(&database).await;
    let order = service.place(place_request()).await.expect("placed");
    let calls: Vec<_> = (0..10)
        .map(|_| {
            let (mut client, request) = (service.client.clone(), cancel_request(&order));
            tokio::spawn(async move { client.cancel_order(request).await })
        })
        .collect();
    let mut winners = 0;
    for call in calls {
        match call.await.expect("no panic") {
            Ok(_) => winners += 1,
            Err(status) => check_status(&status, Code::FailedPrecondition, "ORDER_CANCELLED"),
        }
    }
    assert_eq!(winners, 1);
    assert_eq!(
        service
            .get(&order.user_id, &order.order_id)
            .await
            .expect("there")
            .version,
        2
    );
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_expected_version_must_match() {
    let database = database().await;
    let service = start(&database).await;
    let order = service.place(place_request()).await.expect("placed");
    let mut request = cancel_request(&order);
    request.expected_version = 2;
    check_status(
        &service.cancel(request.clone()).await.expect_err("stale"),
        Code::Aborted,
        "VERSION_MISMATCH",
    );
    // A failure is not stored: the same id may be used again, even for a request that was corrected.
    request.expected_version = 1;
    assert_eq!(service.cancel(request).await.expect("cancelled").version, 2);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_users_order_does_not_exist() {
    let database = database().await;
    let service = start(&database).await;
    let order = service.place(place_request()).await.expect("placed");
    let (stranger, nowhere) = (id(), id());
    let mut statuses = Vec::new();
    for (user, order_id) in [(&stranger, &order.order_id), (&order.user_id, &nowhere)] {
        statuses.push(service.get(user, order_id).await.expect_err("hidden"));
        statuses.push(service.history(user, order_id, 0, "").await.expect_err("hidden"));
        let mut cancel = cancel_request(&order);
        (cancel.user_id, cancel.order_id) = (user.clone(), order_id.clone());
        statuses.push(service.cancel(cancel).await.expect_err("hidden"));
    }
    for status in &statuses {
        check_status(status, Code::NotFound, "ORDER_NOT_FOUND");
        assert_eq!(
            (status.message(), status.details()),
            (statuses[0].message(), statuses[0].details())
        );
    }
    assert_eq!(
        service
            .get(&order.user_id, &order.order_id)
            .await
            .expect("there")
            .version,
        1
    );
    service.stop().await;
}

/// What other services tell, before there are consumers: straight into the store.
async fn advance(conn: &mut AsyncPgConnection, id: OrderId, commands: Vec<Command>, now: DateTime<Utc>) {
    conn.transaction(async |conn| {
        let mut order = store::load(conn, id, Lock::Update).await?.expect("there");
        for command in commands {
            let cause = event_store::Cause {
                source: "/order-svc",
                correlation_id: id.0,
                causation_id: None,
                traceparent: None,
                tracestate: None,
            };
            let change = Change::make(Some(order), command, now).expect("allowed");
            store::save(conn, &change, &cause).await?;
            order = change.order().clone();
        }
        Ok::<_, StoreError>(())
    })
    .await
    .expect("advanced");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_goes_its_whole_way() {
    let database = database().await;
    let service = start(&database).await;
    let order = service.place(place_request()).await.expect("placed");
    let id = OrderId(order.order_id.parse().expect("a UUID"));
    let mut conn = AsyncPgConnection::establish(&database.url())
        .await
        .expect("connected");
    let amount = store::load(&mut conn, id, Lock::None)
        .await
        .expect("read")
        .expect("there")
        .items
        .total();
    let payment = Payment {
        payment_id: Uuid::now_v7(),
        amount,
        brand: "visa".to_owned(),
        last_four: "4242".to_owned(),
    };
    let shipment = Shipment {
        tracking_number: "T-1".to_owned(),
        carrier: "Post".to_owned(),
    };
    let now = DateTime::from_timestamp(Utc::now().timestamp() + 60, 0).expect("in range");

    let steps = [
        (Command::RecordReserved, OrderStatus::Pending, 2),
        (Command::RecordPaid(payment), OrderStatus::Confirmed, 4),
        (Command::Ship(shipment), OrderStatus::Shipped, 5),
        (Command::MarkDelivered, OrderStatus::Delivered, 6),
    ];
    for (command, status, version) in steps {
        advance(&mut conn, id, vec![command], now).await;
        let seen = service.get(&order.user_id, &order.order_id).await.expect("there");
        assert_eq!((seen.status(), seen.version), (status, version));
        match status {
            OrderStatus::Shipped => {
                let status = service
                    .cancel(cancel_request(&order))
                    .await
                    .expect_err("too late");
                check_status(&status, Code::FailedPrecondition, "ORDER_SHIPPED");
            }
            OrderStatus::Delivered => {
                let status = service
                    .cancel(cancel_request(&order))
                    .await
                    .expect_err("too late");
                check_status(&status, Code::FailedPrecondition, "ORDER_DELIVERED");
                assert_eq!(
                    (seen.carrier.as_str(), seen.tracking_number.as_str()),
                    ("Post", "T-1")
                );
            }
            _ => {}
        }
    }
    let history = service
        .history(&order.user_id, &order.order_id, 0, "")
        .await
        .expect("there");
    let types: Vec<_> = history.events.iter().map(|event| event.r#type.as_str()).collect();
    let expected = ["placed", "reserved", "paid", "confirmed", "shipped", "completed"]
        .map(|name| format!("order.{name}"));
    assert_eq!(types, expected);
    let report = order_svc::verify::verify(&mut conn).await.expect("verified");
    assert!(report.sound().is_ok() && report.events == 6, "{report}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_change_is_refused() {
    let database = database().await;
    let service = start(&database).await;
    let order = service.place(place_request()).await.expect("placed");
    let id = OrderId(order.order_id.parse().expect("a UUID"));
    let mut conn = AsyncPgConnection::establish(&database.url())
        .await
        .expect("connected");
    let seen = store::load(&mut conn, id, Lock::None)
        .await
        .expect("read")
        .expect("there");
    let change = Change::make(Some(seen), Command::RecordReserved, Utc::now()).expect("allowed");
    service.cancel(cancel_request(&order)).await.expect("cancelled");

    let cause = event_store::Cause {
        source: "/order-svc",
        correlation_id: id.0,
        causation_id: None,
        traceparent: None,
        tracestate: None,
    };
    let saved = store::save(&conn, &change, &cause).await;
    assert!(matches!(saved, Err(StoreError::Conflict(_))), "{saved:?}");
    service.stop().await;
}
