//! What the provider's answers mean: whether something was done, was not done, or may have been.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::http::Answer;
use super::{
    CallError, Decline, DeclineReason, Intent, IntentId, IntentState, Method, MethodToken, Page, Refund,
    RefundId, RefundStatus, UnknownOutcome, amount,
};

#[derive(Deserialize)]
struct IntentJson {
    id: String,
    status: String,
    amount: i64,
    currency: String,
    #[serde(default)]
    metadata: HashMap<String, String>,
    created: i64,
    last_payment_error: Option<ErrorJson>,
}

#[derive(Deserialize)]
struct RefundJson {
    id: String,
    /// Absent in older versions of the API for refunds that need nothing.
    status: Option<String>,
    amount: i64,
    currency: String,
    payment_intent: Option<String>,
    metadata: Option<HashMap<String, String>>,
    created: i64,
}

#[derive(Deserialize)]
struct MethodJson {
    id: String,
    card: CardJson,
}

#[derive(Deserialize)]
struct CardJson {
    brand: String,
    last4: String,
    exp_month: u8,
    exp_year: u16,
}

#[derive(Deserialize)]
struct ListJson<T> {
    data: Vec<T>,
    has_more: bool,
}

#[derive(Deserialize)]
struct ErrorBody {
    error: ErrorJson,
}

#[derive(Deserialize)]
struct ErrorJson {
    #[serde(rename = "type")]
    kind: String,
    code: Option<String>,
    decline_code: Option<String>,
    /// Of a version of its own: understood when it can be.
    payment_intent: Option<serde_json::Value>,
}

impl ErrorJson {
    fn decline(&self) -> Decline {
        let code = self.code.as_deref().unwrap_or(&self.kind);
        decline(self.decline_code.as_deref().unwrap_or(code))
    }
}

/// What a code or decline code means. <https://docs.stripe.com/declines/codes>, <https://docs.stripe.com/error-codes>
fn decline(code: &str) -> Decline {
    let (reason, another_try) = match code {
        "fraudulent" | "highest_risk_level" | "lost_card" | "merchant_blacklist" | "pickup_card"
        | "stolen_card" => (DeclineReason::CardBlocked, false),
        "insufficient_funds" => (DeclineReason::InsufficientFunds, true),
        "expired_card" => (DeclineReason::ExpiredCard, true),
        "incorrect_address"
        | "incorrect_cvc"
        | "incorrect_number"
        | "incorrect_zip"
        | "invalid_account"
        | "invalid_cvc"
        | "invalid_expiry_month"
        | "invalid_expiry_year"
        | "invalid_number" => (DeclineReason::IncorrectCardDetails, true),
        "authentication_not_handled"
        | "authentication_required"
        | "payment_intent_authentication_failure" => (DeclineReason::AuthenticationRequired, true),
        // Another card may do.
        "card_not_supported" | "currency_not_supported" => (DeclineReason::NotSupported, true),
        AMOUNT_NOT_SUPPORTED | "amount_too_large" | "amount_too_small" => {
            (DeclineReason::NotSupported, false)
        }
        // Refused for reasons that lie with us: not the customer's last word.
        "invalid_request_error"
        | "parameter_invalid"
        | "parameter_invalid_integer"
        | "parameter_missing"
        | "parameter_unknown" => (DeclineReason::NotSupported, true),
        _ => (DeclineReason::Declined, true),
    };
    Decline { reason, another_try }
}

/// The longest code that is kept, in characters; it is logged.
const MAX_CODE: usize = 64;

const AMOUNT_NOT_SUPPORTED: &str = "amount_not_supported";

/// An amount that the provider cannot take; it was not asked.
pub(super) fn amount_not_supported() -> CallError {
    CallError::Refused {
        code: AMOUNT_NOT_SUPPORTED.to_owned(),
        decline: decline(AMOUNT_NOT_SUPPORTED),
    }
}

