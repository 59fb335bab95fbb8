//! Orders, figures and what was told of them, in PostgreSQL. Nothing else here names the schema.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::prelude::{OptionalExtension as _, QueryableByName};
use diesel::result::Error as DieselError;
use diesel::sql_types::{Array, BigInt, Binary, Bool, Double, Jsonb, Nullable, SmallInt, Text, Timestamptz};
use diesel::{QueryResult, sql_query, sql_types};
use diesel_async::{AsyncPgConnection, RunQueryDsl as _};
use diesel_migrations::{EmbeddedMigrations, embed_migrations};
use money::Currency;
use serde::{Deserialize, Serialize};
use service::db::{Db, DbError};
use service::deadline::Deadline;
use uuid::Uuid;

use crate::domain::{
    BestSeller, Changes, Counts, Figures, Order, Paid, Placed, Sales, Size, Window, WindowFigures,
};

/// The tables of the projection, which a rebuild makes anew; those of the consumer runtime come beside them.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!("../migrations/analytics");
/// The tables of what was told by events, which a rebuild leaves alone.
pub const EMISSION_MIGRATIONS: EmbeddedMigrations = embed_migrations!("../migrations/analytics-emission");

/// Figures and their best ten. Tables in the order of their names: see the migration.
const SELECT_FIGURES: &str = "\
    SELECT f.window_size, f.window_start, f.currency_code, f.orders_placed, f.orders_confirmed, f.orders_cancelled, \
           f.received_minor_units, f.refunded_minor_units, b.products, b.quantities, b.revenues \
    FROM sales_figures f CROSS JOIN LATERAL ( \
        SELECT array_agg(product_id ORDER BY quantity DESC, product_id) AS products, \
               array_agg(quantity ORDER BY quantity DESC, product_id) AS quantities, \
               array_agg(revenue_minor_units ORDER BY quantity DESC, product_id) AS revenues \
        FROM (SELECT product_id, quantity, revenue_minor_units FROM sales_products p \
              WHERE p.window_size = f.window_size AND p.window_start = f.window_start \
                AND p.currency_code = f.currency_code AND p.quantity > 0 \
              ORDER BY quantity DESC, product_id LIMIT 10) best) b";

#[derive(QueryableByName)]
struct OrderRow {
    #[diesel(sql_type = sql_types::Uuid)]
    order_id: Uuid,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    placed_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Text>)]
    currency_code: Option<String>,
    #[diesel(sql_type = Nullable<Jsonb>)]
    lines: Option<serde_json::Value>,
    #[diesel(sql_type = Bool)]
    is_confirmed: bool,
    #[diesel(sql_type = Bool)]
    is_cancelled: bool,
    #[diesel(sql_type = Nullable<Text>)]
    paid_currency_code: Option<String>,
    #[diesel(sql_type = BigInt)]
    received_minor_units: i64,
    #[diesel(sql_type = BigInt)]
    refunded_minor_units: i64,
}

#[derive(Serialize, Deserialize)]
struct LineRow {
    product_id: Uuid,
    quantity: i64,
    revenue_minor_units: i64,
}

#[derive(QueryableByName)]
struct FiguresRow {
    #[diesel(sql_type = SmallInt)]
    window_size: i16,
    #[diesel(sql_type = Timestamptz)]
    window_start: DateTime<Utc>,
    #[diesel(sql_type = Text)]
    currency_code: String,
    #[diesel(sql_type = BigInt)]
    orders_placed: i64,
    #[diesel(sql_type = BigInt)]
    orders_confirmed: i64,
    #[diesel(sql_type = BigInt)]
    orders_cancelled: i64,
    #[diesel(sql_type = BigInt)]
    received_minor_units: i64,
    #[diesel(sql_type = BigInt)]
    refunded_minor_units: i64,
    #[diesel(sql_type = Nullable<Array<sql_types::Uuid>>)]
    products: Option<Vec<Uuid>>,
    #[diesel(sql_type = Nullable<Array<BigInt>>)]
    quantities: Option<Vec<i64>>,
    #[diesel(sql_type = Nullable<Array<BigInt>>)]
    revenues: Option<Vec<i64>>,
}

#[derive(QueryableByName)]
struct WindowRow {
    #[diesel(sql_type = SmallInt)]
    window_size: i16,
    #[diesel(sql_type = Timestamptz)]
    window_start: DateTime<Utc>,
}

