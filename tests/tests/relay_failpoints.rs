//! The relay is aborted at each of its failpoints, again and again, while writers write: nothing is lost, nothing is out of
//! order, repeats are the same bytes, and the quarantine holds just what it should.
//!
//! `FAILPOINT_DEATHS` says how often at each point.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use local_stack::process::Builder;
use local_stack::testing::{Folder, unique};
use local_stack::wait;
use outbox_relay::failpoints;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tests::check::{Row, Verdict};
use tests::shop::{PARTITIONS, Shop};
use tests::writers::{self, Load, Writers};
use tests::{PATIENCE, assert_sound, check, databases, say, seed, topic};
use tokio_postgres::Client;

/// Points that every relay comes to, and how often it may pass each before it dies there.
const READING: [(&str, u32); 5] = [
    (failpoints::LEASE_TAKEN, 0),
    (failpoints::AFTER_FETCH, 60),
    (failpoints::AFTER_HAND_OVER, 400),
    (failpoints::BEFORE_SAVE, 8),
    (failpoints::AFTER_SAVE, 8),
];
/// Points that need transactions which stay open or roll back.
const FENCES: [(&str, u32); 2] = [(failpoints::IN_FENCE, 15), (failpoints::FENCE_PASSED, 8)];
/// Points that need records which Kafka does not take.
const PARKING: [(&str, u32); 3] = [
    (failpoints::PARKED, 15),
    (failpoints::BEFORE_SAVE, 4),
    (failpoints::AFTER_SAVE, 4),
];
/// Points while such records go out after all; they must not all be out before the last death.
const RELEASE: [(&str, u32); 3] = [
    (failpoints::RELEASED, 1),
    (failpoints::BEFORE_SAVE, 4),
    (failpoints::AFTER_SAVE, 4),
];
/// Points that need published rows which are old.
const REMOVAL: [(&str, u32); 1] = [(failpoints::IN_REMOVAL, 0)];

const SIGABRT: i32 = 6;

fn deaths() -> u32 {
    let given = std::env::var("FAILPOINT_DEATHS").ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(5)
}

#[test]
fn every_point_has_its_test() {
    let tested: BTreeSet<&str> = [&READING[..], &FENCES, &PARKING, &RELEASE, &REMOVAL]
        .concat()
        .into_iter()
        .map(|(point, _)| point)
        .collect();
    assert_eq!(tested, BTreeSet::from(failpoints::ALL));
}

