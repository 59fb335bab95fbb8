//! The drain of a backlog by every contender, in turn and several times.

use anyhow::{Context as _, Result};

use super::contender::{self, DebeziumOutbox, RelayOptions, Watermill, Who};
use super::drain::{self, Drain};
use super::outbox::Outbox;
use super::tuning::drain_outcome;
use super::{Run, outbox, same};
use crate::report::{Section, number, thousands};
use crate::stats::median;
use crate::{topics, ui};

/// The outboxes of all.
struct Outboxes {
    ours: Outbox,
    debezium: DebeziumOutbox,
    /// Built with Go, where it takes part.
    watermill: Option<Watermill>,
}

fn rows(who: Who, run: &Run) -> u64 {
    match who {
        Who::Limit | Who::Relay | Who::OneHeader => run.sizes.rows,
        Who::Debezium => run.sizes.debezium_rows,
        Who::Peer => run.sizes.peer_rows,
    }
}

async fn drain(run: &Run, outboxes: &Outboxes, who: Who, topic: &str) -> Result<Drain> {
    let (servers, rows) = (&run.servers, rows(who, run));
    let Outboxes {
        ours,
        debezium,
        watermill,
    } = outboxes;
    match who {
        Who::Limit => {
            let start = async { contender::limit(servers, &ours.url, topic) };
            drain::measure(servers, topic, rows, start).await
        }
        Who::Relay | Who::OneHeader => {
            let options = match who {
                Who::Relay => RelayOptions::DEFAULT,
                _ => RelayOptions::ONE_HEADER,
            };
            ours.begin_at(0).await?;
            let start = contender::relay(servers, &ours.url, topic, &options);
            drain::measure(servers, topic, rows, start).await
        }
        Who::Debezium => {
            debezium.reset().await?;
            outbox::fill_debezium(&debezium.client, rows).await?;
            let start = debezium.start(servers, topic, &run.tuning);
            drain::measure(servers, topic, rows, start).await
        }
        Who::Peer => {
            let watermill = watermill.as_ref().context("Watermill was not built")?;
            outbox::fill_watermill(&watermill.client, rows).await?;
            let start = async { watermill.start(servers, topic) };
            drain::measure(servers, topic, rows, start).await
        }
    }
}

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let outboxes = Outboxes {
        debezium: DebeziumOutbox::create(&run.servers, "debezium").await?,
        watermill: match run.takes_part(Who::Peer) {
            true => Some(ui::quiet_step("Watermill, built", Watermill::create(&run.servers)).await?),
            false => None,
        },
        ours: run.take_outbox().await?,
    };
    let row_bytes = outboxes.ours.row_bytes().await?;
    let mut drains: [Vec<Drain>; 5] = Default::default();
    let mut published = None;
    let runs = run.sizes.runs;
    for round in 1..=runs {
        let topics = Who::ALL.map(|_| run.topic());
        let mut used = Vec::new();
        // Nobody always comes first, or behind the same one.
        for turn in 0..Who::ALL.len() {
            let position = (turn + round as usize - 1) % Who::ALL.len();
            let who = Who::ALL[position];
            if !run.takes_part(who) {
                continue;
            }
            used.push(topics[position].as_str());
            let what = format!("{} ({round}/{runs})", who.name());
            let work = drain(run, &outboxes, who, &topics[position]);
            drains[position].push(ui::step(what, drain_outcome, work).await?);
        }
        if published.is_none() && run.takes_part(Who::Limit) && run.takes_part(Who::Relay) {
            let brokers = run.servers.brokers();
            let check = same::check(&brokers, &topics[0], &topics[1], run.sizes.rows);
            let shape = ui::quiet_step("the limit's records are the relay's", check).await?;
            let bytes = topics::bytes_on_disk(run.servers.kafka.data(), &topics[1])?;
            published = Some((shape, shape.bytes * run.sizes.rows as f64 / bytes as f64));
        }
        run.delete(&used).await?;
    }
    run.outbox = Some(outboxes.ours);

    let mut section = Section::new("Drain of a backlog")
        .note(format!(
            "{runs} run(s) in turn, medians; fresh topics of {} partitions, nobody consuming. Rows/s: between a tenth and nine tenths of \
             the records on the broker. Whole: from the first append to the last; s from start: from the start of the process to the \
             last append. Shares: per cent of a core during the drain.",
            topics::PARTITIONS
        ))
        .columns(&[
            "contender",
            "rows",
            "rows/s",
            "least – most",
            "of the limit",
            "times Debezium",
            "whole, rows/s",
            "s from start",
            "CPU s per million",
            "peak MB",
            "share of it",
            "of PostgreSQL",
            "of the broker",
        ]);
    if let Some((shape, lz4)) = published {
        section = section.note(format!(
            "A row has {row_bytes:.0} bytes as stored; its record {:.0} bytes with {:.0} headers, and lz4 makes {lz4:.2} times less of it.",
            shape.bytes, shape.headers
        ));
        run.report.figure("lz4_ratio", Some(lz4));
    }
    let rate = |drains: &[Drain]| median(drains.iter().map(|drain| drain.rate));
    for (who, own) in Who::ALL.into_iter().zip(&drains) {
        if own.is_empty() {
            continue;
        }
        let of = |value: fn(&Drain) -> f64| median(own.iter().map(value));
        let ratio = |other: Who| Some(rate(own)? / rate(&drains[other as usize])?);
        let least = own.iter().map(|drain| drain.rate).fold(f64::INFINITY, f64::min);
        let most = own.iter().map(|drain| drain.rate).fold(0.0, f64::max);
        let peak = own.iter().map(|drain| drain.peak_mb).fold(0.0, f64::max);
        section.row([
            who.name(),
            thousands(rows(who, run) as f64),
            rate(own).map_or_else(String::new, thousands),
            format!("{} – {}", thousands(least), thousands(most)),
            number(ratio(Who::Limit), 2),
            number(ratio(Who::Debezium), 2),
            of(|drain| drain.whole_rate).map_or_else(String::new, thousands),
            number(of(|drain| drain.seconds), 1),
            number(of(|drain| drain.cpu_s_per_million), 2),
            number(Some(peak), 1),
            number(of(|drain| drain.shares[0]), 0),
            number(of(|drain| drain.shares[1]), 0),
            number(of(|drain| drain.shares[2]), 0),
        ]);
        let key = who.key();
        let cpu = of(|drain| drain.cpu_s_per_million);
        run.report.figure(&format!("{key}_rate"), rate(own));
        run.report
            .figure(&format!("{key}_whole_rate"), of(|drain| drain.whole_rate));
        run.report.figure(&format!("{key}_cpu_s_per_million"), cpu);
        run.report.figure(&format!("{key}_peak_mb"), Some(peak));
    }
    run.report.section(section);
    Ok(())
}
