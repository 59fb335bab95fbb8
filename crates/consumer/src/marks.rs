//! Version marks: what is new, what is a repeat, what is missing, what waits.
//!
//! A mark is the version of an entity that this consumer has come to in a topic, and whether the entity is parked. Two instances can
//! hold the same record at the same time (one was stopped and does not know that it lost the partition), and an operator can replay what is
//! parked. All of them read the mark and decide; then [`advance`] moves each mark only from the state that was read, in the
//! effect's own transaction. The second one waits for the first to end, sees the moved mark, and its whole batch is rolled back and
//! decided again. So an effect happens once, whatever Kafka thinks about who owns the partition.

use std::collections::{BTreeMap, HashMap, HashSet};

use diesel::sql_types::{Array, BigInt, Bool, Integer, Nullable, Text, Uuid as SqlUuid};
use diesel::{QueryResult, QueryableByName};
use diesel_async::{AsyncPgConnection, RunQueryDsl as _};
use uuid::Uuid;

use crate::config::Start;

/// An entity in a topic.
pub(crate) type Key<'a> = (&'a str, &'a str);

/// How far an entity has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    /// 0: nothing was applied yet.
    pub(crate) version: i64,
    /// `None` with version 0.
    pub(crate) event_id: Option<Uuid>,
    pub(crate) parked: bool,
}

/// What has to be known of a record to decide about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate<'a> {
    pub(crate) topic: &'a str,
    /// `None`: it has no key that names one.
    pub(crate) entity: Option<&'a str>,
    /// Version, 0 where the source does not count, and id. `None`: its envelope cannot be read.
    pub(crate) event: Option<(i64, Uuid)>,
    /// It can never be handled.
    pub(crate) refused: bool,
    pub(crate) known: Known,
}

/// What is known of a record from before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    Nothing,
    /// It is in the table of parked records, whatever became of it.
    Parked,
    /// An operator gave it up.
    Discarded,
    /// It is an event of a source that does not count, and took effect.
    Seen,
}

/// What to do with each record of a batch.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan<'a> {
    /// Positions of the records to apply, in order.
    pub(crate) fresh: Vec<usize>,
    /// Positions of those whose effect is there already, or that are parked already.
    pub(crate) repeats: Vec<usize>,
    /// Among the repeats, those that carry the mark's version in another event.
    pub(crate) ghosts: Vec<usize>,
    /// Positions of those that were given up before: they count, and have no effect.
    pub(crate) discarded: Vec<usize>,
    /// Records to park, in order.
    pub(crate) parks: Vec<Park>,
    /// The marks to move, by key.
    pub(crate) advances: BTreeMap<Key<'a>, Advance>,
}

/// A record to park.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Park {
    pub(crate) position: usize,
    pub(crate) why: Why,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    Refused,
    /// Its predecessor is missing.
    Gap {
        expected: i64,
    },
    /// An earlier one of its entity is parked.
    Behind,
}

/// One mark's move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Advance {
    /// As it was read; `None`: there was no mark.
    pub(crate) from: Option<Mark>,
    pub(crate) to: Mark,
}

/// The marks of entities that have one.
pub(crate) type Marks<'a> = HashMap<Key<'a>, Mark, ahash::RandomState>;

const NO_MARK: Mark = Mark {
    version: 0,
    event_id: None,
    parked: false,
};

