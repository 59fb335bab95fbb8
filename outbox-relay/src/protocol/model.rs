//! A model of a database with writers, two relays built on the [`Tracker`], and a Kafka that takes what it is handed in
//! order per partition. Random schedules of all of them, with crashes, restarts of the server, leases that run out under a
//! relay that sleeps, and saves whose outcome nobody knows, must keep the promises. Deliberate faults must be found: a
//! model that finds none of them proves nothing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use super::{Follows, Progress, RangeSet, Read, Tracker, Versions};

type Entity = usize;
/// How a listing identifies a transaction.
type Name = u32;

const ENTITIES: usize = 4;
/// Its writers do not lock it: versions commit in any order, and some are missing for good.
const UNRULY: Entity = ENTITIES - 1;
const RELAYS: usize = 2;

/// What somebody could get wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The fence ends with the read before which it was not passed yet.
    FenceWithoutLaterRead,
    /// The fence ends although the read stopped before its head.
    FenceBeyondRead,
    /// The writers are listed, then the outbox is read, then the fence starts at the head.
    HeadAfterListing,
    /// The listing leaves prepared transactions out, as one by process ids does.
    PreparedUnlisted,
    /// Another server process answers, and the relay goes on with what it knows.
    RestartUnnoticed,
    /// Holes are read in one statement, the head in another.
    TwoStatements,
    /// Holes and head have a limit each.
    TwoLimits,
    /// Everything up to the newest published id is saved as published.
    FloorFromMax,
    /// Records count as published when they are handed over.
    PublishedAtHandOver,
    /// Progress is saved whoever leads.
    UnguardedSave,
    /// Progress is saved first, the parked records after it.
    ParkedApart,
    /// A record is parked while those before it of its entity are in flight.
    FrozenInFlight,
    /// A frozen entity's later records go out.
    FrozenFlows,
    /// A kept record leaves the quarantine before Kafka has acknowledged it.
    ReleasedAtHandOver,
    /// A record that was put off counts as seen.
    PutOffIsSeen,
    /// A record is put off by a read that ends the fence over it.
    PutOffInPassedFence,
}

const FAULTS: [Fault; 16] = [
    Fault::FenceWithoutLaterRead,
    Fault::FenceBeyondRead,
    Fault::HeadAfterListing,
    Fault::PreparedUnlisted,
    Fault::RestartUnnoticed,
    Fault::TwoStatements,
    Fault::TwoLimits,
    Fault::FloorFromMax,
    Fault::PublishedAtHandOver,
    Fault::UnguardedSave,
    Fault::ParkedApart,
    Fault::FrozenInFlight,
    Fault::FrozenFlows,
    Fault::ReleasedAtHandOver,
    Fault::PutOffIsSeen,
    Fault::PutOffInPassedFence,
];

#[derive(Debug, Clone, Copy)]
struct Row {
    entity: Entity,
    version: i64,
    /// Kafka does not take it, until somebody has mended it.
    poisoned: bool,
}

/// An open transaction: it holds its entity's lock from before its first id to its end, unless it is unruly.
#[derive(Debug)]
struct Transaction {
    name: Name,
    entity: Entity,
    /// Its rows; those of a savepoint that was rolled back are gone, and their ids with them.
    rows: Vec<(i64, Row)>,
    /// Survives a restart of the server, under another name.
    prepared: bool,
}

/// Lease and progress.
#[derive(Debug, Default)]
struct Saved {
    epoch: u32,
    saves: u32,
    expired: bool,
    progress: Progress,
}

#[derive(Debug, Default)]
struct Database {
    last_id: i64,
    last_name: Name,
    /// Counts the server's starts.
    server: u32,
    open: Vec<Transaction>,
    committed: BTreeMap<i64, Row>,
    versions: [i64; ENTITIES],
    saved: Saved,
    succeeded: BTreeSet<(u32, u32)>,
    quarantine: BTreeMap<i64, Row>,
}

impl Database {
    fn name(&mut self) -> Name {
        self.last_name += 1;
        self.last_name
    }

    fn begin(&mut self, entity: Entity) {
        let locked = self.open.iter().any(|transaction| transaction.entity == entity);
        if locked && entity != UNRULY {
            return; // would wait for the lock
        }
        let name = self.name();
        self.open.push(Transaction {
            name,
            entity,
            rows: Vec::new(),
            prepared: false,
        });
        let newest = self.open.len() - 1;
        self.insert(newest, false);
    }

