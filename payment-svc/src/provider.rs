//! The payment provider, spoken to by the part of Stripe's HTTP API that this service uses, and by nothing else: another
//! base URL and key is the real one.
//!
//! One call here is one request: each has a deadline, and none is repeated by itself. Whether to ask again, and under which
//! idempotency key, is for the caller to decide, who has stored what it needs for that. No transaction is open during a call.

use std::fmt;

use chrono::{DateTime, Utc};
use money::Money;
use prometheus::Registry;
use secrecy::SecretString;
use uuid::Uuid;

pub use config::Config;

mod config;

/// Where listing goes on: pages of at most this many.
pub const MAX_PAGE: u16 = 100;

macro_rules! provider_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// As the provider wrote it, or as it was stored.
            pub fn new(id: impl Into<String>) -> Self {
                Self(id.into())
            }

            /// As the provider wrote it.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

provider_id! {
    /// The provider's id of a card that it keeps (`pm_…`).
    MethodToken
}
provider_id! {
    /// The provider's id of a charge to be made, at most once (`pi_…`).
    IntentId
}
provider_id! {
    /// The provider's id of a refund (`re_…`).
    RefundId
}

/// A card on its way to the provider.
#[derive(Debug, Clone)]
pub struct Card {
    pub number: SecretString,
    /// 1 to 12.
    pub expiry_month: u8,
    /// Four digits.
    pub expiry_year: u16,
    pub cvv: SecretString,
}

/// A card that the provider keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Method {
    pub id: MethodToken,
    /// For example `visa`.
    pub brand: String,
    pub last_four: String,
    pub expiry_month: u8,
    pub expiry_year: u16,
}

/// What to charge.
#[derive(Debug, Clone)]
pub struct Charge {
    pub amount: Money,
    pub method: MethodToken,
    pub payment_id: Uuid,
    pub order_id: Uuid,
}

/// A charge to be made, as the provider has it. It takes the money at most once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    pub id: IntentId,
    pub state: IntentState,
    /// In ISO 4217's minor units, as [`Money`] has them.
    pub amount: i64,
    /// Upper case.
    pub currency: String,
    /// Whose it is: `None` if it was not made by this service.
    pub payment_id: Option<Uuid>,
    pub order_id: Option<Uuid>,
    pub created: DateTime<Utc>,
}

/// Where a charge stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IntentState {
    /// Not confirmed yet, or not as far as the provider knows: no money was taken.
    RequiresConfirmation,
    /// The bank has not answered yet.
    Processing,
    /// The money was taken.
    Succeeded,
    /// The bank said no. This intent stays declined, since its method was taken from it.
    Declined(Decline),
    /// It has no method, and none was declined.
    RequiresPaymentMethod,
    /// It waits for its customer, who is never asked here: cancel it.
    RequiresAction,
    /// It will never take money.
    Canceled,
}

/// What a bank or the provider says when it does not take the money.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decline {
    pub reason: DeclineReason,
    /// Whether paying again, perhaps by another card, makes sense.
    pub another_try: bool,
}

/// Why money was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeclineReason {
    /// No reason was given.
    Declined,
    InsufficientFunds,
    ExpiredCard,
    IncorrectCardDetails,
    /// Lost, stolen or suspected of fraud.
    CardBlocked,
    AuthenticationRequired,
    /// Such a charge, for example in this currency, is not possible.
    NotSupported,
}

/// Money on its way back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refund {
    pub id: RefundId,
    /// `None` if it is of a charge that was made without one.
    pub intent: Option<IntentId>,
    /// In ISO 4217's minor units, as [`Money`] has them.
    pub amount: i64,
    /// Upper case.
    pub currency: String,
    pub status: RefundStatus,
    pub payment_id: Option<Uuid>,
    pub created: DateTime<Utc>,
}

/// Where a refund stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefundStatus {
    /// Accepted; the bank has not answered yet.
    Pending,
    Succeeded,
    /// The bank did not take it back. Another one may be made.
    Failed,
}

/// A part of a listing, newest first.
#[derive(Debug, Clone)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Whether there are older ones: list again after the last item.
    pub has_more: bool,
}

