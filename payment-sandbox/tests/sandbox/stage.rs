//! A sandbox of the test's own, and a client that says plainly what it sends.

use std::time::Duration;

use local_stack::testing::{Folder, Process};
use serde_json::Value;

pub(crate) const KEY: &str = "sk_test_of_a_test";
pub(crate) const LIMIT: Duration = Duration::from_secs(30);
/// Long enough for an answer that comes at all.
const PATIENCE: Duration = Duration::from_millis(700);

pub(crate) struct Stage {
    pub(crate) process: Process,
    pub(crate) client: Client,
    pub(crate) folder: Folder,
}

impl Stage {
    pub(crate) async fn start() -> Self {
        Self::with_slow("50ms").await
    }

    pub(crate) async fn with_slow(slow: &str) -> Self {
        let folder = Folder::create("payment-sandbox");
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
        let client = Client::new(&process.http_url().unwrap());
        Self {
            process,
            client,
            folder,
        }
    }
}

/// What came back.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) replayed: bool,
    pub(crate) body: Value,
}

impl Answer {
    #[track_caller]
    pub(crate) fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{self:?}");
        self.body
    }

    #[track_caller]
    pub(crate) fn error(self, status: u16, code: &str) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        let error = &self.body["error"];
        assert_eq!(error["code"].as_str().unwrap_or_default(), code, "{self:?}");
        error.clone()
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    url: String,
    secret_key: String,
}

impl Client {
    pub(crate) fn new(url: &str) -> Self {
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(LIMIT)
            .build()
            .unwrap();
        Self {
            http,
            url: url.to_owned(),
            secret_key: KEY.to_owned(),
        }
    }

    pub(crate) fn with_secret_key(&self, secret_key: &str) -> Self {
        Self {
            secret_key: secret_key.to_owned(),
            ..self.clone()
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        let request = self
            .http
            .get(format!("{}{path}", self.url))
            .bearer_auth(&self.secret_key);
        answer(request).await.unwrap()
    }

    /// As [`try_post`](Self::try_post), when an answer is expected.
    pub(crate) async fn post(&self, path: &str, key: &str, params: &[(&str, &str)]) -> Answer {
        self.try_post(path, key, params).await.unwrap()
    }

    /// With an idempotency key, unless it is empty.
    pub(crate) async fn try_post(
        &self,
        path: &str,
        key: &str,
        params: &[(&str, &str)],
    ) -> reqwest::Result<Answer> {
        answer(self.request(path, key, params)).await
    }

    /// When none is expected.
    pub(crate) async fn post_in_vain(
        &self,
        path: &str,
        key: &str,
        params: &[(&str, &str)],
    ) -> reqwest::Error {
        let request = self.request(path, key, params).timeout(PATIENCE);
        answer(request).await.unwrap_err()
    }

    fn request(&self, path: &str, key: &str, params: &[(&str, &str)]) -> reqwest::RequestBuilder {
        let request = self
            .http
            .post(format!("{}{path}", self.url))
            .bearer_auth(&self.secret_key)
            .form(params);
        if key.is_empty() {
            request
        } else {
            request.header("Idempotency-Key", key)
        }
    }

    /// Has a card kept; its id.
    pub(crate) async fn method(&self, number: &str) -> String {
        id(self.post("/v1/payment_methods", "", &card(number)).await.ok())
    }

    /// An intent, not confirmed; its id.
    pub(crate) async fn intent(&self, method: &str) -> String {
        id(self.post("/v1/payment_intents", "", &charge(method)).await.ok())
    }

    pub(crate) async fn confirm(&self, intent: &str, key: &str) -> Answer {
        self.post(&confirm(intent), key, &[]).await
    }

    pub(crate) async fn state(&self, intent: &str) -> String {
        let intent = self.get(&format!("/v1/payment_intents/{intent}")).await.ok();
        intent["status"].as_str().unwrap().to_owned()
    }

    pub(crate) async fn ledger(&self) -> Value {
        self.get("/sandbox/ledger").await.ok()
    }

    /// How many charges and refunds the ledger has.
    pub(crate) async fn counts(&self) -> (usize, usize) {
        let ledger = self.ledger().await;
        let count = |name: &str| ledger[name].as_array().unwrap().len();
        (count("charges"), count("refunds"))
    }
}

async fn answer(request: reqwest::RequestBuilder) -> reqwest::Result<Answer> {
    let response = request.send().await?;
    let status = response.status().as_u16();
    let replayed = response.headers().contains_key("idempotent-replayed");
    let text = response.text().await?;
    let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
    Ok(Answer {
        status,
        replayed,
        body,
    })
}

pub(crate) fn id(object: Value) -> String {
    object["id"].as_str().unwrap().to_owned()
}

pub(crate) fn confirm(intent: &str) -> String {
    format!("/v1/payment_intents/{intent}/confirm")
}

pub(crate) fn card(number: &str) -> [(&str, &str); 5] {
    [
        ("type", "card"),
        ("card[number]", number),
        ("card[exp_month]", "12"),
        ("card[exp_year]", "2040"),
        ("card[cvc]", "917"),
    ]
}

pub(crate) fn charge(method: &str) -> [(&str, &str); 6] {
    [
        ("amount", "1299"),
        ("currency", "eur"),
        ("payment_method", method),
        ("payment_method_types[]", "card"),
        ("metadata[payment_id]", "payment 1"),
        ("metadata[order_id]", "order 1"),
    ]
}
