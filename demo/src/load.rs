//! Sends the load and remembers what clients were told.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use contracts::shop::order::v1::{
    self as v1, CancelOrderRequest, CancelOrderResponse, GetOrderRequest, OrderStatus, PlaceOrderRequest,
    PlaceOrderResponse,
};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::plan::{Cancel, Load, Order, Probe, Repeat};
use crate::rpc::{Clients, call};

const CONCURRENT: usize = 24;

/// What clients were told in the end.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Every order that was placed, as the last answer about it had it.
    pub(crate) orders: Vec<v1::Order>,
    /// What was answered otherwise than it should have been.
    pub(crate) problems: Vec<String>,
    pub(crate) repeats: u64,
    pub(crate) refused: u64,
}

/// Sends everything, at least over `spread`, counting in `placed` as orders are placed.
pub(crate) async fn send(
    clients: &Clients,
    load: Load,
    spread: Duration,
    placed: Arc<AtomicU64>,
) -> Result<Told> {
    let permits = Arc::new(Semaphore::new(CONCURRENT));
    let pause = spread / u32::try_from(load.orders.len()).unwrap_or(u32::MAX).max(1);
    let start = tokio::time::Instant::now();
    let mut tasks: JoinSet<Result<Told>> = JoinSet::new();
    let mut invalid = load.invalid.into_iter();
    for (turn, order) in (0u32..).zip(load.orders) {
        tokio::time::sleep_until(start + pause * turn).await;
        if turn % 20 == 0
            && let Some((request, what)) = invalid.next()
        {
            let permit = permits.clone().acquire_owned().await?;
            let clients = clients.clone();
            tasks.spawn(async move {
                let _permit = permit;
                Ok(refused(
                    what,
                    Code::InvalidArgument,
                    place(&clients, request).await,
                ))
            });
        }
        let permit = permits.clone().acquire_owned().await?;
        let (clients, placed) = (clients.clone(), placed.clone());
        tasks.spawn(async move {
            let _permit = permit;
            one_order(&clients, order, &placed).await
        });
    }
    let mut all = Told::default();
    while let Some(told) = tasks.join_next().await {
        all.merge(told??);
    }
    Ok(all)
}

impl Told {
    fn merge(&mut self, other: Self) {
        self.orders.extend(other.orders);
        self.problems.extend(other.problems);
        self.repeats += other.repeats;
        self.refused += other.refused;
    }
}

async fn place(clients: &Clients, request: PlaceOrderRequest) -> Result<PlaceOrderResponse, Status> {
    let client = &clients.orders;
    call(request, |request| {
        let mut client = client.clone();
        async move { client.place_order(request).await }
    })
    .await
}

async fn cancel(clients: &Clients, request: CancelOrderRequest) -> Result<CancelOrderResponse, Status> {
    let client = &clients.orders;
    call(request, |request| {
        let mut client = client.clone();
        async move { client.cancel_order(request).await }
    })
    .await
}

async fn one_order(clients: &Clients, plan: Order, placed: &AtomicU64) -> Result<Told> {
    let mut told = Told::default();
    let request = &plan.place;
    let response = twice(plan.repeat, &mut told, || place(clients, request.clone()))
        .await
        .with_context(|| format!("placing an order failed: {request:?}"))?;
    placed.fetch_add(1, Ordering::Relaxed);
    let mut order = response.order.context("PlaceOrder answered without an order")?;
    told.problems.extend(differences_to_request(request, &order));

    if let Some(probe) = plan.probe {
        told.merge(try_probe(clients, probe, request, &order).await);
    }
    if let Some(plan) = &plan.cancel {
        order = cancel_order(clients, plan, &order, &mut told).await?;
    }
    told.orders.push(order);
    Ok(told)
}

async fn cancel_order(
    clients: &Clients,
    plan: &Cancel,
    order: &v1::Order,
    told: &mut Told,
) -> Result<v1::Order> {
    let request = CancelOrderRequest {
        request_id: plan.request_id.clone(),
        user_id: order.user_id.clone(),
        order_id: order.order_id.clone(),
        reason: plan.reason.clone(),
        expected_version: if plan.expects_version { order.version } else { 0 },
    };
    let response = twice(plan.repeat, told, || cancel(clients, request.clone()))
        .await
        .with_context(|| format!("cancelling an order failed: {request:?}"))?;
    let cancelled = response.order.context("CancelOrder answered without an order")?;
    let expected = v1::Order {
        status: OrderStatus::Cancelled.into(),
        version: order.version + 1,
        cancel_reason: plan.reason.clone(),
        updated_at: cancelled.updated_at,
        ..order.clone()
    };
    if cancelled != expected {
        told.problems.push(format!(
            "CancelOrder answered {cancelled:?} instead of {expected:?}"
        ));
    }
    Ok(cancelled)
}

