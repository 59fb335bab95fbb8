//! What each RPC answers to bad input: the code, the field, the reason, and no value echoed. It still serves afterwards.

use crate::common::*;
use contracts::shop::order::v1 as api;
use tonic::codec::CompressionEncoding;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Text that no answer may quote.
const MARK: &str = "Xyzzy";

/// Checks that exactly these fields are named.
#[track_caller]
fn check_fields(case: &str, status: Result<impl std::fmt::Debug, Status>, fields: &[&str]) {
    let status = status.expect_err(case);
    check_status(&status, Code::InvalidArgument, "INVALID_REQUEST");
    let details = status.get_error_details();
    let violations = &details
        .bad_request()
        .unwrap_or_else(|| panic!("{case}: {status:?}"))
        .field_violations;
    let named: Vec<&str> = violations
        .iter()
        .map(|violation| violation.field.as_str())
        .collect();
    assert_eq!(named, fields, "{case}");
    assert!(!format!("{status:?}").contains(MARK), "{case}: a value is echoed");
    for secret in ["4242424242424242", "-5"] {
        assert!(!status.message().contains(secret), "{case}: a value is echoed");
    }
}

const NIL: &str = "00000000-0000-0000-0000-000000000000";

#[tokio::test(flavor = "multi_thread")]
async fn place_order() {
    type Spoil = fn(&mut api::PlaceOrderRequest);
    let cases: &[(&str, Spoil, &[&str])] = &[
        ("no request id", |r| r.request_id.clear(), &["request_id"]),
        ("nil request id", |r| r.request_id = NIL.into(), &["request_id"]),
        (
            "long request id",
            |r| r.request_id = MARK.repeat(10_000),
            &["request_id"],
        ),
        ("nil user", |r| r.user_id = NIL.into(), &["user_id"]),
        (
            "NUL in user",
            |r| r.user_id = format!("{}\0", &r.user_id[..35]),
            &["user_id"],
        ),
        ("no items", |r| r.items.clear(), &["items"]),
        (
            "101 items",
            |r| r.items = (0..101).map(|_| item(1, 1)).collect(),
            &["items"],
        ),
        (
            "10k items",
            |r| {
                r.items = vec![
                    api::OrderItem {
                        product_id: MARK.into(),
                        ..Default::default()
                    };
                    10_000
                ]
            },
            &["items"],
        ),
        (
            "nil product",
            |r| r.items[1].product_id = NIL.into(),
            &["items[1].product_id"],
        ),
        (
            "repeated product",
            |r| r.items[1] = r.items[0].clone(),
            &["items[1].product_id"],
        ),
        ("no quantity", |r| r.items[0].quantity = 0, &["items[0].quantity"]),
        (
            "negative quantity",
            |r| r.items[1].quantity = -5,
            &["items[1].quantity"],
        ),
        (
            "large quantity",
            |r| r.items[0].quantity = 10_001,
            &["items[0].quantity"],
        ),
        (
            "no price",
            |r| r.items[0].unit_price_minor_units = 0,
            &["items[0].unit_price_minor_units"],
        ),
        (
            "negative price",
            |r| r.items[0].unit_price_minor_units = -5,
            &["items[0].unit_price_minor_units"],
        ),
        (
            "line overflow",
            |r| r.items[0].unit_price_minor_units = i64::MAX,
            &["items[0].unit_price_minor_units"],
        ),
        (
            "sum overflow",
            |r| r.items = vec![item(1, i64::MAX), item(1, 1)],
            &["items"],
        ),
        ("no currency", |r| r.currency_code.clear(), &["currency_code"]),
        (
            "unknown currency",
            |r| r.currency_code = "ZZZ".into(),
            &["currency_code"],
        ),
        (
            "lower case currency",
            |r| r.currency_code = "eur".into(),
            &["currency_code"],
        ),
        ("gold", |r| r.currency_code = "XAU".into(), &["currency_code"]),
        (
            "long currency",
            |r| r.currency_code = MARK.repeat(100),
            &["currency_code"],
        ),
        ("not an address", |r| r.user_email = MARK.into(), &["user_email"]),
        (
            "long address",
            |r| r.user_email = format!("{}@example.org", MARK.repeat(100)),
            &["user_email"],
        ),
        (
            "NUL in address",
            |r| r.user_email = "a\0@example.org".into(),
            &["user_email"],
        ),
        (
            "card in address",
            |r| r.user_email = "4242424242424242@example.org".into(),
            &["user_email"],
        ),
        (
            "bad payment method",
            |r| r.payment_method_id = MARK.into(),
            &["payment_method_id"],
        ),
        (
            "nil payment method",
            |r| r.payment_method_id = NIL.into(),
            &["payment_method_id"],
        ),
        (
            "everything",
            |r| {
                *r = api::PlaceOrderRequest {
                    user_email: "x".into(),
                    ..Default::default()
                }
            },
            &["request_id", "user_id", "user_email", "currency_code", "items"],
        ),
    ];
    let database = database().await;
    let service = start(&database).await;
    for (case, spoil, fields) in cases {
        let mut request = place_request();
        spoil(&mut request);
        check_fields(case, service.place(request).await, fields);
    }
    // Unusual and good: whole currencies, the largest amount, the most items.
    let good: &[(&str, Spoil)] = &[
        ("yen", |r| r.currency_code = "JPY".into()),
        ("dinar", |r| r.currency_code = "KWD".into()),
        ("largest amount", |r| r.items = vec![item(1, i64::MAX)]),
        ("100 items", |r| {
            r.items = (0..100).map(|_| item(10_000, 1)).collect()
        }),
        ("nothing optional", |r| {
            (r.user_email, r.payment_method_id) = Default::default()
        }),
    ];
    for (case, change) in good {
        let mut request = place_request();
        change(&mut request);
        service.place(request).await.expect(case);
    }
    let sql = database.connect().await.expect("connected");
    let written = count(&sql, "SELECT count(*) FROM requests").await;
    assert_eq!(written, good.len() as i64, "bad input leaves nothing behind");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_order() {
    type Spoil = fn(&mut api::CancelOrderRequest);
    let cases: &[(&str, Spoil, &[&str])] = &[
        ("no request id", |r| r.request_id.clear(), &["request_id"]),
        ("nil user", |r| r.user_id = NIL.into(), &["user_id"]),
        ("bad order", |r| r.order_id = MARK.into(), &["order_id"]),
        ("long reason", |r| r.reason = MARK.repeat(101), &["reason"]),
        ("NUL in reason", |r| r.reason = format!("{MARK}\0"), &["reason"]),
        (
            "card in reason",
            |r| r.reason = "refund 4242 4242 4242 4242".into(),
            &["reason"],
        ),
        (
            "negative version",
            |r| r.expected_version = -1,
            &["expected_version"],
        ),
        (
            "everything",
            |r| {
                *r = api::CancelOrderRequest {
                    reason: "\0".into(),
                    expected_version: -5,
                    ..Default::default()
                }
            },
            &["request_id", "user_id", "order_id", "reason", "expected_version"],
        ),
    ];
    let database = database().await;
    let service = start(&database).await;
    let order = service.place(place_request()).await.expect("placed");
    for (case, spoil, fields) in cases {
        let mut request = cancel_request(&order);
        spoil(&mut request);
        check_fields(case, service.cancel(request).await, fields);
    }
    let mut request = cancel_request(&order);
    request.reason = "é".repeat(500);
    service.cancel(request).await.expect("500 characters");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reads() {
    let database = database().await;
    let service = start(&database).await;
    let order = service.place(place_request()).await.expect("placed");
    let (user, order_id) = (order.user_id.as_str(), order.order_id.as_str());
    check_fields("nil user", service.get(NIL, order_id).await, &["user_id"]);
    check_fields("no order", service.get(user, "").await, &["order_id"]);
    check_fields("both", service.get(MARK, MARK).await, &["user_id", "order_id"]);
    check_fields(
        "bad user",
        service.history("x", order_id, 0, "").await,
        &["user_id"],
    );
    check_fields(
        "negative page",
        service.history(user, order_id, -1, "").await,
        &["page_size"],
    );
    for token in [MARK, "\0", "AAAA", &"A".repeat(10_000), "NTox"] {
        check_fields(
            token,
            service.history(user, order_id, 0, token).await,
            &["page_token"],
        );
    }
    assert_eq!(
        service
            .history(user, order_id, i32::MAX, "")
            .await
            .expect("capped")
            .events
            .len(),
        1
    );
    service.get(user, order_id).await.expect("still there");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_are_too_large() {
    let database = database().await;
    let service = start(&database).await;
    let mut request = place_request();
    request.user_email = "a".repeat(300 << 10);
    let status = service.place(request.clone()).await.expect_err("too large");
    check_status(&status, Code::OutOfRange, "MESSAGE_TOO_LARGE");

    // 64 MiB that travel as 64 KiB.
    request.user_email = "a".repeat(64 << 20);
    let mut client = service.client.clone().send_compressed(CompressionEncoding::Gzip);
    let status = client.place_order(request).await.expect_err("a bomb");
    assert!(
        matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted),
        "{status:?}"
    );
    check_status(&status, status.code(), "MESSAGE_TOO_LARGE");

    client
        .place_order(place_request())
        .await
        .expect("small and compressed");
    service.place(place_request()).await.expect("still serving");
    service.stop().await;
}
