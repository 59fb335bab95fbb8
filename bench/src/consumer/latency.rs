//! From PlaceOrder's answer to the view that has the order, through order-svc, outbox-relay and order-query-svc, at a steady rate.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use contracts::shop::order::v1::order_service_client::OrderServiceClient;
use contracts::shop::order::v1::{OrderItem, PlaceOrderRequest};
use contracts::shop::orderquery::v1::GetOrderViewRequest;
use contracts::shop::orderquery::v1::order_query_service_client::OrderQueryServiceClient;
use contracts::topics::{INVENTORY, NOTIFICATION, ORDER, PAYMENT};
use local_stack::process::{self, Process};
use local_stack::shop::{ORDER_QUERY_SVC, ORDER_SVC, OUTBOX_RELAY};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};
use uuid::Uuid;

use super::Run;
use crate::report::{Section, number};
use crate::servers::Servers;
use crate::stats::{median, percentile};
use crate::topics::{self, PARTITIONS};
use crate::{meter, ui};

/// Orders a second.
const RATE: u32 = 500;
/// Connections to each service, used in turn.
const CONNECTIONS: usize = 4;
/// Of each call.
const DEADLINE: Duration = Duration::from_secs(10);
/// Orders under way at once; with more the rate is not held, and the run fails.
const UNDER_WAY: usize = 2_000;

#[derive(Debug, Clone, Copy)]
struct Latency {
    p50: f64,
    p99: f64,
    most: f64,
    /// The median of PlaceOrder itself.
    place_p50: f64,
    /// Per cent of a core, in the order of [`PARTIES`].
    shares: [f64; 6],
}

const PARTIES: [&str; 6] = [
    "order-svc",
    "outbox-relay",
    "order-query-svc",
    "PostgreSQL",
    "Kafka",
    "this harness",
];

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let sizes = run.sizes;
    let shop = ui::quiet_step(
        "order-svc, outbox-relay, order-query-svc",
        Shop::start(&run.servers),
    )
    .await?;
    let mut latencies: Vec<Latency> = Vec::new();
    for round in 1..=sizes.runs {
        let outcome = |latency: &Latency| format!("p50 {:.2} ms, p99 {:.2} ms", latency.p50, latency.p99);
        let work = shop.measure(&run.servers, sizes.warm_up, sizes.latency);
        latencies.push(ui::step(format!("{RATE} orders/s ({round}/{})", sizes.runs), outcome, work).await?);
    }
    shop.stop().await?;
    let of = |value: fn(&Latency) -> f64| median(latencies.iter().map(value));
    let mut section = Section::new("From PlaceOrder's answer to the view")
        .note(format!(
            "{RATE} orders/s at even times, whether the ones before are answered or not. Each client calls GetOrderView with the version \
             that PlaceOrder told it, at once; milliseconds from the one answer to the other. {} run(s) of {:?}, each after {:?} of the same \
             load, medians. Default configurations, one process each.",
            latencies.len(),
            sizes.latency,
            sizes.warm_up
        ))
        .columns(&["p50", "p99", "most", "PlaceOrder's p50", "per cent of a core"]);
    let shares = PARTIES.iter().enumerate().map(|(party, name)| {
        let share = median(latencies.iter().map(|latency| latency.shares[party]));
        format!("{name} {}", number(share, 0))
    });
    section.row([
        number(of(|latency| latency.p50), 2),
        number(of(|latency| latency.p99), 2),
        number(of(|latency| latency.most), 1),
        number(of(|latency| latency.place_p50), 2),
        shares.collect::<Vec<_>>().join(", "),
    ]);
    run.report.section(section);
    run.report.figure("view_p50_ms", of(|latency| latency.p50));
    run.report.figure("view_p99_ms", of(|latency| latency.p99));
    Ok(())
}

struct Shop {
    orders: Process,
    relay: Process,
    views: Process,
    clients: Arc<Clients>,
}

struct Clients {
    orders: Vec<OrderServiceClient<Channel>>,
    views: Vec<OrderQueryServiceClient<Channel>>,
}

impl Shop {
    async fn start(servers: &Servers) -> Result<Self> {
        for topic in [ORDER, PAYMENT, INVENTORY, NOTIFICATION] {
            topics::create(&servers.brokers(), topic, PARTITIONS, None).await?;
            topics::ready(&servers.brokers(), topic, PARTITIONS).await?;
        }
        let url = async |database: &str| -> Result<String> {
            servers.postgres.create_database(database).await?;
            Ok(servers.url(database))
        };
        let (order_url, view_url) = (url("orders").await?, url("order_query").await?);
        let of =
            |service: &str, database_url: &str| process(servers, service).set("database.url", database_url);
        let (orders, views) = (of(ORDER_SVC, &order_url), of(ORDER_QUERY_SVC, &view_url));
        for service in [&orders, &views] {
            service.clone().arg("migrate").run_to_end().await?;
        }
        let relay = process(servers, OUTBOX_RELAY).set("outbox.orders.database_url", &order_url);
        let (mut orders, mut relay, mut views) =
            tokio::try_join!(orders.start(), relay.start(), views.start())?;
        for process in [&mut orders, &mut relay, &mut views] {
            process.ready().await?;
        }
        let channels = |process: &Process| -> Result<Vec<Channel>> {
            let url = process.grpc_url()?;
            let connect = |_| {
                Ok(Endpoint::from_shared(url.clone())?
                    .tcp_nodelay(true)
                    .connect_lazy())
            };
            (0..CONNECTIONS).map(connect).collect()
        };
        let clients = Clients {
            orders: channels(&orders)?
                .into_iter()
                .map(OrderServiceClient::new)
                .collect(),
            views: channels(&views)?
                .into_iter()
                .map(OrderQueryServiceClient::new)
                .collect(),
        };
        Ok(Self {
            orders,
            relay,
            views,
            clients: Arc::new(clients),
        })
    }

