//! `./dev bench inventory`: orders that all want one product, against orders that want many.
//!
//! Each run has a database and a topic of its own with all orders in it, before two instances of inventory-svc read them. The rate counts
//! reservations from the first that is seen until the last.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use contracts::catalogue::order as types;
use contracts::shop::order::events::v1::{OrderLine, OrderPlaced};
use envelope::Envelope;
use local_stack::shop::INVENTORY_SVC;
use local_stack::testing::events::headers;
use local_stack::{Process, postgres};
use prost::Message as _;
use rdkafka::producer::{FutureProducer, FutureRecord};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::report::{Output, Report, Section, machine, thousands};
use crate::servers::Servers;
use crate::stats::median;
use crate::topics::{self, PARTITIONS};
use crate::{released, ui};

const INSTANCES: u16 = 2;
const PRODUCTS: usize = 1_000;
const LOOK_EVERY: Duration = Duration::from_millis(20);
const LIMIT: Duration = Duration::from_secs(300);
/// Orders that are on their way to Kafka at once.
const CHUNK: usize = 5_000;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    output: Output,
    /// Orders of a run
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1_000..=10_000_000))]
    orders: u32,
    /// How often each is measured, in turn; medians are reported
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
}

/// What every result has.
const KEYS: [&str; 3] = ["many_products_rate", "one_product_rate", "one_product_ratio"];

pub(crate) async fn run(options: Options) -> Result<()> {
    released::check(&[INVENTORY_SVC])?;
    let servers = ui::quiet_step("PostgreSQL and Kafka", Servers::start()).await?;
    let machine = machine(&servers.connect("postgres").await?).await?;
    let report = ui::unless_ended(measure(&servers, &options)).await;
    servers.stop().await?;
    report?.tell(&machine, &options.output)
}

async fn measure(servers: &Servers, options: &Options) -> Result<Report> {
    let mut rates: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
    for round in 1..=options.runs {
        for (shape, products) in [PRODUCTS, 1].into_iter().enumerate() {
            let name = format!("inventory_{products}_{round}");
            let what = format!("orders of {products} products ({round})");
            let outcome = |rate: &f64| format!("{} orders/s", thousands(*rate));
            rates[shape].push(ui::step(what, outcome, one(servers, &name, products, options.orders)).await?);
        }
    }
    let [many, hot] = rates.map(median);
    let mut section = Section::new("Orders that want the same product")
        .note(format!(
            "{} orders of one piece, placed before anybody reads them; {INSTANCES} instances, medians of {} runs.",
            thousands(f64::from(options.orders)),
            options.runs
        ))
        .columns(&["", "orders/s", "ratio"]);
    let many_name = format!("{PRODUCTS} products");
    let ratio = section.compare([&many_name, "one product"], [many, hot]);
    let mut report = Report::new("inventory", &KEYS);
    report.section(section);
    report.figure("many_products_rate", many);
    report.figure("one_product_rate", hot);
    report.figure("one_product_ratio", ratio);
    Ok(report)
}

/// The rate of one run.
async fn one(servers: &Servers, name: &str, products: usize, orders: u32) -> Result<f64> {
    let brokers = servers.brokers();
    postgres::create_database(&servers.url("postgres"), name).await?;
    topics::create(&brokers, name, PARTITIONS, None).await?;
    topics::ready(&brokers, name, PARTITIONS).await?;
    let builder = |instance: u16| {
        let instance = format!("{name}-{instance}");
        Process::builder(INVENTORY_SVC, servers.folder(name))
            .instance(&instance)
            .set("database.url", servers.url(name))
            .set("kafka.brokers", &brokers)
            .set("consumer.order_topic", name)
            .set("consumer.group", name)
            .set("log.level", "warn")
    };
    std::fs::create_dir_all(servers.folder(name))?;
    builder(0).arg("migrate").run_to_end().await?;
    let client = servers.connect(name).await?;
    let ids = stock(&client, products, orders).await?;
    place(&brokers, name, &ids, orders).await?;

    let mut running = Vec::new();
    for instance in 1..=INSTANCES {
        running.push(builder(instance).start().await?);
    }
    let rate = rate(&client, i64::from(orders)).await;
    for mut process in running {
        process.stop().await?;
    }
    let rate = rate?;
    builder(0).arg("verify").run_to_end().await?;
    drop(client);
    topics::delete(&brokers, &[name]).await?;
    Ok(rate)
}

