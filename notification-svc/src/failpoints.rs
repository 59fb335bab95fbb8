//! Where tests may end the process, in one place. Compiled to nothing without the feature `failpoints`.
//!
//! `FAILPOINTS="mail-taken=return"` in the environment aborts the process when it comes to that point; the crate `fail` has more actions.

/// What events tell is written, and not committed.
pub const EVENTS_BEFORE_COMMIT: &str = "events-before-commit";
/// A mail is "sending"; nothing of it was sent.
pub const MAIL_CLAIMED: &str = "mail-claimed";
/// The mail server has taken a mail, which is not recorded.
pub const MAIL_TAKEN: &str = "mail-taken";
/// A mail is "sent"; nobody has been told.
pub const OUTCOME_STORED: &str = "outcome-stored";

/// Every point.
pub const ALL: [&str; 4] = [EVENTS_BEFORE_COMMIT, MAIL_CLAIMED, MAIL_TAKEN, OUTCOME_STORED];

/// Comes to a point.
pub(crate) fn pass(point: &str) {
    fail::fail_point!(point, |_| std::process::abort());
    // Used by the macro alone.
    let _ = point;
}
