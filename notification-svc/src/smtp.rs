//! The mail server: connections with TLS and a login, and one mail over one of them.
//!
//! What an error means depends on how far a mail had come. Until the message is handed over, nothing can have been taken; an answer to the
//! message says what became of it; and without that answer, nobody knows. Texts of the mail server are never kept: they may name
//! the address.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lettre::Address;
use lettre::Message;
use lettre::message::Mailbox;
use lettre::transport::smtp::Error;
use lettre::transport::smtp::authentication::{Credentials, Mechanism};
use lettre::transport::smtp::client::{
    AsyncSmtpConnection, Certificate, TlsParameters, TlsParametersBuilder,
};
use lettre::transport::smtp::commands::{Data, Mail, Quit, Rcpt, Rset};
use lettre::transport::smtp::extension::{ClientId, Extension, MailParameter};
use lettre::transport::smtp::response::Severity;
use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::Instant;

use crate::domain::{Outcome, Trouble};

/// The longest that closing a connection may take: it is a courtesy.
const QUIT_LIMIT: Duration = Duration::from_secs(1);

/// How connections are encrypted. They always are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// From the first byte (RFC 8314).
    Implicit,
    /// By STARTTLS; a server that does not offer it is not used.
    StartTls,
}

/// Where the mail server is, and who we are to it.
#[derive(Debug, Clone)]
pub struct Config {
    pub host: String,
    pub port: u16,
    pub tls: Tls,
    /// To be trusted besides the well-known ones, PEM.
    pub ca_file: Option<PathBuf>,
    pub login: Option<(String, SecretString)>,
    /// Who we say we are.
    pub hello: ClientId,
    /// The sender of every mail.
    pub from: Mailbox,
    /// The longest that it may take from the first byte of a connection, or of a mail, to the message.
    pub timeout: Duration,
    /// The longest that the mail server may take to answer a message.
    pub data_timeout: Duration,
}

/// Why there can be no connections at all.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("smtp.ca_file {0} cannot be read")]
    CaFile(PathBuf, #[source] std::io::Error),
    #[error("smtp.ca_file holds no certificates")]
    Certificates(#[source] Error),
    #[error("there can be no TLS with smtp.host")]
    Tls(#[source] Error),
}

/// What the mail server, or the way to it, does not let us do. Nothing has been taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Away {
    pub trouble: Trouble,
    /// What the operating system or TLS says, or the mail server's code.
    detail: String,
}

impl fmt::Display for Away {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.trouble.name(), self.detail)
    }
}

impl std::error::Error for Away {}

impl Away {
    fn new(trouble: Trouble, error: &Error) -> Self {
        let trouble = match error.status() {
            Some(code) if code.severity == Severity::TransientNegativeCompletion => Trouble::ServerBusy,
            _ => trouble,
        };
        let detail = match error.status() {
            Some(code) => code.to_string(),
            // It may quote the answer.
            None if error.is_response() => "an answer that is none of SMTP's".to_owned(),
            None => service::telemetry::chain(error).to_string(),
        };
        Self { trouble, detail }
    }

    fn timeout() -> Self {
        Self {
            trouble: Trouble::Timeout,
            detail: "no answer in time".to_owned(),
        }
    }
}

/// The mail server.
#[derive(Clone)]
pub struct Server {
    config: Config,
    tls: TlsParameters,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Reads the certificates; connects to nothing yet.
    ///
    /// # Errors
    /// [`SetupError`]
    pub fn new(config: Config) -> Result<Self, SetupError> {
        let mut tls = TlsParametersBuilder::new(config.host.clone());
        if let Some(file) = &config.ca_file {
            let pem = std::fs::read(file).map_err(|error| SetupError::CaFile(file.clone(), error))?;
            tls = tls.add_root_certificate(Certificate::from_pem(&pem).map_err(SetupError::Certificates)?);
        }
        let tls = tls.build_rustls().map_err(SetupError::Tls)?;
        Ok(Self { config, tls })
    }

    /// The settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// A connection that mails can be sent over, within the timeout.
    ///
    /// # Errors
    /// When there is none to be had.
    pub async fn connect(&self) -> Result<Session, Away> {
        match tokio::time::timeout(self.config.timeout, self.try_connect()).await {
            Ok(connected) => connected,
            Err(_) => Err(Away::timeout()),
        }
    }

