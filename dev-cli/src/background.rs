//! Something that stays up after the command has returned: a copy of this tool, in a session of its own, that supervises
//! what it started.
//!
//! In the folder: `supervisor.lock` is locked exactly as long as the supervisor lives and holds its pid;
//! `endpoints.json` exists exactly while everything is up; `supervisor.log` is what it says.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use local_stack::{paths, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;

const STOP_LIMIT: Duration = Duration::from_secs(90);

pub(crate) struct Background {
    folder: PathBuf,
}

impl Background {
    pub(crate) fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
        }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn endpoints_file(&self) -> PathBuf {
        self.folder.join("endpoints.json")
    }

    fn log(&self) -> PathBuf {
        self.folder.join("supervisor.log")
    }

    /// The pid of the supervisor, if one runs.
    pub(crate) fn running(&self) -> Result<Option<i32>> {
        match self.try_lock()? {
            Some(_) => Ok(None),
            None => {
                let text = std::fs::read_to_string(self.folder.join("supervisor.lock"))?;
                Ok(Some(text.trim().parse().context("supervisor.lock holds no pid")?))
            }
        }
    }

    /// Starts `dev-cli supervise ARGS` and waits until its endpoints file is there, repeating what it says.
    pub(crate) async fn start(&self, args: &[String]) -> Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let _ = std::fs::remove_file(self.endpoints_file());
        let log = File::create(self.log())?;
        // A session of its own: closing the terminal does not end it.
        let setsid = paths::on_path("setsid").context("setsid is missing (apt-get install util-linux)")?;
        let mut supervisor = Command::new(setsid)
            .arg(std::env::current_exe()?)
            .arg("supervise")
            .args(args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let mut shown = 0;
        let mut repeat = || -> Result<()> {
            let mut file = File::open(self.log())?;
            file.seek(SeekFrom::Start(shown))?;
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            // Whole lines only.
            if let Some(end) = text.rfind('\n') {
                eprint!("{}", &text[..=end]);
                shown += end as u64 + 1;
            }
            Ok(())
        };
        let waited = tokio::select! {
            waited = wait::until("everything is up", Duration::from_secs(600), || {
                let check = (|| {
                    repeat()?;
                    if let Some(status) = supervisor.try_wait()? {
                        repeat()?;
                        bail!("it did not start ({status}); its log: {}", self.log().display());
                    }
                    Ok(self.endpoints_file().exists().then_some(()))
                })();
                std::future::ready(check)
            }) => waited,
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        };
        if waited.is_err() && matches!(supervisor.try_wait(), Ok(None)) {
            self.stop().await?;
        }
        waited
    }

    /// Stops the supervisor and with it all it started. False when none runs.
    pub(crate) async fn stop(&self) -> Result<bool> {
        let Some(pid) = self.running()? else {
            return Ok(false);
        };
        let pid = Pid::from_raw(pid);
        kill(pid, Signal::SIGTERM).context("cannot signal the supervisor")?;
        let ended = async || {
            wait::until("the supervisor ends", STOP_LIMIT, || {
                std::future::ready(self.running().map(|pid| pid.is_none().then_some(())))
            })
            .await
        };
        if ended().await.is_err() {
            // What it started ends with it.
            kill(pid, Signal::SIGKILL)?;
            ended().await?;
        }
        Ok(true)
    }

    /// For the supervisor: marks it as running for as long as the result is kept.
    pub(crate) fn enter(&self) -> Result<File> {
        std::fs::create_dir_all(&self.folder)?;
        let Some(mut lock) = self.try_lock()? else {
            bail!("it is already up")
        };
        lock.set_len(0)?;
        write!(lock, "{}", std::process::id())?;
        Ok(lock)
    }

    /// For the supervisor: says that everything is up.
    pub(crate) fn announce(&self, endpoints: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(endpoints)?;
        let draft = self.folder.join("endpoints.json.draft");
        std::fs::write(&draft, text + "\n")?;
        std::fs::rename(draft, self.endpoints_file())?;
        Ok(())
    }

    /// For the supervisor: says that it is on its way down.
    pub(crate) fn withdraw(&self) {
        let _ = std::fs::remove_file(self.endpoints_file());
    }

    fn try_lock(&self) -> Result<Option<File>> {
        std::fs::create_dir_all(&self.folder)?;
        let path = self.folder.join("supervisor.lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .read(true)
            .open(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).context("cannot lock supervisor.lock"),
        }
    }
}

/// Waits for a request to end: Ctrl-C or SIGTERM.
pub(crate) async fn asked_to_end() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = hangup.recv() => {}
    }
    Ok(())
}
