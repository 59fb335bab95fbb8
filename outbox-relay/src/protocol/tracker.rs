//! What one reader of an outbox knows: head, holes, fence and floor.
//!
//! Ids are given before rows commit, so a row can turn up below ids that were read long ago. The reader therefore keeps
//! the highest id it has seen (the *head*) and the ids below it that it has not (the *holes*), and asks for both in one
//! statement. A hole closes when its row turns up, or when the *fence* shows that it never can: every transaction that
//! could own it was listed after the head was seen, all of them have ended, and a later read did not find the row.
//! Every id up to the *floor* is published or dead.

use std::collections::HashSet;
use std::hash::Hash;

use super::RangeSet;

/// What is saved, and what a reader resumes from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Every id up to here is published or dead.
    pub floor: i64,
    /// Ids above the floor that are published or dead.
    pub published: RangeSet,
}

/// How a read went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// The read stopped at its limit: there may be more rows after its last.
    pub full: bool,
    /// Id of the last row; `None` when there was no row.
    pub last_id: Option<i64>,
}

/// Which rows were seen, and by this what a read must ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    head: i64,
    /// In (floor, head], never seen.
    holes: RangeSet,
}

impl Seen {
    /// The highest id that was seen.
    pub fn head(&self) -> i64 {
        self.head
    }

    /// The ids below the head that a read must ask for.
    pub fn holes(&self) -> &RangeSet {
        &self.holes
    }

    /// Whether the row is new.
    pub fn is_new(&self, id: i64) -> bool {
        id > self.head || self.holes.contains(id)
    }

    /// Whether a read that asked for what was missing here brings all that is missing there. It may have asked for ids
    /// that are dead by now.
    pub fn serves(&self, other: &Self) -> bool {
        self.head == other.head && self.holes.covers(&other.holes)
    }

    /// These ids are dead: no read need ask for them.
    pub fn give_up(&mut self, dead: &RangeSet) {
        for range in dead.iter() {
            self.holes.remove(range);
        }
    }

    /// Whether the row is new, and notes it as seen. Rows must come in the order of their ids, from one statement that
    /// asked for all holes and for everything above the head.
    pub fn observe(&mut self, id: i64) -> bool {
        if id > self.head {
            self.holes.insert(self.head + 1..id);
            self.head = id;
            true
        } else if self.holes.contains(id) {
            self.holes.remove(id..id + 1);
            true
        } else {
            false
        }
    }
}

/// The reader's knowledge of one outbox. `T` identifies a transaction.
#[derive(Debug)]
pub struct Tracker<T> {
    floor: i64,
    /// Above the floor, published or dead.
    done: RangeSet,
    seen: Seen,
    fence: Option<Fence<T>>,
    /// How many fences there were.
    fences: u64,
}

#[derive(Debug)]
struct Fence<T> {
    /// The head when the transactions were first listed.
    head: i64,
    /// Transactions of the first listing that every later one still had.
    open: HashSet<T>,
}

impl<T: Eq + Hash> Tracker<T> {
    /// Starts from saved progress. What is neither below the floor nor published counts as unseen.
    pub fn resume(progress: Progress) -> Self {
        let Progress { floor, published } = progress;
        let head = published.last().unwrap_or(floor).max(floor);
        let holes = published.gaps(floor + 1..head + 1);
        let mut tracker = Self {
            floor,
            done: published,
            seen: Seen { head, holes },
            fence: None,
            fences: 0,
        };
        tracker.done.remove(i64::MIN..floor + 1);
        tracker.advance_floor();
        tracker
    }

    pub fn floor(&self) -> i64 {
        self.floor
    }

    pub fn seen(&self) -> &Seen {
        &self.seen
    }

    pub fn head(&self) -> i64 {
        self.seen.head
    }

    /// The ids below the head that a read must ask for.
    pub fn holes(&self) -> &RangeSet {
        &self.seen.holes
    }

    /// How many rows were seen and are not done with.
    pub fn unfinished(&self) -> i64 {
        self.seen.head - self.floor - self.done.id_count() - self.seen.holes.id_count()
    }

    /// The lowest id that was seen and is not done with; the one above the head when there is none.
    pub fn first_open(&self) -> i64 {
        let mut settled = self.done.clone();
        for range in self.seen.holes.iter() {
            settled.insert(range);
        }
        settled
            .gaps(self.floor + 1..self.seen.head + 1)
            .first()
            .unwrap_or(self.seen.head + 1)
    }

    /// Whether the row is new.
    pub fn is_new(&self, id: i64) -> bool {
        self.seen.is_new(id)
    }

    /// Whether a row below `id` may still turn up. `in_passed_fence`: the row was read after the fence was passed, so that
    /// no more can turn up below the fence's head but what this very read brought.
    pub fn may_turn_up_below(&self, id: i64, in_passed_fence: bool) -> bool {
        let settled = match &self.fence {
            Some(fence) if in_passed_fence => fence.head,
            _ => i64::MIN,
        };
        self.seen
            .holes
            .iter()
            .any(|range| range.start.max(settled.saturating_add(1)) < range.end.min(id))
    }

