//! kill -9 of the relay while writers write: nothing is lost, nothing is out of order, repeats are the same bytes.

use std::time::Duration;

use anyhow::{Result, ensure};
use local_stack::testing::Folder;
use local_stack::{Process, wait};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tests::shop::Shop;
use tests::writers::{self, Load};
use tests::{PATIENCE, assert_sound, check, databases, metric, say, seed, topic};

const KILLS: u32 = 20;

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_loses_nothing_however_often_it_is_killed() {
    tests::run("relay-crash", kill_and_look).await;
}

async fn kill_and_look(folder: &Folder) -> Result<()> {
    let seed = seed("relay_crash");
    let mut rng = StdRng::seed_from_u64(seed);
    let shop = Shop::new(folder).await?;
    let sql = shop.orders.connect().await?;
    writers::prepare(&sql, "outbox").await?;
    let mut relay = shop.outbox_relay().start().await?;

    let writers = Load::default().start(&shop.orders, seed).await?;
    for kill in 0..KILLS {
        // It has published something since it was started, and goes on doing so.
        let some = f64::from(rng.random_range(1..200u32));
        wait::until("records flow", PATIENCE, || async {
            Ok((published(&relay).await? >= some).then_some(()))
        })
        .await?;
        // The moment itself is random: before the first save, in it, between it and the next, and so on.
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..600_000))).await;
        relay.kill()?;
        relay.start().await?;
        if kill % 5 == 0 {
            // And while it starts, waits for the lease, or has just got it.
            tokio::time::sleep(Duration::from_micros(rng.random_range(0..1_200_000))).await;
            relay.kill()?;
            relay.start().await?;
        }
    }
    writers.stop().await?;
    databases::published(&sql).await?;
    let status = relay.stop().await?;
    ensure!(status.success(), "the relay ended with {status}");

    let rows = databases::outbox(&sql).await?;
    let verdict = check::topic(&rows, &topic::read(&shop.brokers, &shop.topic).await?);
    let holes = rows.last().map_or(0, |row| row.id) - rows.len() as i64;
    say(&format!(
        "{} rows, {holes} ids rolled back, {KILLS} kills, {} repeats",
        rows.len(),
        verdict.repeats
    ));
    assert_sound(&check::outbox(&rows));
    assert_sound(&verdict.problems);
    ensure!(holes > 0, "no transaction was rolled back");
    ensure!(
        verdict.repeats > 0,
        "no kill came between an acknowledgement and its save"
    );
    Ok(())
}

async fn published(relay: &Process) -> Result<f64> {
    metric(relay, "outbox_relay_published_total", &[]).await
}
