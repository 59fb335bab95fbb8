//! A transaction that holds its snapshot for minutes: nothing that is removed or overwritten meanwhile can be cleaned up.

use std::time::{Duration, Instant};

use anyhow::Result;
use local_stack::wait;

use super::contender::{self, RelayOptions};
use super::outbox::Poison;
use super::{Run, churn, filled};
use crate::report::{Section, thousands};
use crate::topics::{self, PARTITIONS};
use crate::ui;

/// Rows a second that come and go.
const CHURN: u64 = 5_000;
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let sizes = run.sizes;
    let mut outbox = filled(&run.servers, "xmin", sizes.rows, Poison::None).await?;
    let before = run.own_rate("before", &outbox, 0).await?;
    let holder = run.servers.connect("xmin").await?;
    holder
        .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        .await?;
    let topic = run.topic();
    topics::create(&run.servers.brokers(), &topic, PARTITIONS, None).await?;
    let mut running = contender::relay(&run.servers, &outbox.url, &topic, &RelayOptions::REMOVING).await?;
    let what = format!("{:?} of churn while a snapshot is held", sizes.hold);
    ui::quiet_step(&what, async {
        let began = Instant::now();
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        while began.elapsed() < sizes.hold {
            ticks.tick().await;
            outbox.fill(CHURN / 5, Poison::None).await?;
            running.check()?;
        }
        wait::until("everything is published", PATIENCE, async || {
            Ok((outbox.floor().await? >= outbox.rows).then_some(()))
        })
        .await
    })
    .await?;
    running.stop().await?;
    run.delete(&[&topic]).await?;
    let dead = churn::state(&outbox).await?;
    let floor = outbox.rows;
    ui::quiet_step("rows for the rate after it", async {
        outbox.fill(sizes.rows, Poison::None).await?;
        outbox.settle().await
    })
    .await?;
    let held = run.own_rate("with the snapshot held", &outbox, floor).await?;
    holder.batch_execute("ROLLBACK").await?;
    let mut section = Section::new("A snapshot that is held")
        .note(format!(
            "A REPEATABLE READ transaction stays open while {} rows/s come, are published and removed for {:?}; then the same \
             drain as before it, with the transaction still open. By then {} dead rows could not be cleaned up.",
            thousands(CHURN as f64),
            sizes.hold,
            thousands(dead.dead)
        ))
        .columns(&["", "rows/s", "ratio"]);
    let ratio = section.compare(["before", "held"], [before, held]);
    run.report.section(section);
    run.report.figure("held_xmin_ratio", ratio);
    Ok(())
}
