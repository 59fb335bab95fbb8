//! How one outbox is doing, for `/readyz`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longer without progress than this, and the outbox is not ready.
const PATIENCE: Duration = Duration::from_secs(15);

/// What the relay of an outbox is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Role {
    /// Something is away; the text says what.
    Waiting(String),
    /// Another process leads.
    Standby,
    /// Reads and publishes.
    Leading,
    /// A permanent error; somebody must act.
    Stopped(String),
}

#[derive(Debug)]
struct State {
    role: Role,
    /// When it last read the outbox, and everything in flight was moving.
    progress: Instant,
}

/// Shared between the relay of an outbox and whoever shows it.
#[derive(Debug, Clone)]
pub(crate) struct Status(Arc<Mutex<State>>);

impl Default for Status {
    fn default() -> Self {
        let role = Role::Waiting("starting".to_owned());
        Self(Arc::new(Mutex::new(State {
            role,
            progress: Instant::now(),
        })))
    }
}

impl Status {
    pub(crate) fn set(&self, role: Role) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.role = role;
        state.progress = Instant::now();
    }

    /// The outbox was read, and what is in flight moved `ago`.
    pub(crate) fn progressed(&self, ago: Duration) {
        if let Some(at) = Instant::now().checked_sub(ago) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).progress = at;
        }
    }

    pub(crate) fn role(&self) -> Role {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).role.clone()
    }

    /// Whether the outbox makes progress, or stands by; otherwise why not.
    pub(crate) fn ready(&self) -> Result<(), String> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &state.role {
            Role::Standby => Ok(()),
            Role::Leading if state.progress.elapsed() <= PATIENCE => Ok(()),
            Role::Leading => Err(format!(
                "no progress for {} s",
                state.progress.elapsed().as_secs()
            )),
            Role::Waiting(why) => Err(why.clone()),
            Role::Stopped(why) => Err(format!("stopped: {why}")),
        }
    }
}