    fn pick(&self, which: usize) -> Option<usize> {
        (!self.open.is_empty()).then(|| which % self.open.len())
    }

    fn insert(&mut self, which: usize, poisoned: bool) {
        let Some(which) = self.pick(which).filter(|which| !self.open[*which].prepared) else {
            return;
        };
        let transaction = &mut self.open[which];
        self.last_id += 1;
        let entity = transaction.entity;
        let version = if entity == UNRULY {
            self.versions[entity] += 1;
            self.versions[entity]
        } else {
            self.versions[entity] + transaction.rows.len() as i64 + 1
        };
        let row = Row {
            entity,
            version,
            poisoned,
        };
        transaction.rows.push((self.last_id, row));
    }

    fn roll_back_to_savepoint(&mut self, which: usize) {
        if let Some(which) = self.pick(which).filter(|which| !self.open[*which].prepared) {
            self.open[which].rows.pop();
        }
    }

    fn end(&mut self, which: usize, commit: bool) {
        let Some(which) = self.pick(which) else { return };
        let transaction = self.open.remove(which);
        if commit {
            if transaction.entity != UNRULY {
                self.versions[transaction.entity] += transaction.rows.len() as i64;
            }
            self.committed.extend(transaction.rows);
        }
    }

    fn restart(&mut self) {
        self.server += 1;
        self.open.retain(|transaction| transaction.prepared);
        for transaction in &mut self.open {
            self.last_name += 1;
            transaction.name = self.last_name;
        }
    }

    /// Everything that progress says is done with is on Kafka, kept, or dead.
    fn check_progress(&self, topic: &Topic) -> Result<(), TestCaseError> {
        let Progress { floor, published } = &self.saved.progress;
        let done = |id: i64| id <= *floor || published.contains(id);
        for (id, row) in &self.committed {
            let kept = topic.has(*row) || self.quarantine.contains_key(id);
            prop_assert!(!done(*id) || kept, "{id} is neither published nor kept");
        }
        for (id, _) in self.open.iter().flat_map(|transaction| &transaction.rows) {
            prop_assert!(!done(*id), "{id} is given up, and may be committed yet");
        }
        Ok(())
    }
}

/// What was written, in its order per entity.
#[derive(Debug, Default)]
struct Topic([Vec<i64>; ENTITIES]);

impl Topic {
    fn has(&self, row: Row) -> bool {
        self.0[row.entity].contains(&row.version)
    }

    /// First occurrences must be 1, 2, 3 … of those entities that are locked by their writers.
    fn check(&self) -> Result<(), TestCaseError> {
        for written in &self.0[..UNRULY] {
            let mut seen = BTreeSet::new();
            let first: Vec<i64> = written.iter().copied().filter(|v| seen.insert(*v)).collect();
            prop_assert_eq!(&first, &(1..=first.len() as i64).collect::<Vec<_>>());
        }
        Ok(())
    }
}

type Queue = VecDeque<(i64, Row)>;

/// One term of a relay: everything that goes with its end, but what is on its way to Kafka.
struct Reader {
    tracker: Tracker<Name>,
    versions: Versions,
    server: u32,
    epoch: u32,
    saves: u32,
    /// Handed over, per partition, not written yet.
    queues: [Queue; ENTITIES],
    /// Written and not acknowledged yet.
    unacknowledged: [VecDeque<i64>; ENTITIES],
    frozen: BTreeSet<Entity>,
    parked: BTreeMap<i64, Row>,
    released: BTreeSet<i64>,
    /// A listing that is not handed to the tracker yet: see the fault.
    listing: Option<Vec<Name>>,
}

impl Reader {
    fn resume(database: &Database) -> Self {
        Self {
            tracker: Tracker::resume(database.saved.progress.clone()),
            versions: Versions::new(100),
            server: database.server,
            epoch: database.saved.epoch,
            saves: database.saved.saves,
            queues: Default::default(),
            unacknowledged: Default::default(),
            frozen: database.quarantine.values().map(|row| row.entity).collect(),
            parked: BTreeMap::new(),
            released: BTreeSet::new(),
            listing: None,
        }
    }

