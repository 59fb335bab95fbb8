//! One of two instances of the projection is killed, frozen past its session, or joined by a third for seconds, again and again while
//! events flow and connections die: every event takes effect once and in order, nothing is parked, and it becomes quiet.

use std::time::Duration;

use anyhow::{Result, ensure};
use local_stack::testing::Folder;
use local_stack::wait;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tests::load::Load;
use tests::shop::{Shop, order_client};
use tests::{PATIENCE, assert_projected, assert_sound, check, databases, metric, say, seed};

const ROUNDS: usize = 5;
/// Of the group's session: who is frozen for longer has lost its partitions.
const SESSION: Duration = Duration::from_secs(6);

#[tokio::test(flavor = "multi_thread")]
async fn each_event_takes_effect_once_whatever_happens_to_the_instances() {
    tests::run("consumer-faults", break_and_look).await;
}

async fn break_and_look(folder: &Folder) -> Result<()> {
    let seed = seed("consumer_faults");
    let mut rng = StdRng::seed_from_u64(seed);
    let shop = Shop::new(folder).await?;
    let (orders, views) = (shop.orders.connect().await?, shop.order_query.connect().await?);
    databases::record_steps(&views).await?;
    let instance = |number| {
        shop.order_query_svc(number)
            .set(
                "kafka.properties.session_timeout_ms",
                SESSION.as_millis().to_string(),
            )
            .set("consumer.idle_transaction_timeout", "1s")
    };
    let mut order_svc = shop.order_svc().start().await?;
    let mut relay = shop.outbox_relay().start().await?;
    let mut instances = [instance(1).start().await?, instance(2).start().await?];
    order_svc.ready().await?;

    let load = Load::start(&order_client(&order_svc)?, 6, Duration::from_millis(15), seed);
    let mut applied = 0.0;
    for round in 0..ROUNDS {
        let other = &instances[(round + 1) % 2];
        // The one that stays has something to do.
        wait::until("events are applied", PATIENCE, || async {
            let now = metric(other, "consumer_messages_total", &["outcome=\"applied\""]).await?;
            Ok((now > 0.0).then_some(()))
        })
        .await?;
        let victim = &mut instances[round % 2];
        victim.pause()?;
        // Whatever it holds, in the middle of whatever it does.
        let until = tokio::time::Instant::now() + SESSION + Duration::from_secs(3);
        while tokio::time::Instant::now() < until {
            let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                        WHERE datname = current_database() AND application_name LIKE '%consumer%' AND random() < 0.3";
            databases::count(&views, kill).await?;
            tokio::time::sleep(Duration::from_millis(rng.random_range(50..400))).await;
        }
        victim.resume()?;
        let mut third = instance(3).start().await?;
        tokio::time::sleep(Duration::from_millis(rng.random_range(500..3_000))).await;
        if round % 2 == 0 {
            third.kill()?;
        } else {
            third.stop().await?;
        }
        instances[(round + 1) % 2].kill()?;
        instances[(round + 1) % 2].start().await?;
        let now = databases::count(&views, "SELECT count(*) FROM steps WHERE what = 'view'").await? as f64;
        ensure!(now > applied, "nothing moved in round {round}");
        applied = now;
    }
    let told = load.finish().await?;
    databases::published(&orders).await?;
    databases::projected(&orders, &views).await?;

    let rows = databases::outbox(&orders).await?;
    say(&format!(
        "{} orders, {} events, {ROUNDS} rounds",
        told.placed.len(),
        rows.len()
    ));
    assert_projected(&orders, &views, &shop.group).await?;
    let (effects, marks) = databases::steps(&views).await?;
    assert_sound(&check::applied_once(&rows, &effects, &marks));
    let parked = databases::count(&views, "SELECT count(*) FROM parked_records").await?;
    ensure!(parked == 0, "{parked} records are parked, and none was bad");

    for process in instances.iter_mut().chain([&mut relay, &mut order_svc]) {
        let status = process.stop().await?;
        ensure!(status.success(), "{} ended with {status}", process.name());
    }
    Ok(())
}
