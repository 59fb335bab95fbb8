//! Hours of work in minutes: rows come, are published and go, and then the rate is what it was.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use local_stack::wait;

use super::contender::{self, RelayOptions, Running};
use super::outbox::{Outbox, Poison};
use super::{Run, filled};
use crate::report::{Section, number, thousands};
use crate::topics::{self, PARTITIONS};
use crate::ui;

/// Rows that are in the table at a time, published ones included: a quarter of an hour's at [`STEADY`].
const LIVE: u64 = 450_000;
const AT_ONCE: u64 = 10_000;
/// Of the topic through which they go, a partition.
const KEEP: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(120);
/// Rows a second of which the hours are told.
const STEADY: f64 = 500.0;

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let sizes = run.sizes;
    let mut outbox = filled(&run.servers, "churn", sizes.rows, Poison::None).await?;
    let before = run.own_rate("before the churn", &outbox, 0).await?;
    let size_before = state(&outbox).await?;

    let topic = run.topic();
    topics::create(&run.servers.brokers(), &topic, PARTITIONS, Some(KEEP)).await?;
    let mut running = contender::relay(&run.servers, &outbox.url, &topic, &RelayOptions::REMOVING).await?;
    let what = format!("{} rows come and go", thousands(sizes.churn_rows as f64));
    let (seconds, most) = ui::step(
        &what,
        |(seconds, _): &(f64, State)| format!("{} rows/s", thousands(sizes.churn_rows as f64 / seconds)),
        churn(&mut outbox, &mut running, sizes.churn_rows),
    )
    .await?;
    let size_empty = state(&outbox).await?;
    ui::quiet_step("autovacuum", vacuumed(&outbox)).await?;
    let size_after = state(&outbox).await?;
    running.stop().await?;
    run.delete(&[&topic]).await?;

    let floor = outbox.floor().await?;
    ensure!(floor == outbox.rows, "the relay is at {floor} of {}", outbox.rows);
    ui::quiet_step("rows for the rate after it", async {
        outbox.fill(sizes.rows, Poison::None).await?;
        outbox.settle().await
    })
    .await?;
    let after = run.own_rate("after the churn", &outbox, floor).await?;
    let size_refilled = state(&outbox).await?;

    let ratio = before.zip(after).map(|(before, after)| after / before);
    let mut section = Section::new("Churn")
        .note(format!(
            "{} rows were inserted, published and removed in {seconds:.0} s, with autovacuum on: {:.1} hours at {STEADY:.0} rows/s.",
            thousands(sizes.churn_rows as f64),
            sizes.churn_rows as f64 / STEADY / 3600.0
        ))
        .columns(&["", "rows/s", "ratio", "dead rows", "table and indexes, MB"]);
    for (name, rate, ratio, state) in [
        ("before", before, None, size_before),
        ("at most meanwhile", None, None, most),
        ("after, empty", None, None, size_empty),
        ("when autovacuum has been by", None, None, size_after),
        ("after, filled again", after, ratio, size_refilled),
    ] {
        section.row([
            name.to_owned(),
            rate.map_or_else(String::new, thousands),
            ratio.map_or_else(String::new, |ratio| number(Some(ratio), 3)),
            thousands(state.dead),
            thousands(state.megabytes),
        ]);
    }
    run.report.section(section);
    run.report.figure("churn_ratio", ratio);
    run.report.figure(
        "churn_hours_at_500",
        Some(sizes.churn_rows as f64 / STEADY / 3600.0),
    );
    run.report.figure("churn_dead_rows", Some(size_after.dead));
    run.report.figure("churn_size_mb", Some(size_after.megabytes));
    Ok(())
}

/// Inserts rows, never far ahead of the relay, and waits until all are published and removed. Returns how long it took and how
/// large the table was at most.
async fn churn(outbox: &mut Outbox, running: &mut Running, rows: u64) -> Result<(f64, State)> {
    let began = Instant::now();
    let mut most = state(outbox).await?;
    let end = outbox.rows + rows;
    let mut looked = Instant::now();
    while outbox.rows < end {
        outbox.fill(AT_ONCE.min(end - outbox.rows), Poison::None).await?;
        let inserted = outbox.rows;
        removed_to(outbox, inserted.saturating_sub(LIVE)).await?;
        running.check()?;
        if looked.elapsed() > Duration::from_secs(2) {
            looked = Instant::now();
            most = most.or_larger(state(outbox).await?);
        }
    }
    removed_to(outbox, end).await?;
    let seconds = began.elapsed().as_secs_f64();
    most = most.or_larger(state(outbox).await?);
    Ok((seconds, most))
}

/// Waits until rows up to this one are published and removed.
async fn removed_to(outbox: &Outbox, row: u64) -> Result<()> {
    wait::until("rows are published and removed", PATIENCE, async || {
        let sql = "SELECT coalesce(max(removed_to), 0) FROM outbox_relay_removed";
        let removed: i64 = outbox.client.query_one(sql, &[]).await?.get(0);
        Ok((u64::try_from(removed)? >= row).then_some(()))
    })
    .await
}

/// Waits until autovacuum has been by once more.
async fn vacuumed(outbox: &Outbox) -> Result<()> {
    let now: String = outbox
        .client
        .query_one("SELECT clock_timestamp()::text", &[])
        .await?
        .get(0);
    wait::until("autovacuum comes by", PATIENCE, async || {
        let sql = "SELECT FROM pg_stat_user_tables WHERE relname = 'outbox' AND last_autovacuum > $1::text::timestamptz";
        Ok(outbox.client.query_opt(sql, &[&now]).await?.map(drop))
    })
    .await
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct State {
    pub(crate) dead: f64,
    pub(crate) megabytes: f64,
}

impl State {
    fn or_larger(self, other: Self) -> Self {
        Self {
            dead: self.dead.max(other.dead),
            megabytes: self.megabytes.max(other.megabytes),
        }
    }
}

/// Dead rows and size as PostgreSQL's statistics have them.
pub(crate) async fn state(outbox: &Outbox) -> Result<State> {
    let sql = "SELECT n_dead_tup::float8, pg_total_relation_size(relid)::float8 / 1e6
                 FROM pg_stat_user_tables WHERE relname = 'outbox'";
    let row = outbox.client.query_one(sql, &[]).await?;
    Ok(State {
        dead: row.get(0),
        megabytes: row.get(1),
    })
}
