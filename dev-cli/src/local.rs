//! `./dev up`, `down`, `logs` and `order`: the whole thing in the background, in `target/local`.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use local_stack::shop::{self, Plan};
use local_stack::{Kafka, Postgres, Process, Shop, install, kafka, paths, postgres, process};
use serde::{Deserialize, Serialize};

use crate::background::{Background, asked_to_end};
use crate::{build, demo, doctor, ui};

const DEFAULT_PORT_BASE: u16 = 15_000;
const CHECK_EVERY: Duration = Duration::from_millis(500);
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LAST_BACKOFF: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
pub(crate) struct UpOptions {
    /// The first of 40 ports to use on 127.0.0.1
    #[arg(long, default_value_t = DEFAULT_PORT_BASE, value_parser = clap::value_parser!(u16).range(1024..=65_000))]
    port_base: u16,
    /// Start with nothing in the databases and topics; otherwise what was there at the last `down` is there again
    #[arg(long)]
    fresh: bool,
    /// Take the programs as they were built last
    #[arg(long)]
    no_build: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct LogsOptions {
    /// For example order-svc, order-query-svc-1, outbox-relay, postgres, kafka, supervisor
    name: String,
    /// Go on showing what comes
    #[arg(short, long)]
    follow: bool,
}

/// Where everything is, as `target/local/endpoints.json` has it.
#[derive(Debug, Serialize, Deserialize)]
struct Endpoints {
    postgres: String,
    orders_database: String,
    order_query_database: String,
    kafka: String,
    topic: String,
    /// gRPC
    order_svc: String,
    /// gRPC, one per instance
    order_query_svc: Vec<String>,
    /// HTTP: /metrics, /livez, /readyz
    admin: std::collections::BTreeMap<String, String>,
    psql: PathBuf,
    /// What `demo order` needs to know.
    demo_arguments: Vec<String>,
}

fn background() -> Result<Background> {
    Ok(Background::new(paths::target_dir()?.join("local")))
}

pub(crate) async fn up(options: UpOptions) -> Result<()> {
    let background = background()?;
    if let Some(pid) = background.running()? {
        println!("It is already up (process {pid}). ./dev down stops it.\n");
        if background.endpoints_file().exists() {
            ui::print(&hints(&read_endpoints(&background)?));
        }
        return Ok(());
    }
    build::install_missing().await?;
    if !options.no_build {
        build::processes().await?;
    }
    check_ports(options.port_base)?;
    let mut args = vec!["local".to_owned(), format!("--port-base={}", options.port_base)];
    if options.fresh {
        args.push("--fresh".to_owned());
    }
    background.start(&args).await?;
    ui::print(&format!("\n{}", hints(&read_endpoints(&background)?)));
    Ok(())
}

pub(crate) async fn down() -> Result<()> {
    let background = background()?;
    let stopped = ui::step("stopping everything", background.stop()).await?;
    println!(
        "{}",
        if stopped {
            "Everything is stopped."
        } else {
            "Nothing was up."
        }
    );
    Ok(())
}

pub(crate) fn logs(options: &LogsOptions) -> Result<()> {
    let folder = background()?.folder().to_owned();
    let logs = log_files(&folder);
    let Some((_, path)) = logs.iter().find(|(name, _)| *name == options.name) else {
        let names = logs
            .iter()
            .map(|(name, _)| name.as_str())
            .collect::<Vec<_>>()
            .join(", ");
        if names.is_empty() {
            bail!("there are no logs; start everything with ./dev up");
        }
        bail!("there is no log {}; there are: {names}", options.name);
    };
    let mut tail = Command::new("tail");
    tail.args(["-n", "200"]);
    if options.follow {
        tail.arg("-F");
    }
    Err(tail.arg(path).exec()).context("tail did not start")
}

pub(crate) fn order(id: &str) -> Result<()> {
    let background = background()?;
    if background.running()?.is_none() || !background.endpoints_file().exists() {
        bail!("nothing is up; start everything with ./dev up");
    }
    let endpoints = read_endpoints(&background)?;
    let mut demo = Command::new(paths::binary("demo")?);
    demo.arg("order")
        .arg(format!("--id={id}"))
        .args(endpoints.demo_arguments);
    Err(demo.exec()).context("the demo program did not start")
}

fn log_files(folder: &Path) -> Vec<(String, PathBuf)> {
    let folders = [folder.to_owned(), folder.join("postgres"), folder.join("kafka")];
    let entries = folders
        .iter()
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flatten()
        .flatten();
    let mut logs: Vec<(String, PathBuf)> = entries
        .filter_map(|entry| {
            let path = entry.path();
            let name = path.file_name()?.to_str()?.strip_suffix(".log")?.to_owned();
            Some((name, path))
        })
        .collect();
    logs.sort();
    logs
}

fn check_ports(base: u16) -> Result<()> {
    let used = [0, 1, 2, 10, 11, 20, 21, 22, 23, 30, 31];
    let taken: Vec<String> = used
        .into_iter()
        .map(|offset| base + offset)
        .filter(|port| process::is_taken(*port))
        .map(|port| port.to_string())
        .collect();
    if !taken.is_empty() {
        bail!(
            "port {} on 127.0.0.1 is taken; choose others with ./dev up --port-base",
            taken.join(", ")
        );
    }
    Ok(())
}

fn read_endpoints(background: &Background) -> Result<Endpoints> {
    let path = background.endpoints_file();
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not understood", path.display()))
}

pub(crate) async fn supervise(options: UpOptions) -> Result<()> {
    let background = background()?;
    let _running = background.enter()?;
    let asked = asked_to_end();
    tokio::pin!(asked);
    let mut local = tokio::select! {
        local = Local::start(background.folder(), &options) => local?,
        asked = &mut asked => return asked,
    };
    background.announce(&local.endpoints()?)?;
    tokio::select! {
        never = local.restart_what_crashes() => never?,
        asked = asked => asked?,
    }
    background.withdraw();
    local.stop().await
}

/// Everything that is up.
struct Local {
    postgres: Postgres,
    kafka: Kafka,
    plan: Plan,
    shop: Shop,
}

impl Local {
    async fn start(folder: &Path, options: &UpOptions) -> Result<Self> {
        let base = options.port_base;
        let (postgres_folder, kafka_folder) = (folder.join("postgres"), folder.join("kafka"));
        if options.fresh {
            postgres::remove(&postgres_folder)?;
            if kafka_folder.exists() {
                std::fs::remove_dir_all(&kafka_folder).context("cannot remove Kafka's data")?;
            }
        }
        let (postgres, kafka) = tokio::try_join!(
            ui::step(
                "PostgreSQL",
                Postgres::builder(&postgres_folder).port(base).start()
            ),
            ui::step(
                "Kafka",
                Kafka::builder(&kafka_folder).ports(base + 1, base + 2).start()
            ),
        )?;
        ui::say_where_data_is(&postgres, folder);
        let plan = Plan {
            folder: folder.to_owned(),
            postgres_url: postgres.url("postgres"),
            kafka_brokers: kafka.brokers(),
            port_base: Some(base),
            order_query_instances: 2,
            relay_lease: None,
        };
        ui::step("databases and topics", async {
            plan.create_databases().await?;
            tokio::try_join!(plan.migrate(), plan.create_topics())?;
            Ok(())
        })
        .await
        .context("if the data of an earlier version is in the way: ./dev up --fresh")?;
        let shop = ui::step("order-svc, order-query-svc (2), outbox-relay", plan.start()).await?;
        Ok(Self {
            postgres,
            kafka,
            plan,
            shop,
        })
    }

