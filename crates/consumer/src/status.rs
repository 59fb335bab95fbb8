//! How a consumer is doing, for a readiness probe.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A view of a running [`Consumer`](crate::Consumer); clones show the same one.
#[derive(Debug, Clone, Default)]
pub struct Status(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    halted: BTreeMap<(String, i32), String>,
    stalled: BTreeMap<usize, String>,
}

impl Status {
    /// What keeps this consumer from making progress; empty when nothing does. Sentences for people, without values from records.
    pub fn problems(&self) -> Vec<String> {
        let state = self.lock();
        let halted = state
            .halted
            .iter()
            .map(|((topic, partition), reason)| format!("partition {topic}/{partition} is halted: {reason}"));
        let stalled = state
            .stalled
            .iter()
            .map(|(worker, reason)| format!("worker {worker} is waiting: {reason}"));
        halted.chain(stalled).collect()
    }

    pub(crate) fn halted(&self, topic: &str, partition: i32, reason: String) {
        self.lock().halted.insert((topic.to_owned(), partition), reason);
    }

    /// A partition that was lost is its next owner's matter.
    pub(crate) fn revoked(&self, topic: &str, partition: i32) {
        self.lock().halted.remove(&(topic.to_owned(), partition));
    }

    pub(crate) fn halted_count(&self) -> usize {
        self.lock().halted.len()
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
