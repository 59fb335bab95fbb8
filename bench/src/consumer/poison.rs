//! One key in a hundred is poison from its first event on; the others must flow.

use anyhow::{Result, ensure};

use super::Run;
use super::history::Poison;
use super::project::outcome;
use crate::report::{Section, thousands};
use crate::stats::median;
use crate::ui;

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let good = run.backlog().await?;
    let poisoned = run.published("poisoned", Poison::OneInHundred).await?;
    let names = ["all good", "one in a hundred bad"];
    let mut rates = [Vec::new(), Vec::new()];
    for round in 1..=run.sizes.runs {
        for (which, backlog) in [&good, &poisoned].into_iter().enumerate() {
            let projection = run.empty(backlog).await?;
            let what = format!("{} ({round}/{})", names[which], run.sizes.runs);
            let drain = ui::step(what, outcome, projection.drain(&run.servers)).await?;
            rates[which].push(drain.rate);
            let parked: i64 = run
                .servers
                .connect(&projection.database)
                .await?
                .query_one("SELECT count(*) FROM parked_records", &[])
                .await?
                .get(0);
            ensure!(
                parked.unsigned_abs() <= backlog.events - backlog.good,
                "{parked} records are parked, and {} are bad",
                backlog.events - backlog.good
            );
            run.remove(&projection).await?;
        }
    }
    let rates = rates.map(median);
    let mut section = Section::new("Poison")
        .note(format!(
            "The first event of one order in a hundred, and of one payment in a hundred, has a payload that cannot be read: {} of {} events \
             park. Rate of those that are applied, {} run(s) in turn, medians.",
            thousands((poisoned.events - poisoned.good) as f64),
            thousands(poisoned.events as f64),
            run.sizes.runs
        ))
        .columns(&["keys", "events/s", "ratio"]);
    let ratio = section.compare(names, rates);
    run.report.section(section);
    run.report.figure("poison_ratio", ratio);
    Ok(())
}
