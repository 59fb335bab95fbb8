//! `demo run`: load, wait, read everything, reconcile.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use contracts::shop::analytics::v1::GetSalesSummaryRequest;
use contracts::shop::inventory::v1::Stock;
use contracts::shop::order::v1::Order;
use contracts::shop::orderquery::v1::{
    GetOrderJourneyRequest, GetOrderJourneyResponse, GetOrderViewRequest, ListOrdersRequest, OrderView,
};
use contracts::shop::payment::v1::Payment;
use contracts::shop::user::v1::User;
use contracts::wire::time;
use local_stack::measure::{Message, Report, Writer};
use local_stack::shop::{Addresses, events, topics};
use local_stack::smtp;
use tokio::task::JoinSet;

use crate::databases::Databases;
use crate::ledger::Ledger;
use crate::load::{self, Told, ToldOrder};
use crate::plan::Load;
use crate::reconcile::{Answer, Parts, SIZES, Source, reconcile, span};
use crate::rpc::{Clients, RETRIES, call};
use crate::settle::{Follow, STALLED_AFTER};
use crate::topic::Topics;
use crate::{Where, blocking, pay, users, warehouse};

const ASK_AT_ONCE: usize = 16;
/// Small, so that there are pages.
const PAGE_SIZE: i32 = 3;
const PROBLEMS_SHOWN: usize = 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    at: Where,
    /// How many orders to place
    #[arg(long)]
    orders: u32,
    /// Of the load
    #[arg(long)]
    seed: u64,
    /// Spread the load over so many seconds at least
    #[arg(long, default_value_t = 0.0)]
    load_seconds: f64,
    /// Where to say how it goes and what was found
    #[arg(long)]
    messages: PathBuf,
}

pub(crate) async fn run(options: Options) -> Result<()> {
    let addresses = Addresses::read(&options.at.addresses)?;
    let clients = Clients::connect(&addresses)?;
    let databases = Databases::connect(&addresses).await?;
    let brokers = addresses.brokers.clone();
    let topics = Arc::new(blocking(move || Topics::open(&brokers, &topics())).await?);
    let placed = Arc::new(AtomicU64::new(0));
    let follow = Follow {
        messages: Writer::create(&options.messages)?,
        databases: &databases,
        topics: topics.clone(),
        orders: options.orders.into(),
        placed: placed.clone(),
    };

    let load = Load::generate(options.orders, options.seed);
    let spread = Duration::try_from_secs_f64(options.load_seconds)?;
    let started = Instant::now();
    let sending = load::send(&clients, load, spread, placed);
    let told = tokio::select! {
        told = sending => told?,
        stopped = follow.until_stalled("placing and paying") => {
            stopped?;
            bail!("nothing has happened for {STALLED_AFTER:?} while orders were to be placed");
        }
    };
    let load_seconds = started.elapsed().as_secs_f64();
    follow.until_settled("waiting for the end of everything").await?;

    let said = format!(
        "{} orders in {load_seconds:.1} s, {} requests sent twice, {} refused as they must be, {} retries, \
         settled {:.1} s later",
        told.orders.len(),
        told.repeats,
        told.refused,
        RETRIES.load(Ordering::Relaxed),
        started.elapsed().as_secs_f64() - load_seconds,
    );
    let (parts, problems) = read_everything(&addresses, &clients, &databases, topics, told).await?;
    let (figures, mut problems) = reconcile(&parts, problems);
    if problems.len() > PROBLEMS_SHOWN {
        let more = problems.len() - PROBLEMS_SHOWN;
        problems.truncate(PROBLEMS_SHOWN);
        problems.push(format!("and {more} more"));
    }
    follow.messages.send(&Message::Report(Box::new(Report {
        figures,
        problems,
        load: said,
    })))
}

