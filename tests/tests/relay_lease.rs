//! Several relay processes on the same outboxes: who leads, who follows, and that nobody does harm.
//!
//! `LEASE_ROUNDS` says how often a leader is frozen.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use local_stack::process::Builder;
use local_stack::testing::{Folder, unique};
use local_stack::{Process, wait};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tests::shop::{PARTITIONS, Shop};
use tests::writers::{self, Load};
use tests::{PATIENCE, assert_sound, check, databases, say, seed, topic};
use tokio_postgres::Client;

const TTL: Duration = Duration::from_secs(2);
/// Beyond the lease: a standby looks every tenth of it, and machines are busy.
const SLACK: Duration = Duration::from_secs(2);

fn rounds() -> u32 {
    let given = std::env::var("LEASE_ROUNDS").ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(4)
}

/// Relays by name on one database.
struct Bed {
    shop: Shop,
    sql: Client,
    seed: u64,
}

/// Who leads an outbox, by its database.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Leader {
    owner: String,
    epoch: i64,
}

impl Bed {
    async fn new(folder: &Folder, name: &str) -> Result<Self> {
        let shop = Shop::new(folder).await?;
        let sql = shop.orders.connect().await?;
        Ok(Self {
            shop,
            sql,
            seed: seed(&format!("relay_lease {name}")),
        })
    }

    fn relay(&self, name: &str) -> Builder {
        self.shop
            .outbox_relay()
            .instance(name)
            .set("service.instance", name)
            .set("outbox.orders.lease_ttl", "2s")
    }

    async fn leader(&self, outbox: &str) -> Result<Option<Leader>> {
        let sql = "SELECT owner, epoch FROM outbox_relay WHERE name = $1 AND expires_at > clock_timestamp()";
        Ok(self.sql.query_opt(sql, &[&outbox]).await?.map(|row| Leader {
            owner: row.get(0),
            epoch: row.get(1),
        }))
    }

    /// Waits until somebody leads under a newer epoch; returns who, and how long it took.
    async fn next(&self, outbox: &str, than: i64, limit: Duration) -> Result<(Leader, Duration)> {
        let began = Instant::now();
        let leader = wait::until("somebody else leads", limit, || async {
            Ok(self.leader(outbox).await?.filter(|leader| leader.epoch > than))
        })
        .await?;
        Ok((leader, began.elapsed()))
    }

    /// Waits until a relay leads.
    async fn first(&self, outbox: &str) -> Result<Leader> {
        Ok(self.next(outbox, 0, PATIENCE).await?.0)
    }

    /// Waits until the leader knows of so many replicas.
    async fn know(&self, replicas: i64) -> Result<()> {
        let sql = "SELECT count(*) FROM outbox_relay_members WHERE seen_at > clock_timestamp() - interval '2 seconds'";
        wait::until("replicas are there", PATIENCE, || async {
            Ok((databases::count(&self.sql, sql).await? >= replicas).then_some(()))
        })
        .await
    }

    /// Everything is relayed as it should be. Returns how many rows, and how many repeats.
    async fn sound(&self, table: &str, topic: &str) -> Result<(usize, usize)> {
        let rows = databases::outbox_rows(&self.sql, table).await?;
        assert_sound(&check::outbox(&rows));
        let verdict = check::topic(&rows, &topic::read(&self.shop.brokers, topic).await?);
        assert_sound(&verdict.problems);
        Ok((rows.len(), verdict.repeats))
    }
}

