//! The admin port over HTTP: `/metrics`, `/livez`, `/readyz`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use prometheus::Registry;
use serde_json::json;
use tokio::net::TcpListener;

/// What must hold for this process to be ready, by name. Clones share the checks.
///
/// Liveness is not here: a process that can answer `/livez` is alive, whatever its database does.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    checks: Arc<Mutex<BTreeMap<&'static str, Result<(), String>>>>,
}

impl Readiness {
    /// Adds a check that fails until it is [`set`](Check::set).
    pub fn check(&self, name: &'static str) -> Check {
        let check = Check {
            name,
            readiness: self.clone(),
        };
        check.set(Err("has not been seen working yet".to_owned()));
        check
    }

    /// Every check with what is wrong about it.
    pub fn state(&self) -> BTreeMap<&'static str, Result<(), String>> {
        self.checks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether all checks hold.
    pub fn is_ready(&self) -> bool {
        self.checks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .all(Result::is_ok)
    }
}

/// One condition of [`Readiness`].
#[derive(Debug, Clone)]
pub struct Check {
    name: &'static str,
    readiness: Readiness,
}

impl Check {
    /// Says whether the condition holds, or why not. The reason is shown to whoever reads `/readyz`: no secrets.
    pub fn set(&self, state: Result<(), String>) {
        self.readiness
            .checks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(self.name, state);
    }

    /// Whether the condition was said to hold last.
    pub fn holds(&self) -> bool {
        let checks = self
            .readiness
            .checks
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        checks.get(self.name).is_some_and(Result::is_ok)
    }
}

/// The admin server, listening but not serving yet.
#[derive(Debug)]
pub struct AdminServer {
    listener: TcpListener,
    address: SocketAddr,
    router: Router,
}

impl AdminServer {
    /// Listens; port 0 takes a free one.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn bind(
        address: SocketAddr,
        registry: Registry,
        readiness: Readiness,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let router = Router::new()
            .route("/metrics", get(metrics).with_state(registry))
            .route("/livez", get(async || "alive\n"))
            .route("/readyz", get(ready).with_state(readiness));
        Ok(Self {
            listener,
            address,
            router,
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Adds routes of the process's own.
    #[must_use]
    pub fn merge(mut self, router: Router) -> Self {
        self.router = self.router.merge(router);
        self
    }

    /// Serves until it is dropped.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(self) -> std::io::Result<()> {
        axum::serve(self.listener, self.router).await
    }
}

async fn metrics(State(registry): State<Registry>) -> Response {
    match prometheus::TextEncoder::new().encode_to_string(&registry.gather()) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn ready(State(readiness): State<Readiness>) -> Response {
    let state = readiness.state();
    let ready = state.values().all(Result::is_ok);
    let checks: BTreeMap<&str, &str> = state
        .iter()
        .map(|(name, state)| (*name, state.as_ref().map_or_else(String::as_str, |()| "ok")))
        .collect();
    let code = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (code, Json(json!({ "ready": ready, "checks": checks }))).into_response()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn fetch(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("listening");
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("read");
        answer
    }

    #[tokio::test]
    async fn probes_and_metrics() {
        let readiness = Readiness::default();
        let (database, relay) = (readiness.check("database"), readiness.check("progress"));
        let registry = crate::metrics::registry("x", "1").expect("fresh");
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = AdminServer::bind(any_port, registry, readiness.clone())
            .await
            .expect("free port");
        let address = server.local_addr();
        let task = tokio::spawn(server.serve());

        assert!(fetch(address, "/livez").await.starts_with("HTTP/1.1 200"));
        database.set(Ok(()));
        let answer = fetch(address, "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(
            answer.contains(r#""progress":"has not been seen working yet""#),
            "{answer}"
        );
        relay.set(Ok(()));
        assert!(readiness.is_ready());
        assert!(fetch(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(fetch(address, "/metrics").await.contains("build_info"));
        task.abort();
    }
}
