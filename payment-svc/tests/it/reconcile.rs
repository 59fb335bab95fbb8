//! `payment-svc reconcile` and `verify` find what was planted.

use std::process::Command;

use crate::common::*;
use local_stack::cards;
use serde_json::Value;

const BINARY: &str = env!("CARGO_BIN_EXE_payment-svc");

/// Runs a command; returns whether it was content, and its report.
async fn run(stage: &Stage, command: &'static str) -> (bool, Value) {
    let settings = stage.settings();
    let output = tokio::task::spawn_blocking(move || {
        let mut process = Command::new(BINARY);
        for (key, value) in settings {
            process.env(
                format!("PAYMENT_SVC_{}", key.replace('.', "__").to_uppercase()),
                value,
            );
        }
        process.args([command, "--json"]).output().expect("run")
    });
    let output = output.await.expect("no panic");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let line = text.lines().find(|line| line.contains("\"differences\""));
    let report =
        line.unwrap_or_else(|| panic!("no report: {text} {}", String::from_utf8_lossy(&output.stderr)));
    (
        output.status.success(),
        serde_json::from_str(report).expect("JSON"),
    )
}

/// Kinds of the differences, sorted.
async fn kinds(stage: &Stage) -> Vec<String> {
    let (content, report) = run(stage, "reconcile").await;
    let named = report["named"].as_array().expect("a list");
    assert_eq!(content, named.is_empty(), "{report}");
    assert_eq!(report["differences"], named.len());
    let mut kinds: Vec<String> = named
        .iter()
        .map(|difference| difference["kind"].as_str().expect("a kind").to_owned())
        .collect();
    kinds.sort();
    kinds
}

/// A change that the guards of the database would refuse.
async fn force(stage: &Stage, statement: &str) {
    let statement =
        format!("SET session_replication_role = replica; {statement}; RESET session_replication_role");
    stage.sql.batch_execute(&statement).await.expect("forced");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_planted_difference_is_found() {
    let mut stage = Stage::new().await;
    let replica = stage.replica().await;
    let mut payments = Vec::new();
    for number in 0..6u64 {
        let order = stage.known_order().await;
        let paid = replica
            .client
            .pay(order.pay_by_card(&cards::fine(number)))
            .await
            .expect("paid");
        if number >= 4 {
            replica
                .client
                .refund(refund_request(&paid))
                .await
                .expect("refunded");
        }
        payments.push(paid);
    }
    let declined = stage.known_order().await;
    replica
        .client
        .pay(declined.pay_by_card(cards::DECLINED))
        .await
        .expect("declined");
    stage.is_right().await;

    // Something is under way: no difference, counted apart.
    let order = stage.known_order().await;
    let method = replica.client.method(order.user, cards::VISA).await;
    stage.sandbox.kill().expect("killed");
    let by_method = contracts::shop::payment::v1::process_payment_request::Method::PaymentMethodId(method);
    let pending = replica
        .client
        .pay_within(order.pay(by_method), std::time::Duration::from_secs(1))
        .await
        .expect("pending");
    assert_eq!(pending.status(), PaymentStatus::Pending);
    replica.stop().await;
    stage.sandbox.start().await.expect("started again");
    let (content, report) = run(&stage, "reconcile").await;
    assert!(content && report["under_way"] == 1, "{report}");
    assert_eq!(
        (&report["charges"], &report["received"]),
        (&Value::from(6), &Value::from(6))
    );
    assert_eq!(
        (&report["refunds"], &report["refunded"]),
        (&Value::from(2), &Value::from(2))
    );

    // The amount is another one.
    let [first, second, third, fourth, refunded, gone] = &payments[..] else {
        unreachable!()
    };
    let by_id = |payment: &contracts::shop::payment::v1::Payment| {
        format!("WHERE payment_id = '{}'", payment.payment_id)
    };
    force(
        &stage,
        &format!("UPDATE payments SET amount_minor_units = 1 {}", by_id(first)),
    )
    .await;
    assert_eq!(kinds(&stage).await, ["amount_differs"]);
    // We say that it failed.
    let fail = "UPDATE payments SET status = 'failed', failure_reason = 'declined', another_try = true";
    force(&stage, &format!("{fail} {}", by_id(second))).await;
    assert_eq!(kinds(&stage).await, ["amount_differs", "charge_of_failed"]);
    // We know another charge than the provider has: one is missing there, one is unknown here.
    force(
        &stage,
        &format!("UPDATE payments SET intent = 'pi_none' {}", by_id(third)),
    )
    .await;
    let mut expected = vec![
        "amount_differs",
        "charge_of_failed",
        "missing_charge",
        "unknown_charge",
    ];
    assert_eq!(kinds(&stage).await, expected);
    // Two payments of one order.
    let order_of =
        |payment: &contracts::shop::payment::v1::Payment| format!("order_id = '{}'", payment.order_id);
    force(
        &stage,
        &format!(
            "DROP INDEX payments_one_per_order; UPDATE payments SET {} {}",
            order_of(first),
            by_id(fourth)
        ),
    )
    .await;
    expected.push("order_charged_twice");
    expected.sort_unstable();
    assert_eq!(kinds(&stage).await, expected);
    // Given back by another refund than the one we know: both are named.
    force(
        &stage,
        &format!("UPDATE payments SET refund = 're_none' {}", by_id(refunded)),
    )
    .await;
    expected.extend(["missing_refund", "refund_differs"]);
    expected.sort_unstable();
    assert_eq!(kinds(&stage).await, expected);
    // Given back, and we do not know.
    let received = "UPDATE payments SET status = 'received', version = 1, refund = NULL";
    force(&stage, &format!("{received} {}", by_id(gone))).await;
    expected.push("unknown_refund");
    expected.sort_unstable();
    assert_eq!(kinds(&stage).await, expected);

    // All of this is against our own history too.
    let (content, report) = run(&stage, "verify").await;
    assert!(!content);
    assert_eq!(report["differences"], 6, "{report}");
}

/// Pages, on both sides.
#[tokio::test(flavor = "multi_thread")]
async fn many_charges_are_compared() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..120u64 {
        let order = stage.known_order().await;
        let client = replica.client.clone();
        let request = order.pay_by_card(&cards::fine(number));
        calls.spawn(async move {
            let paid = client.pay(request).await.expect("paid");
            client.refund(refund_request(&paid)).await.expect("refunded")
        });
        if calls.len() == 16 {
            calls.join_next().await.expect("one").expect("no panic");
        }
    }
    calls.join_all().await;
    let (content, report) = run(&stage, "reconcile").await;
    assert!(content, "{report}");
    for figure in ["charges", "received", "refunds", "refunded"] {
        assert_eq!(report[figure], 120, "{report}");
    }
    stage.is_right().await;
    replica.stop().await;
}
