//! The judge: rows and records come in, everything that is wrong with them comes out, in words. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// An event as it was committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub event_id: String,
    pub entity: String,
    pub version: i64,
    pub kind: String,
    pub payload: Vec<u8>,
    /// The transaction that wrote it.
    pub transaction: String,
}

/// A row of the outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub id: i64,
    pub event: Event,
}

/// A row of state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    pub order_id: String,
    pub version: i64,
    /// The transaction that wrote this version of it.
    pub transaction: String,
}

/// A record on Kafka.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
    pub payload: Option<Vec<u8>>,
}

impl Record {
    /// The value of a header, if it is there once and is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(header, _)| header == name);
        match (values.next(), values.next()) {
            (Some((_, Some(value))), None) => std::str::from_utf8(value).ok(),
            _ => None,
        }
    }

    /// The key as text.
    pub fn key(&self) -> &str {
        self.key
            .as_deref()
            .and_then(|key| std::str::from_utf8(key).ok())
            .unwrap_or("")
    }

    fn same_bytes(&self, other: &Self) -> bool {
        (&self.key, &self.headers, &self.payload) == (&other.key, &other.headers, &other.payload)
    }
}

/// What was found in a topic.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub problems: Vec<String>,
    /// Records beyond the first of their row.
    pub repeats: usize,
}

/// What is on Kafka against what was committed: every row has its record, as it is; per entity first occurrences are
/// versions 1, 2, 3 … on one partition; repeats are the same bytes; nothing else is there.
///
/// `records` are in the order of their partitions.
pub fn topic(rows: &[Row], records: &[Record]) -> Verdict {
    let mut verdict = Verdict::default();
    let by_id: HashMap<i64, &Row> = rows.iter().map(|row| (row.id, row)).collect();
    let mut first: HashMap<i64, &Record> = HashMap::new();
    let mut partitions: HashMap<&str, i32> = HashMap::new();
    let mut reached: HashMap<&str, i64> = HashMap::new();
    for record in records {
        let place = format!("record {}/{}", record.partition, record.offset);
        let key = record.key();
        if *partitions.entry(key).or_insert(record.partition) != record.partition {
            verdict
                .problems
                .push(format!("{place}: {key} is on another partition too"));
        }
        let id = record.header("outbox-id").and_then(|id| id.parse::<i64>().ok());
        let Some(row) = id.and_then(|id| by_id.get(&id)) else {
            verdict.problems.push(format!("{place} was never committed"));
            continue;
        };
        if let Some(original) = first.get(&row.id) {
            verdict.repeats += 1;
            if !original.same_bytes(record) {
                verdict.problems.push(format!(
                    "{place} repeats record {}/{} with other bytes",
                    original.partition, original.offset
                ));
            }
            continue;
        }
        first.insert(row.id, record);
        if let Some(what) = difference(row, record) {
            verdict.problems.push(format!(
                "{place} differs from outbox row {} in its {what}",
                row.id
            ));
        }
        let last = reached.entry(key).or_insert(0);
        if row.event.version != *last + 1 {
            verdict.problems.push(format!(
                "{place}: version {} of {key} follows version {last}",
                row.event.version
            ));
        }
        *last = row.event.version;
    }
    for row in rows.iter().filter(|row| !first.contains_key(&row.id)) {
        verdict.problems.push(format!(
            "lost: outbox row {}, version {} of {}",
            row.id, row.event.version, row.event.entity
        ));
    }
    verdict
}

fn difference(row: &Row, record: &Record) -> Option<&'static str> {
    let event = &row.event;
    let same = [
        ("key", record.key() == event.entity),
        ("event id", record.header("ce_id") == Some(&event.event_id)),
        ("type", record.header("ce_type") == Some(&event.kind)),
        (
            "version",
            record.header("aggregate-version") == Some(&event.version.to_string()),
        ),
        (
            "payload",
            record.payload.as_deref().unwrap_or_default() == event.payload,
        ),
    ];
    same.into_iter().find(|(_, same)| !same).map(|(what, _)| what)
}

/// The outbox by itself: per entity, versions are 1, 2, 3 … in the order of the ids.
pub fn outbox(rows: &[Row]) -> Vec<String> {
    let mut rows: Vec<&Row> = rows.iter().collect();
    rows.sort_by_key(|row| row.id);
    let mut problems = Vec::new();
    let mut reached: HashMap<&str, i64> = HashMap::new();
    for row in rows {
        let last = reached.entry(&row.event.entity).or_insert(0);
        if row.event.version != *last + 1 {
            problems.push(format!(
                "outbox row {}: version {} of {} follows version {last}",
                row.id, row.event.version, row.event.entity
            ));
        }
        *last = row.event.version;
    }
    problems
}

