//! Random schedules on a real database: writers with savepoints and prepared transactions, two readers with the relay's
//! own statements, one of which may be gone or have lost its lease at any step, and a Kafka that is a list.
//!
//! `SCHEDULE_SEED` runs one schedule again, `SCHEDULES` says how many there are.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use local_stack::testing::Database as TestDatabase;
use service::config;
use tokio_postgres::Client;

use super::lease::{Lease, QuarantineChanges};
use super::*;
use crate::config::{Config, ENV_PREFIX, Layout};
use crate::protocol::Tracker;
use crate::source::ahead::Reader;

const ENTITIES: usize = 3;
const WRITERS: usize = 4;
const STEPS: usize = 90;
const TTL: Duration = Duration::from_secs(60);
/// The server has room for few.
const PREPARED: usize = 2;

/// splitmix64
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % bound as u64).expect("below the bound")
    }
}

/// An open transaction, which has its entity to itself.
#[derive(Debug)]
struct Open {
    entity: usize,
    ids: Vec<i64>,
}

struct Leader {
    tracker: Tracker<String>,
    ahead: Option<Ahead>,
    lease: Lease,
    queues: [VecDeque<i64>; ENTITIES],
    unacknowledged: [VecDeque<i64>; ENTITIES],
}

/// A read that was begun before the rows of the last one were dealt with.
struct Ahead {
    asked: Seen,
    fence: Option<u64>,
    batch: Batch,
}

struct World<'w> {
    random: Random,
    clients: &'w [Client],
    control: &'w Client,
    sources: [Source; 2],
    /// For reading much.
    bulk: [Reader; 2],
    database: &'w str,
    table: String,
    writers: [Option<Open>; WRITERS],
    prepared: Vec<(String, Open)>,
    last_prepared: usize,
    /// Entity and version of each id that is committed.
    committed: BTreeMap<i64, (usize, usize)>,
    versions: [usize; ENTITIES],
    readers: [Option<Leader>; 2],
    topic: Vec<i64>,
}

type Checked = Result<(), String>;

fn require(condition: bool, problem: impl FnOnce() -> String) -> Checked {
    if condition { Ok(()) } else { Err(problem()) }
}

