//! Every request against stripe-mock, which is built from Stripe's own description of its API. It keeps no state: what is
//! checked is that Stripe would take our parameters, in the version that we ask for, and that we understand its objects.

use std::time::Duration;

use local_stack::Child;
use local_stack::cards;
use local_stack::child::Launch;
use local_stack::install;
use local_stack::testing::Folder;
use local_stack::wait;
use payment_svc::provider::{CallError, IntentId, MethodToken, Provider, RefundId, UnknownOutcome};
use prometheus::Registry;

use crate::stage::*;

struct StripeMock {
    url: String,
    _child: Child,
    _folder: Folder,
}

impl StripeMock {
    async fn start() -> Self {
        let folder = Folder::create("stripe-mock");
        let executable = tokio::task::spawn_blocking(install::stripe_mock)
            .await
            .unwrap()
            .unwrap();
        let log = folder.path().join("stripe-mock.log");
        let mut child = Launch::new("stripe-mock", executable, log.clone())
            .args([
                "-http-addr",
                "127.0.0.1:0",
                "-https-addr",
                "127.0.0.1:0",
                "-strict-version-check",
            ])
            .spawn()
            .unwrap();
        let url = wait::until("stripe-mock listens", LIMIT, || {
            let running = child.check_running();
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            async move {
                running?;
                let (_, rest) = text.split_once("HTTP at address: ").unwrap_or_default();
                Ok(rest
                    .split_once('\n')
                    .map(|(address, _)| format!("http://{address}")))
            }
        })
        .await
        .unwrap();
        Self {
            url,
            _child: child,
            _folder: folder,
        }
    }
}

/// stripe-mock answers 400 to what Stripe would not take. What it shows is made up, so it may be about another intent.
#[track_caller]
fn is_taken<T: std::fmt::Debug>(answer: Result<T, CallError>) {
    match answer {
        Ok(_) => {}
        Err(CallError::Unknown(UnknownOutcome::NotUnderstood {
            status: 200,
            what: "it is about another intent",
            ..
        })) => {}
        Err(error) => panic!("{error:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stripe_takes_every_request_and_its_answers_are_understood() {
    let stripe = StripeMock::start().await;
    // stripe-mock takes keys of this form only.
    let mut config = config(&stripe.url, "sk_test_123");
    config.timeout = Duration::from_secs(20);
    let provider = Provider::new(&config, &Registry::new()).unwrap();
    let (intent, refund) = (IntentId::new("pi_1"), RefundId::new("re_1"));
    provider.create_method(&key(), &card(cards::VISA)).await.unwrap();
    provider
        .create_intent(&key(), &charge(&MethodToken::new("pm_1")))
        .await
        .unwrap();
    is_taken(provider.confirm_intent(&key(), &intent).await);
    is_taken(provider.intent(&intent).await);
    is_taken(provider.cancel_intent(&key(), &intent).await);
    is_taken(provider.refund(&key(), &intent, uuid::Uuid::nil()).await);
    provider.refunds(&intent).await.unwrap();
    provider.list_intents(None, 100).await.unwrap();
    provider.list_intents(Some(&intent), 1).await.unwrap();
    provider.list_refunds(None, 100).await.unwrap();
    provider.list_refunds(Some(&refund), 1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_name_or_version_would_be_noticed() {
    let stripe = StripeMock::start().await;
    let client = reqwest::Client::builder()
        .no_proxy()
        .timeout(LIMIT)
        .build()
        .unwrap();
    let post = async |path: &str, version: &str, params: &[(&str, &str)]| {
        let request = client
            .post(format!("{}/v1/{path}", stripe.url))
            .bearer_auth("sk_test_123")
            .header("stripe-version", version)
            .form(params);
        request.send().await.unwrap().status().as_u16()
    };
    let (version, confirm) = ("2026-08-26.dahlia", "payment_intents/pi_1/confirm");
    assert_eq!(
        post(confirm, version, &[("error_on_requires_action", "true")]).await,
        200
    );
    for (path, version, param) in [
        (confirm, version, ("error_on_requires_actions", "true")),
        (confirm, version, ("error_on_requires_action", "perhaps")),
        (confirm, "2019-01-01", ("error_on_requires_action", "true")),
        ("refunds", version, ("payment_id", "1")),
        ("payment_methods", version, ("card[numbr]", cards::VISA)),
    ] {
        assert_eq!(post(path, version, &[param]).await, 400, "{path} {param:?}");
    }
}