    /// As [`Seen::observe`].
    pub fn observe(&mut self, id: i64) -> bool {
        self.seen.observe(id)
    }

    /// The sequence has given this id, and maybe nobody will ever commit a row with it. Ids above the head that rolled
    /// back become holes, so that an idle outbox comes to rest with nothing left over. Whoever owns the id holds the
    /// sequence's lock already, so a listing made from now on shows him.
    pub fn given(&mut self, id: i64) {
        let Seen { head, holes } = &mut self.seen;
        if id > *head {
            holes.insert(*head + 1..id + 1);
            *head = id;
        }
    }

    /// The row is done with: Kafka has acknowledged it, or it is kept elsewhere.
    pub fn published(&mut self, id: i64) {
        self.all_published(&mut [id]);
    }

    /// The same for many at once, which is much cheaper where they are neighbours. They come back sorted.
    pub fn all_published(&mut self, ids: &mut [i64]) {
        ids.sort_unstable();
        for run in ids.chunk_by(|id, next| *next == id + 1) {
            if let (Some(first), Some(last)) = (run.first(), run.last())
                && *last > self.floor
            {
                self.done.insert(*first.max(&(self.floor + 1))..last + 1);
            }
        }
        self.advance_floor();
    }

    /// Whether the transactions should be listed now: there are holes, and no fence waits for a read.
    pub fn wants_listing(&self) -> bool {
        match &self.fence {
            None => !self.seen.holes.is_empty(),
            Some(fence) => !fence.open.is_empty(),
        }
    }

    /// Takes a listing of every transaction that may hold an id that it has not committed. The listing must have been
    /// made after the last row was observed. The first one starts a fence at the head.
    pub fn list(&mut self, transactions: impl IntoIterator<Item = T>) {
        let listed: HashSet<T> = transactions.into_iter().collect();
        match &mut self.fence {
            None => {
                self.fences += 1;
                self.fence = Some(Fence {
                    head: self.seen.head,
                    open: listed,
                })
            }
            Some(fence) => fence.open.retain(|transaction| listed.contains(transaction)),
        }
    }

    /// Whether a read that starts now may end the fence: every transaction it waited for has ended.
    pub fn fence_is_passed(&self) -> bool {
        self.passed_fence().is_some()
    }

    /// The number of the fence, once it is passed: reads are told apart by it from those that began too early.
    pub fn passed_fence(&self) -> Option<u64> {
        let fence = self.fence.as_ref()?;
        fence.open.is_empty().then_some(self.fences)
    }

    /// Ends the fence after a read that began when [`Tracker::fence_is_passed`] and whose rows have been observed:
    /// holes up to the fence's head are dead, provided that the read got that far. Returns the ids that died.
    pub fn end_fence(&mut self, read: Read) -> RangeSet {
        let reached = |head: i64| !read.full || read.last_id.is_some_and(|id| id >= head);
        let Some(fence) = self
            .fence
            .take_if(|fence| fence.open.is_empty() && reached(fence.head))
        else {
            return RangeSet::default();
        };
        let mut dead = self.seen.holes.clone();
        dead.remove(fence.head + 1..i64::MAX);
        for range in dead.iter() {
            self.seen.holes.remove(range.clone());
            self.done.insert(range);
        }
        self.advance_floor();
        dead
    }

    /// What to save: at most `max_ranges` ranges, the lowest; what is left out would be published again after a crash.
    pub fn progress(&self, max_ranges: usize) -> Progress {
        Progress {
            floor: self.floor,
            published: self.done.iter().take(max_ranges).collect(),
        }
    }

