//! Commands in tasks of their own.
//!
//! tonic drops a handler's future when its client cancels or its deadline passes, and a transaction of diesel-async that
//! is dropped midway leaves a connection in an unknown state. So the transaction of a command runs in a task that nobody
//! drops: it either commits or rolls back, within `database.command_timeout`, and the client that went away finds out what
//! happened by repeating its request id. At shutdown [`Commands::finish`] waits for those still running.

use diesel_async::AsyncPgConnection;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use crate::db::{BoxFuture, Db, DbError, TransactionError};
use crate::deadline::Deadline;

/// Runs the commands of a service. Clones share the tasks.
#[derive(Debug, Clone)]
pub struct Commands {
    db: Db,
    tasks: TaskTracker,
}

impl Commands {
    pub fn new(db: Db) -> Self {
        Self {
            db,
            tasks: TaskTracker::new(),
        }
    }

    /// The database, for reads.
    pub fn db(&self) -> &Db {
        &self.db
    }

    /// Runs `work` as [`Db::transaction`] does, to its end even when this future is dropped, within the current span.
    ///
    /// # Errors
    /// What `work` says, every [`DbError`], and [`DbError::Panicked`].
    pub async fn run<I, T, E, F>(&self, deadline: Deadline, input: I, work: F) -> Result<T, E>
    where
        I: Send + Sync + 'static,
        T: Send + 'static,
        E: TransactionError + 'static,
        F: for<'c> Fn(&'c mut AsyncPgConnection, &'c I) -> BoxFuture<'c, Result<T, E>>
            + Send
            + Sync
            + 'static,
    {
        let db = self.db.clone();
        let task = async move { db.transaction(deadline, &input, work).await };
        match self.tasks.spawn(task.in_current_span()).await {
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