async fn read_everything(
    addresses: &Addresses,
    clients: &Clients,
    databases: &Databases,
    topics: Arc<Topics>,
    told: Told,
) -> Result<(Parts, Vec<String>)> {
    let users: BTreeSet<String> = told
        .orders
        .iter()
        .map(|order| order.placed.user_id.clone())
        .collect();
    let orders = databases.orders(None).await?;
    let versions: BTreeMap<&str, i64> = orders
        .iter()
        .map(|order| (order.order_id.as_str(), order.version))
        .collect();
    let (views, mut problems) = ask_for_views(clients, &told.orders, &versions).await?;
    let (journeys, journey_problems) = ask_for_journeys(clients, &told.orders).await?;
    let (lists, list_problems) = ask_for_lists(clients, users).await?;
    let (answers, payment_problems) = ask_for_payments(clients, &told.orders).await?;
    let (stock_answers, stock_problems) = ask_for_stock(clients, told.stocked.keys()).await?;
    let (user_answers, user_problems) = ask_for_users(clients, &told.users).await?;
    let (summaries, summary_problems) = ask_for_summaries(clients, &orders).await?;
    problems.extend(told.problems);
    problems.extend(user_problems);
    problems.extend(summary_problems);
    problems.extend(stock_problems);
    problems.extend(journey_problems);
    problems.extend(list_problems);
    problems.extend(payment_problems);
    problems.extend(databases.parked().await?);
    let records = blocking(move || topics.read()).await?;
    let mut sources = Vec::new();
    for ((database, kind), records) in events().into_iter().zip(records) {
        sources.push(Source {
            topic: kind.topic,
            events: databases.events(database, kind, None).await?,
            outbox: databases.outbox(database, kind.entity_type, None).await?,
            records,
        });
    }
    let parts = Parts {
        told: told.orders,
        orders,
        payments: databases.payments(None).await?,
        stocked: told.stocked,
        stock: databases.stock().await?,
        stock_answers,
        reservations: databases.reservations().await?,
        users: told.users,
        user_rows: databases.users().await?,
        user_answers,
        mails: databases.mails().await?,
        received: smtp::received(&addresses.mails)?,
        windows: databases.windows().await?,
        summaries,
        open: databases.open().await?,
        sources,
        ledger: Ledger::read(&addresses.sandbox).await?,
        answers,
        views,
        journeys: journeys.into_iter().collect(),
        lists,
        view_marks: databases.marks("order_query").await?,
    };
    Ok((parts, problems))
}

/// GetOrderView of every order, at the version that it has reached.
async fn ask_for_views(
    clients: &Clients,
    orders: &[ToldOrder],
    versions: &BTreeMap<&str, i64>,
) -> Result<(Vec<OrderView>, Vec<String>)> {
    let requests = orders.iter().map(|told| GetOrderViewRequest {
        user_id: told.placed.user_id.clone(),
        order_id: told.placed.order_id.clone(),
        at_least_version: versions
            .get(told.placed.order_id.as_str())
            .copied()
            .unwrap_or(told.placed.version),
    });
    let (answers, problems) = ask_for_all(requests, |request| {
        let clients = clients.clone();
        async move {
            call(request, |request| {
                let mut client = clients.views();
                async move { client.get_order_view(request).await }
            })
            .await
            .map_err(|status| format!("GetOrderView answered {status:?}"))
        }
    })
    .await?;
    let views = answers.into_iter().map(|answer| answer.order);
    let views = views.collect::<Option<_>>();
    Ok((views.context("GetOrderView answered without an order")?, problems))
}

/// GetOrderJourney of every order: all of it is in the read model by now.
async fn ask_for_journeys(
    clients: &Clients,
    orders: &[ToldOrder],
) -> Result<(Vec<(String, GetOrderJourneyResponse)>, Vec<String>)> {
    let requests = orders.iter().map(|told| GetOrderJourneyRequest {
        user_id: told.placed.user_id.clone(),
        order_id: told.placed.order_id.clone(),
        at_least_version: told.placed.version,
    });
    ask_for_all(requests, |request| {
        let clients = clients.clone();
        async move {
            let order_id = request.order_id.clone();
            let answer = call(request, |request| {
                let mut client = clients.views();
                async move { client.get_order_journey(request).await }
            });
            let answer = answer.await;
            answer
                .map(|journey| (order_id, journey))
                .map_err(|status| format!("GetOrderJourney answered {status:?}"))
        }
    })
    .await
}

/// GetPayment of every payment that clients were told of.
async fn ask_for_payments(clients: &Clients, orders: &[ToldOrder]) -> Result<(Vec<Payment>, Vec<String>)> {
    let told = orders.iter().flat_map(|order| &order.tries);
    let payments = told.filter_map(|tried| tried.payment.clone());
    ask_for_all(payments, |payment| {
        let clients = clients.clone();
        async move {
            pay::get(&clients, &payment.user_id, &payment.payment_id)
                .await
                .map_err(|status| format!("GetPayment of {} answered {status:?}", payment.payment_id))
        }
    })
    .await
}

