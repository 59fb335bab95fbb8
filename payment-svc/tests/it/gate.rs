//! A proxy between payment-svc and its provider that holds a call until the test lets it go: before the provider gets it, or after
//! the provider has answered.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// What payment-svc asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Create,
    Ask,
    Confirm,
    Cancel,
    Refund,
    AskRefunds,
    Other,
}

impl Call {
    fn of(head: &str) -> Self {
        let mut words = head.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let path = target.split('?').next().unwrap_or_default();
        match (method, path) {
            ("POST", "/v1/payment_intents") => Self::Create,
            ("POST", path) if path.ends_with("/confirm") => Self::Confirm,
            ("POST", path) if path.ends_with("/cancel") => Self::Cancel,
            ("GET", path) if path.starts_with("/v1/payment_intents/") => Self::Ask,
            ("POST", "/v1/refunds") => Self::Refund,
            ("GET", "/v1/refunds") => Self::AskRefunds,
            _ => Self::Other,
        }
    }
}

/// Where a call is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum At {
    BeforeProvider,
    AfterProvider,
}

#[derive(Debug)]
struct Hold {
    call: Call,
    at: At,
    arrived: Arc<Notify>,
    released: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Shared {
    holds: Mutex<Vec<Hold>>,
    calls: Mutex<Vec<Call>>,
}

/// The proxy; it ends when dropped.
#[derive(Debug)]
pub(crate) struct Gate {
    pub(crate) url: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

/// A call that will be held, or is.
#[derive(Debug)]
pub(crate) struct Held {
    arrived: Arc<Notify>,
    released: Arc<Notify>,
}

impl Held {
    /// Waits until the call is there.
    pub(crate) async fn arrived(&self) {
        tokio::time::timeout(crate::common::LIMIT, self.arrived.notified())
            .await
            .expect("the call came");
    }

    /// Lets it go.
    pub(crate) fn release(&self) {
        self.released.notify_one();
    }
}

impl Gate {
    pub(crate) async fn before(provider: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let shared = Arc::new(Shared::default());
        let provider = provider.trim_start_matches("http://").to_owned();
        let task = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    let (shared, provider) = (Arc::clone(&shared), provider.clone());
                    // What goes wrong is what the client then sees.
                    tokio::spawn(async move { pass(client, &provider, &shared).await });
                }
            }
        });
        Self { url, shared, task }
    }

    /// Holds the next such call.
    pub(crate) fn hold(&self, call: Call, at: At) -> Held {
        let (arrived, released) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let held = Held {
            arrived: Arc::clone(&arrived),
            released: Arc::clone(&released),
        };
        let hold = Hold {
            call,
            at,
            arrived,
            released,
        };
        self.shared.holds.lock().expect("unpoisoned").push(hold);
        held
    }

    /// How often something was asked for.
    pub(crate) fn count(&self, call: Call) -> usize {
        let calls = self.shared.calls.lock().expect("unpoisoned");
        calls.iter().filter(|other| **other == call).count()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    async fn come(&self, call: Call, at: At) {
        let hold = {
            let mut holds = self.holds.lock().expect("unpoisoned");
            let position = holds.iter().position(|hold| (hold.call, hold.at) == (call, at));
            position.map(|position| holds.remove(position))
        };
        if let Some(hold) = hold {
            hold.arrived.notify_one();
            hold.released.notified().await;
        }
    }
}

/// One request and its answer on a connection; then it is closed.
async fn pass(mut client: TcpStream, provider: &str, shared: &Shared) -> std::io::Result<()> {
    let mut request = Vec::new();
    let head_end = loop {
        if client.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
        if let Some(end) = request.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let head = String::from_utf8_lossy(&request[..head_end]).into_owned();
    let length: usize = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0);
    while request.len() < head_end + length {
        if client.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let call = Call::of(&head);
    shared.calls.lock().expect("unpoisoned").push(call);
    shared.come(call, At::BeforeProvider).await;
    let mut upstream = TcpStream::connect(provider).await?;
    let line_end = head.find("\r\n").unwrap_or(0) + 2;
    let asked = [
        &request[..line_end],
        b"connection: close\r\n",
        &request[line_end..],
    ]
    .concat();
    upstream.write_all(&asked).await?;
    let mut answer = Vec::new();
    upstream.read_to_end(&mut answer).await?;
    shared.come(call, At::AfterProvider).await;
    client.write_all(&answer).await?;
    client.shutdown().await
}
