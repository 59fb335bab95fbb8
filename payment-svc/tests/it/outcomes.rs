//! What becomes of payments and refunds by every card that the sandbox knows.

use crate::common::*;
use contracts::shop::payment::v1 as api;
use contracts::shop::payment::v1::process_payment_request::Method;
use local_stack::cards::{self, Fault};
use local_stack::testing::Folder;

#[track_caller]
fn check(payment: &api::Payment, status: PaymentStatus, failure: Option<(FailureReason, bool)>) {
    assert_eq!(payment.status(), status, "{payment:?}");
    let found = payment
        .failure
        .as_ref()
        .map(|failure| (failure.reason(), failure.another_try));
    assert_eq!(found, failure, "{payment:?}");
    let version = match status {
        PaymentStatus::Pending => 0,
        PaymentStatus::Refunded => 2,
        _ => 1,
    };
    assert_eq!(payment.version, version, "{payment:?}");
}

/// A fault while paying is only a matter of time: the outcome is what the card says, and the money is taken once.
#[tokio::test(flavor = "multi_thread")]
async fn every_fault_of_paying_is_settled() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let mut calls = tokio::task::JoinSet::new();
    let mut orders = Vec::new();
    for (serial, fault) in (0u16..).zip(Fault::ALL) {
        let order = stage.known_order().await;
        orders.push((order, fault));
        let client = replica.client.clone();
        let request = order.pay_by_card(&cards::fault(fault, Fault::None, serial));
        calls.spawn(async move { (fault, client.pay(request).await.expect("an answer")) });
    }
    while let Some(call) = calls.join_next().await {
        let (fault, payment) = call.expect("no panic");
        match fault {
            Fault::Declined => check(
                &payment,
                PaymentStatus::Failed,
                Some((FailureReason::Declined, true)),
            ),
            Fault::Stolen => check(
                &payment,
                PaymentStatus::Failed,
                Some((FailureReason::CardBlocked, false)),
            ),
            _ => check(&payment, PaymentStatus::Received, None),
        }
        assert_eq!(payment.brand, "visa");
        assert_eq!(payment.last_four.len(), 4);
        assert!(!payment.provider_reference.is_empty());
    }
    for (order, fault) in orders {
        let fails = matches!(fault, Fault::Declined | Fault::Stolen);
        assert_eq!(stage.ledger(&order).await, (usize::from(!fails), 0), "{fault:?}");
        let event = if fails {
            "payment.failed 1"
        } else {
            "payment.received 1"
        };
        assert_eq!(stage.events(&order).await, [event], "{fault:?}");
    }
    stage.is_right().await;
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_fault_of_refunding_is_settled() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let mut calls = tokio::task::JoinSet::new();
    let mut orders = Vec::new();
    for (serial, fault) in (100u16..).zip(Fault::ALL) {
        let order = stage.known_order().await;
        orders.push((order, fault));
        let client = replica.client.clone();
        let request = order.pay_by_card(&cards::fault(Fault::None, fault, serial));
        calls.spawn(async move {
            let payment = client.pay(request).await.expect("an answer");
            check(&payment, PaymentStatus::Received, None);
            let refunded = client.refund(refund_request(&payment)).await.expect("an answer");
            (fault, refunded)
        });
    }
    while let Some(call) = calls.join_next().await {
        let (fault, payment) = call.expect("no panic");
        assert_eq!(payment.status(), PaymentStatus::Refunded, "{fault:?}");
        check(&payment, PaymentStatus::Refunded, None);
    }
    for (order, fault) in orders {
        assert_eq!(stage.ledger(&order).await, (1, 1), "{fault:?}");
        assert_eq!(
            stage.events(&order).await,
            ["payment.received 1", "payment.refunded 2"],
            "{fault:?}"
        );
    }
    stage.is_right().await;
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cards_that_banks_refuse_say_why() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    for (number, reason, another_try) in [
        (cards::DECLINED, FailureReason::Declined, true),
        (cards::INSUFFICIENT_FUNDS, FailureReason::InsufficientFunds, true),
        (cards::LOST, FailureReason::CardBlocked, false),
        (cards::STOLEN, FailureReason::CardBlocked, false),
        (cards::EXPIRED, FailureReason::ExpiredCard, true),
        (cards::INCORRECT_CVC, FailureReason::IncorrectCardDetails, true),
        (
            cards::AUTHENTICATION_REQUIRED,
            FailureReason::AuthenticationRequired,
            true,
        ),
    ] {
        let order = stage.known_order().await;
        let payment = replica.client.pay(order.pay_by_card(number)).await.expect(number);
        check(&payment, PaymentStatus::Failed, Some((reason, another_try)));
        assert_eq!(stage.ledger(&order).await, (0, 0), "{number}");

        // Another card pays, unless that was the last word about the order.
        let again = replica.client.pay(order.pay_by_card(cards::VISA)).await;
        if another_try {
            check(&again.expect("an answer"), PaymentStatus::Received, None);
            assert_eq!(
                stage.events(&order).await,
                ["payment.failed 1", "payment.received 1"],
                "two payments, each with a first version"
            );
            assert_eq!(stage.ledger(&order).await, (1, 0));
        } else {
            let status = again.expect_err("closed");
            check_status(&status, tonic::Code::FailedPrecondition, "PAYMENT_CLOSED");
            assert_eq!(stage.ledger(&order).await, (0, 0));
        }
    }
    stage.is_right().await;
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_method_pays_and_only_its_users_orders() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let order = stage.known_order().await;
    let method = replica.client.method(order.user, cards::VISA).await;
    let other = stage.known_order().await;
    let status = replica
        .client
        .pay(other.pay(Method::PaymentMethodId(method.clone())))
        .await
        .expect_err("someone else's");
    check_status(&status, tonic::Code::NotFound, "PAYMENT_METHOD_NOT_FOUND");
    let payment = replica
        .client
        .pay(order.pay(Method::PaymentMethodId(method)))
        .await
        .expect("paid");
    check(&payment, PaymentStatus::Received, None);
    assert_eq!(
        (payment.brand.as_str(), payment.last_four.as_str()),
        ("visa", "4242")
    );
    let found = replica
        .client
        .get(&payment.user_id, &payment.payment_id)
        .await
        .expect("found");
    assert_eq!(found, payment);
    stage.is_right().await;
    replica.stop().await;
}

