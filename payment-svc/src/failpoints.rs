//! Where tests may end the process, in one place. Compiled to nothing without the feature `failpoints`.
//!
//! `FAILPOINTS="payment-stored=return"` in the environment aborts the process when it comes to that point; the crate `fail`
//! has more actions.

/// A payment and the answer to its request are stored; nothing else has happened.
pub const PAYMENT_STORED: &str = "payment-stored";
/// Before the provider is asked to make a charge.
pub const BEFORE_CREATE: &str = "before-create";
/// The provider has made a charge, whose id is not stored.
pub const AFTER_CREATE: &str = "after-create";
/// The charge's id is stored; it is not confirmed.
pub const INTENT_STORED: &str = "intent-stored";
/// Before the provider is asked to take the money.
pub const BEFORE_CONFIRM: &str = "before-confirm";
/// The provider has answered, and its answer is not stored.
pub const AFTER_CONFIRM: &str = "after-confirm";
/// The outcome is stored, and nobody has been told.
pub const OUTCOME_STORED: &str = "outcome-stored";
/// A refund and the answer to its request are stored; nothing else has happened.
pub const REFUND_STORED: &str = "refund-stored";
/// Before the provider is asked to give the money back.
pub const BEFORE_REFUND: &str = "before-refund";
/// The provider has answered, and its answer is not stored.
pub const AFTER_REFUND: &str = "after-refund";
/// The refund's outcome is stored, and nobody has been told.
pub const REFUND_OUTCOME_STORED: &str = "refund-outcome-stored";
/// Events of orders are applied, and not committed.
pub const ORDERS_BEFORE_COMMIT: &str = "orders-before-commit";

/// Every point.
pub const ALL: [&str; 12] = [
    PAYMENT_STORED,
    BEFORE_CREATE,
    AFTER_CREATE,
    INTENT_STORED,
    BEFORE_CONFIRM,
    AFTER_CONFIRM,
    OUTCOME_STORED,
    REFUND_STORED,
    BEFORE_REFUND,
    AFTER_REFUND,
    REFUND_OUTCOME_STORED,
    ORDERS_BEFORE_COMMIT,
];

/// Comes to a point.
pub(crate) fn pass(point: &str) {
    fail::fail_point!(point, |_| std::process::abort());
    // Used by the macro alone.
    let _ = point;
}
