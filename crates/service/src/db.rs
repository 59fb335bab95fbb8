//! PostgreSQL: a pool whose every wait is bounded, and transactions that survive the server's restarts.
//!
//! Sessions get `statement_timeout`, `lock_timeout` and `idle_in_transaction_session_timeout` as start-up options, so no
//! statement is ever asked without a bound. A connection that broke while it lay in the pool is noticed and replaced; a
//! transaction that breaks before its COMMIT was sent is begun again on a fresh connection; one that breaks during COMMIT
//! is [`DbError::OutcomeUnknown`], and the client finds out by repeating its request id.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel_async::pooled_connection::deadpool::{Object, Pool};
use diesel_async::pooled_connection::{AsyncDieselConnectionManager, ManagerConfig, RecyclingMethod};
use diesel_async::{
    AsyncConnection as _, AsyncMigrationHarness, AsyncPgConnection, SimpleAsyncConnection as _,
};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness as _};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntGauge, IntGaugeVec, Opts};
use secrecy::{ExposeSecret as _, SecretString};
use tokio_postgres::{NoTls, config::SslMode};
use tonic::{Code, Status};

use crate::admin::Check;
use crate::config::Database;
use crate::deadline::Deadline;
use crate::shutdown::BoxError;
use crate::status::{Domain, RETRY_DELAY};
use crate::telemetry::chain;

/// A future as closures over connections return it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A connection of the pool.
pub type Connection = Object<AsyncPgConnection>;

/// How often a transaction is begun when connections break under it or it collides with others.
const ATTEMPTS: u32 = 3;

