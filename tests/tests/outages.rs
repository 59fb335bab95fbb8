//! Kafka away, PostgreSQL away: what can go on does, what cannot says so, and everything recovers by itself.

use std::time::Duration;

use anyhow::{Result, ensure};
use contracts::shop::order::v1::Order;
use contracts::shop::orderquery::v1::GetOrderViewRequest;
use local_stack::testing::{self, Folder, private_kafka, private_postgres};
use local_stack::{Process, wait};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tests::load::{Load, place_request};
use tests::shop::{Shop, order_client, view_client};
use tests::{PATIENCE, assert_projected, assert_sound, check, databases, say, seed, topic};
use tonic::{Code, Request};
use tonic_types::StatusExt as _;

const CLIENTS: u64 = 4;
const PACE: Duration = Duration::from_millis(10);

/// The shop's processes.
struct Processes {
    order_svc: Process,
    relay: Process,
    order_query_svc: Process,
}

impl Processes {
    async fn start(shop: &Shop) -> Result<Self> {
        let mut processes = Self {
            order_svc: shop.order_svc().start().await?,
            relay: shop.outbox_relay().start().await?,
            order_query_svc: shop.order_query_svc(1).start().await?,
        };
        for process in processes.all() {
            process.ready().await?;
        }
        Ok(processes)
    }

    fn all(&mut self) -> [&mut Process; 3] {
        [&mut self.order_svc, &mut self.relay, &mut self.order_query_svc]
    }

    fn ids(&mut self) -> [Option<u32>; 3] {
        self.all()
            .map(|process| process.id().filter(|_| process.is_running()))
    }

    async fn stop(mut self) -> Result<()> {
        for process in self.all() {
            let status = process.stop().await?;
            ensure!(status.success(), "{} ended with {status}", process.name());
        }
        Ok(())
    }
}

/// Waits until so many more commands are acknowledged.
async fn acknowledged(load: &Load, more: u64) -> Result<()> {
    let goal = load.acknowledged() + more;
    wait::until("commands are acknowledged", PATIENCE, || async {
        Ok((load.acknowledged() >= goal).then_some(()))
    })
    .await
}

