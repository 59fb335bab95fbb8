//! gRPC statuses with details: always an `ErrorInfo`, and more where it fits (AIP-193).

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Who an error's reason belongs to, for example `order.shop`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Domain(pub &'static str);

impl Domain {
    /// A status with `ErrorInfo { reason, domain }`; `reason` is UPPER_SNAKE_CASE and stable, `message` is for people.
    /// Neither may hold values that the caller sent.
    pub fn status(self, code: Code, reason: &'static str, message: impl Into<String>) -> StatusBuilder {
        let details = ErrorDetails::with_error_info(reason, self.0, HashMap::new());
        StatusBuilder {
            code,
            message: message.into(),
            details,
        }
    }

    /// INVALID_ARGUMENT with the fields that are wrong.
    pub fn invalid_argument(self, violations: &[Violation]) -> Status {
        let fields: Vec<&str> = violations
            .iter()
            .map(|violation| violation.field.as_str())
            .collect();
        let mut builder = self.status(
            Code::InvalidArgument,
            "INVALID_REQUEST",
            format!("invalid: {}", fields.join(", ")),
        );
        for Violation { field, description } in violations {
            builder.details.add_bad_request_violation(field, *description);
        }
        builder.build()
    }
}

/// A field of a request that is wrong, and why. The value itself is not part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Path from the request: `items[3].quantity`.
    pub field: String,
    pub description: &'static str,
}

impl Violation {
    pub fn new(field: impl Into<String>, description: &'static str) -> Self {
        Self {
            field: field.into(),
            description,
        }
    }
}

/// A status under construction.
#[derive(Debug)]
#[must_use]
pub struct StatusBuilder {
    code: Code,
    message: String,
    details: ErrorDetails,
}

impl StatusBuilder {
    /// Adds what must change before the call can succeed: its type, on what, and how.
    pub fn precondition(mut self, kind: &'static str, subject: &str, description: &str) -> Self {
        self.details
            .add_precondition_failure_violation(kind, subject, description);
        self
    }

    /// Tells the client when to try again.
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.details.set_retry_info(Some(delay));
        self
    }

    /// The status.
    pub fn build(self) -> Status {
        Status::with_error_details(self.code, self.message, self.details)
    }
}

/// What every service answers when something it needs is away.
pub const RETRY_DELAY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: Domain = Domain("test.shop");

    #[test]
    fn details_are_readable_by_clients() {
        let status = DOMAIN
            .status(Code::FailedPrecondition, "ORDER_SHIPPED", "too late")
            .precondition("STATUS", "order", "it has been shipped")
            .build();
        let details = status.get_error_details();
        let info = details.error_info().expect("always");
        assert_eq!(
            (info.reason.as_str(), info.domain.as_str()),
            ("ORDER_SHIPPED", "test.shop")
        );
        assert_eq!(details.precondition_failure().expect("added").violations.len(), 1);
    }

    #[test]
    fn every_violation_is_named() {
        let violations = [
            Violation::new("user_id", "must be a UUID"),
            Violation::new("items[0]", "no"),
        ];
        let status = DOMAIN.invalid_argument(&violations);
        assert_eq!(status.message(), "invalid: user_id, items[0]");
        assert_eq!(
            status
                .get_details_bad_request()
                .expect("added")
                .field_violations
                .len(),
            2
        );
    }
}
