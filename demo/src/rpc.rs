//! Calls with a deadline, repeated under the same request_id while the answer is not known.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use contracts::shop::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use contracts::shop::inventory::v1::inventory_service_client::InventoryServiceClient;
use contracts::shop::order::v1::order_service_client::OrderServiceClient;
use contracts::shop::orderquery::v1::order_query_service_client::OrderQueryServiceClient;
use contracts::shop::payment::v1::payment_service_client::PaymentServiceClient;
use contracts::shop::user::v1::user_service_client::UserServiceClient;
use local_stack::shop::{
    ANALYTICS_SVC, Addresses, INVENTORY_SVC, ORDER_QUERY_SVC, ORDER_SVC, PAYMENT_SVC, USER_SVC,
};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

/// Of one try.
const DEADLINE: Duration = Duration::from_secs(5);
/// Of all tries together.
const GIVE_UP_AFTER: Duration = Duration::from_secs(120);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Clients of all instances of all services, taken in turn: a call that is tried again goes to another instance.
#[derive(Debug, Clone)]
pub(crate) struct Clients {
    orders: Vec<OrderServiceClient<Channel>>,
    payments: Vec<PaymentServiceClient<Channel>>,
    inventory: Vec<InventoryServiceClient<Channel>>,
    views: Vec<OrderQueryServiceClient<Channel>>,
    users: Vec<UserServiceClient<Channel>>,
    analytics: Vec<AnalyticsServiceClient<Channel>>,
    turn: Arc<AtomicUsize>,
}

impl Clients {
    pub(crate) fn connect(addresses: &Addresses) -> Result<Self> {
        Ok(Self {
            orders: channels(addresses, ORDER_SVC)?
                .into_iter()
                .map(OrderServiceClient::new)
                .collect(),
            payments: channels(addresses, PAYMENT_SVC)?
                .into_iter()
                .map(PaymentServiceClient::new)
                .collect(),
            inventory: channels(addresses, INVENTORY_SVC)?
                .into_iter()
                .map(InventoryServiceClient::new)
                .collect(),
            views: channels(addresses, ORDER_QUERY_SVC)?
                .into_iter()
                .map(OrderQueryServiceClient::new)
                .collect(),
            users: channels(addresses, USER_SVC)?
                .into_iter()
                .map(UserServiceClient::new)
                .collect(),
            analytics: channels(addresses, ANALYTICS_SVC)?
                .into_iter()
                .map(AnalyticsServiceClient::new)
                .collect(),
            turn: Arc::default(),
        })
    }

    pub(crate) fn orders(&self) -> OrderServiceClient<Channel> {
        self.next(&self.orders)
    }

    pub(crate) fn payments(&self) -> PaymentServiceClient<Channel> {
        self.next(&self.payments)
    }

    pub(crate) fn inventory(&self) -> InventoryServiceClient<Channel> {
        self.next(&self.inventory)
    }

    pub(crate) fn views(&self) -> OrderQueryServiceClient<Channel> {
        self.next(&self.views)
    }

    pub(crate) fn users(&self) -> UserServiceClient<Channel> {
        self.next(&self.users)
    }

    /// Each instance.
    pub(crate) fn analytics(&self) -> &[AnalyticsServiceClient<Channel>] {
        &self.analytics
    }

    fn next<C: Clone>(&self, instances: &[C]) -> C {
        instances[self.turn.fetch_add(1, Ordering::Relaxed) % instances.len()].clone()
    }
}

fn channels(addresses: &Addresses, service: &str) -> Result<Vec<Channel>> {
    let urls = addresses.service(service)?;
    anyhow::ensure!(!urls.is_empty(), "{service} has no instance");
    urls.iter().map(|url| channel(url)).collect()
}

pub(crate) fn channel(url: &str) -> Result<Channel> {
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
