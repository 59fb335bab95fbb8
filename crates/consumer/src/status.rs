//! How a consumer is doing, for a readiness probe.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A view of a running [`Consumer`](crate::Consumer); clones show the same one.
#[derive(Debug, Clone, Default)]
pub struct Status(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    stalled: BTreeMap<usize, String>,
    /// The offset to continue from, by topic and partition.
    positions: BTreeMap<(String, i32), i64>,
}

impl Status {
    /// What keeps this consumer from making progress; empty when nothing does. Parked entities are none of
    /// these: all others go on. Sentences for people, without values from records.
    pub fn problems(&self) -> Vec<String> {
        let state = self.lock();
        let stalled = state.stalled.iter();
        stalled
            .map(|(worker, reason)| format!("worker {worker} is waiting: {reason}"))
            .collect()
    }

    /// How far each partition is done without a hole, as far as it moved in this process.
    pub(crate) fn positions(&self) -> BTreeMap<(String, i32), i64> {
        self.lock().positions.clone()
    }

    /// Before another generation is begun.
    pub(crate) fn forget_positions(&self) {
        self.lock().positions.clear();
    }

    pub(crate) fn reached(&self, topic: &str, partition: i32, next: i64) {
        self.lock().positions.insert((topic.to_owned(), partition), next);
    }

    pub(crate) fn stalled(&self, worker: usize, reason: String) {
        self.lock().stalled.insert(worker, reason);
    }

    pub(crate) fn recovered(&self, worker: usize) {
        self.lock().stalled.remove(&worker);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is a single insert or remove: a panic elsewhere leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
