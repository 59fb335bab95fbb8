//! Calls with a deadline, repeated under the same request_id while the answer is not known.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use contracts::shop::order::v1::order_service_client::OrderServiceClient;
use contracts::shop::orderquery::v1::order_query_service_client::OrderQueryServiceClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use crate::Addresses;

/// Of one try.
const DEADLINE: Duration = Duration::from_secs(5);
/// Of all tries together.
const GIVE_UP_AFTER: Duration = Duration::from_secs(120);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Clients of all services.
#[derive(Debug, Clone)]
pub(crate) struct Clients {
    pub(crate) orders: OrderServiceClient<Channel>,
    /// One per instance.
    pub(crate) views: Vec<OrderQueryServiceClient<Channel>>,
}

impl Clients {
    pub(crate) fn connect(addresses: &Addresses) -> Result<Self> {
        let views = addresses.order_query_svc.iter();
        Ok(Self {
            orders: OrderServiceClient::new(channel(&addresses.order_svc)?),
            views: views
                .map(|url| Ok(OrderQueryServiceClient::new(channel(url)?)))
                .collect::<Result<_>>()?,
        })
    }

    /// One instance of the read model after the other.
    pub(crate) fn view(&self, turn: usize) -> OrderQueryServiceClient<Channel> {
        self.views[turn % self.views.len()].clone()
    }
}

fn channel(url: &str) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(url.to_owned()).with_context(|| format!("{url} is no URL"))?;
    // Connects when first used, and again whenever the other side has gone.
    Ok(endpoint.connect_timeout(DEADLINE).connect_lazy())
}

/// How often a call was made again because its outcome was not known.
pub(crate) static RETRIES: AtomicU64 = AtomicU64::new(0);

/// Calls until there is an answer: a response, or a refusal.
pub(crate) async fn call<Q, A, Fut>(message: Q, mut send: impl FnMut(Request<Q>) -> Fut) -> Result<A, Status>
where
    Q: Clone,
    Fut: Future<Output = Result<Response<A>, Status>>,
{
    let give_up = Instant::now() + GIVE_UP_AFTER;
    let mut pause = FIRST_PAUSE;
    loop {
        let mut request = Request::new(message.clone());
        request.set_timeout(DEADLINE);
        let answer = match tokio::time::timeout(DEADLINE, send(request)).await {
            Ok(answer) => answer.map(Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded("no answer in time")),
        };
        match answer {
            Err(status) if is_unknown(&status) && Instant::now() < give_up => {
                RETRIES.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
            answer => return answer,
        }
    }
}

/// Whether the call may or may not have had its effect, or could not be made.
fn is_unknown(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted => true,
        // tonic reports its own timeout, and a connection lost in the middle of an answer, like this.
        Code::Cancelled | Code::Unknown => true,
        _ => false,
    }
}
