//! One key in a hundred is poison from its first row on; the others must flow.

use anyhow::Result;

use super::outbox::Poison;
use super::{Run, filled};
use crate::report::{Section, thousands};
use crate::stats::median;

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let sizes = run.sizes;
    let poisoned = filled(&run.servers, "poison", sizes.rows, Poison::OneInHundred).await?;
    let good = sizes.rows - sizes.rows.div_ceil(100);
    let names = ["without poison", "with poison"];
    let drains = run.against_backlog(names, &poisoned, good).await?;
    let rates = drains
        .each_ref()
        .map(|drains| median(drains.iter().map(|drain| drain.rate)));
    let quarantined: i64 = poisoned
        .client
        .query_one("SELECT count(*) FROM outbox_relay_quarantine", &[])
        .await?
        .get(0);
    let mut section = Section::new("Poison")
        .note(format!(
            "The first row of one key in a hundred names no topic that could be. Rate of those that are published, {} run(s) in \
             turn, medians. {} rows ended in the quarantine.",
            drains[0].len(),
            thousands(quarantined as f64)
        ))
        .columns(&["keys", "rows/s", "ratio"]);
    let ratio = section.compare(["all good", "one in a hundred bad"], rates);
    run.report.section(section);
    run.report.figure("poison_ratio", ratio);
    Ok(())
}
