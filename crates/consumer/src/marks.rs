//! Version marks: what is new, what is a repeat, what is missing.
//!
//! A mark is the version of an entity that this consumer has come to in a topic. Two instances can hold the same record at the same
//! time (one was stopped and does not know that it lost the partition). Both read the marks, both decide; then
//! [`advance`] moves each mark only from the version that was read, in the effect's own transaction. The second one waits for the first
//! to end, sees the moved mark, and its whole batch is rolled back and decided again. So an effect happens once, whatever Kafka
//! thinks about who owns the partition.

use std::collections::{BTreeMap, HashMap};

use diesel::sql_types::{Array, BigInt, Text, Uuid as SqlUuid};
use diesel::{QueryResult, QueryableByName};
use diesel_async::{AsyncPgConnection, RunQueryDsl as _};
use uuid::Uuid;

use crate::config::Start;
use crate::record::Record;

/// An entity in a topic.
pub(crate) type Key<'a> = (&'a str, &'a str);

/// How far an entity has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) version: i64,
    pub(crate) event_id: Uuid,
}

/// What to do with each record of a batch.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan<'a> {
    /// Positions of the records to apply, in order.
    pub(crate) fresh: Vec<usize>,
    /// Positions of those whose effect is there already.
    pub(crate) repeats: Vec<usize>,
    /// Among the repeats, those that carry the mark's version in another event.
    pub(crate) ghosts: Vec<usize>,
    /// Records ahead of their turn, each the first such of its partition.
    pub(crate) gaps: Vec<Gap>,
    /// Positions behind a gap in the same partition.
    pub(crate) behind: Vec<usize>,
    /// The marks to move, by key.
    pub(crate) advances: BTreeMap<Key<'a>, Advance>,
}

/// A record whose predecessor is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gap {
    pub(crate) position: usize,
    pub(crate) expected: i64,
}

/// One mark's move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Advance {
    /// The version read; `None`: there was no mark.
    pub(crate) from: Option<i64>,
    pub(crate) to: Mark,
}

/// Decides about `records`, which are in order, given the marks as they were read.
pub(crate) fn plan<'a>(
    records: &[&'a Record],
    marks: &HashMap<(String, String), Mark>,
    start: impl Fn(&str) -> Start,
) -> Plan<'a> {
    let mut plan = Plan::default();
    let mut stopped: Vec<(&str, i32)> = Vec::new();
    for (position, record) in records.iter().enumerate() {
        let partition = (&*record.topic, record.partition);
        if stopped.contains(&partition) {
            plan.behind.push(position);
            continue;
        }
        let key: Key<'a> = (&record.topic, &record.envelope.entity_id);
        let read = marks.get(&(key.0.to_owned(), key.1.to_owned())).copied();
        let mark = plan.advances.get(&key).map(|advance| advance.to).or(read);
        let found = Mark {
            version: record.envelope.version,
            event_id: record.envelope.event_id,
        };
        let expected = match (mark, start(key.0)) {
            (Some(mark), _) => mark.version + 1,
            (None, Start::Beginning) => 1,
            (None, Start::Baseline) => found.version,
        };
        if found.version < expected {
            if mark.is_some_and(|mark| mark.version == found.version && mark.event_id != found.event_id) {
                plan.ghosts.push(position);
            }
            plan.repeats.push(position);
        } else if found.version > expected {
            stopped.push(partition);
            plan.gaps.push(Gap { position, expected });
        } else {
            plan.fresh.push(position);
            plan.advances
                .entry(key)
                .and_modify(|advance| advance.to = found)
                .or_insert(Advance {
                    from: read.map(|mark| mark.version),
                    to: found,
                });
        }
    }
    plan
}

#[derive(QueryableByName)]
struct MarkRow {
    #[diesel(sql_type = Text)]
    topic: String,
    #[diesel(sql_type = Text)]
    entity_id: String,
    #[diesel(sql_type = BigInt)]
    version: i64,
    #[diesel(sql_type = SqlUuid)]
    event_id: Uuid,
}

