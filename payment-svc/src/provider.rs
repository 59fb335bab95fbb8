//! The payment provider, spoken to by the part of Stripe's HTTP API that this service uses, and by nothing else: another
//! base URL and key is the real one.
//!
//! One call here is one request: each has a deadline, and none is repeated by itself. Whether to ask again, and under which
//! idempotency key, is for the caller to decide, who has stored what it needs for that. No transaction is open during a call.

use std::fmt;

use chrono::{DateTime, Utc};
use money::Money;
use prometheus::Registry;
use secrecy::{ExposeSecret as _, SecretString};
use uuid::Uuid;

use http::{Call, Http};

pub use config::Config;

mod amount;
mod answers;
mod config;
mod http;

/// The most that one call lists.
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
pub struct Provider {
    http: Http,
}

impl Provider {
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// When the client cannot be made.
    pub fn new(config: &Config, registry: &Registry) -> Result<Self, SetupError> {
        Ok(Self {
            http: Http::new(config, registry)?,
        })
    }

    /// Has the provider keep a card. The same key with another card is [`CallError::KeyReused`]; a card that cannot be one is
    /// [`CallError::Refused`].
    pub async fn create_method(&self, key: &str, card: &Card) -> Result<Method, CallError> {
        let call = Call {
            operation: "create payment_method",
            path: &["payment_methods"],
            params: &[
                ("type", "card"),
                ("card[number]", card.number.expose_secret()),
                ("card[exp_month]", &card.expiry_month.to_string()),
                ("card[exp_year]", &card.expiry_year.to_string()),
                ("card[cvc]", card.cvv.expose_secret()),
            ],
            key: Some(key),
        };
        answers::method(&self.call(call).await?)
    }

    /// Makes an intent to charge, not confirmed: no money is taken yet.
    pub async fn create_intent(&self, key: &str, charge: &Charge) -> Result<Intent, CallError> {
        let amount = amount::to_provider(charge.amount).ok_or_else(answers::amount_not_supported)?;
        let call = Call {
            operation: "create payment_intent",
            path: &["payment_intents"],
            params: &[
                ("amount", &amount.to_string()),
                ("currency", &charge.amount.currency().code().to_ascii_lowercase()),
                ("payment_method", charge.method.as_str()),
                ("payment_method_types[]", "card"),
                ("metadata[payment_id]", &charge.payment_id.to_string()),
                ("metadata[order_id]", &charge.order_id.to_string()),
            ],
            key: Some(key),
        };
        answers::new_intent(&self.call(call).await?)
    }

    /// Takes the money. A decline is `Ok` with its state; so is an intent that is past being confirmed.
    pub async fn confirm_intent(&self, key: &str, intent: &IntentId) -> Result<Intent, CallError> {
        let call = Call {
            operation: "confirm payment_intent",
            path: &["payment_intents", intent.as_str(), "confirm"],
            // Nobody is there to be asked by their bank.
            params: &[("error_on_requires_action", "true")],
            key: Some(key),
        };
        answers::changed_intent(&self.call(call).await?, intent)
    }

    /// The intent as the provider has it now.
    pub async fn intent(&self, intent: &IntentId) -> Result<Intent, CallError> {
        let call = Call {
            operation: "retrieve payment_intent",
            path: &["payment_intents", intent.as_str()],
            params: &[],
            key: None,
        };
        answers::intent(&self.call(call).await?, intent)
    }

    /// Makes sure that an intent never takes money. One that has taken it already, or was cancelled before, is `Ok` with its
    /// state.
    pub async fn cancel_intent(&self, key: &str, intent: &IntentId) -> Result<Intent, CallError> {
        let call = Call {
            operation: "cancel payment_intent",
            path: &["payment_intents", intent.as_str(), "cancel"],
            params: &[],
            key: Some(key),
        };
        answers::changed_intent(&self.call(call).await?, intent)
    }

    /// Gives back all that the intent has taken. Refused with code `charge_already_refunded` if that was done before.
    pub async fn refund(&self, key: &str, intent: &IntentId, payment_id: Uuid) -> Result<Refund, CallError> {
        let call = Call {
            operation: "create refund",
            path: &["refunds"],
            params: &[
                ("payment_intent", intent.as_str()),
                ("metadata[payment_id]", &payment_id.to_string()),
            ],
            key: Some(key),
        };
        answers::refund(&self.call(call).await?, intent)
    }

    /// The intent's refunds, newest first; [`MAX_PAGE`] at most, of which more than a few would be odd.
    pub async fn refunds(&self, intent: &IntentId) -> Result<Vec<Refund>, CallError> {
        let call = Call {
            operation: "list refunds",
            path: &["refunds"],
            params: &[
                ("payment_intent", intent.as_str()),
                ("limit", &MAX_PAGE.to_string()),
            ],
            key: None,
        };
        Ok(answers::refunds(&self.call(call).await?)?.items)
    }

    /// Every intent of the account, newest first, [`MAX_PAGE`] at most at once.
    pub async fn list_intents(
        &self,
        after: Option<&IntentId>,
        limit: u16,
    ) -> Result<Page<Intent>, CallError> {
        let after = after.map(IntentId::as_str);
        answers::intents(
            &self
                .list("list payment_intents", "payment_intents", after, limit)
                .await?,
        )
    }

    /// Every refund of the account, newest first, [`MAX_PAGE`] at most at once.
    pub async fn list_refunds(
        &self,
        after: Option<&RefundId>,
        limit: u16,
    ) -> Result<Page<Refund>, CallError> {
        let after = after.map(RefundId::as_str);
        answers::refunds(&self.list("list refunds", "refunds", after, limit).await?)
    }

    async fn list(
        &self,
        operation: &'static str,
        collection: &str,
        after: Option<&str>,
        limit: u16,
    ) -> Result<http::Answer, CallError> {
        let limit = limit.clamp(1, MAX_PAGE).to_string();
        let mut params = vec![("limit", limit.as_str())];
        params.extend(after.map(|after| ("starting_after", after)));
        let call = Call {
            operation,
            path: &[collection],
            params: &params,
            key: None,
        };
        self.call(call).await
    }

    async fn call(&self, call: Call<'_>) -> Result<http::Answer, CallError> {
        self.http.call(call).await.map_err(CallError::Unknown)
    }
}