/// What is known of these orders, locked until the end of the transaction; new ones have a row from here on, which nobody else sees.
pub(crate) async fn lock_orders(
    connection: &mut AsyncPgConnection,
    ids: &BTreeSet<Uuid>,
) -> QueryResult<BTreeMap<Uuid, Order>> {
    if ids.is_empty() {
        return Ok(BTreeMap::new());
    }
    let ids: Vec<Uuid> = ids.iter().copied().collect();
    // A row must be there to be locked: its order may be new to two at once, by its own topic and by that of its payments.
    sql_query("INSERT INTO sales_orders (order_id) SELECT * FROM unnest($1) ON CONFLICT DO NOTHING")
        .bind::<Array<sql_types::Uuid>, _>(&ids)
        .execute(connection)
        .await?;
    let rows: Vec<OrderRow> = sql_query(
        "SELECT order_id, placed_at, currency_code, lines, is_confirmed, is_cancelled, paid_currency_code, \
                received_minor_units, refunded_minor_units \
         FROM sales_orders WHERE order_id = ANY($1) ORDER BY order_id FOR NO KEY UPDATE",
    )
    .bind::<Array<sql_types::Uuid>, _>(&ids)
    .load(connection)
    .await?;
    rows.into_iter()
        .map(|row| Ok((row.order_id, row.order()?)))
        .collect()
}

/// Writes orders that are locked.
pub(crate) async fn save_orders(
    connection: &mut AsyncPgConnection,
    orders: &BTreeMap<Uuid, Order>,
) -> QueryResult<()> {
    if orders.is_empty() {
        return Ok(());
    }
    let rows = orders.iter().map(OrderRow::of).collect::<QueryResult<Vec<_>>>()?;
    sql_query(
        "UPDATE sales_orders o SET placed_at = n.placed_at, currency_code = n.currency_code, lines = n.lines, \
             is_confirmed = n.is_confirmed, is_cancelled = n.is_cancelled, paid_currency_code = n.paid_currency_code, \
             received_minor_units = n.received, refunded_minor_units = n.refunded \
         FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9) \
             n (order_id, placed_at, currency_code, lines, is_confirmed, is_cancelled, paid_currency_code, received, refunded) \
         WHERE o.order_id = n.order_id",
    )
    .bind::<Array<sql_types::Uuid>, _>(column(&rows, |row| row.order_id))
    .bind::<Array<Nullable<Timestamptz>>, _>(column(&rows, |row| row.placed_at))
    .bind::<Array<Nullable<Text>>, _>(column(&rows, |row| row.currency_code.as_deref()))
    .bind::<Array<Nullable<Jsonb>>, _>(column(&rows, |row| row.lines.as_ref()))
    .bind::<Array<Bool>, _>(column(&rows, |row| row.is_confirmed))
    .bind::<Array<Bool>, _>(column(&rows, |row| row.is_cancelled))
    .bind::<Array<Nullable<Text>>, _>(column(&rows, |row| row.paid_currency_code.as_deref()))
    .bind::<Array<BigInt>, _>(column(&rows, |row| row.received_minor_units))
    .bind::<Array<BigInt>, _>(column(&rows, |row| row.refunded_minor_units))
    .execute(connection)
    .await?;
    Ok(())
}

/// Adds differences to the figures, and notes which windows they change. A sum that does not fit is an error of the data.
pub(crate) async fn add(connection: &mut AsyncPgConnection, changes: &Changes) -> QueryResult<()> {
    let windows: Vec<Window> = changes.windows().into_iter().collect();
    if windows.is_empty() {
        return Ok(());
    }
    let (sizes, starts) = columns(&windows);
    sql_query("INSERT INTO sales_changes (window_size, window_start) SELECT * FROM unnest($1, $2)")
        .bind::<Array<SmallInt>, _>(sizes)
        .bind::<Array<Timestamptz>, _>(starts)
        .execute(connection)
        .await?;
    add_counts(connection, changes).await?;
    add_sales(connection, changes).await
}

