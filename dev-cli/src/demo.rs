//! `./dev demo`: from nothing to a reconciled table.

use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use local_stack::child::{self, Child, Launch};
use local_stack::measure::{Message, Progress, Reader, Report};
use local_stack::shop::{NOTIFICATION_SVC, ORDER_SVC, PAYMENT_SVC, Plan};
use local_stack::smtp::{Smtp, Tls};
use local_stack::{Kafka, Postgres, paths, postgres, wait};
use tokio::sync::watch;

use crate::background::asked_to_end;
use crate::{build, chaos, ui};

/// In chaos, the load is spread over at least this long, so that the kills land within it.
const CHAOS_LOAD_SECONDS: f64 = 10.0;
/// Otherwise a load that is small enough comes at a rate at which latencies say something; a large one as it can.
const ORDERS_PER_SECOND: f64 = 30.0;
const LONGEST_PACED_LOAD_SECONDS: f64 = 20.0;

/// In chaos, a relay that takes over waits so long at most, and there are several takeovers within the load.
const CHAOS_LEASE: Duration = Duration::from_secs(1);

/// Long enough to pay, short enough to wait for those orders that nobody pays.
const PAY_WITHIN: &str = "12s";
/// How long payment-svc waits for the provider, which hangs now and then on purpose.
const PROVIDER_TIMEOUT: &str = "2s";

const PAYMENT_LEASE: &str = "4s";
const PAYMENT_RETRY: &str = "2s";

/// How long the mail server may take for anything.
const MAIL_TIMEOUT: &str = "3s";
/// Of whoever is killed while he sends a mail, nobody knows after this whether he has sent it.
const MAIL_LEASE: &str = "8s";
/// Mails that the mail server puts off are sent again soon.
const MAIL_RETRY: [&str; 2] = ["100ms", "1s"];

const COLLECTOR_LIMIT: Duration = Duration::from_secs(20);
const SCAN_LIMIT: Duration = Duration::from_secs(300);

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
    /// During the run, kill every process with SIGKILL, Kafka and the mail server too, and freeze the payment provider
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
    let (mut postgres, mut kafka, mut mail_server) = tokio::try_join!(
        ui::step("PostgreSQL", Postgres::builder(folder.join("postgres")).start()),
        ui::step("Kafka", Kafka::builder(folder.join("kafka")).start()),
        ui::step("mail server", Smtp::start(folder.join("mail"), Tls::Implicit)),
    )?;
    ui::say_where_data_is(&postgres, folder);
    let mut collector = Collector::start(folder).await?;
    let mut plan = Plan::new(
        folder,
        postgres.url("postgres"),
        kafka.brokers(),
        &mail_server,
        None,
    )?
    .set(ORDER_SVC, "orders.pay_within", PAY_WITHIN)
    .set(PAYMENT_SVC, "provider.timeout", PROVIDER_TIMEOUT)
    // Whoever is killed in the middle of a payment keeps others from it for so long.
    .set(PAYMENT_SVC, "payments.lease", PAYMENT_LEASE)
    .set(PAYMENT_SVC, "payments.retry_longest", PAYMENT_RETRY)
    .set(NOTIFICATION_SVC, "smtp.timeout", MAIL_TIMEOUT)
    .set(NOTIFICATION_SVC, "smtp.data_timeout", MAIL_TIMEOUT)
    .set(NOTIFICATION_SVC, "mails.lease", MAIL_LEASE)
    .set(NOTIFICATION_SVC, "mails.retry_first", MAIL_RETRY[0])
    .set(NOTIFICATION_SVC, "mails.retry_longest", MAIL_RETRY[1])
    .set_for_all("telemetry.otlp_endpoint", &collector.url);
    if options.chaos {
        plan = plan.relay_lease(CHAOS_LEASE);
    }
    ui::step("databases and topics", async {
        plan.create_databases().await?;
        tokio::try_join!(plan.migrate(), plan.create_topics())?;
        Ok(())
    })
    .await?;
    let mut shop = ui::step("the shop", plan.start()).await?;
    ui::step("sharing out the partitions", shop.consumers_settled()).await?;
    let addresses = folder.join("addresses.json");
    plan.addresses(&shop)?.write(&addresses)?;

    let seed = options.seed.unwrap_or_else(random_seed);
    let mut targets = chaos::Targets {
        shop: &mut shop,
        kafka: &mut kafka,
        mail_server: &mut mail_server,
    };
    let mut report = place_and_reconcile(options, seed, &plan, &mut targets, &addresses).await?;
    let mut check = |result: Result<()>| {
        if let Err(error) = result {
            report.figures.reconciled = false;
            report.problems.push(format!("{error:#}"));
        }
    };
    check(ui::step("every service that has a history: verify", plan.verify()).await);
    check(ui::step("payment-svc reconcile", plan.reconcile()).await);
    ui::step("stopping the shop", shop.stop()).await?;
    // Everything has been written by now: the last spans and the last lines of the logs, too.
    let scanned = scan(options.orders, seed, &plan, &postgres, &collector, &addresses).await;
    check(scanned.map(|found| eprintln!("  ok    {found}")));
    ui::step("stopping PostgreSQL, Kafka and the mail server", async {
        postgres.stop().await?;
        // Its data is not wanted any more, or is safe in its log.
        kafka.kill()?;
        mail_server.kill()?;
        collector.child.kill()
    })
    .await?;
    Ok(report)
}

