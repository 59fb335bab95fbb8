//! Sends the load and remembers what clients were told.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use contracts::shop::order::v1::{
    self as v1, CancelOrderRequest, CancelOrderResponse, GetOrderRequest, OrderStatus, PlaceOrderRequest,
    PlaceOrderResponse,
};
use contracts::shop::payment::v1::Payment;
use contracts::shop::user::v1::User;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::pay::{self, Payer};
use crate::plan::{Cancel, Load, Order, Outcome, Pay, Probe, Repeat, When};
use crate::rpc::{Clients, call};
use crate::users::{self, ToldUser};
use crate::warehouse;

/// Most of them wait for something: for the provider, for an event to arrive.
const CONCURRENT: usize = 48;

/// What clients were told in the end.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) orders: Vec<ToldOrder>,
    pub(crate) users: Vec<ToldUser>,
    /// Users who have another address, as they are now.
    pub(crate) moved: Vec<User>,
    /// By product, how many pieces the warehouse has put there and taken away.
    pub(crate) stocked: BTreeMap<String, i64>,
    /// What was answered otherwise than it should have been.
    pub(crate) problems: Vec<String>,
    pub(crate) repeats: u64,
    pub(crate) refused: u64,
}

/// What a client was told of one order.
#[derive(Debug, Clone, Default)]
pub(crate) struct ToldOrder {
    /// As it was placed.
    pub(crate) placed: v1::Order,
    /// As it was cancelled by its user.
    pub(crate) cancelled: Option<v1::Order>,
    /// As it was shipped.
    pub(crate) shipped: Option<v1::Order>,
    /// As it was delivered.
    pub(crate) delivered: Option<v1::Order>,
    pub(crate) tries: Vec<ToldTry>,
    /// What the bank says to the payment method that came with it.
    pub(crate) with_order: Option<Outcome>,
}

/// What a client was told of one try to pay.
#[derive(Debug, Clone)]
pub(crate) struct ToldTry {
    /// What the card's bank says.
    pub(crate) outcome: Outcome,
    /// The last answer about its payment; none if there was to be no payment.
    pub(crate) payment: Option<Payment>,
}

/// Sends everything, at least over `spread`, counting in `placed` as orders are placed.
pub(crate) async fn send(
    clients: &Clients,
    mut load: Load,
    spread: Duration,
    placed: Arc<AtomicU64>,
) -> Result<Told> {
    let permits = Arc::new(Semaphore::new(CONCURRENT));
    let mut all = warehouse::fill(clients, &load.stock).await?;
    let (signed_up, ids) = users::sign_up(clients, &load.users).await?;
    all.merge(signed_up);
    load.call_users(&ids);
    let mut moves = load.users.into_iter().filter_map(|user| user.relocate);
    let mut adjustments = load.stock.into_iter().filter_map(|shelf| shelf.adjust);
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
                    &[Code::InvalidArgument],
                    place(&clients, request).await,
                ))
            });
        }
        if turn % 2 == 0
            && let Some((request, repeat)) = adjustments.next()
        {
            let permit = permits.clone().acquire_owned().await?;
            let clients = clients.clone();
            tasks.spawn(async move {
                let _permit = permit;
                warehouse::adjust(&clients, request, repeat).await
            });
        }
        if turn % 5 == 2
            && let Some((request, repeat)) = moves.next()
        {
            let permit = permits.clone().acquire_owned().await?;
            let clients = clients.clone();
            tasks.spawn(async move {
                let _permit = permit;
                users::relocate(&clients, request, repeat).await
            });
        }
        let permit = permits.clone().acquire_owned().await?;
        let (clients, placed) = (clients.clone(), placed.clone());
        tasks.spawn(async move {
            let _permit = permit;
            one_order(&clients, order, &placed).await
        });
    }
    while let Some(told) = tasks.join_next().await {
        all.merge(told??);
    }
    all.settle_moves();
    Ok(all)
}

impl Told {
    /// Users who have moved are as they were told of last.
    fn settle_moves(&mut self) {
        for moved in std::mem::take(&mut self.moved) {
            let known = self
                .users
                .iter_mut()
                .find(|known| known.user.user_id == moved.user_id);
            if let Some(known) = known {
                known.emails.push(moved.email.clone());
                known.user = moved;
            }
        }
    }

    pub(crate) fn merge(&mut self, other: Self) {
        self.orders.extend(other.orders);
        self.users.extend(other.users);
        self.moved.extend(other.moved);
        for (product, pieces) in other.stocked {
            *self.stocked.entry(product).or_default() += pieces;
        }
        self.problems.extend(other.problems);
        self.repeats += other.repeats;
        self.refused += other.refused;
    }
}

async fn place(clients: &Clients, request: PlaceOrderRequest) -> Result<PlaceOrderResponse, Status> {
    call(request, |request| {
        let mut client = clients.orders();
        async move { client.place_order(request).await }
    })
    .await
}

async fn cancel(clients: &Clients, request: CancelOrderRequest) -> Result<CancelOrderResponse, Status> {
    call(request, |request| {
        let mut client = clients.orders();
        async move { client.cancel_order(request).await }
    })
    .await
}

pub(crate) async fn get(clients: &Clients, user_id: &str, order_id: &str) -> Result<v1::Order, Status> {
    let request = GetOrderRequest {
        user_id: user_id.to_owned(),
        order_id: order_id.to_owned(),
    };
    let answer = call(request, |request| {
        let mut client = clients.orders();
        async move { client.get_order(request).await }
    });
    Ok(answer.await?.order.unwrap_or_default())
}