#[tokio::test(flavor = "multi_thread")]
async fn deaths_while_reading_and_saving_lose_nothing() {
    tests::run("failpoints-reading", async |folder| {
        let bed = Bed::new(folder, "reading").await?;
        let writers = bed.load().start(&bed.shop.orders, bed.seed).await?;
        bed.die_at(&READING).await?;
        bed.ended(writers).await?.repeated()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deaths_in_the_fence_lose_nothing() {
    tests::run("failpoints-fences", async |folder| {
        let bed = Bed::new(folder, "fences").await?;
        let writers = bed.load().start(&bed.shop.orders, bed.seed).await?;
        bed.die_at(&FENCES).await?;
        bed.ended(writers).await?.repeated()
    })
    .await;
}

/// All rows of some entities go to a topic that does not exist; then it does.
#[tokio::test(flavor = "multi_thread")]
async fn deaths_around_the_quarantine_lose_nothing_and_leave_nothing_in_it() {
    tests::run("failpoints-quarantine", quarantine).await;
}

async fn quarantine(folder: &Folder) -> Result<()> {
    let bed = Bed::new(folder, "quarantine").await?;
    let missing = unique("events.later");
    let poison = Load {
        writers: 1,
        prefix: "poison".to_owned(),
        entities: 3,
        topic: Some(missing.clone()),
        ..bed.load()
    };
    let writers = bed.load().start(&bed.shop.orders, bed.seed).await?;
    let poisoners = poison.clone().start(&bed.shop.orders, bed.seed + 1).await?;
    bed.die_at(&PARKING).await?;
    poisoners.stop().await?;
    let between = bed.ended(writers).await?;
    say(&format!(
        "parked: {} rows, {} repeats",
        between.rows.len(),
        between.verdict.repeats
    ));
    let poisoned = |row: &Row| row.event.entity.starts_with("poison");
    let sql = "SELECT id FROM outbox_relay_quarantine WHERE state = 'frozen' ORDER BY id";
    let kept: Vec<i64> = bed
        .sql
        .query(sql, &[])
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    let rows = databases::outbox(&bed.sql).await?;
    let expected: Vec<i64> = rows
        .iter()
        .filter(|row| poisoned(row))
        .map(|row| row.id)
        .collect();
    // More than go out at once, of each key.
    ensure!(kept.len() > 700, "only {} rows are in quarantine", kept.len());
    ensure!(
        kept == expected,
        "{} rows are in quarantine, and {} belong there",
        kept.len(),
        expected.len()
    );

    let writers = bed.load().start(&bed.shop.orders, bed.seed + 2).await?;
    let poisoners = poison.start(&bed.shop.orders, bed.seed + 3).await?;
    let topic = format!("{missing}={PARTITIONS}");
    bed.shop
        .outbox_relay()
        .arg("create-topics")
        .arg(topic)
        .run_to_end()
        .await?;
    // Once, however often the relay dies: a decision must not get lost.
    let retry = ["quarantine", "retry", "--all"];
    let command = retry.into_iter().fold(bed.shop.outbox_relay(), Builder::arg);
    command.run_to_end().await?;
    bed.die_at(&RELEASE).await?;
    poisoners.stop().await?;
    let left = "SELECT count(*) FROM outbox_relay_quarantine";
    let mut relay = bed.shop.outbox_relay().start().await?;
    wait::until("the quarantine is empty", Duration::from_secs(60), || async {
        Ok((databases::count(&bed.sql, left).await? == 0).then_some(()))
    })
    .await?;
    relay.stop().await?;
    let end = bed.ended(writers).await?;
    let rows: Vec<Row> = databases::outbox(&bed.sql)
        .await?
        .into_iter()
        .filter(poisoned)
        .collect();
    let verdict = check::topic(&rows, &topic::read(&bed.shop.brokers, &missing).await?);
    say(&format!(
        "released: {} rows, {} repeats",
        rows.len(),
        verdict.repeats
    ));
    assert_sound(&verdict.problems);
    end.repeated()
}

/// Rows leave the outbox a second after they are published, tens of thousands of them at once.
#[tokio::test(flavor = "multi_thread")]
async fn deaths_while_rows_are_removed_lose_nothing() {
    tests::run("failpoints-removal", removal).await;
}

async fn removal(folder: &Folder) -> Result<()> {
    const ENTITIES: u32 = 40;
    /// Removed at once, see the relay's retention; and one more batch for each death.
    const BATCH: u32 = 5_000;

    let mut bed = Bed::new(folder, "removal").await?;
    bed.retention = "1s";
    let bulk = format!(
        "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source, payload)
         SELECT gen_random_uuid(), 'test', 'bulk-' || entity, version, 'test.moved', '/test', 'bulk'
           FROM (SELECT entity, version FROM generate_series(1, {ENTITIES}) entity, generate_series(1, {}) version
                  ORDER BY version, entity) rows",
        BATCH * (deaths() + 3) / ENTITIES
    );
    bed.sql.batch_execute(&bulk).await?;
    let writers = Load {
        writers: 2,
        ..bed.load()
    }
    .start(&bed.shop.orders, bed.seed)
    .await?;
    bed.die_at(&REMOVAL).await?;
    let end = bed.ended(writers).await?;
    let left = databases::count(&bed.sql, "SELECT count(*) FROM outbox").await?;
    say(&format!("removal: {left} of {} rows are left", end.rows.len()));
    ensure!(
        (left as usize) < end.rows.len() / 2,
        "rows were not removed: {left} are left"
    );
    Ok(())
}

/// An outbox whose rows are also written to a journal, which keeps them.
struct Bed {
    shop: Shop,
    sql: Client,
    name: &'static str,
    seed: u64,
    retention: &'static str,
}

struct End {
    rows: Vec<Row>,
    verdict: Verdict,
}

impl Bed {
    async fn new(folder: &Folder, name: &'static str) -> Result<Self> {
        let shop = Shop::new(folder).await?;
        let sql = shop.orders.connect().await?;
        writers::prepare(&sql, "outbox").await?;
        sql.batch_execute(
            "CREATE TABLE journal (LIKE outbox);
             CREATE FUNCTION write_journal() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN INSERT INTO journal SELECT * FROM inserted; RETURN NULL; END $$;
             CREATE TRIGGER write_journal AFTER INSERT ON outbox REFERENCING NEW TABLE AS inserted
                 FOR EACH STATEMENT EXECUTE FUNCTION write_journal();",
        )
        .await?;
        Ok(Self {
            shop,
            sql,
            name,
            seed: seed(&format!("relay_failpoints {name}")),
            retention: "forever",
        })
    }

    fn load(&self) -> Load {
        Load {
            pace: Duration::from_millis(15),
            ..Load::default()
        }
    }

    fn relay(&self) -> Builder {
        self.shop
            .outbox_relay()
            .set("outbox.orders.retention", self.retention)
    }

    /// The relay dies at each of the points, so often, and is started again.
    async fn die_at(&self, points: &[(&'static str, u32)]) -> Result<()> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        for (point, passes) in points {
            for death in 0..deaths() {
                let passed = rng.random_range(0..=*passes);
                let action = if passed == 0 {
                    format!("{point}=return")
                } else {
                    format!("{point}={passed}*off->return")
                };
                let mut relay = self.relay().env("FAILPOINTS", &action).start().await?;
                let status = relay
                    .wait(PATIENCE)
                    .await
                    .with_context(|| format!("{action} (death {death})"))?;
                ensure!(
                    status.signal() == Some(SIGABRT),
                    "{action}: the relay ended with {status}"
                );
            }
            let rows = databases::count(&self.sql, "SELECT count(*) FROM journal").await?;
            say(&format!(
                "{}: {} deaths at {point}, {rows} rows so far",
                self.name,
                deaths()
            ));
        }
        Ok(())
    }

    /// Everything written is relayed, and what went to the outbox's topic is as it should be.
    async fn ended(&self, writers: Writers) -> Result<End> {
        let mut relay = self.relay().start().await?;
        writers.stop().await?;
        let sql = "SELECT coalesce((SELECT max(floor) FROM outbox_relay), 0) >= coalesce((SELECT max(id) FROM journal), 0)";
        wait::until("the outbox is published", PATIENCE, || async {
            let done: bool = self.sql.query_one(sql, &[]).await?.get(0);
            Ok(done.then_some(()))
        })
        .await?;
        let status = relay.stop().await?;
        ensure!(status.success(), "the relay ended with {status}");
        let mut rows = databases::outbox_rows(&self.sql, "journal").await?;
        assert_sound(&check::outbox(&rows));
        rows.retain(|row| !row.event.entity.starts_with("poison"));
        let verdict = check::topic(&rows, &topic::read(&self.shop.brokers, &self.shop.topic).await?);
        say(&format!(
            "{}: {} rows, {} repeats",
            self.name,
            rows.len(),
            verdict.repeats
        ));
        assert_sound(&verdict.problems);
        Ok(End { rows, verdict })
    }
}

impl End {
    fn repeated(self) -> Result<()> {
        ensure!(
            self.verdict.repeats > 0,
            "no death came between an acknowledgement and its save"
        );
        Ok(())
    }
}