/// Takes the spans of all processes and keeps them, to be scanned.
struct Collector {
    child: Child,
    url: String,
    folder: PathBuf,
}

impl Collector {
    async fn start(folder: &Path) -> Result<Self> {
        let (traces, endpoint) = (folder.join("traces"), folder.join("collector.endpoint"));
        let mut child = Launch::new(
            "the collector",
            paths::binary("demo")?,
            folder.join("collector.log"),
        )
        .args([
            "collect".into(),
            argument("folder", &traces),
            argument("endpoint-file", &endpoint),
        ])
        .spawn()?;
        let url = wait::until("the collector listens", COLLECTOR_LIMIT, || {
            let running = child.check_running();
            let url = std::fs::read_to_string(&endpoint).ok();
            std::future::ready(running.map(|()| url))
        })
        .await?;
        Ok(Self {
            child,
            url,
            folder: traces,
        })
    }
}

/// Looks for card data in everything that the run has left. Says what was scanned; fails when something was found.
async fn scan(
    orders: u32,
    seed: u64,
    plan: &Plan,
    postgres: &Postgres,
    collector: &Collector,
    addresses: &Path,
) -> Result<String> {
    let log = plan.folder().join("card-scan.txt");
    let mut scan = Launch::new("the scan for card data", paths::binary("demo")?, &log)
        .args([
            "scan".into(),
            // By these it knows the cards that were used.
            format!("--orders={orders}"),
            format!("--seed={seed}"),
            argument("addresses", addresses),
            argument("pg-dump", &postgres.binaries().join("pg_dump")),
            argument("logs", plan.folder()),
            argument("traces", &collector.folder),
            format!("--collector={}", collector.url),
            argument("storage", &plan.sandbox_storage()),
        ])
        .spawn()?;
    let status = ui::step("scanning for card data", scan.wait(SCAN_LIMIT)).await?;
    if !status.success() {
        bail!("the scan for card data: {}", child::tail(&log, 20));
    }
    Ok(child::tail(&log, 1))
}

fn argument(name: &str, path: &Path) -> String {
    format!("--{name}={}", path.display())
}

async fn place_and_reconcile(
    options: &Options,
    seed: u64,
    plan: &Plan,
    targets: &mut chaos::Targets<'_>,
    addresses: &Path,
) -> Result<Report> {
    let messages = plan.folder().join("demo.jsonl");
    let mut args = vec![
        "run".to_owned(),
        argument("addresses", addresses),
        format!("--orders={}", options.orders),
        format!("--seed={seed}"),
        argument("messages", &messages),
    ];
    let seconds = match f64::from(options.orders) / ORDERS_PER_SECOND {
        _ if options.chaos => CHAOS_LOAD_SECONDS,
        seconds if seconds <= LONGEST_PACED_LOAD_SECONDS => seconds,
        _ => 0.0,
    };
    args.push(format!("--load-seconds={seconds}"));
    let with = if options.chaos { ", with chaos" } else { "" };
    eprintln!("  ...   placing {} orders (seed {seed}{with})", options.orders);
    let started = Instant::now();
    let log = plan.folder().join("demo.log");
    let mut demo = Launch::new("the load", paths::binary("demo")?, &log)
        .args(args)
        .spawn()?;

    let (progress, seen) = watch::channel(Progress::default());
    let follow = async move {
        let mut messages = Reader::new(messages);
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
            chaos::run(targets, seen).await
        } else {
            Ok(chaos::Done::default())
        }
    };
    let (report, blows) = tokio::try_join!(follow, kill)?;
    let seconds = started.elapsed().as_secs_f64();
    eprintln!("  ok    placed and reconciled: {} ({seconds:.1} s)", report.load);
    if options.chaos {
        let chaos::Done {
            kills,
            restarts,
            freezes,
            everybody,
        } = blows;
        let whom = if everybody {
            "every process at least once"
        } else {
            "not every process: the load was too short"
        };
        eprintln!(
            "  ok    chaos: {kills} times SIGKILL, {whom}; Kafka and the mail server restarted {restarts} times; \
             the provider frozen {freezes} times"
        );
    }
    Ok(report)
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
                    "        {phase}: placed {placed} -> outbox {outbox} -> Kafka {kafka} -> read model {view}, \
                     {} still open",
                    now.open
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
