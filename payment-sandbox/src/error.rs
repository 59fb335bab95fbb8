//! Errors as Stripe answers them. <https://docs.stripe.com/api/errors>

use serde_json::{Value, json};

use crate::model::{Intent, LastError};

/// A request that was not done.
#[derive(Debug)]
pub struct ApiError {
    pub status: u16,
    /// Inside `{"error": …}`.
    error: Value,
    /// Whether it is said again under the request's idempotency key. What was refused before anything began is not.
    pub kept: bool,
}

impl ApiError {
    /// A parameter is missing, unknown or of no use.
    pub fn invalid(code: &str, param: &str, message: &str) -> Self {
        Self::new(
            400,
            json!({
                "type": "invalid_request_error",
                "code": code,
                "param": param,
                "message": format!("{message} ({param})"),
            }),
        )
    }

    /// A parameter has a value that it cannot have.
    pub fn unusable(param: &str) -> Self {
        Self::invalid("parameter_invalid", param, "Invalid value.")
    }

    /// No such thing.
    pub fn missing(param: &str, id: &str) -> Self {
        Self::new(
            404,
            json!({
                "type": "invalid_request_error",
                "code": "resource_missing",
                "param": param,
                "message": format!("No such object: '{id}'"),
            }),
        )
    }

    /// The request makes no sense now.
    pub fn state(code: Option<&str>, message: &str, intent: Option<&Intent>) -> Self {
        let mut error = json!({ "type": "invalid_request_error", "message": message });
        if let Some(code) = code {
            error["code"] = code.into();
        }
        if let Some(intent) = intent {
            error["payment_intent"] = intent.show();
        }
        Self {
            kept: true,
            ..Self::new(400, error)
        }
    }

    /// An intent is not where it would have to be.
    pub fn unexpected_state(intent: &Intent, what: &str) -> Self {
        let message = format!(
            "You cannot {what} this PaymentIntent because it has a status of {}.",
            intent.status.name()
        );
        Self::state(Some("payment_intent_unexpected_state"), &message, Some(intent))
    }

    /// The bank said no.
    pub fn declined(last_error: &LastError, intent: &Intent) -> Self {
        let mut error = last_error.show();
        error["payment_intent"] = intent.show();
        Self {
            kept: true,
            ..Self::new(402, error)
        }
    }

    /// No card can be like this.
    pub fn bad_card(code: &str, param: &str) -> Self {
        Self::new(
            402,
            json!({ "type": "card_error", "code": code, "param": param, "message": "Your card is invalid." }),
        )
    }

    /// The provider's own fault.
    pub fn internal() -> Self {
        Self {
            kept: true,
            ..Self::new(
                500,
                json!({ "type": "api_error", "message": "An unknown error occurred." }),
            )
        }
    }

    pub fn unauthorized() -> Self {
        Self::new(
            401,
            json!({ "type": "invalid_request_error", "message": "Invalid API Key provided." }),
        )
    }

    /// Another request under the same idempotency key is under way.
    pub fn key_in_use() -> Self {
        Self::new(
            409,
            json!({
                "type": "idempotency_error",
                "code": "idempotency_key_in_use",
                "message": "There is currently another in-progress request using this Idempotency Key.",
            }),
        )
    }

    /// The idempotency key belongs to another request.
    pub fn key_reused() -> Self {
        Self::new(
            400,
            json!({
                "type": "idempotency_error",
                "message": "Keys for idempotent requests can only be used with the same parameters they were first used with.",
            }),
        )
    }

    /// The request did not come in whole, or is too large.
    pub fn bad_body(status: u16) -> Self {
        Self::new(
            status,
            json!({ "type": "invalid_request_error", "message": "The request could not be read." }),
        )
    }

    pub fn no_such_endpoint() -> Self {
        Self::new(
            404,
            json!({ "type": "invalid_request_error", "message": "Unrecognized request URL." }),
        )
    }

    fn new(status: u16, error: Value) -> Self {
        Self {
            status,
            error,
            kept: false,
        }
    }

    pub fn body(&self) -> Value {
        json!({ "error": self.error })
    }
}
