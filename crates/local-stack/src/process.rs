//! A process of this workspace: a service or the relay.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::child::{self, Child, Launch};
use crate::{paths, ports, wait};

const LISTEN_LIMIT: Duration = Duration::from_secs(60);
const READY_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(30);
const RUN_LIMIT: Duration = Duration::from_secs(600);
/// Characters of the name of a log.
const MAX_LOG_NAME: usize = 50;
const HTTP_LIMIT: Duration = Duration::from_secs(3);

/// How to start a process.
#[derive(Debug, Clone)]
pub struct Builder {
    binary: String,
    instance: String,
    folder: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    config: String,
    port: Option<u16>,
    admin_port: Option<u16>,
}

impl Builder {
    /// A name of its own, where several instances of a binary share a folder. By default the binary's name.
    pub fn instance(mut self, instance: &str) -> Self {
        self.instance = instance.to_owned();
        self
    }

    /// A setting by its dotted name in the configuration file, for example `database.url`. It is passed on as
    /// environment variable, here `ORDER_SVC_DATABASE__URL`.
    pub fn set(mut self, key: &str, value: impl AsRef<str>) -> Self {
        let name = format!("{}{}", env_prefix(&self.binary), env_key(key));
        self.env.push((name.into(), value.as_ref().into()));
        self
    }

    /// More of the configuration, in TOML: for keys that are no names of environment variables.
    pub fn config(mut self, toml: &str) -> Self {
        self.config.push_str(toml);
        self
    }

    /// An environment variable as it is.
    pub fn env(mut self, name: &str, value: impl AsRef<str>) -> Self {
        self.env.push((name.into(), value.as_ref().into()));
        self
    }

    /// An argument; `run` is what a binary does without any.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// The port that it serves at; by default a free one.
    pub fn port(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    /// The port for metrics and health; by default a free one.
    pub fn admin_port(mut self, port: u16) -> Self {
        self.admin_port = Some(port);
        self
    }

    /// Runs a command that ends by itself, such as `migrate`. Fails with the end of its log if it fails.
    pub async fn run_to_end(self) -> Result<()> {
        let mut child = self.command()?;
        let status = child.wait(RUN_LIMIT).await?;
        if !status.success() {
            bail!(
                "{} failed ({status}); the end of its log {}:\n{}",
                self.command_name(),
                child.log().display(),
                child::tail(child.log(), 20)
            );
        }
        Ok(())
    }

    /// Starts a command that ends by itself.
    pub fn command(&self) -> Result<Child> {
        let name = self.command_name();
        // As much of it as may be the name of a file.
        let file: String = name
            .replacen(&self.binary, &self.instance, 1)
            .replace([' ', '/'], "-")
            .chars()
            .take(MAX_LOG_NAME)
            .collect();
        let log = self.folder.join(format!("{file}.log"));
        self.launch(name, log)?.spawn()
    }

    /// With its arguments.
    fn command_name(&self) -> String {
        let args = self.args.iter().map(|arg| arg.to_string_lossy());
        args.fold(self.binary.clone(), |name, arg| format!("{name} {arg}"))
    }

    /// Starts it and waits until it listens; see [`Process::ready`] for the rest.
    pub async fn start(self) -> Result<Process> {
        for attempt in 1.. {
            let free = ports::free_ports(2)?;
            let mut builder = self.clone();
            let port = builder.port.unwrap_or(free[0]);
            let admin = builder.admin_port.unwrap_or(free[1]);
            if let Some(key) = listen_key(&builder.binary) {
                builder = builder.set(key, format!("127.0.0.1:{port}"));
            }
            builder = builder.set("admin.listen", format!("127.0.0.1:{admin}"));
            let endpoints = self.folder.join(format!("{}.endpoints.json", self.instance));
            builder = builder.set("service.endpoints_file", endpoints.to_string_lossy());
            let log = self.folder.join(format!("{}.log", self.instance));
            let launch = builder.launch(self.instance.clone(), log.clone())?;
            let offset = child::length(&log);
            let mut process = Process {
                name: self.instance.clone(),
                launch,
                endpoints_file: endpoints,
                endpoints: None,
                child: None,
            };
            match process.start().await {
                Ok(()) => return Ok(process),
                Err(error) => {
                    let chosen_here = self.port.is_none() && self.admin_port.is_none();
                    let clash = child::written_since(&log, offset)
                        .to_lowercase()
                        .contains("address already in use");
                    if !(chosen_here && clash && attempt < 3) {
                        return Err(error);
                    }
                }
            }
        }
        bail!("{} did not start", self.instance)
    }

    fn launch(&self, name: String, log: PathBuf) -> Result<Launch> {
        std::fs::create_dir_all(&self.folder)
            .with_context(|| format!("cannot make {}", self.folder.display()))?;
        let mut args = self.args.clone();
        if !self.config.is_empty() {
            let file = self.folder.join(format!("{}.toml", self.instance));
            std::fs::write(&file, &self.config)
                .with_context(|| format!("cannot write {}", file.display()))?;
            args.extend([OsString::from("--config"), file.into()]);
        }
        let mut launch = Launch::new(name, paths::binary(&self.binary)?, log).args(args);
        launch.env = self.env.clone();
        // What the developer's shell sets for a process run by hand must not leak into this one.
        launch.without_env_prefix = Some(env_prefix(&self.binary));
        launch.folder = Some(self.folder.clone());
        Ok(launch)
    }
}

/// The setting of where it serves. The relay serves nobody, and a process refuses settings that it does not know.
fn listen_key(binary: &str) -> Option<&'static str> {
    match binary {
        "payment-sandbox" => Some("http.listen"),
        _ if binary.ends_with("-svc") => Some("grpc.listen"),
        _ => None,
    }
}

