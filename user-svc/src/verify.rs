//! Proves a database right, or says what is wrong: see [`event_store::verify`].

use diesel_async::AsyncPgConnection;
use event_store::StoredEvent;
use event_store::verify::Entities;
pub use event_store::verify::{Difference, Report, Unsound};
use service::config::Database;
use service::shutdown::BoxError;
use service::telemetry::chain;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::domain::{UserId, rebuild};
use crate::store::{self, ENTITY_TYPE, UserRow};

/// The command: verifies, prints the report on standard output, fails if something differs.
///
/// # Errors
/// [`Unsound`], or whatever keeps the database from answering.
#[expect(clippy::print_stdout, reason = "the report is the command's output")]
pub async fn command(config: &Database, json: bool, shutdown: CancellationToken) -> Result<(), BoxError> {
    let mut conn = service::db::connect_unbounded(config, "user-svc verify").await?;
    let report = tokio::select! {
        report = verify(&mut conn) => report?,
        () = shutdown.cancelled() => return Err("interrupted".into()),
    };
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(report.sound()?)
}

/// Verifies the whole database of a connection.
///
/// # Errors
/// Whatever keeps the database from answering. Differences are not errors: they are in the report.
pub async fn verify(conn: &mut AsyncPgConnection) -> diesel::QueryResult<Report> {
    event_store::verify::verify::<Users>(conn).await
}

struct Users;

impl Entities for Users {
    type Row = UserRow;
    const ENTITY_TYPE: &'static str = ENTITY_TYPE;
    const IDS: &'static str = "SELECT user_id::text AS id FROM users";

    async fn rows_after(
        conn: &mut AsyncPgConnection,
        after: Uuid,
        limit: i64,
    ) -> diesel::QueryResult<Vec<UserRow>> {
        store::rows_after(conn, after, limit).await
    }

    fn id(row: &UserRow) -> Uuid {
        row.user_id
    }

    fn rebuild(row: &UserRow, history: &[StoredEvent]) -> Result<UserRow, String> {
        let id = UserId(row.user_id);
        let decoded: Vec<_> = history
            .iter()
            .map(|event| store::decode(id, event))
            .collect::<Result<_, _>>()
            .map_err(|error| chain(&error).to_string())?;
        let rebuilt = rebuild(&decoded).map_err(|error| chain(&error).to_string())?;
        Ok(UserRow::from(&rebuilt.ok_or("it has a row and no history")?))
    }
}
