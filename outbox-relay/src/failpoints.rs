//! Where tests may end the process, in one place. Compiled to nothing without the feature `failpoints`.
//!
//! `FAILPOINTS="after-fetch=return"` in the environment aborts the process when it comes to that point; the crate `fail`
//! has more actions, such as `3%return` and `100*off->return`.

/// Rows are read, and none of them is handed over.
pub const AFTER_FETCH: &str = "after-fetch";
/// A record is handed over to the producer.
pub const AFTER_HAND_OVER: &str = "after-hand-over";
/// Kafka has acknowledged records, and nothing of it is saved.
pub const BEFORE_SAVE: &str = "before-save";
/// Progress is saved, and this process has not noted it.
pub const AFTER_SAVE: &str = "after-save";
/// Open writers are listed, and the fence waits for them.
pub const IN_FENCE: &str = "in-fence";
/// Holes are closed, and it is not saved.
pub const FENCE_PASSED: &str = "fence-passed";
/// A record is to be parked, and it is not saved.
pub const PARKED: &str = "parked";
/// A record of the quarantine is published, and is still in it.
pub const RELEASED: &str = "released";
/// Some published rows are removed, and others of the same round are not.
pub const IN_REMOVAL: &str = "in-removal";
/// The lease is taken, and nothing is read.
pub const LEASE_TAKEN: &str = "lease-taken";

/// Every point.
pub const ALL: [&str; 10] = [
    AFTER_FETCH,
    AFTER_HAND_OVER,
    BEFORE_SAVE,
    AFTER_SAVE,
    IN_FENCE,
    FENCE_PASSED,
    PARKED,
    RELEASED,
    IN_REMOVAL,
    LEASE_TAKEN,
];

/// Comes to a point.
pub(crate) fn pass(point: &str) {
    fail::fail_point!(point, |_| std::process::abort());
    // Used by the macro alone.
    let _ = point;
}
