//! `./dev up`, `down`, `logs` and `order`: the whole thing in the background, in `target/local`.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use local_stack::shop::{
    self, ANALYTICS_SVC, Addresses, INVENTORY_SVC, KAFKA_PORTS, MAIL_PORT, ORDER_QUERY_SVC, ORDER_SVC,
    PAYMENT_SVC, POSTGRES_PORT, Plan, USER_SVC,
};
use local_stack::smtp::{Smtp, Tls};
use local_stack::{Kafka, Postgres, Process, Shop, install, kafka, paths, postgres, process};
use serde::{Deserialize, Serialize};

use crate::background::{Background, asked_to_end};
use crate::{build, doctor, ui};

const DEFAULT_PORT_BASE: u16 = 15_000;
const CHECK_EVERY: Duration = Duration::from_millis(500);
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LAST_BACKOFF: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
pub(crate) struct UpOptions {
    /// The first of 100 ports to use on 127.0.0.1
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
    /// For example order-svc-1, payment-svc-2, notification-svc-1, order-query-svc-1, outbox-relay, payment-sandbox, postgres, kafka
    name: String,
    /// Go on showing what comes
    #[arg(short, long)]
    follow: bool,
}

/// Where everything is, as `target/local/endpoints.json` has it.
#[derive(Debug, Serialize, Deserialize)]
struct Endpoints {
    postgres: String,
    #[serde(flatten)]
    addresses: Addresses,
    topics: Vec<String>,
    /// HTTP: /metrics, /livez, /readyz
    admin: std::collections::BTreeMap<String, String>,
    psql: PathBuf,
}

fn background() -> Result<Background> {
    Ok(Background::new(paths::target_dir()?.join("local")))
}

