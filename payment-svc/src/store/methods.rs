//! Payment methods.

use chrono::{DateTime, Utc};
use diesel::prelude::{
    ExpressionMethods, Insertable, OptionalExtension, QueryDsl, Queryable, Selectable, SelectableHelper,
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use super::StoreError;
use super::schema::payment_methods;
use crate::domain::{CardSummary, Method, PaymentMethodId, UserId};

/// A card that the provider keeps for a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownMethod {
    pub method: Method,
    pub user_id: UserId,
    /// The provider's id of it.
    pub provider_token: String,
    pub expiry_month: u8,
    pub expiry_year: u16,
    pub created_at: DateTime<Utc>,
}

/// The method, if there is one.
///
/// # Errors
/// [`StoreError::BrokenMethod`] when the row cannot be a method's.
pub async fn find_method(
    conn: &AsyncPgConnection,
    id: PaymentMethodId,
) -> Result<Option<KnownMethod>, StoreError> {
    let query = payment_methods::table.find(id.0).select(MethodRow::as_select());
    let row = query.first(&mut &*conn).await.optional()?;
    row.map(MethodRow::into_method).transpose()
}

/// Those of the methods that there are.
///
/// # Errors
/// [`StoreError::BrokenMethod`] when a row cannot be a method's.
pub async fn find_methods(
    conn: &mut AsyncPgConnection,
    ids: &[PaymentMethodId],
) -> Result<Vec<KnownMethod>, StoreError> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
    let rows = payment_methods::table
        .filter(payment_methods::payment_method_id.eq_any(ids))
        .select(MethodRow::as_select())
        .load(conn)
        .await?;
    rows.into_iter().map(MethodRow::into_method).collect()
}

/// Keeps a method. The provider gives a repeated request the same token again: then the method that has it is the answer.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn keep_method(
    conn: &mut AsyncPgConnection,
    method: &KnownMethod,
) -> Result<KnownMethod, StoreError> {
    let row = MethodRow::from(method);
    diesel::insert_into(payment_methods::table)
        .values(&row)
        .on_conflict(payment_methods::provider_token)
        .do_nothing()
        .execute(conn)
        .await?;
    // Another transaction's row is visible to this statement, since the insert has waited for it.
    payment_methods::table
        .filter(payment_methods::provider_token.eq(&method.provider_token))
        .select(MethodRow::as_select())
        .first(conn)
        .await?
        .into_method()
}

#[derive(Debug, Queryable, Selectable, Insertable)]
#[diesel(table_name = payment_methods)]
#[diesel(check_for_backend(diesel::pg::Pg))]
struct MethodRow {
    payment_method_id: Uuid,
    user_id: Uuid,
    provider_token: String,
    brand: String,
    last_four: String,
    expiry_month: i16,
    expiry_year: i16,
    created_at: DateTime<Utc>,
}

impl From<&KnownMethod> for MethodRow {
    fn from(known: &KnownMethod) -> Self {
        Self {
            payment_method_id: known.method.id.0,
            user_id: known.user_id.0,
            provider_token: known.provider_token.clone(),
            brand: known.method.card.brand.clone(),
            last_four: known.method.card.last_four.clone(),
            expiry_month: known.expiry_month.into(),
            expiry_year: i16::try_from(known.expiry_year).unwrap_or(i16::MAX),
            created_at: known.created_at,
        }
    }
}

impl MethodRow {
    fn into_method(self) -> Result<KnownMethod, StoreError> {
        let id = self.payment_method_id;
        let broken = |column| StoreError::BrokenMethod { id, column };
        Ok(KnownMethod {
            method: Method {
                id: PaymentMethodId(id),
                card: CardSummary {
                    brand: self.brand,
                    last_four: self.last_four,
                },
            },
            user_id: UserId(self.user_id),
            provider_token: self.provider_token,
            expiry_month: u8::try_from(self.expiry_month).map_err(|_| broken("expiry_month"))?,
            expiry_year: u16::try_from(self.expiry_year).map_err(|_| broken("expiry_year"))?,
            created_at: self.created_at,
        })
    }
}
