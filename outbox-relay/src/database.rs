//! A connection to PostgreSQL as the relay needs it: TLS, a bound on every statement, and the same settings whether there
//! is a session of our own or a pooler that hands every transaction to another server connection.

use std::future::poll_fn;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _, pin_mut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{
    AsyncMessage, Client, Connection, CopyOutStream, NoTls, Row, SimpleQueryMessage, Statement,
};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::task::AbortOnDropHandle;

use crate::config::{Connection as Target, Pooling, TlsFiles};
use crate::sql::identifier;

/// Why a statement failed.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// Goes away by itself, or with the server's return.
    #[error("PostgreSQL: {doing}")]
    Unavailable {
        doing: &'static str,
        source: tokio_postgres::Error,
    },
    #[error("PostgreSQL did not answer within {limit:?}: {doing}")]
    TimedOut { doing: &'static str, limit: Duration },
    #[error("TLS to PostgreSQL cannot be set up: {0}")]
    Tls(String),
    /// Session settings would reach others, and statements prepared by others could be run for ours.
    #[error(
        "a pooler gives this connection's transactions to server connections that others use too: set pooling = \
         \"transaction\" for this outbox"
    )]
    Pooled,
}

/// A value for a statement, with its type: poolers have no place for prepared statements that would tell it.
pub(crate) type Param<'a> = (&'a (dyn ToSql + Sync), Type);

/// A statement that is run often: prepared, where there is a session to prepare it in.
pub(crate) struct Prepared {
    text: String,
    statement: Option<Statement>,
}

pub(crate) struct Database {
    client: Client,
    connection: Served,
    limit: Duration,
    /// What every transaction begins with, behind a pooler.
    begin: Option<String>,
}

/// How long the server keeps a connection of ours that went silent, and the other way round.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// A generic plan made while the table was small would later scan and sort all of it: the head is always reached through
/// the primary key. What the planner must do all the same counts as so expensive then that it would compile each
/// statement, for half a second: no JIT. `synchronous_commit`: progress that is saved must not be lost.
const SETTINGS: [(&str, &str); 7] = [
    ("plan_cache_mode", "force_custom_plan"),
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_sort", "off"),
    ("jit", "off"),
    ("search_path", "pg_catalog"),
    ("synchronous_commit", "on"),
];

/// Says what to look at as well.
const CONNECT: &str = "connect: is it up, and is database_url right?";

impl Database {
    /// Connects and sets the session up. `limit` bounds each statement, and the attempt at each host.
    ///
    /// # Errors
    /// When the server cannot be reached, or TLS cannot be set up.
    pub(crate) async fn connect(
        target: &Target,
        application: &str,
        limit: Duration,
    ) -> Result<Self, DatabaseError> {
        let mut config = target.config().map_err(|source| DatabaseError::Unavailable {
            doing: "read database_url",
            source,
        })?;
        config
            .application_name(application)
            .connect_timeout(limit)
            .tcp_user_timeout(limit.max(Duration::from_secs(5)))
            .keepalives_idle(KEEPALIVE);
        let tls = target.tls_files.as_ref().map(tls).transpose()?;
        if tls.is_some() {
            config.ssl_mode(SslMode::Require);
        }
        let ((client, connection), host) = open_any(&config, tls.as_ref(), limit).await?;
        let settings = |keyword: &str| {
            let mut text = format!("{keyword} statement_timeout = {};", limit.as_millis());
            for (name, value) in SETTINGS {
                text.push_str(&format!("{keyword} {name} = {value};"));
            }
            text
        };
        let begin = match target.pooling {
            Pooling::Session => {
                // First: what is set would stay behind with a server connection that others use.
                refuse_shared(&client, &host, tls.as_ref(), limit).await?;
                within(
                    limit,
                    "set the session up",
                    client.batch_execute(&settings("SET")),
                )
                .await?;
                None
            }
            // Whoever had the server connection before may have changed what transactions begin with.
            Pooling::Transaction => Some(format!(
                "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;{}",
                settings("SET LOCAL")
            )),
        };
        Ok(Self {
            client,
            connection,
            limit,
            begin,
        })
    }

