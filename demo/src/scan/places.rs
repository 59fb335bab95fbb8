//! Where card data could be, as bytes.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::TryStreamExt as _;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use tokio_postgres::Client;

use crate::blocking;
use crate::topic::{Record, Topic};

const LIMIT: Duration = Duration::from_secs(120);
/// What logs, and what else a run writes for people, end with.
const LOG_EXTENSIONS: [&str; 4] = ["log", "jsonl", "json", "txt"];

/// A place, read as a whole.
pub(super) struct Place {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
}

impl Place {
    pub(super) fn file(kind: &str, path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self {
            name: format!("{kind}: {}", path.display()),
            bytes,
        })
    }
}

/// A whole database, as people take it elsewhere.
pub(super) async fn dump(pg_dump: &Path, name: &str, url: &str) -> Result<Place> {
    let running = tokio::process::Command::new(pg_dump)
        .arg(url)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(LIMIT, running)
        .await
        .with_context(|| format!("pg_dump has not ended within {LIMIT:?}"))?
        .with_context(|| format!("{} did not start", pg_dump.display()))?;
    if !output.status.success() {
        bail!("pg_dump failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(Place {
        name: format!("dump of {name}"),
        bytes: output.stdout,
    })
}

/// Every table of a database, row by row in PostgreSQL's binary form: text is as it is, and so is bytea.
pub(super) async fn tables(database: &str, client: &Client) -> Result<Vec<Place>> {
    let sql = "SELECT format('%I.%I', nspname, relname) FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace \
               WHERE relkind IN ('r', 'm') AND nspname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1";
    let mut places = Vec::new();
    for row in client.query(sql, &[]).await? {
        let table: String = row.get(0);
        let copy = format!("COPY (SELECT * FROM {table}) TO STDOUT (FORMAT binary)");
        let reading = async {
            let stream = client.copy_out(&copy).await?;
            stream
                .try_fold(Vec::new(), |mut all, part| async move {
                    all.extend_from_slice(&part);
                    Ok(all)
                })
                .await
        };
        let bytes = tokio::time::timeout(LIMIT, reading)
            .await
            .with_context(|| format!("{table} could not be read within {LIMIT:?}"))?
            .with_context(|| format!("{table} could not be read"))?;
        places.push(Place {
            name: format!("{table} of {database}"),
            bytes,
        });
    }
    Ok(places)
}

/// Which topics are wanted.
pub(super) enum Which {
    /// All but Kafka's own.
    All,
    One(String),
}

/// Keys, headers and values of every record.
pub(super) async fn topics(brokers: &str, which: Which) -> Result<Vec<Place>> {
    let brokers = brokers.to_owned();
    blocking(move || {
        let names = match which {
            Which::One(name) => vec![name],
            Which::All => names(&brokers)?,
        };
        let mut places = Vec::new();
        for name in names {
            let records = Topic::open(&brokers, &name)?.read()?;
            places.push(Place {
                bytes: records.iter().flat_map(flattened).collect(),
                name: format!("topic {name}"),
            });
        }
        Ok(places)
    })
    .await
}

fn names(brokers: &str) -> Result<Vec<String>> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()
        .context("no Kafka consumer")?;
    let metadata = consumer
        .fetch_metadata(None, LIMIT)
        .context("Kafka does not answer")?;
    let names = metadata.topics().iter().map(|topic| topic.name().to_owned());
    Ok(names.filter(|name| !name.starts_with("__")).collect())
}

/// A line for each part, so that none runs into the next.
fn flattened(record: &Record) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut add = |part: &[u8]| {
        bytes.extend_from_slice(part);
        bytes.push(b'\n');
    };
    add(record.key.as_deref().unwrap_or_default());
    for (name, value) in &record.headers {
        let value = value.as_deref().unwrap_or_default();
        add(&[name.as_bytes(), b": ", value].concat());
    }
    add(record.payload.as_deref().unwrap_or_default());
    bytes
}

/// Whatever the processes, PostgreSQL, Kafka and this program have written for people. Not the servers' own data: Kafka removes what was
/// planted a minute later.
pub(super) fn logs(folder: &Path) -> Result<Vec<Place>> {
    let is_log = |path: &PathBuf| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| LOG_EXTENSIONS.contains(&extension))
    };
    let is_data = |path: &PathBuf| path.components().any(|part| part.as_os_str() == "data");
    let below = |path: &PathBuf| path.strip_prefix(folder).map(Path::to_owned).unwrap_or_default();
    let paths = files_below(folder)?.into_iter();
    let paths = paths.filter(|path| is_log(path) && !is_data(&below(path)));
    paths.map(|path| Place::file("log", &path)).collect()
}

/// All files of a folder.
pub(super) fn files(kind: &str, folder: &Path) -> Result<Vec<Place>> {
    let paths = files_below(folder)?.into_iter();
    paths.map(|path| Place::file(kind, &path)).collect()
}

fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        let entries =
            std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if entry.file_type()?.is_file() {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}
