//! `/status`, the page that shows it, and what an operator can do there.

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::{Outbox, Versions};
use crate::database::Database;
use crate::source::SourceError;
use crate::source::lease::ask_to_hand_over;
use crate::source::quarantine::Quarantine;
use crate::status::Status;

/// Keys of one listing.
const KEYS: i64 = 200;
/// Other sites' pages cannot send it with a request that a browser makes for them.
const OWN_HEADER: &str = "x-outbox-relay";
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

/// What the admin port shows.
#[derive(Clone)]
pub(crate) struct Shown(pub(crate) Arc<Vec<ShownOutbox>>, pub(crate) Arc<str>);

pub(crate) struct ShownOutbox {
    pub(crate) name: String,
    pub(crate) config: Outbox,
    pub(crate) status: Status,
}

pub(crate) fn router(shown: Shown) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/status", get(status))
        .route("/outboxes/{name}/quarantine", get(quarantine))
        .route("/outboxes/{name}/quarantine/retry", post(retry))
        .route("/outboxes/{name}/quarantine/skip", post(skip))
        .route("/outboxes/{name}/handover", post(handover))
        .with_state(shown)
}

async fn page() -> Response {
    let headers = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-cache"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, Html(include_str!("admin/page.html"))).into_response()
}

async fn status(State(Shown(outboxes, instance)): State<Shown>) -> Json<Value> {
    let ready = outboxes.iter().all(|outbox| outbox.status.ready().is_ok());
    let outboxes: Vec<Value> = outboxes.iter().map(describe).collect();
    Json(json!({
        "instance": *instance,
        "version": env!("CARGO_PKG_VERSION"),
        "ready": ready,
        "outboxes": outboxes,
    }))
}

fn describe(outbox: &ShownOutbox) -> Value {
    let (role, lead, figures) = outbox.status.snapshot();
    let mut shown = json!({
        "name": outbox.name,
        "table": outbox.config.table.to_string(),
        "role": role.name(),
        "problem": role.problem(),
        "retention_seconds": outbox.config.retention.map(|retention| retention.as_secs_f64()),
    });
    merge(&mut shown, json!(lead));
    let figures = match figures {
        Some(figures) => json!(figures),
        // The same names, nothing known.
        None => match json!(crate::status::Figures::default()) {
            Value::Object(names) => names.into_iter().map(|(name, _)| (name, Value::Null)).collect(),
            other => other,
        },
    };
    merge(&mut shown, figures);
    shown
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

/// What went wrong with a request, for the one who made it.
struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

impl From<JsonRejection> for Refusal {
    fn from(rejection: JsonRejection) -> Self {
        Self(rejection.status(), rejection.body_text())
    }
}

impl From<SourceError> for Refusal {
    fn from(error: SourceError) -> Self {
        let text = service::telemetry::chain(&error).to_string();
        tracing::warn!(error = text, "a request on the admin port failed");
        Self(StatusCode::SERVICE_UNAVAILABLE, text)
    }
}

impl Shown {
    fn find(&self, name: &str) -> Result<&ShownOutbox, Refusal> {
        self.0
            .iter()
            .find(|outbox| outbox.name == name)
            .ok_or_else(|| Refusal(StatusCode::NOT_FOUND, format!("there is no outbox {name}")))
    }
}

impl ShownOutbox {
    async fn connect(&self) -> Result<Database, SourceError> {
        let application = format!("outbox-relay {} admin", self.name);
        Ok(Database::connect(
            &self.config.connection,
            &application,
            self.config.statement_timeout(),
        )
        .await?)
    }

    fn quarantine<'a>(&'a self, db: &'a Database) -> Quarantine<'a> {
        Quarantine {
            db,
            table: &self.config.table,
            name: &self.name,
            by_version: self.config.versions == Versions::Contiguous,
        }
    }
}

async fn quarantine(State(shown): State<Shown>, Path(name): Path<String>) -> Result<Json<Value>, Refusal> {
    let outbox = shown.find(&name)?;
    let db = outbox.connect().await?;
    let mut keys = outbox.quarantine(&db).keys(KEYS + 1).await?;
    let more = i64::try_from(keys.len()).is_ok_and(|count| count > KEYS);
    keys.truncate(usize::try_from(KEYS).unwrap_or(usize::MAX));
    Ok(Json(json!({ "keys": keys, "more": more })))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Retry {
    #[serde(default)]
    all: bool,
    aggregate_type: Option<String>,
    key: Option<String>,
}

async fn retry(
    State(shown): State<Shown>,
    Path(name): Path<String>,
    headers: HeaderMap,
    asked: Result<Json<Retry>, JsonRejection>,
) -> Result<Response, Refusal> {
    check_own(&headers)?;
    let Json(asked) = asked?;
    let outbox = shown.find(&name)?;
    if asked.all == asked.key.is_some() {
        return Err(Refusal(
            StatusCode::BAD_REQUEST,
            "give a key, or all: true".to_owned(),
        ));
    }
    let db = outbox.connect().await?;
    let keys = outbox
        .quarantine(&db)
        .retry(asked.aggregate_type.as_deref(), asked.key.as_deref(), "page")
        .await?;
    tracing::info!(outbox = name, keys, "a retry was asked for on the page");
    Ok((StatusCode::ACCEPTED, Json(json!({ "keys": keys }))).into_response())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Skip {
    id: i64,
    reason: String,
}

async fn skip(
    State(shown): State<Shown>,
    Path(name): Path<String>,
    headers: HeaderMap,
    asked: Result<Json<Skip>, JsonRejection>,
) -> Result<Response, Refusal> {
    check_own(&headers)?;
    let Json(asked) = asked?;
    let outbox = shown.find(&name)?;
    if asked.reason.trim().is_empty() {
        return Err(Refusal(StatusCode::BAD_REQUEST, "a reason is needed".to_owned()));
    }
    let db = outbox.connect().await?;
    if !outbox
        .quarantine(&db)
        .skip(asked.id, asked.reason.trim(), "page")
        .await?
    {
        let text = format!("row {} is not the first of a key in quarantine", asked.id);
        return Err(Refusal(StatusCode::CONFLICT, text));
    }
    tracing::info!(
        outbox = name,
        outbox.id = asked.id,
        "a skip was asked for on the page"
    );
    Ok((StatusCode::ACCEPTED, Json(json!({ "keys": 1 }))).into_response())
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Handover {
    to: Option<String>,
}

async fn handover(
    State(shown): State<Shown>,
    Path(name): Path<String>,
    headers: HeaderMap,
    asked: Result<Json<Handover>, JsonRejection>,
) -> Result<Response, Refusal> {
    check_own(&headers)?;
    let Json(asked) = asked?;
    let outbox = shown.find(&name)?;
    let db = outbox.connect().await?;
    let to = asked.to.unwrap_or_default();
    let Some(leader) = ask_to_hand_over(&db, &outbox.config.table, &name, &to).await? else {
        return Err(Refusal(
            StatusCode::CONFLICT,
            "nobody leads this outbox".to_owned(),
        ));
    };
    tracing::info!(outbox = name, to, "a handover was asked for on the page");
    Ok((StatusCode::ACCEPTED, Json(json!({ "leader": leader }))).into_response())
}

fn check_own(headers: &HeaderMap) -> Result<(), Refusal> {
    if headers.contains_key(OWN_HEADER) {
        return Ok(());
    }
    let text = format!("the header {OWN_HEADER} is missing");
    Err(Refusal(StatusCode::FORBIDDEN, text))
}
