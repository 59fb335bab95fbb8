//! `./dev bench relay`: outbox-relay against the limit, Debezium and a polling peer, and against itself in bad circumstances.

mod backlog;
mod churn;
mod compare;
mod contender;
mod drain;
mod idle;
mod latency;
pub(crate) mod limit;
mod outbox;
mod poison;
mod same;
mod tuning;
mod writer;
mod xmin;

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::report::{Output, Report, Section};
use crate::servers::Servers;
use crate::stats::median;
use crate::{released, report, topics, ui};
use contender::{RelayOptions, Who};
use drain::Drain;
use outbox::{Outbox, Poison};
use tuning::Tuning;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    output: Output,
    /// Rows of a backlog; Debezium and the peer get a part of them
    #[arg(long, value_parser = clap::value_parser!(u64).range(10_000..=100_000_000))]
    rows: Option<u64>,
    /// How often each drain and each latency is measured; medians are reported
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: Option<u32>,
    /// Rows of the deep backlog
    #[arg(long, value_parser = clap::value_parser!(u64).range(10_000..=1_000_000_000))]
    deep_rows: Option<u64>,
    /// Rows that come and go before the rate is measured again
    #[arg(long, value_parser = clap::value_parser!(u64).range(10_000..=10_000_000_000))]
    churn_rows: Option<u64>,
    /// Only these parts, separated by commas
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Only these contenders, separated by commas, in the parts that compare them
    #[arg(long, value_enum, value_delimiter = ',')]
    contenders: Vec<Who>,
    /// Small sizes, one run, no tuning: whether it works, in two to four minutes; the figures say little
    #[arg(long)]
    quick: bool,
    /// Writers send NOTIFY after each commit, on a connection of its own
    #[arg(long)]
    notify: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Debezium's settings are tried, and the best ones used
    Tuning,
    /// A backlog is drained, by every contender
    Drain,
    /// From commit to a consumer at 500 rows a second, relay and Debezium
    Latency,
    /// What an idle relay costs
    Idle,
    /// A backlog of ten million rows
    Backlog,
    /// A transaction that holds its snapshot while rows come and go
    Xmin,
    /// One key in a hundred is poison
    Poison,
    /// What the outbox costs its writers
    Writer,
    /// Millions of rows come, are published and go
    Churn,
}

impl Part {
    const ALL: [Self; 9] = [
        Self::Tuning,
        Self::Drain,
        Self::Latency,
        Self::Idle,
        Self::Backlog,
        Self::Xmin,
        Self::Poison,
        Self::Writer,
        Self::Churn,
    ];
}

/// How much of everything.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) rows: u64,
    pub(crate) debezium_rows: u64,
    pub(crate) peer_rows: u64,
    pub(crate) deep_rows: u64,
    pub(crate) churn_rows: u64,
    pub(crate) runs: u32,
    /// Of steady load that is measured, and before it.
    pub(crate) latency: Duration,
    pub(crate) warm_up: Duration,
    pub(crate) debezium_warm_up: Duration,
    pub(crate) idle: Duration,
    pub(crate) hold: Duration,
    pub(crate) pgbench: Duration,
}

const SECOND: Duration = Duration::from_secs(1);

impl Sizes {
    fn of(options: &Options) -> Self {
        let mut sizes = if options.quick {
            Self {
                rows: 200_000,
                debezium_rows: 60_000,
                peer_rows: 5_000,
                deep_rows: 400_000,
                churn_rows: 300_000,
                runs: 1,
                latency: 3 * SECOND,
                warm_up: SECOND,
                debezium_warm_up: 2 * SECOND,
                idle: 3 * SECOND,
                hold: 5 * SECOND,
                pgbench: 2 * SECOND,
            }
        } else {
            Self {
                rows: 1_500_000,
                debezium_rows: 600_000,
                peer_rows: 30_000,
                deep_rows: 10_000_000,
                churn_rows: 20_000_000,
                runs: 5,
                latency: 20 * SECOND,
                warm_up: 5 * SECOND,
                debezium_warm_up: 20 * SECOND,
                idle: 20 * SECOND,
                hold: 180 * SECOND,
                pgbench: 10 * SECOND,
            }
        };
        if let Some(rows) = options.rows {
            sizes.rows = rows;
            sizes.debezium_rows = (rows * 2 / 5).max(10_000);
            sizes.peer_rows = (rows / 50).max(1_000);
        }
        sizes.runs = options.runs.unwrap_or(sizes.runs);
        sizes.deep_rows = options.deep_rows.unwrap_or(sizes.deep_rows).max(sizes.rows);
        sizes.churn_rows = options.churn_rows.unwrap_or(sizes.churn_rows);
        sizes
    }
}

/// What every result has.
const KEYS: [&str; 20] = [
    "limit_rate",
    "relay_rate",
    "relay_debezium_profile_rate",
    "debezium_rate",
    "peer_rate",
    "relay_p50_ms",
    "relay_p99_ms",
    "debezium_p50_ms",
    "debezium_p99_ms",
    "relay_peak_mb",
    "debezium_peak_mb",
    "relay_cpu_s_per_million",
    "debezium_cpu_s_per_million",
    "relay_idle_cpu_percent",
    "deep_backlog_ratio",
    "held_xmin_ratio",
    "poison_ratio",
    "writer_cost_ratio",
    "churn_ratio",
    "lz4_ratio",
];