pub(super) fn method(answer: &Answer) -> Result<Method, CallError> {
    let MethodJson { id, card } = done(answer)?;
    Ok(Method {
        id: MethodToken::new(id),
        brand: card.brand,
        last_four: card.last4,
        expiry_month: card.exp_month,
        expiry_year: card.exp_year,
    })
}

/// An intent that was just made.
pub(super) fn new_intent(answer: &Answer) -> Result<Intent, CallError> {
    intent_of(answer, done(answer)?)
}

/// The intent that was asked about.
pub(super) fn intent(answer: &Answer, asked: &IntentId) -> Result<Intent, CallError> {
    is_asked(answer, new_intent(answer)?, asked)
}

/// The intent that something was to be done with. A refusal that shows the intent tells where it stands, which is an answer.
pub(super) fn changed_intent(answer: &Answer, asked: &IntentId) -> Result<Intent, CallError> {
    if matches!(answer.status, 400 | 402)
        && let Ok(ErrorBody { error }) = serde_json::from_slice::<ErrorBody>(&answer.body)
        && let Some(shown) = error.payment_intent.clone()
        && let Ok(shown) = serde_json::from_value(shown)
    {
        let mut intent = is_asked(answer, intent_of(answer, shown)?, asked)?;
        if intent.state == IntentState::RequiresPaymentMethod && answer.status == 402 {
            intent.state = IntentState::Declined(error.decline());
        }
        return Ok(intent);
    }
    intent(answer, asked)
}

pub(super) fn refund(answer: &Answer, asked: &IntentId) -> Result<Refund, CallError> {
    let refund = refund_of(answer, done(answer)?)?;
    if refund.intent.as_ref() == Some(asked) {
        Ok(refund)
    } else {
        Err(not_understood(answer, "it is about another intent"))
    }
}

pub(super) fn intents(answer: &Answer) -> Result<Page<Intent>, CallError> {
    page(answer, intent_of)
}

pub(super) fn refunds(answer: &Answer) -> Result<Page<Refund>, CallError> {
    page(answer, refund_of)
}

fn page<J: DeserializeOwned, T>(
    answer: &Answer,
    item: impl Fn(&Answer, J) -> Result<T, CallError>,
) -> Result<Page<T>, CallError> {
    let ListJson { data, has_more } = done(answer)?;
    let items = data.into_iter().map(|json| item(answer, json));
    Ok(Page {
        items: items.collect::<Result<_, _>>()?,
        has_more,
    })
}

fn is_asked(answer: &Answer, intent: Intent, asked: &IntentId) -> Result<Intent, CallError> {
    if intent.id == *asked {
        Ok(intent)
    } else {
        Err(not_understood(answer, "it is about another intent"))
    }
}

fn intent_of(answer: &Answer, json: IntentJson) -> Result<Intent, CallError> {
    let state = match (json.status.as_str(), &json.last_payment_error) {
        ("requires_confirmation", _) => IntentState::RequiresConfirmation,
        ("processing", _) => IntentState::Processing,
        ("succeeded", _) => IntentState::Succeeded,
        ("canceled", _) => IntentState::Canceled,
        ("requires_action", _) => IntentState::RequiresAction,
        ("requires_payment_method", Some(error)) => IntentState::Declined(error.decline()),
        ("requires_payment_method", None) => IntentState::RequiresPaymentMethod,
        _ => return Err(not_understood(answer, "the intent's status is not known here")),
    };
    let currency = json.currency.to_ascii_uppercase();
    Ok(Intent {
        id: IntentId::new(json.id),
        state,
        amount: amount_of(answer, json.amount, &currency)?,
        currency,
        payment_id: id_of(&json.metadata, "payment_id"),
        order_id: id_of(&json.metadata, "order_id"),
        created: time_of(answer, json.created)?,
    })
}

