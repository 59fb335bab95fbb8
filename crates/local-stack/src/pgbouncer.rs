//! PgBouncer in front of a PostgreSQL, in transaction mode and otherwise as people have it.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::child::{self, Child, Launch};
use crate::postgres::{self, SUPERUSER, connect};
use crate::{install, ports, wait};

/// How many connections to the server it opens per database and user.
pub const POOL_SIZE: usize = 3;

const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// A running PgBouncer on loopback, which lets in every role of the server behind it. Dropping it kills it.
///
/// Debian 12 has 1.18, which does not know statements prepared by the protocol: they are gone, or somebody else's, after
/// a transaction.
#[derive(Debug)]
pub struct Pgbouncer {
    program: PathBuf,
    user: Option<String>,
    folder: PathBuf,
    log: PathBuf,
    port: u16,
    child: Option<Child>,
}

impl Pgbouncer {
    /// Starts it in front of the PostgreSQL at `server_port` of loopback. Installs it if need be.
    pub async fn start(folder: impl Into<PathBuf>, server_port: u16) -> Result<Self> {
        let program = install::ensure("pgbouncer", "pgbouncer")?;
        let folder = folder.into();
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        // It does not run as root either.
        let owner = postgres::owner()?;
        let data = postgres::data_folder(&folder, owner.as_ref())?;
        let mut last_error = None;
        for _ in 0..3 {
            let mut bouncer = Self {
                program: program.clone(),
                user: owner.as_ref().map(|user| user.name.clone()),
                folder: data.clone(),
                log: folder.join("pgbouncer.log"),
                port: ports::free_ports(1)?[0],
                child: None,
            };
            bouncer.write_settings(server_port)?;
            let offset = child::length(&bouncer.log);
            match bouncer.restart().await {
                Ok(()) => return Ok(bouncer),
                Err(error) if child::written_since(&bouncer.log, offset).contains("in use") => {
                    last_error = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(last_error.unwrap_or_else(|| anyhow::anyhow!("PgBouncer did not start")))
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The connection URL of `database` through it, as superuser.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://{SUPERUSER}@127.0.0.1:{}/{database}", self.port)
    }

    /// Starts it again after [`stop`](Self::stop) or [`kill`](Self::kill), on the same port.
    pub async fn restart(&mut self) -> Result<()> {
        if let Some(running) = &mut self.child
            && running.is_running()
        {
            return Ok(());
        }
        let mut child = Launch::new("PgBouncer", &self.program, &self.log)
            .args([self.folder.join("pgbouncer.ini")])
            .user(self.user.as_deref())
            .folder(&self.folder)
            .spawn()?;
        // Its own console: whether the server behind it answers is another matter.
        let url = self.url("pgbouncer");
        let waited = wait::until("PgBouncer answers", START_LIMIT, || {
            let running = child.check_running();
            let url = &url;
            async move {
                running?;
                Ok(is_listening(url).await.then_some(()))
            }
        })
        .await;
        self.child = Some(child);
        waited.with_context(|| format!("PgBouncer did not start; its log: {}", self.log.display()))
    }

    /// Closes all connections at once and ends.
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

    fn write_settings(&self, server_port: u16) -> Result<()> {
        let port = self.port;
        let users = self.folder.join("users.txt");
        // Everybody else is looked up at the server.
        write(&users, &format!("\"{SUPERUSER}\" \"\"\n"))?;
        write(
            &self.folder.join("pgbouncer.ini"),
            &format!(
                "[databases]\n\
                 * = host=127.0.0.1 port={server_port} auth_user={SUPERUSER}\n\
                 [pgbouncer]\n\
                 listen_addr = 127.0.0.1\n\
                 listen_port = {port}\n\
                 unix_socket_dir =\n\
                 auth_type = trust\n\
                 auth_file = {}\n\
                 admin_users = {SUPERUSER}\n\
                 pool_mode = transaction\n\
                 default_pool_size = {POOL_SIZE}\n\
                 ignore_startup_parameters = extra_float_digits\n",
                users.display()
            ),
        )
    }
}

/// Written as root, read as the user it runs as.
fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))?;
    Ok(())
}

/// The console knows no `SELECT 1`, so anything that the other side says in answer will do.
async fn is_listening(url: &str) -> bool {
    match connect(url).await {
        Ok(_) => true,
        Err(error) => error
            .downcast_ref::<tokio_postgres::Error>()
            .is_some_and(|error| error.as_db_error().is_some()),
    }
}