async fn one_order(clients: &Clients, plan: Order, placed: &AtomicU64) -> Result<Told> {
    let mut told = Told::default();
    let mut about = ToldOrder::default();
    let mut request = plan.place.clone();
    if let Pay::WithOrder(first, _) = &plan.pay {
        request.payment_method_id = pay::create_method(clients, first, &request.user_id, &mut told).await?;
        about.with_order = Some(first.outcome);
    }
    let placing = twice(plan.repeat, &mut told, PartialEq::eq, || {
        place(clients, request.clone())
    });
    let response = placing
        .await
        .with_context(|| format!("placing an order failed: {request:?}"))?;
    placed.fetch_add(1, Ordering::Relaxed);
    let order = response.order.context("PlaceOrder answered without an order")?;
    told.problems.extend(differences_to_request(&request, &order));

    if let Some(probe) = plan.probe {
        told.merge(try_probe(clients, probe, &request, &order).await);
    }
    let cancel_at = |when| {
        let (at, cancel) = plan.cancel.as_ref()?;
        (*at == when).then_some(cancel)
    };
    if let Some(cancel) = cancel_at(When::Before) {
        about.cancelled = cancel_order(clients, cancel, &order, &mut told).await?;
    }
    let mut payer = Payer::new(clients, &order);
    if let Some(cancel) = cancel_at(When::AtOnce) {
        let mut told_meanwhile = Told::default();
        let (paid, cancelled) = tokio::join!(
            payer.pay(&plan, &mut told),
            cancel_order(clients, cancel, &order, &mut told_meanwhile)
        );
        paid?;
        about.cancelled = cancelled?;
        told.merge(told_meanwhile);
    } else {
        payer.pay(&plan, &mut told).await?;
    }
    if let Some(cancel) = cancel_at(When::After) {
        about.cancelled = cancel_order(clients, cancel, &order, &mut told).await?;
    }
    if let Some(refund) = &plan.refund {
        payer.refund(refund, &mut told).await?;
    }
    about.tries = payer.tries;
    if let Some(ship) = plan.ship.as_ref().filter(|_| !matches!(plan.pay, Pay::Never)) {
        warehouse::send_off(clients, ship, &order, &mut about, &mut told).await?;
    }
    about.placed = order;
    told.orders.push(about);
    Ok(told)
}

/// Cancels the order whatever has happened to it meanwhile. `None` when it had been cancelled already.
async fn cancel_order(
    clients: &Clients,
    plan: &Cancel,
    order: &v1::Order,
    told: &mut Told,
) -> Result<Option<v1::Order>> {
    let mut request = CancelOrderRequest {
        request_id: plan.request_id.clone(),
        user_id: order.user_id.clone(),
        order_id: order.order_id.clone(),
        reason: plan.reason.clone(),
        expected_version: if plan.expects_version { order.version } else { 0 },
    };
    loop {
        let cancelling = twice(plan.repeat, told, PartialEq::eq, || {
            cancel(clients, request.clone())
        });
        let refusal = match cancelling.await {
            Ok(response) => {
                let cancelled = response.order.context("CancelOrder answered without an order")?;
                if cancelled.status() != OrderStatus::Cancelled || cancelled.cancel_reason != plan.reason {
                    told.problems.push(format!("CancelOrder answered {cancelled:?}"));
                }
                return Ok(Some(cancelled));
            }
            Err(refusal) => refusal,
        };
        let now = get(clients, &order.user_id, &order.order_id).await?;
        match refusal.code() {
            // Paid or overdue meanwhile: a user who still wants to looks again, and asks again.
            Code::Aborted if plan.expects_version && now.version > request.expected_version => {
                request.expected_version = now.version;
                request.request_id = Uuid::new_v4().to_string();
            }
            Code::FailedPrecondition if now.status() == OrderStatus::Cancelled => return Ok(None),
            _ => {
                told.problems.push(format!(
                    "CancelOrder answered {refusal:?}, and the order is {now:?}"
                ));
                return Ok(None);
            }
        }
    }
}

/// Sends a request as often as it is to be sent; all answers must be the same.
pub(crate) async fn twice<A, Fut>(
    repeat: Repeat,
    told: &mut Told,
    same: impl Fn(&A, &A) -> bool,
    send: impl Fn() -> Fut,
) -> Result<A, Status>
where
    A: std::fmt::Debug,
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
        Ok(second) if same(&first, &second) => {}
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
                &[Code::AlreadyExists],
                place(clients, other).await,
            )
        }
        Probe::ReadByAnother => {
            let answer = get(clients, &somebody_else, &order.order_id).await;
            refused("somebody else's order, read", &[Code::NotFound], answer)
        }
        Probe::CancelledByAnother => {
            let answer = cancel(clients, cancelling(&somebody_else)).await;
            refused("somebody else's order, cancelled", &[Code::NotFound], answer)
        }
        Probe::WrongVersion => {
            let request = CancelOrderRequest {
                expected_version: order.version + 1_000,
                ..cancelling(&order.user_id)
            };
            refused(
                "a version that is not",
                &[Code::Aborted],
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
                &[Code::InvalidArgument],
                cancel(clients, request).await,
            )
        }
        Probe::PaidByAnother
        | Probe::WrongAmount
        | Probe::WrongCurrency
        | Probe::UnknownMethod
        | Probe::MistypedCard => pay::try_probe(clients, probe, order).await,
    }
}

/// An answer that has to be a refusal, by one of these codes.
pub(crate) fn refused<A: std::fmt::Debug>(what: &str, codes: &[Code], answer: Result<A, Status>) -> Told {
    let mut told = Told {
        refused: 1,
        ..Told::default()
    };
    match answer {
        Err(status) if codes.contains(&status.code()) => {}
        other => told
            .problems
            .push(format!("{what}: expected {codes:?}, got {other:?}")),
    }
    told
}
