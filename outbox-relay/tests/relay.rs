//! The relay against real PostgreSQL and Kafka.

mod support;

use std::time::Duration;

use local_stack::wait;
use support::{Bed, PATIENCE, RunningRelay, append};

#[tokio::test(flavor = "multi_thread")]
async fn a_row_becomes_a_record_with_its_envelope() {
    let bed = Bed::new().await;
    bed.client
        .execute(
            "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, schema_version,
                 source, content_type, data_schema, correlation_id, causation_id, traceparent, tracestate, metadata,
                 occurred_at, payload)
             VALUES ('0190a000-0000-7000-8000-000000000001', 'test', 'k1', 1, 'test.made', 2, '/test',
                 'application/protobuf', 'x.Made', '0190a000-0000-7000-8000-000000000002',
                 '0190a000-0000-7000-8000-000000000003',
                 '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01', 'a=b', '{\"tenant\":\"t1\"}',
                 '2026-01-02T03:04:05.678901Z', '\\x000102')",
            &[],
        )
        .await
        .expect("inserted");
    bed.client
        .execute(
            "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source, payload)
             VALUES (gen_random_uuid(), 'test', 'k1', 2, 'test.deleted', '/test', NULL)",
            &[],
        )
        .await
        .expect("inserted");
    let relay = bed.relay().await;
    bed.settled().await;
    relay.stop().await;

    let records = bed.records().await;
    assert_eq!(records.len(), 2);
    assert_eq!(records[0].payload.as_deref(), Some(&[0u8, 1, 2][..]));
    assert_eq!(records[1].payload, None, "a null payload is a tombstone");
    let expected = [
        ("ce_specversion", "1.0"),
        ("ce_id", "0190a000-0000-7000-8000-000000000001"),
        ("ce_source", "/test"),
        ("ce_type", "test.made"),
        ("ce_subject", "test/k1"),
        ("ce_time", "2026-01-02T03:04:05.678901Z"),
        ("ce_dataschema", "x.Made"),
        ("content-type", "application/protobuf"),
        ("aggregate-version", "1"),
        ("schema-version", "2"),
        ("correlation-id", "0190a000-0000-7000-8000-000000000002"),
        ("causation-id", "0190a000-0000-7000-8000-000000000003"),
        (
            "traceparent",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ),
        ("tracestate", "a=b"),
        ("outbox-id", "1"),
        ("meta-tenant", "t1"),
    ];
    let headers: Vec<(&str, &str)> = records[0]
        .headers
        .iter()
        .map(|(n, v)| (n.as_str(), v.as_str()))
        .collect();
    assert_eq!(headers, expected);
}

