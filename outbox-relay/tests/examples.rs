//! The examples of how to write to an outbox, run with a relay: what they commit is on Kafka, untouched and in order.

#[expect(dead_code, reason = "the other tests use the rest")]
mod support;

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use local_stack::{paths, testing};
use outbox_relay::topics::{self, Topic};
use support::{Bed, PATIENCE};
use tokio::process::Command;

/// For the Python example.
const PSYCOPG: &str = "3.3.9";
/// Bounds the download too.
const PIP_LIMIT: Duration = Duration::from_secs(300);

const ANY_LANGUAGE: &str = include_str!("../../docs/any-language.md");
const LIBRARY: &str = include_str!("../../crates/outbox/README.md");

/// What the bank of either language opens with.
const MONEY: i64 = 5 * 100;

#[tokio::test(flavor = "multi_thread")]
async fn the_banks_of_all_languages_share_their_accounts_and_lose_nothing() {
    let bed = Bed::new().await;
    let relay = bed.relay().await;
    let (rust, python) = (
        rust_bank().expect("built"),
        python_bank().await.expect("installed"),
    );
    // The first opens the accounts; then both move the same money about at once.
    let url = bed.database.url();
    let mut made = run(&rust, &url, 1).await.expect("it ran");
    let runs = [&rust, &python, &rust, &python].map(|bank| run(bank, &url, 150));
    for transfers in futures::future::join_all(runs).await {
        made += transfers.expect("it ran");
    }
    bed.settled().await;
    relay.stop().await;

    let summary = bed
        .client
        .query_one(
            "SELECT (SELECT sum(balance)::bigint FROM accounts), count(*),
                    count(*) FILTER (WHERE source = '/bank/rust'), count(*) FILTER (WHERE source = '/bank/python')
               FROM outbox",
            &[],
        )
        .await
        .expect("read");
    let numbers: Vec<i64> = (0..4).map(|column| summary.get(column)).collect();
    assert_eq!(numbers[0], MONEY, "money was made or lost");
    assert_eq!(
        numbers[1],
        5 + 2 * made,
        "rows of 5 accounts and {made} transfers"
    );
    assert!(numbers[2] > 5 && numbers[3] > 0, "{numbers:?}");
    published(&bed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bank_in_python_stands_alone() {
    let bed = Bed::new().await;
    let relay = bed.relay().await;
    let python = python_bank().await.expect("installed");
    let made = run(&python, &bed.database.url(), 20).await.expect("it ran");
    bed.settled().await;
    relay.stop().await;
    assert!(made > 0);
    assert_eq!(published(&bed).await as i64, 5 + 2 * made);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sql_of_the_guide_does_what_it_says() {
    let mut bed = Bed::new().await;
    let audit = testing::unique("bank.audit");
    let topic = Topic {
        name: audit.clone(),
        partitions: support::PARTITIONS,
    };
    topics::create(&support::brokers(), &[topic], 1)
        .await
        .expect("created");
    let relay = bed.relay().await;

    let taken = blocks("sql");
    assert_eq!(taken.len(), 7, "blocks of SQL in the guide");
    for block in taken {
        let block = block.replace("'bank.audit'", &format!("'{audit}'"));
        if let Err(error) = bed.client.batch_execute(&block).await {
            panic!("{error:?} in\n{block}");
        }
    }
    let refused: Vec<String> = blocks("sql refused")
        .concat()
        .split("\n\n")
        .map(str::to_owned)
        .collect();
    assert_eq!(refused.len(), 7, "statements that are refused");
    for statement in refused {
        let Err(error) = bed.client.batch_execute(&statement).await else {
            panic!("this is taken:\n{statement}");
        };
        let code = error.code().map(|code| code.code());
        // generated_always, check_violation, restrict_violation
        assert!(
            matches!(code, Some("428C9" | "23514" | "23001")),
            "{error:?} in\n{statement}"
        );
    }
    bed.settled().await;
    relay.stop().await;

    let published: Vec<(String, i64, Option<String>)> = versions(&bed).await;
    let expected = [
        ("a1", 1, "account.opened"),
        ("a1", 2, "account.debited"),
        ("a1", 3, "account.corrected"),
        ("a1", 4, "account.debited"),
        ("a2", 1, "account.opened"),
        ("a2", 2, "account.credited"),
        ("a2", 3, "account.debited"),
        ("a3", 1, "account.credited"),
        ("a3", 2, "account.closed"),
    ];
    let expected: Vec<_> = expected
        .iter()
        .map(|(key, version, kind)| ((*key).to_owned(), *version, Some((*kind).to_owned())))
        .collect();
    assert_eq!(published, expected);
    bed.topic = audit;
    let audited = versions(&bed).await;
    assert_eq!(
        audited,
        [("day-1".to_owned(), 1, Some("audit.closed".to_owned()))]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guides_name_every_column() {
    let bed = Bed::without_topic().await;
    let columns = bed
        .client
        .query(
            "SELECT column_name::text FROM information_schema.columns WHERE table_name = 'outbox'",
            &[],
        )
        .await
        .expect("read");
    assert!(!columns.is_empty());
    for column in columns.iter().map(|row| row.get::<_, &str>(0)) {
        for guide in [ANY_LANGUAGE, LIBRARY] {
            let row = guide
                .lines()
                .filter_map(|line| line.strip_prefix("| ")?.split(" |").next());
            let named = row
                .flat_map(|cell| cell.split(", "))
                .any(|cell| cell == format!("`{column}`"));
            assert!(
                named,
                "no row for {column} in {}",
                guide.lines().next().unwrap_or_default()
            );
        }
    }
}

/// The contents of the guide's fenced blocks with this info string.
fn blocks(info: &str) -> Vec<String> {
    let opening = format!("\n```{info}\n");
    let after = ANY_LANGUAGE.split(&opening).skip(1);
    after
        .map(|rest| rest.split("\n```").next().unwrap_or_default().to_owned())
        .collect()
}

/// Key, version and type of each record, by key and then as published.
async fn versions(bed: &Bed) -> Vec<(String, i64, Option<String>)> {
    let mut records = bed.records().await;
    records.sort_by(|a, b| a.key.cmp(&b.key)); // stable
    records
        .iter()
        .map(|record| {
            let kind = header(record, "ce_type").map(str::to_owned);
            (record.key.clone(), record.version, kind)
        })
        .collect()
}

/// Every committed row is on Kafka once, in order per entity, with key, version, payload and envelope as in the row.
/// Returns how many there are.
async fn published(bed: &Bed) -> usize {
    let mut records = bed.records().await;
    assert_eq!(
        Bed::check(&bed.committed().await, &records),
        0,
        "repeats without a crash"
    );
    records.sort_by_key(|record| number(record, "outbox-id"));
    let rows = bed
        .client
        .query(
            "SELECT id, aggregate_id, aggregate_version, payload, event_type, source, content_type,
                    correlation_id::text, metadata->>'channel'
               FROM outbox ORDER BY id",
            &[],
        )
        .await
        .expect("read");
    assert_eq!(rows.len(), records.len());
    for (row, record) in rows.iter().zip(&records) {
        assert_eq!(row.get::<_, i64>(0), number(record, "outbox-id"));
        assert_eq!(
            (row.get(1), row.get(2), row.get(3)),
            (&*record.key, record.version, record.payload.as_deref())
        );
        for (column, name) in [
            (4, "ce_type"),
            (5, "ce_source"),
            (6, "content-type"),
            (7, "correlation-id"),
            (8, "meta-channel"),
        ] {
            assert_eq!(row.get::<_, Option<&str>>(column), header(record, name), "{name}");
        }
        let payload = record.payload.as_deref().expect("a payload");
        serde_json::from_slice::<serde_json::Value>(payload).expect("JSON");
    }
    rows.len()
}

fn header<'r>(record: &'r support::Record, name: &str) -> Option<&'r str> {
    let found = record.headers.iter().find(|(other, _)| other == name)?;
    Some(&found.1)
}

fn number(record: &support::Record, name: &str) -> i64 {
    header(record, name).expect(name).parse().expect("a number")
}

/// A program that transfers as often as its argument says.
struct Bank {
    program: PathBuf,
    arguments: Vec<PathBuf>,
    /// For Python.
    libraries: Option<PathBuf>,
}

/// Returns how many transfers the bank says it made.
async fn run(bank: &Bank, database_url: &str, transfers: i64) -> Result<i64> {
    let mut command = Command::new(&bank.program);
    command
        .args(&bank.arguments)
        .arg(transfers.to_string())
        .env("DATABASE_URL", database_url)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    if let Some(libraries) = &bank.libraries {
        command.env("PYTHONPATH", libraries);
    }
    let output = tokio::time::timeout(PATIENCE, command.output())
        .await
        .context("the example hangs")?
        .with_context(|| format!("{} did not start", bank.program.display()))?;
    ensure!(
        output.status.success(),
        "the example failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let summary = String::from_utf8(output.stdout)?;
    let made = summary.split(' ').next().unwrap_or_default();
    made.parse().with_context(|| format!("it says {summary:?}"))
}

/// Cargo builds examples with the tests of their own crate.
fn rust_bank() -> Result<Bank> {
    let program = paths::bin_dir()?.join("examples/bank");
    ensure!(
        program.is_file(),
        "{} does not exist; build it with: cargo build --release -p outbox --examples",
        program.display()
    );
    Ok(Bank {
        program,
        arguments: Vec::new(),
        libraries: None,
    })
}

async fn python_bank() -> Result<Bank> {
    let python = paths::on_path("python3").context("Python is not installed (apt-get install python3)")?;
    let libraries = psycopg(&python).await?;
    let script = PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../docs/examples/python/bank.py"
    ));
    Ok(Bank {
        program: python,
        arguments: vec![script],
        libraries: Some(libraries),
    })
}

/// The folder of the example's libraries, fetched once per target directory and version of Python.
async fn psycopg(python: &PathBuf) -> Result<PathBuf> {
    let tag = "import sys, sysconfig; print(sys.implementation.cache_tag, sysconfig.get_platform())";
    let asked = Command::new(python).args(["-c", tag]).output();
    let output = tokio::time::timeout(PATIENCE, asked)
        .await
        .context("Python hangs")??;
    let tag = String::from_utf8(output.stdout)?.trim().replace(' ', "-");
    ensure!(output.status.success() && !tag.is_empty(), "Python does not run");

    let folder = paths::target_dir()?.join(format!("tools/python-{tag}"));
    let libraries = folder.join(format!("psycopg-{PSYCOPG}"));
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    // Several tests may want them at once. The lock goes with the file.
    let lock = std::fs::File::create(folder.join("lock"))?;
    let lock = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock))
        .await?
        .context("cannot lock the folder of Python's libraries")?;
    if !libraries.is_dir() {
        let incomplete = folder.join("incomplete");
        let _ = std::fs::remove_dir_all(&incomplete);
        let mut pip = Command::new(python);
        pip.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--only-binary",
            ":all:",
        ])
        .arg("--target")
        .arg(&incomplete)
        .arg(format!("psycopg[binary]=={PSYCOPG}"))
        .stdin(Stdio::null())
        .kill_on_drop(true);
        let output = tokio::time::timeout(PIP_LIMIT, pip.output())
            .await
            .context("pip hangs")??;
        let problem = String::from_utf8_lossy(&output.stderr);
        if problem.contains("No module named pip") {
            bail!("Python's pip is not installed (apt-get install python3-pip)");
        }
        ensure!(
            output.status.success(),
            "pip could not fetch psycopg (is the package index, or the one that PIP_INDEX_URL names, reachable?):\n{problem}"
        );
        std::fs::rename(&incomplete, &libraries)?;
    }
    drop(lock);
    Ok(libraries)
}
