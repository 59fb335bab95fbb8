//! What a user is and what may happen to him. Pure: no clock, no I/O; time is an argument.
//!
//! [`decide`] says which events a command leads to, [`apply`] what an event changes. Nothing else changes a user, so his
//! history rebuilds him.

pub use user::{ApplyError, Command, Details, Event, Refusal, Update, User, apply, decide, rebuild};
pub use values::{Email, MAX_EMAIL, MAX_NAME, Name, UserId};

#[cfg(test)]
mod tests;
mod user;
mod values;

use chrono::{DateTime, Utc};

/// What a command did: the user as he is now, and the events that made him so. His version counts them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    user: User,
    events: Vec<Event>,
}

impl Change {
    /// Decides and applies. A command that finds its work done already gives a change without events.
    ///
    /// # Errors
    /// When the user's state does not allow the command.
    pub fn make(state: Option<User>, command: Command, now: DateTime<Utc>) -> Result<Self, Refusal> {
        let events = decide(state.as_ref(), command, now)?;
        let mut state = state;
        for event in &events {
            state = Some(apply(state, event)?);
        }
        let user = state.ok_or(Refusal::Unknown)?;
        Ok(Self { user, events })
    }

    /// The user after the change.
    pub fn user(&self) -> &User {
        &self.user
    }

    /// What happened, oldest first.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The version that the user had before; 0 when he did not exist.
    pub fn version_before(&self) -> i64 {
        self.user.version - i64::try_from(self.events.len()).unwrap_or(i64::MAX)
    }
}
