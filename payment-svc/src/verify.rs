//! Proves the database right, or says what is wrong: every payment is rebuilt from its history and compared with its row, and the
//! history is compared with the outbox.

use diesel_async::AsyncPgConnection;
use event_store::StoredEvent;
use event_store::verify::{Entities, Report, verify};
use service::config::Database;
use service::shutdown::BoxError;
use service::telemetry::chain;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::domain::{Payment, Status, rebuild};
use crate::store::{self, ENTITY_TYPE, PaymentRow};

/// The command: verifies, prints the report on standard output, fails if something differs.
///
/// # Errors
/// [`event_store::verify::Unsound`], or whatever keeps the database from answering.
#[expect(clippy::print_stdout, reason = "the report is the command's output")]
pub async fn command(config: &Database, json: bool, shutdown: CancellationToken) -> Result<(), BoxError> {
    let mut conn = service::db::connect_unbounded(config, "payment-svc verify").await?;
    let report: Report = tokio::select! {
        report = verify::<Payments>(&mut conn) => report?,
        () = shutdown.cancelled() => return Err("interrupted".into()),
    };
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(report.sound()?)
}

struct Payments;

impl Entities for Payments {
    type Row = PaymentRow;
    const ENTITY_TYPE: &'static str = ENTITY_TYPE;
    const IDS: &'static str = "SELECT payment_id::text AS id FROM payments";

    async fn rows_after(
        conn: &mut AsyncPgConnection,
        after: Uuid,
        limit: i64,
    ) -> diesel::QueryResult<Vec<PaymentRow>> {
        PaymentRow::after(conn, after, limit).await
    }

    fn id(row: &PaymentRow) -> Uuid {
        row.payment_id
    }

    fn rebuild(row: &PaymentRow, history: &[StoredEvent]) -> Result<PaymentRow, String> {
        let stored = row
            .clone()
            .into_payment()
            .map_err(|error| chain(&error).to_string())?;
        let events: Vec<_> = history
            .iter()
            .map(|event| store::decode(stored.id, event))
            .collect::<Result<_, _>>()
            .map_err(|error| chain(&error).to_string())?;
        let rebuilt = rebuild(before_anything(&stored), &events).map_err(|error| error.to_string())?;
        Ok((&written_ahead(rebuilt, &stored)).into())
    }
}

/// The payment as it began: what no event tells of is taken from its row.
fn before_anything(stored: &Payment) -> Payment {
    Payment {
        status: Status::Pending,
        version: 0,
        intent: None,
        failure: None,
        refund: None,
        updated_at: stored.created_at,
        ..stored.clone()
    }
}

/// What is written ahead of the next event is in the row alone.
fn written_ahead(rebuilt: Payment, stored: &Payment) -> Payment {
    match (rebuilt.status, stored.status) {
        (Status::Pending, Status::Pending) => Payment {
            intent: stored.intent.clone(),
            ..rebuilt
        },
        (Status::Received, Status::RefundPending) => Payment {
            status: Status::RefundPending,
            updated_at: stored.updated_at,
            ..rebuilt
        },
        _ => rebuilt,
    }
}
