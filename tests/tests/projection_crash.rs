//! kill -9 of the projection's instances in turn while events flow: the read model ends up as the orders are, and every
//! event was applied once, in one transaction with its mark.

use std::time::Duration;

use anyhow::{Result, ensure};
use local_stack::testing::Folder;
use local_stack::wait;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tests::load::Load;
use tests::shop::{Shop, order_client};
use tests::{PATIENCE, assert_projected, assert_sound, check, databases, metric, say, seed};

const KILLS: usize = 20;

#[tokio::test(flavor = "multi_thread")]
async fn the_projection_applies_each_event_once_however_often_it_is_killed() {
    tests::run("projection-crash", kill_and_look).await;
}

async fn kill_and_look(folder: &Folder) -> Result<()> {
    let seed = seed("projection_crash");
    let mut rng = StdRng::seed_from_u64(seed);
    let shop = Shop::new(folder).await?;
    let (orders, views) = (shop.orders.connect().await?, shop.order_query.connect().await?);
    databases::record_steps(&views).await?;
    let mut order_svc = shop.order_svc().start().await?;
    let mut relay = shop.outbox_relay().start().await?;
    let mut instances = [
        shop.order_query_svc(1).start().await?,
        shop.order_query_svc(2).start().await?,
    ];
    order_svc.ready().await?;

    let load = Load::start(&order_client(&order_svc)?, 6, Duration::from_millis(15), seed);
    for kill in 0..KILLS {
        let victim = &mut instances[kill % 2];
        // It has applied something since it was started, and goes on doing so.
        let some = f64::from(rng.random_range(1..60u32));
        wait::until("events are applied", PATIENCE, || async {
            let applied = metric(victim, "consumer_messages_total", &["outcome=\"applied\""]).await?;
            Ok((applied >= some).then_some(()))
        })
        .await?;
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..20_000))).await;
        victim.kill()?;
        victim.start().await?;
    }
    let told = load.finish().await?;
    databases::published(&orders).await?;
    databases::projected(&orders, &views).await?;

    let rows = databases::outbox(&orders).await?;
    say(&format!(
        "{} orders, {} cancelled, {} events, {KILLS} kills",
        told.placed.len(),
        told.cancelled.len(),
        rows.len()
    ));
    assert_projected(&orders, &views, &shop.group).await?;
    let (effects, marks) = databases::steps(&views).await?;
    assert_sound(&check::applied_once(&rows, &effects, &marks));
    ensure!(
        told.orders().len() == told.placed.len(),
        "an order was told twice"
    );

    for process in instances.iter_mut().chain([&mut relay, &mut order_svc]) {
        let status = process.stop().await?;
        ensure!(status.success(), "{} ended with {status}", process.name());
    }
    Ok(())
}