/// Reads the marks of the entities of `records`.
///
/// Not a cached statement: planned while the table was empty, its generic plan would scan the whole table later on.
pub(crate) async fn read(
    connection: &mut AsyncPgConnection,
    consumer: &str,
    records: &[&Record],
) -> QueryResult<HashMap<(String, String), Mark>> {
    let mut keys: Vec<Key<'_>> = records
        .iter()
        .map(|record| (&*record.topic, record.envelope.entity_id.as_str()))
        .collect();
    keys.sort_unstable();
    keys.dedup();
    let (topics, entities): (Vec<&str>, Vec<&str>) = keys.into_iter().unzip();
    let rows: Vec<MarkRow> = diesel::sql_query(
        "SELECT m.topic, m.entity_id, m.version, m.event_id \
         FROM unnest($2, $3) AS k(topic, entity_id) \
         JOIN consumer_marks m ON m.consumer = $1 AND m.topic = k.topic AND m.entity_id = k.entity_id",
    )
    .bind::<Text, _>(consumer)
    .bind::<Array<Text>, _>(topics)
    .bind::<Array<Text>, _>(entities)
    .load(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            (
                (row.topic, row.entity_id),
                Mark {
                    version: row.version,
                    event_id: row.event_id,
                },
            )
        })
        .collect())
}

#[derive(QueryableByName)]
struct Moved {
    #[diesel(sql_type = BigInt)]
    moved: i64,
}

