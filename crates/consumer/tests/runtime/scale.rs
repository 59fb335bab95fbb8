//! With many marks and parked records, whatever the consumer does finds what it needs by an index.

use std::collections::BTreeMap;

use consumer::{Config, Parking, Run, Topic, Which};
use diesel_async::{AsyncConnection as _, AsyncPgConnection};
use rdkafka::message::OwnedHeaders;
use uuid::Uuid;

use crate::stage::{Stage, nothing};

const ROWS: i64 = 100_000;

/// Scans from one end to the other, and entries read by way of indexes, of the tables that grow.
async fn reads(client: &tokio_postgres::Client) -> BTreeMap<String, (i64, i64)> {
    let sql = "SELECT relname::text, seq_scan, \
                      (SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes i WHERE i.relid = t.relid) \
               FROM pg_stat_user_tables t WHERE relname IN ('consumer_marks', 'parked_records', 'consumer_inbox', 'parked_audit')";
    let rows = client.query(sql, &[]).await.unwrap();
    let row = |row: &tokio_postgres::Row| (row.get(0), (row.get(1), row.get(2)));
    rows.iter().map(row).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_statement_reads_a_whole_table() {
    let stage = Stage::new(1).await;
    let client = stage.database.connect().await.unwrap();
    let (group, topic) = (&stage.group, &stage.topic);
    client
        .batch_execute(&format!(
            "INSERT INTO consumer_marks (consumer, generation, topic, entity_id, version, event_id) \
                 SELECT '{group}', 1, '{topic}', 'old' || n, 1, gen_random_uuid() FROM generate_series(1, {ROWS}) n; \
             INSERT INTO consumer_inbox (consumer, generation, topic, event_id) \
                 SELECT '{group}', 1, '{topic}', gen_random_uuid() FROM generate_series(1, {ROWS}); \
             INSERT INTO parked_records (consumer, generation, topic, partition, kafka_offset, record_time, entity_id, version, event_id, \
                                         key, value, headers, error_kind, error, state, settled_at) \
                 SELECT c.name, 1, '{topic}', 9, n, now(), 'old' || n, 1, gen_random_uuid(), 'k', 'v', '[]', 'refused', 'bad', \
                        CASE WHEN c.parks AND n % 100 = 0 THEN 'parked' ELSE 'replayed' END, \
                        CASE WHEN c.parks AND n % 100 = 0 THEN NULL ELSE now() END \
                 FROM generate_series(1, {ROWS}) n, (VALUES ('{group}', false), ('other', true)) c(name, parks); \
             INSERT INTO parked_audit (parked_id, action, outcome, decided_by) SELECT id, 'replay', 'replayed', 'x' FROM parked_records"
        ))
        .await
        .unwrap();
    // Half of what is done is done before PostgreSQL has any figures, as after a bulk load.
    for (round, start) in [Topic::from_beginning(topic), Topic::by_event_id(topic)]
        .into_iter()
        .enumerate()
    {
        let before = reads(&client).await;
        let config = Config {
            topics: vec![start],
            ..stage.config()
        };
        for number in 1..=20 {
            match round {
                0 => stage.publish(&format!("e{}", number % 3), (number + 2) / 3).await,
                _ => {
                    stage
                        .publish_uncounted(&format!("u{}", number % 3), Uuid::now_v7(), "1")
                        .await
                }
            }
        }
        stage
            .produce(
                Some(&format!("bad{round}")),
                Some(b"x"),
                OwnedHeaders::new(),
                None,
            )
            .await;
        stage
            .publish_uncounted(&format!("bad{round}"), Uuid::now_v7(), "1")
            .await;
        let instance = stage.start_with("a", config.clone(), nothing());
        stage.all_committed(22 * (round as i64 + 1)).await;
        instance.stop().await;
        let redrive = stage.redrive_with(config.clone(), nothing());
        let listed = redrive.list(false, 100).await.unwrap();
        let bad = format!("bad{round}");
        let bad = listed
            .iter()
            .find(|row| row.entity_id.as_ref() == Some(&bad))
            .unwrap();
        redrive.show(bad.id).await.unwrap();
        let parking = Parking::of(&config);
        let mut connection = AsyncPgConnection::establish(&stage.database.url()).await.unwrap();
        assert!(parking.is_any(&mut connection).await.unwrap());
        let ids = ["old1", "e1", &format!("bad{round}")].map(str::to_owned);
        let found = parking.about(&mut connection, &ids, 1).await.unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((&found[0].about, found[0].record.id), (&ids[2], bad.id));
        drop(connection);
        redrive.replay(&Which::All, Run::Real, "operator").await.unwrap();
        redrive.discard(bad.id, "a test", "operator").await.unwrap();
        drop(redrive);
        let after = settled_reads(&client).await;
        for (table, (scans, entries)) in &after {
            let (scans_before, entries_before) = before[table];
            assert_eq!(*scans, scans_before, "{table} was read from one end to the other");
            assert!(
                entries - entries_before < ROWS / 10,
                "{table}: {} entries",
                entries - entries_before
            );
        }
        let (_, entries) = after["consumer_marks"];
        assert!(entries > before["consumer_marks"].1, "the figures are there");
        client.batch_execute("ANALYZE").await.unwrap();
    }
}

/// Once all others have told theirs, which they do when they end.
async fn settled_reads(client: &tokio_postgres::Client) -> BTreeMap<String, (i64, i64)> {
    local_stack::wait::until("the others to end", crate::stage::LIMIT, || async {
        let others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()";
        Ok((client.query_one(others, &[]).await?.get::<_, i64>(0) == 0).then_some(()))
    })
    .await
    .unwrap();
    reads(client).await
}
