//! The views built anew beside the live ones, and swapped.

use anyhow::Result;

use super::Run;
use super::projection::Rebuilt;
use crate::report::{Section, number, thousands};
use crate::stats::median;
use crate::ui;

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let projection = run.projected().await?;
    let mut rebuilt: Vec<Rebuilt> = Vec::new();
    for round in 1..=run.sizes.runs {
        let what = format!("rebuild ({round}/{})", run.sizes.runs);
        rebuilt.push(ui::step(what, outcome, projection.rebuild(&run.servers)).await?);
    }
    let of = |value: fn(&Rebuilt) -> f64| median(rebuilt.iter().map(value));
    let rate = of(|rebuilt| rebuilt.rate);
    let peak = rebuilt.iter().map(|rebuilt| rebuilt.peak_mb).fold(0.0, f64::max);
    let mut section = Section::new("Rebuild")
        .note(format!(
            "order-query-svc rebuild over the same {} events, of a live generation that is idle. The rate is over all of it: tables, join, \
             apply, swap, removal of the old marks. Afterwards the views, the payments, the marks and what is parked are the same as before, \
             row for row. {} run(s), medians.",
            thousands(projection.backlog.events as f64),
            rebuilt.len()
        ))
        .columns(&[
            "events/s",
            "CPU s per million",
            "PostgreSQL's",
            "per cent of a core: svc, PostgreSQL, Kafka",
            "live held up, ms",
            "peak MB",
        ]);
    let shares = [0, 1, 2].map(|party: usize| median(rebuilt.iter().map(|rebuilt| rebuilt.shares[party])));
    section.row([
        thousands(rate.unwrap_or_default()),
        number(of(|rebuilt| rebuilt.cpu_s_per_million), 2),
        number(of(|rebuilt| rebuilt.postgres_cpu_s_per_million), 2),
        shares.map(|share| number(share, 0)).join(", "),
        number(of(|rebuilt| rebuilt.swap_ms), 0),
        number(Some(peak), 0),
    ]);
    run.report.section(section);
    run.report.figure("rebuild_rate", rate);
    run.report.figure(
        "rebuild_cpu_s_per_million",
        of(|rebuilt| rebuilt.cpu_s_per_million),
    );
    run.report.figure(
        "rebuild_postgres_cpu_s_per_million",
        of(|rebuilt| rebuilt.postgres_cpu_s_per_million),
    );
    run.report.figure("rebuild_peak_mb", Some(peak));
    Ok(())
}

fn outcome(rebuilt: &Rebuilt) -> String {
    format!(
        "{} events/s, {:.1} + {:.1} CPU s per million",
        thousands(rebuilt.rate),
        rebuilt.cpu_s_per_million,
        rebuilt.postgres_cpu_s_per_million
    )
}
