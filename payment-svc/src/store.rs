//! Payments, payment methods and known orders in PostgreSQL: the only module that knows the schema, and the only one that
//! writes.
//!
//! [`save`] and [`start_all`] are the only public writes of a payment's state. They take the new state together with its events, so
//! state without event cannot be written. Whoever decides about an order or a payment locks the order's row first, then the payment's.

use diesel::result::Error as DieselError;
use diesel_migrations::{EmbeddedMigrations, embed_migrations};
use service::db::{DbError, TransactionError};
use uuid::Uuid;

use crate::codec::DecodeError;
use crate::domain::{OrderId, PaymentId};

pub use methods::{KnownMethod, find_method, find_methods, keep_method};
pub use orders::{close_order, load_order, lock_orders, save_orders};
pub(crate) use payments::PaymentRow;
pub use payments::{
    CLAIM_DUE, Cause, Due, Fact, Stored, Unfinished, Work, claim_due, decode, hurry, live_payments,
    load_payment, of_intents, payments_after, reschedule, save, start_all, unfinished,
};

mod methods;
mod orders;
mod payments;

/// Creates the tables.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!("../migrations/payment");

/// The entity type of payments.
pub const ENTITY_TYPE: &str = contracts::catalogue::payment::ENTITY_TYPE;

/// The source in the envelopes of this service's events.
const SOURCE: &str = "/payment-svc";

/// Rows that one statement inserts: PostgreSQL takes 65,535 parameters.
const MAX_ROWS: usize = 1000;

mod schema {
    diesel::table! {
        payment_methods (payment_method_id) {
            payment_method_id -> Uuid,
            user_id -> Uuid,
            provider_token -> Text,
            brand -> Text,
            last_four -> Text,
            expiry_month -> SmallInt,
            expiry_year -> SmallInt,
            created_at -> Timestamptz,
        }
    }

    diesel::table! {
        known_orders (order_id) {
            order_id -> Uuid,
            user_id -> Uuid,
            total_minor_units -> BigInt,
            currency -> Text,
            payment_method_id -> Nullable<Uuid>,
            reserved -> Bool,
            closed -> Bool,
            cancelled -> Bool,
            version -> BigInt,
        }
    }

    diesel::table! {
        payments (payment_id) {
            payment_id -> Uuid,
            version -> BigInt,
            order_id -> Uuid,
            user_id -> Uuid,
            amount_minor_units -> BigInt,
            currency -> Text,
            payment_method_id -> Nullable<Uuid>,
            brand -> Nullable<Text>,
            last_four -> Nullable<Text>,
            status -> Text,
            intent -> Nullable<Text>,
            refund -> Nullable<Text>,
            failure_reason -> Nullable<Text>,
            another_try -> Nullable<Bool>,
            created_at -> Timestamptz,
            updated_at -> Timestamptz,
            next_step_at -> Nullable<Timestamptz>,
            tries -> Integer,
            delays -> Integer,
            causation_id -> Uuid,
            traceparent -> Nullable<Text>,
            tracestate -> Nullable<Text>,
        }
    }

    use diesel::sql_types::{Double, Nullable};

    diesel::define_sql_function! {
        /// So many seconds from now, by the database's clock.
        fn due_in(seconds: Nullable<Double>) -> Nullable<Timestamptz>;
    }
}

/// Why something could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("payment {0} has moved on")]
    Conflict(PaymentId),
    #[error("another payment of the order came first")]
    OtherPayment,
    #[error("column {column} of payment {id} holds what no payment can have")]
    Broken { id: PaymentId, column: &'static str },
    #[error("column {column} of order {id} holds what no order can have")]
    BrokenOrder { id: OrderId, column: &'static str },
    #[error("column {column} of payment method {id} holds what no payment method can have")]
    BrokenMethod { id: Uuid, column: &'static str },
    #[error("payment {0} is of an order that is not known")]
    NoOrder(PaymentId),
    #[error("version {version} of payment {id} cannot be read")]
    Undecodable {
        id: PaymentId,
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

impl TransactionError for StoreError {
    fn database(&self) -> Option<&DbError> {
        match self {
            Self::Database(error) => Some(error),
            _ => None,
        }
    }
}

/// Whether a row is read to be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    None,
    /// Until the end of the transaction; whoever else wants to change it waits.
    Update,
}