/// State, history and outbox against each other: every order is at the version of its last event, events count from 1
/// without gaps, each has its outbox row and each row its event, and what belongs together was written by one
/// transaction.
pub fn histories(orders: &[Order], events: &[Event], rows: &[Row]) -> Vec<String> {
    let mut problems = outbox(rows);
    let mut by_entity: BTreeMap<&str, Vec<&Event>> = BTreeMap::new();
    for event in events {
        by_entity.entry(&event.entity).or_default().push(event);
    }
    for order in orders {
        let mut history = by_entity.remove(order.order_id.as_str()).unwrap_or_default();
        history.sort_by_key(|event| event.version);
        if !history.iter().map(|event| event.version).eq(1..=order.version) {
            let versions: Vec<i64> = history.iter().map(|event| event.version).collect();
            problems.push(format!(
                "order {} is at version {}, its events are {versions:?}",
                order.order_id, order.version
            ));
        } else if let Some(last) = history.last()
            && last.transaction != order.transaction
        {
            problems.push(format!(
                "order {} and its event {} were written by two transactions",
                order.order_id, last.version
            ));
        }
    }
    for entity in by_entity.keys() {
        problems.push(format!("there are events of {entity}, and no order"));
    }
    let mut by_event: HashMap<&str, &Row> = HashMap::new();
    for row in rows {
        if by_event.insert(&row.event.event_id, row).is_some() {
            problems.push(format!("event {} is in the outbox twice", row.event.event_id));
        }
    }
    for event in events {
        match by_event.remove(event.event_id.as_str()) {
            None => problems.push(format!("event {} has no outbox row", event.event_id)),
            Some(row) if row.event == *event => {}
            Some(row) if row.event.transaction != event.transaction => problems.push(format!(
                "event {} and its outbox row were written by two transactions",
                event.event_id
            )),
            Some(_) => problems.push(format!("event {} differs from its outbox row", event.event_id)),
        }
    }
    for row in by_event.values() {
        problems.push(format!("outbox row {} has no event", row.id));
    }
    problems
}

/// One write of an effect or of a mark: it took an entity from one version to another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Step {
    pub entity: String,
    /// 0: it was not there.
    pub from: i64,
    pub to: i64,
    /// The transaction that did it.
    pub transaction: String,
}

/// A projection against the events: each was applied once, in order, in one transaction with its mark.
///
/// `effects` and `marks` are in the order in which they were written; `rows` is what there was to apply.
pub fn applied_once(rows: &[Row], effects: &[Step], marks: &[Step]) -> Vec<String> {
    let mut problems = Vec::new();
    let mut last: BTreeMap<&str, i64> = BTreeMap::new();
    for row in rows {
        let version = last.entry(&row.event.entity).or_default();
        *version = row.event.version.max(*version);
    }
    for (what, steps) in [("effect", effects), ("mark", marks)] {
        let mut reached: BTreeMap<&str, i64> = BTreeMap::new();
        for step in steps {
            let at = reached.entry(&step.entity).or_insert(0);
            if step.from != *at || step.to <= step.from {
                problems.push(format!(
                    "the {what} of {} went from {} to {} while it was at {at}",
                    step.entity, step.from, step.to
                ));
            }
            *at = step.to;
        }
        for entity in last.keys().chain(reached.keys()).collect::<BTreeSet<_>>() {
            let (is, should) = (reached.get(entity), last.get(entity));
            if is != should {
                problems.push(format!(
                    "the {what} of {entity} is at {is:?}, and its last event is {should:?}"
                ));
            }
        }
    }
    let (effects, marks): (HashSet<&Step>, HashSet<&Step>) =
        (effects.iter().collect(), marks.iter().collect());
    for step in effects.symmetric_difference(&marks) {
        problems.push(format!("effect and mark did not commit together: {step:?}"));
    }
    problems
}

