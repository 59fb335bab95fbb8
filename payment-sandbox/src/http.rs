//! Stripe's API over HTTP, and the ledger.

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, RawQuery, Request as HttpRequest, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use rand::Rng as _;
use rand::distr::Alphabetic;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::bank::{self, Delivery, Operation, Request, Step};
use crate::error::ApiError;
use crate::ledger;
use crate::model::{Charge, Intent, Method, Refund};
use crate::params::Params;
use crate::store::{Read, Record, Store, StoreError};
use crate::writer::{Desk, Gone};

const MAX_BODY: usize = 64 << 10;
const BODY_LIMIT: Duration = Duration::from_secs(10);
const MAX_REQUESTS: usize = 1024;
const MAX_KEY: usize = 255;
const DEFAULT_PAGE: usize = 10;
const MAX_PAGE: usize = 100;
/// How long a reader of the ledger may take for one piece of it.
const LEDGER_LIMIT: Duration = Duration::from_secs(30);

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// What requests need.
#[derive(Debug)]
pub struct Api {
    pub secret_key: SecretString,
    pub store: Store,
    pub desk: Desk,
    pub slow: Duration,
    pub hang: Duration,
    pub shutdown: CancellationToken,
    /// Requests at work, which go on when their caller leaves.
    pub at_work: TaskTracker,
    /// The idempotency keys of those.
    pub keys: Mutex<HashSet<String>>,
}

/// The routes.
pub fn router(api: Arc<Api>) -> Router {
    let stripe = Router::new()
        .route("/v1/payment_methods", post(create_method))
        .route("/v1/payment_methods/{id}", get(one::<Method>))
        .route("/v1/payment_intents", post(create_intent).get(intents))
        .route("/v1/payment_intents/{id}", get(one::<Intent>))
        .route("/v1/payment_intents/{id}/confirm", post(confirm))
        .route("/v1/payment_intents/{id}/cancel", post(cancel))
        .route("/v1/refunds", post(refund).get(refunds))
        .route("/v1/refunds/{id}", get(one::<Refund>))
        .route("/v1/charges", get(charges))
        .route("/v1/charges/{id}", get(one::<Charge>))
        .fallback(async || ApiError::no_such_endpoint())
        .method_not_allowed_fallback(async || ApiError::no_such_endpoint())
        .layer(middleware::from_fn_with_state(
            Admission {
                api: Arc::clone(&api),
                places: Arc::new(Semaphore::new(MAX_REQUESTS)),
            },
            admit,
        ));
    Router::new()
        .route("/sandbox/ledger", get(whole_ledger))
        .merge(stripe)
        .with_state(api)
}

#[derive(Clone)]
struct Admission {
    api: Arc<Api>,
    places: Arc<Semaphore>,
}

