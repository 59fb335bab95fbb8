//! The one that writes. It takes what has come in meanwhile into one transaction, so that many requests share one flush to
//! disk; nobody hears of theirs before that.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::bank::{self, Pending, Request, Step};
use crate::store::{Store, StoreError, Write};

const QUEUE: usize = 1024;
const BATCH: usize = 128;
const FORGET_AT_ONCE: usize = 1000;

/// The writer is gone: the process is about to end.
#[derive(Debug, Clone, Copy)]
pub struct Gone;

enum Job {
    Begin(Arc<Request>, oneshot::Sender<Step>),
    Finish(Arc<Request>, Pending, oneshot::Sender<Step>),
    Forget(Duration),
}

/// Where requests are handed in.
#[derive(Debug, Clone)]
pub struct Desk(mpsc::Sender<Job>);

/// What [`run`] works off.
#[derive(Debug)]
pub struct Queue(mpsc::Receiver<Job>);

/// A desk and its queue.
pub fn queue() -> (Desk, Queue) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    (Desk(sender), Queue(receiver))
}

impl Desk {
    /// See [`bank::begin`].
    pub async fn begin(&self, request: Arc<Request>) -> Result<Step, Gone> {
        self.ask(|reply| Job::Begin(request, reply)).await
    }

    /// See [`bank::finish`].
    pub async fn finish(&self, request: Arc<Request>, pending: Pending) -> Result<Step, Gone> {
        self.ask(|reply| Job::Finish(request, pending, reply)).await
    }

    /// Forgets some answers that are older than `age`.
    pub async fn forget(&self, age: Duration) -> Result<(), Gone> {
        self.0.send(Job::Forget(age)).await.map_err(|_| Gone)
    }

    async fn ask(&self, job: impl FnOnce(oneshot::Sender<Step>) -> Job) -> Result<Step, Gone> {
        let (sender, receiver) = oneshot::channel();
        self.0.send(job(sender)).await.map_err(|_| Gone)?;
        receiver.await.map_err(|_| Gone)
    }
}

/// Works until every desk is gone.
///
/// # Errors
/// When the storage fails: what was not answered by then has not happened.
pub fn run(store: &Store, mut queue: Queue) -> Result<(), StoreError> {
    while let Some(first) = queue.0.blocking_recv() {
        let mut jobs = vec![first];
        while jobs.len() < BATCH
            && let Ok(job) = queue.0.try_recv()
        {
            jobs.push(job);
        }
        let steps = store.write(|write| {
            jobs.iter()
                .map(|job| work(write, job))
                .collect::<Result<Vec<_>, _>>()
        })?;
        for (job, step) in jobs.into_iter().zip(steps) {
            if let (Job::Begin(_, reply) | Job::Finish(_, _, reply), Some(step)) = (job, step) {
                // Whoever asked may have left.
                let _ = reply.send(step);
            }
        }
    }
    Ok(())
}

fn work(write: &Write, job: &Job) -> Result<Option<Step>, StoreError> {
    match job {
        Job::Begin(request, _) => bank::begin(write, request).map(Some),
        Job::Finish(request, pending, _) => bank::finish(write, request, pending).map(Some),
        Job::Forget(age) => write.forget_answers(*age, FORGET_AT_ONCE).map(|_| None),
    }
}