/// Two tables by key: what one has, the other has, and it is the same.
pub fn same(
    what: [&str; 2],
    left: &BTreeMap<String, String>,
    right: &BTreeMap<String, String>,
) -> Vec<String> {
    let keys: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
    keys.into_iter()
        .filter(|key| left.get(*key) != right.get(*key))
        .map(|key| {
            let shown =
                |table: &BTreeMap<String, String>| table.get(key).cloned().unwrap_or("nothing".to_owned());
            format!(
                "{key}: {} says {}, {} says {}",
                what[0],
                shown(left),
                what[1],
                shown(right)
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: i64, entity: &str, version: i64) -> Row {
        Row {
            id,
            event: Event {
                event_id: format!("event-{id}"),
                entity: entity.to_owned(),
                version,
                kind: "order.placed".to_owned(),
                payload: vec![1, 2, 3],
                transaction: "7".to_owned(),
            },
        }
    }

    fn record(row: &Row, offset: i64) -> Record {
        let header = |name: &str, value: &str| (name.to_owned(), Some(value.as_bytes().to_vec()));
        Record {
            partition: 0,
            offset,
            key: Some(row.event.entity.clone().into_bytes()),
            headers: vec![
                header("ce_id", &row.event.event_id),
                header("ce_type", &row.event.kind),
                header("aggregate-version", &row.event.version.to_string()),
                header("outbox-id", &row.id.to_string()),
            ],
            payload: Some(row.event.payload.clone()),
        }
    }

    /// Entity a with three versions, b with one; ids have a hole.
    fn rows() -> Vec<Row> {
        vec![row(1, "a", 1), row(2, "b", 1), row(4, "a", 2), row(5, "a", 3)]
    }

    fn records(order: &[usize]) -> Vec<Record> {
        let rows = rows();
        order
            .iter()
            .zip(0..)
            .map(|(index, offset)| record(&rows[*index], offset))
            .collect()
    }

    #[track_caller]
    fn finds(problems: &[String], part: &str) {
        assert!(
            problems.iter().any(|problem| problem.contains(part)),
            "{part:?} is not among {problems:#?}"
        );
    }

    #[test]
    fn a_sound_topic_has_no_problems_and_repeats_are_counted() {
        assert_eq!(topic(&rows(), &records(&[0, 1, 2, 3])), Verdict::default());
        let with_repeats = topic(&rows(), &records(&[0, 1, 2, 0, 1, 2, 3]));
        assert_eq!((with_repeats.problems.len(), with_repeats.repeats), (0, 3));
    }

    #[test]
    fn a_lost_row_is_found() {
        finds(
            &topic(&rows(), &records(&[0, 2, 3])).problems,
            "lost: outbox row 2",
        );
        finds(
            &topic(&rows(), &records(&[0, 1, 2])).problems,
            "lost: outbox row 5",
        );
    }

    #[test]
    fn a_lost_row_in_the_middle_is_found_even_if_it_comes_later() {
        finds(
            &topic(&rows(), &records(&[0, 1, 3, 2])).problems,
            "version 3 of a follows version 1",
        );
    }

    #[test]
    fn a_repeat_with_other_bytes_is_found() {
        for change in 0..3 {
            let mut found = records(&[0, 1, 2, 3, 0]);
            let repeat = found.last_mut().expect("there");
            match change {
                0 => repeat.payload = None,
                1 => repeat.headers.swap(0, 1),
                _ => repeat.headers.push(("traceparent".to_owned(), None)),
            }
            finds(&topic(&rows(), &found).problems, "with other bytes");
        }
    }

    #[test]
    fn a_key_on_two_partitions_is_found() {
        let mut found = records(&[0, 1, 2, 3]);
        found[3].partition = 1;
        finds(&topic(&rows(), &found).problems, "on another partition");
    }

    #[test]
    fn what_nobody_committed_is_found() {
        let mut found = records(&[0, 1, 2, 3]);
        found.push(record(&row(3, "b", 2), 9));
        finds(&topic(&rows(), &found).problems, "was never committed");
        found[4].headers.clear();
        finds(&topic(&rows(), &found).problems, "was never committed");
    }

    #[test]
    fn a_record_that_is_not_its_row_is_found() {
        for (header, what) in [(0, "event id"), (1, "type"), (2, "version")] {
            let mut found = records(&[0, 1, 2, 3]);
            found[0].headers[header].1 = Some(b"9".to_vec());
            finds(&topic(&rows(), &found).problems, what);
        }
        let mut found = records(&[0, 1, 2, 3]);
        found[0].payload = Some(vec![]);
        found[1].key = Some(b"c".to_vec());
        finds(&topic(&rows(), &found).problems, "payload");
        finds(&topic(&rows(), &found).problems, "key");
    }

    #[test]
    fn an_outbox_whose_ids_do_not_rise_with_versions_is_found() {
        assert_eq!(outbox(&rows()), Vec::<String>::new());
        finds(
            &outbox(&[row(2, "a", 1), row(1, "a", 2)]),
            "version 2 of a follows version 0",
        );
        finds(
            &outbox(&[row(1, "a", 1), row(2, "a", 1)]),
            "version 1 of a follows version 1",
        );
    }

    fn orders() -> Vec<Order> {
        [("a", 3), ("b", 1)]
            .map(|(order_id, version)| Order {
                order_id: order_id.to_owned(),
                version,
                transaction: "7".to_owned(),
            })
            .to_vec()
    }

    fn events() -> Vec<Event> {
        rows().into_iter().map(|row| row.event).collect()
    }

    #[test]
    fn histories_that_agree_have_no_problems() {
        assert_eq!(histories(&orders(), &events(), &rows()), Vec::<String>::new());
    }

    #[test]
    fn state_without_event_is_found() {
        let mut ahead = orders();
        ahead[1].version = 2;
        finds(
            &histories(&ahead, &events(), &rows()),
            "order b is at version 2, its events are [1]",
        );
        let mut orphan = orders();
        orphan.pop();
        finds(
            &histories(&orphan, &events(), &rows()),
            "events of b, and no order",
        );
        let mut torn = orders();
        torn[0].transaction = "8".to_owned();
        finds(
            &histories(&torn, &events(), &rows()),
            "order a and its event 3 were written by two",
        );
    }

    #[test]
    fn events_and_outbox_rows_that_do_not_pair_are_found() {
        finds(
            &histories(&orders(), &events(), &rows()[..3]),
            "event event-5 has no outbox row",
        );
        finds(
            &histories(&orders(), &events()[..3], &rows()),
            "outbox row 5 has no event",
        );
        let mut twice = rows();
        twice.push(Row {
            id: 6,
            ..row(5, "a", 3)
        });
        finds(&histories(&orders(), &events(), &twice), "in the outbox twice");
        let mut other = rows();
        other[0].event.payload.clear();
        finds(
            &histories(&orders(), &events(), &other),
            "event-1 differs from its outbox row",
        );
        let mut torn = rows();
        torn[0].event.transaction = "8".to_owned();
        finds(
            &histories(&orders(), &events(), &torn),
            "its outbox row were written by two",
        );
    }

    fn step(entity: &str, from: i64, to: i64) -> Step {
        Step {
            entity: entity.to_owned(),
            from,
            to,
            transaction: format!("{entity}{from}"),
        }
    }

    #[test]
    fn effects_are_applied_once() {
        let good = [step("a", 0, 2), step("b", 0, 1), step("a", 2, 3)];
        assert_eq!(applied_once(&rows(), &good, &good), Vec::<String>::new());
        let twice = [step("a", 0, 2), step("b", 0, 1), step("a", 2, 3), step("a", 2, 3)];
        finds(
            &applied_once(&rows(), &twice, &good),
            "the effect of a went from 2 to 3 while it was at 3",
        );
        let missing = [step("a", 0, 2), step("b", 0, 1)];
        finds(
            &applied_once(&rows(), &missing, &good),
            "the effect of a is at Some(2)",
        );
        finds(
            &applied_once(&rows(), &good, &missing),
            "the mark of a is at Some(2)",
        );
        let mut apart = good.clone();
        apart[0].transaction = "other".to_owned();
        finds(&applied_once(&rows(), &apart, &good), "did not commit together");
        finds(
            &applied_once(&rows()[..2], &good, &good),
            "the effect of a is at Some(3)",
        );
    }

    #[test]
    fn tables_that_differ_are_found() {
        let table = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect::<BTreeMap<_, _>>()
        };
        let left = table(&[("a", "1"), ("b", "2")]);
        assert_eq!(same(["x", "y"], &left, &left), Vec::<String>::new());
        finds(
            &same(["x", "y"], &left, &table(&[("a", "1"), ("b", "3")])),
            "b: x says 2, y says 3",
        );
        finds(
            &same(["x", "y"], &left, &table(&[("a", "1")])),
            "b: x says 2, y says nothing",
        );
        finds(
            &same(["x", "y"], &table(&[]), &table(&[("a", "1")])),
            "a: x says nothing, y says 1",
        );
    }
}
