//! What was read and is not yet done: which worker gets it next, and when reading a partition has to pause.
//!
//! Pure state, driven by the [runtime](crate::runtime): no Kafka, no database, no clock of its own.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::record::Decoded;
use crate::tracker::OffsetTracker;

/// A partition of one of the consumer's topics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PartitionId {
    /// Position of the topic in the configuration.
    pub(crate) topic: usize,
    pub(crate) partition: i32,
}

/// One assignment of a partition to this process. Workers hold it with each record, so that they learn when it has ended; the
/// next assignment of the same partition has another one, and takes no notice of what the former's records do.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) id: PartitionId,
    generation: u64,
    revoked: AtomicBool,
}

impl Claim {
    fn new(id: PartitionId, generation: u64) -> Self {
        Self {
            id,
            generation,
            revoked: AtomicBool::new(false),
        }
    }

    /// Whether its records should still be worked on.
    pub(crate) fn stands(&self) -> bool {
        !self.revoked.load(Ordering::Acquire)
    }

    fn revoke(&self) {
        self.revoked.store(true, Ordering::Release);
    }
}

/// A record, or what could not be decoded into one, with where it came from.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) claim: Arc<Claim>,
    pub(crate) offset: i64,
    pub(crate) size: usize,
    pub(crate) content: Decoded,
}

/// What became of an [`Item`] that a worker was given.
#[derive(Debug)]
pub(crate) struct Settled {
    pub(crate) claim: Arc<Claim>,
    pub(crate) offset: i64,
    pub(crate) size: usize,
    pub(crate) end: End,
}

/// How an [`Item`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Its effect, or that of its first occurrence, has committed.
    Done,
    /// It was left undone; whoever has the partition next reads it again.
    Left,
}

/// The bounds that the intake keeps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) workers: usize,
    pub(crate) batch_records: usize,
    pub(crate) linger: Duration,
    pub(crate) in_flight_records: usize,
    pub(crate) in_flight_bytes: usize,
}

/// Partitions whose reading should stop or go on.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Flow {
    pub(crate) pause: Vec<PartitionId>,
    pub(crate) resume: Vec<PartitionId>,
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Intake {
    limits: Limits,
    hasher: ahash::RandomState,
    next_generation: u64,
    partitions: HashMap<PartitionId, Partition>,
    queues: Vec<Queue>,
}

#[derive(Debug)]
struct Partition {
    claim: Arc<Claim>,
    tracker: OffsetTracker,
    /// Held in memory, queued or with a worker.
    records: usize,
    bytes: usize,
    paused: bool,
}

/// A partition's share of the bounds.
#[derive(Debug, Clone, Copy)]
struct Share {
    records: usize,
    bytes: usize,
}

impl Partition {
    fn is_full(&self, share: Share) -> bool {
        self.records >= share.records
            || self.bytes >= share.bytes
            || self.tracker.len() >= share.records * DONE_BEHIND_STUCK
    }

    fn has_room(&self, share: Share) -> bool {
        self.records <= share.records / 2
            && self.bytes <= share.bytes / 2
            && self.tracker.len() <= share.records * DONE_BEHIND_STUCK / 2
    }

    /// One record less in memory.
    fn forget(&mut self, size: usize) {
        self.records = self.records.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(size);
    }
}

/// What waits for one worker.
#[derive(Debug, Default)]
struct Queue {
    items: VecDeque<Item>,
    /// When the first of `items` came to wait.
    since: Option<Instant>,
    busy: bool,
}

/// A partition may have this many times its share of records done behind one that is stuck.
const DONE_BEHIND_STUCK: usize = 16;