/// Which marks are taken for granted when `records` come, which are in order, and which have to be looked up.
///
/// Nearly always, the first record of an entity in a batch is the next one of it, and nothing of it is parked: then its mark need not
/// be read to be moved, since [`advance`] moves it only from there. Whoever presumes wrongly has done nothing, and looks.
pub(crate) fn presume<'a>(
    records: &[Candidate<'a>],
    is_parked: impl Fn(&Key<'a>) -> bool,
    start: impl Fn(&str) -> Start,
) -> (Marks<'a>, Vec<Key<'a>>) {
    let mut presumed: HashMap<Key<'a>, Option<Mark>, ahash::RandomState> = HashMap::default();
    let mut unknown: HashSet<Key<'a>, ahash::RandomState> = HashSet::default();
    for record in records {
        let Some(entity) = record.entity else { continue };
        let key: Key<'a> = (record.topic, entity);
        match record.event {
            Some((version, _)) if !record.refused && record.known == Known::Nothing => {
                presumed.entry(key).or_insert((version > 1).then_some(Mark {
                    version: version - 1,
                    event_id: None,
                    parked: false,
                }));
            }
            // It would be parked, with the mark's event, which is not known.
            _ => _ = unknown.insert(key),
        }
    }
    let is_known = |key: &Key<'a>| start(key.0) == Start::Beginning && !is_parked(key);
    unknown.extend(presumed.keys().filter(|key| !is_known(key)));
    presumed.retain(|key, _| !unknown.contains(key));
    let marks = presumed.into_iter().filter_map(|(key, mark)| Some((key, mark?)));
    (marks.collect(), unknown.into_iter().collect())
}

/// Decides about `records`, which are in order, given the marks as they were read or presumed.
pub(crate) fn plan<'a>(
    records: &[Candidate<'a>],
    marks: &Marks<'a>,
    start: impl Fn(&str) -> Start,
) -> Plan<'a> {
    let mut plan = Plan::default();
    let mut parked: HashSet<(Key<'a>, i64)> = HashSet::new();
    let mut seen: HashSet<(&str, Uuid)> = HashSet::new();
    for (position, record) in records.iter().enumerate() {
        let refused = Park {
            position,
            why: Why::Refused,
        };
        let Some(entity) = record.entity else {
            match record.known {
                Known::Nothing => plan.parks.push(refused),
                Known::Parked | Known::Discarded | Known::Seen => plan.repeats.push(position),
            }
            continue;
        };
        let key: Key<'a> = (record.topic, entity);
        let read = marks.get(&key).copied();
        let moved = plan.advances.get(&key).map(|advance| advance.to);
        let now = moved.or(read).unwrap_or(NO_MARK);
        let park = |plan: &mut Plan<'a>, why| {
            plan.parks.push(Park { position, why });
            plan.set(key, read, Mark { parked: true, ..now });
        };
        let Some((version, event_id)) = record.event else {
            match record.known {
                Known::Nothing => park(&mut plan, if now.parked { Why::Behind } else { Why::Refused }),
                Known::Parked | Known::Discarded | Known::Seen => plan.repeats.push(position),
            }
            continue;
        };
        if version == 0 {
            let to = Mark {
                version: now.version + 1,
                event_id: Some(event_id),
                parked: false,
            };
            if matches!(record.known, Known::Seen | Known::Parked) || !seen.insert((key.0, event_id)) {
                plan.repeats.push(position);
            } else if now.parked {
                park(&mut plan, Why::Behind);
            } else if record.known == Known::Discarded {
                plan.discarded.push(position);
                plan.set(key, read, to);
            } else if record.refused {
                park(&mut plan, Why::Refused);
            } else {
                plan.fresh.push(position);
                plan.set(key, read, to);
            }
            continue;
        }
        if version <= now.version {
            // The event of a mark that is presumed is not known; a repeat of that is seen before the mark is moved.
            if version == now.version && now.event_id.is_some_and(|known| known != event_id) {
                plan.ghosts.push(position);
            }
            plan.repeats.push(position);
            continue;
        }
        let to = Mark {
            version,
            event_id: Some(event_id),
            parked: false,
        };
        let expected = match start(key.0) {
            Start::Baseline if now.version == 0 => version,
            Start::Baseline | Start::Beginning | Start::Uncounted => now.version + 1,
        };
        if now.parked {
            if parked.insert((key, version)) {
                park(&mut plan, Why::Behind);
            } else {
                plan.repeats.push(position);
            }
        } else if record.known == Known::Discarded {
            plan.discarded.push(position);
            plan.set(key, read, to);
        } else if version > expected {
            parked.insert((key, version));
            park(&mut plan, Why::Gap { expected });
        } else if record.refused {
            parked.insert((key, version));
            park(&mut plan, Why::Refused);
        } else {
            plan.fresh.push(position);
            plan.set(key, read, to);
        }
    }
    plan
}

impl<'a> Plan<'a> {
    fn set(&mut self, key: Key<'a>, read: Option<Mark>, to: Mark) {
        self.advances
            .entry(key)
            .and_modify(|advance| advance.to = to)
            .or_insert(Advance { from: read, to });
    }
}

/// Which generation of a consumer's marks is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Generation {
    Live,
    Of(i32),
}

/// The marks that were asked for, and their generation.
#[derive(Debug)]
pub(crate) struct Read<'a> {
    pub(crate) generation: i32,
    pub(crate) marks: Marks<'a>,
}

