//! What an application implements, and how it says what went wrong.

use std::error::Error as StdError;
use std::future::Future;

use diesel::QueryResult;
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection as _};

use crate::record::Record;

/// Any error.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// A record, and what [`Handler::read`] made of it.
#[derive(Debug)]
pub struct Incoming<'a, E> {
    pub record: &'a Record,
    pub event: &'a E,
}

impl<E> Clone for Incoming<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E> Copy for Incoming<'_, E> {}

/// The effect of events on the consumer's database.
pub trait Handler: Send + Sync + 'static {
    /// What a record says, as far as this consumer is concerned; often an `Option` or an `enum`, with a case for events of no
    /// interest.
    type Event: Send + Sync;
    /// What [`Handler::committed`] is told of a batch besides its records; `()` if nothing.
    type Effect: Send;

    /// Reads what a record says. Depends on the record alone. An event type that is not known is of no interest, and no error; a major
    /// version that is not known is one.
    ///
    /// # Errors
    /// When this code can never understand the record: it parks, with the later ones of its entity. The text must not echo
    /// payloads.
    fn read(&self, record: &Record) -> Result<Self::Event, BoxError>;

    /// Applies `batch` through `connection`, which is inside a transaction that also holds the batch's marks: what is written
    /// here commits with them or not at all.
    ///
    /// The batch is never empty, holds no repeats, and holds the records of each entity in order. It is called again with the same
    /// records, or fewer, when the transaction did not commit, so nothing but the connection may be changed. The future is dropped
    /// when the attempt's deadline passes.
    ///
    /// # Errors
    /// See [`HandlerError`]: the kind decides whether the batch is tried again.
    fn apply(
        &self,
        connection: &mut AsyncPgConnection,
        batch: &[Incoming<'_, Self::Event>],
    ) -> impl Future<Output = Result<Self::Effect, HandlerError>> + Send;

    /// Called after `batch` has committed, with what [`Handler::apply`] returned for it: to log what is a fact now, to wake whoever
    /// waits in this process. Only a hint: it is missed when the process dies, when the answer to `COMMIT` is lost, and in every
    /// other process.
    fn committed(&self, batch: &[Incoming<'_, Self::Event>], effect: Self::Effect) {
        let _ = (batch, effect);
    }
}
impl<H: Handler> Handler for std::sync::Arc<H> {
    type Event = H::Event;
    type Effect = H::Effect;

    fn read(&self, record: &Record) -> Result<Self::Event, BoxError> {
        H::read(self, record)
    }

    fn apply(
        &self,
        connection: &mut AsyncPgConnection,
        batch: &[Incoming<'_, Self::Event>],
    ) -> impl Future<Output = Result<Self::Effect, HandlerError>> + Send {
        H::apply(self, connection, batch)
    }

    fn committed(&self, batch: &[Incoming<'_, Self::Event>], effect: Self::Effect) {
        H::committed(self, batch, effect);
    }
}

/// Why a batch was not applied.
#[derive(Debug, thiserror::Error)]
pub enum HandlerError {
    /// The database said no. Errors that come from the data (constraints, values that do not fit) are permanent, all others
    /// are waited out.
    #[error("the database refused the effect")]
    Database(#[from] DieselError),
    /// Something else is not there for now: the batch is tried again, with pauses, until it works.
    #[error("a dependency is not available")]
    Transient(#[source] BoxError),
    /// One record can never be handled.
    #[error("the record cannot be handled")]
    Permanent {
        /// Its position in the batch.
        position: usize,
        /// Why.
        #[source]
        source: BoxError,
    },
}

impl HandlerError {
    /// The record at `position` of the batch can never be handled.
    pub fn permanent(position: usize, source: impl Into<BoxError>) -> Self {
        Self::Permanent {
            position,
            source: source.into(),
        }
    }
}

/// What PostgreSQL says of values that do not fit (class 22), in [English](speak_english): diesel hides the SQLSTATE.
const DATA_ERRORS: [&str; 13] = [
    "out of range",
    "numeric field overflow",
    "value too long for type",
    "invalid byte sequence for encoding",
    "invalid input syntax",
    "invalid input value",
    "division by zero",
    "unsupported Unicode escape sequence",
    "date/time field value",
    "interval field value",
    "null value not allowed",
    "cannot take logarithm",
    "malformed array literal",
];

/// Whether a database error comes from the data given, and would come again.
pub(crate) fn is_permanent(error: &DieselError) -> bool {
    match error {
        DieselError::DatabaseError(DatabaseErrorKind::Unknown, information) => DATA_ERRORS
            .iter()
            .any(|text| information.message().contains(text)),
        DieselError::DatabaseError(kind, _) => matches!(
            kind,
            DatabaseErrorKind::UniqueViolation
                | DatabaseErrorKind::ForeignKeyViolation
                | DatabaseErrorKind::NotNullViolation
                | DatabaseErrorKind::CheckViolation
                | DatabaseErrorKind::RestrictViolation
                | DatabaseErrorKind::ExclusionViolation
        ),
        DieselError::InvalidCString(_)
        | DieselError::NotFound
        | DieselError::SerializationError(_)
        | DieselError::DeserializationError(_)
        | DieselError::IntegerConversion(_) => true,
        _ => false,
    }
}

/// Makes the transaction's errors English, which is how they are told apart; false when the role may not do that. Then a value that does
/// not fit is waited for like a database that is away: nothing is lost, and nothing of its entities goes on.
///
/// # Errors
/// When the connection is of no use any more.
pub(crate) async fn speak_english(connection: &mut AsyncPgConnection) -> QueryResult<bool> {
    let spoken = connection
        .batch_execute("SAVEPOINT english; SET LOCAL lc_messages = 'C'; RELEASE SAVEPOINT english")
        .await;
    match spoken {
        Ok(()) => Ok(true),
        Err(DieselError::DatabaseError(DatabaseErrorKind::Unknown, _)) => {
            connection
                .batch_execute("ROLLBACK TO SAVEPOINT english; RELEASE SAVEPOINT english")
                .await?;
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// An error with all its sources, for a log line.
pub(crate) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_data_are_told_from_those_of_the_database() {
        use DatabaseErrorKind::{CheckViolation, ClosedConnection, SerializationFailure, Unknown};
        for (kind, message, permanent) in [
            (CheckViolation, "violates check constraint", true),
            (Unknown, "integer out of range", true),
            (Unknown, "invalid byte sequence for encoding \"UTF8\": 0x00", true),
            (Unknown, "could not extend file: No space left on device", false),
            (Unknown, "canceling statement due to lock timeout", false),
            (Unknown, "deadlock detected", false),
            (Unknown, "relation \"views\" does not exist", false),
            (SerializationFailure, "could not serialize access", false),
            (ClosedConnection, "connection closed", false),
        ] {
            let error = DieselError::DatabaseError(kind, Box::new(message.to_owned()));
            assert_eq!(is_permanent(&error), permanent, "{message}");
        }
    }
}
