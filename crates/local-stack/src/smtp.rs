//! A mail server: aiosmtpd, with TLS and a login, which keeps what it takes and misbehaves on demand.
//!
//! The recipient decides what goes wrong, as cards do at the payment sandbox. The local part begins with a fault, and ends there or
//! with `+`: `data-451-once+ann@example.org`.
//!
//! | fault | |
//! | --- | --- |
//! | `rcpt-451`, `rcpt-550` … | the recipient is refused by that code |
//! | `data-451`, `data-554` … | the message is refused by that code |
//! | `rcpt-hang`, `rcpt-drop` | no answer; the connection is cut |
//! | `data-hang`, `data-drop` | the same instead of taking the message |
//! | `take-hang`, `take-drop` | the same after taking the message |
//! | any of them and `-once` | the first time that this recipient is addressed |

use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::certificates::{Authority, Certificate};
use crate::child::{self, Child, Launch};
use crate::{install, ports, wait};

/// Who may log in.
pub const USER: &str = "shop";
/// And by what.
pub const PASSWORD: &str = "smtp-pa55word";

const SCRIPT: &str = include_str!("smtp.py");
const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// How connections are encrypted. They have to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// From the first byte.
    Implicit,
    /// By STARTTLS.
    StartTls,
}

/// A running (or stopped) mail server on loopback. Dropping it kills it.
#[derive(Debug)]
pub struct Smtp {
    python: PathBuf,
    folder: PathBuf,
    tls: Tls,
    ca_file: PathBuf,
    certificate: Certificate,
    port: u16,
    child: Option<Child>,
}

/// A message that the server has taken.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Mail {
    /// The envelope's.
    pub sender: String,
    /// The envelope's.
    pub recipients: Vec<String>,
    /// Names in lower case, and decoded values.
    pub headers: Vec<(String, String)>,
    /// The part that is plain text, decoded.
    pub text: String,
    /// The part that is HTML, decoded.
    pub html: String,
    /// Whether it came by TLS.
    pub encrypted: bool,
    /// Who had logged in.
    pub login: String,
}

impl Mail {
    /// The value of a header; empty when there is none.
    pub fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(known, _)| known == name);
        found.map_or("", |(_, value)| value)
    }
}

/// What a server has taken that keeps it in `file`, first what came first.
pub fn received(file: &Path) -> Result<Vec<Mail>> {
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
    };
    // A line without its end is being written.
    text.split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
        .map(|line| serde_json::from_str(line).context("a mail is not understood"))
        .collect()
}

impl Smtp {
    /// Starts it on a free port, with a certificate for `localhost`. Installs it if need be.
    pub async fn start(folder: impl Into<PathBuf>, tls: Tls) -> Result<Self> {
        Self::start_on(folder, tls, None).await
    }

    /// The same on this port, or on a free one.
    pub async fn start_on(folder: impl Into<PathBuf>, tls: Tls, port: Option<u16>) -> Result<Self> {
        let program = install::ensure("aiosmtpd", "python3-aiosmtpd")?;
        let folder = folder.into();
        let authority = Authority::in_folder(folder.join("certificates"))?;
        // Made with the certificates in it.
        std::fs::write(folder.join("smtp.py"), SCRIPT)
            .with_context(|| format!("cannot write to {}", folder.display()))?;
        let mut server = Self {
            python: interpreter(&program)?,
            ca_file: authority.ca_file(),
            certificate: authority.issue("smtp")?,
            tls,
            port: 0,
            child: None,
            folder,
        };
        let mut last_error = None;
        for _ in 0..3 {
            server.port = match port {
                Some(port) => port,
                None => ports::free_ports(1)?[0],
            };
            let offset = child::length(&server.log());
            match server.restart().await {
                Ok(()) => return Ok(server),
                Err(error)
                    if port.is_none() && child::written_since(&server.log(), offset).contains("in use") =>
                {
                    last_error = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(last_error.unwrap_or_else(|| anyhow::anyhow!("the mail server did not start")))
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The certificate to trust, PEM. It is for `localhost` and `127.0.0.1`.
    pub fn ca_file(&self) -> &Path {
        &self.ca_file
    }

    /// What it has taken, first what came first; also before it was restarted.
    pub fn received(&self) -> Result<Vec<Mail>> {
        received(&self.received_file())
    }

    /// The file in which it keeps that.
    pub fn received_file(&self) -> PathBuf {
        self.folder.join("received.jsonl")
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(Child::is_running)
    }

    /// Starts it again after [`stop`](Self::stop) or [`kill`](Self::kill), on the same port.
    pub async fn restart(&mut self) -> Result<()> {
        if self.is_running() {
            return Ok(());
        }
        let mut args: Vec<String> = vec![self.folder.join("smtp.py").to_string_lossy().into_owned()];
        for (name, value) in [
            ("port", self.port.to_string()),
            ("folder", self.folder.to_string_lossy().into_owned()),
            (
                "certificate",
                self.certificate.certificate.to_string_lossy().into_owned(),
            ),
            ("key", self.certificate.key.to_string_lossy().into_owned()),
            ("user", USER.to_owned()),
            ("password", PASSWORD.to_owned()),
        ] {
            args.extend([format!("--{name}"), value]);
        }
        if self.tls == Tls::Implicit {
            args.push("--implicit".to_owned());
        }
        let mut child = Launch::new("the mail server", &self.python, self.log())
            .args(args)
            .spawn()?;
        let port = self.port;
        let waited = wait::until("the mail server listens", START_LIMIT, || {
            let running = child.check_running();
            async move {
                running?;
                Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok())
            }
        })
        .await;
        self.child = Some(child);
        waited.with_context(|| format!("its log: {}", self.log().display()))?;
        Ok(())
    }

    /// Closes all connections and ends.
    pub async fn stop(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.stop(Signal::SIGTERM, STOP_LIMIT).await?;
        }
        Ok(())
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
        }
        Ok(())
    }

    fn log(&self) -> PathBuf {
        self.folder.join("smtp.log")
    }
}

/// The Python for which a program was installed: several may be on a machine.
fn interpreter(program: &Path) -> Result<PathBuf> {
    let text =
        std::fs::read_to_string(program).with_context(|| format!("cannot read {}", program.display()))?;
    let first = text.lines().next().and_then(|line| line.strip_prefix("#!"));
    let python = first.and_then(|line| line.split_whitespace().last());
    python
        .map(PathBuf::from)
        .with_context(|| format!("{} is no script of Python", program.display()))
}