    fn poll(&mut self, database: &Database, topic: &mut Topic, limit: usize, fault: Option<Fault>) {
        let has = |wrong| fault == Some(wrong);
        let holes = |(id, _): &(&i64, &Row)| self.tracker.holes().contains(**id);
        let above = |(id, _): &(&i64, &Row)| **id > self.tracker.head();
        let read = |wanted: &dyn Fn(&(&i64, &Row)) -> bool| -> Vec<(i64, Row)> {
            let found = database.committed.iter().filter(|row| wanted(row));
            found.map(|(id, row)| (*id, *row)).take(limit).collect()
        };
        let rows = if has(Fault::TwoLimits) {
            [read(&holes), read(&above)].concat()
        } else {
            read(&|row| holes(row) || above(row))
        };
        self.took(rows, limit, database, topic, fault);
    }

    fn took(
        &mut self,
        rows: Vec<(i64, Row)>,
        limit: usize,
        database: &Database,
        topic: &mut Topic,
        fault: Option<Fault>,
    ) {
        let has = |wrong| fault == Some(wrong);
        let mut passed = self.tracker.fence_is_passed();
        let read = Read {
            full: rows.len() >= limit,
            last_id: rows.last().map(|(id, _)| *id),
        };
        for (id, row) in rows {
            self.take(id, row, passed && !has(Fault::PutOffInPassedFence), topic, fault);
        }
        if has(Fault::FenceWithoutLaterRead) && self.tracker.wants_listing() {
            self.list(database, fault);
            passed = self.tracker.fence_is_passed();
        }
        if passed {
            self.tracker.end_fence(if has(Fault::FenceBeyondRead) {
                Read { full: false, ..read }
            } else {
                read
            });
        }
    }

    fn take(&mut self, id: i64, row: Row, passed: bool, topic: &mut Topic, fault: Option<Fault>) {
        let known = self.versions.entity("entity", &row.entity.to_string());
        if self.frozen.contains(&row.entity) && fault != Some(Fault::FrozenFlows) {
            assert!(self.tracker.observe(id));
            self.parked.insert(id, row);
            return;
        }
        let follows = self.versions.check(known, row.version);
        if matches!(follows, Follows::WithGap { .. }) && !row.poisoned {
            self.tracker.given(id);
            if self.tracker.may_turn_up_below(id, passed) {
                if fault == Some(Fault::PutOffIsSeen) {
                    self.tracker.observe(id);
                }
                return;
            }
        }
        assert!(self.tracker.observe(id));
        if row.poisoned || (follows != Follows::Well && fault != Some(Fault::FrozenFlows)) {
            if fault != Some(Fault::FrozenInFlight) {
                self.settle(row.entity, topic);
            }
            self.frozen.insert(row.entity);
            self.parked.insert(id, row);
            return;
        }
        self.versions.saw(known, row.version);
        self.queues[row.entity].push_back((id, row));
        if fault == Some(Fault::PublishedAtHandOver) {
            self.tracker.published(id);
        }
    }

    fn list(&mut self, database: &Database, fault: Option<Fault>) {
        let writers = database.open.iter();
        let listed = writers.filter(|open| !(open.prepared && fault == Some(Fault::PreparedUnlisted)));
        let listed: Vec<Name> = listed.map(|open| open.name).collect();
        if fault == Some(Fault::HeadAfterListing) {
            if let Some(before) = self.listing.replace(listed) {
                self.tracker.list(before);
            }
        } else {
            self.tracker.list(listed);
        }
    }

    fn write(&mut self, partition: usize, topic: &mut Topic) {
        if let Some((id, row)) = self.queues[partition].pop_front() {
            topic.0[row.entity].push(row.version);
            self.unacknowledged[partition].push_back(id);
        }
    }

    fn acknowledge(&mut self, partition: usize) {
        if let Some(id) = self.unacknowledged[partition].pop_front() {
            self.tracker.published(id);
        }
    }

    /// Waits until nothing of a partition is in flight.
    fn settle(&mut self, partition: usize, topic: &mut Topic) {
        while !self.queues[partition].is_empty() {
            self.write(partition, topic);
        }
        while !self.unacknowledged[partition].is_empty() {
            self.acknowledge(partition);
        }
    }

