//! Events of sources that do not count versions: those that took effect are known again by their ids.
//!
//! The mark of their entity counts them, so that everything else is as it is with versions: the guarded move of the mark keeps order, and
//! keeps two instances from doing the same.

use std::collections::HashMap;
use std::time::Duration;

use diesel::sql_types::{Array, BigInt, Double, Integer, Text, Uuid as SqlUuid};
use diesel::{QueryResult, QueryableByName};
use diesel_async::{AsyncPgConnection, RunQueryDsl as _};
use uuid::Uuid;

use crate::marks::Known;

/// Ids removed by one statement.
pub(crate) const REMOVE_AT_ONCE: usize = 10_000;

/// Topic, entity and id of an event.
pub(crate) type Event<'a> = (&'a str, &'a str, Uuid);

/// What is known of events from before, by topic and id.
pub(crate) type Seen = HashMap<(String, Uuid), Known>;

/// Looks these events up: among those that took effect, those that are parked, and those that were given up.
pub(crate) async fn look_up(
    connection: &mut AsyncPgConnection,
    consumer: &str,
    generation: i32,
    events: &[Event<'_>],
) -> QueryResult<Seen> {
    #[derive(QueryableByName)]
    struct Row {
        #[diesel(sql_type = Text)]
        topic: String,
        #[diesel(sql_type = SqlUuid)]
        event_id: Uuid,
        #[diesel(sql_type = Text)]
        known: String,
    }
    let (topics, rest): (Vec<&str>, Vec<(&str, Uuid)>) = events
        .iter()
        .map(|(topic, entity, id)| (*topic, (*entity, *id)))
        .unzip();
    let (entities, ids): (Vec<&str>, Vec<Uuid>) = rest.into_iter().unzip();
    // One look into an index each, whatever the planner believes: decision 35.
    let rows: Vec<Row> = diesel::sql_query(
        "WITH k AS (SELECT * FROM unnest($3, $4, $5) AS k(topic, entity_id, event_id)) \
         SELECT k.topic, k.event_id, 'seen' AS known FROM k CROSS JOIN LATERAL ( \
             SELECT FROM consumer_inbox i WHERE i.consumer = $1 AND i.generation = $2 AND i.topic = k.topic \
                AND i.event_id = k.event_id OFFSET 0) i \
         UNION ALL \
         SELECT k.topic, k.event_id, 'parked' FROM k CROSS JOIN LATERAL ( \
             SELECT FROM parked_records p WHERE p.consumer = $1 AND p.generation = $2 AND p.topic = k.topic \
                AND p.entity_id = k.entity_id AND p.event_id = k.event_id AND p.state = 'parked' OFFSET 0) p \
         UNION ALL \
         SELECT k.topic, k.event_id, 'discarded' FROM k CROSS JOIN LATERAL ( \
             SELECT FROM parked_records p WHERE p.consumer = $1 AND p.topic = k.topic AND p.entity_id = k.entity_id \
                AND p.event_id = k.event_id AND p.state = 'discarded' LIMIT 1 OFFSET 0) p",
    )
    .bind::<Text, _>(consumer)
    .bind::<Integer, _>(generation)
    .bind::<Array<Text>, _>(topics)
    .bind::<Array<Text>, _>(entities)
    .bind::<Array<SqlUuid>, _>(ids)
    .load(connection)
    .await?;
    let mut seen = Seen::new();
    for Row {
        topic,
        event_id,
        known,
    } in rows
    {
        let known = match known.as_str() {
            "seen" => Known::Seen,
            "parked" => Known::Parked,
            _ => Known::Discarded,
        };
        // What took effect outweighs what was given up before that.
        let slot = seen.entry((topic, event_id)).or_insert(known);
        if known == Known::Seen {
            *slot = known;
        }
    }
    Ok(seen)
}

/// Notes that these take effect, or never will; `false` when one of them was noted by someone else meanwhile: roll back and decide again.
pub(crate) async fn insert(
    connection: &mut AsyncPgConnection,
    consumer: &str,
    generation: i32,
    events: &[(&str, Uuid)],
) -> QueryResult<bool> {
    let (topics, ids): (Vec<&str>, Vec<Uuid>) = events.iter().copied().unzip();
    let inserted = diesel::sql_query(
        "INSERT INTO consumer_inbox (consumer, generation, topic, event_id) \
         SELECT $1, $2, topic, event_id FROM unnest($3, $4) AS e(topic, event_id) ORDER BY topic, event_id ON CONFLICT DO NOTHING",
    )
    .bind::<Text, _>(consumer)
    .bind::<Integer, _>(generation)
    .bind::<Array<Text>, _>(topics)
    .bind::<Array<SqlUuid>, _>(ids)
    .execute(connection)
    .await?;
    Ok(inserted == events.len())
}

/// Forgets some of the ids that are older than this; returns how many. By `now()`: an index cannot be asked for what a volatile function
/// says.
pub(crate) async fn remove_old(
    connection: &mut AsyncPgConnection,
    consumer: &str,
    age: Duration,
) -> QueryResult<usize> {
    diesel::sql_query(
        "DELETE FROM consumer_inbox WHERE ctid = ANY(ARRAY(SELECT ctid FROM consumer_inbox \
         WHERE consumer = $1 AND seen_at < now() - make_interval(secs => $2) \
         ORDER BY seen_at LIMIT $3 FOR UPDATE SKIP LOCKED))",
    )
    .bind::<Text, _>(consumer)
    .bind::<Double, _>(age.as_secs_f64())
    .bind::<BigInt, _>(REMOVE_AT_ONCE as i64)
    .execute(connection)
    .await
}
