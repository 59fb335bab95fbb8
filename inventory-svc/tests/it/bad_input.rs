//! What each RPC answers to bad input: the code, the field, the reason, and no value echoed. It still serves afterwards.

use crate::common::*;
use contracts::shop::inventory::v1 as api;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

/// Text that no answer may quote.
const MARK: &str = "Xyzzy";
const NIL: &str = "00000000-0000-0000-0000-000000000000";

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
    assert!(!status.message().contains("-5"), "{case}: a value is echoed");
}

#[tokio::test(flavor = "multi_thread")]
async fn set_stock() {
    type Spoil = fn(&mut api::SetStockRequest);
    let cases: &[(&str, Spoil, &[&str])] = &[
        ("no request id", |r| r.request_id.clear(), &["request_id"]),
        ("nil request id", |r| r.request_id = NIL.into(), &["request_id"]),
        (
            "long request id",
            |r| r.request_id = MARK.repeat(10_000),
            &["request_id"],
        ),
        ("no product", |r| r.product_id.clear(), &["product_id"]),
        ("nil product", |r| r.product_id = NIL.into(), &["product_id"]),
        (
            "NUL in product",
            |r| r.product_id = format!("{}\0", &r.product_id[..35]),
            &["product_id"],
        ),
        ("negative stock", |r| r.available = -5, &["available"]),
        ("too much", |r| r.available = 1_000_000_000_001, &["available"]),
        (
            "negative version",
            |r| r.expected_version = Some(-5),
            &["expected_version"],
        ),
        (
            "everything",
            |r| {
                *r = api::SetStockRequest {
                    request_id: MARK.into(),
                    product_id: MARK.into(),
                    available: i64::MIN,
                    expected_version: Some(i64::MIN),
                }
            },
            &["request_id", "product_id", "available", "expected_version"],
        ),
    ];
    let database = database().await;
    let service = start(&database).await;
    for (case, spoil, fields) in cases {
        let mut request = set_request(Uuid::new_v4(), 1);
        spoil(&mut request);
        check_fields(case, service.set(request).await, fields);
    }
    let most = set_request(Uuid::new_v4(), 1_000_000_000_000);
    assert_eq!(service.set(most).await.expect("set").version, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn adjust_stock_and_get_stock() {
    type Spoil = fn(&mut api::AdjustStockRequest);
    let cases: &[(&str, Spoil, &[&str])] = &[
        ("no request id", |r| r.request_id.clear(), &["request_id"]),
        ("nil product", |r| r.product_id = NIL.into(), &["product_id"]),
        ("no change", |r| r.change = 0, &["change"]),
        (
            "negative version",
            |r| r.expected_version = Some(-5),
            &["expected_version"],
        ),
        (
            "everything",
            |r| {
                *r = api::AdjustStockRequest {
                    request_id: MARK.into(),
                    product_id: MARK.into(),
                    change: 0,
                    expected_version: Some(-5),
                }
            },
            &["request_id", "product_id", "change", "expected_version"],
        ),
    ];
    let database = database().await;
    let service = start(&database).await;
    let product = service.product(1).await;
    for (case, spoil, fields) in cases {
        let mut request = adjust_request(product, 1);
        spoil(&mut request);
        check_fields(case, service.adjust(request).await, fields);
    }
    for product_id in ["", MARK, NIL] {
        let request = api::GetStockRequest {
            product_id: product_id.to_owned(),
        };
        let answer = service.client.clone().get_stock(request).await;
        check_fields(product_id, answer, &["product_id"]);
    }
    assert_eq!(service.counts(product).await, (1, 0, 0));
    service.stop().await;
}
