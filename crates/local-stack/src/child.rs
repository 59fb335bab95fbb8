//! A child process that cannot outlive its parent.
//!
//! The kernel sends SIGKILL to a child when the *thread* that forked it ends (`PR_SET_PDEATHSIG`, set by `setpriv`).
//! So that this means "when the process ends", all children are forked by one thread that lives as long as the process:
//! nothing survives a Ctrl-C, a panic or a `kill -9` of the parent.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::paths;

/// Goes on with the real program only if the parent still lives: it may have died before its death was to be signalled.
const UNLESS_ORPHANED: &str = r#"[ "$PPID" = "$1" ] || exit 1; shift; exec "$@""#;

/// What to start.
#[derive(Debug, Clone)]
pub struct Launch {
    /// For messages.
    pub name: String,
    pub program: PathBuf,
    pub args: Vec<OsString>,
    pub env: Vec<(OsString, OsString)>,
    /// Inherited variables whose names start with this are taken away.
    pub without_env_prefix: Option<String>,
    /// The user to run as, when this process is root.
    pub user: Option<String>,
    pub folder: Option<PathBuf>,
    /// Standard output and error go here, appended.
    pub log: PathBuf,
}

impl Launch {
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>, log: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            without_env_prefix: None,
            user: None,
            folder: None,
            log: log.into(),
        }
    }

    pub fn args<S: Into<OsString>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    pub fn env<S: Into<OsString>>(mut self, variables: impl IntoIterator<Item = (&'static str, S)>) -> Self {
        let variables = variables
            .into_iter()
            .map(|(name, value)| (name.into(), value.into()));
        self.env.extend(variables);
        self
    }

    pub fn user(mut self, user: Option<&str>) -> Self {
        self.user = user.map(str::to_owned);
        self
    }

    pub fn folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// Starts it.
    pub fn spawn(&self) -> Result<Child> {
        let log = open_log(&self.log)?;
        let setpriv = paths::on_path("setpriv")
            .context("setpriv is missing; it is part of util-linux (apt-get install util-linux)")?;
        let mut command = Command::new(setpriv);
        command.args(["--pdeathsig", "KILL"]);
        if let Some(user) = self.user.as_deref().filter(|_| nix::unistd::geteuid().is_root()) {
            command.args(["--reuid", user, "--regid", user, "--init-groups"]);
        }
        command.args([
            "--",
            "/bin/sh",
            "-c",
            UNLESS_ORPHANED,
            "sh",
            &std::process::id().to_string(),
        ]);
        command.arg(&self.program).args(&self.args);
        if let Some(prefix) = &self.without_env_prefix {
            for (key, _) in std::env::vars_os() {
                if key.to_string_lossy().starts_with(prefix.as_str()) {
                    command.env_remove(key);
                }
            }
        }
        command.envs(self.env.iter().map(|(key, value)| (key, value)));
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // A group of its own: a Ctrl-C at the terminal is for the parent, which stops its children in order.
        command.process_group(0);
        let inner = spawn_from_lasting_thread(command)
            .with_context(|| format!("{} ({}) did not start", self.name, self.program.display()))?;
        Ok(Child {
            name: self.name.clone(),
            log: self.log.clone(),
            inner,
            status: None,
        })
    }
}

fn open_log(path: &Path) -> Result<File> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("cannot write the log {}", path.display()))
}

fn spawn_from_lasting_thread(command: Command) -> io::Result<std::process::Child> {
    type Job = (Command, mpsc::SyncSender<io::Result<std::process::Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, inbox) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            // Ends never: the sender is in a static.
            while let Ok((mut command, reply)) = inbox.recv() {
                // The asker waits for the answer, so it is there.
                let _ = reply.send(command.spawn());
            }
        });
        jobs
    });
    let (reply, answer) = mpsc::sync_channel(1);
    let gone = |_| io::Error::other("the thread that starts processes has ended");
    spawner.send((command, reply)).map_err(|_| gone(()))?;
    answer.recv().map_err(|_| gone(()))?
}

/// A running (or ended) child process. Dropping it kills it.
#[derive(Debug)]
pub struct Child {
    name: String,
    log: PathBuf,
    inner: std::process::Child,
    status: Option<ExitStatus>,
}

impl Child {
    pub fn id(&self) -> u32 {
        self.inner.id()
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// How it ended, if it has.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self
                .inner
                .try_wait()
                .with_context(|| format!("cannot ask how {} does", self.name))?;
        }
        Ok(self.status)
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.exited(), Ok(None))
    }

    /// Fails with the end of its log if it has ended.
    pub fn check_running(&mut self) -> Result<()> {
        match self.exited()? {
            None => Ok(()),
            Some(status) => anyhow::bail!(
                "{} ended ({status}); the end of its log {}:\n{}",
                self.name,
                self.log.display(),
                tail(&self.log, 20)
            ),
        }
    }

    /// Sends a signal; nothing happens when it has ended already.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        // Asked first, so that the pid is known not to belong to somebody else by now.
        if self.exited()?.is_none() {
            kill(self.pid(), signal).with_context(|| format!("cannot send {signal} to {}", self.name))?;
        }
        Ok(())
    }

    /// Waits until it has ended.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        let mut pause = Duration::from_millis(2);
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                anyhow::bail!(
                    "{} has not ended within {limit:?}; its log: {}",
                    self.name,
                    self.log.display()
                );
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// Asks it to end by `signal`, and kills it if it has not within `limit`. Returns how it ended.
    pub async fn stop(&mut self, signal: Signal, limit: Duration) -> Result<ExitStatus> {
        self.signal(signal)?;
        match self.wait(limit).await {
            Ok(status) => Ok(status),
            Err(_) => self.kill(),
        }
    }

    /// `kill -9`, and waits for its end.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.exited()? {
            return Ok(status);
        }
        self.signal(Signal::SIGKILL)?;
        let status = self
            .inner
            .wait()
            .with_context(|| format!("cannot wait for {}", self.name))?;
        self.status = Some(status);
        Ok(status)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.inner.id() as i32)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Nobody to tell; the parent's end would kill it anyway.
        let _ = self.kill();
    }
}

/// The last `lines` lines of a log, for messages.
pub fn tail(log: &Path, lines: usize) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// What was written to a log after `offset`.
pub(crate) fn written_since(log: &Path, offset: u64) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
    String::from_utf8_lossy(&bytes[start..]).into_owned()
}

/// How long a log is now.
pub(crate) fn length(log: &Path) -> u64 {
    log.metadata().map(|meta| meta.len()).unwrap_or(0)
}
