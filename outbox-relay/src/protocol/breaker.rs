//! Tells poison from an outage: when much fails at once, nothing is frozen, and everything waits.

use std::time::{Duration, Instant};

/// Why a record cannot be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The record itself: too large, no topic that could be, a version that is not its turn.
    Record,
    /// What is around it: no such topic, not allowed. Many of these at once, and it is not about the records.
    Surroundings,
}

/// Entities frozen because of their surroundings within [`WINDOW`], beyond which it is an outage.
const SURROUNDINGS_LIMIT: usize = 20;
/// Entities frozen because of themselves before the share of them counts.
const RECORD_LIMIT: usize = 20;
/// One record of so many may be the first bad one of its entity.
const RECORD_SHARE: usize = 5;
/// Records over which that share is taken.
const SAMPLE: usize = 1_000;
const WINDOW: Duration = Duration::from_secs(60);

/// Decides whether an entity may be frozen. Time and records come in from outside.
#[derive(Debug, Default)]
pub struct Breaker {
    /// When entities were frozen because of their surroundings.
    surroundings: Vec<Instant>,
    /// Records seen in this sample, and entities frozen because of themselves.
    seen: usize,
    records: usize,
    open: bool,
}

impl Breaker {
    /// A record of an entity that is not frozen was looked at.
    pub fn saw(&mut self) {
        self.seen += 1;
        if self.seen >= SAMPLE {
            (self.seen, self.records) = (0, 0);
        }
    }

    /// Whether this entity may be frozen; otherwise it is an outage, until [`close`](Self::close).
    pub fn may_freeze(&mut self, cause: Cause, now: Instant) -> bool {
        if self.open {
            return false;
        }
        match cause {
            Cause::Surroundings => {
                self.surroundings
                    .retain(|at| now.saturating_duration_since(*at) < WINDOW);
                self.surroundings.push(now);
                self.open = self.surroundings.len() > SURROUNDINGS_LIMIT;
            }
            Cause::Record => {
                self.records += 1;
                self.open = self.records > RECORD_LIMIT && self.records * RECORD_SHARE > self.seen;
            }
        }
        !self.open
    }

    /// Records go through again.
    pub fn close(&mut self) {
        if self.open {
            *self = Self::default();
        }
    }

    pub fn is_open(&self) -> bool {
        self.open
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_are_frozen_and_many_at_once_are_an_outage() {
        let mut breaker = Breaker::default();
        let start = Instant::now();
        for n in 0..SURROUNDINGS_LIMIT {
            assert!(breaker.may_freeze(Cause::Surroundings, start), "{n}");
        }
        assert!(!breaker.may_freeze(Cause::Surroundings, start));
        assert!(
            !breaker.may_freeze(Cause::Record, start + 2 * WINDOW),
            "nothing is given up in an outage"
        );
        breaker.close();
        assert!(breaker.may_freeze(Cause::Surroundings, start));
    }

    #[test]
    fn those_frozen_long_ago_do_not_count() {
        let mut breaker = Breaker::default();
        let start = Instant::now();
        for n in 0..200u32 {
            assert!(
                breaker.may_freeze(Cause::Surroundings, start + n * WINDOW / 10),
                "{n}"
            );
        }
    }

    #[test]
    fn one_entity_in_a_hundred_may_be_poisoned() {
        let mut breaker = Breaker::default();
        let now = Instant::now();
        for n in 0..100_000 {
            breaker.saw();
            if n % 100 == 0 {
                assert!(breaker.may_freeze(Cause::Record, now), "{n}");
            }
        }
    }

    #[test]
    fn most_of_all_entities_are_not_poison_but_a_mistake() {
        let mut breaker = Breaker::default();
        let now = Instant::now();
        let frozen = (0..100)
            .take_while(|_| {
                breaker.saw();
                breaker.may_freeze(Cause::Record, now)
            })
            .count();
        assert_eq!(frozen, RECORD_LIMIT);
        assert!(breaker.is_open());
    }
}
