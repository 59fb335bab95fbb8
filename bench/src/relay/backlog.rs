//! The beginning of a deep backlog against a small one.

use anyhow::Result;

use super::outbox::Poison;
use super::{Run, filled};
use crate::report::{Section, number, thousands};
use crate::stats::median;

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let sizes = run.sizes;
    let deep = filled(&run.servers, "deep", sizes.deep_rows, Poison::None).await?;
    let names = ["a small backlog", "a deep backlog"];
    let drains = run.against_backlog(names, &deep, sizes.rows).await?;
    let rates = [0, 1].map(|which: usize| median(drains[which].iter().map(|drain| drain.rate)));
    let peaks = [0, 1].map(|which: usize| median(drains[which].iter().map(|drain| drain.peak_mb)));
    let ratio = rates[0].zip(rates[1]).map(|(small, deep)| deep / small);
    let mut section = Section::new("Deep backlog")
        .note(format!(
            "The first {} rows of each, {} run(s) in turn, medians.",
            thousands(sizes.rows as f64),
            drains[0].len()
        ))
        .columns(&["rows behind", "rows/s", "peak MB", "ratio"]);
    for (rows, rate, peak, ratio) in [
        (sizes.rows, rates[0], peaks[0], None),
        (sizes.deep_rows, rates[1], peaks[1], ratio),
    ] {
        section.row([
            thousands(rows as f64),
            thousands(rate.unwrap_or_default()),
            number(peak, 1),
            number(ratio, 3),
        ]);
    }
    run.report.section(section);
    run.report.figure("deep_backlog_ratio", ratio);
    let peak = peaks[1]
        .into_iter()
        .chain(run.report.get("relay_peak_mb"))
        .fold(0.0, f64::max);
    run.report.figure("relay_peak_mb", Some(peak));
    drop(deep);
    // It takes gigabytes.
    run.servers
        .connect("postgres")
        .await?
        .batch_execute("DROP DATABASE deep WITH (FORCE)")
        .await?;
    Ok(())
}