    /// Whether the row was updated.
    fn save(
        &mut self,
        database: &mut Database,
        max_ranges: usize,
        fault: Option<Fault>,
    ) -> Result<bool, TestCaseError> {
        for id in self.parked.keys() {
            self.tracker.published(*id);
        }
        let mut progress = self.tracker.progress(max_ranges);
        if fault == Some(Fault::FloorFromMax) {
            progress.floor = progress.published.last().unwrap_or(progress.floor);
            progress.published = RangeSet::default();
        }
        let saved = &mut database.saved;
        let mine = (saved.epoch, saved.saves) == (self.epoch, self.saves)
            && progress.floor >= saved.progress.floor
            && database.server == self.server;
        if !mine && fault != Some(Fault::UnguardedSave) {
            return Ok(false);
        }
        prop_assert!(
            database.succeeded.insert((saved.epoch, saved.saves)),
            "two saves in one place"
        );
        *saved = Saved {
            saves: saved.saves + 1,
            expired: false,
            epoch: saved.epoch,
            progress,
        };
        self.saves += 1;
        if fault != Some(Fault::ParkedApart) {
            database.quarantine.append(&mut self.parked);
        }
        database.quarantine.retain(|id, _| !self.released.contains(id));
        self.released.clear();
        Ok(true)
    }

    /// Publishes what is kept of an entity, which somebody has mended.
    fn work_off(&mut self, database: &mut Database, topic: &mut Topic, fault: Option<Fault>, dies: bool) {
        let settled = self.parked.is_empty() && self.released.is_empty();
        let Some(entity) = self.frozen.first().copied().filter(|_| settled) else {
            return;
        };
        self.settle(entity, topic);
        let kept = database.quarantine.iter().filter(|(_, row)| row.entity == entity);
        let mut kept: Vec<(i64, Row)> = kept.map(|(id, row)| (*id, *row)).collect();
        if kept.is_empty() {
            self.frozen.remove(&entity);
            let known = self.versions.entity("entity", &entity.to_string());
            self.versions.forget(known);
            return;
        }
        kept.sort_by_key(|(_, row)| row.version);
        if fault == Some(Fault::ReleasedAtHandOver) && dies {
            database.quarantine.retain(|_, row| row.entity != entity);
            return;
        }
        for (id, row) in kept {
            topic.0[entity].push(row.version);
            self.released.insert(id);
        }
    }
}

/// How a save goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Told,
    /// It was done, or not, and the relay is not told.
    Unknown {
        done: bool,
    },
}

#[derive(Debug, Clone)]
enum Step {
    Begin(Entity),
    Insert {
        which: usize,
        poisoned: bool,
    },
    RollBackToSavepoint(usize),
    Prepare(usize),
    End {
        which: usize,
        commit: bool,
    },
    Restart,
    /// The lease runs out: its leader sleeps, or is cut off.
    Expire,
    Take(usize),
    Poll {
        relay: usize,
        limit: usize,
    },
    List(usize),
    AskSequence(usize),
    Write {
        relay: usize,
        partition: usize,
    },
    /// Of what a relay that is no more had on its way.
    WriteLate(usize),
    Acknowledge {
        relay: usize,
        partition: usize,
    },
    Save {
        relay: usize,
        max_ranges: usize,
        outcome: Outcome,
    },
    WorkOff {
        relay: usize,
        dies: bool,
    },
    Crash(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let outcome = prop_oneof![
        8 => Just(Outcome::Told),
        1 => any::<bool>().prop_map(|done| Outcome::Unknown { done }),
    ];
    // Mostly the first: with two that take turns all the time, none gets far.
    let relay = || prop::bool::weighted(0.2).prop_map(usize::from);
    prop_oneof![
        8 => (0..ENTITIES).prop_map(Step::Begin),
        4 => (0usize..4, prop::bool::weighted(0.1)).prop_map(|(which, poisoned)| Step::Insert { which, poisoned }),
        2 => (0usize..4).prop_map(Step::RollBackToSavepoint),
        1 => (0usize..4).prop_map(Step::Prepare),
        8 => (0usize..4, prop::bool::weighted(0.7)).prop_map(|(which, commit)| Step::End { which, commit }),
        1 => Just(Step::Restart),
        2 => Just(Step::Expire),
        5 => relay().prop_map(Step::Take),
        12 => (relay(), 1usize..5).prop_map(|(relay, limit)| Step::Poll { relay, limit }),
        7 => relay().prop_map(Step::List),
        2 => relay().prop_map(Step::AskSequence),
        12 => (relay(), 0..ENTITIES).prop_map(|(relay, partition)| Step::Write { relay, partition }),
        3 => (0..ENTITIES).prop_map(Step::WriteLate),
        10 => (relay(), 0..ENTITIES).prop_map(|(relay, partition)| Step::Acknowledge { relay, partition }),
        5 => (relay(), 1usize..3, outcome)
            .prop_map(|(relay, max_ranges, outcome)| Step::Save { relay, max_ranges, outcome }),
        2 => (relay(), any::<bool>()).prop_map(|(relay, dies)| Step::WorkOff { relay, dies }),
        2 => relay().prop_map(Step::Crash),
    ]
}

#[derive(Default)]
struct World {
    database: Database,
    topic: Topic,
    relays: [Option<Reader>; RELAYS],
    late: [VecDeque<Row>; ENTITIES],
}

impl World {
    /// What it has on its way may still be written, from the first record on.
    fn drop_relay(&mut self, relay: usize) {
        for (partition, queue) in self.relays[relay]
            .take()
            .into_iter()
            .flat_map(|r| r.queues)
            .enumerate()
        {
            // What was on its way before it comes first, or is lost on the way.
            self.late[partition] = queue.into_iter().map(|(_, row)| row).collect();
        }
    }

