//! A backlog of histories into empty views.

use anyhow::Result;

use super::Run;
use crate::drain::Drain;
use crate::report::{Section, number, thousands};
use crate::stats::median;
use crate::ui;

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let backlog = run.backlog().await?;
    let mut drains: Vec<Drain> = Vec::new();
    for round in 1..=run.sizes.runs {
        let projection = run.empty(&backlog).await?;
        let what = format!("order-query-svc ({round}/{})", run.sizes.runs);
        drains.push(ui::step(what, outcome, projection.drain(&run.servers)).await?);
        if let Some(former) = run.projected.replace(projection) {
            run.remove(&former).await?;
        }
    }
    let of = |value: fn(&Drain) -> f64| median(drains.iter().map(value));
    let rate = of(|drain| drain.rate);
    let peak = drains.iter().map(|drain| drain.peak_mb).fold(0.0, f64::max);
    let mut section = Section::new("A backlog into the views")
        .note(format!(
            "order-query-svc with its default configuration applies {} events of {} orders to empty tables. The rate is that between a \
             tenth and nine tenths of the events, by what the process counts as applied. {} run(s), medians.",
            thousands(backlog.events as f64),
            thousands(run.sizes.orders as f64),
            drains.len()
        ))
        .columns(&[
            "events/s",
            "first to last, events/s",
            "CPU s per million",
            "PostgreSQL's",
            "per cent of a core: svc, PostgreSQL, Kafka",
            "peak MB",
        ]);
    let shares = [0, 1, 2].map(|party: usize| median(drains.iter().map(|drain| drain.shares[party])));
    section.row([
        thousands(rate.unwrap_or_default()),
        thousands(of(|drain| drain.whole_rate).unwrap_or_default()),
        number(of(|drain| drain.cpu_s_per_million), 2),
        number(of(|drain| drain.postgres_cpu_s_per_million), 2),
        shares.map(|share| number(share, 0)).join(", "),
        number(Some(peak), 0),
    ]);
    run.report.section(section);
    run.report.figure("project_rate", rate);
    run.report
        .figure("project_cpu_s_per_million", of(|drain| drain.cpu_s_per_million));
    run.report.figure(
        "project_postgres_cpu_s_per_million",
        of(|drain| drain.postgres_cpu_s_per_million),
    );
    run.report.figure("project_peak_mb", Some(peak));
    Ok(())
}

pub(crate) fn outcome(drain: &Drain) -> String {
    format!(
        "{} events/s, {:.1} + {:.1} CPU s per million",
        thousands(drain.rate),
        drain.cpu_s_per_million,
        drain.postgres_cpu_s_per_million
    )
}
