//! kill -9 of order-svc during commands: what was acknowledged is there with its event, state and outbox never differ, and
//! a request_id has one outcome.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use contracts::shop::order::v1::{GetOrderHistoryRequest, GetOrderRequest};
use local_stack::testing::Folder;
use local_stack::wait;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tests::load::Load;
use tests::shop::{Shop, order_client};
use tests::{PATIENCE, assert_sound, check, databases, say, seed};

const KILLS: u32 = 20;

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_is_there_however_often_order_svc_is_killed() {
    tests::run("order-crash", kill_and_look).await;
}

async fn kill_and_look(folder: &Folder) -> Result<()> {
    let seed = seed("order_crash");
    let mut rng = StdRng::seed_from_u64(seed);
    let shop = Shop::new(folder).await?;
    let sql = shop.orders.connect().await?;
    let mut order_svc = shop.order_svc().start().await?;
    order_svc.ready().await?;
    let mut client = order_client(&order_svc)?;

    let load = Load::start(&client, 12, Duration::ZERO, seed);
    let mut before = 0;
    for _ in 0..KILLS {
        let goal = before + rng.random_range(1..150u64);
        wait::until("commands are acknowledged", PATIENCE, || async {
            Ok((load.acknowledged() >= goal).then_some(()))
        })
        .await?;
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..10_000))).await;
        order_svc.kill()?;
        before = load.acknowledged();
        order_svc.start().await?;
    }
    let broken = load.unexpected().len();
    let told = load.finish().await?;
    say(&format!(
        "{} placed, {} cancelled, {KILLS} kills, {broken} tries broken off",
        told.placed.len(),
        told.cancelled.len()
    ));
    ensure!(broken > 0, "no kill hit a command");

    let (orders, events) = (databases::orders(&sql).await?, databases::events(&sql).await?);
    assert_sound(&check::histories(
        &orders,
        &events,
        &databases::outbox(&sql).await?,
    ));
    // In the end every command was acknowledged, so there is one order for each request, and nothing else.
    ensure!(orders.len() == told.placed.len(), "{} orders", orders.len());
    ensure!(
        events.len() == told.placed.len() + told.cancelled.len(),
        "{} events",
        events.len()
    );
    let requests = databases::count(&sql, "SELECT count(*) FROM requests WHERE response IS NOT NULL").await?;
    ensure!(usize::try_from(requests)? == events.len(), "{requests} requests");

    // What clients were told is what is there, with its event.
    order_svc.ready().await?;
    for (order_id, order) in told.orders() {
        let request = GetOrderRequest {
            user_id: order.user_id.clone(),
            order_id: order_id.clone(),
        };
        let found = client.get_order(request).await?.into_inner().order;
        ensure!(found.as_ref() == Some(&order), "{order:?} is now {found:?}");
        let request = GetOrderHistoryRequest {
            user_id: order.user_id.clone(),
            order_id,
            ..Default::default()
        };
        let history = client.get_order_history(request).await?.into_inner().events;
        let types: Vec<&str> = history.iter().map(|event| event.r#type.as_str()).collect();
        let expected = ["order.placed", "order.cancelled"];
        ensure!(
            types == expected[..usize::try_from(order.version)?],
            "{order:?}: {types:?}"
        );
    }
    // The same request_id still gets the same answer, and does nothing.
    for (request, order) in told.placed.iter().step_by(7) {
        let answer = client.place_order(request.clone()).await?.into_inner();
        ensure!(
            answer.order.as_ref() == Some(order),
            "{order:?} is now {answer:?}"
        );
    }
    for (request, order) in told.cancelled.iter().step_by(7) {
        let answer = client.cancel_order(request.clone()).await?.into_inner();
        ensure!(
            answer.order.as_ref() == Some(order),
            "{order:?} is now {answer:?}"
        );
    }
    ensure!(
        databases::events(&sql).await?.len() == events.len(),
        "repeats did something"
    );

    let status = order_svc.stop().await?;
    ensure!(status.success(), "order-svc ended with {status}");
    shop.verify().await.context("order-svc verify")
}
