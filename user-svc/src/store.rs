//! Users in PostgreSQL: the only module that knows the schema, and the only one that writes.
//!
//! [`save`] is the only public write. It takes the new state together with its events, so state without event cannot be
//! written: first the user's row, which locks it and checks the version, then history and outbox.

use chrono::{DateTime, Utc};
use diesel::prelude::{
    AsChangeset, ExpressionMethods, Identifiable, Insertable, OptionalExtension, QueryDsl, Queryable,
    Selectable, SelectableHelper,
};
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use diesel_migrations::{EmbeddedMigrations, embed_migrations};
use event_store::{AppendError, Cause, Entity, NewEvent, StoredEvent};
use serde::Serialize;
use service::db::DbError;
use uuid::Uuid;

use crate::codec::{self, DecodeError};
use crate::domain::{Change, Details, Email, Event, Name, User, UserId};

/// Creates the table of users.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!("../migrations/user");

/// The entity type of users.
pub const ENTITY_TYPE: &str = contracts::catalogue::user::ENTITY_TYPE;

/// The index that keeps two users from having one address.
const ONE_PER_EMAIL: &str = "users_email";

mod schema {
    diesel::table! {
        users (user_id) {
            user_id -> Uuid,
            version -> BigInt,
            email -> Text,
            first_name -> Text,
            last_name -> Text,
            created_at -> Timestamptz,
            updated_at -> Timestamptz,
        }
    }
}

use schema::users;

/// Why a user could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("user {0} has moved on")]
    Conflict(UserId),
    #[error("another user has this address")]
    EmailTaken,
    #[error("column {column} of user {id} holds what no user can have")]
    Broken { id: UserId, column: &'static str },
    #[error("version {version} of user {id} cannot be read")]
    Undecodable {
        id: UserId,
        version: i64,
        source: DecodeError,
    },
    #[error(transparent)]
    Database(#[from] DbError),
}

impl From<DieselError> for StoreError {
    fn from(error: DieselError) -> Self {
        Self::Database(error.into())
    }
}

/// Whether a row is read to be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    None,
    /// Until the end of the transaction; whoever else wants to change it waits.
    Update,
}

/// The user, if there is one.
///
/// # Errors
/// [`StoreError::Broken`] when the row cannot be a user's.
pub async fn load(conn: &mut AsyncPgConnection, id: UserId, lock: Lock) -> Result<Option<User>, StoreError> {
    let query = users::table.find(id.0).select(UserRow::as_select());
    let row = match lock {
        Lock::None => query.first(conn).await.optional()?,
        Lock::Update => query.for_update().first(conn).await.optional()?,
    };
    row.map(UserRow::into_user).transpose()
}

/// An event that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    pub event_id: Uuid,
    pub event_type: &'static str,
    pub entity_id: UserId,
    pub version: i64,
}

/// Writes what a command did: the user's row, his events and their outbox rows, in the caller's transaction. Writes
/// nothing when nothing happened.
///
/// # Errors
/// [`StoreError::Conflict`] when the user is not at the version that the change starts from, [`StoreError::EmailTaken`] when
/// somebody else has the address.
pub async fn save(
    conn: &mut AsyncPgConnection,
    change: &Change,
    cause: &Cause,
) -> Result<Vec<Recorded>, StoreError> {
    let (user, before) = (change.user(), change.version_before());
    if change.events().is_empty() {
        return Ok(Vec::new());
    }
    let row = UserRow::from(user);
    let written = if before == 0 {
        diesel::insert_into(users::table).values(&row).execute(conn).await
    } else {
        let target = users::table.find(user.id.0).filter(users::version.eq(before));
        diesel::update(target).set(&row).execute(conn).await
    };
    match written {
        Ok(1) => {}
        Ok(_) => return Err(StoreError::Conflict(user.id)),
        Err(error) => return Err(refused(error, user.id)),
    }
    let events: Vec<NewEvent> = change
        .events()
        .iter()
        .map(|event| codec::encode(user.id, event))
        .collect();
    let entity = Entity {
        entity_type: ENTITY_TYPE,
        entity_id: user.id.to_string(),
        topic: None,
    };
    let ids = event_store::append(conn, &entity, before, &events, cause)
        .await
        .map_err(|error| match error {
            AppendError::Conflict => StoreError::Conflict(user.id),
            AppendError::Database(error) => error.into(),
        })?;
    let recorded = |((version, event), event_id): ((i64, &NewEvent), Uuid)| Recorded {
        event_id,
        event_type: event.event_type,
        entity_id: user.id,
        version,
    };
    Ok((before + 1..).zip(&events).zip(ids).map(recorded).collect())
}

fn refused(error: DieselError, id: UserId) -> StoreError {
    match &error {
        DieselError::DatabaseError(DatabaseErrorKind::UniqueViolation, information) => {
            match information.constraint_name() {
                Some(ONE_PER_EMAIL) => StoreError::EmailTaken,
                _ => StoreError::Conflict(id),
            }
        }
        _ => error.into(),
    }
}

/// The rows behind a user, in the order of their ids, at most `limit`.
///
/// # Errors
/// Whatever keeps the database from answering.
pub(crate) async fn rows_after(
    conn: &mut AsyncPgConnection,
    after: Uuid,
    limit: i64,
) -> diesel::QueryResult<Vec<UserRow>> {
    users::table
        .filter(users::user_id.gt(after))
        .order(users::user_id)
        .limit(limit)
        .select(UserRow::as_select())
        .load(conn)
        .await
}

/// A stored event as the domain knows it.
///
/// # Errors
/// [`StoreError::Undecodable`]
pub fn decode(id: UserId, stored: &StoredEvent) -> Result<Event, StoreError> {
    codec::decode(id, &stored.event_type, stored.schema_version, &stored.payload).map_err(|source| {
        StoreError::Undecodable {
            id,
            version: stored.version,
            source,
        }
    })
}

/// A row of `users`. No `Debug`: it is personal.
#[derive(Clone, PartialEq, Eq, Queryable, Selectable, Identifiable, Insertable, AsChangeset, Serialize)]
#[diesel(table_name = users)]
#[diesel(primary_key(user_id))]
#[diesel(check_for_backend(diesel::pg::Pg))]
pub(crate) struct UserRow {
    pub(crate) user_id: Uuid,
    version: i64,
    email: String,
    first_name: String,
    last_name: String,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl From<&User> for UserRow {
    fn from(user: &User) -> Self {
        let Details {
            email,
            first_name,
            last_name,
        } = &user.details;
        Self {
            user_id: user.id.0,
            version: user.version,
            email: email.as_str().to_owned(),
            first_name: first_name.as_str().to_owned(),
            last_name: last_name.as_str().to_owned(),
            created_at: user.created_at,
            updated_at: user.updated_at,
        }
    }
}

impl UserRow {
    fn into_user(self) -> Result<User, StoreError> {
        let id = UserId(self.user_id);
        let broken = |column| StoreError::Broken { id, column };
        let details = Details {
            email: Email::parse(&self.email).ok_or(broken("email"))?,
            first_name: Name::parse(&self.first_name).ok_or(broken("first_name"))?,
            last_name: Name::parse(&self.last_name).ok_or(broken("last_name"))?,
        };
        Ok(User {
            id,
            details,
            version: self.version,
            created_at: self.created_at,
            updated_at: self.updated_at,
        })
    }
}
