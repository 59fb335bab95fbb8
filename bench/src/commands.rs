//! `./dev bench commands`: PlaceOrder and ProcessPayment by ghz, against pgbench running the same statements on the same database.

mod captured;
mod load;
mod orders;
mod payments;
mod window;

use std::time::Duration;

use anyhow::{Result, ensure};
use local_stack::Process;
use local_stack::shop::{ORDER_SVC, PAYMENT_SANDBOX, PAYMENT_SVC};

use crate::report::{Output, Report, Section, number, thousands};
use crate::servers::Servers;
use crate::stats::median;
use crate::{released, report, ui};
use captured::{Fresh, Script, Unit};
use load::{CALLS, CHANNELS, CONNECTIONS, Load};
use window::Window;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    output: Output,
    /// How often each is measured, in turn; medians are reported
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: Option<u32>,
    /// Only these commands, separated by commas
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Short times, one run: whether it works, in about a minute; the figures say little
    #[arg(long)]
    quick: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    PlaceOrder,
    ProcessPayment,
}

/// How long and how often.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    runs: u32,
    warm_up: Duration,
    measured: Duration,
}

const SECOND: Duration = Duration::from_secs(1);

impl Sizes {
    fn of(options: &Options) -> Self {
        let (runs, warm_up, measured) = match options.quick {
            true => (1, 3, 5),
            false => (3, 5, 15),
        };
        Self {
            runs: options.runs.unwrap_or(runs),
            warm_up: SECOND * warm_up,
            measured: SECOND * measured,
        }
    }

    /// How long load is sent: a little longer than it is measured.
    fn load(self) -> Duration {
        self.warm_up + self.measured + 2 * SECOND
    }
}

/// What every result has.
const KEYS: [&str; 10] = [
    "place_order_rate",
    "place_order_pgbench_rate",
    "place_order_pgbench_stepwise_rate",
    "place_order_ratio",
    "place_order_stepwise_ratio",
    "process_payment_rate",
    "process_payment_pgbench_rate",
    "process_payment_pgbench_stepwise_rate",
    "process_payment_ratio",
    "process_payment_stepwise_ratio",
];

/// The servers are as in the other benchmarks, but for this.
const POSTGRES: [(&str, &str); 1] = [("shared_preload_libraries", "pg_stat_statements")];

/// A command of a running service.
struct Command<'a> {
    title: &'static str,
    /// What its figures begin with.
    key: &'static str,
    database: &'static str,
    /// Each command has this statement once.
    counted: &'static str,
    method: &'static str,
    address: String,
    /// The service, and what else works for it besides PostgreSQL.
    processes: Vec<&'a Process>,
    units: Vec<Unit>,
    fresh: Fresh,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contender {
    Service,
    Pipelined,
    Stepwise,
}

impl Contender {
    const ALL: [Self; 3] = [Self::Service, Self::Pipelined, Self::Stepwise];
}

pub(crate) async fn run(options: Options) -> Result<()> {
    released::check(&[ORDER_SVC, PAYMENT_SVC, PAYMENT_SANDBOX])?;
    let servers = ui::quiet_step("PostgreSQL and Kafka", Servers::start_with(&POSTGRES)).await?;
    let machine = report::machine(&servers.connect("postgres").await?).await?;
    let mut report = Report::new("commands", &KEYS);
    let sizes = Sizes::of(&options);
    let done = ui::unless_ended(async {
        let wanted = |part| options.only.is_empty() || options.only.contains(&part);
        if wanted(Part::PlaceOrder) {
            orders::run(&servers, sizes, &mut report).await?;
        }
        if wanted(Part::ProcessPayment) {
            payments::run(&servers, sizes, &mut report).await?;
        }
        Ok(())
    })
    .await;
    servers.stop().await?;
    done?;
    let mut settings = Servers::settings();
    settings.push(format!("and {POSTGRES:?}"));
    settings.push(format!(
        "{CONNECTIONS} connections to PostgreSQL each; ghz has {CALLS} calls under way on {CHANNELS} connections; pgbench has one thread"
    ));
    settings.push(format!("{sizes:?}"));
    report.section(Section::settings(settings));
    report.tell(&machine, &options.output)
}