/// `order-svc` → `ORDER_SVC_`
fn env_prefix(binary: &str) -> String {
    format!("{}_", binary.replace('-', "_").to_uppercase())
}

/// `outbox.orders.database_url` → `OUTBOX__ORDERS__DATABASE_URL`
fn env_key(key: &str) -> String {
    key.replace('.', "__").to_uppercase()
}

/// What a process says about itself once it listens.
#[derive(Debug, Clone, Deserialize)]
struct Endpoints {
    pid: u32,
    grpc: Option<SocketAddr>,
    http: Option<SocketAddr>,
    admin: SocketAddr,
}

/// A running (or ended) process of this workspace. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    launch: Launch,
    endpoints_file: PathBuf,
    endpoints: Option<Endpoints>,
    child: Option<Child>,
}

impl Process {
    /// The workspace binary `binary`, whose log and endpoints file go to `folder`.
    pub fn builder(binary: &str, folder: impl Into<PathBuf>) -> Builder {
        Builder {
            binary: binary.to_owned(),
            instance: binary.to_owned(),
            folder: folder.into(),
            args: Vec::new(),
            env: Vec::new(),
            config: String::new(),
            port: None,
            admin_port: None,
        }
    }

    /// Starts it again after [`stop`](Self::stop) or [`kill`](Self::kill), on the same ports, and waits until it
    /// listens.
    pub async fn start(&mut self) -> Result<()> {
        if self.is_running() {
            return Ok(());
        }
        // Left by the one before.
        let _ = std::fs::remove_file(&self.endpoints_file);
        let mut child = self.launch.spawn()?;
        let pid = child.id();
        let file = &self.endpoints_file;
        let waited = wait::until(&format!("{} listens", self.name), LISTEN_LIMIT, || {
            let running = child.check_running();
            async move {
                running?;
                Ok(read_endpoints(file)?.filter(|endpoints| endpoints.pid == pid))
            }
        })
        .await;
        self.child = Some(child);
        self.endpoints =
            Some(waited.with_context(|| format!("{}; its log: {}", self.name, self.launch.log.display()))?);
        Ok(())
    }

    /// Waits until `/readyz` says yes.
    pub async fn ready(&mut self) -> Result<()> {
        self.ready_within(READY_LIMIT).await
    }