#[derive(QueryableByName)]
struct MarkRow {
    #[diesel(sql_type = Integer)]
    generation: i32,
    #[diesel(sql_type = BigInt)]
    position: i64,
    #[diesel(sql_type = Nullable<BigInt>)]
    version: Option<i64>,
    #[diesel(sql_type = Nullable<SqlUuid>)]
    event_id: Option<Uuid>,
    #[diesel(sql_type = Nullable<Bool>)]
    parked: Option<bool>,
}

impl Generation {
    /// In SQL, the number that `$n` has is meant, or the one that is live where that is NULL.
    fn given(self) -> Option<i32> {
        match self {
            Self::Live => None,
            Self::Of(generation) => Some(generation),
        }
    }
}

/// Reads the marks of these entities, each of which may come more than once.
///
/// Not a cached statement: planned while the table was empty, its generic plan would scan the whole table later on. And one look into the
/// index per entity, by OFFSET 0: of a generation that is new, PostgreSQL has no figures, and would read all of it.
pub(crate) async fn read<'a>(
    connection: &mut AsyncPgConnection,
    consumer: &str,
    generation: Generation,
    keys: impl IntoIterator<Item = Key<'a>>,
) -> QueryResult<Read<'a>> {
    // One that nothing has: there is always a row to tell the generation.
    let mut keys: Vec<Key<'a>> = keys.into_iter().chain([("", "")]).collect();
    keys.sort_unstable();
    keys.dedup();
    let (topics, entities): (Vec<&str>, Vec<&str>) = keys.iter().copied().unzip();
    let rows: Vec<MarkRow> = diesel::sql_query(
        "WITH g AS MATERIALIZED ( \
             SELECT coalesce($4, (SELECT live FROM consumer_generations WHERE consumer = $1), 1) AS generation \
         ) \
         SELECT (SELECT generation FROM g) AS generation, k.position, m.version, m.event_id, m.parked \
         FROM unnest($2, $3) WITH ORDINALITY AS k(topic, entity_id, position) \
         LEFT JOIN LATERAL (SELECT * FROM consumer_marks m WHERE m.consumer = $1 AND m.generation = (SELECT generation FROM g) \
              AND m.topic = k.topic AND m.entity_id = k.entity_id OFFSET 0) m ON true",
    )
    .bind::<Text, _>(consumer)
    .bind::<Array<Text>, _>(topics)
    .bind::<Array<Text>, _>(entities)
    .bind::<Nullable<Integer>, _>(generation.given())
    .load(connection)
    .await?;
    let generation = rows.as_slice().first().ok_or(diesel::NotFound)?.generation;
    let mark = |row: MarkRow| {
        let mark = Mark {
            version: row.version?,
            event_id: row.event_id,
            parked: row.parked?,
        };
        let position = usize::try_from(row.position).ok()?.checked_sub(1)?;
        Some((*keys.get(position)?, mark))
    };
    Ok(Read {
        generation,
        marks: rows.into_iter().filter_map(mark).collect(),
    })
}

#[derive(QueryableByName)]
struct Moved {
    #[diesel(sql_type = Integer)]
    generation: i32,
    #[diesel(sql_type = BigInt)]
    moved: i64,
}

