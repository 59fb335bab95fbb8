//! What is kept, and how Stripe shows it. No card number and no CVC is in any of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::card::{Behaviour, Refusal};

/// Keys and values of the caller's.
pub type Metadata = BTreeMap<String, String>;

/// A card that the sandbox keeps.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Method {
    pub id: String,
    pub brand: String,
    pub last_four: String,
    pub expiry_month: u8,
    pub expiry_year: u16,
    pub behaviour: Behaviour,
    pub created: u64,
}

impl Method {
    pub fn show(&self) -> Value {
        json!({
            "id": self.id,
            "object": "payment_method",
            "type": "card",
            "card": {
                "brand": self.brand,
                "last4": self.last_four,
                "exp_month": self.expiry_month,
                "exp_year": self.expiry_year,
            },
            "created": self.created,
            "customer": null,
            "livemode": false,
            "metadata": {},
        })
    }
}

/// Where an intent stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    RequiresPaymentMethod,
    RequiresConfirmation,
    RequiresAction,
    Processing,
    Succeeded,
    Canceled,
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Self::RequiresPaymentMethod => "requires_payment_method",
            Self::RequiresConfirmation => "requires_confirmation",
            Self::RequiresAction => "requires_action",
            Self::Processing => "processing",
            Self::Succeeded => "succeeded",
            Self::Canceled => "canceled",
        }
    }
}

/// The last refusal, and the method that was refused.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LastError {
    pub refusal: Refusal,
    pub method: Method,
}

impl LastError {
    pub fn show(&self) -> Value {
        let (code, decline_code, message) = self.refusal.codes();
        json!({
            "type": "card_error",
            "code": code,
            "decline_code": decline_code,
            "message": message,
            "payment_method": self.method.show(),
        })
    }
}

/// An intent to charge.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Intent {
    pub id: String,
    pub amount: u64,
    pub currency: String,
    pub status: Status,
    pub method: Option<String>,
    pub metadata: Metadata,
    pub created: u64,
    pub canceled: Option<u64>,
    pub charge: Option<String>,
    pub last_error: Option<LastError>,
    pub refunds: Vec<String>,
    /// Whether the fault of its card when paying has struck.
    pub pay_struck: bool,
    /// Whether the fault of its card when refunding has struck.
    pub refund_struck: bool,
}

impl Intent {
    pub fn show(&self) -> Value {
        let received = if self.charge.is_some() { self.amount } else { 0 };
        json!({
            "id": self.id,
            "object": "payment_intent",
            "amount": self.amount,
            "amount_received": received,
            "canceled_at": self.canceled,
            "capture_method": "automatic",
            "created": self.created,
            "currency": self.currency,
            "last_payment_error": self.last_error.as_ref().map(LastError::show),
            "latest_charge": self.charge,
            "livemode": false,
            "metadata": self.metadata,
            "payment_method": self.method,
            "payment_method_types": ["card"],
            "status": self.status.name(),
        })
    }
}

/// Money taken. Refused attempts leave none.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Charge {
    pub id: String,
    pub intent: String,
    pub method: String,
    pub amount: u64,
    pub refunded: u64,
    pub currency: String,
    pub metadata: Metadata,
    pub created: u64,
}

impl Charge {
    pub fn show(&self) -> Value {
        json!({
            "id": self.id,
            "object": "charge",
            "amount": self.amount,
            "amount_captured": self.amount,
            "amount_refunded": self.refunded,
            "captured": true,
            "created": self.created,
            "currency": self.currency,
            "livemode": false,
            "metadata": self.metadata,
            "paid": true,
            "payment_intent": self.intent,
            "payment_method": self.method,
            "refunded": self.refunded == self.amount,
            "status": "succeeded",
        })
    }

    /// As the ledger has it: `payment_id` and `order_id` are the caller's metadata.
    pub fn entry(&self) -> Value {
        json!({
            "id": self.id,
            "payment_intent": self.intent,
            "amount": self.amount,
            "currency": self.currency,
            "created": self.created,
            "payment_id": self.metadata.get("payment_id"),
            "order_id": self.metadata.get("order_id"),
        })
    }
}

/// Where a refund stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefundStatus {
    Pending,
    Succeeded,
    Failed,
}

/// Money given back, or on its way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refund {
    pub id: String,
    pub intent: String,
    pub charge: String,
    pub amount: u64,
    pub currency: String,
    pub status: RefundStatus,
    pub metadata: Metadata,
    /// The charge's metadata, for the ledger.
    pub charge_metadata: Metadata,
    pub created: u64,
}

impl Refund {
    pub fn show(&self) -> Value {
        let mut shown = json!({
            "id": self.id,
            "object": "refund",
            "amount": self.amount,
            "charge": self.charge,
            "created": self.created,
            "currency": self.currency,
            "metadata": self.metadata,
            "payment_intent": self.intent,
            "reason": null,
            "status": self.status,
        });
        if self.status == RefundStatus::Failed {
            shown["failure_reason"] = "declined".into();
        }
        shown
    }

    /// As the ledger has it: `payment_id` and `order_id` are those of the charge.
    pub fn entry(&self) -> Value {
        json!({
            "id": self.id,
            "charge": self.charge,
            "payment_intent": self.intent,
            "amount": self.amount,
            "currency": self.currency,
            "status": self.status,
            "created": self.created,
            "payment_id": self.charge_metadata.get("payment_id"),
            "order_id": self.charge_metadata.get("order_id"),
        })
    }
}

/// What a request was answered, to be said again under its idempotency key.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answer {
    /// Of the request that it answers.
    pub fingerprint: String,
    pub status: u16,
    pub body: Value,
}
