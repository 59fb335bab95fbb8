//! Mails that were sent, as `verify` compares them with their history.

use chrono::{DateTime, Utc};
use diesel::prelude::QueryableByName;
use diesel::sql_types::{BigInt, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::{AsyncPgConnection, RunQueryDsl as _};
use serde::Serialize;
use uuid::Uuid;

/// A mail that was sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, QueryableByName)]
pub(crate) struct SentRow {
    #[diesel(sql_type = SqlUuid)]
    pub(crate) notification_id: Uuid,
    #[diesel(sql_type = SqlUuid)]
    pub(crate) order_id: Uuid,
    #[diesel(sql_type = Text)]
    pub(crate) event_type: String,
    #[diesel(sql_type = Timestamptz)]
    pub(crate) sent_at: DateTime<Utc>,
}

/// Those behind a mail, in the order of their ids, at most `limit`.
///
/// # Errors
/// Whatever keeps the database from answering.
pub(crate) async fn sent_after(
    conn: &mut AsyncPgConnection,
    after: Uuid,
    limit: i64,
) -> diesel::QueryResult<Vec<SentRow>> {
    diesel::sql_query(
        "SELECT notification_id, order_id, event_type, sent_at FROM mails
         WHERE state = 'sent' AND notification_id > $1 ORDER BY notification_id LIMIT $2",
    )
    .bind::<SqlUuid, _>(after)
    .bind::<BigInt, _>(limit)
    .load(conn)
    .await
}
