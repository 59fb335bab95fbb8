//! Cards that misbehave.

use std::time::Instant;

use local_stack::cards::{self, Fault};
use local_stack::wait;

use crate::stage::*;

/// What a caller sees of a fault, the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Done,
    Replay,
    Error,
    Nothing,
    Cut,
}

async fn see(client: &Client, path: &str, key: &str, params: &[(&str, &str)], expected: Seen) {
    if expected == Seen::Nothing {
        let error = client.post_in_vain(path, key, params).await;
        assert!(error.is_timeout(), "{error:?}");
        return;
    }
    let seen = match client.try_post(path, key, params).await {
        Ok(answer) if answer.status == 200 && answer.replayed => Seen::Replay,
        Ok(answer) if answer.status == 200 => Seen::Done,
        Ok(answer) if answer.status == 500 => Seen::Error,
        Ok(other) => panic!("{other:?}"),
        Err(error) if error.is_timeout() => Seen::Nothing,
        Err(_) => Seen::Cut,
    };
    assert_eq!(seen, expected);
}

/// The fault, what is seen of it, whether it was done, and what is seen of the same request with the same key.
const FAULTS: [(Fault, Seen, bool, Seen); 8] = [
    (Fault::None, Seen::Done, true, Seen::Replay),
    (Fault::Slow, Seen::Done, true, Seen::Replay),
    (Fault::HangAfter, Seen::Nothing, true, Seen::Replay),
    (Fault::ErrorBefore, Seen::Error, false, Seen::Error),
    (Fault::ErrorAfter, Seen::Error, true, Seen::Error),
    (Fault::Twice, Seen::Replay, true, Seen::Replay),
    (Fault::DropAfter, Seen::Cut, true, Seen::Replay),
    // Nothing was kept under the key, and the fault strikes once.
    (Fault::HangBefore, Seen::Nothing, false, Seen::Done),
];

