//! An adapter that speaks to a server of the test's.

use std::time::Duration;

use local_stack::cards;
use local_stack::testing::{Folder, Process};
use money::{Currency, Money};
use payment_svc::provider::{CallError, Card, Charge, Config, Intent, IntentId, MethodToken, Provider};
use prometheus::Registry;
use uuid::Uuid;

pub(crate) const KEY: &str = "sk_test_of_a_test";
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Waits long enough for an answer that comes at all.
pub(crate) fn config(url: &str, key: &str) -> Config {
    Config {
        base_url: url.parse().unwrap(),
        secret_key: key.into(),
        timeout: Duration::from_secs(1),
        connect_timeout: Duration::from_millis(500),
    }
}

pub(crate) fn provider(url: &str) -> Provider {
    Provider::new(&config(url, KEY), &Registry::new()).unwrap()
}

pub(crate) fn card(number: &str) -> Card {
    Card {
        number: number.into(),
        expiry_month: 12,
        expiry_year: 2040,
        cvv: "917".into(),
    }
}

pub(crate) fn charge(method: &MethodToken) -> Charge {
    charge_of(method, 1299, "EUR")
}

pub(crate) fn charge_of(method: &MethodToken, minor_units: i64, currency: &str) -> Charge {
    Charge {
        amount: Money::new(minor_units, Currency::from_code(currency).unwrap()).unwrap(),
        method: method.clone(),
        payment_id: Uuid::now_v7(),
        order_id: Uuid::now_v7(),
    }
}

/// A key that nobody else has.
pub(crate) fn key() -> String {
    Uuid::now_v7().to_string()
}

#[track_caller]
pub(crate) fn is_unknown<T: std::fmt::Debug>(answer: Result<T, CallError>) {
    assert!(matches!(answer, Err(CallError::Unknown(_))), "{answer:?}");
}

/// A sandbox of the test's own.
pub(crate) struct Stage {
    pub(crate) provider: Provider,
    pub(crate) process: Process,
    _folder: Folder,
}

impl Stage {
    pub(crate) async fn start(slow: &str) -> Self {
        let folder = Folder::create("payment-provider");
        let process = Process::builder("payment-sandbox", folder.path())
            .set("http.secret_key", KEY)
            .set("faults.slow", slow)
            .set(
                "storage.path",
                folder.path().join("sandbox.redb").to_string_lossy(),
            )
            .start()
            .await
            .unwrap();
        Self {
            provider: provider(&process.http_url().unwrap()),
            process,
            _folder: folder,
        }
    }

    /// An intent on a card, not confirmed.
    pub(crate) async fn intent(&self, number: &str) -> IntentId {
        let method = self.provider.create_method(&key(), &card(number)).await.unwrap();
        let intent = self.provider.create_intent(&key(), &charge(&method.id)).await;
        intent.unwrap().id
    }

    /// An intent that took money from a card that does so.
    pub(crate) async fn paid(&self, refund: cards::Fault) -> Intent {
        let intent = self.intent(&cards::fault(cards::Fault::None, refund, 1)).await;
        self.provider.confirm_intent(&key(), &intent).await.unwrap()
    }
}