    fn cpu(&self, servers: &Servers) -> Result<[f64; 6]> {
        let of = |process: &Process| meter::cpu_seconds(process.id().context("it has ended")?);
        Ok([
            of(&self.orders)?,
            of(&self.relay)?,
            of(&self.views)?,
            servers.postgres_cpu()?,
            servers.kafka_cpu()?,
            meter::cpu_seconds(std::process::id())?,
        ])
    }

    async fn measure(&self, servers: &Servers, warm_up: Duration, measured: Duration) -> Result<Latency> {
        let orders = |time: Duration| (time.as_secs_f64() * f64::from(RATE)) as u32;
        let (first, end) = (orders(warm_up), orders(warm_up + measured));
        let room = Arc::new(Semaphore::new(UNDER_WAY));
        let mut clients = JoinSet::new();
        let mut times: Vec<Times> = Vec::new();
        let start = tokio::time::Instant::now();
        let mut began = (Instant::now(), self.cpu(servers)?);
        for turn in 0..end {
            tokio::time::sleep_until(start + Duration::from_secs(1) * turn / RATE).await;
            if turn == first {
                began = (Instant::now(), self.cpu(servers)?);
            }
            let room = Arc::clone(&room).try_acquire_owned();
            let room = room.with_context(|| format!("{RATE} orders/s are not kept up with"))?;
            let services = Arc::clone(&self.clients);
            clients.spawn(async move {
                let times = services.order(turn).await;
                drop(room);
                times
            });
            while let Some(done) = clients.try_join_next() {
                times.push(done??);
            }
        }
        let (elapsed, cpu) = (began.0.elapsed().as_secs_f64(), self.cpu(servers)?);
        while let Some(done) = clients.join_next().await {
            times.push(done??);
        }
        let millis = |time: fn(&Times) -> Duration| -> Vec<f64> {
            let measured = times.iter().filter(|times| times.turn >= first);
            measured.map(|times| time(times).as_secs_f64() * 1000.0).collect()
        };
        let mut views = millis(|times| times.view);
        ensure!(views.len() == (end - first) as usize, "answers are missing");
        let mut at = |share| percentile(&mut views, share).context("no orders were measured");
        Ok(Latency {
            p50: at(0.5)?,
            p99: at(0.99)?,
            most: at(1.0)?,
            place_p50: median(millis(|times| times.place)).context("no orders were measured")?,
            shares: std::array::from_fn(|party| (cpu[party] - began.1[party]) / elapsed * 100.0),
        })
    }

    async fn stop(self) -> Result<()> {
        for mut process in [self.orders, self.relay, self.views] {
            let status = process.stop().await?;
            ensure!(status.success(), "{} ended badly ({status})", process.name());
        }
        Ok(())
    }
}

fn process(servers: &Servers, name: &str) -> process::Builder {
    let builder = Process::builder(name, servers.folder("latency"));
    builder.set("kafka.brokers", servers.brokers())
}

/// Of one order.
struct Times {
    turn: u32,
    /// From the call of PlaceOrder to its answer.
    place: Duration,
    /// From there to the answer of GetOrderView.
    view: Duration,
}

impl Clients {
    async fn order(&self, turn: u32) -> Result<Times> {
        let user_id = Uuid::new_v4().to_string();
        let item = OrderItem {
            product_id: Uuid::new_v4().to_string(),
            quantity: 2,
            unit_price_minor_units: 1_299,
        };
        let place = PlaceOrderRequest {
            request_id: Uuid::new_v4().to_string(),
            user_id: user_id.clone(),
            items: vec![item],
            currency_code: "EUR".to_owned(),
            user_email: String::new(),
            payment_method_id: String::new(),
        };
        let connection = turn as usize % CONNECTIONS;
        let called = Instant::now();
        let placed = self.orders[connection].clone().place_order(within(place)).await?;
        let answered = Instant::now();
        let order = placed.into_inner().order.context("an answer without an order")?;
        let get = GetOrderViewRequest {
            user_id,
            order_id: order.order_id,
            at_least_version: order.version,
        };
        self.views[connection].clone().get_order_view(within(get)).await?;
        Ok(Times {
            turn,
            place: answered - called,
            view: answered.elapsed(),
        })
    }
}

fn within<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(DEADLINE);
    request
}
