//! A set of ids kept as disjoint ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of `i64`, stored as disjoint, non-adjacent half-open ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// Start of a range to its exclusive end.
    ranges: BTreeMap<i64, i64>,
}

impl RangeSet {
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// How many ranges, not how many ids.
    pub fn range_count(&self) -> usize {
        self.ranges.len()
    }

    /// How many ids.
    pub fn id_count(&self) -> i64 {
        self.iter().map(|range| range.end - range.start).sum()
    }

    pub fn first(&self) -> Option<i64> {
        self.ranges.first_key_value().map(|(start, _)| *start)
    }

    pub fn last(&self) -> Option<i64> {
        self.ranges.last_key_value().map(|(_, end)| end - 1)
    }

    pub fn iter(&self) -> impl Iterator<Item = Range<i64>> + '_ {
        self.ranges.iter().map(|(start, end)| *start..*end)
    }

    pub fn contains(&self, id: i64) -> bool {
        self.ranges
            .range(..=id)
            .next_back()
            .is_some_and(|(_, end)| id < *end)
    }

    /// Whether every id of `other` is in.
    pub fn covers(&self, other: &Self) -> bool {
        other.iter().all(|range| {
            let around = self.ranges.range(..=range.start).next_back();
            around.is_some_and(|(_, end)| range.end <= *end)
        })
    }

    /// Adds a range; ids that are in already stay in.
    pub fn insert(&mut self, range: Range<i64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        if let Some((before, before_end)) = self.ranges.range(..=start).next_back().map(|(s, e)| (*s, *e))
            && before_end >= start
        {
            if before_end >= end {
                return;
            }
            start = before;
        }
        while let Some((after, after_end)) = self.ranges.range(start..=end).next().map(|(s, e)| (*s, *e)) {
            self.ranges.remove(&after);
            end = end.max(after_end);
        }
        self.ranges.insert(start, end);
    }

    /// Removes a range; ids that are not in stay out.
    pub fn remove(&mut self, range: Range<i64>) {
        if range.is_empty() {
            return;
        }
        if let Some((start, end)) = self
            .ranges
            .range(..range.start)
            .next_back()
            .map(|(s, e)| (*s, *e))
            && end > range.start
        {
            self.ranges.insert(start, range.start);
            if end > range.end {
                self.ranges.insert(range.end, end);
                return;
            }
        }
        while let Some((start, end)) = self.ranges.range(range.clone()).next().map(|(s, e)| (*s, *e)) {
            self.ranges.remove(&start);
            if end > range.end {
                self.ranges.insert(range.end, end);
            }
        }
    }

    /// Takes out the range that starts at `id`, if one does, and returns its exclusive end.
    pub fn take_from(&mut self, id: i64) -> Option<i64> {
        self.ranges.remove(&id)
    }

    /// The ids of `within` that are not in the set.
    pub fn gaps(&self, within: Range<i64>) -> RangeSet {
        let mut gaps = RangeSet::default();
        gaps.insert(within.clone());
        for range in self.iter().take_while(|range| range.start < within.end) {
            gaps.remove(range);
        }
        gaps
    }
}

impl FromIterator<Range<i64>> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Range<i64>>>(ranges: I) -> Self {
        let mut set = Self::default();
        for range in ranges {
            set.insert(range);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn ids(set: &RangeSet) -> BTreeSet<i64> {
        set.iter().flatten().collect()
    }

    proptest! {
        /// Against the obvious set, after every step; and ranges stay disjoint and apart.
        #[test]
        fn behaves_like_a_set(steps in prop::collection::vec((any::<bool>(), 0i64..60, 0i64..12), 0..60)) {
            let mut set = RangeSet::default();
            let mut model = BTreeSet::new();
            for (add, start, len) in steps {
                if add {
                    set.insert(start..start + len);
                    model.extend(start..start + len);
                } else {
                    set.remove(start..start + len);
                    model.retain(|id| !(start..start + len).contains(id));
                }
                prop_assert_eq!(ids(&set), model.clone());
                prop_assert_eq!(set.id_count(), model.len() as i64);
                prop_assert_eq!(set.first(), model.first().copied());
                prop_assert_eq!(set.last(), model.last().copied());
                for id in -1..75 {
                    prop_assert_eq!(set.contains(id), model.contains(&id));
                }
                let ranges: Vec<_> = set.iter().collect();
                prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
                let other: RangeSet = [10..12, 20..21].into_iter().collect();
                prop_assert_eq!(set.covers(&other), [10, 11, 20].iter().all(|id| model.contains(id)));
                let gaps: BTreeSet<i64> = (5..50).filter(|id| !model.contains(id)).collect();
                prop_assert_eq!(ids(&set.gaps(5..50)), gaps);
            }
        }
    }
}