async fn add_counts(connection: &mut AsyncPgConnection, changes: &Changes) -> QueryResult<()> {
    let (keys, counts): (Vec<(Window, Currency)>, Vec<Counts>) = changes.counts.iter().unzip();
    let windows: Vec<Window> = column(&keys, |(window, _)| *window);
    let (sizes, starts) = columns(&windows);
    let currencies = column(&keys, |(_, currency)| currency.code());
    // First the rows, then the locks, and then the sums: an INSERT that may become an UPDATE would hold the differences against the
    // constraints of the sums, and an UPDATE of many rows does not take them in order.
    sql_query(
        "INSERT INTO sales_figures (window_size, window_start, currency_code) SELECT * FROM unnest($1, $2, $3) \
         ON CONFLICT DO NOTHING",
    )
    .bind::<Array<SmallInt>, _>(&sizes)
    .bind::<Array<Timestamptz>, _>(&starts)
    .bind::<Array<Text>, _>(&currencies)
    .execute(connection)
    .await?;
    sql_query(
        "SELECT FROM sales_figures f JOIN unnest($1, $2, $3) k (window_size, window_start, currency_code) \
             USING (window_size, window_start, currency_code) \
         ORDER BY f.window_size, f.window_start, f.currency_code FOR NO KEY UPDATE OF f",
    )
    .bind::<Array<SmallInt>, _>(&sizes)
    .bind::<Array<Timestamptz>, _>(&starts)
    .bind::<Array<Text>, _>(&currencies)
    .execute(connection)
    .await?;
    sql_query(
        "UPDATE sales_figures f SET orders_placed = f.orders_placed + d.placed, \
             orders_confirmed = f.orders_confirmed + d.confirmed, orders_cancelled = f.orders_cancelled + d.cancelled, \
             received_minor_units = f.received_minor_units + d.received, \
             refunded_minor_units = f.refunded_minor_units + d.refunded \
         FROM unnest($1, $2, $3, $4, $5, $6, $7, $8) \
             d (window_size, window_start, currency_code, placed, confirmed, cancelled, received, refunded) \
         WHERE (f.window_size, f.window_start, f.currency_code) = (d.window_size, d.window_start, d.currency_code)",
    )
    .bind::<Array<SmallInt>, _>(&sizes)
    .bind::<Array<Timestamptz>, _>(&starts)
    .bind::<Array<Text>, _>(&currencies)
    .bind::<Array<BigInt>, _>(column(&counts, |counts| counts.placed))
    .bind::<Array<BigInt>, _>(column(&counts, |counts| counts.confirmed))
    .bind::<Array<BigInt>, _>(column(&counts, |counts| counts.cancelled))
    .bind::<Array<BigInt>, _>(column(&counts, |counts| counts.received))
    .bind::<Array<BigInt>, _>(column(&counts, |counts| counts.refunded))
    .execute(connection)
    .await?;
    Ok(())
}

/// Under the locks on the rows of figures that the products belong to: sales never change without a count.
async fn add_sales(connection: &mut AsyncPgConnection, changes: &Changes) -> QueryResult<()> {
    if changes.sales.is_empty() {
        return Ok(());
    }
    let rows: Vec<_> = changes.sales.iter().collect();
    let windows: Vec<Window> = column(&rows, |((window, ..), _)| *window);
    let (sizes, starts) = columns(&windows);
    let currencies = column(&rows, |((_, currency, _), _)| currency.code());
    let products = column(&rows, |((.., product), _)| *product);
    sql_query(
        "INSERT INTO sales_products (window_size, window_start, currency_code, product_id) \
         SELECT * FROM unnest($1, $2, $3, $4) ON CONFLICT DO NOTHING",
    )
    .bind::<Array<SmallInt>, _>(&sizes)
    .bind::<Array<Timestamptz>, _>(&starts)
    .bind::<Array<Text>, _>(&currencies)
    .bind::<Array<sql_types::Uuid>, _>(&products)
    .execute(connection)
    .await?;
    sql_query(
        "UPDATE sales_products p SET quantity = p.quantity + d.quantity, \
             revenue_minor_units = p.revenue_minor_units + d.revenue \
         FROM unnest($1, $2, $3, $4, $5, $6) d (window_size, window_start, currency_code, product_id, quantity, revenue) \
         WHERE (p.window_size, p.window_start, p.currency_code, p.product_id) \
             = (d.window_size, d.window_start, d.currency_code, d.product_id)",
    )
    .bind::<Array<SmallInt>, _>(&sizes)
    .bind::<Array<Timestamptz>, _>(&starts)
    .bind::<Array<Text>, _>(&currencies)
    .bind::<Array<sql_types::Uuid>, _>(&products)
    .bind::<Array<BigInt>, _>(column(&rows, |(_, sales)| sales.quantity))
    .bind::<Array<BigInt>, _>(column(&rows, |(_, sales)| sales.revenue))
    .execute(connection)
    .await?;
    Ok(())
}