/// Moves the marks, and returns their generation; nothing when one of them is not where it was read or presumed to be: roll back and
/// decide again.
///
/// Whoever had to wait for another transaction finds the row elsewhere (`ctid`), and moves it no more. Keys are taken in order, so that two instances with the same entities rarely deadlock; when they do, PostgreSQL ends one of them
/// and it is decided again too.
pub(crate) async fn advance(
    connection: &mut AsyncPgConnection,
    consumer: &str,
    generation: Generation,
    advances: &BTreeMap<Key<'_>, Advance>,
) -> QueryResult<Option<i32>> {
    let (topics, entities): (Vec<&str>, Vec<&str>) = advances.keys().copied().unzip();
    let from = |advance: &Advance| advance.from.unwrap_or(NO_MARK);
    let column = advances.values();
    let exists: Vec<bool> = column.clone().map(|advance| advance.from.is_some()).collect();
    let from_versions: Vec<i64> = column.clone().map(|advance| from(advance).version).collect();
    let from_parked: Vec<bool> = column.clone().map(|advance| from(advance).parked).collect();
    let versions: Vec<i64> = column.clone().map(|advance| advance.to.version).collect();
    let events: Vec<Option<Uuid>> = column.clone().map(|advance| advance.to.event_id).collect();
    let parked: Vec<bool> = column.map(|advance| advance.to.parked).collect();
    let Moved { generation, moved } = diesel::sql_query(
        "WITH n AS MATERIALIZED ( \
             SELECT coalesce($2, (SELECT live FROM consumer_generations WHERE consumer = $1), 1) AS generation \
         ), given AS ( \
             SELECT * FROM unnest($3, $4, $5, $6, $7, $8, $9, $10) \
                 AS g(topic, entity_id, is_there, from_version, from_parked, version, event_id, parked) \
         ), changed AS ( \
             UPDATE consumer_marks m SET version = g.version, event_id = g.event_id, parked = g.parked \
             FROM given g CROSS JOIN LATERAL ( \
                 SELECT ctid FROM consumer_marks k WHERE k.consumer = $1 AND k.generation = (SELECT generation FROM n) AND k.topic = g.topic \
                    AND k.entity_id = g.entity_id AND k.version = g.from_version AND k.parked = g.from_parked OFFSET 0) k \
             WHERE g.is_there AND m.ctid = k.ctid AND m.version = g.from_version AND m.parked = g.from_parked \
             RETURNING 1 \
         ), made AS ( \
             INSERT INTO consumer_marks (consumer, generation, topic, entity_id, version, event_id, parked) \
             SELECT $1, (SELECT generation FROM n), topic, entity_id, version, event_id, parked FROM given WHERE NOT is_there \
             ON CONFLICT DO NOTHING \
             RETURNING 1 \
         ) \
         SELECT generation, (SELECT count(*) FROM changed) + (SELECT count(*) FROM made) AS moved FROM n",
    )
    .bind::<Text, _>(consumer)
    .bind::<Nullable<Integer>, _>(generation.given())
    .bind::<Array<Text>, _>(topics)
    .bind::<Array<Text>, _>(entities)
    .bind::<Array<Bool>, _>(exists)
    .bind::<Array<BigInt>, _>(from_versions)
    .bind::<Array<Bool>, _>(from_parked)
    .bind::<Array<BigInt>, _>(versions)
    .bind::<Array<Nullable<SqlUuid>>, _>(events)
    .bind::<Array<Bool>, _>(parked)
    .get_result(connection)
    .await?;
    Ok((moved == advances.len() as i64).then_some(generation))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event_id(entity: &str, version: i64) -> Uuid {
        Uuid::from_u128(
            (u128::from(entity.bytes().map(u64::from).sum::<u64>()) << 64) | version.unsigned_abs() as u128,
        )
    }

    fn event(entity: &str, version: i64) -> Candidate<'_> {
        Candidate {
            topic: "t",
            entity: Some(entity),
            event: Some((version, event_id(entity, version))),
            refused: false,
            known: Known::Nothing,
        }
    }

    fn refused(entity: &str, version: i64) -> Candidate<'_> {
        Candidate {
            refused: true,
            ..event(entity, version)
        }
    }

    fn unreadable(entity: Option<&str>) -> Candidate<'_> {
        Candidate {
            topic: "t",
            entity,
            event: None,
            refused: true,
            known: Known::Nothing,
        }
    }

    fn marked(entity: &str, version: i64, parked: bool) -> (Key<'_>, Mark) {
        let mark = Mark {
            version,
            event_id: (version > 0).then(|| event_id(entity, version)),
            parked,
        };
        (("t", entity), mark)
    }

    fn from_beginning<'a>(records: &[Candidate<'a>], marks: &Marks<'a>) -> Plan<'a> {
        plan(records, marks, |_| Start::Beginning)
    }

    fn parks(plan: &Plan<'_>) -> Vec<(usize, Why)> {
        plan.parks.iter().map(|park| (park.position, park.why)).collect()
    }

    #[test]
    fn repeats_are_recognised_against_the_mark_and_within_the_batch() {
        let records = [event("a", 2), event("a", 3), event("a", 3), event("b", 1)];
        let plan = from_beginning(&records, &Marks::from_iter([marked("a", 2, false)]));
        assert_eq!((plan.fresh, plan.repeats), (vec![1, 3], vec![0, 2]));
    }

    #[test]
    fn where_versions_are_not_counted_the_event_id_tells_a_repeat() {
        let uncounted = |entity: &'static str, number: u128, known| Candidate {
            event: Some((0, Uuid::from_u128(number))),
            known,
            ..event(entity, 1)
        };
        let records = [
            uncounted("a", 1, Known::Seen),
            uncounted("a", 2, Known::Nothing),
            uncounted("a", 2, Known::Nothing),
            uncounted("b", 3, Known::Discarded),
            uncounted("b", 4, Known::Nothing),
            Candidate {
                refused: true,
                ..uncounted("a", 5, Known::Nothing)
            },
            uncounted("a", 6, Known::Nothing),
            uncounted("a", 7, Known::Parked),
        ];
        let plan = plan(&records, &Marks::from_iter([marked("a", 4, false)]), |_| {
            Start::Uncounted
        });
        assert_eq!((&plan.fresh, &plan.discarded), (&vec![1, 4], &vec![3]));
        assert_eq!(plan.repeats, [0, 2, 7]);
        assert_eq!(parks(&plan), [(5, Why::Refused), (6, Why::Behind)]);
        let moved = |entity| plan.advances[&("t", entity)].to;
        assert_eq!((moved("a").version, moved("a").parked), (5, true));
        assert_eq!(
            (moved("b").version, moved("b").event_id),
            (2, Some(Uuid::from_u128(4)))
        );
    }

    #[test]
    fn a_gap_parks_its_entity_and_no_other() {
        let records = [
            event("a", 1),
            event("a", 3),
            event("b", 1),
            event("a", 4),
            event("a", 1),
        ];
        let plan = from_beginning(&records, &Marks::default());
        assert_eq!(parks(&plan), [(1, Why::Gap { expected: 2 }), (3, Why::Behind)]);
        assert_eq!((&plan.fresh, &plan.repeats), (&vec![0, 2], &vec![4]));
        let a = plan.advances[&("t", "a")];
        assert_eq!((a.from, a.to.version, a.to.parked), (None, 1, true));
    }

    #[test]
    fn a_refused_record_parks_what_follows_of_its_entity() {
        let records = [refused("a", 1), event("a", 2), event("b", 1), event("a", 2)];
        let plan = from_beginning(&records, &Marks::default());
        assert_eq!(parks(&plan), [(0, Why::Refused), (1, Why::Behind)]);
        assert_eq!(
            (&plan.fresh, &plan.repeats),
            (&vec![2], &vec![3]),
            "the same version once"
        );
        assert_eq!(
            plan.advances[&("t", "a")].to,
            Mark {
                parked: true,
                ..NO_MARK
            }
        );
    }

    #[test]
    fn a_repeat_that_would_be_refused_is_a_repeat() {
        let plan = from_beginning(&[refused("a", 2)], &Marks::from_iter([marked("a", 2, false)]));
        assert_eq!((plan.parks, plan.repeats), (vec![], vec![0]));
    }

    #[test]
    fn behind_a_parked_entity_its_mark_is_held_to_stay_parked() {
        let plan = from_beginning(
            &[event("a", 4), unreadable(Some("a"))],
            &Marks::from_iter([marked("a", 2, true)]),
        );
        assert_eq!(parks(&plan), [(0, Why::Behind), (1, Why::Behind)]);
        let Advance { from, to } = plan.advances[&("t", "a")];
        assert_eq!(from, Some(to));
    }

    #[test]
    fn what_cannot_be_read_parks_its_key_or_alone_and_only_once() {
        let seen = Candidate {
            known: Known::Parked,
            ..unreadable(Some("b"))
        };
        let records = [
            unreadable(None),
            unreadable(Some("a")),
            event("a", 1),
            seen,
            event("b", 1),
        ];
        let plan = from_beginning(&records, &Marks::default());
        assert_eq!(
            parks(&plan),
            [(0, Why::Refused), (1, Why::Refused), (2, Why::Behind)]
        );
        assert_eq!((plan.repeats, plan.fresh), (vec![3], vec![4]));
    }

    #[test]
    fn what_was_given_up_counts_and_has_no_effect() {
        let given_up = Candidate {
            known: Known::Discarded,
            ..refused("a", 5)
        };
        let plan = from_beginning(
            &[given_up, event("a", 6)],
            &Marks::from_iter([marked("a", 3, false)]),
        );
        assert_eq!((&plan.discarded, &plan.fresh), (&vec![0], &vec![1]));
        assert!(plan.parks.is_empty());
    }

    #[test]
    fn without_a_mark_the_first_version_is_one_unless_there_is_a_baseline() {
        let records = [event("a", 5), event("a", 6), event("a", 8)];
        let plan = from_beginning(&records, &Marks::default());
        assert_eq!(plan.parks[0].why, Why::Gap { expected: 1 });
        let plan = super::plan(&records, &Marks::default(), |_| Start::Baseline);
        assert_eq!(plan.fresh, [0, 1]);
        assert_eq!(parks(&plan), [(2, Why::Gap { expected: 7 })]);
    }

    #[test]
    fn the_same_version_in_another_event_is_a_ghost() {
        let other = Candidate {
            event: Some((2, Uuid::from_u128(99))),
            ..event("a", 2)
        };
        let plan = from_beginning(
            &[other, event("a", 1)],
            &Marks::from_iter([marked("a", 2, false)]),
        );
        assert_eq!((plan.ghosts, plan.repeats), (vec![0], vec![0, 1]));
    }

    proptest! {
        /// However a topic is cut into batches and however often parts of it are repeated, every version is fresh exactly once, in
        /// order, up to the first that is refused; all from there on are parked, each once, in order.
        #[test]
        fn every_version_is_fresh_or_parked_once(
            lengths in prop::collection::vec(1_i64..6, 1..4),
            bad in prop::collection::vec(1_i64..12, 3),
            cuts in prop::collection::vec((0_usize..20, 1_usize..6), 1..30),
        ) {
            let entities = ["a", "b", "c"];
            let topic: Vec<Candidate<'_>> = (1..6)
                .flat_map(|version| {
                    let (lengths, bad) = (&lengths, &bad);
                    entities.iter().zip(lengths).zip(bad).filter(move |((_, length), _)| version <= **length)
                        .map(move |((entity, _), bad)| Candidate { refused: version == *bad, ..event(entity, version) })
                })
                .collect();
            let mut marks = Marks::default();
            let mut applied: Vec<(&str, i64)> = Vec::new();
            let mut waiting: Vec<(&str, i64)> = Vec::new();
            let mut reached = 0_usize;
            // Each step goes back a little, as after a crash, and reads on from there; the last reads everything.
            let steps = cuts.into_iter().chain([(20, topic.len())]);
            for (back, length) in steps {
                let from = reached.saturating_sub(back);
                let to = (from + length).min(topic.len());
                let batch = &topic[from..to];
                let plan = from_beginning(batch, &marks);
                prop_assert!(plan.ghosts.is_empty());
                let name = |position: usize| {
                    let record = batch[position];
                    (record.entity.expect("given"), record.event.expect("given").0)
                };
                applied.extend(plan.fresh.iter().map(|position| name(*position)));
                for park in &plan.parks {
                    let is_gap = matches!(park.why, Why::Gap { .. });
                    prop_assert!(!is_gap);
                    // The table itself takes a version once while it is parked.
                    if !waiting.contains(&name(park.position)) {
                        waiting.push(name(park.position));
                    }
                }
                // Who presumes the marks decides the same, or finds one of them elsewhere and looks.
                let parked = |key: &Key<'_>| marks.get(key).is_some_and(|mark| mark.parked);
                let (mut presumed, unknown) = presume(batch, parked, |_| Start::Beginning);
                presumed.extend(unknown.iter().filter_map(|key| Some((*key, *marks.get(key)?))));
                let blind = from_beginning(batch, &presumed);
                let state = |mark: Option<Mark>| mark.map(|mark| (mark.version, mark.parked));
                let holds = blind.advances.iter().all(|(key, advance)| state(advance.from) == state(marks.get(key).copied()));
                if holds {
                    let told = |plan: &Plan<'_>| (plan.fresh.clone(), plan.repeats.clone(), plan.parks.clone());
                    prop_assert_eq!(told(&blind), told(&plan));
                    let moves = |plan: &Plan<'_>| {
                        let moves = plan.advances.iter().map(|(key, advance)| (key.1.to_owned(), advance.to));
                        moves.collect::<Vec<_>>()
                    };
                    prop_assert_eq!(moves(&blind), moves(&plan));
                }
                for (key, advance) in &plan.advances {
                    prop_assert_eq!(marks.get(key).copied(), advance.from);
                    marks.insert(*key, advance.to);
                }
                reached = reached.max(to);
            }
            if reached == topic.len() {
                for ((entity, length), bad) in entities.iter().zip(&lengths).zip(&bad) {
                    let of = |list: &[(&str, i64)]| -> Vec<i64> {
                        list.iter().filter(|(id, _)| id == entity).map(|(_, version)| *version).collect()
                    };
                    let last = (*length).min(bad - 1);
                    prop_assert_eq!(of(&applied), (1..=last).collect::<Vec<_>>());
                    prop_assert_eq!(of(&waiting), (last + 1..=*length).collect::<Vec<_>>());
                }
            }
        }
    }
}