/// Products with pieces for all orders, each with its event.
async fn stock(client: &Client, products: usize, orders: u32) -> Result<Vec<Uuid>> {
    let ids: Vec<Uuid> = (0..products).map(|_| Uuid::new_v4()).collect();
    let updated = |id: &Uuid| contracts::shop::inventory::events::v1::StockUpdated {
        product_id: id.to_string(),
        available: i64::from(orders),
        updated_at: Some(prost_types::Timestamp::default()),
        ..Default::default()
    };
    let payloads: Vec<Vec<u8>> = ids.iter().map(|id| updated(id).encode_to_vec()).collect();
    let available = i64::from(orders);
    client
        .execute(
            "WITH made AS (INSERT INTO stock SELECT id, 1, $3, 0, 0, 'epoch' FROM unnest($1::uuid[]) id),
                  told AS (INSERT INTO events (entity_type, entity_id, version, event_id, event_type, schema_version, payload,
                                               occurred_at, correlation_id)
                           SELECT 'stock', id::text, 1, gen_random_uuid(), 'stock.updated', 1, payload, 'epoch', id
                           FROM unnest($1::uuid[], $2::bytea[]) new (id, payload) RETURNING *)
             INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, schema_version, source,
                                 payload, occurred_at, correlation_id)
             SELECT event_id, entity_type, entity_id, version, event_type, schema_version, '/bench', payload, occurred_at,
                    correlation_id
             FROM told",
            &[&ids, &payloads, &available],
        )
        .await?;
    Ok(ids)
}

/// Every order is on the topic when this returns.
async fn place(brokers: &str, topic: &str, products: &[Uuid], orders: u32) -> Result<()> {
    let producer: FutureProducer = topics::client(brokers)
        .set("partitioner", "murmur2_random")
        .set("linger.ms", "5")
        .create()?;
    let numbers: Vec<usize> = (0..orders as usize).collect();
    for chunk in numbers.chunks(CHUNK) {
        let mut sent = Vec::with_capacity(chunk.len());
        for number in chunk {
            let (envelope, payload) = order(products[number % products.len()]);
            let record = FutureRecord::to(topic)
                .key(&envelope.entity_id)
                .payload(&payload)
                .headers(headers(&envelope));
            sent.push(producer.send_result(record).map_err(|(error, _)| error)?);
        }
        for delivery in sent {
            delivery.await?.map_err(|(error, _)| error)?;
        }
    }
    Ok(())
}

fn order(product: Uuid) -> (Envelope, Vec<u8>) {
    let order_id = Uuid::now_v7().to_string();
    let placed = OrderPlaced {
        order_id: order_id.clone(),
        items: vec![OrderLine {
            product_id: product.to_string(),
            quantity: 1,
            unit_price_minor_units: 100,
        }],
        ..Default::default()
    };
    let envelope = local_stack::testing::events::envelope(types::ENTITY_TYPE, &order_id, 1, types::PLACED);
    (envelope, placed.encode_to_vec())
}

/// Reservations a second, from the first that is seen until the last.
async fn rate(client: &Client, orders: i64) -> Result<f64> {
    let begun = Instant::now();
    let mut first: Option<(Instant, i64)> = None;
    loop {
        let row = client
            .query_one("SELECT count(*) FROM reservations", &[])
            .await
            .context("the reservations cannot be counted")?;
        let (now, count): (Instant, i64) = (Instant::now(), row.get(0));
        match first {
            Some((since, before)) if count == orders => {
                return Ok((count - before) as f64 / (now - since).as_secs_f64());
            }
            None if count > 0 => {
                ensure!(count < orders, "all were there at once: take more orders");
                first = Some((now, count));
            }
            _ => {}
        }
        ensure!(begun.elapsed() < LIMIT, "{count} of {orders} within {LIMIT:?}");
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
