//! `./dev demo`: from nothing to a reconciled table.

use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use local_stack::child::{self, Launch};
use local_stack::shop::{self, Plan};
use local_stack::{Kafka, Postgres, Shop, paths, postgres};
use tokio::sync::watch;

use crate::background::asked_to_end;
use crate::measure::{Message, Messages, Progress, Report};
use crate::{build, chaos, ui};

/// In chaos, the load is spread over at least this long, so that the kills land within it.
const CHAOS_LOAD_SECONDS: f64 = 10.0;
/// Otherwise a load that is small enough comes at a rate at which latencies say something; a large one as it can.
const ORDERS_PER_SECOND: f64 = 100.0;
const LONGEST_PACED_LOAD_SECONDS: f64 = 10.0;

/// In chaos, a relay that takes over waits so long at most, and there are several takeovers within the load.
const CHAOS_LEASE: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many orders to place
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    orders: u32,
    /// Makes the same orders again; chosen at random otherwise
    #[arg(long)]
    seed: Option<u64>,
    /// Print the result as one JSON object on the last line
    #[arg(long)]
    json: bool,
    /// Kill the relay and the projection with SIGKILL several times during the run
    #[arg(long)]
    chaos: bool,
    /// Keep databases, topics and logs of this run
    #[arg(long)]
    keep: bool,
    /// Take the programs as they were built last
    #[arg(long)]
    no_build: bool,
}

pub(crate) async fn run(options: Options) -> Result<()> {
    tokio::select! {
        result = try_run(options) => result,
        // Whatever runs is dropped here, and with that killed.
        asked = asked_to_end() => {
            asked?;
            bail!("interrupted; everything is stopped");
        }
    }
}

async fn try_run(options: Options) -> Result<()> {
    build::install_missing().await?;
    if !options.no_build {
        build::processes().await?;
    }

    let folder = RunFolder::create(options.keep)?;
    let outcome = in_folder(&options, folder.path()).await;
    match outcome {
        Ok(report) => finish(&options, &folder, &report),
        Err(error) => {
            folder.preserve();
            Err(error.context(format!(
                "the demo broke down; logs are in {}",
                folder.path().display()
            )))
        }
    }
}

fn finish(options: &Options, folder: &RunFolder, report: &Report) -> Result<()> {
    for problem in &report.problems {
        eprintln!("  DOES NOT FIT: {problem}");
    }
    if options.json {
        eprintln!("\n{}\n", report.figures.table());
        println!("{}", serde_json::to_string(&report.figures)?);
    } else {
        println!("\n{}\n", report.figures.table());
    }
    if !report.figures.reconciled {
        folder.preserve();
        bail!(
            "it does not reconcile; databases, topics and logs are in {}",
            folder.path().display()
        );
    }
    if options.keep {
        eprintln!("Everything of this run is kept in {}", folder.path().display());
    }
    Ok(())
}

async fn in_folder(options: &Options, folder: &Path) -> Result<Report> {
    let (mut postgres, mut kafka) = tokio::try_join!(
        ui::step("PostgreSQL", Postgres::builder(folder.join("postgres")).start()),
        ui::step("Kafka", Kafka::builder(folder.join("kafka")).start()),
    )?;
    ui::say_where_data_is(&postgres, folder);
    let plan = Plan {
        folder: folder.to_owned(),
        postgres_url: postgres.url("postgres"),
        kafka_brokers: kafka.brokers(),
        port_base: None,
        order_query_instances: 2,
        relay_lease: options.chaos.then_some(CHAOS_LEASE),
    };
    ui::step("databases and topics", async {
        plan.create_databases().await?;
        tokio::try_join!(plan.migrate(), plan.create_topics())?;
        Ok(())
    })
    .await?;
    let mut shop = ui::step("order-svc, order-query-svc (2), outbox-relay", plan.start()).await?;
    ui::step("sharing out the partitions", shop.projection_settled()).await?;

    let mut report = place_and_reconcile(options, &plan, &mut shop).await?;
    if let Err(error) = ui::step("order-svc verify", plan.verify()).await {
        report.figures.reconciled = false;
        report.problems.push(format!("{error:#}"));
    }
    ui::step("stopping everything", async {
        shop.stop().await?;
        postgres.stop().await?;
        // Its data is not wanted any more, or is safe in its log.
        kafka.kill()
    })
    .await?;
    Ok(report)
}