fn refund_of(answer: &Answer, json: RefundJson) -> Result<Refund, CallError> {
    let status = match json.status.as_deref() {
        Some("succeeded") => RefundStatus::Succeeded,
        Some("pending" | "requires_action") => RefundStatus::Pending,
        Some("failed" | "canceled") => RefundStatus::Failed,
        _ => return Err(not_understood(answer, "the refund's status is not known here")),
    };
    let currency = json.currency.to_ascii_uppercase();
    Ok(Refund {
        id: RefundId::new(json.id),
        intent: json.payment_intent.map(IntentId::new),
        amount: amount_of(answer, json.amount, &currency)?,
        currency,
        status,
        payment_id: id_of(&json.metadata.unwrap_or_default(), "payment_id"),
        created: time_of(answer, json.created)?,
    })
}

fn amount_of(answer: &Answer, amount: i64, currency: &str) -> Result<i64, CallError> {
    amount::from_provider(amount, currency).ok_or_else(|| not_understood(answer, "there is no such amount"))
}

fn time_of(answer: &Answer, seconds: i64) -> Result<DateTime<Utc>, CallError> {
    DateTime::from_timestamp(seconds, 0).ok_or_else(|| not_understood(answer, "there is no such time"))
}

fn id_of(metadata: &HashMap<String, String>, key: &str) -> Option<Uuid> {
    metadata.get(key)?.parse().ok()
}

/// What a call brought that was done.
fn done<T: DeserializeOwned>(answer: &Answer) -> Result<T, CallError> {
    if answer.status == 200 {
        return serde_json::from_slice(&answer.body)
            .map_err(|_| not_understood(answer, "it is not what was asked for"));
    }
    Err(failure(answer))
}

/// What an answer means that is not about something done. What is not known for certain to mean "not done" is unknown.
fn failure(answer: &Answer) -> CallError {
    let unknown = || {
        CallError::Unknown(UnknownOutcome::Status {
            status: answer.status,
            request_id: answer.request_id.clone(),
        })
    };
    match answer.status {
        401 | 403 => CallError::Unauthorized,
        400 | 402 | 404 => match serde_json::from_slice::<ErrorBody>(&answer.body) {
            Ok(ErrorBody { error }) if error.kind == "idempotency_error" => CallError::KeyReused,
            Ok(ErrorBody { error }) => CallError::Refused {
                decline: error.decline(),
                code: error.code.unwrap_or(error.kind).chars().take(MAX_CODE).collect(),
            },
            // Somebody in between said so, not the provider.
            Err(_) => unknown(),
        },
        _ => unknown(),
    }
}

