//! Commands in tasks of their own.
//!
//! tonic drops a handler's future when its client cancels or its deadline passes, and a transaction of diesel-async that
//! is dropped midway leaves a connection in an unknown state. So the transaction of a command runs in a task that nobody
//! drops: it either commits or rolls back, within `database.command_timeout`, and the client that went away finds out what
//! happened by repeating its request id. At shutdown [`Commands::finish`] waits for those still running.

use std::future::Future;

use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use crate::db::DbError;

/// Runs the commands of a service. Clones share the tasks.
#[derive(Debug, Clone, Default)]
pub struct Commands {
    tasks: TaskTracker,
}

impl Commands {
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs a command, which calls [`Db::transaction`](crate::db::Db::transaction), to its end even when this future is
    /// dropped, within the current span.
    ///
    /// # Errors
    /// What the command says, and [`DbError::Panicked`].
    pub async fn run<T, E>(
        &self,
        command: impl Future<Output = Result<T, E>> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
    {
        match self.tasks.spawn(command.in_current_span()).await {
            Ok(result) => result,
            Err(panicked) => Err(DbError::Panicked(panicked).into()),
        }
    }

    /// Waits for the commands that are still running. No new ones may come.
    pub async fn finish(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}