async fn place_and_reconcile(options: &Options, plan: &Plan, shop: &mut Shop) -> Result<Report> {
    let seed = options.seed.unwrap_or_else(random_seed);
    let messages = plan.folder.join("demo.jsonl");
    let mut args = vec![
        "run".to_owned(),
        format!("--orders={}", options.orders),
        format!("--seed={seed}"),
        format!("--messages={}", messages.display()),
    ];
    args.extend(addresses(plan, shop)?);
    let seconds = match f64::from(options.orders) / ORDERS_PER_SECOND {
        _ if options.chaos => CHAOS_LOAD_SECONDS,
        seconds if seconds <= LONGEST_PACED_LOAD_SECONDS => seconds,
        _ => 0.0,
    };
    args.push(format!("--load-seconds={seconds}"));
    let with = if options.chaos { ", with chaos" } else { "" };
    eprintln!("  ...   placing {} orders (seed {seed}{with})", options.orders);
    let started = Instant::now();
    let log = plan.folder.join("demo.log");
    let mut demo = Launch::new("the load", paths::binary("demo")?, &log)
        .args(args)
        .spawn()?;

    let (progress, seen) = watch::channel(Progress::default());
    let follow = async move {
        let mut messages = Messages::new(messages);
        let mut display = Display::new(options.orders.into());
        let mut report = None;
        loop {
            let exited = demo.exited()?;
            for message in messages.read()? {
                match message {
                    Message::Progress(now) => {
                        display.show(&now);
                        progress.send_replace(now);
                    }
                    Message::Report(found) => report = Some(*found),
                }
            }
            if let Some(status) = exited {
                display.clear();
                if status.success() {
                    return report.context("the load has ended without a report");
                }
                bail!("the load failed ({status}):\n{}", child::tail(&log, 20));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // Here the sender of the progress goes, and that ends the chaos.
    };
    let kill = async {
        if options.chaos {
            chaos::run(shop, seen).await
        } else {
            Ok(0)
        }
    };
    let (report, kills) = tokio::try_join!(follow, kill)?;
    let seconds = started.elapsed().as_secs_f64();
    eprintln!("  ok    placed and reconciled: {} ({seconds:.1} s)", report.load);
    if options.chaos {
        eprintln!("  ok    chaos: {kills} times SIGKILL to the relay or an instance of the projection");
    }
    Ok(report)
}

/// How the `demo` program finds everything.
pub(crate) fn addresses(plan: &Plan, shop: &Shop) -> Result<Vec<String>> {
    let mut args = vec![
        format!("--orders-database={}", plan.orders_url()),
        format!("--order-query-database={}", plan.order_query_url()),
        format!("--brokers={}", plan.kafka_brokers),
        format!("--topic={}", shop::ORDER_TOPIC.0),
        format!("--order-svc={}", shop.order_svc.grpc_url()?),
    ];
    for instance in &shop.order_query_svc {
        args.push(format!("--order-query-svc={}", instance.grpc_url()?));
    }
    Ok(args)
}

fn random_seed() -> u64 {
    // Short, so that it is easy to type again.
    u64::from(
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.subsec_nanos())
            % 1_000_000,
    )
}

/// Orders placed → outbox → Kafka → read model, live.
struct Display {
    bars: Vec<ProgressBar>,
    multi: MultiProgress,
    last_line: Instant,
}

impl Display {
    fn new(orders: u64) -> Self {
        let multi = MultiProgress::new();
        let mut bars = Vec::new();
        if std::io::stderr().is_terminal() {
            for name in ["orders placed", "outbox rows", "Kafka records", "read model"] {
                let bar = multi.add(ProgressBar::new(orders).with_message(name));
                if let Ok(style) = ProgressStyle::with_template("        {msg:<14} {bar:40} {pos:>8}") {
                    bar.set_style(style);
                }
                bars.push(bar);
            }
        }
        Self {
            bars,
            multi,
            last_line: Instant::now(),
        }
    }

    fn show(&mut self, now: &Progress) {
        let values = [
            now.placed,
            now.outbox_rows,
            now.kafka_records,
            now.projected_events,
        ];
        if self.bars.is_empty() {
            if self.last_line.elapsed() >= Duration::from_secs(2) {
                self.last_line = Instant::now();
                let [placed, outbox, kafka, view] = values;
                let phase = &now.phase;
                eprintln!(
                    "        {phase}: placed {placed} -> outbox {outbox} -> Kafka {kafka} -> read model {view}"
                );
            }
            return;
        }
        for (index, (bar, value)) in self.bars.iter().zip(values).enumerate() {
            // How many events there will be is known only once all orders are placed.
            let length = if index == 0 {
                now.orders
            } else {
                now.outbox_rows.max(now.orders)
            };
            bar.set_length(length.max(value));
            bar.set_position(value);
        }
    }

    fn clear(&self) {
        // Only the display of progress is lost if that fails.
        let _ = self.multi.clear();
    }
}

/// A folder for one run, below `target/demo`; locked as long as the run lives.
struct RunFolder {
    path: PathBuf,
    keep: bool,
    _lock: File,
}

impl RunFolder {
    fn create(keep: bool) -> Result<Self> {
        let parent = paths::target_dir()?.join("demo");
        std::fs::create_dir_all(&parent)?;
        remove_abandoned(&parent)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
        let path = parent.join(now.to_string());
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let lock = File::create(path.join("lock"))?;
        lock.lock()?;
        let folder = Self {
            path,
            keep,
            _lock: lock,
        };
        if keep {
            folder.preserve();
        }
        Ok(folder)
    }

    fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps the folder beyond this run.
    fn preserve(&self) {
        let mark = if self.keep { "keep" } else { "keep-until-next-run" };
        // Without the mark it is merely removed.
        let _ = File::create(self.path.join(mark));
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if !self.path.join("keep").exists() && !self.path.join("keep-until-next-run").exists() {
            let _ = remove(&self.path);
        }
    }
}

/// Removes what earlier runs left that nobody asked to keep.
fn remove_abandoned(parent: &Path) -> Result<()> {
    for entry in std::fs::read_dir(parent)?.flatten() {
        let path = entry.path();
        let Ok(lock) = File::open(path.join("lock")) else {
            continue;
        };
        if lock.try_lock().is_ok() && !path.join("keep").exists() {
            remove(&path)?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    postgres::remove(&path.join("postgres"))?;
    std::fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))
}
