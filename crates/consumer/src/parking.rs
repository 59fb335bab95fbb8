//! What is parked of a consumer, for those who answer queries from what it has written.

use std::sync::Arc;

use diesel::sql_types::{Array, BigInt, Integer, Text};
use diesel::{OptionalExtension as _, QueryResult, QueryableByName};
use diesel_async::{AsyncPgConnection, RunQueryDsl as _};

use crate::config::Config;
use crate::redrive::{PARKED, Parked};

/// Looks up what is parked, by what it is about. Reads the generation that is served, and changes nothing. Clones share it.
#[derive(Debug, Clone)]
pub struct Parking(Arc<Of>);

#[derive(Debug)]
struct Of {
    consumer: String,
    topics: Vec<String>,
}

/// A parked record, and what it is about.
#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct About {
    /// The one of the ids that were asked for.
    #[diesel(sql_type = Text)]
    pub about: String,
    #[diesel(embed)]
    pub record: Parked,
}

impl Parking {
    /// That of the consumer with this configuration.
    pub fn of(config: &Config) -> Self {
        Self(Arc::new(Of {
            consumer: config.group.clone(),
            topics: config.topics.iter().map(|topic| topic.name.clone()).collect(),
        }))
    }

    /// Whether anything is parked at all. Nearly always nothing is, and then this is all that need be asked.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn is_any(&self, connection: &mut AsyncPgConnection) -> QueryResult<bool> {
        #[derive(QueryableByName)]
        struct One {
            #[diesel(sql_type = Integer)]
            #[expect(dead_code, reason = "that there is one is all there is to know")]
            one: i32,
        }
        // In the order of the index, which is then what is looked into, however much was parked when PostgreSQL last counted.
        let found: Option<One> = diesel::sql_query(format!(
            "SELECT 1 AS one FROM parked_records p WHERE {WAITING} ORDER BY topic, entity_id, id LIMIT 1"
        ))
        .bind::<Text, _>(&self.0.consumer)
        .get_result(connection)
        .await
        .optional()?;
        Ok(found.is_some())
    }

    /// What is parked about these ids: records whose key is one of them, and records that are correlated with one. Of each id at
    /// most `each` by key in each topic and as many by correlation, first what was parked first. A record comes once for each id that it is about.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn about(
        &self,
        connection: &mut AsyncPgConnection,
        ids: &[String],
        each: i64,
    ) -> QueryResult<Vec<About>> {
        // As the index has it.
        const CORRELATION: &str = "left(jsonb_path_query_first(headers, 'strict $[*] ? (@[0] == \"correlation-id\")[1]', '{}', true) \
                                   #>> '{}', 36)";
        let some = |condition: &str| {
            format!(
                "SELECT {PARKED} FROM parked_records p WHERE {WAITING} AND {condition} ORDER BY id LIMIT $4"
            )
        };
        // Topic by topic, one look into the index each (decision 35).
        let by_key = some("p.topic = t.name AND p.entity_id = k.about");
        let by_correlation = some(&format!("{CORRELATION} = k.about"));
        diesel::sql_query(format!(
            "SELECT k.about, w.* FROM unnest($3) AS k(about) CROSS JOIN LATERAL ( \
                 SELECT e.* FROM unnest($2) AS t(name) CROSS JOIN LATERAL ({by_key}) AS e UNION ({by_correlation})) AS w \
             ORDER BY w.id"
        ))
        .bind::<Text, _>(&self.0.consumer)
        .bind::<Array<Text>, _>(&self.0.topics)
        .bind::<Array<Text>, _>(ids)
        .bind::<BigInt, _>(each)
        .load(connection)
        .await
    }
}

/// Parked, in the generation that is served.
const WAITING: &str = "p.consumer = $1 AND p.state = 'parked' \
                       AND p.generation = coalesce((SELECT live FROM consumer_generations WHERE consumer = $1), 1)";