/// Rows that trickle are selected one by one; those of a backlog come by COPY, many at a time, on another connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_gives_the_same_bytes_as_a_trickle() {
    let bed = Bed::new().await;
    let relay = bed.relay().await;
    for n in 0..300 {
        bed.append(&format!("k{}", n % 7)).await;
        if n % 50 == 0 {
            bed.settled().await;
        }
    }
    // Columns of which most rows have none.
    let rare = "UPDATE entity SET version = version + 1 WHERE id = 'k0';
        INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source, data_schema, tracestate,
                            correlation_id, metadata, occurred_at, payload)
        SELECT gen_random_uuid(), 'test', id, version, 'test.moved', '/test', 'x.Y', 'a=b', gen_random_uuid(), '{\"a\": \"b\", \"c\": 1}',
               '1999-12-31T23:59:59.999999Z', NULL FROM entity WHERE id = 'k0'";
    bed.client.batch_execute(rare).await.expect("inserted");
    bed.settled().await;
    relay.stop().await;
    assert_eq!(Bed::check(&bed.committed().await, &bed.records().await), 0);

    let forget = "DELETE FROM outbox_relay";
    bed.client.batch_execute(forget).await.expect("forgotten");
    let relay = RunningRelay::start(&bed.section("test", "fetch_rows = 50")).await;
    bed.settled().await;
    relay.stop().await;
    assert_eq!(
        Bed::check(&bed.committed().await, &bed.records().await),
        301,
        "each once more, and the same"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_with_holes_is_read_ahead_in_order() {
    let bed = Bed::new().await;
    let mut late = bed.connect().await;
    let late = late.transaction().await.expect("begun");
    for n in 0..1_500 {
        if n % 10 == 0 {
            append(&late, &format!("late{}", n % 3)).await.expect("appended");
        }
        if n % 7 == 0 {
            let rolled_back = "BEGIN; INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source)
                VALUES (gen_random_uuid(), 'test', 'nobody', 1, 'x', '/x'); ROLLBACK";
            bed.client.batch_execute(rolled_back).await.expect("rolled back");
        }
        bed.append(&format!("k{}", n % 40)).await;
    }
    let relay = RunningRelay::start(&bed.section("test", "fetch_rows = 50")).await;
    wait::until("all that is committed is published", PATIENCE, async || {
        Ok((bed.records().await.len() >= 1_500).then_some(()))
    })
    .await
    .expect("published");
    late.commit().await.expect("committed");
    bed.settled().await;
    relay.stop().await;
    assert_eq!(Bed::check(&bed.committed().await, &bed.records().await), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notification_wakes_it() {
    let bed = Bed::new().await;
    let relay = RunningRelay::start(&bed.section("test", "poll_min = \"1m\"\npoll_max = \"1m\"")).await;
    wait::until(
        "it has read once, and sleeps for a minute",
        PATIENCE,
        async || Ok(relay.readyz().await.contains("200 OK").then_some(())),
    )
    .await
    .expect("ready");
    let began = tokio::time::Instant::now();
    bed.append("k").await;
    bed.client.batch_execute("NOTIFY outbox").await.expect("notified");
    bed.settled().await;
    assert!(
        began.elapsed() < PATIENCE / 2,
        "it did not wait for its next poll, but for {:?}",
        began.elapsed()
    );
    relay.stop().await;
    Bed::check(&bed.committed().await, &bed.records().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_commits_late_is_published_and_holds_nobody_up() {
    let bed = Bed::new().await;
    let relay = bed.relay().await;

    let mut late = bed.connect().await;
    let transaction = late.transaction().await.expect("begun");
    append(&transaction, "late").await.expect("appended");
    for _ in 0..5 {
        // A thousand transactions, each with an id above the open one's.
        let others: Vec<String> = (0..200).map(|n| format!("other-{n}")).collect();
        for other in &others {
            bed.append(other).await;
        }
    }
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let row = bed
            .client
            .query_one(
                "SELECT floor, coalesce(upper(published), 0) - 1 FROM outbox_relay",
                &[],
            )
            .await
            .expect("read");
        let (floor, highest): (i64, i64) = (row.get(0), row.get(1));
        assert_eq!(floor, 0, "the floor passed an id whose transaction is open");
        if highest == 1001 {
            break;
        }
        assert!(
            tokio::time::Instant::now() < deadline,
            "the others wait: {highest} of 1001"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    transaction.commit().await.expect("committed");
    bed.settled().await;
    relay.stop().await;
    assert_eq!(
        Bed::check(&bed.committed().await, &bed.records().await),
        0,
        "repeats without a crash"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn rollbacks_savepoints_and_failed_inserts_leave_no_stall() {
    let bed = Bed::new().await;
    let relay = bed.relay().await;
    let mut client = bed.connect().await;
    for round in 0..20 {
        let mut transaction = client.transaction().await.expect("begun");
        append(&transaction, "kept").await.expect("appended");
        let savepoint = transaction.savepoint("s").await.expect("savepoint");
        append(&savepoint, "kept").await.expect("appended");
        savepoint.rollback().await.expect("rolled back");
        append(&transaction, "kept").await.expect("appended");
        if round % 3 == 0 {
            transaction.rollback().await.expect("rolled back");
        } else {
            transaction.commit().await.expect("committed");
        }
        // Takes an id and fails.
        client
            .execute(
                "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source)
                 VALUES (gen_random_uuid(), 'test', 'x', 0, 'x', 'x')",
                &[],
            )
            .await
            .expect_err("the version must be positive");
    }
    bed.settled().await;
    relay.stop().await;
    Bed::check(&bed.committed().await, &bed.records().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn order_holds_with_many_writers_on_the_same_entities() {
    let bed = Bed::new().await;
    let relay = bed.relay().await;
    let mut writers = Vec::new();
    for writer in 0..8u32 {
        let mut client = bed.connect().await;
        writers.push(tokio::spawn(async move {
            for n in 0..150u32 {
                let mix = writer
                    .wrapping_mul(2_654_435_761)
                    .wrapping_add(n.wrapping_mul(40_503))
                    >> 3;
                let transaction = client.transaction().await.expect("begun");
                for _ in 0..=mix % 3 {
                    append(&transaction, &format!("shared-{}", mix % 7))
                        .await
                        .expect("appended");
                }
                if mix % 5 == 0 {
                    transaction.rollback().await.expect("rolled back");
                } else {
                    transaction.commit().await.expect("committed");
                }
            }
        }));
    }
    for writer in writers {
        writer.await.expect("no panic");
    }
    bed.settled().await;
    relay.stop().await;
    assert_eq!(
        Bed::check(&bed.committed().await, &bed.records().await),
        0,
        "repeats without a crash"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_takes_over_from_a_crash_and_goes_on_where_progress_was_saved() {
    let bed = Bed::new().await;
    let first = bed.relay().await;
    for n in 0..50 {
        bed.append(&format!("e{}", n % 5)).await;
    }
    bed.settled().await;
    let second = bed.relay().await;
    for n in 0..50 {
        bed.append(&format!("e{}", n % 5)).await;
    }
    first.crash().await;
    for n in 0..50 {
        bed.append(&format!("e{}", n % 5)).await;
    }
    bed.settled().await;
    second.stop().await;
    let repeats = Bed::check(&bed.committed().await, &bed.records().await);
    assert!(
        repeats <= 50,
        "{repeats} repeats: what had been saved was published again"
    );

    // A clean stop leaves nothing to repeat, and the next leader need not wait for the lease.
    let before = bed.records().await.len();
    let third = bed.relay().await;
    bed.append("e0").await;
    bed.settled().await;
    third.stop().await;
    assert_eq!(bed.records().await.len(), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_outbox_leaves_the_others_alone() {
    let (good, bad) = (Bed::new().await, Bed::without_topic().await);
    bad.client
        .batch_execute("ALTER SEQUENCE outbox_id_seq CACHE 20")
        .await
        .expect("altered");
    let relay = RunningRelay::start(&(good.section("good", "") + &bad.section("bad", ""))).await;
    wait::until("the bad one is stopped", PATIENCE, || async {
        let answer = relay.readyz().await;
        Ok((answer.contains("bad: stopped") && answer.starts_with("HTTP/1.1 503")).then_some(()))
    })
    .await
    .expect("stopped");
    good.append("x").await;
    good.settled().await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_on_which_the_protocol_would_not_hold_are_refused() {
    for (change, problem) in [
        ("DROP TABLE outbox", "does not exist"),
        ("DROP TABLE outbox_relay", "outbox_relay is missing"),
        (
            "ALTER TABLE outbox DROP COLUMN metadata",
            "the column metadata is missing",
        ),
        ("DROP TRIGGER outbox_insert_only ON outbox", "nothing guards it"),
        (
            "ALTER TABLE outbox ALTER id SET GENERATED BY DEFAULT",
            "GENERATED ALWAYS",
        ),
        ("ALTER TABLE outbox ALTER id DROP IDENTITY", "GENERATED ALWAYS"),
        ("ALTER SEQUENCE outbox_id_seq CACHE 20", "CACHE 20"),
        ("ALTER SEQUENCE outbox_id_seq INCREMENT 2", "INCREMENT 1"),
        ("ALTER SEQUENCE outbox_id_seq CYCLE", "NO CYCLE"),
        (
            "ALTER TABLE outbox DROP CONSTRAINT outbox_pkey",
            "a primary key or unique index",
        ),
        (
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
             CREATE TRIGGER early BEFORE INSERT ON outbox FOR EACH ROW EXECUTE FUNCTION f()",
            "trigger early runs before each insert",
        ),
        (
            "INSERT INTO outbox_relay (name, system_identifier) VALUES ('test', 1)",
            "the database was restored or copied",
        ),
    ] {
        let bed = Bed::without_topic().await;
        bed.client.batch_execute(change).await.expect(change);
        let failure = bed.relay().await.failure().await;
        assert!(failure.contains(problem), "{change}: {failure}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_that_was_set_back_stops_the_outbox() {
    let bed = Bed::new().await;
    let relay = bed.relay().await;
    for _ in 0..5 {
        bed.append("a").await;
    }
    bed.settled().await;
    bed.client
        .batch_execute("SELECT setval('outbox_id_seq', 2)")
        .await
        .expect("set back");
    let failure = relay.failure().await;
    assert!(
        failure.contains("was set back: it gave 2, and 5 was seen"),
        "{failure}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_outbox_is_insert_only() {
    let bed = Bed::without_topic().await;
    bed.append("a").await;
    for change in [
        "DELETE FROM outbox",
        "UPDATE outbox SET source = 'x'",
        "TRUNCATE outbox",
    ] {
        let error = bed.client.batch_execute(change).await.expect_err(change);
        assert!(
            error
                .as_db_error()
                .is_some_and(|e| e.message().contains("insert-only")),
            "{error:?}"
        );
    }
    let id = "INSERT INTO outbox (id, event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source)
              VALUES (7, gen_random_uuid(), 'a', 'b', 1, 'c', 'd')";
    bed.client
        .batch_execute(id)
        .await
        .expect_err("an id was supplied");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_larger_than_a_fetch_come_one_by_one() {
    let bed = Bed::new().await;
    for n in 1..=20i64 {
        bed.client
            .execute(
                "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source, payload)
                 VALUES (gen_random_uuid(), 'test', 'big', $1, 'x', '/x', convert_to(repeat('x', 50000), 'UTF8'))",
                &[&n],
            )
            .await
            .expect("inserted");
    }
    let relay = RunningRelay::start(&bed.section("test", "fetch_bytes = 60000")).await;
    bed.settled().await;
    relay.stop().await;
    assert_eq!(Bed::check(&bed.committed().await, &bed.records().await), 0);
}
