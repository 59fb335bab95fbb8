//! For tests: the shared PostgreSQL and Kafka of a test run, a database per test, and instances of one's own for tests
//! that kill them.
//!
//! `./dev test` starts the shared ones and sets `TEST_POSTGRES_URL` and `TEST_KAFKA_BROKERS`. For plain `cargo test`,
//! `./dev stack up` starts them in the background; they are found by `target/test-stack/endpoints.json`.

use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::postgres::{connect, quote, with_database};
use crate::{Disk, Kafka, Postgres, paths, postgres};

#[cfg(feature = "events")]
pub mod events;

pub use crate::process::Process;

const DATABASE_PREFIX: &str = "test_";
const TEMPLATE_PREFIX: &str = "template_";
const DROP_LIMIT: Duration = Duration::from_secs(10);

/// The addresses of the shared stack, as `./dev stack up` writes them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Endpoints {
    /// As superuser, database `postgres`.
    pub postgres_url: String,
    /// `host:port`
    pub kafka_brokers: String,
}

impl Endpoints {
    /// The file by which tests find the stack.
    pub fn file() -> Result<PathBuf> {
        Ok(paths::target_dir()?.join("test-stack/endpoints.json"))
    }

    fn find() -> Result<Self> {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        if let (Some(postgres_url), Some(kafka_brokers)) =
            (variable("TEST_POSTGRES_URL"), variable("TEST_KAFKA_BROKERS"))
        {
            return Ok(Self {
                postgres_url,
                kafka_brokers,
            });
        }
        let file = Self::file()?;
        let text = std::fs::read_to_string(&file).context("there is no test stack")?;
        let endpoints: Self = serde_json::from_str(&text)?;
        let postgres_address = endpoints
            .postgres_url
            .split(['@', '/'])
            .nth(3)
            .unwrap_or_default();
        for address in [postgres_address, &endpoints.kafka_brokers] {
            let resolved = address.to_socket_addrs()?.next().context("no address")?;
            TcpStream::connect_timeout(&resolved, Duration::from_secs(2))
                .with_context(|| format!("{} names {address}, and nothing listens there", file.display()))?;
        }
        Ok(endpoints)
    }
}

#[track_caller]
fn endpoints() -> &'static Endpoints {
    static FOUND: OnceLock<Result<Endpoints>> = OnceLock::new();
    match FOUND.get_or_init(Endpoints::find) {
        Ok(endpoints) => endpoints,
        Err(error) => panic!(
            "this test needs PostgreSQL and Kafka ({error:#}). Run all tests with ./dev test, or start them once \
             with ./dev stack up and then use cargo test --release"
        ),
    }
}

/// The shared PostgreSQL: superuser, database `postgres`.
///
/// # Panics
/// When there is none; the message says what to run.
#[track_caller]
pub fn postgres_url() -> String {
    endpoints().postgres_url.clone()
}

/// The shared Kafka, as `host:port`.
///
/// # Panics
/// When there is none; the message says what to run.
#[track_caller]
pub fn kafka_brokers() -> String {
    endpoints().kafka_brokers.clone()
}

/// `prefix` with something behind it that no other call gives: for topics, groups and the like.
pub fn unique(prefix: &str) -> String {
    format!("{prefix}-{}", &uuid::Uuid::new_v4().simple().to_string()[..12])
}

/// A database for one test, dropped at its end.
#[derive(Debug)]
pub struct Database {
    server_url: String,
    name: String,
}

impl Database {
    /// A copy of the template database `template`, which is made first if nobody has yet: an empty database to which
    /// `migrate`, given its URL, is applied. `migrate` must close its connections.
    ///
    /// Name the template after its content: whatever changes that, such as the newest migration, must change the name.
    ///
    /// # Panics
    /// When there is no PostgreSQL or the migration fails.
    pub async fn create<F, Fut, E>(template: &str, migrate: F) -> Self
    where
        F: FnOnce(String) -> Fut,
        Fut: Future<Output = Result<(), E>>,
        E: std::fmt::Debug,
    {
        Self::create_on(&postgres_url(), template, migrate).await
    }

    /// The same on a server of the test's own.
    ///
    /// # Panics
    /// When the server does not answer or the migration fails.
    pub async fn create_on<F, Fut, E>(server_url: &str, template: &str, migrate: F) -> Self
    where
        F: FnOnce(String) -> Fut,
        Fut: Future<Output = Result<(), E>>,
        E: std::fmt::Debug,
    {
        match Self::try_create(server_url, template, migrate).await {
            Ok(database) => database,
            Err(error) => panic!("no database for this test: {error:#}"),
        }
    }

    /// An empty database.
    ///
    /// # Panics
    /// When there is no PostgreSQL.
    pub async fn empty() -> Self {
        Self::create("empty", |_| async { anyhow::Ok(()) }).await
    }