    fn advance_floor(&mut self) {
        if let Some(end) = self.done.take_from(self.floor + 1) {
            self.floor = end - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tracker() -> Tracker<u32> {
        Tracker::resume(Progress::default())
    }

    fn holes(tracker: &Tracker<u32>) -> Vec<i64> {
        tracker.holes().iter().flatten().collect()
    }

    #[test]
    fn the_floor_follows_what_is_published_without_a_gap() {
        let mut t = tracker();
        for id in [1, 2, 3] {
            assert!(t.observe(id));
        }
        t.published(2);
        assert_eq!(t.floor(), 0);
        t.published(1);
        assert_eq!(t.floor(), 2);
        t.published(3);
        assert_eq!(
            (t.floor(), t.progress(10)),
            (
                3,
                Progress {
                    floor: 3,
                    published: RangeSet::default()
                }
            )
        );
    }

    #[test]
    fn a_row_that_commits_late_is_new_once() {
        let mut t = tracker();
        assert!(t.observe(5));
        assert_eq!(holes(&t), [1, 2, 3, 4]);
        assert!(t.observe(3));
        assert!(!t.observe(3));
        assert!(!t.observe(5));
        assert_eq!(holes(&t), [1, 2, 4]);
    }

    #[test]
    fn a_hole_lives_while_a_transaction_that_may_own_it_does() {
        let mut t = tracker();
        t.observe(3);
        t.published(3);
        t.list([7, 8]);
        assert!(!t.fence_is_passed());
        t.list([8, 9]);
        // 9 began after the head was seen: it cannot own a hole.
        t.list([9]);
        assert!(t.fence_is_passed());
        assert!(t.observe(2));
        assert_eq!(
            t.end_fence(Read {
                full: false,
                last_id: Some(2)
            })
            .id_count(),
            1
        );
        t.published(2);
        assert_eq!(t.floor(), 3);
    }

    #[test]
    fn a_read_that_did_not_get_to_the_fence_ends_nothing() {
        let mut t = tracker();
        t.observe(10);
        t.list([]);
        assert_eq!(
            t.end_fence(Read {
                full: true,
                last_id: Some(4)
            })
            .id_count(),
            0
        );
        assert_eq!(
            t.end_fence(Read {
                full: true,
                last_id: Some(10)
            })
            .id_count(),
            9
        );
    }

    #[test]
    fn holes_above_the_fence_stay_open() {
        let mut t = tracker();
        t.observe(2);
        t.list([]);
        t.observe(5);
        assert_eq!(
            t.end_fence(Read {
                full: false,
                last_id: Some(5)
            })
            .id_count(),
            1
        );
        assert_eq!(holes(&t), [3, 4]);
        assert!(t.wants_listing());
    }

    #[test]
    fn a_read_that_asked_for_more_serves_and_one_that_asked_for_less_does_not() {
        let mut asked = tracker();
        asked.observe(9);
        asked.observe(4);
        let mut now = asked.seen().clone();
        assert!(asked.seen().serves(&now));
        now.give_up(&[1..3, 6..7].into_iter().collect());
        assert_eq!(now.holes().iter().flatten().collect::<Vec<_>>(), [3, 5, 7, 8]);
        assert!(asked.seen().serves(&now) && !now.serves(asked.seen()));
        now.observe(10);
        assert!(!asked.seen().serves(&now), "another head");
    }

    #[test]
    fn fences_are_told_apart() {
        let mut t = tracker();
        t.observe(3);
        assert_eq!(t.passed_fence(), None);
        t.list([7]);
        assert_eq!(t.passed_fence(), None);
        t.list([]);
        let first = t.passed_fence();
        assert!(first.is_some());
        t.end_fence(Read {
            full: false,
            last_id: None,
        });
        t.observe(6);
        t.list([]);
        assert!(t.passed_fence().is_some() && t.passed_fence() != first);
    }

    #[test]
    fn a_reader_resumes_with_all_that_was_not_published_as_holes() {
        let published = [4..6, 9..10].into_iter().collect();
        let mut t: Tracker<u32> = Tracker::resume(Progress { floor: 2, published });
        assert_eq!((t.floor(), t.head(), holes(&t)), (2, 9, vec![3, 6, 7, 8]));
        assert!(!t.observe(4));
        t.observe(3);
        t.published(3);
        assert_eq!(t.floor(), 5);
    }

    #[test]
    fn ids_that_were_given_and_rolled_back_do_not_stay_open() {
        let mut t = tracker();
        t.observe(1);
        t.published(1);
        t.given(3);
        assert_eq!(holes(&t), [2, 3]);
        t.list([]);
        assert_eq!(
            t.end_fence(Read {
                full: false,
                last_id: None
            })
            .id_count(),
            2
        );
        assert_eq!((t.floor(), t.unfinished()), (3, 0));
    }

    #[test]
    fn the_oldest_open_row_is_neither_a_hole_nor_done() {
        let mut t = tracker();
        assert_eq!((t.first_open(), t.unfinished()), (1, 0));
        for id in [2, 3, 5] {
            t.observe(id);
        }
        assert_eq!((t.first_open(), t.unfinished()), (2, 3), "1 and 4 are holes");
        t.published(2);
        t.published(3);
        assert_eq!((t.first_open(), t.unfinished()), (5, 1));
        t.published(5);
        assert_eq!((t.first_open(), t.unfinished()), (6, 0));
    }

    #[test]
    fn what_may_still_turn_up_below_an_id_is_known() {
        let mut t = tracker();
        t.observe(2);
        // Put off, as one whose predecessor may be to come: it stays a hole.
        t.given(5);
        assert!(t.is_new(5) && t.may_turn_up_below(5, false));
        assert!(t.may_turn_up_below(2, false), "1");
        assert!(!t.may_turn_up_below(1, false));
        t.list([7]);
        assert!(t.may_turn_up_below(5, false));
        t.list([]);
        assert!(t.fence_is_passed() && !t.may_turn_up_below(5, true));
        t.given(9);
        assert!(
            !t.may_turn_up_below(6, true),
            "5 is the highest that the fence saw"
        );
        assert!(t.may_turn_up_below(9, true), "6 to 8 came after the fence");
    }

    #[test]
    fn saved_ranges_are_capped_from_below() {
        let mut t = tracker();
        for id in 1..=9 {
            t.observe(id);
        }
        for id in [3, 5, 7, 9] {
            t.published(id);
        }
        assert_eq!(t.progress(2).published, [3..4, 5..6].into_iter().collect());
    }
}
