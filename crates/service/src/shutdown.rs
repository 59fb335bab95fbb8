//! Stopping: from signals to the end of every task.

use std::fmt;
use std::future::Future;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Any error, as tasks hand it to their supervisor.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A token that is cancelled by the first SIGTERM or SIGINT; the second one ends the process at once.
///
/// Call it before anything else starts, within a runtime.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn on_signals() -> std::io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let token = CancellationToken::new();
    let cancelled = token.clone();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => ("SIGTERM", 143),
                _ = interrupt.recv() => ("SIGINT", 130),
            }
        };
        let (name, _) = next().await;
        tracing::info!(signal = name, "stopping");
        cancelled.cancel();
        let (name, code) = next().await;
        tracing::warn!(signal = name, "second signal, leaving at once");
        std::process::exit(code);
    });
    Ok(token)
}

/// A task ended that should have run until shutdown, or did not end in time.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    #[error("task {0} ended although nobody asked it to")]
    Ended(&'static str),
    #[error("task {name} failed")]
    Failed { name: &'static str, source: BoxError },
    #[error("task {name} panicked")]
    Panicked { name: &'static str, source: JoinError },
    #[error("tasks {0} did not end in time")]
    TimedOut(Names),
}

/// Names of tasks.
#[derive(Debug)]
pub struct Names(Vec<&'static str>);

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

/// The tasks of a process. One that ends early brings all the others down.
#[derive(Debug)]
pub struct Supervisor {
    shutdown: CancellationToken,
    tasks: JoinSet<Result<(), BoxError>>,
    names: Vec<(Id, &'static str)>,
    background: JoinSet<Result<(), BoxError>>,
    background_names: Vec<(Id, &'static str)>,
}

impl Supervisor {
    /// `shutdown` is what the tasks watch to know when to end.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self {
            shutdown,
            tasks: JoinSet::new(),
            names: Vec::new(),
            background: JoinSet::new(),
            background_names: Vec::new(),
        }
    }

    /// The token that the tasks watch.
    pub fn shutdown(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// Starts a task that runs until shutdown and is waited for.
    pub fn spawn<E: Into<BoxError>>(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Result<(), E>> + Send + 'static,
    ) -> AbortHandle {
        let handle = self.tasks.spawn(async move { task.await.map_err(Into::into) });
        self.names.push((handle.id(), name));
        handle
    }

    /// Starts a task that must run as long as the others do, and is aborted once they have ended: one that has nothing to
    /// finish, or that shows how the others are doing.
    pub fn spawn_background<E: Into<BoxError>>(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let handle = self
            .background
            .spawn(async move { task.await.map_err(Into::into) });
        self.background_names.push((handle.id(), name));
    }

    /// Waits for shutdown, or for a task that ends before it, which shuts the others down. Then gives them `grace` to end.
    ///
    /// # Errors
    /// The first thing that went wrong.
    pub async fn run(mut self, grace: Duration) -> Result<(), TaskError> {
        let shutdown = self.shutdown.clone();
        let mut first_error = tokio::select! {
            // First, since tasks that end because of it may be seen at the same moment.
            biased;
            () = shutdown.cancelled() => None,
            Some(ended) = self.tasks.join_next_with_id() => Some(outcome(&self.names, ended)),
            Some(ended) = self.background.join_next_with_id() => Some(outcome(&self.background_names, ended)),
        }
        .map(|(name, outcome)| outcome.err().unwrap_or(TaskError::Ended(name)));
        shutdown.cancel();

        let deadline = Instant::now() + grace;
        loop {
            match tokio::time::timeout_at(deadline, self.tasks.join_next_with_id()).await {
                Ok(None) => break,
                Ok(Some(ended)) => {
                    let (name, outcome) = outcome(&self.names, ended);
                    self.names.retain(|(_, other)| *other != name);
                    first_error = first_error.or(outcome.err());
                }
                Err(_) => {
                    let late = Names(self.names.iter().map(|(_, name)| *name).collect());
                    first_error = first_error.or(Some(TaskError::TimedOut(late)));
                    break;
                }
            }
        }
        self.tasks.shutdown().await;
        self.background.shutdown().await;
        first_error.map_or(Ok(()), Err)
    }
}

fn outcome(
    names: &[(Id, &'static str)],
    ended: Result<(Id, Result<(), BoxError>), JoinError>,
) -> (&'static str, Result<(), TaskError>) {
    let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
    let name = names
        .iter()
        .find(|(known, _)| *known == id)
        .map_or("unknown", |(_, name)| name);
    let result = match ended {
        Ok((_, Ok(()))) => Ok(()),
        Ok((_, Err(source))) => Err(TaskError::Failed { name, source }),
        Err(source) if source.is_panic() => Err(TaskError::Panicked { name, source }),
        Err(_) => Ok(()), // aborted by its owner
    };
    (name, result)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(60);

    async fn until(token: CancellationToken) -> Result<(), BoxError> {
        token.cancelled().await;
        Ok(())
    }

    #[tokio::test]
    async fn tasks_end_at_shutdown() {
        let mut supervisor = Supervisor::new(CancellationToken::new());
        let token = supervisor.shutdown();
        supervisor.spawn("one", until(token.clone()));
        supervisor.spawn_background::<BoxError>("endless", std::future::pending());
        token.cancel();
        supervisor.run(GRACE).await.expect("clean");
    }

    #[tokio::test]
    async fn a_task_that_ends_fails_or_panics_brings_the_rest_down() {
        for (what, expected) in [
            (0, "task bad ended although nobody asked it to"),
            (1, "task bad failed"),
            (2, "task bad panicked"),
        ] {
            for background in [false, true] {
                let mut supervisor = Supervisor::new(CancellationToken::new());
                let token = supervisor.shutdown();
                supervisor.spawn("good", until(token));
                let bad = async move {
                    match what {
                        0 => Ok(()),
                        1 => Err("broken"),
                        _ => panic!("on purpose"),
                    }
                };
                if background {
                    supervisor.spawn_background("bad", bad);
                } else {
                    supervisor.spawn("bad", bad);
                }
                assert_eq!(
                    supervisor.run(GRACE).await.expect_err("bad").to_string(),
                    expected
                );
            }
        }
    }

    #[tokio::test]
    async fn a_task_that_does_not_end_is_given_up() {
        let mut supervisor = Supervisor::new(CancellationToken::new());
        supervisor.spawn::<BoxError>("deaf", std::future::pending());
        supervisor.shutdown().cancel();
        let error = supervisor.run(Duration::from_millis(5)).await.expect_err("late");
        assert_eq!(error.to_string(), "tasks deaf did not end in time");
    }
}