/// Measures a command and its statements in turn, and reports. `data` is ghz's template of the next so many calls.
async fn compare(
    servers: &Servers,
    sizes: Sizes,
    report: &mut Report,
    command: Command<'_>,
    data: impl AsyncFn() -> Result<String>,
) -> Result<()> {
    ui::heading(command.title);
    let [pipelined, stepwise] =
        [true, false].map(|pipelined| captured::script(&command.units, &command.fresh, pipelined));
    let mut windows: [Vec<Window>; 3] = Default::default();
    for round in 0..sizes.runs {
        for turn in 0..Contender::ALL.len() {
            // Each time another one is first.
            let place = (round as usize + turn) % Contender::ALL.len();
            let contender = Contender::ALL[place];
            let what = format!("{contender:?} ({}/{})", round + 1, sizes.runs).to_lowercase();
            let outcome = |window: &Window| format!("{} commands/s", thousands(window.rate));
            let work = async {
                let load = |servers: &Servers, script: &Script| {
                    Load::pgbench(servers, command.database, script, sizes.load())
                };
                servers
                    .connect(command.database)
                    .await?
                    .batch_execute("CHECKPOINT")
                    .await?;
                let load = match contender {
                    Contender::Service => {
                        let data = data().await?;
                        Load::ghz(servers, &command.address, command.method, &data, sizes.load())?
                    }
                    Contender::Pipelined => load(servers, &pipelined)?,
                    Contender::Stepwise => load(servers, &stepwise)?,
                };
                window::measure(servers, sizes, &command, load).await
            };
            windows[place].push(ui::step(what, outcome, work).await?);
        }
    }
    let units = command.units.len();
    let statements: usize = command.units.iter().map(Vec::len).sum();
    let mut section = Section::new(command.title)
        .note(format!(
            "Statements of one command: {statements}, in {units} transaction(s) or single statements. {} run(s) of {:?}, each after {:?} of \
             the same load, in turn; medians. CPU is in microseconds per command.",
            sizes.runs, sizes.measured, sizes.warm_up
        ))
        .columns(&["", "commands/s", "service over it", "cores busy", "CPU", "p50, p99 ms"]);
    let of = |place: usize, value: &dyn Fn(&Window) -> f64| median(windows[place].iter().map(value));
    let rates = [0, 1, 2].map(|place| of(place, &|window| window.rate));
    let ratio = |place: usize| {
        rates[0]
            .zip(rates[place])
            .map(|(service, pgbench)| service / pgbench)
    };
    let names = [
        "the service, by ghz",
        "pgbench, a pipeline per transaction",
        "pgbench, statement by statement",
    ];
    for (place, name) in names.into_iter().enumerate() {
        let first = &windows[place][0];
        let cpu = first.cpu.iter().enumerate().map(|(party, (name, _))| {
            let micros = of(place, &|window| window.cpu[party].1 / window.rate * 1e6);
            format!("{name} {}", number(micros, 0))
        });
        let latency = |value: fn(load::Latency) -> f64| {
            number(
                median(
                    windows[place]
                        .iter()
                        .filter_map(|window| window.latency)
                        .map(value),
                ),
                1,
            )
        };
        section.row([
            name.to_owned(),
            thousands(rates[place].unwrap_or_default()),
            if place == 0 {
                String::new()
            } else {
                number(ratio(place), 3)
            },
            number(
                of(place, &|window| window.cpu.iter().map(|(_, cores)| cores).sum()),
                2,
            ),
            cpu.collect::<Vec<_>>().join(", "),
            format!(
                "{}, {}",
                latency(|latency| latency.p50),
                latency(|latency| latency.p99)
            ),
        ]);
    }
    report.section(section);

    let mut section = Section::new(&format!("{}: the statements", command.title))
        .note(
            "Calls per command by pg_stat_statements, all runs together. Statements with the same id are the same to the server. What is \
             called less than once in twenty commands is not the command's: readiness, and what is looked for now and then. pgbench has \
             one more in 16 commands, which makes their ids, and is not in the table. BEGIN and COMMIT are not counted by that view when \
             they come prepared, as pgbench sends them; so transactions are counted by pg_stat_database, which lags by up to a second.",
        )
        .columns(&["id", "statement", "the service", "pipelined", "stepwise"]);
    let calls = [0, 1, 2].map(|place| window::calls_per_command(&windows[place]));
    let mut different = Vec::new();
    let mut transactions = [0, 1, 2].map(|place| window::transactions_per_command(&windows[place]));
    for pgbench in &mut transactions[1..] {
        *pgbench -= 1.0 / captured::COMMANDS as f64;
    }
    if transactions[1..]
        .iter()
        .any(|pgbench| (pgbench / transactions[0] - 1.0).abs() > 0.5)
    {
        different.push(format!("{transactions:?}: transactions"));
    }
    let cells = transactions.map(|transactions| number(Some(transactions), 2));
    section.row(
        [String::new(), "transactions".to_owned()]
            .into_iter()
            .chain(cells),
    );
    for (id, text) in window::texts(windows.iter().flatten()) {
        let per_command = [0, 1, 2].map(|place| calls[place].get(&id).copied().unwrap_or_default());
        if ["BEGIN", "COMMIT"].contains(&text)
            || text.contains(captured::MARK)
            || per_command.iter().all(|calls| *calls < 0.05)
        {
            continue;
        }
        if per_command[1..]
            .iter()
            .any(|calls| (calls - per_command[0]).abs() > 0.03)
        {
            different.push(format!("{per_command:?}: {text}"));
        }
        let [service, pipelined, stepwise] = per_command.map(|calls| number(Some(calls), 3));
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let short: String = text.chars().take(70).collect();
        section.row([format!("{id:x}"), short, service, pipelined, stepwise]);
    }
    report.section(section);
    for (name, value) in [
        ("rate", rates[0]),
        ("pgbench_rate", rates[1]),
        ("pgbench_stepwise_rate", rates[2]),
        ("ratio", ratio(1)),
        ("stepwise_ratio", ratio(2)),
    ] {
        report.figure(&format!("{}_{name}", command.key), value);
    }
    ensure!(
        different.is_empty(),
        "pgbench and the service do not ask the same; calls per command of the service, pipelined and stepwise:\n{}",
        different.join("\n")
    );
    Ok(())
}
