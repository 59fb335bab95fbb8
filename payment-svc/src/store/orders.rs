//! What is known of orders.

use diesel::prelude::{
    AsChangeset, ExpressionMethods, Insertable, OptionalExtension, QueryDsl, Queryable, Selectable,
    SelectableHelper,
};
use diesel::upsert::excluded;
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use money::{Currency, Money};
use uuid::Uuid;

use super::schema::known_orders;
use super::{Lock, MAX_ROWS, StoreError};
use crate::domain::{KnownOrder, OrderId, PaymentMethodId, UserId};

/// The order, if it is known.
///
/// # Errors
/// [`StoreError::BrokenOrder`] when the row cannot be an order's.
pub async fn load_order(
    conn: &AsyncPgConnection,
    id: OrderId,
    lock: Lock,
) -> Result<Option<KnownOrder>, StoreError> {
    let query = known_orders::table.find(id.0).select(OrderRow::as_select());
    let row = match lock {
        Lock::None => query.first(&mut &*conn).await.optional()?,
        Lock::Update => {
            let query = query.for_no_key_update();
            query.first(&mut &*conn).await.optional()?
        }
    };
    row.map(OrderRow::into_order).transpose()
}

/// Locks those of the orders that are known, in the order of their ids, as everybody does who locks several.
///
/// # Errors
/// [`StoreError::BrokenOrder`] when a row cannot be an order's.
pub async fn lock_orders(
    conn: &mut AsyncPgConnection,
    ids: &[OrderId],
) -> Result<Vec<KnownOrder>, StoreError> {
    let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
    let rows = known_orders::table
        .filter(known_orders::order_id.eq_any(ids))
        .order(known_orders::order_id)
        .select(OrderRow::as_select())
        .for_no_key_update()
        .load(conn)
        .await?;
    rows.into_iter().map(OrderRow::into_order).collect()
}

/// Writes what is known of orders.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn save_orders(conn: &mut AsyncPgConnection, orders: &[KnownOrder]) -> Result<(), StoreError> {
    for orders in orders.chunks(MAX_ROWS) {
        let rows: Vec<OrderRow> = orders.iter().map(OrderRow::from).collect();
        diesel::insert_into(known_orders::table)
            .values(&rows)
            .on_conflict(known_orders::order_id)
            .do_update()
            .set((
                known_orders::reserved.eq(excluded(known_orders::reserved)),
                known_orders::closed.eq(excluded(known_orders::closed)),
                known_orders::cancelled.eq(excluded(known_orders::cancelled)),
                known_orders::version.eq(excluded(known_orders::version)),
            ))
            .execute(conn)
            .await?;
    }
    Ok(())
}

/// Lets no further payment of the order be started. Its row is locked by the caller.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn close_order(conn: &mut AsyncPgConnection, id: OrderId) -> Result<(), StoreError> {
    let target = known_orders::table
        .find(id.0)
        .filter(known_orders::closed.eq(false));
    diesel::update(target)
        .set(known_orders::closed.eq(true))
        .execute(conn)
        .await?;
    Ok(())
}

#[derive(Debug, Queryable, Selectable, Insertable, AsChangeset)]
#[diesel(table_name = known_orders)]
#[diesel(primary_key(order_id))]
#[diesel(check_for_backend(diesel::pg::Pg))]
struct OrderRow {
    order_id: Uuid,
    user_id: Uuid,
    total_minor_units: i64,
    currency: String,
    payment_method_id: Option<Uuid>,
    reserved: bool,
    closed: bool,
    cancelled: bool,
    version: i64,
}

impl From<&KnownOrder> for OrderRow {
    fn from(order: &KnownOrder) -> Self {
        Self {
            order_id: order.id.0,
            user_id: order.user_id.0,
            total_minor_units: order.total.minor_units(),
            currency: order.total.currency().code().to_owned(),
            payment_method_id: order.payment_method_id.map(|id| id.0),
            reserved: order.reserved,
            closed: order.closed,
            cancelled: order.cancelled,
            version: order.version,
        }
    }
}

impl OrderRow {
    fn into_order(self) -> Result<KnownOrder, StoreError> {
        let id = OrderId(self.order_id);
        let broken = |column| StoreError::BrokenOrder { id, column };
        let currency = Currency::from_code(&self.currency).ok_or(broken("currency"))?;
        Ok(KnownOrder {
            id,
            user_id: UserId(self.user_id),
            total: Money::new(self.total_minor_units, currency).ok_or(broken("total_minor_units"))?,
            payment_method_id: self.payment_method_id.map(PaymentMethodId),
            reserved: self.reserved,
            closed: self.closed,
            cancelled: self.cancelled,
            version: self.version,
        })
    }
}