/// Why the database did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    #[error("the database cannot be reached")]
    Unreachable(#[source] BoxError),
    #[error("no database connection became free in time")]
    PoolExhausted,
    #[error("the deadline has passed")]
    DeadlinePassed,
    #[error("a statement or a lock took too long")]
    TimedOut(#[source] BoxError),
    #[error("the transaction collided with others")]
    Collision(#[source] DieselError),
    #[error("the connection broke during commit: the outcome is unknown")]
    OutcomeUnknown(#[source] DieselError),
    #[error("the task of the command panicked")]
    Panicked(#[source] tokio::task::JoinError),
    #[error("the database refused a statement")]
    Refused(#[source] DieselError),
}

impl From<DieselError> for DbError {
    fn from(error: DieselError) -> Self {
        let DieselError::DatabaseError(kind, information) = &error else {
            return match error {
                DieselError::BrokenTransactionManager => Self::Unreachable(error.into()),
                error => Self::Refused(error),
            };
        };
        match kind {
            DatabaseErrorKind::UnableToSendCommand | DatabaseErrorKind::ClosedConnection => {
                Self::Unreachable(error.into())
            }
            DatabaseErrorKind::SerializationFailure => Self::Collision(error),
            // A standby: the primary has moved, and connections to it will follow.
            DatabaseErrorKind::ReadOnlyTransaction => Self::Unreachable(error.into()),
            DatabaseErrorKind::Unknown => {
                // diesel hides the SQLSTATE; these texts are those of lc_messages = C or en_*.
                let message = information.message();
                let says = |part: &str| message.contains(part);
                if says("deadlock detected") {
                    Self::Collision(error)
                } else if says("canceling statement due to") {
                    Self::TimedOut(error.into())
                } else if says("terminating connection")
                    || says("the database system is")
                    || says("too many clients")
                    || says("remaining connection slots")
                {
                    Self::Unreachable(error.into())
                } else {
                    Self::Refused(error)
                }
            }
            _ => Self::Refused(error),
        }
    }
}

impl DbError {
    /// The status for the client. What is a defect, of the service or of its schema, is logged here and INTERNAL there.
    pub fn to_status(&self, domain: Domain) -> Status {
        let unavailable = |reason| {
            tracing::warn!(error = %chain(self), "the database is not available to a call");
            domain
                .status(Code::Unavailable, reason, "try again with the same request_id")
                .retry_after(RETRY_DELAY)
        };
        match self {
            Self::Unreachable(_) => unavailable("DATABASE_UNAVAILABLE"),
            Self::PoolExhausted => unavailable("DATABASE_BUSY"),
            Self::TimedOut(_) => unavailable("DATABASE_TIMEOUT"),
            Self::Collision(_) => unavailable("DATABASE_CONTENTION"),
            Self::OutcomeUnknown(_) => unavailable("OUTCOME_UNKNOWN"),
            Self::DeadlinePassed => domain.status(
                Code::DeadlineExceeded,
                "DEADLINE_EXCEEDED",
                "the deadline has passed",
            ),
            Self::Panicked(_) | Self::Refused(_) => {
                tracing::error!(error = %chain(self), "a call failed");
                domain.status(Code::Internal, "INTERNAL", "internal error")
            }
        }
        .build()
    }
}

/// What the errors of a transaction's work must tell: whether the database is behind them.
pub trait TransactionError: From<DbError> + Send {
    /// The database's error, if it is one.
    fn database(&self) -> Option<&DbError>;
}

impl TransactionError for DbError {
    fn database(&self) -> Option<&DbError> {
        Some(self)
    }
}

/// A database. Clones share the pool.
#[derive(Clone)]
pub struct Db {
    pool: Pool<AsyncPgConnection>,
    acquire_timeout: Duration,
    command_timeout: Duration,
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db")
            .field("status", &self.pool.status())
            .finish_non_exhaustive()
    }
}

/// The pool could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("database.url cannot be used")]
    Url(#[source] tokio_postgres::Error),
    #[error("the pool cannot be built")]
    Pool(#[from] diesel_async::pooled_connection::deadpool::BuildError),
}

impl Db {
    /// A pool that connects when it is first used. `application` shows in `pg_stat_activity`.
    ///
    /// # Errors
    /// When the URL cannot be parsed.
    pub fn new(config: &Database, application: &str) -> Result<Self, SetupError> {
        let mut session = session_config(&config.url, application, config.connect_timeout)?;
        let millis = |duration: Duration| duration.as_millis();
        let options = format!(
            "{} -c statement_timeout={} -c lock_timeout={} -c idle_in_transaction_session_timeout={}",
            session.get_options().unwrap_or_default(),
            millis(config.statement_timeout),
            millis(config.lock_timeout),
            millis(config.idle_in_transaction_timeout),
        );
        session.options(options.trim());
        let mut manager = ManagerConfig::default();
        // Broken connections are noticed without a query; the race that is left is what transaction() retries.
        manager.recycling_method = RecyclingMethod::Fast;
        let timeout = config.connect_timeout;
        manager.custom_setup = Box::new(move |_url| {
            let session = session.clone();
            Box::pin(async move { connect(&session, timeout).await })
        });
        let manager = AsyncDieselConnectionManager::new_with_config("", manager);
        let pool = Pool::builder(manager).max_size(config.pool_size).build()?;
        Ok(Self {
            pool,
            acquire_timeout: config.acquire_timeout,
            command_timeout: config.command_timeout,
        })
    }

    /// A connection, within the acquire timeout and the deadline.
    ///
    /// # Errors
    /// [`DbError::PoolExhausted`], [`DbError::Unreachable`] or [`DbError::DeadlinePassed`].
    pub async fn get(&self, deadline: Deadline) -> Result<Connection, DbError> {
        if deadline.has_passed() {
            return Err(DbError::DeadlinePassed);
        }
        let wait = self.acquire_timeout.min(deadline.remaining());
        match tokio::time::timeout(wait, self.pool.get()).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(DbError::Unreachable(error.into())),
            Err(_) if deadline.has_passed() => Err(DbError::DeadlinePassed),
            // All connections in use, or a connection that is being set up and hangs.
            Err(_) => Err(DbError::PoolExhausted),
        }
    }

    /// Runs `work` in one READ COMMITTED transaction: commits when it is `Ok`, rolls back when it is not.
    ///
    /// `work` may run several times, so it must have no effect but in the database. Once begun, the transaction ends
    /// within `command_timeout`, whatever the deadline; it is not begun when the deadline has passed. This future must not
    /// be dropped midway: call it through [`Commands`](crate::command::Commands).
    ///
    /// # Errors
    /// What `work` says, and every [`DbError`].
    pub async fn transaction<I, T, E, F>(&self, deadline: Deadline, input: &I, work: F) -> Result<T, E>
    where
        I: Sync,
        T: Send,
        E: TransactionError,
        F: for<'c> Fn(&'c mut AsyncPgConnection, &'c I) -> BoxFuture<'c, Result<T, E>> + Send + Sync,
    {
        let mut attempt = 1;
        loop {
            let mut connection = self.get(deadline).await?;
            if deadline.has_passed() {
                return Err(DbError::DeadlinePassed.into());
            }
            let once = attempt_transaction(&mut connection, input, &work);
            let error = match tokio::time::timeout(self.command_timeout, once).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => error,
                Err(late) => {
                    // Back in the pool it would keep its locks until somebody recycles it.
                    drop(Object::take(connection));
                    return Err(DbError::TimedOut(late.into()).into());
                }
            };
            let again = match error.database() {
                Some(DbError::Unreachable(_)) => {
                    self.drop_idle();
                    true
                }
                Some(DbError::Collision(_)) => true,
                _ => false,
            };
            if !again || attempt == ATTEMPTS {
                return Err(error);
            }
            attempt += 1;
        }
    }

    /// Runs `work`, which only reads, outside any transaction. Repeated on a fresh connection like [`Db::transaction`]; it
    /// may be dropped at any time, and ends with the deadline.
    ///
    /// # Errors
    /// What `work` says, and every [`DbError`].
    pub async fn read<I, T, E, F>(&self, deadline: Deadline, input: &I, work: F) -> Result<T, E>
    where
        I: Sync,
        T: Send,
        E: TransactionError,
        F: for<'c> Fn(&'c mut AsyncPgConnection, &'c I) -> BoxFuture<'c, Result<T, E>> + Send + Sync,
    {
        let mut attempt = 1;
        loop {
            let mut connection = self.get(deadline).await?;
            let error = match tokio::time::timeout_at(deadline.at(), work(&mut connection, input)).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => error,
                Err(_) => {
                    // Its query would keep whoever gets it next.
                    drop(Object::take(connection));
                    return Err(DbError::DeadlinePassed.into());
                }
            };
            if !matches!(error.database(), Some(DbError::Unreachable(_))) || attempt == ATTEMPTS {
                return Err(error);
            }
            self.drop_idle();
            attempt += 1;
        }
    }

    /// Where one connection turned out to be broken, the idle ones most likely are too: the next attempt gets a new one.
    fn drop_idle(&self) {
        self.pool.retain(|_, _| false);
    }

    /// Asks the database something trivial.
    ///
    /// # Errors
    /// Whatever keeps it from answering.
    pub async fn ping(&self) -> Result<(), DbError> {
        let mut connection = self.get(Deadline::after(self.acquire_timeout)).await?;
        match tokio::time::timeout(self.acquire_timeout, connection.batch_execute("SELECT 1")).await {
            Ok(answer) => Ok(answer?),
            Err(late) => {
                drop(Object::take(connection));
                Err(DbError::TimedOut(late.into()))
            }
        }
    }

    /// Keeps a readiness check up to date, for ever.
    pub async fn watch(self, check: Check, every: Duration) -> Result<(), BoxError> {
        let mut was_up = None;
        loop {
            let state = self.ping().await;
            if was_up != Some(state.is_ok()) {
                match &state {
                    Ok(()) => tracing::info!("the database answers"),
                    Err(error) => tracing::warn!(error = %chain(error), "the database does not answer"),
                }
                was_up = Some(state.is_ok());
            }
            check.set(state.map_err(|error| error.to_string()));
            tokio::time::sleep(every).await;
        }
    }

    /// The pool itself, for libraries that bound their waits and transactions on their own.
    pub fn pool(&self) -> &Pool<AsyncPgConnection> {
        &self.pool
    }

    /// Shows the pool as `db_pool_connections{state}` and `db_pool_waiting`.
    ///
    /// # Errors
    /// When they are registered already.
    pub fn register_metrics(&self, registry: &prometheus::Registry) -> prometheus::Result<()> {
        registry.register(Box::new(PoolMetrics::new(self.pool.clone())?))
    }
}

/// Reads the pool at each scrape.
struct PoolMetrics {
    pool: Pool<AsyncPgConnection>,
    connections: IntGaugeVec,
    waiting: IntGauge,
}

impl PoolMetrics {
    fn new(pool: Pool<AsyncPgConnection>) -> prometheus::Result<Self> {
        let connections = Opts::new(
            "db_pool_connections",
            "Connections of the pool: in use, idle, allowed at most.",
        );
        Ok(Self {
            pool,
            connections: IntGaugeVec::new(connections, &["state"])?,
            waiting: IntGauge::new("db_pool_waiting", "Calls that wait for a connection.")?,
        })
    }
}

impl Collector for PoolMetrics {
    fn desc(&self) -> Vec<&Desc> {
        [self.connections.desc(), self.waiting.desc()].concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let status = self.pool.status();
        let used = status.size.saturating_sub(status.available);
        for (state, count) in [
            ("used", used),
            ("idle", status.available),
            ("max", status.max_size),
        ] {
            self.connections
                .with_label_values(&[state])
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.waiting
            .set(i64::try_from(status.waiting).unwrap_or(i64::MAX));
        [self.connections.collect(), self.waiting.collect()].concat()
    }
}

/// Tells the end of `work` apart from the end of the transaction around it.
enum Ended<E> {
    Work(E),
    Transaction(DieselError),
}

impl<E> From<DieselError> for Ended<E> {
    fn from(error: DieselError) -> Self {
        Self::Transaction(error)
    }
}

async fn attempt_transaction<I, T, E, F>(
    connection: &mut AsyncPgConnection,
    input: &I,
    work: &F,
) -> Result<T, E>
where
    I: Sync,
    T: Send,
    E: TransactionError,
    F: for<'c> Fn(&'c mut AsyncPgConnection, &'c I) -> BoxFuture<'c, Result<T, E>> + Send + Sync,
{
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    let committing = AtomicBool::new(false);
    let ended = connection
        .transaction(async |connection| {
            let value = work(connection, input).await.map_err(Ended::Work)?;
            committing.store(true, Relaxed);
            Ok(value)
        })
        .await;
    ended.map_err(|error| match error {
        Ended::Work(error) => error,
        Ended::Transaction(error) => match DbError::from(error) {
            DbError::Unreachable(source) if committing.load(Relaxed) => {
                match source.downcast::<DieselError>() {
                    Ok(source) => DbError::OutcomeUnknown(*source).into(),
                    Err(source) => DbError::Unreachable(source).into(),
                }
            }
            error => error.into(),
        },
    })
}

fn session_config(
    url: &SecretString,
    application: &str,
    connect_timeout: Duration,
) -> Result<tokio_postgres::Config, SetupError> {
    let mut config: tokio_postgres::Config = url.expose_secret().parse().map_err(SetupError::Url)?;
    if config.get_application_name().is_none() {
        config.application_name(application);
    }
    config
        .connect_timeout(connect_timeout)
        .keepalives(true)
        .keepalives_idle(Duration::from_secs(15))
        .keepalives_interval(Duration::from_secs(5))
        .keepalives_retries(3)
        .tcp_user_timeout(Duration::from_secs(20));
    Ok(config)
}

async fn connect(
    config: &tokio_postgres::Config,
    timeout: Duration,
) -> Result<AsyncPgConnection, diesel::ConnectionError> {
    let failed = |error: BoxError| {
        diesel::ConnectionError::CouldntSetupConfiguration(DieselError::QueryBuilderError(error))
    };
    if config.get_ssl_mode() == SslMode::Require {
        return Err(failed("sslmode=require is not supported yet".into()));
    }
    // The time covers the log-in too, which tokio-postgres's own connect timeout does not.
    let setup = async {
        let (client, connection) = config
            .connect(NoTls)
            .await
            .map_err(|error| failed(error.into()))?;
        AsyncPgConnection::try_from_client_and_connection(client, connection).await
    };
    tokio::time::timeout(timeout, setup)
        .await
        .map_err(|late| failed(late.into()))?
}

/// A connection outside any pool, without statement timeouts: for migrations and reports over a whole database.
///
/// # Errors
/// When the database cannot be reached.
pub async fn connect_unbounded(config: &Database, application: &str) -> Result<AsyncPgConnection, BoxError> {
    let session = session_config(&config.url, application, config.connect_timeout)?;
    Ok(connect(&session, config.connect_timeout).await?)
}

/// Any number: all migrations of one database wait for each other on it.
const MIGRATION_LOCK: i64 = 0x6d69_6772_6174_6531;

/// Runs the migrations that a database has not had yet; returns their names. Safe when several processes do it at once:
/// the others wait up to a minute. Needs a multi-thread runtime.
///
/// # Errors
/// When the database cannot be reached, or a migration fails: it is rolled back, those before it stay.
pub async fn migrate(
    config: &Database,
    sources: impl IntoIterator<Item = EmbeddedMigrations>,
) -> Result<Vec<String>, BoxError> {
    let mut connection = connect_unbounded(config, "migrate").await?;
    let lock = format!("SET lock_timeout = '60s'; SELECT pg_advisory_lock({MIGRATION_LOCK})");
    connection.batch_execute(&lock).await?;
    let mut harness = AsyncMigrationHarness::new(connection);
    let mut names = Vec::new();
    for source in sources {
        names.extend(
            harness
                .run_pending_migrations(source)?
                .iter()
                .map(ToString::to_string),
        );
    }
    Ok(names) // the lock goes with the connection
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(kind: DatabaseErrorKind, message: &str) -> DbError {
        DieselError::DatabaseError(kind, Box::new(message.to_owned())).into()
    }

    #[test]
    fn errors_become_statuses() {
        use DatabaseErrorKind::{SerializationFailure, UnableToSendCommand, UniqueViolation, Unknown};
        for (kind, message, code) in [
            (UnableToSendCommand, "connection closed", Code::Unavailable),
            (SerializationFailure, "could not serialize", Code::Unavailable),
            (Unknown, "deadlock detected", Code::Unavailable),
            (
                Unknown,
                "canceling statement due to lock timeout",
                Code::Unavailable,
            ),
            (
                Unknown,
                "terminating connection due to administrator command",
                Code::Unavailable,
            ),
            (Unknown, "the database system is starting up", Code::Unavailable),
            (Unknown, "relation \"orders\" does not exist", Code::Internal),
            (UniqueViolation, "duplicate key", Code::Internal),
        ] {
            let status = refused(kind, message).to_status(Domain("test"));
            assert_eq!(status.code(), code, "{message}");
            assert!(!status.message().contains(message));
        }
    }
}
