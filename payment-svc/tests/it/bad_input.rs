//! Bad input gets the right answer, and nothing of it comes back.

use crate::common::*;
use contracts::shop::common::v1::Money;
use contracts::shop::payment::v1 as api;
use contracts::shop::payment::v1::process_payment_request::Method;
use local_stack::cards;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// INVALID_ARGUMENT that names exactly this field, and does not say what was sent.
#[track_caller]
fn check_field(result: Result<impl std::fmt::Debug, Status>, field: &str) {
    let status = result.expect_err(field);
    check_status(&status, Code::InvalidArgument, "INVALID_REQUEST");
    let details = status.get_error_details();
    let violations = &details.bad_request().expect("named").field_violations;
    let fields: Vec<&str> = violations
        .iter()
        .map(|violation| violation.field.as_str())
        .collect();
    assert_eq!(fields, [field], "{status:?}");
    for secret in ["4242", "73a", "123456"] {
        assert!(!format!("{status:?}").contains(secret), "{status:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_are_checked() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let order = stage.known_order().await;

    type Spoil = fn(&mut api::Card);
    let cards: [(&str, Spoil); 17] = [
        ("card.number", |card| card.number = String::new()),
        ("card.number", |card| card.number = "4242424242424241".into()),
        ("card.number", |card| card.number = "42424242424".into()),
        ("card.number", |card| card.number = "4242 4242 4242 4242".into()),
        ("card.number", |card| card.number = "4242424242424242\0".into()),
        ("card.number", |card| card.number = "٤٢٤٢٤٢٤٢٤٢٤٢٤٢٤٢".into()),
        ("card.number", |card| card.number = "42".repeat(10)),
        ("card.cvv", |card| card.cvv = String::new()),
        ("card.cvv", |card| card.cvv = "73a".into()),
        ("card.cvv", |card| card.cvv = "123456".into()),
        ("card.expiry_month", |card| card.expiry_month = 0),
        ("card.expiry_month", |card| card.expiry_month = 13),
        ("card.expiry_month", |card| card.expiry_month = -1),
        ("card.expiry_year", |card| card.expiry_year = 40),
        ("card.expiry_year", |card| card.expiry_year = 2020),
        ("card.expiry_year", |card| card.expiry_year = 9999),
        ("card.expiry_year", |card| card.expiry_year = i32::MIN),
    ];
    for (field, spoil) in cards {
        let mut bad = card(cards::VISA);
        spoil(&mut bad);
        let method = api::CreatePaymentMethodRequest {
            request_id: id(),
            user_id: id(),
            card: Some(bad.clone()),
        };
        check_field(replica.client.create_method(method).await, field);
        check_field(replica.client.pay(order.pay(Method::Card(bad))).await, field);
    }
    let none = api::CreatePaymentMethodRequest {
        request_id: id(),
        user_id: id(),
        card: None,
    };
    check_field(replica.client.create_method(none).await, "card");

    let nil = "00000000-0000-0000-0000-000000000000";
    for bad in ["", "x", nil, "123456"] {
        let good = order.pay_by_card(cards::VISA);
        let bad = bad.to_owned();
        let request = api::ProcessPaymentRequest {
            request_id: bad.clone(),
            ..good.clone()
        };
        check_field(replica.client.pay(request).await, "request_id");
        let request = api::ProcessPaymentRequest {
            user_id: bad.clone(),
            ..good.clone()
        };
        check_field(replica.client.pay(request).await, "user_id");
        let request = api::ProcessPaymentRequest {
            order_id: bad.clone(),
            ..good
        };
        check_field(replica.client.pay(request).await, "order_id");
        let request = order.pay(Method::PaymentMethodId(bad.clone()));
        check_field(replica.client.pay(request).await, "payment_method_id");
        check_field(replica.client.get(&bad, &id()).await, "user_id");
        check_field(replica.client.get(&id(), &bad).await, "payment_id");
        let refund = api::RefundPaymentRequest {
            request_id: id(),
            user_id: id(),
            payment_id: bad,
        };
        check_field(replica.client.refund(refund).await, "payment_id");
    }
    for (minor_units, currency_code) in [
        (0, "EUR"),
        (-1, "EUR"),
        (i64::MIN, "EUR"),
        (1, "eur"),
        (1, "XAU"),
        (1, ""),
    ] {
        let amount = Money {
            minor_units,
            currency_code: currency_code.into(),
        };
        let request = api::ProcessPaymentRequest {
            amount: Some(amount),
            ..order.pay_by_card(cards::VISA)
        };
        check_field(replica.client.pay(request).await, "amount");
    }
    let request = api::ProcessPaymentRequest {
        amount: None,
        ..order.pay_by_card(cards::VISA)
    };
    check_field(replica.client.pay(request).await, "amount");
    let request = api::ProcessPaymentRequest {
        method: None,
        ..order.pay_by_card(cards::VISA)
    };
    check_field(replica.client.pay(request).await, "method");
    // Everything that is wrong is told at once.
    let status = replica
        .client
        .pay(api::ProcessPaymentRequest::default())
        .await
        .expect_err("empty");
    let details = status.get_error_details();
    assert_eq!(
        details.bad_request().expect("named").field_violations.len(),
        5,
        "{status:?}"
    );

    let status = replica.client.get(&id(), &id()).await.expect_err("none");
    check_status(&status, Code::NotFound, "PAYMENT_NOT_FOUND");
    let paid = replica
        .client
        .pay(order.pay_by_card(cards::VISA))
        .await
        .expect("paid");
    let status = replica
        .client
        .get(&id(), &paid.payment_id)
        .await
        .expect_err("someone else's");
    check_status(&status, Code::NotFound, "PAYMENT_NOT_FOUND");
    replica.stop().await;
}

/// The same request id with another card, while the first one was never answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_bound_to_its_card() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let order = Order::new();
    let user = order.user.to_string();
    let method = |number: &str, request_id: &str| api::CreatePaymentMethodRequest {
        request_id: request_id.into(),
        user_id: user.clone(),
        card: Some(card(number)),
    };
    let request_id = id();
    replica
        .client
        .create_method(method(cards::VISA, &request_id))
        .await
        .expect("created");
    // As if the transaction had not committed after the provider had answered.
    stage
        .sql
        .batch_execute("DELETE FROM requests")
        .await
        .expect("deleted");
    let status = replica
        .client
        .create_method(method(&cards::fine(1), &request_id))
        .await
        .expect_err("another card");
    check_status(&status, Code::AlreadyExists, "REQUEST_ID_REUSED");
    let rows = stage
        .sql
        .query("SELECT FROM payment_methods", &[])
        .await
        .expect("answered");
    assert_eq!(rows.len(), 1);
    replica.stop().await;
}
