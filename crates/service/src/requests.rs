//! Idempotent commands: a request id, scoped to caller and method, has one outcome.
//!
//! Within the command's transaction: [`claim`] first, then the work, then [`Ticket::complete`] with the response. Where the
//! response does not depend on what is in the database, [`record`] does both, in the same round trip as the work. The claim
//! is an `INSERT … ON CONFLICT DO NOTHING`. When the same id is in flight in another transaction it waits for that one: if
//! the other commits, nothing is inserted, and the next statement (READ COMMITTED takes a new snapshot for each) reads the
//! stored response; if it rolls back, this insert goes through and this command does the work. A command that fails rolls
//! its claim back with everything else, so failures are not stored and the same id may be tried again.

use std::time::Duration;

use diesel::prelude::{ExpressionMethods, OptionalExtension, QueryDsl};
use diesel::sql_types::{BigInt, Double};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use diesel_migrations::{EmbeddedMigrations, embed_migrations};
use sha2::{Digest as _, Sha256};
use tonic::{Code, Status};
use uuid::Uuid;

use crate::db::{Db, DbError};
use crate::deadline::Deadline;
use crate::shutdown::BoxError;
use crate::status::Domain;
use crate::telemetry::chain;

/// Creates the table of requests.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!("../../migrations/requests");

mod schema {
    diesel::table! {
        requests (caller, method, request_id) {
            caller -> Text,
            method -> Text,
            request_id -> Uuid,
            fingerprint -> Binary,
            response -> Nullable<Binary>,
            created_at -> Timestamptz,
        }
    }
}

use schema::requests;

/// A request that must take effect once.
#[derive(Debug, Clone)]
pub struct RequestKey {
    caller: String,
    method: &'static str,
    request_id: Uuid,
    fingerprint: [u8; 32],
}

impl RequestKey {
    /// `request` must not hold secrets: clear those fields first. Protobuf without maps encodes deterministically.
    pub fn new(
        caller: impl Into<String>,
        method: &'static str,
        request_id: Uuid,
        request: &impl prost::Message,
    ) -> Self {
        let fingerprint = Sha256::digest(request.encode_to_vec()).into();
        Self {
            caller: caller.into(),
            method,
            request_id,
            fingerprint,
        }
    }

    /// The id that the caller chose.
    pub fn request_id(&self) -> Uuid {
        self.request_id
    }
}

/// Why a request cannot be claimed.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("the request id was used for another request")]
    Reused,
    #[error("the request id was used before")]
    Recorded,
    #[error("the stored response cannot be read")]
    Undecodable(#[source] prost::DecodeError),
    #[error("a request was committed without its response")]
    Incomplete,
    #[error("the request could not be recorded")]
    Database(#[from] DbError),
}

impl From<diesel::result::Error> for RequestError {
    fn from(error: diesel::result::Error) -> Self {
        Self::Database(error.into())
    }
}

impl RequestError {
    /// The status for the client.
    pub fn to_status(&self, domain: Domain) -> Status {
        match self {
            Self::Reused => domain
                .status(
                    Code::AlreadyExists,
                    "REQUEST_ID_REUSED",
                    "request_id was used before, for a request with another content",
                )
                .build(),
            // Whoever records a request looks for the response then.
            Self::Undecodable(_) | Self::Incomplete | Self::Recorded => {
                tracing::error!(error = %chain(self), "a stored response is broken");
                domain
                    .status(Code::Internal, "INTERNAL", "internal error")
                    .build()
            }
            Self::Database(error) => error.to_status(domain),
        }
    }
}

/// What [`claim`] found.
#[derive(Debug)]
pub enum Claim<'k, R> {
    /// Nobody has done it: do it, and complete the ticket in the same transaction.
    New(Ticket<'k>),
    /// It was done: this is the response.
    Repeat(R),
}

/// The right, and the duty, to store the response.
#[derive(Debug)]
#[must_use = "complete it, or roll back"]
pub struct Ticket<'k>(&'k RequestKey);

/// Claims a request within the caller's transaction, which must be READ COMMITTED.
///
/// # Errors
/// [`RequestError::Reused`] when the id belongs to a request with another content.
pub async fn claim<'k, R: prost::Message + Default>(
    conn: &AsyncPgConnection,
    key: &'k RequestKey,
) -> Result<Claim<'k, R>, RequestError> {
    loop {
        let inserted = diesel::insert_into(requests::table)
            .values((
                requests::caller.eq(&key.caller),
                requests::method.eq(key.method),
                requests::request_id.eq(key.request_id),
                requests::fingerprint.eq(key.fingerprint.as_slice()),
            ))
            .on_conflict_do_nothing()
            .execute(&mut &*conn)
            .await?;
        if inserted == 1 {
            return Ok(Claim::New(Ticket(key)));
        }
        // It may have been cleaned away between the two statements: then it is a new one.
        if let Some(response) = find(conn, key).await? {
            return Ok(Claim::Repeat(response));
        }
    }
}