impl Intake {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            // Fixed, so that a key stays with its worker over a rebalance and behaviour can be repeated.
            hasher: ahash::RandomState::with_seeds(1, 2, 3, 4),
            next_generation: 0,
            partitions: HashMap::new(),
            queues: (0..limits.workers).map(|_| Queue::default()).collect(),
        }
    }

    /// Starts an assignment of a partition.
    pub(crate) fn assign(&mut self, id: PartitionId) {
        self.revoke(id);
        self.next_generation += 1;
        let claim = Arc::new(Claim::new(id, self.next_generation));
        self.partitions.insert(
            id,
            Partition {
                claim,
                tracker: OffsetTracker::default(),
                records: 0,
                bytes: 0,
                paused: false,
            },
        );
    }

    /// Ends an assignment. What waits is dropped; what a worker has may still commit, and will not be counted.
    pub(crate) fn revoke(&mut self, id: PartitionId) {
        let Some(partition) = self.partitions.remove(&id) else {
            return;
        };
        partition.claim.revoke();
        for queue in &mut self.queues {
            queue
                .items
                .retain(|item| !Arc::ptr_eq(&item.claim, &partition.claim));
            if queue.items.is_empty() {
                queue.since = None;
            }
        }
    }

    /// Takes in what was read at `offset`; `false` when it is not wanted (not assigned, or read before).
    pub(crate) fn admit(
        &mut self,
        id: PartitionId,
        offset: i64,
        size: usize,
        content: Decoded,
        now: Instant,
    ) -> bool {
        let Some(partition) = self.partitions.get_mut(&id) else {
            return false;
        };
        if !partition.tracker.admit(offset) {
            return false;
        }
        partition.records += 1;
        partition.bytes += size;
        let key = match &content {
            Decoded::Record(record) => record.envelope.entity_id.as_str(),
            // Behind what it can be told to belong to, in order.
            Decoded::Not(raw, _) => raw.entity().unwrap_or_default(),
        };
        let slot = self.hasher.hash_one((id, key)) % self.limits.workers as u64;
        let queue = &mut self.queues[slot as usize];
        queue.since.get_or_insert(now);
        queue.items.push_back(Item {
            claim: Arc::clone(&partition.claim),
            offset,
            size,
            content,
        });
        true
    }

    /// A batch for each worker that is free and has enough waiting, or has let it wait long enough.
    pub(crate) fn batches(&mut self, now: Instant) -> Vec<(usize, Vec<Item>)> {
        let limits = self.limits;
        let mut batches = Vec::new();
        for (worker, queue) in self.queues.iter_mut().enumerate() {
            let due = queue
                .since
                .is_some_and(|since| now.saturating_duration_since(since) >= limits.linger);
            if queue.busy || !(due || queue.items.len() >= limits.batch_records) {
                continue;
            }
            let take = queue.items.len().min(limits.batch_records);
            let batch: Vec<Item> = queue.items.drain(..take).collect();
            queue.since = (!queue.items.is_empty()).then_some(now);
            queue.busy = true;
            batches.push((worker, batch));
        }
        batches
    }

    /// When [`batches`](Self::batches) has something to give although nothing else happens.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.queues
            .iter()
            .filter(|queue| !queue.busy)
            .filter_map(|queue| queue.since)
            .map(|since| since + self.limits.linger)
            .min()
    }

    /// Takes back a worker's batch; returns how far its partitions are done now, where that has moved.
    pub(crate) fn settle(&mut self, worker: usize, batch: &[Settled]) -> Vec<(PartitionId, i64)> {
        self.queues[worker].busy = false;
        let mut touched = Vec::new();
        for settled in batch {
            let Some(partition) = self.partitions.get_mut(&settled.claim.id) else {
                continue;
            };
            if partition.claim.generation != settled.claim.generation {
                continue;
            }
            partition.forget(settled.size);
            if settled.end == End::Done {
                partition.tracker.complete(settled.offset);
                touched.push(settled.claim.id);
            }
        }
        touched.sort_unstable();
        touched.dedup();
        touched
            .into_iter()
            .filter_map(|id| Some((id, self.partitions.get_mut(&id)?.tracker.advance()?)))
            .collect()
    }

    /// Takes note of how far the client has read; returns the partitions that are done up to there, where that is further than their last
    /// record.
    pub(crate) fn pass(
        &mut self,
        positions: impl IntoIterator<Item = (PartitionId, i64)>,
    ) -> Vec<(PartitionId, i64)> {
        let passed = positions.into_iter().filter_map(|(id, position)| {
            let partition = self.partitions.get_mut(&id)?;
            Some((id, partition.tracker.pass(position)?))
        });
        passed.collect()
    }

    /// Whether reading this partition should pause now.
    pub(crate) fn is_full(&self, id: PartitionId) -> bool {
        let share = self.share();
        self.partitions
            .get(&id)
            .is_some_and(|partition| partition.is_full(share))
    }

    /// Which partitions have too much in memory, and which have room again.
    pub(crate) fn flow(&mut self) -> Flow {
        let share = self.share();
        let mut flow = Flow::default();
        for (id, partition) in &mut self.partitions {
            if !partition.paused && partition.is_full(share) {
                partition.paused = true;
                flow.pause.push(*id);
            } else if partition.paused && partition.has_room(share) {
                partition.paused = false;
                flow.resume.push(*id);
            }
        }
        flow
    }

    /// What each partition may hold.
    fn share(&self) -> Share {
        let assigned = self.partitions.len().max(1);
        Share {
            records: (self.limits.in_flight_records / assigned).max(1),
            bytes: (self.limits.in_flight_bytes / assigned).max(1),
        }
    }

    /// Records held in memory.
    pub(crate) fn in_flight(&self) -> usize {
        self.partitions.values().map(|partition| partition.records).sum()
    }

    /// Which partitions are assigned.
    pub(crate) fn ids(&self) -> Vec<PartitionId> {
        self.partitions.keys().copied().collect()
    }

    /// Partitions assigned.
    pub(crate) fn assigned(&self) -> usize {
        self.partitions.len()
    }

    /// Whether a worker has a batch.
    pub(crate) fn any_busy(&self) -> bool {
        self.queues.iter().any(|queue| queue.busy)
    }

    /// Drops everything that waits: it will be read again by whoever has the partitions next.
    pub(crate) fn drop_all_waiting(&mut self) {
        for queue in &mut self.queues {
            queue.items.clear();
            queue.since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::record::Record;
    use crate::record::tests::envelope;

    const P0: PartitionId = PartitionId {
        topic: 0,
        partition: 0,
    };
    const P1: PartitionId = PartitionId {
        topic: 0,
        partition: 1,
    };

    fn limits() -> Limits {
        Limits {
            workers: 2,
            batch_records: 3,
            linger: Duration::ZERO,
            in_flight_records: 8,
            in_flight_bytes: 1 << 20,
        }
    }

    fn record(key: &str) -> Record {
        Record {
            envelope: envelope(key),
            payload: vec![],
            topic: "events.order".into(),
            partition: 0,
            offset: 0,
            timestamp: None,
        }
    }

    fn admit(intake: &mut Intake, id: PartitionId, offset: i64, key: &str) -> bool {
        intake.admit(id, offset, 1, Decoded::Record(record(key)), Instant::now())
    }

    fn settled(batch: Vec<Item>, end: End) -> Vec<Settled> {
        batch
            .into_iter()
            .map(|item| Settled {
                claim: item.claim,
                offset: item.offset,
                size: item.size,
                end,
            })
            .collect()
    }

    #[test]
    fn a_busy_worker_gets_nothing_and_its_records_gather() {
        let mut intake = Intake::new(Limits {
            workers: 1,
            ..limits()
        });
        intake.assign(P0);
        assert!(admit(&mut intake, P0, 0, "a"));
        let (worker, first) = intake.batches(Instant::now()).remove(0);
        for offset in 1..=4 {
            assert!(admit(&mut intake, P0, offset, "a"));
        }
        assert!(intake.batches(Instant::now()).is_empty());
        assert_eq!(intake.settle(worker, &settled(first, End::Done)), vec![(P0, 1)]);
        let (_, second) = intake.batches(Instant::now()).remove(0);
        assert_eq!(
            second.iter().map(|item| item.offset).collect::<Vec<_>>(),
            [1, 2, 3],
            "at most a batch"
        );
    }

    #[test]
    fn an_idle_worker_lingers_for_more_but_not_once_the_batch_is_full() {
        let linger = Duration::from_millis(5);
        let mut intake = Intake::new(Limits {
            workers: 1,
            linger,
            ..limits()
        });
        intake.assign(P0);
        let start = Instant::now();
        assert!(intake.admit(P0, 0, 1, Decoded::Record(record("a")), start));
        assert!(intake.batches(start).is_empty());
        assert_eq!(intake.next_due(), Some(start + linger));
        assert!(intake.admit(P0, 1, 1, Decoded::Record(record("a")), start));
        assert!(intake.admit(P0, 2, 1, Decoded::Record(record("a")), start));
        assert_eq!(intake.batches(start).len(), 1, "a full batch goes at once");
        let mut waiting = Intake::new(Limits {
            workers: 1,
            linger,
            ..limits()
        });
        waiting.assign(P0);
        assert!(waiting.admit(P0, 0, 1, Decoded::Record(record("a")), start));
        assert_eq!(
            waiting.batches(start + linger).len(),
            1,
            "and a small one when its time has come"
        );
    }

    #[test]
    fn a_former_assignments_records_count_for_nothing() {
        let mut intake = Intake::new(Limits {
            workers: 1,
            ..limits()
        });
        intake.assign(P0);
        assert!(admit(&mut intake, P0, 7, "a"));
        let (worker, batch) = intake.batches(Instant::now()).remove(0);
        assert!(admit(&mut intake, P0, 8, "a"));
        intake.revoke(P0);
        assert!(!batch[0].claim.stands());
        assert!(!admit(&mut intake, P0, 9, "a"), "not assigned");
        intake.assign(P0);
        assert!(
            admit(&mut intake, P0, 7, "a"),
            "read again under the new assignment"
        );
        assert_eq!(intake.settle(worker, &settled(batch, End::Done)), vec![]);
        let (worker, batch) = intake.batches(Instant::now()).remove(0);
        assert_eq!(batch.len(), 1, "what waited from before is gone");
        assert_eq!(intake.settle(worker, &settled(batch, End::Done)), vec![(P0, 8)]);
        assert_eq!(intake.in_flight(), 0);
    }

    #[test]
    fn a_full_partition_pauses_and_resumes_when_half_empty() {
        let mut intake = Intake::new(Limits {
            workers: 1,
            ..limits()
        });
        intake.assign(P0);
        for offset in 0..8 {
            assert!(admit(&mut intake, P0, offset, "a"));
        }
        assert_eq!(
            intake.flow(),
            Flow {
                pause: vec![P0],
                resume: vec![]
            }
        );
        assert_eq!(intake.flow(), Flow::default(), "told once");
        let (worker, batch) = intake.batches(Instant::now()).remove(0);
        intake.settle(worker, &settled(batch, End::Done));
        assert_eq!(intake.flow(), Flow::default(), "5 of 8 left");
        let (worker, batch) = intake.batches(Instant::now()).remove(0);
        intake.settle(worker, &settled(batch, End::Done));
        assert_eq!(
            intake.flow(),
            Flow {
                pause: vec![],
                resume: vec![P0]
            }
        );
    }

    #[test]
    fn bytes_pause_as_well() {
        let mut intake = Intake::new(limits());
        intake.assign(P0);
        assert!(intake.admit(P0, 0, 2 << 20, Decoded::Record(record("a")), Instant::now()));
        assert_eq!(intake.flow().pause, vec![P0]);
    }

    #[test]
    fn a_stuck_record_bounds_what_is_done_behind_it() {
        let mut intake = Intake::new(limits());
        intake.assign(P0);
        let keys: Vec<String> = (0..20).map(|key| key.to_string()).collect();
        assert!(admit(&mut intake, P0, 0, &keys[0]));
        let (stuck, _batch) = intake.batches(Instant::now()).remove(0);
        let mut offset = 0;
        while !intake.flow().pause.contains(&P0) {
            offset += 1;
            assert!(offset < 1_000, "never paused");
            let key = &keys[offset as usize % keys.len()];
            admit(&mut intake, P0, offset, key);
            for (worker, batch) in intake.batches(Instant::now()) {
                assert_ne!(worker, stuck);
                intake.settle(worker, &settled(batch, End::Done));
            }
        }
    }

    proptest! {
        /// Any interleaving of reading, handing out, settling and rebalancing keeps each key's records in order on one
        /// worker within an assignment, and never moves an offset past a record of that assignment that is not done.
        #[test]
        fn order_per_key_and_contiguous_offsets(script in prop::collection::vec((0_u8..10, 0_u8..5), 1..300)) {
            let mut intake = Intake::new(Limits { in_flight_records: 1_000, ..limits() });
            let mut offsets = [0_i64, 0];
            let mut assigned = [false, false];
            let mut open: [BTreeSet<i64>; 2] = Default::default();
            let mut busy: Vec<(usize, Vec<Item>)> = Vec::new();
            let mut seen: HashMap<(PartitionId, u64, String), (usize, i64)> = HashMap::new();
            for (action, pick) in script {
                let slot = usize::from(pick % 2);
                let id = [P0, P1][slot];
                match action {
                    0 => {
                        intake.assign(id);
                        assigned[slot] = true;
                        // Reading starts again at the oldest record that is not done.
                        offsets[slot] = open[slot].first().copied().unwrap_or(offsets[slot]);
                        open[slot].clear();
                    }
                    1 => {
                        intake.revoke(id);
                        assigned[slot] = false;
                    }
                    2..=5 => {
                        let admitted = admit(&mut intake, id, offsets[slot], &format!("k{pick}"));
                        prop_assert_eq!(admitted, assigned[slot]);
                        if admitted {
                            open[slot].insert(offsets[slot]);
                            offsets[slot] += 1;
                        }
                    }
                    6 | 7 => {
                        for (worker, batch) in intake.batches(Instant::now()) {
                            for item in &batch {
                                let Decoded::Record(record) = &item.content else { unreachable!() };
                                let key = record.envelope.entity_id.clone();
                                let place = (item.claim.id, item.claim.generation, key);
                                if let Some((before, last)) = seen.insert(place, (worker, item.offset)) {
                                    prop_assert_eq!(before, worker);
                                    prop_assert!(last < item.offset);
                                }
                            }
                            busy.push((worker, batch));
                        }
                    }
                    _ => {
                        if busy.is_empty() {
                            continue;
                        }
                        let (worker, batch) = busy.remove(usize::from(pick) % busy.len());
                        for item in &batch {
                            if item.claim.stands() {
                                open[usize::from(item.claim.id == P1)].remove(&item.offset);
                            }
                        }
                        for (id, next) in intake.settle(worker, &settled(batch, End::Done)) {
                            let slot = usize::from(id == P1);
                            prop_assert!(open[slot].iter().all(|offset| *offset >= next));
                        }
                    }
                }
            }
        }
    }
}
