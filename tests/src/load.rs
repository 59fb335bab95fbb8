//! Clients that place and cancel orders, and remember what they were told. While they do not know, they ask again under the
//! same request_id.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use contracts::shop::order::v1::order_service_client::OrderServiceClient;
use contracts::shop::order::v1::{CancelOrderRequest, Order, OrderItem, OrderStatus, PlaceOrderRequest};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::PATIENCE;

/// Of one try.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// What clients were told in the end: every command was acknowledged.
#[derive(Debug, Default)]
pub struct Told {
    pub placed: Vec<(PlaceOrderRequest, Order)>,
    pub cancelled: Vec<(CancelOrderRequest, Order)>,
}

impl Told {
    /// Every order as the last answer about it had it.
    pub fn orders(&self) -> BTreeMap<String, Order> {
        let answers = self.placed.iter().map(|(_, order)| order);
        answers
            .chain(self.cancelled.iter().map(|(_, order)| order))
            .map(|order| (order.order_id.clone(), order.clone()))
            .collect()
    }
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    acknowledged: AtomicU64,
    unavailable: AtomicU64,
    unexpected: Mutex<Vec<Status>>,
}

/// A load under way. Dropping it ends it.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    clients: JoinSet<Result<Told>>,
}

impl Load {
    /// Starts so many clients, each of which does a command, waits for `pause`, and goes on.
    pub fn start(service: &OrderServiceClient<Channel>, clients: u64, pause: Duration, seed: u64) -> Self {
        let shared = Arc::new(Shared::default());
        let mut running = JoinSet::new();
        for number in 0..clients {
            let client = OneClient {
                service: service.clone(),
                shared: Arc::clone(&shared),
                rng: StdRng::seed_from_u64(seed.wrapping_add(number)),
                told: Told::default(),
            };
            running.spawn(client.run(pause));
        }
        Self {
            shared,
            clients: running,
        }
    }

    /// Commands acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::Relaxed)
    }

    /// Tries answered with UNAVAILABLE and when to try again.
    pub fn unavailable(&self) -> u64 {
        self.shared.unavailable.load(Ordering::Relaxed)
    }

    /// Tries that failed in any other way: the process was killed, for example.
    pub fn unexpected(&self) -> Vec<Status> {
        self.shared.lock_unexpected().clone()
    }

    /// Lets every client finish its command, however long it takes, and returns what they were told.
    pub async fn finish(mut self) -> Result<Told> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut all = Told::default();
        while let Some(told) = self.clients.join_next().await {
            let told = told??;
            all.placed.extend(told.placed);
            all.cancelled.extend(told.cancelled);
        }
        Ok(all)
    }
}

impl Shared {
    fn lock_unexpected(&self) -> std::sync::MutexGuard<'_, Vec<Status>> {
        self.unexpected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, status: Status) {
        if status.code() == Code::Unavailable && status.get_error_details().retry_info().is_some() {
            self.unavailable.fetch_add(1, Ordering::Relaxed);
        } else {
            self.lock_unexpected().push(status);
        }
    }

    /// Calls until there is an answer: a response, or a refusal.
    async fn call<Q, A, F>(&self, message: &Q, mut send: impl FnMut(Request<Q>) -> F) -> Result<A>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let give_up = Instant::now() + PATIENCE;
        loop {
            let mut request = Request::new(message.clone());
            request.set_timeout(DEADLINE);
            let status = match tokio::time::timeout(DEADLINE, send(request)).await {
                Ok(Ok(answer)) => {
                    self.acknowledged.fetch_add(1, Ordering::Relaxed);
                    return Ok(answer.into_inner());
                }
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded("no answer in time"),
            };
            // tonic reports a connection that was lost in the middle of an answer as one of the last two.
            let unknown = [
                Code::Unavailable,
                Code::DeadlineExceeded,
                Code::Cancelled,
                Code::Unknown,
            ];
            ensure!(
                unknown.contains(&status.code()) && Instant::now() < give_up,
                "a command was refused: {status:?}"
            );
            self.note(status);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

struct OneClient {
    service: OrderServiceClient<Channel>,
    shared: Arc<Shared>,
    rng: StdRng,
    told: Told,
}

impl OneClient {
    async fn run(mut self, pause: Duration) -> Result<Told> {
        while !self.shared.stop.load(Ordering::Relaxed) {
            let order = self.place().await?;
            if self.rng.random_bool(0.4) {
                self.cancel(order).await?;
            }
            tokio::time::sleep(pause).await;
        }
        Ok(self.told)
    }

    async fn place(&mut self) -> Result<Order> {
        let request = place_request(&mut self.rng);
        let send = |message| {
            let mut service = self.service.clone();
            async move { service.place_order(message).await }
        };
        let order = if self.rng.random_bool(0.2) {
            // The same one twice at once.
            let (one, two) =
                tokio::try_join!(self.shared.call(&request, send), self.shared.call(&request, send))?;
            ensure!(one == two, "a repeat was told otherwise: {one:?} {two:?}");
            one.order
        } else {
            self.shared.call(&request, send).await?.order
        };
        let order = order.context("PlaceOrder answered without an order")?;
        self.told.placed.push((request, order.clone()));
        Ok(order)
    }

    async fn cancel(&mut self, order: Order) -> Result<()> {
        let request = CancelOrderRequest {
            request_id: Uuid::new_v4().to_string(),
            user_id: order.user_id,
            order_id: order.order_id,
            reason: format!("reason {}", self.rng.random_range(0..1000)),
            expected_version: if self.rng.random_bool(0.5) {
                order.version
            } else {
                0
            },
        };
        let send = |message| {
            let mut service = self.service.clone();
            async move { service.cancel_order(message).await }
        };
        let answer = self.shared.call(&request, send).await?;
        let cancelled = answer.order.context("CancelOrder answered without an order")?;
        ensure!(
            cancelled.status() == OrderStatus::Cancelled && cancelled.version == order.version + 1,
            "CancelOrder answered {cancelled:?}"
        );
        self.told.cancelled.push((request, cancelled));
        Ok(())
    }
}

/// A valid order of a new user. Ids are not taken from the seed: a seed may be used twice on one database.
pub fn place_request(rng: &mut StdRng) -> PlaceOrderRequest {
    let items = (0..rng.random_range(1..=5)).map(|_| OrderItem {
        product_id: Uuid::new_v4().to_string(),
        quantity: rng.random_range(1..=20),
        unit_price_minor_units: rng.random_range(1..=100_000),
    });
    PlaceOrderRequest {
        request_id: Uuid::new_v4().to_string(),
        user_id: Uuid::new_v4().to_string(),
        items: items.collect(),
        currency_code: ["EUR", "USD", "JPY"][rng.random_range(0..3)].to_owned(),
        user_email: String::new(),
        payment_method_id: Uuid::new_v4().to_string(),
    }
}