pub(crate) async fn up(options: UpOptions) -> Result<()> {
    let background = background()?;
    if let Some(pid) = background.running()? {
        println!("It is already up (process {pid}). ./dev down stops it.\n");
        if background.endpoints_file().exists() {
            ui::print(&hints(&read_endpoints(&background)?)?);
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
    ui::print(&format!("\n{}", hints(&read_endpoints(&background)?)?));
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
    let mut demo = Command::new(paths::binary("demo")?);
    demo.arg("order")
        .arg(format!("--id={id}"))
        .arg("--addresses")
        // What is more in it does no harm.
        .arg(background.endpoints_file());
    Err(demo.exec()).context("the demo program did not start")
}

fn log_files(folder: &Path) -> Vec<(String, PathBuf)> {
    let folders = [
        folder.to_owned(),
        folder.join("postgres"),
        folder.join("kafka"),
        folder.join("mail"),
    ];
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
    let taken: Vec<String> = shop::ports()
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
    mail_server: Smtp,
    plan: Plan,
    shop: Shop,
}

impl Local {
    async fn start(folder: &Path, options: &UpOptions) -> Result<Self> {
        let base = options.port_base;
        let (postgres_folder, kafka_folder) = (folder.join("postgres"), folder.join("kafka"));
        let mail_folder = folder.join("mail");
        if options.fresh {
            postgres::remove(&postgres_folder)?;
            for folder in [&kafka_folder, &mail_folder] {
                if folder.exists() {
                    std::fs::remove_dir_all(folder)
                        .with_context(|| format!("cannot remove {}", folder.display()))?;
                }
            }
        }
        let (postgres, kafka, mail_server) = tokio::try_join!(
            ui::step(
                "PostgreSQL",
                Postgres::builder(&postgres_folder)
                    .port(base + POSTGRES_PORT)
                    .start()
            ),
            ui::step(
                "Kafka",
                Kafka::builder(&kafka_folder)
                    .ports(base + KAFKA_PORTS[0], base + KAFKA_PORTS[1])
                    .start()
            ),
            ui::step(
                "mail server",
                Smtp::start_on(&mail_folder, Tls::Implicit, Some(base + MAIL_PORT))
            ),
        )?;
        ui::say_where_data_is(&postgres, folder);
        let plan = Plan::new(
            folder,
            postgres.url("postgres"),
            kafka.brokers(),
            &mail_server,
            Some(base),
        )?;
        if options.fresh && plan.sandbox_storage().exists() {
            std::fs::remove_file(plan.sandbox_storage()).context("cannot remove the provider's data")?;
        }
        ui::step("databases and topics", async {
            plan.create_databases().await?;
            tokio::try_join!(plan.migrate(), plan.create_topics())?;
            Ok(())
        })
        .await
        .context("if the data of an earlier version is in the way: ./dev up --fresh")?;
        let shop = ui::step("the shop", plan.start()).await?;
        Ok(Self {
            postgres,
            kafka,
            mail_server,
            plan,
            shop,
        })
    }

    fn endpoints(&self) -> Result<Endpoints> {
        let admin = self
            .shop
            .processes()
            .map(|process| Ok((process.name().to_owned(), format!("http://{}", process.admin()?))));
        Ok(Endpoints {
            postgres: self.postgres.url("postgres"),
            addresses: self.plan.addresses(&self.shop)?,
            topics: shop::topics().into_iter().map(str::to_owned).collect(),
            admin: admin.collect::<Result<_>>()?,
            psql: self.postgres.binaries().join("psql"),
        })
    }

    /// Starts again whatever has ended, later and later if that does not help. Never returns but by an error.
    async fn restart_what_crashes(&mut self) -> Result<()> {
        let mut backoffs = [const { Backoff { last: None } }; 3];
        let mut process_backoffs: Vec<Backoff> = self.shop.processes().map(|_| Backoff::default()).collect();
        loop {
            tokio::time::sleep(CHECK_EVERY).await;
            if !self.postgres.is_running() && backoffs[0].is_over() {
                report("PostgreSQL", self.postgres.start().await);
            }
            if !self.kafka.is_running() && backoffs[1].is_over() {
                report("Kafka", self.kafka.start().await);
            }
            if !self.mail_server.is_running() && backoffs[2].is_over() {
                report("the mail server", self.mail_server.restart().await);
            }
            for (process, backoff) in self.shop.processes_mut().zip(&mut process_backoffs) {
                if !process.is_running() && backoff.is_over() {
                    let name = process.name().to_owned();
                    report(&name, Process::start(process).await);
                }
            }
        }
    }

    async fn stop(mut self) -> Result<()> {
        // Each as far as it goes: what does not stop in order is killed when this process ends.
        let shop = self.shop.stop().await;
        let kafka = self.kafka.stop().await;
        let mail_server = self.mail_server.stop().await;
        self.postgres.stop().await.and(mail_server).and(kafka).and(shop)
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
fn hints(at: &Endpoints) -> Result<String> {
    let grpcurl = install::optional("grpcurl");
    let mut text = "Everything is up.\n".to_owned();
    for (service, urls) in &at.addresses.services {
        let hosts: Vec<&str> = urls.iter().map(|url| host(url)).collect();
        text.push_str(&format!("  {service:<18} gRPC {}\n", hosts.join(" and ")));
    }
    text.push_str(&format!(
        "  PostgreSQL         {}\n  Kafka              {}\n  payment provider   {} (a sandbox)\n  \
         mails              {} (what the mail server has taken)\n",
        at.postgres,
        at.addresses.brokers,
        at.addresses.sandbox,
        at.addresses.mails.display(),
    ));
    for (name, url) in &at.admin {
        text.push_str(&format!("  {name:<18} {url}/metrics /livez /readyz\n"));
    }
    if grpcurl.is_none() {
        text.push_str(&format!(
            "\ngrpcurl is not installed; get it with: {}\n",
            doctor::GRPCURL
        ));
    }
    let program = format!("{} -plaintext", grpcurl.as_deref().unwrap_or("grpcurl"));
    text.push_str(&stock_hints(at, &program)?);
    text.push_str(&order_hints(at, &program)?);
    text.push_str(&payment_hints(at, &program)?);
    text.push_str(&other_hints(at, &program)?);
    let psql = at.psql.display();
    text.push_str("\nDatabases:\n");
    for (name, url) in &at.addresses.databases {
        let table = match name.as_str() {
            "order_query" => "order_views",
            "inventory" => "stock",
            "notifications" => "mails",
            "analytics" => "sales_figures",
            table => table,
        };
        text.push_str(&format!("{psql} {url} -c 'SELECT * FROM {table}'\n"));
    }
    for name in shop::outboxes() {
        let url = at.addresses.database(name)?;
        text.push_str(&format!("{psql} {url} -c 'SELECT * FROM outbox_relay'\n"));
    }
    let java = kafka::find_java().map_or("java".to_owned(), |java| java.display().to_string());
    if let Ok(jars) = kafka::jars_dir() {
        let jars = kafka::classpath(&jars).to_string_lossy().into_owned();
        text.push_str(&format!(
            "\nThe topics, without the values, which are Protobuf:\n\
             {java} -cp '{jars}' org.apache.kafka.tools.consumer.ConsoleConsumer --bootstrap-server {} \
             --include '{}' --from-beginning --property print.key=true --property print.headers=true \
             --property print.partition=true --property print.offset=true --property print.value=false\n",
            at.addresses.brokers,
            at.topics.join("|")
        ));
    }
    text.push_str(
        "\nOne order's journey: ./dev order $ORDER\nLogs: ./dev logs order-svc-1 -f\nStop: ./dev down",
    );
    Ok(text)
}

const USER: &str = "0190aaaa-0000-7000-8000-000000000001";
const PRODUCT: &str = "0190bbbb-0000-7000-8000-000000000001";
/// A new UUID, by the shell that the line is pasted into.
const NEW_ID: &str = "$(cat /proc/sys/kernel/random/uuid)";
/// What the order placed below costs.
const TOTAL: &str = "{\\\"minor_units\\\":2598,\\\"currency_code\\\":\\\"EUR\\\"}";

fn stock_hints(at: &Endpoints, grpcurl: &str) -> Result<String> {
    let inventory_svc = first_host(at, INVENTORY_SVC)?;
    let call = |fields: &str, method: &str| {
        format!(
            "{grpcurl} -d \"{{{fields}\\\"product_id\\\":\\\"{PRODUCT}\\\"}}\" {inventory_svc} \
             shop.inventory.v1.InventoryService/{method}"
        )
    };
    let request_id = format!("\\\"request_id\\\":\\\"{NEW_ID}\\\",");
    Ok(format!(
        "\nPut goods into the warehouse, without which every order is cancelled, and see what becomes of them:\n\
         {}\n\
         {}\n",
        call(&format!("{request_id}\\\"available\\\":100,"), "SetStock"),
        call("", "GetStock"),
    ))
}

fn order_hints(at: &Endpoints, grpcurl: &str) -> Result<String> {
    let order_svc = first_host(at, ORDER_SVC)?;
    let query = first_host(at, ORDER_QUERY_SVC)?;
    let place = |request_id: &str, currency: &str| {
        format!(
            "{grpcurl} -d '{{\"request_id\":\"{request_id}\",\"user_id\":\"{USER}\",\"currency_code\":\"{currency}\",\
             \"items\":[{{\"product_id\":\"{PRODUCT}\",\"quantity\":2,\
             \"unit_price_minor_units\":1299}}]}}' {order_svc} shop.order.v1.OrderService/PlaceOrder"
        )
    };
    let placing = place(&uuid(), "EUR");
    let of_order = format!("{{\\\"user_id\\\":\\\"{USER}\\\",\\\"order_id\\\":\\\"$ORDER\\\"}}");
    let of_shipment = |fields: &str| {
        format!("{{\\\"request_id\\\":\\\"{NEW_ID}\\\",\\\"order_id\\\":\\\"$ORDER\\\"{fields}}}")
    };
    let shipped = of_shipment(",\\\"carrier\\\":\\\"Post\\\",\\\"tracking_number\\\":\\\"T 1\\\"");
    let delivered = of_shipment("");
    let of_cancel = of_order.replacen(
        '{',
        &format!("{{\\\"request_id\\\":\\\"{NEW_ID}\\\",\\\"reason\\\":\\\"changed my mind\\\","),
        1,
    );
    Ok(format!(
        "\nPlace an order:\n\
         {placing}\n\
         \nThe same request_id again gives the same order (and its id is kept for the lines below):\n\
         ORDER=$({placing} | tee /dev/stderr | grep -m1 -o '\"orderId\": \"[^\"]*' | cut -d'\"' -f4)\n\
         \nGet it:\n\
         {grpcurl} -d \"{of_order}\" {order_svc} shop.order.v1.OrderService/GetOrder\n\
         \nA validation error:\n\
         {}\n\
         \nWatch it in the read model until its end, and from another terminal pay or cancel it:\n\
         {grpcurl} -d \"{of_order}\" {query} shop.orderquery.v1.OrderQueryService/WatchOrder\n\
         {grpcurl} -d \"{of_cancel}\" {order_svc} shop.order.v1.OrderService/CancelOrder\n\
         \nOr, once it is paid and so confirmed, send it off and see it arrive:\n\
         {grpcurl} -d \"{shipped}\" {order_svc} shop.order.v1.OrderService/ShipOrder\n\
         {grpcurl} -d \"{delivered}\" {order_svc} shop.order.v1.OrderService/MarkDelivered\n",
        place(&uuid(), "EURO"),
    ))
}

fn payment_hints(at: &Endpoints, grpcurl: &str) -> Result<String> {
    let payment_svc = first_host(at, PAYMENT_SVC)?;
    let call = |fields: &str, method: &str| {
        format!(
            "{grpcurl} -d \"{{{fields}\\\"user_id\\\":\\\"{USER}\\\"}}\" {payment_svc} \
             shop.payment.v1.PaymentService/{method}"
        )
    };
    let request_id = format!("\\\"request_id\\\":\\\"{NEW_ID}\\\",");
    let id_of =
        |field: &str| format!("tee /dev/stderr | grep -m1 -o '\"{field}\": \"[^\"]*' | cut -d'\"' -f4");
    let method = call(
        &format!(
            "{request_id}\\\"card\\\":{{\\\"number\\\":\\\"4242424242424242\\\",\\\"expiry_month\\\":12,\
             \\\"expiry_year\\\":2030,\\\"cvv\\\":\\\"123\\\"}},"
        ),
        "CreatePaymentMethod",
    );
    let pay = call(
        &format!(
            "{request_id}\\\"order_id\\\":\\\"$ORDER\\\",\\\"amount\\\":{TOTAL},\
             \\\"payment_method_id\\\":\\\"$METHOD\\\","
        ),
        "ProcessPayment",
    );
    let of_payment = "\\\"payment_id\\\":\\\"$PAYMENT\\\",";
    Ok(format!(
        "\nHand a card to the provider (4000000000000002 is declined):\n\
         METHOD=$({method} | {})\n\
         \nPay the order by it, once however often it is tried:\n\
         PAYMENT=$({pay} | {})\n\
         \nSee the payment, give the money back (the order is cancelled then), and see what the provider has done:\n\
         {}\n\
         {}\n\
         curl -s {}/sandbox/ledger\n",
        id_of("paymentMethodId"),
        id_of("paymentId"),
        call(of_payment, "GetPayment"),
        call(&format!("{request_id}{of_payment}"), "RefundPayment"),
        at.addresses.sandbox,
    ))
}

fn other_hints(at: &Endpoints, grpcurl: &str) -> Result<String> {
    let (user_svc, analytics_svc) = (first_host(at, USER_SVC)?, first_host(at, ANALYTICS_SVC)?);
    Ok(format!(
        "\nCreate a user, to whom mails go about his orders (place them with his user_id):\n\
         {grpcurl} -d \"{{\\\"request_id\\\":\\\"{NEW_ID}\\\",\\\"email\\\":\\\"ann@example.org\\\",\
         \\\"first_name\\\":\\\"Ann\\\",\\\"last_name\\\":\\\"Lee\\\"}}\" {user_svc} \
         shop.user.v1.UserService/CreateUser\n\
         \nSee what is sold this hour, and again whenever that changes:\n\
         {grpcurl} -d '{{\"window_size\":\"WINDOW_SIZE_HOUR\"}}' {analytics_svc} \
         shop.analytics.v1.AnalyticsService/WatchSales\n",
    ))
}

fn first_host<'a>(at: &'a Endpoints, service: &str) -> Result<&'a str> {
    let urls = at.addresses.service(service)?;
    Ok(urls.first().map_or("", |url| host(url)))
}

fn host(url: &str) -> &str {
    url.trim_start_matches("http://")
}

fn uuid() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}