/// Records a request with its response within the caller's transaction, which must be READ COMMITTED. A shared connection, so
/// that it can be sent together with the work.
///
/// # Errors
/// [`RequestError::Recorded`] when it was recorded before, as this one or another: the transaction must be rolled back, and
/// [`find`] tells what became of it. It may have been cleaned away by then: then it is a new one.
pub async fn record(
    conn: &AsyncPgConnection,
    key: &RequestKey,
    response: &impl prost::Message,
) -> Result<(), RequestError> {
    let inserted = diesel::insert_into(requests::table)
        .values((
            requests::caller.eq(&key.caller),
            requests::method.eq(key.method),
            requests::request_id.eq(key.request_id),
            requests::fingerprint.eq(key.fingerprint.as_slice()),
            requests::response.eq(response.encode_to_vec()),
        ))
        .on_conflict_do_nothing()
        .execute(&mut &*conn)
        .await?;
    if inserted == 1 {
        Ok(())
    } else {
        Err(RequestError::Recorded)
    }
}

/// The response to a request that took effect, if it did: for what has to be known before the transaction of the command.
///
/// # Errors
/// [`RequestError::Reused`] when the id belongs to a request with another content.
pub async fn find<R: prost::Message + Default>(
    conn: &AsyncPgConnection,
    key: &RequestKey,
) -> Result<Option<R>, RequestError> {
    let stored: Option<(Vec<u8>, Option<Vec<u8>>)> = requests::table
        .find((&key.caller, key.method, key.request_id))
        .select((requests::fingerprint, requests::response))
        .first(&mut &*conn)
        .await
        .optional()?;
    match stored {
        None => Ok(None),
        Some((fingerprint, _)) if fingerprint != key.fingerprint => Err(RequestError::Reused),
        Some((_, response)) => {
            let response = response.ok_or(RequestError::Incomplete)?;
            R::decode(response.as_slice())
                .map(Some)
                .map_err(RequestError::Undecodable)
        }
    }
}

impl Ticket<'_> {
    /// Stores the response.
    ///
    /// # Errors
    /// Whatever PostgreSQL says; the transaction must then be rolled back.
    pub async fn complete(
        self,
        conn: &AsyncPgConnection,
        response: &impl prost::Message,
    ) -> Result<(), RequestError> {
        diesel::update(requests::table.find((&self.0.caller, self.0.method, self.0.request_id)))
            .set(requests::response.eq(response.encode_to_vec()))
            .execute(&mut &*conn)
            .await?;
        Ok(())
    }
}

/// Rows removed by one statement.
const CLEAN_BATCH: i64 = 1000;

/// Removes requests older than `keep` (a day at least), a bounded number at a time. Returns how many.
///
/// # Errors
/// Whatever keeps the database from doing it.
pub async fn clean_once(db: &Db, keep: Duration) -> Result<usize, DbError> {
    let mut conn = db.get(Deadline::after(Duration::from_secs(5))).await?;
    // Rows that another replica is removing are left to it.
    let removed = diesel::sql_query(
        // Materialized, since a plan that ran the inner query once per outer row would remove more than the limit.
        "WITH old AS MATERIALIZED (
             SELECT caller, method, request_id FROM requests
             WHERE created_at < now() - make_interval(secs => $1)
             ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED)
         DELETE FROM requests r USING old
         WHERE (r.caller, r.method, r.request_id) = (old.caller, old.method, old.request_id)",
    )
    .bind::<Double, _>(keep.as_secs_f64())
    .bind::<BigInt, _>(CLEAN_BATCH)
    .execute(&mut *conn)
    .await?;
    Ok(removed)
}

/// Removes old requests for ever, a batch every `every`, at once the next one while batches are full.
pub async fn clean(db: Db, keep: Duration, every: Duration) -> Result<(), BoxError> {
    loop {
        match clean_once(&db, keep).await {
            Ok(removed) if removed == usize::try_from(CLEAN_BATCH).unwrap_or(usize::MAX) => continue,
            Ok(_) => {}
            // It is tried again soon enough, and the database's absence is reported elsewhere.
            Err(error) => tracing::debug!(error = %chain(&error), "old requests could not be removed"),
        }
        tokio::time::sleep(every).await;
    }
}
