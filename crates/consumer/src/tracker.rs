//! How far a partition is done, when its records finish in any order.

use std::collections::VecDeque;

/// The offsets of one assignment of one partition, from when they are read until all before them are done.
#[derive(Debug, Default)]
pub(crate) struct OffsetTracker {
    /// Ascending; holes in the offsets (compaction, transaction markers) are no entries.
    open: VecDeque<(i64, Progress)>,
    /// The highest offset that was read.
    last: Option<i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    UnderWay,
    Done,
}

impl OffsetTracker {
    /// Takes in an offset that was read; `false` for one that was read before.
    pub(crate) fn admit(&mut self, offset: i64) -> bool {
        if self.last.is_some_and(|last| offset <= last) {
            return false;
        }
        self.last = Some(offset);
        self.open.push_back((offset, Progress::UnderWay));
        true
    }

    /// Notes that the record at `offset` is done.
    pub(crate) fn complete(&mut self, offset: i64) {
        if let Ok(position) = self.open.binary_search_by_key(&offset, |(offset, _)| *offset) {
            self.open[position].1 = Progress::Done;
        }
    }

    /// Forgets what is done without a hole before it, and returns the offset to continue from after a crash, if it moved.
    pub(crate) fn advance(&mut self) -> Option<i64> {
        let mut next = None;
        while let Some(&(offset, Progress::Done)) = self.open.front() {
            self.open.pop_front();
            next = Some(offset + 1);
        }
        next
    }

    /// Takes note that the client has come to `position`, with nothing but what was read before it: transaction markers and records of
    /// aborted transactions are never delivered. Returns it when everything that was read is done, and it is further.
    pub(crate) fn pass(&mut self, position: i64) -> Option<i64> {
        let is_further = self.last.is_none_or(|last| position > last + 1);
        if !self.open.is_empty() || !is_further {
            return None;
        }
        self.last = Some(position - 1);
        Some(position)
    }

    /// How many offsets are held back: those under way, and those done behind one under way.
    pub(crate) fn len(&self) -> usize {
        self.open.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_low_mark_waits_for_the_oldest() {
        let mut tracker = OffsetTracker::default();
        for offset in [5, 6, 9] {
            assert!(tracker.admit(offset));
        }
        tracker.complete(6);
        assert_eq!(tracker.advance(), None);
        tracker.complete(5);
        assert_eq!(tracker.advance(), Some(7));
        assert_eq!(tracker.advance(), None, "nothing moved since");
        tracker.complete(9);
        assert_eq!(tracker.advance(), Some(10));
        assert_eq!(tracker.len(), 0);
    }

    #[test]
    fn what_was_read_before_is_not_taken_again() {
        let mut tracker = OffsetTracker::default();
        assert!(tracker.admit(3));
        assert!(!tracker.admit(3));
        assert!(!tracker.admit(2));
    }

    #[test]
    fn what_is_never_delivered_is_passed_when_nothing_before_it_is_open() {
        let mut tracker = OffsetTracker::default();
        assert_eq!(
            tracker.pass(2),
            Some(2),
            "records of an aborted transaction alone"
        );
        assert!(tracker.admit(5));
        assert_eq!(tracker.pass(7), None, "5 is under way");
        tracker.complete(5);
        assert_eq!(tracker.advance(), Some(6));
        assert_eq!(tracker.pass(6), None, "nothing but records");
        assert_eq!(tracker.pass(7), Some(7), "the marker behind them");
        assert_eq!(tracker.pass(7), None, "nothing moved since");
        assert!(tracker.admit(7));
    }

    #[test]
    fn an_offset_that_is_not_open_is_ignored() {
        let mut tracker = OffsetTracker::default();
        assert!(tracker.admit(3));
        tracker.complete(4);
        tracker.complete(2);
        assert_eq!(tracker.advance(), None);
    }

    proptest! {
        /// Whatever the order of completion, the mark is always the lowest offset that is not done, it only rises, and in
        /// the end it is past everything.
        #[test]
        fn the_low_mark_is_contiguous(
            steps in prop::collection::vec(1_i64..4, 1..60),
            order in prop::collection::vec(any::<prop::sample::Index>(), 60),
        ) {
            let mut tracker = OffsetTracker::default();
            let mut offset = 0;
            let mut open: Vec<i64> = steps.iter().map(|step| { offset += step; offset }).collect();
            for offset in &open {
                prop_assert!(tracker.admit(*offset));
            }
            let last = offset;
            let mut mark = 0;
            for pick in order {
                if open.is_empty() {
                    break;
                }
                tracker.complete(open.remove(pick.index(open.len())));
                if let Some(next) = tracker.advance() {
                    prop_assert!(next > mark);
                    mark = next;
                }
                prop_assert!(open.iter().all(|offset| *offset >= mark));
                // Nothing done is held back without a reason.
                prop_assert!(tracker.open.front().is_none_or(|(_, progress)| *progress == Progress::UnderWay));
            }
            if open.is_empty() {
                prop_assert_eq!(mark, last + 1);
            }
        }
    }
}