    fn endpoints(&self) -> Result<Endpoints> {
        let mut admin = std::collections::BTreeMap::new();
        let fixed = [&self.shop.order_svc, &self.shop.outbox_relay];
        for process in fixed.into_iter().chain(&self.shop.order_query_svc) {
            admin.insert(process.name().to_owned(), format!("http://{}", process.admin()?));
        }
        let instances = self.shop.order_query_svc.iter();
        Ok(Endpoints {
            postgres: self.postgres.url("postgres"),
            orders_database: self.plan.orders_url(),
            order_query_database: self.plan.order_query_url(),
            kafka: self.kafka.brokers(),
            topic: shop::ORDER_TOPIC.0.to_owned(),
            order_svc: self.shop.order_svc.grpc()?.to_string(),
            order_query_svc: instances
                .map(|process| Ok(process.grpc()?.to_string()))
                .collect::<Result<_>>()?,
            admin,
            psql: self.postgres.binaries().join("psql"),
            demo_arguments: demo::addresses(&self.plan, &self.shop)?,
        })
    }

    /// Starts again whatever has ended, later and later if that does not help. Never returns but by an error.
    async fn restart_what_crashes(&mut self) -> Result<()> {
        let mut backoffs = [Backoff::default(), Backoff::default()];
        let mut process_backoffs: Vec<Backoff> = self.shop.processes().map(|_| Backoff::default()).collect();
        loop {
            tokio::time::sleep(CHECK_EVERY).await;
            if !self.postgres.is_running() && backoffs[0].is_over() {
                report("PostgreSQL", self.postgres.start().await);
            }
            if !self.kafka.is_running() && backoffs[1].is_over() {
                report("Kafka", self.kafka.start().await);
            }
            for (process, backoff) in self.shop.processes().zip(&mut process_backoffs) {
                if !process.is_running() && backoff.is_over() {
                    let name = process.name().to_owned();
                    report(&name, Process::start(process).await);
                }
            }
        }
    }