    /// As [`ready`](Self::ready), with a limit of the caller's.
    pub async fn ready_within(&mut self, limit: Duration) -> Result<()> {
        let admin = self.admin()?;
        let log = self.launch.log.clone();
        let name = self.name.clone();
        let child = self
            .child
            .as_mut()
            .with_context(|| format!("{name} was not started"))?;
        wait::until(&format!("{name} is ready"), limit, || {
            let running = child.check_running();
            async move {
                running?;
                Ok(matches!(http_get(admin, "/readyz").await, Ok((200, _))).then_some(()))
            }
        })
        .await
        .with_context(|| format!("{name} at {admin}; its log: {}", log.display()))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn log(&self) -> &Path {
        &self.launch.log
    }

    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Where it serves RPCs.
    pub fn grpc(&self) -> Result<SocketAddr> {
        let endpoints = self
            .endpoints
            .as_ref()
            .with_context(|| format!("{} does not listen", self.name))?;
        endpoints
            .grpc
            .with_context(|| format!("{} serves no RPCs", self.name))
    }

    /// The same as a URL for a client.
    pub fn grpc_url(&self) -> Result<String> {
        Ok(format!("http://{}", self.grpc()?))
    }

    /// Where it serves HTTP, other than metrics and health, as a URL for a client.
    pub fn http_url(&self) -> Result<String> {
        let http = self.endpoints.as_ref().and_then(|endpoints| endpoints.http);
        let http = http.with_context(|| format!("{} serves no HTTP", self.name))?;
        Ok(format!("http://{http}"))
    }

    /// Where it serves metrics and health.
    pub fn admin(&self) -> Result<SocketAddr> {
        Ok(self
            .endpoints
            .as_ref()
            .with_context(|| format!("{} does not listen", self.name))?
            .admin)
    }

    /// What `/metrics` says.
    pub async fn metrics(&self) -> Result<String> {
        let (status, body) = http_get(self.admin()?, "/metrics").await?;
        if status != 200 {
            bail!("{} answers /metrics with {status}", self.name);
        }
        Ok(body)
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(Child::is_running)
    }

    /// SIGTERM, and SIGKILL if that does not end it in time. Returns how it ended.
    pub async fn stop(&mut self) -> Result<ExitStatus> {
        self.stop_within(STOP_LIMIT).await
    }

    /// As [`stop`](Self::stop), with a limit of the caller's.
    pub async fn stop_within(&mut self, limit: Duration) -> Result<ExitStatus> {
        // A process that is frozen does not see SIGTERM.
        self.signal(Signal::SIGCONT)?;
        self.child_mut()?.stop(Signal::SIGTERM, limit).await
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child_mut()?.kill()
    }

    /// Freezes it.
    pub fn pause(&mut self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Undoes [`pause`](Self::pause).
    pub fn resume(&mut self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Any signal.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.child_mut()?.signal(signal)
    }

    /// Waits until it has ended by itself.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.child_mut()?.wait(limit).await
    }

    fn child_mut(&mut self) -> Result<&mut Child> {
        let name = &self.name;
        self.child
            .as_mut()
            .with_context(|| format!("{name} was not started"))
    }
}

fn read_endpoints(file: &Path) -> Result<Option<Endpoints>> {
    match std::fs::read(file) {
        // It is renamed into place, so it is whole.
        Ok(bytes) => {
            Ok(Some(serde_json::from_slice(&bytes).with_context(|| {
                format!("{} is not understood", file.display())
            })?))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", file.display())),
    }
}

/// A plain HTTP GET: status and body.
pub async fn http_get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        // HTTP/1.0: no chunks, and the end of the answer is the end of the connection.
        stream
            .write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes())
            .await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        std::io::Result::Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer = tokio::time::timeout(HTTP_LIMIT, exchange)
        .await
        .with_context(|| format!("http://{address}{path} has not answered within {HTTP_LIMIT:?}"))??;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.with_context(|| format!("http://{address}{path} answered {head:?}"))?;
    Ok((status, body.to_owned()))
}

/// Whether something listens at this port of loopback.
pub fn is_taken(port: u16) -> bool {
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err()
}