    pub(crate) async fn prepare(&self, doing: &'static str, text: String) -> Result<Prepared, DatabaseError> {
        let statement = match self.begin {
            None => Some(within(self.limit, doing, self.client.prepare(&text)).await?),
            Some(_) => None,
        };
        Ok(Prepared { text, statement })
    }

    /// The rows of a statement. It is a transaction of its own.
    pub(crate) async fn query(
        &self,
        doing: &'static str,
        text: &str,
        params: &[Param<'_>],
    ) -> Result<Vec<Row>, DatabaseError> {
        let rows = self.in_transaction(async {
            let rows = self.client.query_typed_raw(text, copied(params)).await?;
            collect(rows, Row::raw_size_bytes, usize::MAX).await
        });
        Ok(within(self.limit, doing, rows).await?.0)
    }

    /// The row of a statement that gives just one.
    pub(crate) async fn query_one(
        &self,
        doing: &'static str,
        text: &str,
        params: &[Param<'_>],
    ) -> Result<Row, DatabaseError> {
        let row = self.in_transaction(self.client.query_typed_one(text, params));
        within(self.limit, doing, row).await
    }

    /// How many rows a statement changed.
    pub(crate) async fn execute(
        &self,
        doing: &'static str,
        text: &str,
        params: &[Param<'_>],
    ) -> Result<u64, DatabaseError> {
        within(
            self.limit,
            doing,
            self.in_transaction(self.client.execute_typed(text, params)),
        )
        .await
    }

    /// The rows of a prepared statement until they have more than `max_bytes`, and their size. The row by which the limit
    /// is exceeded is the last.
    pub(crate) async fn rows(
        &self,
        doing: &'static str,
        prepared: &Prepared,
        params: &[Param<'_>],
        max_bytes: usize,
    ) -> Result<(Vec<Row>, usize), DatabaseError> {
        let rows = self.in_transaction(async {
            let rows = match &prepared.statement {
                Some(statement) => {
                    let values = params.iter().map(|(value, _)| *value);
                    self.client.query_raw(statement, values).await?
                }
                None => {
                    self.client
                        .query_typed_raw(&prepared.text, copied(params))
                        .await?
                }
            };
            collect(rows, Row::raw_size_bytes, max_bytes).await
        });
        within(self.limit, doing, rows).await
    }

    /// Begins a COPY to us; what is asked for after that is answered behind it. Not behind a pooler, where there is no place
    /// for its statement.
    pub(crate) async fn copy_out(
        &self,
        doing: &'static str,
        text: &str,
    ) -> Result<CopyOutStream, DatabaseError> {
        within(self.limit, doing, self.client.copy_out(text)).await
    }

    /// The messages of a COPY until they have more than `max_bytes`, and their size.
    pub(crate) async fn messages(
        &self,
        doing: &'static str,
        stream: CopyOutStream,
        max_bytes: usize,
    ) -> Result<(Vec<Bytes>, usize), DatabaseError> {
        within(self.limit, doing, collect(stream, Bytes::len, max_bytes)).await
    }

    /// From now on [`Self::notified`] sees what is sent to this channel. Not behind a pooler, where nobody would.
    pub(crate) async fn listen(&self, channel: &str) -> Result<(), DatabaseError> {
        if self.is_pooled() {
            return Ok(());
        }
        let text = format!("LISTEN {}", identifier(channel));
        within(self.limit, "listen", self.client.batch_execute(&text)).await
    }

    /// Waits for a notification; one that came since it was last waited for counts.
    pub(crate) async fn notified(&self) {
        self.connection.notified.notified().await;
    }

    /// Whether transactions may go to another server connection each.
    pub(crate) fn is_pooled(&self) -> bool {
        self.begin.is_some()
    }

    /// The first row of a prepared statement.
    pub(crate) async fn first(
        &self,
        doing: &'static str,
        prepared: &Prepared,
        params: &[Param<'_>],
    ) -> Result<Option<Row>, DatabaseError> {
        let (mut rows, _) = self.rows(doing, prepared, params, usize::MAX).await?;
        Ok((!rows.is_empty()).then(|| rows.swap_remove(0)))
    }

    /// A script without parameters, in one transaction; `limit` bounds the whole of it.
    pub(crate) async fn script(
        &self,
        doing: &'static str,
        text: &str,
        limit: Duration,
    ) -> Result<(), DatabaseError> {
        // The session's own settings are for reads by id; and what is made must be found. Writers queue behind a lock that
        // is waited for.
        let text = format!(
            "BEGIN; SET LOCAL statement_timeout = {}; SET LOCAL lock_timeout = '5s'; SET LOCAL search_path = pg_catalog;\n{text}\nCOMMIT;",
            limit.as_millis()
        );
        within(limit, doing, self.client.batch_execute(&text)).await
    }

    /// Behind a pooler: begin, settings, statement and commit go out together and cost one round trip. Requests are sent
    /// in the order in which their futures are first polled.
    async fn in_transaction<T>(
        &self,
        statement: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, tokio_postgres::Error> {
        let Some(begin) = &self.begin else {
            return statement.await;
        };
        let (begun, result, committed) = futures::join!(
            self.client.batch_execute(begin),
            statement,
            self.client.batch_execute("COMMIT")
        );
        begun?;
        let result = result?;
        committed?;
        Ok(result)
    }
}

/// The task that serves a connection. It ends with the client; its error reaches us through the statement that it broke.
struct Served {
    notified: Arc<Notify>,
    _task: AbortOnDropHandle<()>,
}

impl Served {
    fn new<S, T>(mut connection: Connection<S, T>) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let notified = Arc::new(Notify::new());
        let notify = Arc::clone(&notified);
        let task = tokio::spawn(async move {
            while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
                if matches!(message, AsyncMessage::Notification(_)) {
                    notify.notify_one();
                }
            }
        });
        Self {
            notified,
            _task: AbortOnDropHandle::new(task),
        }
    }
}

type Opened = (Client, Served);
type Configured = tokio_postgres::Config;

/// Tries one host after the other. Each has `limit` for itself: one that takes connections and says nothing must not keep
/// the next from being tried.
async fn open_any(
    config: &Configured,
    tls: Option<&MakeRustlsConnect>,
    limit: Duration,
) -> Result<(Opened, Configured), DatabaseError> {
    let mut host = of_host(config, 0);
    let mut opened = open(&host, tls, limit).await;
    for position in 1..config.get_hosts().len() {
        if opened.is_ok() {
            break;
        }
        host = of_host(config, position);
        opened = open(&host, tls, limit).await;
    }
    Ok((opened?, host))
}

async fn open(
    config: &Configured,
    tls: Option<&MakeRustlsConnect>,
    limit: Duration,
) -> Result<Opened, DatabaseError> {
    Ok(match tls {
        Some(tls) => {
            let (client, connection) = within(limit, CONNECT, config.connect(tls.clone())).await?;
            (client, Served::new(connection))
        }
        None => {
            let (client, connection) = within(limit, CONNECT, config.connect(NoTls)).await?;
            (client, Served::new(connection))
        }
    })
}

/// The configuration for one of several hosts; hosts can be added to one, not taken away.
fn of_host(config: &Configured, position: usize) -> Configured {
    let hosts = config.get_hosts();
    let (Some(host), true) = (hosts.get(position), hosts.len() > 1) else {
        return config.clone();
    };
    let mut one = Configured::new();
    match host {
        Host::Tcp(name) => one.host(name),
        Host::Unix(path) => one.host_path(path),
    };
    if let Some(address) = config.get_hostaddrs().get(position) {
        one.hostaddr(*address);
    }
    let ports = config.get_ports();
    if let Some(port) = ports.get(position).or_else(|| ports.first()) {
        one.port(*port);
    }
    if let Some(user) = config.get_user() {
        one.user(user);
    }
    if let Some(password) = config.get_password() {
        one.password(password);
    }
    if let Some(database) = config.get_dbname() {
        one.dbname(database);
    }
    if let Some(options) = config.get_options() {
        one.options(options);
    }
    if let Some(name) = config.get_application_name() {
        one.application_name(name);
    }
    if let Some(timeout) = config.get_connect_timeout() {
        one.connect_timeout(*timeout);
    }
    if let Some(timeout) = config.get_tcp_user_timeout() {
        one.tcp_user_timeout(*timeout);
    }
    one.ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .channel_binding(config.get_channel_binding())
        .target_session_attrs(config.get_target_session_attrs())
        .keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle());
    one
}

/// Two connections that are open at once and are served by one server process, or one that is served by two, are a
/// pooler's work.
async fn refuse_shared(
    client: &Client,
    host: &Configured,
    tls: Option<&MakeRustlsConnect>,
    limit: Duration,
) -> Result<(), DatabaseError> {
    const ROUNDS: usize = 3;
    let served_by = async |client: &Client| -> Result<String, DatabaseError> {
        let asked = client.simple_query("SELECT pg_backend_pid()");
        let messages = within(limit, "ask who serves this connection", asked).await?;
        let found = messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        Ok(found.unwrap_or_default().to_owned())
    };
    let first = served_by(client).await?;
    // There may be no room for a second one: then the first is not shared either.
    let Ok((other, _task)) = open(host, tls, limit).await else {
        return Ok(());
    };
    for _ in 0..ROUNDS {
        let Ok(others) = served_by(&other).await else {
            return Ok(());
        };
        if others == first || served_by(client).await? != first {
            return Err(DatabaseError::Pooled);
        }
    }
    Ok(())
}

fn copied<'a>(params: &'a [Param<'a>]) -> impl Iterator<Item = (&'a (dyn ToSql + Sync), Type)> {
    params.iter().map(|(value, kind)| (*value, kind.clone()))
}

/// What a stream gives until that is more than `max_bytes`, and its size.
async fn collect<T>(
    stream: impl Stream<Item = Result<T, tokio_postgres::Error>>,
    size: impl Fn(&T) -> usize,
    max_bytes: usize,
) -> Result<(Vec<T>, usize), tokio_postgres::Error> {
    pin_mut!(stream);
    let (mut taken, mut bytes) = (Vec::new(), 0);
    while let Some(item) = stream.next().await {
        let item = item?;
        bytes += size(&item);
        taken.push(item);
        if bytes > max_bytes {
            break;
        }
    }
    Ok((taken, bytes))
}

async fn within<T>(
    limit: Duration,
    doing: &'static str,
    work: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, DatabaseError> {
    match timeout(limit, work).await {
        Ok(result) => result.map_err(|source| DatabaseError::Unavailable { doing, source }),
        Err(_) => Err(DatabaseError::TimedOut { doing, limit }),
    }
}

fn tls(files: &TlsFiles) -> Result<MakeRustlsConnect, DatabaseError> {
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};

    let unreadable = |path: &Path, problem: &dyn std::fmt::Display| {
        DatabaseError::Tls(format!("{}: {problem}", path.display()))
    };
    let certificates = |path: &Path| -> Result<Vec<CertificateDer<'static>>, DatabaseError> {
        let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
            .map_err(|error| unreadable(path, &error))?
            .collect();
        match all {
            Ok(all) if all.is_empty() => Err(unreadable(path, &"holds no certificate")),
            Ok(all) => Ok(all),
            Err(error) => Err(unreadable(path, &error)),
        }
    };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates(&files.ca)? {
        roots
            .add(certificate)
            .map_err(|error| unreadable(&files.ca, &error))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| DatabaseError::Tls(error.to_string()))?
        .with_root_certificates(roots);
    let config = match &files.client {
        None => config.with_no_client_auth(),
        Some((chain, key)) => {
            let key_der = PrivateKeyDer::from_pem_file(key).map_err(|error| unreadable(key, &error))?;
            config
                .with_client_auth_cert(certificates(chain)?, key_der)
                .map_err(|error| unreadable(chain, &error))?
        }
    };
    Ok(MakeRustlsConnect::new(config))
}