/// Windows that figures are asked of.
#[derive(Debug, Clone)]
pub struct Span {
    pub size: Size,
    /// Windows that begin here or later …
    pub start: DateTime<Utc>,
    /// … and before this.
    pub end: DateTime<Utc>,
    /// Only figures in this currency.
    pub currency: Option<Currency>,
}

/// Figures of the windows of a span, oldest first; windows without any are left out.
///
/// # Errors
/// When the database does not answer in time.
pub async fn summary(db: &Db, deadline: Deadline, span: Span) -> Result<Vec<WindowFigures>, DbError> {
    let rows: Vec<FiguresRow> = db
        .read(deadline, &span, |connection, span| {
            Box::pin(async move {
                let statement = format!(
                    "{SELECT_FIGURES} WHERE f.window_size = $1 AND f.window_start >= $2 AND f.window_start < $3 \
                         AND ($4 IS NULL OR f.currency_code = $4) \
                     ORDER BY f.window_start, f.currency_code"
                );
                let rows = sql_query(statement)
                    .bind::<SmallInt, _>(code(span.size))
                    .bind::<Timestamptz, _>(span.start)
                    .bind::<Timestamptz, _>(span.end)
                    .bind::<Nullable<Text>, _>(span.currency.map(Currency::code))
                    .load(connection)
                    .await?;
                Ok::<_, DbError>(rows)
            })
        })
        .await?;
    let mut windows: Vec<WindowFigures> = Vec::new();
    for row in rows {
        let (window, figures) = row.figures()?;
        match windows.last_mut() {
            Some(last) if last.window == window => last.figures.push(figures),
            _ => windows.push(WindowFigures {
                window,
                figures: vec![figures],
            }),
        }
    }
    Ok(windows)
}

/// Figures of these windows, each of them, whether it has any or not.
///
/// # Errors
/// When the database does not answer in time.
pub async fn windows(
    db: &Db,
    deadline: Deadline,
    windows: Vec<Window>,
) -> Result<Vec<WindowFigures>, DbError> {
    db.read(deadline, &windows, |connection, windows| {
        Box::pin(async move { Ok(figures(connection, windows).await?) })
    })
    .await
}

/// Figures of these windows, each of them, whether it has any or not.
pub(crate) async fn figures(
    connection: &mut AsyncPgConnection,
    windows: &[Window],
) -> QueryResult<Vec<WindowFigures>> {
    let (sizes, starts) = columns(windows);
    let statement = format!(
        "{SELECT_FIGURES} WHERE (f.window_size, f.window_start) IN (SELECT * FROM unnest($1, $2)) ORDER BY f.currency_code"
    );
    let rows: Vec<FiguresRow> = sql_query(statement)
        .bind::<Array<SmallInt>, _>(sizes)
        .bind::<Array<Timestamptz>, _>(starts)
        .load(connection)
        .await?;
    let mut found: HashMap<Window, Vec<Figures>> = HashMap::new();
    for row in rows {
        let (window, figures) = row.figures()?;
        found.entry(window).or_default().push(figures);
    }
    let windows = windows.iter().map(|&window| WindowFigures {
        window,
        figures: found.remove(&window).unwrap_or_default(),
    });
    Ok(windows.collect())
}

/// The last event of a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Emission {
    pub(crate) window: Window,
    pub(crate) version: i64,
    /// SHA-256 of its figures.
    pub(crate) digest: Vec<u8>,
}

