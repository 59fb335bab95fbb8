//! Mails, orders and the address book in PostgreSQL: the only module that knows the schema, and the only one that writes.
//!
//! What events tell is written by [`learn`], the outcome of an attempt by [`finish`], an operator's decision by [`decide`]. A mail
//! becomes "sent" together with its event and outbox row, in [`finish`] and [`decide`] alone.

use diesel::result::Error as DieselError;
use diesel_migrations::{EmbeddedMigrations, embed_migrations};
use service::db::{DbError, TransactionError};

pub use learn::{ToAnswer, Told, learn};
pub use mails::{
    Attempt, Audit, CLAIM, Claimed, Counts, Decision, Expired, Listed, Recorded, Shown, claim, count, decide,
    expire, finish, give_back, is_due, list, show,
};
pub(crate) use sent::{SentRow, sent_after};

mod learn;
mod mails;
mod sent;

use crate::domain::MailId;

/// Creates the tables.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!("../migrations/notification");

/// The entity type of mails.
pub const ENTITY_TYPE: &str = contracts::catalogue::notification::ENTITY_TYPE;

/// The source in the envelopes of this service's events.
const SOURCE: &str = "/notification-svc";

/// Why something could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("mail {0} was recorded as sent before")]
    SentBefore(MailId),
    #[error("column {column} of mail {id} holds what no mail can have")]
    Broken { id: MailId, column: &'static str },
    #[error("there is no mail {0}")]
    NoMail(MailId),
    #[error("mail {id} is {state}, and only what is {allowed} can be settled so")]
    NotToSettle {
        id: MailId,
        state: String,
        allowed: &'static str,
    },
    #[error(transparent)]
    Database(#[from] DbError),
}

impl From<DieselError> for StoreError {
    fn from(error: DieselError) -> Self {
        Self::Database(error.into())
    }
}

impl TransactionError for StoreError {
    fn database(&self) -> Option<&DbError> {
        match self {
            Self::Database(error) => Some(error),
            _ => None,
        }
    }
}
