//! Proves the database right, or says what is wrong: every reservation and the stock of every product is rebuilt from its history and
//! compared with its row, the two are compared with each other, and the history is compared with the outbox.

use diesel_async::AsyncPgConnection;
use event_store::StoredEvent;
pub use event_store::verify::Report;
use event_store::verify::{Entities, check_entities, check_outbox};
use service::config::Database;
use service::shutdown::BoxError;
use service::telemetry::chain;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::domain::{OrderId, ProductId, reservation, stock};
use crate::store::{self, RESERVATION, ReservationRow, STOCK, StockRow, StoreError, Unbalanced};

/// The command: verifies, prints the report on standard output, fails if something differs.
///
/// # Errors
/// [`event_store::verify::Unsound`], or whatever keeps the database from answering.
#[expect(clippy::print_stdout, reason = "the report is the command's output")]
pub async fn command(config: &Database, json: bool, shutdown: CancellationToken) -> Result<(), BoxError> {
    let mut conn = service::db::connect_unbounded(config, "inventory-svc verify").await?;
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
    conn.build_transaction()
        .repeatable_read()
        .read_only()
        .run(async |conn| {
            let mut report = Report::default();
            check_entities::<Reservations>(conn, &mut report).await?;
            check_entities::<Stock>(conn, &mut report).await?;
            for Unbalanced { product_id, what } in store::unbalanced(conn).await? {
                report.add(product_id, what);
            }
            check_outbox(conn, &mut report).await?;
            Ok(report)
        })
        .await
}

struct Reservations;

impl Entities for Reservations {
    type Row = ReservationRow;
    const ENTITY_TYPE: &'static str = RESERVATION;
    const IDS: &'static str = "SELECT order_id::text AS id FROM reservations";

    async fn rows_after(
        conn: &mut AsyncPgConnection,
        after: Uuid,
        limit: i64,
    ) -> diesel::QueryResult<Vec<ReservationRow>> {
        ReservationRow::after(conn, after, limit).await
    }

    fn id(row: &ReservationRow) -> Uuid {
        row.order_id
    }

    fn rebuild(row: &ReservationRow, history: &[StoredEvent]) -> Result<ReservationRow, String> {
        let id = OrderId(row.order_id);
        let decoded = decoded(history, |event| store::decode_reservation(id, event))?;
        let rebuilt = reservation::rebuild(id, &decoded).map_err(|error| chain(&error).to_string())?;
        Ok(ReservationRow::from(&rebuilt.ok_or(NO_HISTORY)?))
    }
}

struct Stock;

impl Entities for Stock {
    type Row = StockRow;
    const ENTITY_TYPE: &'static str = STOCK;
    const IDS: &'static str = "SELECT product_id::text AS id FROM stock";

    async fn rows_after(
        conn: &mut AsyncPgConnection,
        after: Uuid,
        limit: i64,
    ) -> diesel::QueryResult<Vec<StockRow>> {
        StockRow::after(conn, after, limit).await
    }

    fn id(row: &StockRow) -> Uuid {
        row.product_id
    }

    fn rebuild(row: &StockRow, history: &[StoredEvent]) -> Result<StockRow, String> {
        let id = ProductId(row.product_id);
        let decoded = decoded(history, |event| store::decode_stock(id, event))?;
        Ok(StockRow::from(&stock::rebuild(id, decoded).ok_or(NO_HISTORY)?))
    }
}

const NO_HISTORY: &str = "it has a row and no history";

fn decoded<E>(
    history: &[StoredEvent],
    decode: impl Fn(&StoredEvent) -> Result<E, StoreError>,
) -> Result<Vec<E>, String> {
    let decoded: Result<Vec<E>, StoreError> = history.iter().map(decode).collect();
    decoded.map_err(|error| chain(&error).to_string())
}
