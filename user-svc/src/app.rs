//! What user-svc does: a function per command and per query.

use chrono::{DateTime, SubsecRound as _, Utc};
use contracts::shop::user::v1 as proto;
use diesel_async::AsyncPgConnection;
use event_store::Cause;
use service::command::Commands;
use service::db::{Db, DbError, TransactionError};
use service::deadline::Deadline;
use service::requests::{self, Claim, RequestError, RequestKey};
use service::telemetry;
use uuid::Uuid;

use crate::domain::{Change, Command, Details, Refusal, Update, User, UserId};
use crate::store::{self, Lock, Recorded, StoreError};

/// The source in the envelopes of this service's events.
const SOURCE: &str = "/user-svc";

/// Why a command or a query did not succeed. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("there is no such user")]
    NotFound,
    #[error("the user is at another version than expected")]
    VersionMismatch,
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<DbError> for CommandError {
    fn from(error: DbError) -> Self {
        Self::Store(error.into())
    }
}

impl TransactionError for CommandError {
    fn database(&self) -> Option<&DbError> {
        match self {
            Self::Request(RequestError::Database(error)) | Self::Store(StoreError::Database(error)) => {
                Some(error)
            }
            _ => None,
        }
    }
}

/// A valid CreateUser.
#[derive(Debug)]
pub struct CreateUser {
    pub request: RequestKey,
    pub details: Details,
}

/// A valid UpdateUser.
#[derive(Debug)]
pub struct UpdateUser {
    pub request: RequestKey,
    pub user_id: UserId,
    pub update: Update,
    /// The version that the user must be at, if that matters.
    pub expected_version: Option<i64>,
}

/// The commands and queries on users. Clones share the pool.
#[derive(Debug, Clone)]
pub struct Users {
    db: Db,
    commands: Commands,
}

impl Users {
    pub fn new(db: Db, commands: Commands) -> Self {
        Self { db, commands }
    }

    /// Creates a user.
    ///
    /// # Errors
    /// [`CommandError`]; [`StoreError::EmailTaken`] when somebody has the address.
    pub async fn create(
        &self,
        deadline: Deadline,
        command: CreateUser,
    ) -> Result<proto::CreateUserResponse, CommandError> {
        // Chosen here, so that it stays the same when the transaction has to be begun again.
        let input = (command, UserId(Uuid::now_v7()));
        let db = self.db.clone();
        let command = async move {
            let done = db.transaction(deadline, &input, |conn, (command, id)| {
                Box::pin(create(conn, command, *id))
            });
            Ok(done.await?.committed())
        };
        self.commands.run(command).await
    }

    /// Updates a user.
    ///
    /// # Errors
    /// [`CommandError`]; [`StoreError::EmailTaken`] when somebody else has the address.
    pub async fn update(
        &self,
        deadline: Deadline,
        command: UpdateUser,
    ) -> Result<proto::UpdateUserResponse, CommandError> {
        let db = self.db.clone();
        let command = async move {
            let done = db.transaction(deadline, &command, |conn, command| {
                Box::pin(update(conn, command))
            });
            Ok(done.await?.committed())
        };
        self.commands.run(command).await
    }

    /// A user.
    ///
    /// # Errors
    /// [`CommandError::NotFound`]
    pub async fn get(&self, deadline: Deadline, id: UserId) -> Result<User, CommandError> {
        self.db
            .read(deadline, &id, |conn, id| Box::pin(find(conn, *id, Lock::None)))
            .await
    }
}

/// What a transaction leads to if it commits.
struct Done<R> {
    response: R,
    /// None for a repeat, and when nothing had to be done.
    recorded: Vec<Recorded>,
}

impl<R> Done<R> {
    fn repeat(response: R) -> Self {
        Self {
            response,
            recorded: Vec::new(),
        }
    }

    /// Logs what is a fact now.
    fn committed(self) -> R {
        for Recorded {
            event_id,
            event_type,
            entity_id,
            version,
        } in &self.recorded
        {
            tracing::info!(
                event.id = %event_id,
                event.r#type = event_type,
                entity.r#type = store::ENTITY_TYPE,
                entity.id = %entity_id,
                entity.version = version,
                "recorded {event_type}"
            );
        }
        self.response
    }
}

async fn create(
    conn: &mut AsyncPgConnection,
    command: &CreateUser,
    id: UserId,
) -> Result<Done<proto::CreateUserResponse>, CommandError> {
    let ticket = match requests::claim(conn, &command.request).await? {
        Claim::New(ticket) => ticket,
        Claim::Repeat(response) => return Ok(Done::repeat(response)),
    };
    let details = command.details.clone();
    let change = Change::make(None, Command::Create { id, details }, now())?;
    let response = proto::CreateUserResponse {
        user: Some(change.user().into()),
    };
    ticket.complete(conn, &response).await?;
    let recorded = store::save(conn, &change, &cause(id, &command.request)).await?;
    Ok(Done { response, recorded })
}

async fn update(
    conn: &mut AsyncPgConnection,
    command: &UpdateUser,
) -> Result<Done<proto::UpdateUserResponse>, CommandError> {
    let ticket = match requests::claim(conn, &command.request).await? {
        Claim::New(ticket) => ticket,
        Claim::Repeat(response) => return Ok(Done::repeat(response)),
    };
    let user = find(conn, command.user_id, Lock::Update).await?;
    if command
        .expected_version
        .is_some_and(|expected| expected != user.version)
    {
        return Err(CommandError::VersionMismatch);
    }
    // Not before the user's last event, whatever the clocks of two replicas say.
    let now = now().max(user.updated_at);
    let change = Change::make(Some(user), Command::Update(command.update.clone()), now)?;
    let response = proto::UpdateUserResponse {
        user: Some(change.user().into()),
    };
    ticket.complete(conn, &response).await?;
    let recorded = store::save(conn, &change, &cause(command.user_id, &command.request)).await?;
    Ok(Done { response, recorded })
}

async fn find(conn: &mut AsyncPgConnection, id: UserId, lock: Lock) -> Result<User, CommandError> {
    store::load(conn, id, lock).await?.ok_or(CommandError::NotFound)
}

/// All that happens to a user is joined by the user's own id.
fn cause(id: UserId, request: &RequestKey) -> Cause {
    let trace = telemetry::current_trace_context();
    Cause {
        source: SOURCE,
        correlation_id: id.0,
        causation_id: Some(request.request_id()),
        traceparent: trace.traceparent,
        tracestate: trace.tracestate,
    }
}

/// The time, as exactly as PostgreSQL keeps it.
fn now() -> DateTime<Utc> {
    Utc::now().trunc_subsecs(6)
}
