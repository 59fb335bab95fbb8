//! One key in a hundred is poison from its first row on; the others must flow.

use anyhow::Result;

use super::outbox::Poison;
use super::{Run, filled};
use crate::report::{Section, number, thousands};
use crate::stats::median;

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let sizes = run.sizes;
    let poisoned = filled(&run.servers, "poison", sizes.rows, Poison::OneInHundred).await?;
    let good = sizes.rows - sizes.rows.div_ceil(100);
    let mut drains = [Vec::new(), Vec::new()];
    for round in 1..=run.own_runs() {
        let clean = run.take_outbox().await?;
        let clean_drain = run
            .drain(&format!("without poison ({round})"), &clean, 0, sizes.rows)
            .await;
        run.outbox = Some(clean);
        drains[0].push(clean_drain?);
        drains[1].push(
            run.drain(&format!("with poison ({round})"), &poisoned, 0, good)
                .await?,
        );
    }
    let rates = [0, 1].map(|which: usize| median(drains[which].iter().map(|drain| drain.rate)));
    let ratio = rates[0].zip(rates[1]).map(|(clean, poisoned)| poisoned / clean);
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
    section.row([
        "all good".to_owned(),
        thousands(rates[0].unwrap_or_default()),
        String::new(),
    ]);
    section.row([
        "one in a hundred bad".to_owned(),
        thousands(rates[1].unwrap_or_default()),
        number(ratio, 3),
    ]);
    run.report.section(section);
    run.report.figure("poison_ratio", ratio);
    Ok(())
}