/// Takes the turn to emit until the end of the transaction; `None` when somebody else has it.
///
/// When the figures were built anew since the last turn, every window is looked at again that was told of and has none any more; the
/// build itself has noted all those that have.
pub(crate) async fn take_turn(connection: &mut AsyncPgConnection) -> QueryResult<Option<()>> {
    #[derive(QueryableByName)]
    struct Turn {
        #[diesel(sql_type = Nullable<sql_types::Uuid>)]
        compared: Option<Uuid>,
    }
    #[derive(QueryableByName)]
    struct Build {
        #[diesel(sql_type = sql_types::Uuid)]
        build: Uuid,
    }
    let turn = sql_query("SELECT build AS compared FROM emission_turn FOR UPDATE SKIP LOCKED")
        .get_result(connection)
        .await
        .optional()?;
    let Some(Turn { compared }) = turn else {
        return Ok(None);
    };
    let Build { build } = sql_query("SELECT build FROM sales_builds")
        .get_result(connection)
        .await?;
    if compared != Some(build) {
        sql_query(
            "INSERT INTO sales_changes (window_size, window_start) \
             SELECT e.window_size, e.window_start FROM window_emissions e \
             WHERE NOT EXISTS (SELECT FROM sales_figures f \
                               WHERE f.window_size = e.window_size AND f.window_start = e.window_start)",
        )
        .execute(connection)
        .await?;
        sql_query("UPDATE emission_turn SET build = $1")
            .bind::<sql_types::Uuid, _>(build)
            .execute(connection)
            .await?;
    }
    Ok(Some(()))
}

/// Takes windows that have changed and of which nothing was told within `interval`, latest first, at most `limit`. What changes them
/// after this notes them again.
pub(crate) async fn take_changed(
    connection: &mut AsyncPgConnection,
    interval: Duration,
    limit: i64,
) -> QueryResult<Vec<Window>> {
    let rows: Vec<WindowRow> = sql_query(
        "SELECT DISTINCT c.window_start, c.window_size FROM sales_changes c \
         LEFT JOIN window_emissions e USING (window_start, window_size) \
         WHERE e.emitted_at IS NULL OR e.emitted_at <= clock_timestamp() - make_interval(secs => $1) \
         ORDER BY c.window_start DESC, c.window_size DESC LIMIT $2",
    )
    .bind::<Double, _>(interval.as_secs_f64())
    .bind::<BigInt, _>(limit)
    .load(connection)
    .await?;
    let windows: Vec<Window> = rows
        .into_iter()
        .map(|row| window(row.window_size, row.window_start))
        .collect::<QueryResult<_>>()?;
    let (sizes, starts) = columns(&windows);
    sql_query(
        "DELETE FROM sales_changes WHERE (window_start, window_size) IN (SELECT * FROM unnest($1, $2))",
    )
    .bind::<Array<Timestamptz>, _>(starts)
    .bind::<Array<SmallInt>, _>(sizes)
    .execute(connection)
    .await?;
    Ok(windows)
}

/// The last events of these windows; of those that had any.
pub(crate) async fn emissions(
    connection: &mut AsyncPgConnection,
    windows: &[Window],
) -> QueryResult<Vec<Emission>> {
    #[derive(QueryableByName)]
    struct Row {
        #[diesel(sql_type = SmallInt)]
        window_size: i16,
        #[diesel(sql_type = Timestamptz)]
        window_start: DateTime<Utc>,
        #[diesel(sql_type = BigInt)]
        version: i64,
        #[diesel(sql_type = Binary)]
        figures_digest: Vec<u8>,
    }
    let (sizes, starts) = columns(windows);
    let rows: Vec<Row> = sql_query(
        "SELECT window_size, window_start, version, figures_digest FROM window_emissions \
         WHERE (window_size, window_start) IN (SELECT * FROM unnest($1, $2))",
    )
    .bind::<Array<SmallInt>, _>(sizes)
    .bind::<Array<Timestamptz>, _>(starts)
    .load(connection)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(Emission {
                window: window(row.window_size, row.window_start)?,
                version: row.version,
                digest: row.figures_digest,
            })
        })
        .collect()
}

/// Writes what is told now, and the events that tell it. The caller has the turn.
pub(crate) async fn emit(
    connection: &mut AsyncPgConnection,
    emissions: &[Emission],
    messages: &[outbox::Message],
) -> QueryResult<()> {
    let windows: Vec<Window> = column(emissions, |emission| emission.window);
    let (sizes, starts) = columns(&windows);
    sql_query(
        "INSERT INTO window_emissions (window_size, window_start, version, figures_digest, emitted_at) \
         SELECT *, clock_timestamp() FROM unnest($1, $2, $3, $4) \
         ON CONFLICT (window_size, window_start) DO UPDATE SET version = excluded.version, \
             figures_digest = excluded.figures_digest, emitted_at = excluded.emitted_at",
    )
    .bind::<Array<SmallInt>, _>(sizes)
    .bind::<Array<Timestamptz>, _>(starts)
    .bind::<Array<BigInt>, _>(column(emissions, |emission| emission.version))
    .bind::<Array<Binary>, _>(column(emissions, |emission| emission.digest.as_slice()))
    .execute(connection)
    .await?;
    outbox::append(connection, messages).await
}