fn busy() -> Load {
    Load {
        pace: Duration::from_millis(10),
        ..Load::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_follows_a_killed_leader_within_the_lease_and_a_stopped_one_at_once() {
    tests::run("lease-takeover", async |folder| {
        let bed = Bed::new(folder, "takeover").await?;
        writers::prepare(&bed.sql, "outbox").await?;
        let mut relays = BTreeMap::new();
        for name in ["a", "b"] {
            relays.insert(name.to_owned(), bed.relay(name).start().await?);
        }
        let writers = busy().start(&bed.shop.orders, bed.seed).await?;
        let mut killed = Vec::new();
        let mut stopped = Vec::new();
        for _ in 0..rounds() {
            let leader = bed.first("orders").await?;
            bed.know(2).await?;
            let relay = relays.get_mut(&leader.owner).context("a relay")?;
            relay.kill()?;
            let (next, took) = bed.next("orders", leader.epoch, PATIENCE).await?;
            killed.push(took);
            ensure!(
                next.owner != leader.owner && next.epoch == leader.epoch + 1,
                "{leader:?}, then {next:?}"
            );
            ensure!(took < TTL + SLACK, "it took {took:?}");
            relay.start().await?;
            bed.know(2).await?;
            // In flight is what the writers have just written; it need not be published twice.
            let relay = relays.get_mut(&next.owner).context("a relay")?;
            let began = Instant::now();
            let (status, following) = tokio::join!(relay.stop(), bed.next("orders", next.epoch, PATIENCE));
            ensure!(status?.success() && following?.0.owner == leader.owner);
            stopped.push(began.elapsed());
            ensure!(
                began.elapsed() < TTL,
                "a leader that stops hands over at once: {:?}",
                began.elapsed()
            );
            relay.start().await?;
        }
        writers.stop().await?;
        databases::published(&bed.sql).await?;
        let (rows, repeats) = bed.sound("outbox", &bed.shop.topic).await?;
        say(&format!(
            "{rows} rows, {repeats} repeats; after kill -9: {killed:?}; after SIGTERM: {stopped:?}"
        ));
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_slept_beyond_its_lease_does_no_harm() {
    tests::run("lease-sleep", async |folder| {
        let bed = Bed::new(folder, "sleep").await?;
        let mut rng = StdRng::seed_from_u64(bed.seed);
        writers::prepare(&bed.sql, "outbox").await?;
        let mut relays = BTreeMap::new();
        for name in ["a", "b"] {
            // Saved late and batched for long: much is in flight.
            let relay = bed
                .relay(name)
                .set("outbox.orders.save_interval", "600ms")
                .set("kafka.properties.linger.ms", "30");
            relays.insert(name.to_owned(), relay.start().await?);
        }
        let writers = busy().start(&bed.shop.orders, bed.seed).await?;
        for _ in 0..rounds() {
            let leader = bed.first("orders").await?;
            tokio::time::sleep(Duration::from_micros(rng.random_range(0..700_000))).await;
            let sleeper = relays.get_mut(&leader.owner).context("a relay")?;
            sleeper.pause()?;
            let (next, _) = bed.next("orders", leader.epoch, TTL + SLACK).await?;
            ensure!(next.owner != leader.owner, "{next:?} slept");
            // The other one gets anywhere before, or nowhere.
            tokio::time::sleep(Duration::from_micros(rng.random_range(0..700_000))).await;
            sleeper.resume()?;
            bed.know(2).await?;
            ensure!(
                bed.leader("orders").await?.as_ref() == Some(&next),
                "the woken one leads"
            );
        }
        writers.stop().await?;
        databases::published(&bed.sql).await?;
        let (rows, repeats) = bed.sound("outbox", &bed.shop.topic).await?;
        say(&format!("{rows} rows, {} sleeps, {repeats} repeats", rounds()));
        ensure!(repeats > 0, "nothing was in flight");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outbox_is_handed_over_on_request() {
    tests::run("lease-handover", async |folder| {
        let bed = Bed::new(folder, "handover").await?;
        writers::prepare(&bed.sql, "outbox").await?;
        let mut relays = Vec::new();
        for name in ["a", "b", "c"] {
            relays.push(bed.relay(name).start().await?);
        }
        let writers = busy().start(&bed.shop.orders, bed.seed).await?;
        let handover = async |args: &[&str]| {
            let command = args
                .iter()
                .fold(bed.relay("command").arg("handover"), |c, arg| c.arg(arg));
            command.run_to_end().await
        };
        let first = bed.first("orders").await?;
        bed.know(3).await?;
        let to = if first.owner == "c" { "a" } else { "c" };
        handover(&["orders", "--to", to]).await?;
        let (second, took) = bed.next("orders", first.epoch, PATIENCE).await?;
        ensure!(second.owner == to, "{second:?} leads, not {to}");
        ensure!(took < TTL, "{took:?}");
        bed.know(3).await?;
        handover(&["orders"]).await?;
        let (third, took) = bed.next("orders", second.epoch, PATIENCE).await?;
        ensure!(third.owner != second.owner, "{third:?}");
        ensure!(took < TTL, "{took:?}");
        writers.stop().await?;
        databases::published(&bed.sql).await?;
        let (rows, repeats) = bed.sound("outbox", &bed.shop.topic).await?;
        say(&format!("{rows} rows, {repeats} repeats"));
        ensure!(
            repeats == 0,
            "{repeats} rows were published again: a handover drains"
        );
        // A leader that cannot answer is not waited for any longer because it was asked.
        for relay in &mut relays {
            if relay.name() == third.owner {
                relay.pause()?;
            }
        }
        handover(&["orders"]).await?;
        let (_, took) = bed.next("orders", third.epoch, PATIENCE).await?;
        ensure!(took < TTL * 7 / 4, "{took:?}");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn outboxes_spread_evenly_over_the_relays_that_are_there() {
    tests::run("lease-spread", spread).await;
}

async fn spread(folder: &Folder) -> Result<()> {
    const OUTBOXES: usize = 9;
    const BOUND: Duration = Duration::from_secs(60);

    let bed = Bed::new(folder, "spread").await?;
    let names: Vec<String> = (1..=OUTBOXES).map(|n| format!("o{n}")).collect();
    let topics: Vec<String> = names.iter().map(|name| unique(name)).collect();
    let relay = |instance: &str| {
        let mut relay = Process::builder("outbox-relay", folder.path())
            .instance(instance)
            .set("service.instance", instance)
            .set("kafka.brokers", &bed.shop.brokers);
        for (name, topic) in names.iter().zip(&topics) {
            for (key, value) in [
                ("database_url", bed.shop.orders.url()),
                ("table", format!("public.{name}")),
                ("topic", topic.clone()),
                ("lease_ttl", "2s".to_owned()),
            ] {
                relay = relay.set(&format!("outbox.{name}.{key}"), value);
            }
        }
        relay
    };
    for name in &names {
        relay("command").arg("init").arg(name).run_to_end().await?;
        writers::prepare(&bed.sql, name).await?;
    }
    let create = topics
        .iter()
        .fold(relay("command").arg("create-topics"), |c, topic| {
            c.arg(format!("{topic}={PARTITIONS}"))
        });
    create.run_to_end().await?;
    let mut loads = Vec::new();
    for (number, table) in names.iter().enumerate() {
        let load = Load {
            table: table.clone(),
            writers: 1,
            pace: Duration::from_millis(40),
            ..Load::default()
        };
        loads.push(load.start(&bed.shop.orders, bed.seed + number as u64).await?);
    }
    // How many each leads, in ascending order.
    let led = async |counts: &[usize]| {
        let began = Instant::now();
        let sql = "SELECT count(*) FROM outbox_relay WHERE expires_at > clock_timestamp() GROUP BY owner ORDER BY 1";
        wait::until(&format!("they lead {counts:?}"), BOUND, || async {
            let found = bed.sql.query(sql, &[]).await?;
            let found = found.iter().map(|row| row.get::<_, i64>(0) as usize);
            Ok(found.eq(counts.iter().copied()).then_some(()))
        })
        .await?;
        anyhow::Ok(began.elapsed())
    };
    let mut relays = vec![relay("a").start().await?];
    led(&[9]).await?;
    relays.push(relay("b").start().await?);
    relays.push(relay("c").start().await?);
    let spread = led(&[3, 3, 3]).await?;
    relays[0].kill()?;
    let two = led(&[4, 5]).await?;
    relays[0].start().await?;
    let back = led(&[3, 3, 3]).await?;
    for load in loads {
        load.stop().await?;
    }
    let (mut rows, mut repeats) = (0, 0);
    for (name, topic) in names.iter().zip(&topics) {
        let sql = format!(
            "SELECT (SELECT floor FROM outbox_relay WHERE name = '{name}') >= (SELECT max(id) FROM {name})"
        );
        wait::until("it flows", PATIENCE, || async {
            Ok(bed
                .sql
                .query_one(&sql, &[])
                .await?
                .get::<_, bool>(0)
                .then_some(()))
        })
        .await?;
        let found = bed.sound(name, topic).await?;
        rows += found.0;
        repeats += found.1;
    }
    say(&format!(
        "3/3/3 after {spread:?}, 4/5 after {two:?}, 3/3/3 after {back:?}; {rows} rows, {repeats} repeats"
    ));
    Ok(())
}