#[tokio::test(flavor = "multi_thread")]
async fn faults_when_paying() {
    let stage = Stage::start().await;
    let client = &stage.client;
    let mut charges = 0;
    for (fault, first, done, repeated) in FAULTS {
        let method = client.method(&cards::fault(fault, Fault::None, 1)).await;
        let intent = client.intent(&method).await;
        see(client, &confirm(&intent), &intent, &[], first).await;
        let expected = if done {
            "succeeded"
        } else {
            "requires_confirmation"
        };
        assert_eq!(client.state(&intent).await, expected, "{fault:?}");
        see(client, &confirm(&intent), &intent, &[], repeated).await;
        // Under another key, the fault does not strike again.
        let other = client.confirm(&intent, &format!("other {intent}")).await;
        assert!(matches!(other.status, 200 | 400), "{fault:?} {other:?}");
        charges += 1;
        assert_eq!(client.state(&intent).await, "succeeded", "{fault:?}");
        assert_eq!(client.counts().await, (charges, 0), "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_when_refunding() {
    let stage = Stage::start().await;
    let client = &stage.client;
    let mut refunds = 0;
    for (fault, first, done, repeated) in FAULTS {
        let method = client.method(&cards::fault(Fault::None, fault, 1)).await;
        let intent = client.intent(&method).await;
        client.confirm(&intent, "").await.ok();
        let params = [("payment_intent", intent.as_str())];
        let list = format!("/v1/refunds?payment_intent={intent}");
        see(client, "/v1/refunds", &intent, &params, first).await;
        let listed = client.get(&list).await.ok();
        let data = listed["data"].as_array().unwrap();
        assert_eq!(data.len(), usize::from(done), "{fault:?}");
        assert!(
            data.iter().all(|refund| refund["status"] == "succeeded"),
            "{fault:?} {listed}"
        );
        see(client, "/v1/refunds", &intent, &params, repeated).await;
        let other = client
            .post("/v1/refunds", &format!("other {intent}"), &params)
            .await;
        assert!(matches!(other.status, 200 | 400), "{fault:?} {other:?}");
        refunds += 1;
        assert_eq!(client.counts().await.1, refunds, "{fault:?}");
    }
    // A refund that the bank does not take fails, and another one may be made.
    let method = client
        .method(&cards::fault(Fault::None, Fault::Declined, 1))
        .await;
    let intent = client.intent(&method).await;
    client.confirm(&intent, "").await.ok();
    let params = [("payment_intent", intent.as_str())];
    assert_eq!(
        client.post("/v1/refunds", "", &params).await.ok()["status"],
        "failed"
    );
    assert_eq!(
        client.post("/v1/refunds", "", &params).await.ok()["status"],
        "succeeded"
    );
    client
        .post("/v1/refunds", "", &params)
        .await
        .error(400, "charge_already_refunded");
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_when_creating_an_intent() {
    let stage = Stage::start().await;
    let client = &stage.client;
    let mut made = 0;
    for (fault, first, done, repeated) in [
        (Fault::CreateHangAfter, Seen::Nothing, true, Seen::Replay),
        (Fault::CreateErrorAfter, Seen::Error, true, Seen::Error),
        (Fault::CreateHangBefore, Seen::Nothing, false, Seen::Done),
    ] {
        let method = client.method(&cards::fault(fault, Fault::None, 1)).await;
        let mut charge = charge(&method);
        // Each payment is struck once.
        for payment in ["one", "two"] {
            charge[4].1 = payment;
            let key = format!("{fault:?} {payment}");
            see(client, "/v1/payment_intents", &key, &charge, first).await;
            let count = async || {
                let list = client.get("/v1/payment_intents?limit=100").await.ok();
                list["data"].as_array().unwrap().len()
            };
            assert_eq!(count().await, made + usize::from(done), "{fault:?}");
            see(client, "/v1/payment_intents", &key, &charge, repeated).await;
            assert_eq!(count().await, made + 1, "{fault:?}");
            let intent = client.post("/v1/payment_intents", "", &charge).await.ok();
            assert_eq!(client.confirm(&id(intent), "").await.ok()["status"], "succeeded");
            made += 2;
        }
    }
    assert_eq!(client.counts().await, (6, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_slow_is_under_way_meanwhile_and_ends_although_its_caller_left() {
    let mut stage = Stage::with_slow("10m").await;
    let client = stage.client.clone();
    let method = client.method(&cards::fault(Fault::Slow, Fault::Slow, 1)).await;
    let intent = client.intent(&method).await;
    assert!(
        client
            .post_in_vain(&confirm(&intent), "slow", &[])
            .await
            .is_timeout()
    );
    assert_eq!(client.state(&intent).await, "processing");
    client
        .confirm(&intent, "slow")
        .await
        .error(409, "idempotency_key_in_use");
    client
        .confirm(&intent, "other")
        .await
        .error(400, "payment_intent_unexpected_state");
    let cancel = format!("/v1/payment_intents/{intent}/cancel");
    client
        .post(&cancel, "", &[])
        .await
        .error(400, "payment_intent_unexpected_state");
    assert_eq!(client.counts().await, (0, 0));

    // A bank does not stop working when its caller's connection, or even the provider, does.
    stage.process.kill().unwrap();
    stage.process.start().await.unwrap();
    assert_eq!(client.state(&intent).await, "succeeded");
    assert_eq!(client.counts().await, (1, 0));

    let refund = [("payment_intent", intent.as_str())];
    assert!(
        client
            .post_in_vain("/v1/refunds", "slow refund", &refund)
            .await
            .is_timeout()
    );
    let list = format!("/v1/refunds?payment_intent={intent}");
    assert_eq!(client.get(&list).await.ok()["data"][0]["status"], "pending");
    client
        .post("/v1/refunds", "other refund", &refund)
        .await
        .error(400, "charge_already_refunded");
    // A graceful end does not wait for a slow card either.
    let started = Instant::now();
    assert!(stage.process.stop_within(LIMIT).await.unwrap().success());
    assert!(started.elapsed() < LIMIT / 2, "{:?}", started.elapsed());
    stage.process.start().await.unwrap();
    let replayed = client.post("/v1/refunds", "slow refund", &refund).await;
    assert!(replayed.replayed);
    assert_eq!(replayed.ok()["status"], "succeeded");
    assert_eq!(client.counts().await, (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_without_an_answer_do_not_hold_up_the_end() {
    let mut stage = Stage::start().await;
    let client = stage.client.clone();
    let method = client
        .method(&cards::fault(Fault::HangAfter, Fault::None, 1))
        .await;
    let intent = client.intent(&method).await;
    let waiting = tokio::spawn({
        let (client, path) = (client.clone(), confirm(&intent));
        async move { client.try_post(&path, "", &[]).await }
    });
    wait::until("the intent is confirmed", LIMIT, || async {
        Ok((client.state(&intent).await == "succeeded").then_some(()))
    })
    .await
    .unwrap();
    let started = Instant::now();
    assert!(stage.process.stop_within(LIMIT).await.unwrap().success());
    assert!(started.elapsed() < LIMIT / 2, "{:?}", started.elapsed());
    waiting.await.unwrap().expect_err("no answer");
}
