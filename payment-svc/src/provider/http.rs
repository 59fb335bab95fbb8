//! One request, one answer: with a deadline, a bound on its size, a span and a metric. Neither bodies nor the key are logged.

use std::time::Instant;

use prometheus::{HistogramOpts, HistogramVec, Registry};
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Client, Method, Url, redirect, retry};
use secrecy::ExposeSecret as _;
use tracing::Instrument as _;

use super::{Config, SetupError, UnknownOutcome};

/// What the API is like; Stripe keeps answering as it did in this version. The one that stripe-mock is built from.
const API_VERSION: &str = "2026-08-26.dahlia";
const MAX_ANSWER: usize = 1 << 20;

/// Parameters, names in Stripe's brackets.
pub(super) type Params<'p> = [(&'p str, &'p str)];

/// A request to be made.
pub(super) struct Call<'c> {
    /// What it is for, among metrics and spans.
    pub(super) operation: &'static str,
    /// Below the base URL, one by one.
    pub(super) path: &'c [&'c str],
    /// In the body of a call that changes something, in the query of one that does not.
    pub(super) params: &'c Params<'c>,
    /// What makes a repetition of the call the same call; none for those that change nothing.
    pub(super) key: Option<&'c str>,
}

/// What came back, whatever it means.
pub(super) struct Answer {
    pub(super) status: u16,
    /// The provider's own id of the request, for its support.
    pub(super) request_id: String,
    pub(super) body: Vec<u8>,
}

#[derive(Debug, Clone)]
pub(super) struct Http {
    client: Client,
    base: Url,
    calls: HistogramVec,
}

impl Http {
    pub(super) fn new(config: &Config, registry: &Registry) -> Result<Self, SetupError> {
        let mut key = HeaderValue::from_str(&format!("Bearer {}", config.secret_key.expose_secret()))
            .map_err(|_| SetupError::Key)?;
        key.set_sensitive(true);
        let headers = HeaderMap::from_iter([
            (AUTHORIZATION, key),
            (
                reqwest::header::HeaderName::from_static("stripe-version"),
                HeaderValue::from_static(API_VERSION),
            ),
        ]);
        let client = Client::builder()
            .default_headers(headers)
            .user_agent(concat!("shop-payment-svc/", env!("CARGO_PKG_VERSION")))
            .timeout(config.timeout)
            .connect_timeout(config.connect_timeout)
            .redirect(redirect::Policy::none())
            .retry(retry::never())
            // Where cards go is said by the configuration alone, not by the environment.
            .no_proxy()
            .https_only(config.base_url.scheme() == "https")
            .build()
            .map_err(SetupError::Client)?;
        let calls = HistogramVec::new(
            HistogramOpts::new(
                "payment_provider_call_seconds",
                "Calls to the payment provider, by what they were for and the answer's status; 0: no answer.",
            )
            .buckets(vec![0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]),
            &["operation", "status"],
        )?;
        registry.register(Box::new(calls.clone()))?;
        Ok(Self {
            client,
            base: config.base_url.clone(),
            calls,
        })
    }

    /// Makes the call, once.
    pub(super) async fn call(&self, call: Call<'_>) -> Result<Answer, UnknownOutcome> {
        let method = if call.key.is_some() {
            Method::POST
        } else {
            Method::GET
        };
        let span = tracing::info_span!(
            "payment provider",
            otel.name = call.operation,
            otel.kind = "client",
            http.request.method = method.as_str(),
            server.address = self.base.host_str().unwrap_or_default(),
            http.response.status_code = tracing::field::Empty,
            provider.request_id = tracing::field::Empty,
        );
        let started = Instant::now();
        let operation = call.operation;
        let answer = self.send(method, call).instrument(span.clone()).await;
        let status = match &answer {
            Ok(answer) => {
                span.record("http.response.status_code", answer.status);
                span.record("provider.request_id", &answer.request_id);
                answer.status
            }
            Err(_) => 0,
        };
        self.calls
            .with_label_values(&[operation, &status.to_string()])
            .observe(started.elapsed().as_secs_f64());
        answer
    }

    async fn send(&self, method: Method, call: Call<'_>) -> Result<Answer, UnknownOutcome> {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().push("v1").extend(call.path);
        }
        let mut request = self.client.request(method, url);
        request = match call.key {
            // The body may hold a card: it exists only as part of the request, which goes when it is sent.
            Some(key) => request.header("idempotency-key", key).form(call.params),
            None => request.query(call.params),
        };
        let mut response = request
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .send()
            .await
            .map_err(no_answer)?;
        let status = response.status().as_u16();
        let request_id = response
            .headers()
            .get("request-id")
            .and_then(|id| id.to_str().ok())
            .unwrap_or_default()
            .to_owned();
        let mut body = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(no_answer)? {
            if body.len() + piece.len() > MAX_ANSWER {
                return Err(UnknownOutcome::NotUnderstood {
                    status,
                    what: "it is too large",
                    request_id,
                });
            }
            body.extend_from_slice(&piece);
        }
        Ok(Answer {
            status,
            request_id,
            body,
        })
    }
}

fn no_answer(error: reqwest::Error) -> UnknownOutcome {
    UnknownOutcome::NoAnswer(error.without_url())
}
