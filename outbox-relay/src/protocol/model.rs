//! A model of a database with writers, one reader built on the [`Tracker`], and a Kafka that takes what it is handed in
//! order per partition. Random schedules of all of them, crashes included, must keep the promises.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use super::{Progress, Read, Tracker};

type Entity = usize;

const ENTITIES: usize = 3;

#[derive(Debug, Clone, Copy)]
struct Row {
    entity: Entity,
    version: i64,
}

/// An open transaction: it holds its entity's lock from before its first id to its end.
#[derive(Debug)]
struct Transaction {
    number: u32,
    entity: Entity,
    /// Its rows; those of a savepoint that was rolled back are gone, and their ids with them.
    rows: Vec<(i64, Row)>,
}

#[derive(Debug, Default)]
struct Database {
    last_id: i64,
    last_transaction: u32,
    open: Vec<Transaction>,
    committed: BTreeMap<i64, Row>,
    versions: [i64; ENTITIES],
}

impl Database {
    fn begin(&mut self, entity: Entity) {
        if self.open.iter().any(|transaction| transaction.entity == entity) {
            return; // would wait for the lock
        }
        self.last_transaction += 1;
        self.open.push(Transaction {
            number: self.last_transaction,
            entity,
            rows: Vec::new(),
        });
        let newest = self.open.len() - 1;
        self.insert(newest);
    }

    fn insert(&mut self, which: usize) {
        if self.open.is_empty() {
            return;
        }
        let which = which % self.open.len();
        let transaction = &mut self.open[which];
        self.last_id += 1;
        let version = self.versions[transaction.entity] + transaction.rows.len() as i64 + 1;
        transaction.rows.push((
            self.last_id,
            Row {
                entity: transaction.entity,
                version,
            },
        ));
    }

    fn roll_back_to_savepoint(&mut self, which: usize) {
        if !self.open.is_empty() {
            let which = which % self.open.len();
            self.open[which].rows.pop();
        }
    }

    fn end(&mut self, which: usize, commit: bool) {
        if self.open.is_empty() {
            return;
        }
        let transaction = self.open.remove(which % self.open.len());
        if commit {
            self.versions[transaction.entity] += transaction.rows.len() as i64;
            self.committed.extend(transaction.rows);
        }
    }
}

/// Everything that a crash of the relay takes with it.
struct Reader {
    tracker: Tracker<u32>,
    /// Handed over, per partition, not written yet.
    queues: [VecDeque<(i64, Row)>; ENTITIES],
    /// Written and not acknowledged yet.
    unacknowledged: [VecDeque<i64>; ENTITIES],
}

impl Reader {
    fn resume(progress: Progress) -> Self {
        Self {
            tracker: Tracker::resume(progress),
            queues: Default::default(),
            unacknowledged: Default::default(),
        }
    }

    fn poll(&mut self, database: &Database, limit: usize) {
        let may_end_fence = self.tracker.fence_is_passed();
        let rows: Vec<(i64, Row)> = database
            .committed
            .iter()
            .filter(|(id, _)| **id > self.tracker.head() || self.tracker.holes().contains(**id))
            .map(|(id, row)| (*id, *row))
            .take(limit)
            .collect();
        for (id, row) in &rows {
            assert!(self.tracker.observe(*id));
            self.queues[row.entity].push_back((*id, *row));
        }
        if may_end_fence {
            self.tracker.end_fence(Read {
                full: rows.len() == limit,
                last_id: rows.last().map(|(id, _)| *id),
            });
        }
    }

    fn list(&mut self, database: &Database) {
        if self.tracker.wants_listing() {
            self.tracker
                .list(database.open.iter().map(|transaction| transaction.number));
        }
    }

    fn write(&mut self, partition: usize, topic: &mut [Vec<i64>; ENTITIES]) {
        if let Some((id, row)) = self.queues[partition].pop_front() {
            topic[row.entity].push(row.version);
            self.unacknowledged[partition].push_back(id);
        }
    }

    fn acknowledge(&mut self, partition: usize) {
        if let Some(id) = self.unacknowledged[partition].pop_front() {
            self.tracker.published(id);
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Begin(Entity),
    Insert(usize),
    RollBackToSavepoint(usize),
    End { which: usize, commit: bool },
    Poll { limit: usize },
    List,
    AskSequence,
    Write(usize),
    Acknowledge(usize),
    Save { max_ranges: usize },
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..ENTITIES).prop_map(Step::Begin),
        2 => (0usize..4).prop_map(Step::Insert),
        1 => (0usize..4).prop_map(Step::RollBackToSavepoint),
        4 => (0usize..4, prop::bool::weighted(0.7)).prop_map(|(which, commit)| Step::End { which, commit }),
        6 => (1usize..5).prop_map(|limit| Step::Poll { limit }),
        3 => Just(Step::List),
        1 => Just(Step::AskSequence),
        6 => (0..ENTITIES).prop_map(Step::Write),
        5 => (0..ENTITIES).prop_map(Step::Acknowledge),
        2 => (1usize..3).prop_map(|max_ranges| Step::Save { max_ranges }),
        1 => Just(Step::Crash),
    ]
}

/// First occurrences must be 1, 2, 3 …
fn first_occurrences(written: &[i64]) -> Vec<i64> {
    let mut seen = BTreeSet::new();
    written
        .iter()
        .copied()
        .filter(|version| seen.insert(*version))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_and_order_holds(steps in prop::collection::vec(step(), 0..120)) {
        let mut database = Database::default();
        let mut topic: [Vec<i64>; ENTITIES] = Default::default();
        let mut saved = Progress::default();
        let mut reader = Reader::resume(saved.clone());

        for step in steps {
            match step {
                Step::Begin(entity) => database.begin(entity),
                Step::Insert(which) => database.insert(which),
                Step::RollBackToSavepoint(which) => database.roll_back_to_savepoint(which),
                Step::End { which, commit } => database.end(which, commit),
                Step::Poll { limit } => reader.poll(&database, limit),
                Step::List => reader.list(&database),
                Step::AskSequence => reader.tracker.given(database.last_id),
                Step::Write(partition) => reader.write(partition, &mut topic),
                Step::Acknowledge(partition) => reader.acknowledge(partition),
                Step::Save { max_ranges } => {
                    let progress = reader.tracker.progress(max_ranges);
                    prop_assert!(progress.floor >= saved.floor);
                    saved = progress;
                }
                Step::Crash => reader = Reader::resume(saved.clone()),
            }
            for written in &topic {
                let first = first_occurrences(written);
                prop_assert_eq!(&first, &(1..=first.len() as i64).collect::<Vec<_>>());
            }
        }

        // Writers end and the reader goes on: everything arrives, and no hole is left.
        while !database.open.is_empty() {
            database.end(0, true);
        }
        for _ in 0..database.last_id * 4 + 8 {
            reader.tracker.given(database.last_id);
            reader.list(&database);
            reader.poll(&database, 3);
            for partition in 0..ENTITIES {
                reader.write(partition, &mut topic);
                reader.acknowledge(partition);
            }
        }
        for (entity, written) in topic.iter().enumerate() {
            let all: Vec<i64> = (1..=database.versions[entity]).collect();
            prop_assert_eq!(first_occurrences(written), all);
        }
        prop_assert_eq!(reader.tracker.floor(), database.last_id);
        prop_assert!(reader.tracker.holes().is_empty());
    }
}
