//! Proves a database right, or says what is wrong: see [`event_store::verify`]. The history has the mails that were sent.

use diesel_async::AsyncPgConnection;
use event_store::StoredEvent;
use event_store::verify::Entities;
pub use event_store::verify::{Difference, Report, Unsound};
use service::config::Database;
use service::shutdown::BoxError;
use service::telemetry::chain;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::codec;
use crate::domain::MailId;
use crate::store::{self, ENTITY_TYPE, SentRow};

/// The command: verifies, prints the report on standard output, fails if something differs.
///
/// # Errors
/// [`Unsound`], or whatever keeps the database from answering.
#[expect(clippy::print_stdout, reason = "the report is the command's output")]
pub async fn command(config: &Database, json: bool, shutdown: CancellationToken) -> Result<(), BoxError> {
    let mut conn = service::db::connect_unbounded(config, "notification-svc verify").await?;
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
    event_store::verify::verify::<SentMails>(conn).await
}

struct SentMails;

impl Entities for SentMails {
    type Row = SentRow;
    const ENTITY_TYPE: &'static str = ENTITY_TYPE;
    const IDS: &'static str = "SELECT notification_id::text AS id FROM mails WHERE state = 'sent'";

    async fn rows_after(
        conn: &mut AsyncPgConnection,
        after: Uuid,
        limit: i64,
    ) -> diesel::QueryResult<Vec<SentRow>> {
        store::sent_after(conn, after, limit).await
    }

    fn id(row: &SentRow) -> Uuid {
        row.notification_id
    }

    fn rebuild(row: &SentRow, history: &[StoredEvent]) -> Result<SentRow, String> {
        let [event] = history else {
            return Err(format!("it was sent once and has a history of {}", history.len()));
        };
        let id = MailId(row.notification_id);
        let (template, order_id, sent_at) =
            codec::decode_sent(id, &event.event_type, event.schema_version, &event.payload)
                .map_err(|error| format!("version 1 cannot be read: {}", chain(&error)))?;
        if codec::template(&row.event_type) != Some(template) {
            return Err("its history is that of another mail".to_owned());
        }
        Ok(SentRow {
            notification_id: row.notification_id,
            order_id: order_id.0,
            event_type: row.event_type.clone(),
            sent_at,
        })
    }
}
