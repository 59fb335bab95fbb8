//! Every outcome that the sandbox can play.

use local_stack::cards::{self, Fault};
use payment_svc::provider::{
    CallError, Decline, DeclineReason, Intent, IntentId, IntentState, MethodToken, Provider, RefundStatus,
    UnknownOutcome,
};
use prometheus::Registry;

use crate::stage::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_charge_and_its_refund() {
    let stage = Stage::start("50ms").await;
    let provider = &stage.provider;
    let method_key = key();
    let method = provider
        .create_method(&method_key, &card(cards::VISA))
        .await
        .unwrap();
    assert_eq!(
        (method.brand.as_str(), method.last_four.as_str()),
        ("visa", "4242")
    );
    assert_eq!((method.expiry_month, method.expiry_year), (12, 2040));
    let again = provider
        .create_method(&method_key, &card(cards::VISA))
        .await
        .unwrap();
    assert_eq!(again, method);
    let other = provider.create_method(&method_key, &card(cards::DECLINED)).await;
    assert!(matches!(other, Err(CallError::KeyReused)), "{other:?}");

    let (create_key, confirm_key, refund_key) = (key(), key(), key());
    let charge = charge(&method.id);
    let intent = provider.create_intent(&create_key, &charge).await.unwrap();
    assert_eq!(intent.state, IntentState::RequiresConfirmation);
    assert_eq!((intent.amount, intent.currency.as_str()), (1299, "EUR"));
    assert_eq!(
        (intent.payment_id, intent.order_id),
        (Some(charge.payment_id), Some(charge.order_id))
    );
    assert_eq!(
        provider.create_intent(&create_key, &charge).await.unwrap(),
        intent
    );

    let confirmed = provider.confirm_intent(&confirm_key, &intent.id).await.unwrap();
    assert_eq!(confirmed.state, IntentState::Succeeded);
    // By the same key, by another one, and as a question: the same.
    for key in [confirm_key, key()] {
        assert_eq!(
            provider.confirm_intent(&key, &intent.id).await.unwrap(),
            confirmed
        );
    }
    assert_eq!(provider.intent(&intent.id).await.unwrap(), confirmed);
    // Too late to cancel, and it says so.
    assert_eq!(
        provider.cancel_intent(&key(), &intent.id).await.unwrap(),
        confirmed
    );

    assert_eq!(provider.refunds(&intent.id).await.unwrap(), []);
    let refund = provider
        .refund(&refund_key, &intent.id, charge.payment_id)
        .await
        .unwrap();
    assert_eq!((refund.status, refund.amount), (RefundStatus::Succeeded, 1299));
    assert_eq!(
        (refund.intent.as_ref(), refund.payment_id),
        (Some(&intent.id), Some(charge.payment_id))
    );
    let again = provider
        .refund(&refund_key, &intent.id, charge.payment_id)
        .await
        .unwrap();
    assert_eq!(again, refund);
    let second = provider
        .refund(&key(), &intent.id, charge.payment_id)
        .await
        .unwrap_err();
    assert!(
        matches!(&second, CallError::Refused { code, .. } if code == "charge_already_refunded"),
        "{second:?}"
    );
    assert_eq!(provider.refunds(&intent.id).await.unwrap(), [refund]);
}