/// The provider cannot be spoken to with this configuration.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("the payment provider's HTTP client cannot be made")]
    Client(#[source] reqwest::Error),
    #[error("the payment provider's secret key holds characters that no key has")]
    Key,
    #[error("metrics of the payment provider cannot be registered")]
    Metrics(#[from] prometheus::Error),
}

/// Why a call did not bring what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It may have been done or not: ask the provider what it knows.
    #[error("the payment provider's answer is not known")]
    Unknown(#[source] UnknownOutcome),
    /// A definite no: nothing was done.
    #[error("the payment provider refused the call: {code}")]
    Refused {
        /// The provider's own code, for example `resource_missing`.
        code: String,
        /// What it means for a payment that cannot go on because of it.
        decline: Decline,
    },
    /// The idempotency key was used with other parameters before: nothing was done.
    #[error("the idempotency key was used for something else before")]
    KeyReused,
    /// The configured key is not accepted: nothing was done.
    #[error("the payment provider does not accept the configured key")]
    Unauthorized,
}

/// Why nobody knows what came of a call.
#[derive(Debug, thiserror::Error)]
pub enum UnknownOutcome {
    #[error("no answer came")]
    NoAnswer(#[source] reqwest::Error),
    #[error("the answer had status {status}, request {request_id}")]
    Status { status: u16, request_id: String },
    #[error("the answer with status {status} is not understood: {what}, request {request_id}")]
    NotUnderstood {
        status: u16,
        what: &'static str,
        request_id: String,
    },
}

/// A client of the provider. Clones share its connections.
#[derive(Debug, Clone)]
pub struct Provider {}

impl Provider {
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// When the client cannot be made.
    pub fn new(_config: &Config, _registry: &Registry) -> Result<Self, SetupError> {
        Ok(Self {})
    }

    /// Has the provider keep a card. The same key with another card is [`CallError::KeyReused`]; a card that cannot be one is
    /// [`CallError::Refused`].
    pub async fn create_method(&self, _key: &str, _card: &Card) -> Result<Method, CallError> {
        Err(CallError::Unauthorized)
    }

    /// Makes an intent to charge, not confirmed: no money is taken yet.
    pub async fn create_intent(&self, _key: &str, _charge: &Charge) -> Result<Intent, CallError> {
        Err(CallError::Unauthorized)
    }

    /// Takes the money. A decline is `Ok` with its state; so is an intent that is past being confirmed.
    pub async fn confirm_intent(&self, _key: &str, _intent: &IntentId) -> Result<Intent, CallError> {
        Err(CallError::Unauthorized)
    }

    /// The intent as the provider has it now.
    pub async fn intent(&self, _intent: &IntentId) -> Result<Intent, CallError> {
        Err(CallError::Unauthorized)
    }

    /// Makes sure that an intent never takes money. One that has taken it already, or was cancelled before, is `Ok` with its
    /// state.
    pub async fn cancel_intent(&self, _key: &str, _intent: &IntentId) -> Result<Intent, CallError> {
        Err(CallError::Unauthorized)
    }

    /// Gives back all that the intent has taken. Refused with code `charge_already_refunded` if that was done before.
    pub async fn refund(
        &self,
        _key: &str,
        _intent: &IntentId,
        _payment_id: Uuid,
    ) -> Result<Refund, CallError> {
        Err(CallError::Unauthorized)
    }

    /// The intent's refunds, newest first; [`MAX_PAGE`] at most, of which more than a few would be odd.
    pub async fn refunds(&self, _intent: &IntentId) -> Result<Vec<Refund>, CallError> {
        Err(CallError::Unauthorized)
    }

    /// Every intent of the account, newest first, [`MAX_PAGE`] at most at once.
    pub async fn list_intents(
        &self,
        _after: Option<&IntentId>,
        _limit: u16,
    ) -> Result<Page<Intent>, CallError> {
        Err(CallError::Unauthorized)
    }

    /// Every refund of the account, newest first, [`MAX_PAGE`] at most at once.
    pub async fn list_refunds(
        &self,
        _after: Option<&RefundId>,
        _limit: u16,
    ) -> Result<Page<Refund>, CallError> {
        Err(CallError::Unauthorized)
    }
}