/// Lets those in who know the key, as long as there is room.
async fn admit(State(admission): State<Admission>, request: HttpRequest, next: Next) -> Response {
    let expected = format!("Bearer {}", admission.api.secret_key.expose_secret());
    let given = request.headers().get(header::AUTHORIZATION);
    let mut response = if given.is_none_or(|given| given.as_bytes() != expected.as_bytes()) {
        ApiError::unauthorized().into_response()
    } else {
        match admission.places.try_acquire() {
            Ok(_place) => next.run(request).await,
            Err(_) => ApiError::bad_body(429).into_response(),
        }
    };
    let id: String = rand::rng()
        .sample_iter(&Alphabetic)
        .take(14)
        .map(char::from)
        .collect();
    if let Ok(id) = HeaderValue::from_str(&format!("req_{id}")) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

async fn create_method(State(api): State<Arc<Api>>, request: HttpRequest) -> Response {
    change(api, Operation::CreateMethod, request).await
}

async fn create_intent(State(api): State<Arc<Api>>, request: HttpRequest) -> Response {
    change(api, Operation::CreateIntent, request).await
}

async fn confirm(State(api): State<Arc<Api>>, Path(id): Path<String>, request: HttpRequest) -> Response {
    change(api, Operation::Confirm(id), request).await
}

async fn cancel(State(api): State<Arc<Api>>, Path(id): Path<String>, request: HttpRequest) -> Response {
    change(api, Operation::Cancel(id), request).await
}

async fn refund(State(api): State<Arc<Api>>, request: HttpRequest) -> Response {
    change(api, Operation::Refund, request).await
}

/// Does what is asked for and answers, or not, as the card has it.
async fn change(api: Arc<Api>, operation: Operation, request: HttpRequest) -> Response {
    let request = match read_request(&api, operation, request).await {
        Ok(request) => Arc::new(request),
        Err(error) => return error.into_response(),
    };
    let delivery = match execute(&api, &request).await {
        Ok(Step::Answer {
            delivery: Delivery::Again,
            ..
        }) => {
            tracing::info!(operation = ?request.operation, "delivering a request twice, as its card has it");
            match execute(&api, &request).await {
                Ok(Step::Answer {
                    status,
                    body,
                    replayed,
                    ..
                }) => return show(status, &body, replayed),
                _ => Delivery::Drop,
            }
        }
        Ok(Step::Answer {
            status,
            body,
            replayed,
            delivery: Delivery::Send,
        }) => {
            return show(status, &body, replayed);
        }
        Ok(Step::Answer { delivery, .. }) => delivery,
        Ok(Step::Silence | Step::Later(_)) => Delivery::Hang,
        Err(Gone) => Delivery::Drop,
    };
    if delivery == Delivery::Hang {
        tracing::info!(operation = ?request.operation, "leaving a caller without an answer, as its card has it");
        let _ = timeout(api.hang, api.shutdown.cancelled()).await;
    }
    drop_connection()
}

async fn read_request(api: &Api, operation: Operation, request: HttpRequest) -> Result<Request, ApiError> {
    let (parts, body) = request.into_parts();
    let body = match timeout(BODY_LIMIT, axum::body::to_bytes(body, MAX_BODY)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => return Err(ApiError::bad_body(413)),
        Err(_) => return Err(ApiError::bad_body(408)),
    };
    let key = match parts.headers.get(IDEMPOTENCY_KEY).map(HeaderValue::to_str) {
        None => None,
        Some(Ok(key)) if !key.is_empty() && key.len() <= MAX_KEY => Some(key.to_owned()),
        Some(_) => return Err(ApiError::unusable("Idempotency-Key")),
    };
    let params = Params::parse(&body);
    let fingerprint = params.fingerprint(api.secret_key.expose_secret(), parts.uri.path());
    Ok(Request {
        operation,
        params,
        key,
        fingerprint,
    })
}

/// Runs a request to its end, whether or not its caller stays.
async fn execute(api: &Arc<Api>, request: &Arc<Request>) -> Result<Step, Gone> {
    let Some(claim) = Claim::of(api, request.key.as_deref()) else {
        return Ok(bank::failed(&ApiError::key_in_use()));
    };
    let (api, request) = (Arc::clone(api), Arc::clone(request));
    let at_work = api.at_work.clone();
    let task = at_work.spawn(async move {
        let _claim = claim;
        match api.desk.begin(Arc::clone(&request)).await? {
            Step::Later(pending) => {
                let _ = timeout(api.slow, api.shutdown.cancelled()).await;
                api.desk.finish(request, pending).await
            }
            step => Ok(step),
        }
    });
    task.await.unwrap_or_else(|error| {
        tracing::error!(%error, "a request failed");
        Err(Gone)
    })
}

/// An idempotency key in use; free again when this is dropped.
struct Claim {
    api: Arc<Api>,
    key: Option<String>,
}

impl Claim {
    fn of(api: &Arc<Api>, key: Option<&str>) -> Option<Self> {
        if let Some(key) = key {
            let mut keys = api.keys.lock().unwrap_or_else(PoisonError::into_inner);
            if !keys.insert(key.to_owned()) {
                return None;
            }
        }
        Some(Self {
            api: Arc::clone(api),
            key: key.map(str::to_owned),
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(key) = &self.key {
            let mut keys = self.api.keys.lock().unwrap_or_else(PoisonError::into_inner);
            keys.remove(key);
        }
    }
}

fn show(status: u16, body: &Value, replayed: bool) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if replayed {
        headers.insert(REPLAYED, HeaderValue::from_static("true"));
    }
    (status, headers, body.to_string()).into_response()
}

/// The server closes a connection whose answer cannot be sent.
fn drop_connection() -> Response {
    let broken: io::Result<Bytes> = Err(io::ErrorKind::ConnectionAborted.into());
    Body::from_stream(futures::stream::iter([broken])).into_response()
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        show(self.status, &self.body(), false)
    }
}

/// Why something could not be shown.
enum ReadError {
    Api(ApiError),
    Store(StoreError),
}

impl From<ApiError> for ReadError {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

impl From<StoreError> for ReadError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// Reads off the async threads.
async fn reading(
    api: Arc<Api>,
    read: impl FnOnce(&Read) -> Result<Value, ReadError> + Send + 'static,
) -> Response {
    let reading = tokio::task::spawn_blocking(move || read(&api.store.read()?));
    match reading.await {
        Ok(Ok(body)) => show(200, &body, false),
        Ok(Err(ReadError::Api(error))) => error.into_response(),
        Ok(Err(ReadError::Store(error))) => {
            tracing::error!(error = %service::telemetry::chain(&error), "cannot read the storage");
            ApiError::internal().into_response()
        }
        Err(error) => {
            tracing::error!(%error, "a request failed");
            ApiError::internal().into_response()
        }
    }
}

/// A record as Stripe shows it.
trait Shown: Record + 'static {
    fn shown(&self) -> Value;
}

impl Shown for Method {
    fn shown(&self) -> Value {
        self.show()
    }
}

impl Shown for Intent {
    fn shown(&self) -> Value {
        self.show()
    }
}

impl Shown for Charge {
    fn shown(&self) -> Value {
        self.show()
    }
}

impl Shown for Refund {
    fn shown(&self) -> Value {
        self.show()
    }
}

async fn one<R: Shown>(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Response {
    reading(api, move |read| Ok(find::<R>(read, "id", &id)?.shown())).await
}

fn find<R: Record>(read: &Read, param: &str, id: &str) -> Result<R, ReadError> {
    read.get(id)?.ok_or_else(|| ApiError::missing(param, id).into())
}

/// Which part of a listing.
struct Page {
    limit: usize,
    after: Option<String>,
}

impl Page {
    fn read(params: &mut Params) -> Result<Self, ApiError> {
        let limit = params.parsed("limit")?.unwrap_or(DEFAULT_PAGE);
        if !(1..=MAX_PAGE).contains(&limit) {
            return Err(ApiError::unusable("limit"));
        }
        let after = params.optional("starting_after");
        Ok(Self { limit, after })
    }

    /// Of everything there is.
    fn of_all<R: Shown>(self, read: &Read, url: &str) -> Result<Value, ReadError> {
        if let Some(after) = &self.after {
            find::<R>(read, "starting_after", after)?;
        }
        let records = read
            .newest_first::<R>(self.after.as_deref())?
            .take(self.limit + 1)
            .collect::<Result<Vec<_>, _>>()?;
        Ok(self.show(&records, url))
    }

    /// Of some records, newest first.
    fn of<R: Shown>(self, mut records: Vec<R>, url: &str) -> Result<Value, ReadError> {
        if let Some(after) = &self.after {
            let at = records.iter().position(|record| record.id() == after);
            let at = at.ok_or_else(|| ApiError::missing("starting_after", after))?;
            records.drain(..=at);
        }
        Ok(self.show(&records, url))
    }

    fn show<R: Shown>(&self, records: &[R], url: &str) -> Value {
        let data: Vec<Value> = records.iter().take(self.limit).map(R::shown).collect();
        json!({ "object": "list", "url": url, "has_more": records.len() > self.limit, "data": data })
    }
}

async fn intents(State(api): State<Arc<Api>>, RawQuery(query): RawQuery) -> Response {
    reading(api, move |read| {
        let mut params = Params::parse(query.unwrap_or_default().as_bytes());
        let page = Page::read(&mut params)?;
        params.finish()?;
        page.of_all::<Intent>(read, "/v1/payment_intents")
    })
    .await
}

async fn refunds(State(api): State<Arc<Api>>, RawQuery(query): RawQuery) -> Response {
    reading(api, move |read| {
        let mut params = Params::parse(query.unwrap_or_default().as_bytes());
        let page = Page::read(&mut params)?;
        let intent = params.optional("payment_intent");
        params.finish()?;
        let Some(intent) = intent else {
            return page.of_all::<Refund>(read, "/v1/refunds");
        };
        let intent: Intent = find(read, "payment_intent", &intent)?;
        let ids = intent.refunds.iter().rev();
        let refunds: Result<Vec<Refund>, ReadError> = ids.map(|id| find(read, "refund", id)).collect();
        page.of(refunds?, "/v1/refunds")
    })
    .await
}

async fn charges(State(api): State<Arc<Api>>, RawQuery(query): RawQuery) -> Response {
    reading(api, move |read| {
        let mut params = Params::parse(query.unwrap_or_default().as_bytes());
        let page = Page::read(&mut params)?;
        let intent = params.optional("payment_intent");
        params.finish()?;
        let Some(intent) = intent else {
            return page.of_all::<Charge>(read, "/v1/charges");
        };
        let intent: Intent = find(read, "payment_intent", &intent)?;
        let ids = intent.charge.iter();
        let charges: Result<Vec<Charge>, ReadError> = ids.map(|id| find(read, "charge", id)).collect();
        page.of(charges?, "/v1/charges")
    })
    .await
}

async fn whole_ledger(State(api): State<Arc<Api>>) -> Response {
    let (sender, receiver) = mpsc::channel(4);
    let pieces = Pieces {
        sender: sender.clone(),
        runtime: Handle::current(),
    };
    let at_work = api.at_work.clone();
    at_work.spawn_blocking(move || {
        let written = api
            .store
            .read()
            .map_err(Into::into)
            .and_then(|read| ledger::write(&read, pieces));
        if let Err(error) = written {
            tracing::warn!(error = %service::telemetry::chain(&error), "the ledger was not read to its end");
            // Without this, half a ledger would look like a whole one.
            let _ = sender.try_send(Err(io::ErrorKind::ConnectionAborted.into()));
        }
    });
    let json = [(header::CONTENT_TYPE, "application/json")];
    (json, Body::from_stream(ReceiverStream::new(receiver))).into_response()
}

/// Hands what is written to a response, at the pace of its reader.
struct Pieces {
    sender: mpsc::Sender<io::Result<Bytes>>,
    runtime: Handle,
}

impl io::Write for Pieces {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let sending = self.sender.send(Ok(Bytes::copy_from_slice(piece)));
        match self.runtime.block_on(timeout(LEDGER_LIMIT, sending)) {
            Ok(Ok(())) => Ok(piece.len()),
            Ok(Err(_)) => Err(io::ErrorKind::BrokenPipe.into()),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