/// Sends a request as often as it is to be sent; all answers must be the same.
async fn twice<A, Fut>(repeat: Repeat, told: &mut Told, send: impl Fn() -> Fut) -> Result<A, Status>
where
    A: PartialEq + std::fmt::Debug,
    Fut: Future<Output = Result<A, Status>>,
{
    let (first, second) = match repeat {
        Repeat::No => return send().await,
        Repeat::Afterwards => {
            let first = send().await?;
            (first, send().await)
        }
        Repeat::AtOnce => {
            let (first, second) = tokio::join!(send(), send());
            (first?, second)
        }
    };
    told.repeats += 1;
    match second {
        Ok(second) if second == first => {}
        other => told.problems.push(format!(
            "a repeated request ({repeat:?}) got {other:?} instead of {first:?}"
        )),
    }
    Ok(first)
}

fn differences_to_request(request: &PlaceOrderRequest, order: &v1::Order) -> Option<String> {
    let total: i64 = request
        .items
        .iter()
        .map(|item| i64::from(item.quantity) * item.unit_price_minor_units)
        .sum();
    let said = order
        .total
        .as_ref()
        .map(|total| (total.minor_units, total.currency_code.as_str()));
    let same = order.user_id == request.user_id
        && order.items == request.items
        && said == Some((total, &request.currency_code))
        && order.status() == OrderStatus::Pending
        && order.version == 1
        && order.user_email == request.user_email
        && order.payment_method_id == request.payment_method_id
        && order.pay_by.is_some()
        && order.created_at.is_some();
    (!same).then(|| format!("PlaceOrder answered {order:?} to {request:?}"))
}

async fn try_probe(clients: &Clients, probe: Probe, request: &PlaceOrderRequest, order: &v1::Order) -> Told {
    let cancelling = |user_id: &str| CancelOrderRequest {
        request_id: Uuid::new_v4().to_string(),
        user_id: user_id.to_owned(),
        order_id: order.order_id.clone(),
        reason: "probe".to_owned(),
        expected_version: 0,
    };
    let somebody_else = Uuid::new_v4().to_string();
    match probe {
        Probe::RequestIdReused => {
            let mut other = request.clone();
            other.items[0].quantity += 1;
            refused(
                "a request_id used for another order",
                Code::AlreadyExists,
                place(clients, other).await,
            )
        }
        Probe::ReadByAnother => {
            let request = GetOrderRequest {
                user_id: somebody_else,
                order_id: order.order_id.clone(),
            };
            let answer = call(request, |request| {
                let mut client = clients.orders.clone();
                async move { client.get_order(request).await }
            });
            refused("somebody else's order, read", Code::NotFound, answer.await)
        }
        Probe::CancelledByAnother => {
            let answer = cancel(clients, cancelling(&somebody_else)).await;
            refused("somebody else's order, cancelled", Code::NotFound, answer)
        }
        Probe::WrongVersion => {
            let request = CancelOrderRequest {
                expected_version: order.version + 1,
                ..cancelling(&order.user_id)
            };
            refused(
                "a version that is not",
                Code::Aborted,
                cancel(clients, request).await,
            )
        }
        Probe::NulInReason => {
            let request = CancelOrderRequest {
                reason: "a\0b".to_owned(),
                ..cancelling(&order.user_id)
            };
            refused(
                "a NUL in the reason",
                Code::InvalidArgument,
                cancel(clients, request).await,
            )
        }
    }
}

/// An answer that has to be a refusal.
fn refused<A: std::fmt::Debug>(what: &str, code: Code, answer: Result<A, Status>) -> Told {
    let mut told = Told {
        refused: 1,
        ..Told::default()
    };
    match answer {
        Err(status) if status.code() == code => {}
        other => told
            .problems
            .push(format!("{what}: expected {code:?}, got {other:?}")),
    }
    told
}
