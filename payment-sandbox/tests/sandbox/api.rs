//! What Stripe's API would answer.

use futures::future::join_all;
use local_stack::cards;
use serde_json::json;

use crate::stage::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_charge_is_made_shown_and_refunded() {
    let stage = Stage::start().await;
    let client = &stage.client;
    let method = client
        .post("/v1/payment_methods", "", &card(cards::VISA))
        .await
        .ok();
    let summary = json!({ "brand": "visa", "last4": "4242", "exp_month": 12, "exp_year": 2040 });
    assert_eq!((&method["type"], &method["card"]), (&json!("card"), &summary));
    let method = id(method);
    let shown = client.get(&format!("/v1/payment_methods/{method}")).await.ok();
    assert_eq!(shown["card"], summary);

    let made = client
        .post("/v1/payment_intents", "", &charge(&method))
        .await
        .ok();
    assert_eq!(made["status"], "requires_confirmation");
    assert_eq!(
        (&made["amount"], &made["currency"]),
        (&json!(1299), &json!("eur"))
    );
    assert_eq!(
        made["metadata"],
        json!({ "payment_id": "payment 1", "order_id": "order 1" })
    );
    let intent = id(made);
    assert_eq!(client.counts().await, (0, 0));
    let early = client
        .post("/v1/refunds", "", &[("payment_intent", &intent)])
        .await;
    early.error(400, "");

    let confirmed = client.confirm(&intent, "").await.ok();
    assert_eq!(
        (&confirmed["status"], &confirmed["amount_received"]),
        (&json!("succeeded"), &json!(1299))
    );
    let again = client
        .confirm(&intent, "")
        .await
        .error(400, "payment_intent_unexpected_state");
    assert_eq!(again["payment_intent"], confirmed);
    let cancel = format!("/v1/payment_intents/{intent}/cancel");
    client
        .post(&cancel, "", &[])
        .await
        .error(400, "payment_intent_unexpected_state");

    let charge_id = confirmed["latest_charge"].as_str().unwrap();
    let charges = client.get("/v1/charges").await.ok();
    assert_eq!(charges["data"][0]["id"], charge_id);
    let part = [("payment_intent", intent.as_str()), ("amount", "299")];
    let part = id(client.post("/v1/refunds", "", &part).await.ok());
    let too_much = [("payment_intent", intent.as_str()), ("amount", "1001")];
    client
        .post("/v1/refunds", "", &too_much)
        .await
        .error(400, "parameter_invalid");
    let rest = client
        .post("/v1/refunds", "", &[("payment_intent", &intent)])
        .await
        .ok();
    assert_eq!(
        (&rest["amount"], &rest["status"]),
        (&json!(1000), &json!("succeeded"))
    );
    let rest = id(rest);
    let over = client
        .post("/v1/refunds", "", &[("payment_intent", &intent)])
        .await;
    over.error(400, "charge_already_refunded");
    let refunds = client
        .get(&format!("/v1/refunds?payment_intent={intent}"))
        .await
        .ok();
    assert_eq!(
        (&refunds["data"][0]["id"], &refunds["data"][1]["id"]),
        (&json!(rest), &json!(part))
    );
    assert_eq!(
        client.get(&format!("/v1/refunds/{rest}")).await.ok()["amount"],
        1000
    );

    let ledger = client.ledger().await;
    let entry = &ledger["charges"][0];
    assert_eq!(
        (&entry["id"], &entry["amount"]),
        (&json!(charge_id), &json!(1299))
    );
    assert_eq!(
        (&entry["payment_id"], &entry["order_id"]),
        (&json!("payment 1"), &json!("order 1"))
    );
    let entry = &ledger["refunds"][0];
    assert_eq!((&entry["id"], &entry["amount"]), (&json!(rest), &json!(1000)));
    assert_eq!(
        (&entry["payment_intent"], &entry["order_id"]),
        (&json!(intent), &json!("order 1"))
    );
    assert_eq!(client.counts().await, (1, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_refused() {
    let stage = Stage::start().await;
    let client = &stage.client;
    let with = |number: &'static str, index: usize, value: &'static str| {
        let mut card = card(number);
        card[index].1 = value;
        card
    };
    for (card, code) in [
        (card("4242424242424241"), "incorrect_number"),
        (card("42"), "incorrect_number"),
        (with(cards::VISA, 2, "13"), "invalid_expiry_month"),
        (with(cards::VISA, 3, "2020"), "invalid_expiry_year"),
        (with(cards::VISA, 4, "12"), "invalid_cvc"),
    ] {
        client
            .post("/v1/payment_methods", "", &card)
            .await
            .error(402, code);
    }
    let method = client.method(cards::VISA).await;
    let with = |index: usize, name: &'static str, value: &'static str| {
        let mut charge = charge(&method).map(|(name, value)| (name.to_owned(), value.to_owned()));
        charge[index] = (name.to_owned(), value.to_owned());
        charge
    };
    for (index, name, value, status, code) in [
        (0, "amount", "0", 400, "parameter_invalid"),
        (0, "amount", "many", 400, "parameter_invalid"),
        (0, "amount", "100000000", 400, "parameter_invalid"),
        (1, "currency", "euro", 400, "parameter_invalid"),
        (1, "currency", "", 400, "parameter_missing"),
        (2, "payment_method", "pm_none", 404, "resource_missing"),
        (3, "payment_method_types[]", "boat", 400, "parameter_invalid"),
        (3, "colour", "blue", 400, "parameter_unknown"),
    ] {
        let params = with(index, name, value);
        let params = params
            .each_ref()
            .map(|(name, value)| (name.as_str(), value.as_str()));
        client
            .post("/v1/payment_intents", "", &params)
            .await
            .error(status, code);
    }
    for path in [
        "/v1/payment_intents/pi_none",
        "/v1/refunds/re_none",
        "/v1/payment_intents?starting_after=pi_none",
    ] {
        client.get(path).await.error(404, "resource_missing");
    }
    client.confirm("pi_none", "").await.error(404, "resource_missing");
    client
        .get("/v1/refunds?limit=101")
        .await
        .error(400, "parameter_invalid");
    client.get("/v1/customers").await.error(404, "");
    let large = "x".repeat(100_000);
    client
        .post("/v1/refunds", "", &[("payment_intent", &large)])
        .await
        .error(413, "");

    for key in ["sk_other", ""] {
        client
            .with_secret_key(key)
            .get("/v1/refunds")
            .await
            .error(401, "");
    }
    assert_eq!(client.counts().await, (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_and_declined_intents_take_no_money() {
    let stage = Stage::start().await;
    let client = &stage.client;
    let method = client.method(cards::VISA).await;
    let intent = client.intent(&method).await;
    let cancel = format!("/v1/payment_intents/{intent}/cancel");
    assert_eq!(client.post(&cancel, "", &[]).await.ok()["status"], "canceled");
    client
        .post(&cancel, "", &[])
        .await
        .error(400, "payment_intent_unexpected_state");
    client
        .confirm(&intent, "")
        .await
        .error(400, "payment_intent_unexpected_state");

    for (card, code, decline_code) in [
        (cards::DECLINED.to_owned(), "card_declined", "generic_decline"),
        (
            cards::INSUFFICIENT_FUNDS.to_owned(),
            "card_declined",
            "insufficient_funds",
        ),
        (cards::LOST.to_owned(), "card_declined", "lost_card"),
        (cards::STOLEN.to_owned(), "card_declined", "stolen_card"),
        (cards::FRAUDULENT.to_owned(), "card_declined", "fraudulent"),
        (cards::EXPIRED.to_owned(), "expired_card", "expired_card"),
        (cards::INCORRECT_CVC.to_owned(), "incorrect_cvc", "incorrect_cvc"),
        (
            cards::PROCESSING_ERROR.to_owned(),
            "processing_error",
            "processing_error",
        ),
        (
            cards::fault(cards::Fault::Declined, cards::Fault::None, 1),
            "card_declined",
            "generic_decline",
        ),
        (
            cards::fault(cards::Fault::Stolen, cards::Fault::None, 2),
            "card_declined",
            "stolen_card",
        ),
    ] {
        let intent = client.intent(&client.method(&card).await).await;
        let error = client.confirm(&intent, "").await.error(402, code);
        assert_eq!(error["decline_code"], decline_code);
        let shown = client.get(&format!("/v1/payment_intents/{intent}")).await.ok();
        assert_eq!(error["payment_intent"], shown);
        assert_eq!(shown["status"], "requires_payment_method");
        assert_eq!(shown["last_payment_error"]["decline_code"], decline_code);
        // Its method was taken from it.
        client
            .confirm(&intent, "")
            .await
            .error(400, "payment_intent_unexpected_state");
        // Another one may be tried.
        let other = [("payment_method", method.as_str())];
        let paid = client.post(&confirm(&intent), "", &other).await.ok();
        assert_eq!(paid["status"], "succeeded");
    }
    assert_eq!(client.counts().await, (10, 0));

    let asks = client.method(cards::AUTHENTICATION_REQUIRED).await;
    let intent = client.intent(&asks).await;
    assert_eq!(
        client.confirm(&intent, "").await.ok()["status"],
        "requires_action"
    );
    let intent = client.intent(&asks).await;
    let params = [("error_on_requires_action", "true")];
    let error = client.post(&confirm(&intent), "", &params).await;
    error.error(402, "authentication_required");
    assert_eq!(client.counts().await, (10, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotency_key_makes_a_repetition_the_same_request() {
    let stage = Stage::start().await;
    let client = &stage.client;
    let method = client
        .post("/v1/payment_methods", "card", &card(cards::VISA))
        .await;
    let again = client
        .post("/v1/payment_methods", "card", &card(cards::VISA))
        .await;
    assert!(!method.replayed && again.replayed);
    assert_eq!(method.body, again.body);
    let another = client
        .post("/v1/payment_methods", "card", &card(cards::DECLINED))
        .await;
    assert_eq!(another.error(400, "")["type"], "idempotency_error");
    let method = id(method.body);

    let made = client.post("/v1/payment_intents", "make", &charge(&method)).await;
    let again = client.post("/v1/payment_intents", "make", &charge(&method)).await;
    assert!(again.replayed);
    assert_eq!(made.body, again.body);
    let intent = id(made.body);
    let elsewhere = client.confirm(&intent, "make").await;
    assert_eq!(elsewhere.error(400, "")["type"], "idempotency_error");
    let first = client.confirm(&intent, "confirm").await.ok();
    let again = client.confirm(&intent, "confirm").await;
    assert!(again.replayed);
    assert_eq!(again.ok(), first);
    // An answer is repeated as it was, whatever has happened since: here, before and after a decline.
    let declined = client.intent(&client.method(cards::DECLINED).await).await;
    client
        .confirm(&declined, "declined")
        .await
        .error(402, "card_declined");
    let repeated = client.confirm(&declined, "declined").await;
    assert!(repeated.replayed);
    repeated.error(402, "card_declined");
    // What was refused before anything began is not kept.
    let mistyped = [("payment_intent", "pi_none")];
    client
        .post("/v1/refunds", "refund", &mistyped)
        .await
        .error(404, "resource_missing");
    let refund = [("payment_intent", intent.as_str())];
    let first = client.post("/v1/refunds", "refund", &refund).await.ok();
    assert_eq!(client.post("/v1/refunds", "refund", &refund).await.ok(), first);
    assert_eq!(client.counts().await, (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_intent_captures_once_whatever_comes_at_once() {
    let stage = Stage::start().await;
    let client = &stage.client;
    let method = client.method(cards::VISA).await;
    for same_key in [true, false] {
        let intent = client.intent(&method).await;
        let keys: Vec<String> = (0..32)
            .map(|n| {
                if same_key {
                    format!("all {intent}")
                } else {
                    format!("{n} {intent}")
                }
            })
            .collect();
        let answers = join_all(keys.iter().map(|key| client.confirm(&intent, key))).await;
        let first = answers
            .iter()
            .filter(|answer| answer.status == 200 && !answer.replayed);
        assert_eq!(first.count(), 1, "{answers:?}");
        let refund = [("payment_intent", intent.as_str())];
        let keys: Vec<String> = keys.iter().map(|key| format!("refund {key}")).collect();
        let refunds = join_all(keys.iter().map(|key| client.post("/v1/refunds", key, &refund))).await;
        let first = refunds
            .iter()
            .filter(|answer| answer.status == 200 && !answer.replayed);
        assert_eq!(first.count(), 1, "{refunds:?}");
    }
    assert_eq!(client.counts().await, (2, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_are_paged_newest_first() {
    let stage = Stage::start().await;
    let client = &stage.client;
    let method = client.method(cards::VISA).await;
    let mut made = Vec::new();
    for _ in 0..25 {
        made.insert(0, client.intent(&method).await);
    }
    let (mut seen, mut query) = (Vec::new(), "?limit=10".to_owned());
    loop {
        let page = client.get(&format!("/v1/payment_intents{query}")).await.ok();
        seen.extend(page["data"].as_array().unwrap().iter().cloned().map(id));
        if page["has_more"] == false {
            break;
        }
        query = format!("?limit=10&starting_after={}", seen.last().unwrap());
    }
    assert_eq!(seen, made);
}
