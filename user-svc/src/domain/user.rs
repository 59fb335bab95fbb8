//! The user.

use chrono::{DateTime, Utc};

use super::{Email, Name, UserId};

/// What is known of a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Details {
    pub email: Email,
    pub first_name: Name,
    pub last_name: Name,
}

/// A user at one of his versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub id: UserId,
    pub details: Details,
    /// How many events he has had.
    pub version: i64,
    pub created_at: DateTime<Utc>,
    /// When the last event happened.
    pub updated_at: DateTime<Utc>,
}

/// What is to be another from now on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Update {
    pub email: Option<Email>,
    pub first_name: Option<Name>,
    pub last_name: Option<Name>,
}

/// What may be asked of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Create { id: UserId, details: Details },
    Update(Update),
}

/// What happened to a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Created {
        id: UserId,
        details: Details,
        at: DateTime<Utc>,
    },
    /// He is as `details` say from here on.
    Updated { details: Details, at: DateTime<Utc> },
}

impl Event {
    /// When it happened.
    pub fn at(&self) -> DateTime<Utc> {
        match self {
            Self::Created { at, .. } | Self::Updated { at, .. } => *at,
        }
    }
}

/// Why a command is refused. Nothing happens then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("there is no such user")]
    Unknown,
    #[error("the user exists already")]
    Exists,
    #[error("the decision does not fit the user")]
    Inconsistent(#[from] ApplyError),
}

/// What a command leads to at `now`.
///
/// # Errors
/// When the user's state does not allow it.
pub fn decide(state: Option<&User>, command: Command, now: DateTime<Utc>) -> Result<Vec<Event>, Refusal> {
    match (command, state) {
        (Command::Create { id, details }, None) => Ok(vec![Event::Created { id, details, at: now }]),
        (Command::Create { .. }, Some(_)) => Err(Refusal::Exists),
        (Command::Update(_), None) => Err(Refusal::Unknown),
        (Command::Update(update), Some(user)) => {
            let old = user.details.clone();
            let details = Details {
                email: update.email.unwrap_or(old.email),
                first_name: update.first_name.unwrap_or(old.first_name),
                last_name: update.last_name.unwrap_or(old.last_name),
            };
            if details == user.details {
                return Ok(vec![]);
            }
            Ok(vec![Event::Updated { details, at: now }])
        }
    }
}

/// An event that cannot follow the state that it is applied to: the history is broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    #[error("user.updated cannot come first")]
    UpdatedFirst,
    #[error("user.created cannot come twice")]
    CreatedTwice,
}

/// The user after an event.
///
/// # Errors
/// When the event cannot have happened to this user.
pub fn apply(state: Option<User>, event: &Event) -> Result<User, ApplyError> {
    match (state, event) {
        (None, Event::Created { id, details, at }) => Ok(User {
            id: *id,
            details: details.clone(),
            version: 1,
            created_at: *at,
            updated_at: *at,
        }),
        (Some(user), Event::Updated { details, at }) => Ok(User {
            details: details.clone(),
            version: user.version + 1,
            updated_at: *at,
            ..user
        }),
        (None, Event::Updated { .. }) => Err(ApplyError::UpdatedFirst),
        (Some(_), Event::Created { .. }) => Err(ApplyError::CreatedTwice),
    }
}

/// The user that a history leads to; `None` for an empty one.
///
/// # Errors
/// When an event cannot follow those before it.
pub fn rebuild<'e>(events: impl IntoIterator<Item = &'e Event>) -> Result<Option<User>, ApplyError> {
    events
        .into_iter()
        .try_fold(None, |state, event| apply(state, event).map(Some))
}