/// A run under way.
pub(crate) struct Run {
    pub(crate) servers: Servers,
    pub(crate) sizes: Sizes,
    pub(crate) report: Report,
    /// Of Debezium.
    pub(crate) tuning: Tuning,
    pub(crate) notify: bool,
    contenders: Vec<Who>,
    topics: u32,
    outbox: Option<Outbox>,
}

impl Run {
    /// The name of the next topic.
    pub(crate) fn topic(&mut self) -> String {
        self.topics += 1;
        format!("bench-{}", self.topics)
    }

    pub(crate) async fn delete(&self, names: &[&str]) -> Result<()> {
        topics::delete(&self.servers.brokers(), names).await
    }

    /// The backlog that several parts drain; put back what is taken.
    pub(crate) async fn take_outbox(&mut self) -> Result<Outbox> {
        match self.outbox.take() {
            Some(outbox) => Ok(outbox),
            None => filled(&self.servers, "bench", self.sizes.rows, Poison::None).await,
        }
    }

    /// A drain of the relay with its default headers, from behind row id `floor`, until `records` are on a topic.
    pub(crate) async fn drain(
        &mut self,
        what: &str,
        outbox: &Outbox,
        floor: u64,
        records: u64,
    ) -> Result<Drain> {
        let topic = self.topic();
        let drain = ui::step(what, tuning::drain_outcome, async {
            outbox.begin_at(floor).await?;
            let start = contender::relay(&self.servers, &outbox.url, &topic, &RelayOptions::DEFAULT);
            drain::measure(&self.servers, &topic, records, start).await
        })
        .await?;
        self.delete(&[&topic]).await?;
        Ok(drain)
    }

    /// The median rate of draining what is above `floor`, measured as often as the relay is against itself.
    pub(crate) async fn own_rate(&mut self, name: &str, outbox: &Outbox, floor: u64) -> Result<Option<f64>> {
        let rows = self.sizes.rows;
        let mut rates = Vec::new();
        for round in 1..=self.own_runs() {
            let drain = self
                .drain(&format!("{name} ({round})"), outbox, floor, rows)
                .await?;
            rates.push(drain.rate);
        }
        Ok(median(rates))
    }

    /// Drains of the backlog in turn with drains of another outbox, until `records` of that are on a topic.
    pub(crate) async fn against_backlog(
        &mut self,
        names: [&str; 2],
        other: &Outbox,
        records: u64,
    ) -> Result<[Vec<Drain>; 2]> {
        let mut drains = [Vec::new(), Vec::new()];
        for round in 1..=self.own_runs() {
            let [ours, theirs] = names.map(|name| format!("{name} ({round})"));
            let backlog = self.take_outbox().await?;
            let drain = self.drain(&ours, &backlog, 0, self.sizes.rows).await;
            self.outbox = Some(backlog);
            drains[0].push(drain?);
            drains[1].push(self.drain(&theirs, other, 0, records).await?);
        }
        Ok(drains)
    }

    /// Whether it is among those who are compared.
    pub(crate) fn takes_part(&self, who: Who) -> bool {
        self.contenders.is_empty() || self.contenders.contains(&who)
    }

    /// How often the relay is measured against itself.
    pub(crate) fn own_runs(&self) -> u32 {
        self.sizes.runs.min(3)
    }
}

/// A new outbox with so many rows.
async fn filled(servers: &Servers, database: &str, rows: u64, poison: Poison) -> Result<Outbox> {
    let what = format!(
        "{} rows into the outbox {database}",
        report::thousands(rows as f64)
    );
    ui::quiet_step(&what, async {
        let mut outbox = Outbox::create(servers, database).await?;
        outbox.fill(rows, poison).await?;
        outbox.settle().await?;
        Ok(outbox)
    })
    .await
}

pub(crate) async fn run(options: Options) -> Result<()> {
    ensure!(
        std::path::Path::new("bench/peers").exists(),
        "this is not the workspace's folder; run it by ./dev bench relay"
    );
    released::check(&["outbox-relay"])?;
    let servers = ui::quiet_step("PostgreSQL and Kafka", Servers::start()).await?;
    let machine = report::machine(&servers.connect("postgres").await?).await?;
    let mut run = Run {
        servers,
        sizes: Sizes::of(&options),
        report: Report::new("relay", &KEYS),
        tuning: Tuning::known_best(),
        notify: options.notify,
        contenders: options.contenders.clone(),
        topics: 0,
        outbox: None,
    };
    let done = ui::unless_ended(parts(&mut run, &options)).await;
    let Run { servers, report, .. } = run;
    servers.stop().await?;
    done?;
    report.tell(&machine, &options.output)
}

async fn parts(run: &mut Run, options: &Options) -> Result<()> {
    for part in Part::ALL {
        let chosen = match options.only.as_slice() {
            [] => !(options.quick && part == Part::Tuning),
            only => only.contains(&part),
        };
        if !chosen {
            continue;
        }
        ui::heading(&format!("{part:?}").to_lowercase());
        match part {
            Part::Tuning => tuning::run(run).await?,
            Part::Drain => compare::run(run).await?,
            Part::Latency => latency::run(run).await?,
            Part::Idle => idle::run(run).await?,
            Part::Backlog => backlog::run(run).await?,
            Part::Xmin => xmin::run(run).await?,
            Part::Poison => poison::run(run).await?,
            Part::Writer => writer::run(run).await?,
            Part::Churn => churn::run(run).await?,
        }
    }
    let mut settings = Servers::settings();
    settings.push(format!("Debezium: {}", run.tuning.settings()));
    settings.push(format!("{:?}", run.sizes));
    run.report.section(Section::settings(settings));
    Ok(())
}
