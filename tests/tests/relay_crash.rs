//! kill -9 of the relay while writers write: nothing is lost, nothing is out of order, repeats are the same bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use local_stack::testing::Folder;
use local_stack::{Process, wait};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tests::shop::Shop;
use tests::{PATIENCE, assert_sound, check, databases, metric, say, seed, topic};
use tokio::task::JoinSet;
use tokio_postgres::{Client, GenericClient};

const KILLS: u32 = 20;
const WRITERS: u64 = 4;
const ENTITIES: u32 = 40;
/// Pause of a writer between transactions.
const PACE: Duration = Duration::from_millis(4);

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_loses_nothing_however_often_it_is_killed() {
    tests::run("relay-crash", kill_and_look).await;
}

async fn kill_and_look(folder: &Folder) -> Result<()> {
    let seed = seed("relay_crash");
    let mut rng = StdRng::seed_from_u64(seed);
    let shop = Shop::new(folder).await?;
    let sql = shop.orders.connect().await?;
    sql.batch_execute("CREATE TABLE entity (id text PRIMARY KEY, version bigint NOT NULL)")
        .await?;
    let mut relay = shop.outbox_relay().start().await?;

    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for number in 0..WRITERS {
        let (client, stop) = (shop.orders.connect().await?, Arc::clone(&stop));
        writers.spawn(write(client, StdRng::seed_from_u64(seed ^ (number + 1)), stop));
    }
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
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = writers.join_next().await {
        ended??;
    }
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

/// Transactions of one to three events of a few entities that all writers share; one in five is rolled back, some roll
/// back to a savepoint.
async fn write(mut client: Client, mut rng: StdRng, stop: Arc<AtomicBool>) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        let mut transaction = client.transaction().await?;
        // In one order, so that writers do not deadlock.
        let mut entities: Vec<u32> = (0..rng.random_range(1..=3))
            .map(|_| rng.random_range(0..ENTITIES))
            .collect();
        entities.sort_unstable();
        for entity in entities {
            if rng.random_bool(0.1) {
                let savepoint = transaction.savepoint("s").await?;
                append(&savepoint, entity).await?;
                savepoint.rollback().await?;
            }
            append(&transaction, entity).await?;
        }
        if rng.random_bool(0.2) {
            transaction.rollback().await?;
        } else {
            transaction.commit().await?;
        }
        tokio::time::sleep(PACE).await;
    }
    Ok(())
}

/// The protocol's form: the outbox row comes last, fed from the statement that locks the entity.
async fn append(client: &impl GenericClient, entity: u32) -> Result<()> {
    let sql = "WITH e AS (INSERT INTO entity AS e VALUES ($1, 1)
                          ON CONFLICT (id) DO UPDATE SET version = e.version + 1 RETURNING id, version)
               INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source, payload)
               SELECT gen_random_uuid(), 'test', id, version, 'test.moved', '/test',
                      convert_to(id || ' at ' || version, 'UTF8') FROM e";
    client.execute(sql, &[&format!("entity-{entity}")]).await?;
    Ok(())
}