/// Everything that was committed is on Kafka in order, and in the read model.
async fn check_all(shop: &Shop, name: &str) -> Result<()> {
    let (orders, views) = (shop.orders.connect().await?, shop.order_query.connect().await?);
    databases::published(&orders).await?;
    databases::projected(&orders, &views).await?;
    let rows = databases::outbox(&orders).await?;
    let verdict = check::topic(&rows, &topic::read(&shop.brokers, &shop.topic).await?);
    say(&format!(
        "{name}: {} rows, {} repeats",
        rows.len(),
        verdict.repeats
    ));
    assert_sound(&verdict.problems);
    assert_sound(&check::histories(
        &databases::orders(&orders).await?,
        &databases::events(&orders).await?,
        &rows,
    ));
    assert_projected(&orders, &views, &shop.group).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_go_on_without_kafka_and_the_backlog_drains_in_order() {
    tests::run("kafka-down", without_kafka).await;
}

async fn without_kafka(folder: &Folder) -> Result<()> {
    let seed = seed("kafka_down");
    let mut kafka = private_kafka(folder).await?;
    let shop = Shop::on(folder, &testing::postgres_url(), &kafka.brokers()).await?;
    let (orders, views) = (shop.orders.connect().await?, shop.order_query.connect().await?);
    let mut processes = Processes::start(&shop).await?;
    let ids = processes.ids();

    let load = Load::start(&order_client(&processes.order_svc)?, CLIENTS, PACE, seed);
    acknowledged(&load, 100).await?;
    let projected = "SELECT count(*) FROM order_views";
    wait::until("events flow", PATIENCE, || async {
        Ok((databases::count(&views, projected).await? > 0).then_some(()))
    })
    .await?;
    kafka.kill()?;
    // Every one of these is placed, and read, while there is no Kafka.
    acknowledged(&load, 500).await?;
    ensure!(!kafka.is_running(), "Kafka is there");
    let behind = databases::count(&orders, "SELECT count(*) FROM outbox").await?
        - databases::count(
            &views,
            "SELECT coalesce(sum(order_version), 0)::bigint FROM order_views",
        )
        .await?;
    ensure!(behind > 0, "events arrived without Kafka");
    let row = views
        .query_one(
            "SELECT user_id::text, order_id::text FROM order_views LIMIT 1",
            &[],
        )
        .await?;
    let known = GetOrderViewRequest {
        user_id: row.get(0),
        order_id: row.get(1),
        at_least_version: 0,
    };
    view_client(&processes.order_query_svc)?
        .get_order_view(known)
        .await?;

    kafka.start().await?;
    acknowledged(&load, 100).await?;
    ensure!(load.unavailable() == 0, "commands wait for Kafka");
    let unexpected = load.unexpected();
    ensure!(unexpected.is_empty(), "{unexpected:?}");
    load.finish().await?;
    check_all(&shop, "Kafka down").await?;
    for process in processes.all() {
        process.ready().await?;
    }
    ensure!(processes.ids() == ids, "a process was started again");
    processes.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_recovers_from_a_postgresql_that_was_killed() {
    tests::run("postgres-down", without_postgres).await;
}

async fn without_postgres(folder: &Folder) -> Result<()> {
    let seed = seed("postgres_down");
    let mut postgres = private_postgres(folder).await?;
    let brokers = testing::kafka_brokers();
    let shop = Shop::on(folder, &postgres.url("postgres"), &brokers).await?;
    let mut processes = Processes::start(&shop).await?;
    let ids = processes.ids();
    let mut orders = order_client(&processes.order_svc)?;
    let mut views = view_client(&processes.order_query_svc)?;

    let load = Load::start(&orders, CLIENTS, PACE, seed);
    for _ in 0..2 {
        acknowledged(&load, 100).await?;
        let before = load.unavailable();
        postgres.kill()?;
        wait::until("commands are told to try again", PATIENCE, || async {
            Ok((load.unavailable() >= before + 20).then_some(()))
        })
        .await?;
        // Queries say so, too.
        let request = place_request(&mut StdRng::seed_from_u64(seed));
        let mut view = Request::new(GetOrderViewRequest {
            user_id: request.user_id.clone(),
            order_id: request.user_id.clone(),
            at_least_version: 0,
        });
        view.set_timeout(Duration::from_secs(10));
        for status in [
            orders.place_order(request).await.map(drop),
            views.get_order_view(view).await.map(drop),
        ] {
            let status = match status {
                Err(status) => status,
                Ok(()) => anyhow::bail!("answered without a database"),
            };
            ensure!(status.code() == Code::Unavailable, "{status:?}");
            let details = status.get_error_details();
            ensure!(
                details.retry_info().is_some() && details.error_info().is_some(),
                "{status:?}"
            );
        }
        postgres.start().await?;
    }
    acknowledged(&load, 100).await?;
    // Whoever was refused was refused like this, and in no other way.
    let unexpected = load.unexpected();
    ensure!(unexpected.is_empty(), "{} {:?}", unexpected.len(), unexpected[0]);
    let told = load.finish().await?;
    for process in processes.all() {
        process.ready().await?;
    }
    check_all(&shop, "PostgreSQL down").await?;
    check_told(&shop, told.orders().into_values()).await?;
    ensure!(processes.ids() == ids, "a process was started again");
    processes.stop().await?;
    shop.verify().await
}

/// What was acknowledged is there, at that version, and nothing else.
async fn check_told(shop: &Shop, told: impl Iterator<Item = Order>) -> Result<()> {
    let sql = shop.orders.connect().await?;
    let there = databases::orders(&sql).await?;
    let there = there
        .into_iter()
        .map(|order| (order.order_id, order.version.to_string()))
        .collect();
    let told = told
        .map(|order| (order.order_id, order.version.to_string()))
        .collect();
    assert_sound(&check::same(["clients", "orders"], &told, &there));
    Ok(())
}