impl World<'_> {
    async fn sql(&self, writer: usize, sql: &str) {
        self.clients[writer].batch_execute(sql).await.expect(sql);
    }

    async fn insert(&mut self, writer: usize) -> i64 {
        let open = self.writers[writer].as_ref().expect("it is open");
        let version = self.versions[open.entity] + open.ids.len() + 1;
        let sql = format!(
            "INSERT INTO {} (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source)
             VALUES (gen_random_uuid(), 'test', '{}', {version}, 'test.moved', '/test') RETURNING id",
            self.table, open.entity
        );
        self.clients[writer]
            .query_one(&sql, &[])
            .await
            .expect("inserted")
            .get(0)
    }

    async fn write(&mut self, writer: usize) {
        let choice = self.random.below(10);
        if self.writers[writer].is_none() {
            let entity = self.random.below(ENTITIES);
            let mut others = self
                .writers
                .iter()
                .flatten()
                .chain(self.prepared.iter().map(|(_, open)| open));
            if others.all(|open| open.entity != entity) {
                self.sql(writer, "BEGIN").await;
                self.writers[writer] = Some(Open { entity, ids: vec![] });
                let id = self.insert(writer).await;
                self.writers[writer].as_mut().expect("open").ids.push(id);
            }
            return;
        }
        match choice {
            0..3 => {
                let id = self.insert(writer).await;
                self.writers[writer].as_mut().expect("open").ids.push(id);
            }
            3 => {
                self.sql(writer, "SAVEPOINT s").await;
                self.insert(writer).await;
                self.sql(writer, "ROLLBACK TO SAVEPOINT s").await;
            }
            4 if self.prepared.len() < PREPARED => {
                self.last_prepared += 1;
                let name = format!("{} {} {}", self.database, self.table, self.last_prepared);
                self.sql(writer, &format!("PREPARE TRANSACTION '{name}'")).await;
                let open = self.writers[writer].take().expect("open");
                self.prepared.push((name, open));
            }
            4..6 => {
                self.sql(writer, "ROLLBACK").await;
                self.writers[writer] = None;
            }
            _ => {
                self.sql(writer, "COMMIT").await;
                let open = self.writers[writer].take().expect("open");
                self.commit(open);
            }
        }
    }

    fn commit(&mut self, open: Open) {
        for id in open.ids {
            self.versions[open.entity] += 1;
            self.committed
                .insert(id, (open.entity, self.versions[open.entity]));
        }
    }

    async fn end_prepared(&mut self, commits: bool) {
        if let Some((name, open)) = self.prepared.pop() {
            let end = if commits { "COMMIT" } else { "ROLLBACK" };
            let sql = format!("{end} PREPARED '{name}'");
            self.control.batch_execute(&sql).await.expect("ended");
            if commits {
                self.commit(open);
            }
        }
    }

    async fn poll(&mut self, which: usize, limit: i64) {
        let Some(reader) = &mut self.readers[which] else {
            return;
        };
        let tracker = &mut reader.tracker;
        let ahead = reader.ahead.take();
        let (batch, passed) = match ahead.filter(|ahead| ahead.asked.serves(tracker.seen())) {
            Some(Ahead { fence, batch, .. }) => (batch, fence.is_some() && fence == tracker.passed_fence()),
            None => {
                let passed = tracker.fence_is_passed();
                let expected = self.random.below(2) == 0;
                let read = self.sources[which].read(tracker.seen(), limit, usize::MAX, expected);
                (read.await.expect("read"), passed)
            }
        };
        if batch.read.full {
            let fence = tracker.passed_fence();
            let mut asked = tracker.seen().clone();
            for row in &batch.rows {
                asked.observe(row.id());
            }
            let read = self.bulk[which].read(&asked, limit, usize::MAX).await;
            let batch = read.expect("read");
            reader.ahead = Some(Ahead { asked, fence, batch });
        }
        for row in &batch.rows {
            let id = row.id();
            if tracker.observe(id) {
                let mut columns = row.columns();
                let (_id, _event, _type) = (columns.bytes(), columns.bytes(), columns.bytes());
                let key = columns.text().expect("text").expect("a key");
                let entity: usize = key.parse().expect("a number");
                reader.queues[entity].push_back(id);
            }
        }
        if passed {
            tracker.end_fence(batch.read);
        }
    }

    async fn save(&mut self, which: usize, max_ranges: usize) -> Checked {
        let leads = self.epoch_and_saves().await;
        let Some(reader) = &mut self.readers[which] else {
            return Ok(());
        };
        let mine = (reader.lease.epoch, reader.lease.saves);
        let progress = reader.tracker.progress(max_ranges);
        let changes = QuarantineChanges::default();
        let saved = self.sources[which]
            .save(&mut reader.lease, &progress, TTL, None, &changes)
            .await;
        require(saved.is_ok() == (leads == mine), || {
            format!("a save of {mine:?} while {leads:?} is there: {saved:?}")
        })?;
        if saved.is_err() {
            self.readers[which] = None;
            return Ok(());
        }
        let done = |id: i64| id <= progress.floor || progress.published.contains(id);
        let lost = self
            .committed
            .keys()
            .find(|id| done(**id) && !self.topic.contains(id));
        require(lost.is_none(), || {
            format!("{lost:?} is saved as done, and not published")
        })?;
        let open = self
            .writers
            .iter()
            .flatten()
            .chain(self.prepared.iter().map(|(_, open)| open));
        let lost = open.flat_map(|open| &open.ids).find(|id| done(**id));
        require(lost.is_none(), || {
            format!("{lost:?} is given up, and may be committed yet")
        })
    }

    async fn epoch_and_saves(&self) -> (i64, i64) {
        let sql = "SELECT epoch, saves FROM outbox_relay WHERE name = $1";
        let row = self.control.query_opt(sql, &[&self.table]).await.expect("read");
        row.map_or((0, 0), |row| (row.get(0), row.get(1)))
    }

    async fn step(&mut self) -> Checked {
        // Mostly the first: of two that take turns all the time, none gets far.
        let which = usize::from(self.random.below(5) == 0);
        match self.random.below(40) {
            0..12 => {
                let writer = self.random.below(WRITERS);
                self.write(writer).await;
            }
            12 => {
                let commits = self.random.below(3) > 0;
                self.end_prepared(commits).await;
            }
            13..16 => self.take(which).await,
            16 => {
                let sql = "UPDATE outbox_relay SET expires_at = '-infinity' WHERE name = $1";
                self.control.execute(sql, &[&self.table]).await.expect("expired");
            }
            17..24 => {
                let limit = 1 + self.random.below(4) as i64;
                self.poll(which, limit).await;
            }
            24..28 => self.list(which).await,
            28 => self.ask(which).await,
            29..36 => {
                let entity = self.random.below(ENTITIES);
                self.publish(which, entity);
                if self.random.below(3) > 0 {
                    self.acknowledge(which, entity);
                }
            }
            36..39 => {
                let max_ranges = 1 + self.random.below(3);
                self.save(which, max_ranges).await?;
            }
            _ => self.readers[which] = None,
        }
        Ok(())
    }

    async fn take(&mut self, which: usize) {
        if self.readers[which].is_none() {
            let owner = format!("reader {which}");
            let lease = self.sources[which]
                .acquire(&owner, None, TTL)
                .await
                .expect("asked");
            self.readers[which] = lease.map(|lease| Leader {
                tracker: Tracker::resume(lease.progress.clone()),
                ahead: None,
                lease,
                queues: Default::default(),
                unacknowledged: Default::default(),
            });
        }
    }

    async fn list(&mut self, which: usize) {
        if let Some(reader) = self.readers[which].as_mut().filter(|r| r.tracker.wants_listing()) {
            let writers = self.sources[which].open_writers().await.expect("listed");
            reader.tracker.list(writers);
        }
    }

    async fn ask(&mut self, which: usize) {
        if let Some(reader) = &mut self.readers[which] {
            let given = self.sources[which].last_id_given().await.expect("asked");
            reader.tracker.given(given.unwrap_or(0));
        }
    }

    fn publish(&mut self, which: usize, entity: usize) {
        if let Some(reader) = &mut self.readers[which]
            && let Some(id) = reader.queues[entity].pop_front()
        {
            self.topic.push(id);
            reader.unacknowledged[entity].push_back(id);
        }
    }

    fn acknowledge(&mut self, which: usize, entity: usize) {
        if let Some(reader) = &mut self.readers[which]
            && let Some(id) = reader.unacknowledged[entity].pop_front()
        {
            reader.tracker.published(id);
        }
    }

    async fn run(&mut self) -> Checked {
        for _ in 0..STEPS {
            self.step().await?;
        }
        for writer in 0..WRITERS {
            if let Some(open) = self.writers[writer].take() {
                self.sql(writer, "COMMIT").await;
                self.commit(open);
            }
        }
        while !self.prepared.is_empty() {
            self.end_prepared(true).await;
        }
        let sql = "UPDATE outbox_relay SET expires_at = '-infinity' WHERE name = $1";
        self.control.execute(sql, &[&self.table]).await.expect("expired");
        self.readers = [None, None];
        self.take(0).await;
        let last = self.sources[0].last_id_given().await.expect("asked").unwrap_or(0);
        for _ in 0..last + 5 {
            self.ask(0).await;
            self.list(0).await;
            self.poll(0, 20).await;
            for entity in 0..ENTITIES {
                for _ in 0..20 {
                    self.publish(0, entity);
                    self.acknowledge(0, entity);
                }
            }
            let floor = self.readers[0]
                .as_ref()
                .map_or(0, |reader| reader.tracker.floor());
            if floor == last {
                break;
            }
        }
        self.save(0, 3).await?;
        self.judge(last)
    }

    fn judge(&self, last: i64) -> Checked {
        let mut seen = BTreeSet::new();
        let mut reached = [0; ENTITIES];
        for id in self.topic.iter().filter(|id| seen.insert(**id)) {
            let Some((entity, version)) = self.committed.get(id) else {
                return Err(format!("{id} was never committed"));
            };
            require(reached[*entity] + 1 == *version, || {
                format!("version {version} of {entity} follows {}", reached[*entity])
            })?;
            reached[*entity] = *version;
        }
        require(reached == self.versions, || {
            format!("lost: {reached:?} of {:?}", self.versions)
        })?;
        let floor = self.readers[0].as_ref().map(|reader| reader.tracker.floor());
        require(floor == Some(last), || {
            format!("the floor stays at {floor:?} of {last}")
        })
    }
}

