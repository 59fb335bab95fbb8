//! `./dev bench consumer`: events into the read model of orders and its rebuild, against the limits of Kafka's and of PostgreSQL's side.

mod backlog;
mod copy;
mod history;
mod latency;
mod poison;
mod project;
mod projection;
mod raw;
mod rebuild;

use std::time::Duration;

use anyhow::Result;
use local_stack::shop::{ORDER_QUERY_SVC, ORDER_SVC, OUTBOX_RELAY};

use crate::report::{Output, Report, Section, thousands};
use crate::servers::Servers;
use crate::{released, report, ui};
use backlog::Backlog;
use history::Poison;
use projection::Projection;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    output: Output,
    /// Orders whose histories are the backlog; each has 6.7 events
    #[arg(long, value_parser = clap::value_parser!(u64).range(1_000..=10_000_000))]
    orders: Option<u64>,
    /// How often each is measured; medians are reported
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: Option<u32>,
    /// Only these parts, separated by commas
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Small sizes, one run: whether it works, in about a minute; the figures say little
    #[arg(long)]
    quick: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// A plain consumer that only counts
    Raw,
    /// A backlog into the views
    Project,
    /// The views built anew beside the live ones
    Rebuild,
    /// One key in a hundred is poison
    Poison,
    /// The views' rows copied into tables like theirs
    Copy,
    /// From PlaceOrder's answer to the view at 500 orders a second
    Latency,
}

impl Part {
    const ALL: [Self; 6] = [
        Self::Raw,
        Self::Project,
        Self::Rebuild,
        Self::Poison,
        Self::Copy,
        Self::Latency,
    ];
}

/// How much of everything.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    orders: u64,
    runs: u32,
    /// Of steady load that is measured, and before it: a fresh broker compiles its code for half a minute.
    latency: Duration,
    warm_up: Duration,
}

const SECOND: Duration = Duration::from_secs(1);

impl Sizes {
    fn of(options: &Options) -> Self {
        let sizes = if options.quick {
            Self {
                orders: 20_000,
                runs: 1,
                latency: 5 * SECOND,
                warm_up: 3 * SECOND,
            }
        } else {
            Self {
                orders: 150_000,
                runs: 3,
                latency: 20 * SECOND,
                warm_up: 40 * SECOND,
            }
        };
        Self {
            orders: options.orders.unwrap_or(sizes.orders),
            runs: options.runs.unwrap_or(sizes.runs),
            ..sizes
        }
    }
}

/// What every result has.
const KEYS: [&str; 13] = [
    "project_rate",
    "rebuild_rate",
    "raw_consumer_rate",
    "copy_rate",
    "view_p50_ms",
    "view_p99_ms",
    "poison_ratio",
    "project_cpu_s_per_million",
    "project_postgres_cpu_s_per_million",
    "rebuild_cpu_s_per_million",
    "rebuild_postgres_cpu_s_per_million",
    "project_peak_mb",
    "rebuild_peak_mb",
];

/// A run under way.
struct Run {
    servers: Servers,
    sizes: Sizes,
    report: Report,
    backlog: Option<Backlog>,
    projected: Option<Projection>,
    databases: u32,
}

impl Run {
    /// What most parts consume, without poison.
    async fn backlog(&mut self) -> Result<Backlog> {
        if let Some(backlog) = &self.backlog {
            return Ok(backlog.clone());
        }
        let backlog = self.published("good", Poison::None).await?;
        self.backlog = Some(backlog.clone());
        Ok(backlog)
    }

    async fn published(&self, name: &str, poison: Poison) -> Result<Backlog> {
        let what = format!("the histories of {} orders", thousands(self.sizes.orders as f64));
        let outcome = |backlog: &Backlog| format!("{} events", thousands(backlog.events as f64));
        let work = Backlog::publish(&self.servers, name, self.sizes.orders, poison);
        ui::step(what, outcome, work).await
    }

    /// A projection with nothing in it yet.
    async fn empty(&mut self, backlog: &Backlog) -> Result<Projection> {
        self.databases += 1;
        Projection::create(&self.servers, &format!("view{}", self.databases), backlog).await
    }

    /// One that has worked off the backlog.
    async fn projected(&mut self) -> Result<Projection> {
        if let Some(projection) = &self.projected {
            return Ok(projection.clone());
        }
        let backlog = self.backlog().await?;
        let projection = self.empty(&backlog).await?;
        ui::quiet_step("the backlog into views", projection.drain(&self.servers)).await?;
        self.projected = Some(projection.clone());
        Ok(projection)
    }

    /// It is not needed any more, and takes much room.
    async fn remove(&self, projection: &Projection) -> Result<()> {
        let client = self.servers.connect("postgres").await?;
        let drop = format!("DROP DATABASE {} WITH (FORCE)", projection.database);
        Ok(client.batch_execute(&drop).await?)
    }
}

pub(crate) async fn run(options: Options) -> Result<()> {
    released::check(&[ORDER_QUERY_SVC, ORDER_SVC, OUTBOX_RELAY])?;
    let servers = ui::quiet_step("PostgreSQL and Kafka", Servers::start()).await?;
    let machine = report::machine(&servers.connect("postgres").await?).await?;
    let mut run = Run {
        servers,
        sizes: Sizes::of(&options),
        report: Report::new("consumer", &KEYS),
        backlog: None,
        projected: None,
        databases: 0,
    };
    let done = ui::unless_ended(parts(&mut run, &options)).await;
    let Run { servers, report, .. } = run;
    servers.stop().await?;
    done?;
    report.tell(&machine, &options.output)
}

async fn parts(run: &mut Run, options: &Options) -> Result<()> {
    for part in Part::ALL {
        if !options.only.is_empty() && !options.only.contains(&part) {
            continue;
        }
        ui::heading(&format!("{part:?}").to_lowercase());
        match part {
            Part::Raw => raw::run(run).await?,
            Part::Project => project::run(run).await?,
            Part::Rebuild => rebuild::run(run).await?,
            Part::Poison => poison::run(run).await?,
            Part::Copy => copy::run(run).await?,
            Part::Latency => latency::run(run).await?,
        }
    }
    let mut settings = Servers::settings();
    settings.push(format!("{:?}", run.sizes));
    run.report.section(Section::settings(settings));
    Ok(())
}