#[tokio::test(flavor = "multi_thread")]
async fn declines_are_told_apart() {
    let stage = Stage::start("50ms").await;
    for (number, reason, another_try) in [
        (cards::DECLINED, DeclineReason::Declined, true),
        (cards::PROCESSING_ERROR, DeclineReason::Declined, true),
        (cards::INSUFFICIENT_FUNDS, DeclineReason::InsufficientFunds, true),
        (cards::EXPIRED, DeclineReason::ExpiredCard, true),
        (cards::INCORRECT_CVC, DeclineReason::IncorrectCardDetails, true),
        (
            cards::AUTHENTICATION_REQUIRED,
            DeclineReason::AuthenticationRequired,
            true,
        ),
        (cards::LOST, DeclineReason::CardBlocked, false),
        (cards::STOLEN, DeclineReason::CardBlocked, false),
        (cards::FRAUDULENT, DeclineReason::CardBlocked, false),
        (
            &cards::fault(Fault::Stolen, Fault::None, 1),
            DeclineReason::CardBlocked,
            false,
        ),
    ] {
        let declined = IntentState::Declined(Decline { reason, another_try });
        let intent = stage.intent(number).await;
        let key = key();
        for _ in 0..2 {
            let answer = stage.provider.confirm_intent(&key, &intent).await.unwrap();
            assert_eq!(answer.state, declined, "{number}");
        }
        assert_eq!(
            stage.provider.intent(&intent).await.unwrap().state,
            declined,
            "{number}"
        );
        // It stays so, whoever asks.
        let again = stage
            .provider
            .confirm_intent(&crate::stage::key(), &intent)
            .await
            .unwrap();
        assert_eq!(again.state, declined, "{number}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_was_not_done() {
    let stage = Stage::start("50ms").await;
    let provider = &stage.provider;
    let mut expired = card(cards::VISA);
    expired.expiry_year = 2020;
    for bad in [card("4242424242424241"), card("12"), expired] {
        let refused = provider.create_method(&key(), &bad).await.unwrap_err();
        let CallError::Refused { decline, .. } = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(decline.reason, DeclineReason::IncorrectCardDetails);
    }
    let is_missing = |answer: Result<Intent, CallError>| {
        assert!(
            matches!(&answer, Err(CallError::Refused { code, .. }) if code == "resource_missing"),
            "{answer:?}"
        );
    };
    let nothing = IntentId::new("pi_nothing");
    is_missing(
        provider
            .create_intent(&key(), &charge(&MethodToken::new("pm_nothing")))
            .await,
    );
    is_missing(provider.confirm_intent(&key(), &nothing).await);
    is_missing(provider.cancel_intent(&key(), &nothing).await);
    is_missing(provider.intent(&nothing).await);
    let unpaid = stage.intent(cards::VISA).await;
    let refused = provider
        .refund(&key(), &unpaid, uuid::Uuid::nil())
        .await
        .unwrap_err();
    assert!(matches!(refused, CallError::Refused { .. }), "{refused:?}");
    // An id is never taken for a path.
    let path = IntentId::new(format!("../payment_intents/{unpaid}"));
    let refused = provider.intent(&path).await.unwrap_err();
    assert!(matches!(refused, CallError::Refused { .. }), "{refused:?}");

    let url = stage.process.http_url().unwrap();
    let stranger = Provider::new(&config(&url, "sk_other"), &Registry::new()).unwrap();
    let refused = stranger.confirm_intent(&key(), &unpaid).await.unwrap_err();
    assert!(matches!(refused, CallError::Unauthorized), "{refused:?}");
    assert_eq!(
        provider.intent(&unpaid).await.unwrap().state,
        IntentState::RequiresConfirmation
    );
    let canceled = provider.cancel_intent(&key(), &unpaid).await.unwrap();
    assert_eq!(canceled.state, IntentState::Canceled);
    for answer in [
        provider.cancel_intent(&key(), &unpaid).await,
        provider.confirm_intent(&key(), &unpaid).await,
    ] {
        assert_eq!(answer.unwrap().state, IntentState::Canceled);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn currencies_that_the_provider_counts_otherwise() {
    let stage = Stage::start("50ms").await;
    let provider = &stage.provider;
    let method = provider
        .create_method(&key(), &card(cards::VISA))
        .await
        .unwrap()
        .id;
    for (amount, currency) in [(5, "ISK"), (1299, "JPY"), (129_900, "MGA"), (1290, "KWD")] {
        let made = provider
            .create_intent(&key(), &charge_of(&method, amount, currency))
            .await
            .unwrap();
        assert_eq!((made.amount, made.currency.as_str()), (amount, currency));
    }
    for (amount, currency) in [(129_901, "MGA"), (1299, "KWD"), (1000, "IQD")] {
        let refused = provider
            .create_intent(&key(), &charge_of(&method, amount, currency))
            .await;
        let Err(CallError::Refused { decline, .. }) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(
            (decline.reason, decline.another_try),
            (DeclineReason::NotSupported, false)
        );
    }
    let intents = provider.list_intents(None, 100).await.unwrap().items;
    let amounts: Vec<i64> = intents.iter().rev().map(|intent| intent.amount).collect();
    assert_eq!(amounts, [5, 1299, 129_900, 1290]);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_is_settled_by_asking() {
    let stage = Stage::start("50ms").await;
    let provider = &stage.provider;
    for (fault, done) in [
        (Fault::HangAfter, true),
        (Fault::HangBefore, false),
        (Fault::ErrorAfter, true),
        (Fault::ErrorBefore, false),
        (Fault::DropAfter, true),
    ] {
        let state = |done| {
            if done {
                IntentState::Succeeded
            } else {
                IntentState::RequiresConfirmation
            }
        };
        let intent = stage.intent(&cards::fault(fault, Fault::None, 1)).await;
        is_unknown(provider.confirm_intent(&key(), &intent).await);
        assert_eq!(
            provider.intent(&intent).await.unwrap().state,
            state(done),
            "{fault:?}"
        );

        let intent = stage.paid(fault).await.id;
        is_unknown(provider.refund(&key(), &intent, uuid::Uuid::nil()).await);
        assert_eq!(
            provider.refunds(&intent).await.unwrap().len(),
            usize::from(done),
            "{fault:?}"
        );
    }
    for (fault, done) in [
        (Fault::CreateHangAfter, true),
        (Fault::CreateErrorAfter, true),
        (Fault::CreateHangBefore, false),
    ] {
        let before = provider.list_intents(None, 1).await.unwrap().items;
        let card = card(&cards::fault(fault, Fault::None, 1));
        let method = provider.create_method(&key(), &card).await.unwrap().id;
        is_unknown(provider.create_intent(&key(), &charge(&method)).await);
        let after = provider.list_intents(None, 1).await.unwrap().items;
        assert_eq!(before != after, done, "{fault:?}");
    }
    // Delivered twice, done once.
    let intent = stage.intent(&cards::fault(Fault::Twice, Fault::Twice, 1)).await;
    let paid = provider.confirm_intent(&key(), &intent).await.unwrap();
    assert_eq!(paid.state, IntentState::Succeeded);
    let refund = provider.refund(&key(), &intent, uuid::Uuid::nil()).await.unwrap();
    assert_eq!(provider.refunds(&intent).await.unwrap(), [refund]);
    // A refund that the bank does not take.
    let intent = stage.paid(Fault::Declined).await.id;
    let refund = provider.refund(&key(), &intent, uuid::Uuid::nil()).await.unwrap();
    assert_eq!(refund.status, RefundStatus::Failed);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_is_neither_done_nor_not() {
    let mut stage = Stage::start("10m").await;
    let provider = stage.provider.clone();
    let paid = stage.paid(Fault::Slow).await.id;
    let intent = stage.intent(&cards::fault(Fault::Slow, Fault::None, 1)).await;
    let confirm_key = key();
    is_unknown(provider.confirm_intent(&confirm_key, &intent).await);
    // 409: the first one is still at work.
    let in_use = provider.confirm_intent(&confirm_key, &intent).await.unwrap_err();
    let CallError::Unknown(UnknownOutcome::Status {
        status: 409,
        request_id,
    }) = in_use
    else {
        panic!("{in_use:?}");
    };
    assert!(request_id.starts_with("req_"), "{request_id}");
    for answer in [
        provider.intent(&intent).await,
        provider.confirm_intent(&key(), &intent).await,
        provider.cancel_intent(&key(), &intent).await,
    ] {
        assert_eq!(answer.unwrap().state, IntentState::Processing);
    }
    is_unknown(provider.refund(&key(), &paid, uuid::Uuid::nil()).await);
    assert_eq!(
        provider.refunds(&paid).await.unwrap()[0].status,
        RefundStatus::Pending
    );

    // An outage tells nothing.
    stage.process.kill().unwrap();
    is_unknown(provider.confirm_intent(&confirm_key, &intent).await);
    is_unknown(provider.intent(&intent).await);
    stage.process.start().await.unwrap();
    assert_eq!(
        provider.intent(&intent).await.unwrap().state,
        IntentState::Succeeded
    );
    assert_eq!(
        provider.refunds(&paid).await.unwrap()[0].status,
        RefundStatus::Succeeded
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_go_on_after_the_last_one() {
    let stage = Stage::start("50ms").await;
    let provider = &stage.provider;
    let mut made = Vec::new();
    for _ in 0..7 {
        let intent = stage.paid(Fault::None).await.id;
        provider.refund(&key(), &intent, uuid::Uuid::nil()).await.unwrap();
        made.insert(0, intent);
    }
    let (mut intents, mut refunds) = (Vec::new(), Vec::new());
    loop {
        let page = provider.list_intents(intents.last(), 3).await.unwrap();
        intents.extend(page.items.into_iter().map(|intent| intent.id));
        if !page.has_more {
            break;
        }
    }
    let mut last = None;
    loop {
        let page = provider.list_refunds(last.as_ref(), 3).await.unwrap();
        last = page.items.last().map(|refund| refund.id.clone());
        refunds.extend(page.items.into_iter().filter_map(|refund| refund.intent));
        if !page.has_more {
            break;
        }
    }
    assert_eq!(intents, made);
    assert_eq!(refunds, made);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_measured_and_the_key_is_not_shown() {
    let stage = Stage::start("50ms").await;
    let registry = Registry::new();
    let url = stage.process.http_url().unwrap();
    let provider = Provider::new(&config(&url, KEY), &registry).unwrap();
    let refused = provider.intent(&IntentId::new("pi_nothing")).await.unwrap_err();
    let shown = format!("{provider:?} {refused:?} {refused} {:?}", card(cards::VISA));
    assert!(
        !shown.contains(KEY) && !shown.contains(cards::VISA) && !shown.contains("917"),
        "{shown}"
    );
    let metrics = prometheus::TextEncoder::new()
        .encode_to_string(&registry.gather())
        .unwrap();
    let expected =
        "payment_provider_call_seconds_count{operation=\"retrieve payment_intent\",status=\"404\"} 1";
    assert!(metrics.contains(expected), "{metrics}");
}