#[tokio::test]
async fn nothing_is_lost_and_order_holds_in_any_schedule() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds: Vec<u64> = match number("SCHEDULE_SEED") {
        Some(seed) => vec![seed],
        None => {
            let first = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_nanos() as u64;
            (0..number("SCHEDULES").unwrap_or(100))
                .map(|n| first.wrapping_add(n))
                .collect()
        }
    };
    let database = TestDatabase::empty().await;
    let control = database.connect().await.expect("connected");
    let mut clients = Vec::new();
    for _ in 0..WRITERS {
        clients.push(database.connect().await.expect("connected"));
    }
    let (mut published, mut repeats) = (0, 0);
    for (position, seed) in seeds.iter().enumerate() {
        let table = format!("s{position}");
        let name: TableName = format!("public.{table}").parse().expect("a name");
        let schema = crate::schema::script(&name, &Layout::default(), &[]);
        control.batch_execute(&schema).await.expect("created");
        let toml = format!(
            "kafka.brokers = \"none:1\"\n[outbox.{table}]\ndatabase_url = \"{}\"\ntable = \"public.{table}\"\nlease_ttl = \"60s\"",
            database.url()
        );
        let config =
            config::parse(config::Sources::new(ENV_PREFIX).toml(&toml), Config::read).expect("valid");
        let outbox = &config.outboxes[&table];
        let connect = async || Source::connect(&table, outbox).await.expect("fit");
        let sources = [connect().await, connect().await];
        let connect = async |source| Reader::connect(source, outbox).await.expect("connected");
        let bulk = [connect(&sources[0]).await, connect(&sources[1]).await];
        let mut world = World {
            random: Random(*seed),
            clients: &clients,
            control: &control,
            bulk,
            sources,
            database: database.name(),
            table: table.clone(),
            writers: Default::default(),
            prepared: Vec::new(),
            last_prepared: 0,
            committed: BTreeMap::new(),
            versions: [0; ENTITIES],
            readers: [None, None],
            topic: Vec::new(),
        };
        let ran = world.run().await;
        while !world.prepared.is_empty() {
            // The server is shared: it must not keep them.
            world.end_prepared(false).await;
        }
        if let Err(problem) = ran {
            panic!("SCHEDULE_SEED={seed}: {problem}");
        }
        published += world.committed.len();
        repeats += world.topic.len() - world.committed.len();
    }
    #[expect(clippy::print_stdout, reason = "shown with the test's result")]
    {
        println!("{} schedules, {published} rows, {repeats} repeats", seeds.len());
    }
}