/// GetStock of every product.
async fn ask_for_stock(
    clients: &Clients,
    products: impl Iterator<Item = &String>,
) -> Result<(Vec<Stock>, Vec<String>)> {
    ask_for_all(products.cloned(), |product| {
        let clients = clients.clone();
        async move {
            let answer = warehouse::get(&clients, &product).await;
            answer.map_err(|status| format!("GetStock of {product} answered {status:?}"))
        }
    })
    .await
}

/// GetUser of every user.
async fn ask_for_users(clients: &Clients, users: &[users::ToldUser]) -> Result<(Vec<User>, Vec<String>)> {
    let ids = users.iter().map(|told| told.user.user_id.clone());
    ask_for_all(ids, |user_id| {
        let clients = clients.clone();
        async move {
            let answer = users::get(&clients, &user_id).await;
            answer.map_err(|status| format!("GetUser of {user_id} answered {status:?}"))
        }
    })
    .await
}

/// GetSalesSummary of all orders, by windows of every size, from every instance.
async fn ask_for_summaries(clients: &Clients, orders: &[Order]) -> Result<(Vec<Answer>, Vec<String>)> {
    let mut questions = Vec::new();
    for (size, seconds) in SIZES {
        let times = orders.iter().filter_map(|order| time(order.created_at.as_ref()));
        let Some([start, end]) = span(times, seconds) else {
            continue;
        };
        let request = GetSalesSummaryRequest {
            window_size: size.into(),
            start: Some(start),
            end: Some(end),
            currency_code: String::new(),
        };
        let instances = clients.analytics().iter().cloned().enumerate();
        questions.extend(instances.map(|(instance, client)| (instance, client, size, request.clone())));
    }
    ask_for_all(
        questions.into_iter(),
        |(instance, client, size, request)| async move {
            let answer = call(request, |request| {
                let mut client = client.clone();
                async move { client.get_sales_summary(request).await }
            });
            match answer.await {
                Ok(answer) => Ok(Answer {
                    instance,
                    size,
                    windows: answer.windows,
                }),
                Err(status) => Err(format!("GetSalesSummary answered {status:?}")),
            }
        },
    )
    .await
}

/// The answers to all questions, some at once, and what went wrong.
async fn ask_for_all<Q, A, Fut>(
    questions: impl Iterator<Item = Q>,
    ask: impl Fn(Q) -> Fut,
) -> Result<(Vec<A>, Vec<String>)>
where
    A: Send + 'static,
    Fut: Future<Output = Result<A, String>> + Send + 'static,
{
    let (mut answers, mut problems) = (Vec::new(), Vec::new());
    let mut tasks = JoinSet::new();
    let mut questions = questions.fuse();
    loop {
        while tasks.len() < ASK_AT_ONCE
            && let Some(question) = questions.next()
        {
            tasks.spawn(ask(question));
        }
        match tasks.join_next().await {
            Some(answer) => match answer? {
                Ok(answer) => answers.push(answer),
                Err(problem) => problems.push(problem),
            },
            None => return Ok((answers, problems)),
        }
    }
}

type Lists = BTreeMap<String, Vec<OrderView>>;

/// ListOrders of every user, page by page, each page from another instance.
async fn ask_for_lists(clients: &Clients, users: BTreeSet<String>) -> Result<(Lists, Vec<String>)> {
    let (mut lists, mut problems) = (Lists::new(), Vec::new());
    for user_id in users {
        let list = lists.entry(user_id.clone()).or_default();
        let mut page_token = String::new();
        loop {
            let request = ListOrdersRequest {
                user_id: user_id.clone(),
                status: 0,
                page_size: PAGE_SIZE,
                page_token,
            };
            let answer = call(request, |request| {
                let mut client = clients.views();
                async move { client.list_orders(request).await }
            });
            match answer.await {
                Ok(page) => {
                    list.extend(page.orders);
                    page_token = page.next_page_token;
                }
                Err(status) => {
                    problems.push(format!("ListOrders answered {status:?}"));
                    break;
                }
            }
            if page_token.is_empty() {
                break;
            }
        }
    }
    Ok((lists, problems))
}
