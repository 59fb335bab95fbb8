//! How to reach the database of an outbox.

use std::path::PathBuf;

use secrecy::{ExposeSecret as _, SecretString};
use service::config::{Reader, Reported};

/// The database of one outbox.
#[derive(Debug, Clone)]
pub struct Connection {
    pub url: SecretString,
    pub pooling: Pooling,
    /// TLS, with these to check the server by. `None`: no TLS.
    pub tls_files: Option<TlsFiles>,
}

/// Certificates to know the server by, and to be known by.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    pub ca: PathBuf,
    /// Certificate chain and private key, both PEM.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// What is between the relay and the server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Pooling {
    /// Nothing, or a pooler that keeps a session together.
    #[default]
    Session,
    /// A pooler that gives each transaction another server connection, such as pgbouncer in transaction mode.
    Transaction,
}

impl std::str::FromStr for Pooling {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "session" => Ok(Self::Session),
            "transaction" => Ok(Self::Transaction),
            _ => Err("must be session or transaction"),
        }
    }
}

impl Connection {
    /// Without TLS or a pooler.
    pub fn plain(url: impl Into<SecretString>) -> Self {
        Self {
            url: url.into(),
            pooling: Pooling::Session,
            tls_files: None,
        }
    }

    pub(crate) fn config(&self) -> Result<tokio_postgres::Config, tokio_postgres::Error> {
        self.url.expose_secret().parse()
    }

    pub(super) fn read(reader: &mut Reader, section: &str) -> Result<Self, Reported> {
        let key = |key: &str| format!("{section}.{key}");
        let url = reader.secret(&key("database_url")).and_then(|url| {
            match url.expose_secret().parse::<tokio_postgres::Config>() {
                Ok(_) => Ok(url),
                Err(_) => reader.reject(
                    &key("database_url"),
                    "must be like postgres://user@host:port/database (hidden)",
                ),
            }
        });
        let pooling = reader.or(&key("pooling"), Pooling::Session);
        let ca: Result<Option<PathBuf>, _> = reader.optional(&key("tls.ca_file"));
        let chain: Result<Option<PathBuf>, _> = reader.optional(&key("tls.cert_file"));
        let private: Result<Option<PathBuf>, _> = reader.optional(&key("tls.key_file"));
        let (ca, client) = match (ca?, chain?, private?) {
            (ca, None, None) => (ca, None),
            (Some(ca), Some(chain), Some(private)) => (Some(ca), Some((chain, private))),
            (None, ..) => {
                return reader.reject(
                    &key("tls.ca_file"),
                    "is needed with tls.cert_file or tls.key_file",
                );
            }
            _ => {
                return reader.reject(
                    &key("tls.cert_file"),
                    "needs tls.key_file, and the other way round",
                );
            }
        };
        let url = url?;
        let wants_tls = url
            .expose_secret()
            .parse::<tokio_postgres::Config>()
            .is_ok_and(|config| config.get_ssl_mode() == tokio_postgres::config::SslMode::Require);
        if wants_tls && ca.is_none() {
            return reader.reject(
                &key("tls.ca_file"),
                "is missing: database_url asks for TLS (sslmode=require), and the server must be known by a certificate",
            );
        }
        Ok(Self {
            url,
            pooling: pooling?,
            tls_files: ca.map(|ca| TlsFiles { ca, client }),
        })
    }
}