    /// A relay that may hand records over: its lease has not run out, as far as it knows.
    fn leader(&mut self, relay: usize) -> Option<&mut Reader> {
        let saved = &self.database.saved;
        self.relays[relay]
            .as_mut()
            .filter(|reader| !saved.expired && reader.epoch == saved.epoch)
    }

    fn step(&mut self, step: Step, fault: Option<Fault>) -> Result<(), TestCaseError> {
        match step {
            Step::Begin(entity) => self.database.begin(entity),
            Step::Insert { which, poisoned } => self.database.insert(which, poisoned),
            Step::RollBackToSavepoint(which) => self.database.roll_back_to_savepoint(which),
            Step::Prepare(which) => {
                if let Some(which) = self.database.pick(which) {
                    self.database.open[which].prepared = true;
                }
            }
            Step::End { which, commit } => self.database.end(which, commit),
            Step::Restart => {
                self.database.restart();
                if fault == Some(Fault::RestartUnnoticed) {
                    let server = self.database.server;
                    self.relays
                        .iter_mut()
                        .flatten()
                        .for_each(|reader| reader.server = server);
                } else {
                    (0..RELAYS).for_each(|relay| self.drop_relay(relay));
                }
            }
            Step::Expire => self.database.saved.expired = true,
            Step::Take(relay) => {
                let saved = &mut self.database.saved;
                let held = self
                    .relays
                    .iter()
                    .flatten()
                    .any(|reader| reader.epoch == saved.epoch);
                if self.relays[relay].is_none() && (saved.expired || !held) {
                    saved.epoch += 1;
                    saved.expired = false;
                    self.relays[relay] = Some(Reader::resume(&self.database));
                }
            }
            Step::Poll { relay, limit } if fault == Some(Fault::TwoStatements) => {
                self.two_statements(relay, limit);
            }
            Step::Poll { relay, limit } => {
                if self.leader(relay).is_some()
                    && let Some(reader) = &mut self.relays[relay]
                {
                    reader.poll(&self.database, &mut self.topic, limit, fault);
                }
            }
            Step::List(relay) => {
                if let Some(reader) = self.relays[relay].as_mut().filter(|r| r.tracker.wants_listing()) {
                    reader.list(&self.database, fault);
                }
            }
            Step::AskSequence(relay) => {
                if let Some(reader) = &mut self.relays[relay] {
                    reader.tracker.given(self.database.last_id);
                }
            }
            Step::Write { relay, partition } => {
                if let Some(reader) = &mut self.relays[relay] {
                    reader.write(partition, &mut self.topic);
                }
            }
            Step::WriteLate(partition) => {
                if let Some(row) = self.late[partition].pop_front() {
                    self.topic.0[row.entity].push(row.version);
                }
            }
            Step::Acknowledge { relay, partition } => {
                if let Some(reader) = &mut self.relays[relay] {
                    reader.acknowledge(partition);
                }
            }
            Step::Save {
                relay,
                max_ranges,
                outcome,
            } => {
                let Some(reader) = &mut self.relays[relay] else {
                    return Ok(());
                };
                let floor = self.database.saved.progress.floor;
                let done = match outcome {
                    Outcome::Unknown { done: false } => false,
                    _ => reader.save(&mut self.database, max_ranges, fault)?,
                };
                prop_assert!(
                    self.database.saved.progress.floor >= floor,
                    "the floor was set back"
                );
                if !done || outcome != Outcome::Told {
                    self.drop_relay(relay);
                } else if fault == Some(Fault::ParkedApart) {
                    self.database.quarantine.append(&mut reader.parked);
                }
            }
            Step::WorkOff { relay, dies } => {
                if self.leader(relay).is_some()
                    && let Some(reader) = &mut self.relays[relay]
                {
                    reader.work_off(&mut self.database, &mut self.topic, fault, dies);
                    if dies {
                        self.drop_relay(relay);
                    }
                }
            }
            Step::Crash(relay) => self.drop_relay(relay),
        }
        self.topic.check()?;
        self.database.check_progress(&self.topic)
    }