    async fn try_create<F, Fut, E>(server_url: &str, template: &str, migrate: F) -> Result<Self>
    where
        F: FnOnce(String) -> Fut,
        Fut: Future<Output = Result<(), E>>,
        E: std::fmt::Debug,
    {
        let server = connect(server_url).await?;
        let template = identifier(TEMPLATE_PREFIX, template);
        // Across processes and threads; held by this session alone, so it ends with it.
        let key = hash(&template) as i64;
        server.execute("SELECT pg_advisory_lock($1)", &[&key]).await?;
        let exists = server
            .query_opt("SELECT FROM pg_database WHERE datname = $1", &[&template])
            .await?
            .is_some();
        if !exists {
            // Under another name until it is complete, in case this is interrupted.
            let draft = format!("{template}_draft");
            server
                .batch_execute(&format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", quote(&draft)))
                .await?;
            server
                .batch_execute(&format!("CREATE DATABASE {}", quote(&draft)))
                .await?;
            migrate(with_database(server_url, &draft))
                .await
                .map_err(|error| anyhow::anyhow!("migrating the template {template} failed: {error:?}"))?;
            // Closed connections take a moment to be gone at the server.
            let leave = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1";
            server.execute(leave, &[&draft]).await?;
            server
                .batch_execute(&format!(
                    "ALTER DATABASE {} RENAME TO {}",
                    quote(&draft),
                    quote(&template)
                ))
                .await
                .context("the template is still in use; does its migration close its connections?")?;
        }
        server.execute("SELECT pg_advisory_unlock($1)", &[&key]).await?;

        let name = format!("{DATABASE_PREFIX}{}", uuid::Uuid::new_v4().simple());
        server
            .batch_execute(&format!(
                "CREATE DATABASE {} TEMPLATE {}",
                quote(&name),
                quote(&template)
            ))
            .await
            .with_context(|| format!("cannot copy the template {template}"))?;
        Ok(Self {
            server_url: server_url.to_owned(),
            name,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its connection URL, as superuser.
    pub fn url(&self) -> String {
        with_database(&self.server_url, &self.name)
    }

    /// A connection to it.
    pub async fn connect(&self) -> Result<tokio_postgres::Client> {
        connect(&self.url()).await
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let server_url = std::mem::take(&mut self.server_url);
        let statement = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", quote(&self.name));
        // On a thread of its own, since the test's runtime cannot be blocked on from within. Best effort: what is
        // left over goes with the stack.
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                let server = connect(&server_url).await?;
                tokio::time::timeout(DROP_LIMIT, server.batch_execute(&statement)).await??;
                anyhow::Ok(())
            })
        });
        let _ = dropped.join();
    }
}

/// Removes the folders of tests that failed in earlier runs.
pub fn remove_test_folders() -> Result<()> {
    // Younger ones may belong to tests that run right now.
    const ABANDONED_AFTER: Duration = Duration::from_secs(3600);
    let parent = paths::target_dir()?.join("test-folders");
    for entry in std::fs::read_dir(&parent).into_iter().flatten().flatten() {
        let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
        if age < ABANDONED_AFTER {
            continue;
        }
        remove_folder(&entry.path())?;
    }
    Ok(())
}

/// A test's folder, and the data elsewhere of those whose user could not get there.
fn remove_folder(path: &Path) -> Result<()> {
    for entry in std::fs::read_dir(path)?.flatten() {
        if entry.path().join("data-is-in").exists() {
            postgres::remove(&entry.path())?;
        }
    }
    std::fs::remove_dir_all(path)?;
    Ok(())
}

/// A name that PostgreSQL does not cut off.
fn identifier(prefix: &str, name: &str) -> String {
    let short: String = name.chars().take(24).collect();
    format!("{prefix}{short}_{:016x}", hash(name))
}

fn hash(text: &str) -> u64 {
    // Equal in all processes of one build, which is all that is needed.
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// A folder for one test below the target directory. It goes with the test, unless the test fails.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// # Panics
    /// When it cannot be made.
    pub fn create(name: &str) -> Self {
        let make = || -> Result<PathBuf> {
            let path = paths::target_dir()?.join("test-folders").join(unique(name));
            std::fs::create_dir_all(&path)?;
            Ok(path)
        };
        match make() {
            Ok(path) => Self { path },
            Err(error) => panic!("no folder for this test: {error:#}"),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = remove_folder(&self.path);
        }
    }
}

/// A disk of this many bytes; or nothing, where none can be mounted, and a line that says so: the test proves nothing then.
pub fn disk(bytes: u64) -> Option<Disk> {
    match Disk::mount(bytes) {
        Ok(disk) => Some(disk),
        Err(error) => {
            let test = std::thread::current();
            // Past the harness, which shows nothing of tests that pass.
            let _ = writeln!(
                std::io::stderr(),
                "\nSKIPPED: {}: {error}\n",
                test.name().unwrap_or("a test")
            );
            None
        }
    }
}

/// A PostgreSQL of the test's own in `folder`, to be killed, stopped or frozen. Drop it before the folder.
pub async fn private_postgres(folder: &Folder) -> Result<Postgres> {
    Postgres::builder(folder.path().join("postgres"))
        .fsync(false)
        .start()
        .await
}

/// A Kafka of the test's own in `folder`, to be killed, stopped or frozen. Drop it before the folder.
pub async fn private_kafka(folder: &Folder) -> Result<Kafka> {
    Kafka::builder(folder.path().join("kafka")).start().await
}
