//! Times as PostgreSQL sends them.

use chrono::Utc;

/// Microseconds from the Unix epoch to PostgreSQL's, the first of January 2000.
const POSTGRES_EPOCH: i64 = 946_684_800_000_000;

/// Microseconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Micros(pub(crate) i64);

impl Micros {
    pub(crate) fn now() -> Self {
        Self(Utc::now().timestamp_micros())
    }

    /// From a `timestamptz`; `None` for the infinite ones.
    pub(crate) fn from_postgres(micros: i64) -> Option<Self> {
        match micros {
            i64::MIN | i64::MAX => None,
            _ => micros.checked_add(POSTGRES_EPOCH).map(Self),
        }
    }

    /// Seconds from `earlier` to here; 0 when it is later.
    pub(crate) fn seconds_since(self, earlier: Self) -> f64 {
        self.0.saturating_sub(earlier.0).max(0) as f64 / 1e6
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn infinite_times_are_none() {
        assert_eq!(Micros::from_postgres(i64::MAX), None);
        assert_eq!(Micros::from_postgres(i64::MIN), None);
        assert_eq!(Micros::from_postgres(0), Some(Micros(POSTGRES_EPOCH)));
        assert_eq!(Micros(5).seconds_since(Micros(9)), 0.0);
    }
}