/// What the sandbox is told, what the database holds and what is logged: no card number, no CVV.
#[tokio::test(flavor = "multi_thread")]
async fn cards_leave_no_trace() {
    let stage = Stage::new().await;
    let folder = Folder::create("payment-svc-logs");
    let mut process = stage
        .process("logging")
        .env("PAYMENT_SVC_LOG__LEVEL", "trace")
        .start()
        .await
        .expect("started");
    let client = Client::new(&process.grpc_url().expect("listening"));
    let order = stage.known_order().await;
    let number = cards::fine(987_654);
    let mut request = order.pay_by_card(&number);
    let Some(Method::Card(card)) = &mut request.method else {
        unreachable!()
    };
    card.cvv = "9173".into();
    client.pay(request).await.expect("paid");
    let mut refused = order.pay_by_card("4242424242424241");
    refused.user_id = "9173".into();
    client.pay(refused).await.expect_err("refused");
    process.stop().await.expect("stopped");
    let log = std::fs::read_to_string(process.log()).expect("a log");
    for secret in [number.as_str(), "4242424242424241"] {
        assert!(!log.contains(secret), "{secret} is logged");
    }
    let tables = "SELECT table_name::text FROM information_schema.tables WHERE table_schema = 'public'";
    for table in stage.sql.query(tables, &[]).await.expect("answered") {
        let table: String = table.get(0);
        let query = format!("SELECT count(*) FROM \"{table}\" t WHERE t::text LIKE '%' || $1 || '%'");
        let row = stage.sql.query_one(&query, &[&number]).await.expect("answered");
        assert_eq!(row.get::<_, i64>(0), 0, "{table}");
    }
    drop(folder);
}
