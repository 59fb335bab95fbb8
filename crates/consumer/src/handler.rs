//! What an application implements, and how it says what went wrong.

use std::error::Error as StdError;
use std::future::Future;

use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel_async::AsyncPgConnection;

use crate::record::Record;

/// Any error.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// The effect of events on the consumer's database.
pub trait Handler: Send + Sync + 'static {
    /// What [`Handler::committed`] is told of a batch besides its records; `()` if nothing.
    type Effect: Send;

    /// Applies `batch` through `connection`, which is inside a transaction that also holds the batch's marks: what is written
    /// here commits with them or not at all.
    ///
    /// The batch is never empty, holds no repeats, and holds the records of each entity in order. It is called again with the same
    /// records when the transaction did not commit, so nothing but the connection may be changed. Event types that are of no interest
    /// are passed over with `Ok`. The future is dropped when the attempt's deadline passes.
    ///
    /// # Errors
    /// See [`HandlerError`]: the kind decides whether the batch is tried again.
    fn handle(
        &self,
        connection: &mut AsyncPgConnection,
        batch: &[&Record],
    ) -> impl Future<Output = Result<Self::Effect, HandlerError>> + Send;

    /// Called after `batch` has committed, with what [`Handler::handle`] returned for it: to log what is a fact now, to wake whoever
    /// waits in this process. Only a hint: it is missed when the process dies, when the answer to `COMMIT` is lost, and in every
    /// other process.
    fn committed(&self, batch: &[&Record], effect: Self::Effect) {
        let _ = (batch, effect);
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

/// Whether a database error comes from the data given, and would come again.
pub(crate) fn is_permanent(error: &DieselError) -> bool {
    match error {
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