fn not_understood(answer: &Answer, what: &'static str) -> CallError {
    CallError::Unknown(UnknownOutcome::NotUnderstood {
        status: answer.status,
        what,
        request_id: answer.request_id.clone(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn answer(status: u16, body: &Value) -> Answer {
        Answer {
            status,
            request_id: "req_1".to_owned(),
            body: body.to_string().into_bytes(),
        }
    }

    fn pi(status: &str) -> Value {
        json!({
            "id": "pi_1", "status": status, "amount": 500, "currency": "isk", "created": 1_700_000_000,
            "metadata": { "payment_id": "not one of ours" }, "last_payment_error": null,
        })
    }

    fn error(kind: &str, code: Option<&str>) -> Value {
        json!({ "error": { "type": kind, "code": code } })
    }

    #[test]
    fn states_of_intents() {
        let state =
            |status| intent(&answer(200, &pi(status)), &IntentId::new("pi_1")).map(|intent| intent.state);
        for (status, expected) in [
            ("requires_confirmation", IntentState::RequiresConfirmation),
            ("requires_payment_method", IntentState::RequiresPaymentMethod),
            ("requires_action", IntentState::RequiresAction),
            ("processing", IntentState::Processing),
            ("succeeded", IntentState::Succeeded),
            ("canceled", IntentState::Canceled),
        ] {
            assert_eq!(state(status).expect(status), expected);
        }
        assert!(matches!(state("requires_capture"), Err(CallError::Unknown(_))));
        let other = intent(&answer(200, &pi("succeeded")), &IntentId::new("pi_2"));
        assert!(matches!(other, Err(CallError::Unknown(_))), "{other:?}");
        let one = intent(&answer(200, &pi("succeeded")), &IntentId::new("pi_1")).expect("an intent");
        assert_eq!(
            (one.amount, one.currency.as_str(), one.payment_id),
            (5, "ISK", None)
        );
    }

    #[test]
    fn a_refusal_that_shows_the_intent_is_an_answer() {
        let id = IntentId::new("pi_1");
        let mut body = error("invalid_request_error", Some("payment_intent_unexpected_state"));
        body["error"]["payment_intent"] = pi("succeeded");
        let intent = changed_intent(&answer(400, &body), &id).expect("an intent");
        assert_eq!(intent.state, IntentState::Succeeded);
        body["error"]["payment_intent"]["id"] = "pi_2".into();
        let error = changed_intent(&answer(400, &body), &id).expect_err("another");
        assert!(matches!(error, CallError::Unknown(_)), "{error:?}");
    }

    #[test]
    fn a_decline_says_why() {
        for (code, reason, another_try) in [
            ("generic_decline", DeclineReason::Declined, true),
            ("a_code_of_next_year", DeclineReason::Declined, true),
            ("insufficient_funds", DeclineReason::InsufficientFunds, true),
            ("expired_card", DeclineReason::ExpiredCard, true),
            ("incorrect_cvc", DeclineReason::IncorrectCardDetails, true),
            ("incorrect_number", DeclineReason::IncorrectCardDetails, true),
            (
                "authentication_required",
                DeclineReason::AuthenticationRequired,
                true,
            ),
            ("currency_not_supported", DeclineReason::NotSupported, true),
            ("lost_card", DeclineReason::CardBlocked, false),
            ("stolen_card", DeclineReason::CardBlocked, false),
            ("pickup_card", DeclineReason::CardBlocked, false),
            ("fraudulent", DeclineReason::CardBlocked, false),
            ("highest_risk_level", DeclineReason::CardBlocked, false),
            ("amount_too_small", DeclineReason::NotSupported, false),
        ] {
            let expected = IntentState::Declined(Decline { reason, another_try });
            let why = json!({ "type": "card_error", "code": "card_declined", "decline_code": code });
            let mut shown = pi("requires_payment_method");
            shown["last_payment_error"] = why.clone();
            let id = IntentId::new("pi_1");
            assert_eq!(
                intent(&answer(200, &shown), &id).expect(code).state,
                expected,
                "{code}"
            );
            let mut error = json!({ "error": why });
            error["error"]["payment_intent"] = pi("requires_payment_method");
            let declined = changed_intent(&answer(402, &error), &id).expect(code);
            assert_eq!(declined.state, expected, "{code}");
        }
    }

    #[test]
    fn only_what_certainly_was_not_done_is_refused() {
        let of = |status, body: &Value| new_intent(&answer(status, body)).expect_err("no intent");
        let invalid = error("invalid_request_error", Some("resource_missing"));
        for status in [400, 402, 404] {
            let refused = of(status, &invalid);
            assert!(
                matches!(&refused, CallError::Refused { code, .. } if code == "resource_missing"),
                "{refused:?}"
            );
            let from_a_proxy = of(status, &json!("<html>"));
            assert!(matches!(from_a_proxy, CallError::Unknown(_)), "{from_a_proxy:?}");
        }
        for status in [201, 302, 408, 409, 413, 418, 424, 429, 500, 502, 503, 504] {
            let unknown = of(status, &invalid);
            assert!(matches!(unknown, CallError::Unknown(_)), "{status}: {unknown:?}");
        }
        for status in [401, 403] {
            assert!(matches!(of(status, &invalid), CallError::Unauthorized));
        }
        assert!(matches!(
            of(400, &error("idempotency_error", None)),
            CallError::KeyReused
        ));
        let without_code = of(400, &error("invalid_request_error", None));
        assert!(matches!(&without_code, CallError::Refused { code, .. } if code == "invalid_request_error"));
        let nonsense = of(200, &json!({ "object": "payment_intent" }));
        assert!(matches!(nonsense, CallError::Unknown(_)), "{nonsense:?}");
    }
}