    /// Reads the holes, lets the oldest writers commit, and reads what is above the head.
    fn two_statements(&mut self, relay: usize, limit: usize) {
        if self.leader(relay).is_none() {
            return;
        }
        let Some(reader) = &mut self.relays[relay] else {
            return;
        };
        let holes: Vec<(i64, Row)> = self
            .database
            .committed
            .iter()
            .filter(|(id, _)| reader.tracker.holes().contains(**id))
            .map(|(id, row)| (*id, *row))
            .take(limit)
            .collect();
        self.database.end(0, true);
        let head = reader.tracker.head();
        let above = self
            .database
            .committed
            .range(head + 1..)
            .map(|(id, row)| (*id, *row));
        let rows: Vec<(i64, Row)> = holes.into_iter().chain(above).take(limit).collect();
        reader.took(rows, limit, &self.database, &mut self.topic, None);
    }
}

/// Runs a schedule, then lets the writers end and a relay go on: everything arrives, and nothing is left over.
fn run(steps: Vec<Step>, fault: Option<Fault>) -> Result<(), TestCaseError> {
    let mut world = World::default();
    for step in steps {
        world.step(step, fault)?;
    }
    while !world.database.open.is_empty() {
        world.database.end(0, true);
    }
    let relay = 0;
    world.drop_relay(1);
    for _ in 0..world.database.last_id * 4 + 16 {
        let mut steps = vec![
            Step::Take(relay),
            Step::AskSequence(relay),
            Step::List(relay),
            Step::Poll { relay, limit: 3 },
        ];
        for partition in 0..ENTITIES {
            steps.push(Step::Write { relay, partition });
            steps.push(Step::Acknowledge { relay, partition });
        }
        let outcome = Outcome::Told;
        steps.push(Step::Save {
            relay,
            max_ranges: 2,
            outcome,
        });
        steps.push(Step::WorkOff { relay, dies: false });
        for step in steps {
            world.step(step, fault)?;
        }
    }
    let World {
        database,
        topic,
        relays,
        ..
    } = world;
    for row in database.committed.values() {
        prop_assert!(topic.has(*row), "lost: {row:?}");
    }
    prop_assert!(database.quarantine.is_empty());
    let reader = relays[relay].as_ref().expect("it leads");
    prop_assert_eq!(reader.tracker.floor(), database.last_id);
    prop_assert!(reader.tracker.holes().is_empty());
    Ok(())
}

fn schedules(fault: Option<Fault>, cases: u32) -> Result<(), TestError<Vec<Step>>> {
    let config = Config {
        cases,
        failure_persistence: None,
        // A fault need not be understood, only found.
        max_shrink_iters: if fault.is_some() { 0 } else { 10_000 },
        ..Config::default()
    };
    let steps = prop::collection::vec(step(), 0..200);
    let mut runner = match fault {
        None => TestRunner::new(config),
        Some(_) => TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha)),
    };
    runner.run(&steps, |steps| run(steps, fault))
}

/// `PROPTEST_CASES` says how many.
#[test]
fn nothing_is_lost_and_order_holds() {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|text| text.parse().ok());
    if let Err(found) = schedules(None, cases.unwrap_or(3_000)) {
        panic!("{found}");
    }
}

#[test]
fn every_fault_is_found() {
    let unfound: Vec<Fault> = FAULTS
        .into_iter()
        .filter(|fault| schedules(Some(*fault), 5_000).is_ok())
        .collect();
    assert!(unfound.is_empty(), "{unfound:?}");
}