    async fn stop(&mut self) -> Result<()> {
        // Each as far as it goes: what does not stop in order is killed when this process ends.
        let shop = self.shop.stop().await;
        let kafka = self.kafka.stop().await;
        self.postgres.stop().await.and(kafka).and(shop)
    }
}

fn report(name: &str, restarted: Result<()>) {
    match restarted {
        Ok(()) => eprintln!("{name} had ended and is started again"),
        Err(error) => eprintln!("{name} has ended and does not start: {error:#}"),
    }
}

/// When to try again.
#[derive(Default)]
struct Backoff {
    last: Option<(Instant, Duration)>,
}

impl Backoff {
    /// Whether to try now; if so, the next time is further away, unless this one lasts.
    fn is_over(&mut self) -> bool {
        let pause = match self.last {
            None => FIRST_BACKOFF,
            Some((at, pause)) if at.elapsed() > pause * 10 => FIRST_BACKOFF,
            Some((at, pause)) if at.elapsed() >= pause => (pause * 2).min(LAST_BACKOFF),
            Some(_) => return false,
        };
        self.last = Some((Instant::now(), pause));
        true
    }
}

/// Lines to paste.
fn hints(at: &Endpoints) -> String {
    let order_svc = &at.order_svc;
    let query = at.order_query_svc.first().map_or("", String::as_str);
    let user = "0190aaaa-0000-7000-8000-000000000001";
    let grpcurl = install::optional("grpcurl");
    let program = grpcurl.as_deref().unwrap_or("grpcurl");
    let items = "[{\"product_id\":\"0190bbbb-0000-7000-8000-000000000001\",\"quantity\":2,\
                  \"unit_price_minor_units\":1299}]";
    let place = |request_id: &str, currency: &str| {
        format!(
            "{program} -plaintext -d '{{\"request_id\":\"{request_id}\",\"user_id\":\"{user}\",\
             \"currency_code\":\"{currency}\",\"items\":{items}}}' {order_svc} shop.order.v1.OrderService/PlaceOrder"
        )
    };
    let java = kafka::find_java().map_or("java".to_owned(), |java| java.display().to_string());
    let jars = kafka::jars_dir().map(|jars| kafka::classpath(&jars).to_string_lossy().into_owned());
    let mut text = format!(
        "Everything is up.\n\
         \x20 order-svc          gRPC {order_svc}\n\
         \x20 order-query-svc    gRPC {}\n\
         \x20 PostgreSQL         {}\n\
         \x20 Kafka              {}\n",
        at.order_query_svc.join(" and "),
        at.postgres,
        at.kafka,
    );
    for (name, url) in &at.admin {
        text.push_str(&format!("  {name:<18} {url}/metrics /livez /readyz\n"));
    }
    if grpcurl.is_none() {
        text.push_str(&format!(
            "\ngrpcurl is not installed; get it with: {}\n",
            doctor::GRPCURL
        ));
    }
    let placing = place(&uuid(), "EUR");
    let of_order = format!("{{\\\"user_id\\\":\\\"{user}\\\",\\\"order_id\\\":\\\"$ORDER\\\"}}");
    let of_cancel = of_order.replacen(
        '{',
        "{\\\"request_id\\\":\\\"$(cat /proc/sys/kernel/random/uuid)\\\",\\\"reason\\\":\\\"changed my mind\\\",",
        1,
    );
    text.push_str(&format!(
        "\nPlace an order:\n\
         {placing}\n\
         \nThe same request_id again gives the same order (and its id is kept for the lines below):\n\
         ORDER=$({placing} | tee /dev/stderr | grep -m1 -o '\"orderId\": \"[^\"]*' | cut -d'\"' -f4)\n\
         \nGet it:\n\
         {program} -plaintext -d \"{of_order}\" {order_svc} shop.order.v1.OrderService/GetOrder\n\
         \nA validation error:\n\
         {}\n\
         \nWatch it in the read model until its end, and from another terminal cancel it:\n\
         {program} -plaintext -d \"{of_order}\" {query} shop.orderquery.v1.OrderQueryService/WatchOrder\n\
         {program} -plaintext -d \"{of_cancel}\" {order_svc} shop.order.v1.OrderService/CancelOrder\n",
        place(&uuid(), "EURO"),
    ));
    text.push_str(&format!(
        "\nDatabases:\n\
         {psql} {} -c 'SELECT * FROM orders'\n\
         {psql} {} -c 'SELECT * FROM outbox_relay'\n",
        at.orders_database,
        at.orders_database,
        psql = at.psql.display(),
    ));
    if let Ok(jars) = jars {
        text.push_str(&format!(
            "\nThe topic, without the values, which are Protobuf:\n\
             {java} -cp '{jars}' org.apache.kafka.tools.consumer.ConsoleConsumer --bootstrap-server {} \
             --topic {} --from-beginning --property print.key=true --property print.headers=true \
             --property print.partition=true --property print.offset=true --property print.value=false\n",
            at.kafka, at.topic
        ));
    }
    text.push_str(
        "\nOne order's journey: ./dev order $ORDER\nLogs: ./dev logs order-svc -f\nStop: ./dev down",
    );
    text
}

fn uuid() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}
