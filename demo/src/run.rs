//! `demo run`: load, wait, read everything, reconcile.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use contracts::shop::order::v1;
use contracts::shop::orderquery::v1::{GetOrderViewRequest, ListOrdersRequest, OrderView};
use tokio::task::JoinSet;

use crate::Addresses;
use crate::databases::Databases;
use crate::load::{self, Told};
use crate::messages::{Message, Messages, Progress, Report};
use crate::plan::Load;
use crate::reconcile::{Parts, reconcile};
use crate::rpc::{Clients, RETRIES, call};
use crate::topic::Topic;

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Nothing has arrived for so long: nothing will.
const STALLED_AFTER: Duration = Duration::from_secs(90);
const ASK_AT_ONCE: usize = 16;
/// Small, so that there are pages.
const PAGE_SIZE: i32 = 3;
const PROBLEMS_SHOWN: usize = 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    addresses: Addresses,
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
    let addresses = &options.addresses;
    let clients = Clients::connect(addresses)?;
    let databases = Databases::connect(&addresses.orders_database, &addresses.order_query_database).await?;
    let (brokers, name) = (addresses.brokers.clone(), addresses.topic.clone());
    let topic = Arc::new(blocking(move || Topic::open(&brokers, &name)).await?);
    let placed = Arc::new(AtomicU64::new(0));
    let progress = Follow {
        messages: Messages::create(&options.messages)?,
        databases: &databases,
        topic: topic.clone(),
        orders: options.orders.into(),
        placed: placed.clone(),
    };

    let load = Load::generate(options.orders, options.seed);
    let spread = Duration::try_from_secs_f64(options.load_seconds)?;
    let started = Instant::now();
    let sending = load::send(&clients, load, spread, placed);
    let told = tokio::select! {
        told = sending => told?,
        stopped = progress.until("placing orders", |_| false) => {
            stopped?;
            bail!("nothing has happened for {STALLED_AFTER:?} while orders were to be placed");
        }
    };
    let load_seconds = started.elapsed().as_secs_f64();
    progress
        .until("waiting for the read model", Seen::is_complete)
        .await?;

    let said = format!(
        "{} orders in {load_seconds:.1} s, {} requests sent twice, {} invalid ones refused, {} retries",
        told.orders.len(),
        told.repeats,
        told.refused,
        RETRIES.load(Ordering::Relaxed)
    );
    let (parts, problems) = read_everything(&clients, &databases, topic, told).await?;
    let (figures, mut problems) = reconcile(&parts, problems);
    if problems.len() > PROBLEMS_SHOWN {
        let more = problems.len() - PROBLEMS_SHOWN;
        problems.truncate(PROBLEMS_SHOWN);
        problems.push(format!("and {more} more"));
    }
    progress.messages.send(&Message::Report(Report {
        figures: &figures,
        problems: &problems,
        load: &said,
    }))
}

async fn read_everything(
    clients: &Clients,
    databases: &Databases,
    topic: Arc<Topic>,
    told: Told,
) -> Result<(Parts, Vec<String>)> {
    let users: BTreeSet<String> = told.orders.iter().map(|order| order.user_id.clone()).collect();
    let (views, mut problems) = ask_for_views(clients, &told.orders).await?;
    let (lists, list_problems) = ask_for_lists(clients, users).await?;
    problems.extend(told.problems);
    problems.extend(list_problems);
    let parts = Parts {
        told: told.orders,
        state: databases.state(None).await?,
        events: databases.events(None).await?,
        outbox: databases.outbox(None).await?,
        records: blocking(move || topic.read()).await?,
        views,
        lists,
        view_commits: databases.view_commits(None).await?,
    };
    Ok((parts, problems))
}

/// GetOrderView of every order, from one instance after the other.
async fn ask_for_views(clients: &Clients, orders: &[v1::Order]) -> Result<(Vec<OrderView>, Vec<String>)> {
    let (mut views, mut problems) = (Vec::new(), Vec::new());
    let mut tasks = JoinSet::new();
    let mut turns = orders.iter().enumerate();
    loop {
        while tasks.len() < ASK_AT_ONCE
            && let Some((turn, order)) = turns.next()
        {
            let client = clients.view(turn);
            let request = GetOrderViewRequest {
                user_id: order.user_id.clone(),
                order_id: order.order_id.clone(),
                at_least_version: order.version,
            };
            tasks.spawn(call(request, move |request| {
                let mut client = client.clone();
                async move { client.get_order_view(request).await }
            }));
        }
        let Some(answer) = tasks.join_next().await else {
            return Ok((views, problems));
        };
        match answer? {
            Ok(response) => views.push(response.order.context("GetOrderView answered without an order")?),
            Err(status) => problems.push(format!("GetOrderView answered {status:?}")),
        }
    }
}

type Lists = BTreeMap<String, Vec<OrderView>>;

/// ListOrders of every user, page by page, each page from another instance.
async fn ask_for_lists(clients: &Clients, users: BTreeSet<String>) -> Result<(Lists, Vec<String>)> {
    let (mut lists, mut problems) = (Lists::new(), Vec::new());
    let mut turn = 0;
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
            turn += 1;
            let client = clients.view(turn);
            let answer = call(request, |request| {
                let mut client = client.clone();
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

/// Looks how far things have come, and says so.
struct Follow<'a> {
    messages: Messages,
    databases: &'a Databases,
    topic: Arc<Topic>,
    orders: u64,
    placed: Arc<AtomicU64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    outbox_rows: u64,
    kafka_records: u64,
    projected_events: u64,
}

impl Seen {
    fn is_complete(&self) -> bool {
        self.projected_events >= self.outbox_rows && self.kafka_records >= self.outbox_rows
    }
}

impl Follow<'_> {
    /// Follows until `done`, or until nothing has changed for long: what is missing then, the reconciliation says.
    async fn until(&self, phase: &str, done: impl Fn(&Seen) -> bool) -> Result<()> {
        let mut last = None;
        let mut changed = Instant::now();
        loop {
            let topic = self.topic.clone();
            let seen = Seen {
                outbox_rows: self.databases.outbox_count().await?,
                kafka_records: blocking(move || topic.count()).await?,
                projected_events: self.databases.projected_events().await?,
            };
            self.messages.send(&Message::Progress(Progress {
                phase,
                orders: self.orders,
                placed: self.placed.load(Ordering::Relaxed),
                outbox_rows: seen.outbox_rows,
                kafka_records: seen.kafka_records,
                projected_events: seen.projected_events,
            }))?;
            if last != Some(seen) {
                last = Some(seen);
                changed = Instant::now();
            }
            if done(&seen) || changed.elapsed() > STALLED_AFTER {
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}
