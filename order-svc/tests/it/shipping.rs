//! What the warehouse tells of orders.

use crate::common::*;
use crate::inventory::confirmed;
use crate::payments::{Stage, types_of};
use contracts::shop::order::v1::{self as api, OrderStatus};
use tonic::Code;
use tonic_types::StatusExt as _;

#[tokio::test(flavor = "multi_thread")]
async fn an_order_is_shipped_and_delivered() {
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let order = confirmed(&stage, &service).await;
    let ship = ship_request(&order);
    let shipped = service.ship(ship.clone()).await.expect("shipped");
    assert_eq!((shipped.status(), shipped.version), (OrderStatus::Shipped, 5));
    assert_eq!(
        (shipped.carrier.as_str(), shipped.tracking_number.as_str()),
        ("Post", "T 1")
    );
    let deliver = deliver_request(&order);
    let delivered = service.deliver(deliver.clone()).await.expect("delivered");
    assert_eq!(
        (delivered.status(), delivered.version),
        (OrderStatus::Delivered, 6)
    );
    let seen = service.get(&order.user_id, &order.order_id).await.expect("there");
    assert_eq!(seen, delivered);
    assert_eq!(
        types_of(&service, &order).await[4..],
        ["order.shipped", "order.completed"]
    );

    // Repeats get what was answered then, another content under the same id does not.
    assert_eq!(service.ship(ship.clone()).await.expect("repeat"), shipped);
    assert_eq!(service.deliver(deliver.clone()).await.expect("repeat"), delivered);
    let other = api::ShipOrderRequest {
        carrier: "Another".into(),
        ..ship.clone()
    };
    let status = service.ship(other).await.expect_err("another content");
    check_status(&status, Code::AlreadyExists, "REQUEST_ID_REUSED");
    // Under an id of its own it is a second parcel.
    let again = api::ShipOrderRequest {
        request_id: id(),
        ..ship
    };
    let status = service.ship(again).await.expect_err("shipped before");
    check_status(&status, Code::FailedPrecondition, "ORDER_DELIVERED");
    let status = service
        .deliver(deliver_request(&order))
        .await
        .expect_err("before");
    check_status(&status, Code::FailedPrecondition, "ORDER_DELIVERED");
    let status = service.cancel(cancel_request(&order)).await.expect_err("gone");
    check_status(&status, Code::FailedPrecondition, "ORDER_DELIVERED");
    service.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_so_far_is_not_shipped() {
    let stage = Stage::new().await;
    let service = stage.start(&[]).await;
    let placed = service.place(place_request()).await.expect("placed");
    let status = service
        .ship(ship_request(&placed))
        .await
        .expect_err("not confirmed");
    check_status(&status, Code::FailedPrecondition, "ORDER_NOT_CONFIRMED");
    let status = service
        .deliver(deliver_request(&placed))
        .await
        .expect_err("not shipped");
    check_status(&status, Code::FailedPrecondition, "ORDER_NOT_SHIPPED");
    service.cancel(cancel_request(&placed)).await.expect("cancelled");
    let status = service.ship(ship_request(&placed)).await.expect_err("cancelled");
    check_status(&status, Code::FailedPrecondition, "ORDER_CANCELLED");
    let unknown = api::Order {
        order_id: id(),
        ..placed
    };
    let status = service.ship(ship_request(&unknown)).await.expect_err("unknown");
    check_status(&status, Code::NotFound, "ORDER_NOT_FOUND");
    let status = service
        .deliver(deliver_request(&unknown))
        .await
        .expect_err("unknown");
    check_status(&status, Code::NotFound, "ORDER_NOT_FOUND");

    // Versions that are expected are held, and a failure is not kept.
    let order = confirmed(&stage, &service).await;
    let mut ship = ship_request(&order);
    ship.expected_version = order.version + 1;
    let status = service.ship(ship.clone()).await.expect_err("not there yet");
    check_status(&status, Code::Aborted, "VERSION_MISMATCH");
    ship.expected_version = order.version;
    let shipped = service.ship(ship).await.expect("shipped");
    let mut deliver = deliver_request(&order);
    deliver.expected_version = order.version;
    let status = service.deliver(deliver.clone()).await.expect_err("moved on");
    check_status(&status, Code::Aborted, "VERSION_MISMATCH");
    deliver.expected_version = shipped.version;
    service.deliver(deliver).await.expect("delivered");

    // Shipped or cancelled, whoever comes first.
    let order = confirmed(&stage, &service).await;
    let (shipped, cancelled) = futures::join!(
        service.ship(ship_request(&order)),
        service.cancel(cancel_request(&order))
    );
    assert_ne!(shipped.is_ok(), cancelled.is_ok(), "{shipped:?} {cancelled:?}");
    service.stop().await;
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_names_its_fields() {
    type Spoil = fn(&mut api::ShipOrderRequest);
    const MARK: &str = "Xyzzy";
    let cases: &[(Spoil, &[&str])] = &[
        (|r| r.request_id.clear(), &["request_id"]),
        (|r| r.order_id = MARK.into(), &["order_id"]),
        (|r| r.carrier.clear(), &["carrier"]),
        (|r| r.carrier = " ".into(), &["carrier"]),
        (|r| r.carrier = MARK.repeat(21), &["carrier"]),
        (|r| r.tracking_number = format!("{MARK}\0"), &["tracking_number"]),
        (
            |r| r.tracking_number = "4242 4242 4242 4242".into(),
            &["tracking_number"],
        ),
        (|r| r.expected_version = -5, &["expected_version"]),
    ];
    let database = database().await;
    let service = start(&database).await;
    let order = service.place(place_request()).await.expect("placed");
    let check = |status: tonic::Status, fields: &[&str]| {
        check_status(&status, Code::InvalidArgument, "INVALID_REQUEST");
        let details = status.get_error_details();
        let violations = &details.bad_request().expect("BadRequest").field_violations;
        let named: Vec<&str> = violations
            .iter()
            .map(|violation| violation.field.as_str())
            .collect();
        assert_eq!(named, fields);
        assert!(!format!("{status:?}").contains(MARK), "a value is echoed");
    };
    for (spoil, fields) in cases {
        let mut request = ship_request(&order);
        spoil(&mut request);
        check(service.ship(request).await.expect_err("spoilt"), fields);
    }
    let request = api::MarkDeliveredRequest {
        request_id: MARK.into(),
        order_id: MARK.into(),
        expected_version: -5,
    };
    let status = service.deliver(request).await.expect_err("spoilt");
    check(status, &["request_id", "order_id", "expected_version"]);
    service.stop().await;
}