/// Moves the marks; `false` when one of them was moved by someone else since it was read: roll back and decide again.
///
/// Keys are taken in order, so that two instances with the same entities rarely deadlock; when they do, PostgreSQL ends one of them
/// and it is decided again too.
pub(crate) async fn advance(
    connection: &mut AsyncPgConnection,
    consumer: &str,
    advances: &BTreeMap<Key<'_>, Advance>,
) -> QueryResult<bool> {
    let mut topics = Vec::with_capacity(advances.len());
    let mut entities = Vec::with_capacity(advances.len());
    let mut from = Vec::with_capacity(advances.len());
    let mut to = Vec::with_capacity(advances.len());
    let mut events = Vec::with_capacity(advances.len());
    for ((topic, entity), advance) in advances {
        topics.push(*topic);
        entities.push(*entity);
        from.push(advance.from.unwrap_or(0));
        to.push(advance.to.version);
        events.push(advance.to.event_id);
    }
    let Moved { moved } = diesel::sql_query(
        "WITH given AS ( \
             SELECT * FROM unnest($2, $3, $4, $5, $6) AS g(topic, entity_id, from_version, to_version, event_id) \
         ), changed AS ( \
             UPDATE consumer_marks m SET version = g.to_version, event_id = g.event_id FROM given g \
             WHERE g.from_version > 0 AND m.consumer = $1 AND m.topic = g.topic AND m.entity_id = g.entity_id \
               AND m.version = g.from_version \
             RETURNING 1 \
         ), made AS ( \
             INSERT INTO consumer_marks (consumer, topic, entity_id, version, event_id) \
             SELECT $1, topic, entity_id, to_version, event_id FROM given WHERE from_version = 0 \
             ON CONFLICT DO NOTHING \
             RETURNING 1 \
         ) \
         SELECT (SELECT count(*) FROM changed) + (SELECT count(*) FROM made) AS moved",
    )
    .bind::<Text, _>(consumer)
    .bind::<Array<Text>, _>(topics)
    .bind::<Array<Text>, _>(entities)
    .bind::<Array<BigInt>, _>(from)
    .bind::<Array<BigInt>, _>(to)
    .bind::<Array<SqlUuid>, _>(events)
    .get_result(connection)
    .await?;
    Ok(moved == advances.len() as i64)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use envelope::Envelope;
    use proptest::prelude::*;

    use super::*;

    fn record(entity: &str, version: i64, partition: i32) -> Record {
        Record {
            envelope: Envelope {
                event_id: event_id(entity, version),
                event_type: "order.placed".into(),
                source: "/test".into(),
                entity_type: "order".into(),
                entity_id: entity.into(),
                version,
                schema_version: 1,
                occurred_at: chrono::DateTime::UNIX_EPOCH,
                content_type: "application/protobuf".into(),
                data_schema: None,
                correlation_id: None,
                causation_id: None,
                traceparent: None,
                tracestate: None,
                outbox_id: None,
                metadata: BTreeMap::new(),
            },
            payload: vec![],
            topic: "t".into(),
            partition,
            offset: 0,
            timestamp: None,
        }
    }

    fn event_id(entity: &str, version: i64) -> Uuid {
        Uuid::from_u128(
            (u128::from(entity.bytes().map(u64::from).sum::<u64>()) << 64) | version.unsigned_abs() as u128,
        )
    }

    fn marked(entity: &str, version: i64) -> ((String, String), Mark) {
        (
            ("t".into(), entity.into()),
            Mark {
                version,
                event_id: event_id(entity, version),
            },
        )
    }

    #[track_caller]
    fn check(
        marks: &[(&str, i64)],
        records: &[Record],
        start: Start,
        expect: impl FnOnce(Plan<'_>) -> (Vec<usize>, Vec<usize>),
        fresh: &[usize],
        other: &[usize],
    ) {
        let marks = marks
            .iter()
            .map(|(entity, version)| marked(entity, *version))
            .collect();
        let records: Vec<&Record> = records.iter().collect();
        assert_eq!(
            expect(plan(&records, &marks, |_| start)),
            (fresh.to_vec(), other.to_vec())
        );
    }

    fn fresh_and_repeats(plan: Plan<'_>) -> (Vec<usize>, Vec<usize>) {
        (plan.fresh, plan.repeats)
    }

    fn fresh_and_gaps(plan: Plan<'_>) -> (Vec<usize>, Vec<usize>) {
        (plan.fresh, plan.gaps.iter().map(|gap| gap.position).collect())
    }

    #[test]
    fn repeats_are_recognised_against_the_mark_and_within_the_batch() {
        let records = [
            record("a", 2, 0),
            record("a", 3, 0),
            record("a", 3, 0),
            record("b", 1, 0),
        ];
        check(
            &[("a", 2)],
            &records,
            Start::Beginning,
            fresh_and_repeats,
            &[1, 3],
            &[0, 2],
        );
    }

    #[test]
    fn a_gap_stops_its_partition_and_no_other() {
        let records = [
            record("a", 1, 0),
            record("a", 3, 0),
            record("b", 1, 0),
            record("c", 1, 1),
        ];
        check(&[], &records, Start::Beginning, fresh_and_gaps, &[0, 3], &[1]);
    }

    #[test]
    fn without_a_mark_the_first_version_is_one_unless_there_is_a_baseline() {
        let records = [record("a", 5, 0), record("a", 6, 0), record("a", 8, 0)];
        check(&[], &records, Start::Beginning, fresh_and_gaps, &[], &[0]);
        check(&[], &records, Start::Baseline, fresh_and_gaps, &[0, 1], &[2]);
    }

    #[test]
    fn the_same_version_in_another_event_is_a_ghost() {
        let mut other = record("a", 2, 0);
        other.envelope.event_id = Uuid::from_u128(99);
        let records = [&other, &record("a", 1, 0)];
        let plan = plan(&records, &[marked("a", 2)].into(), |_| Start::Beginning);
        assert_eq!((plan.ghosts, plan.repeats), (vec![0], vec![0, 1]));
    }

    proptest! {
        /// However a topic is cut into batches and however often parts of it are repeated, every version is fresh exactly
        /// once, in order, and the marks end at the last.
        #[test]
        fn every_version_is_fresh_once(
            lengths in prop::collection::vec(1_i64..6, 1..4),
            cuts in prop::collection::vec((0_usize..20, 1_usize..6), 1..30),
        ) {
            let entities = ["a", "b", "c"];
            let topic: Vec<Record> = (1..6)
                .flat_map(|version| {
                    let lengths = &lengths;
                    entities.iter().zip(lengths).filter(move |(_, length)| version <= **length)
                        .map(move |(entity, _)| record(entity, version, 0))
                })
                .collect();
            let mut marks: HashMap<(String, String), Mark> = HashMap::new();
            let mut applied: Vec<(String, i64)> = Vec::new();
            let mut reached = 0_usize;
            // Each step goes back a little, as after a crash, and reads on from there; the last reads everything.
            let steps = cuts.into_iter().chain([(20, topic.len())]);
            for (back, length) in steps {
                let from = reached.min(reached.saturating_sub(back));
                let to = (from + length).min(topic.len());
                let batch: Vec<&Record> = topic[from..to].iter().collect();
                let plan = plan(&batch, &marks, |_| Start::Beginning);
                prop_assert!(plan.gaps.is_empty() && plan.ghosts.is_empty());
                for position in &plan.fresh {
                    let envelope = &batch[*position].envelope;
                    applied.push((envelope.entity_id.clone(), envelope.version));
                }
                for (key, advance) in &plan.advances {
                    let key = (key.0.to_owned(), key.1.to_owned());
                    prop_assert_eq!(marks.get(&key).map(|mark| mark.version), advance.from);
                    marks.insert(key, advance.to);
                }
                reached = reached.max(to);
            }
            for (entity, length) in entities.iter().zip(&lengths) {
                let versions: Vec<i64> =
                    applied.iter().filter(|(id, _)| id == entity).map(|(_, version)| *version).collect();
                if reached == topic.len() {
                    prop_assert_eq!(versions, (1..=*length).collect::<Vec<_>>());
                }
            }
        }
    }
}