impl OrderRow {
    fn of((order_id, order): (&Uuid, &Order)) -> QueryResult<Self> {
        let placed = order.placed.as_ref();
        let lines = placed.map(|placed| {
            let lines = placed.sales.iter().map(|(product_id, sales)| LineRow {
                product_id: *product_id,
                quantity: sales.quantity,
                revenue_minor_units: sales.revenue,
            });
            serde_json::to_value(lines.collect::<Vec<_>>())
                .map_err(|error| DieselError::SerializationError(error.into()))
        });
        Ok(Self {
            order_id: *order_id,
            placed_at: placed.map(|placed| placed.at),
            currency_code: placed.map(|placed| placed.currency.code().to_owned()),
            lines: lines.transpose()?,
            is_confirmed: order.is_confirmed,
            is_cancelled: order.is_cancelled,
            paid_currency_code: order.paid.map(|paid| paid.currency.code().to_owned()),
            received_minor_units: order.paid.map_or(0, |paid| paid.received),
            refunded_minor_units: order.paid.map_or(0, |paid| paid.refunded),
        })
    }

    fn order(self) -> QueryResult<Order> {
        let placed = match (self.placed_at, self.currency_code, self.lines) {
            (Some(at), Some(code), Some(lines)) => {
                let lines: Vec<LineRow> = serde_json::from_value(lines)
                    .map_err(|error| DieselError::DeserializationError(error.into()))?;
                let sales = lines.into_iter().map(|line| {
                    let sales = Sales {
                        quantity: line.quantity,
                        revenue: line.revenue_minor_units,
                    };
                    (line.product_id, sales)
                });
                Some(Placed {
                    at,
                    currency: currency(&code)?,
                    sales: sales.collect(),
                })
            }
            _ => None,
        };
        let paid = |code: String| {
            Ok::<_, DieselError>(Paid {
                currency: currency(&code)?,
                received: self.received_minor_units,
                refunded: self.refunded_minor_units,
            })
        };
        Ok(Order {
            placed,
            is_confirmed: self.is_confirmed,
            is_cancelled: self.is_cancelled,
            paid: self.paid_currency_code.map(paid).transpose()?,
        })
    }
}

impl FiguresRow {
    fn figures(self) -> QueryResult<(Window, Figures)> {
        let columns = (self.products, self.quantities, self.revenues);
        let (products, quantities, revenues) = (
            columns.0.unwrap_or_default(),
            columns.1.unwrap_or_default(),
            columns.2.unwrap_or_default(),
        );
        let best_sellers = products.into_iter().zip(quantities).zip(revenues);
        let figures = Figures {
            currency: currency(&self.currency_code)?,
            counts: Counts {
                placed: self.orders_placed,
                confirmed: self.orders_confirmed,
                cancelled: self.orders_cancelled,
                received: self.received_minor_units,
                refunded: self.refunded_minor_units,
            },
            best_sellers: best_sellers
                .map(|((product_id, quantity), revenue)| BestSeller {
                    product_id,
                    sales: Sales { quantity, revenue },
                })
                .collect(),
        };
        Ok((window(self.window_size, self.window_start)?, figures))
    }
}

/// A column of rows.
fn column<'r, R, T>(rows: &'r [R], value: impl Fn(&'r R) -> T) -> Vec<T> {
    rows.iter().map(value).collect()
}

/// Windows as columns: sizes and starts.
fn columns(windows: &[Window]) -> (Vec<i16>, Vec<DateTime<Utc>>) {
    windows
        .iter()
        .map(|window| (code(window.size()), window.start()))
        .unzip()
}

fn code(size: Size) -> i16 {
    match size {
        Size::Minute => 1,
        Size::Hour => 2,
        Size::Day => 3,
    }
}

fn window(size: i16, start: DateTime<Utc>) -> QueryResult<Window> {
    let size = Size::ALL.into_iter().find(|known| code(*known) == size);
    size.map(|size| Window::of(size, start))
        .ok_or_else(|| DieselError::DeserializationError("window_size".into()))
}

fn currency(code: &str) -> QueryResult<Currency> {
    Currency::from_code(code).ok_or_else(|| DieselError::DeserializationError("currency_code".into()))
}