    async fn try_connect(&self) -> Result<Session, Away> {
        let Config {
            host,
            port,
            tls,
            login,
            hello,
            timeout,
            ..
        } = &self.config;
        let implicit = (*tls == Tls::Implicit).then(|| self.tls.clone());
        let mut connection = AsyncSmtpConnection::connect_tokio1(
            (host.as_str(), *port),
            Some(*timeout),
            hello,
            implicit,
            None,
        )
        .await
        .map_err(|error| {
            let trouble = if error.is_tls() {
                Trouble::Tls
            } else {
                Trouble::Unreachable
            };
            Away::new(trouble, &error)
        })?;
        if *tls == Tls::StartTls {
            connection
                .starttls(self.tls.clone(), hello)
                .await
                .map_err(|error| Away::new(Trouble::Tls, &error))?;
        }
        if let Some((user, password)) = login {
            let credentials = Credentials::new(user.clone(), password.expose_secret().to_owned());
            connection
                .auth(&[Mechanism::Plain, Mechanism::Login], &credentials)
                .await
                .map_err(|error| Away::new(Trouble::LoginRefused, &error))?;
        }
        Ok(Session { connection })
    }
}

/// A connection on which we are logged in.
pub struct Session {
    connection: AsyncSmtpConnection,
}

impl Session {
    /// Whether it is still good for a mail.
    pub async fn is_usable(&mut self, timeout: Duration) -> bool {
        let reset = tokio::time::timeout(timeout, self.connection.command(Rset)).await;
        matches!(reset, Ok(Ok(_)))
    }

    /// Sends one message, unless it comes to that later than `hand_over_by`. `handed_over` becomes true before the first byte of it leaves:
    /// should this future be dropped, that tells what can have happened. [`Outcome::leaves_connection`] says whether the session may be used again.
    pub async fn send(
        &mut self,
        message: &Message,
        hand_over_by: Instant,
        handed_over: &AtomicBool,
    ) -> Outcome {
        let envelope = message.envelope();
        let mut options = Vec::new();
        if envelope.to().iter().chain(envelope.from()).any(is_international) {
            if !self
                .connection
                .server_info()
                .supports_feature(Extension::SmtpUtfEight)
            {
                return Outcome::Refused(Trouble::AddressNotSupported);
            }
            options.push(MailParameter::SmtpUtfEight);
        }
        let is_plain = options.is_empty();
        let mail = Mail::new(envelope.from().cloned(), options);
        if let Err(error) = self.connection.command(mail).await {
            // All mails come from one sender, and fare alike.
            return match Away::new(Trouble::ConnectionLost, &error).trouble {
                _ if error.is_permanent() && is_plain => Outcome::ServerAway(Trouble::SenderRefused),
                _ if error.is_permanent() => Outcome::Refused(Trouble::AddressNotSupported),
                trouble => Outcome::ServerAway(trouble),
            };
        }
        for to in envelope.to() {
            if let Err(error) = self.connection.command(Rcpt::new(to.clone(), Vec::new())).await {
                let refused = Outcome::Refused(Trouble::RecipientRefused);
                return before(&error, refused, Trouble::RecipientDeferred);
            }
        }
        if let Err(error) = self.connection.command(Data).await {
            let refused = Outcome::Refused(Trouble::MessageRefused);
            return before(&error, refused, Trouble::MessageDeferred);
        }
        // Whoever was stopped meanwhile finds the answers that came, and not always at once that time has passed.
        if Instant::now() >= hand_over_by {
            return Outcome::Deferred(Trouble::Timeout);
        }
        handed_over.store(true, Ordering::SeqCst);
        match self.connection.message(&message.formatted()).await {
            Ok(_) => Outcome::Taken,
            Err(error) if error.is_permanent() => Outcome::Refused(Trouble::MessageRefused),
            Err(error) if error.is_transient() => Outcome::Deferred(Trouble::MessageDeferred),
            Err(_) => Outcome::Unknown(Trouble::NoAnswer),
        }
    }

    /// Takes leave.
    pub async fn quit(mut self) {
        // What was sent was sent, whatever comes of this.
        let _ = tokio::time::timeout(QUIT_LIMIT, self.connection.command(Quit)).await;
    }
}

fn is_international(address: &Address) -> bool {
    !AsRef::<str>::as_ref(address).is_ascii()
}

/// What an error before the message means: `refused` if it is for good, `deferred` if it is for now. 421 is of the connection, whatever
/// it answers (RFC 5321, 3.8). A connection that is lost with a mail in hand may be that mail's doing, so the mail waits too.
fn before(error: &Error, refused: Outcome, deferred: Trouble) -> Outcome {
    match error.status() {
        Some(code) if code.to_string() == "421" => Outcome::ServerAway(Trouble::ServerBusy),
        Some(_) if error.is_permanent() => refused,
        Some(_) => Outcome::Deferred(deferred),
        None => Outcome::Deferred(Trouble::ConnectionLost),
    }
}
