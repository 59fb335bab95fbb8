//! Rows as records: every byte.

use envelope::Envelope;
use local_stack::testing;

use crate::kit::*;
use crate::support::{Bed, RunningRelay};

#[tokio::test(flavor = "multi_thread")]
async fn a_row_with_everything_reads_back_as_its_envelope_byte_for_byte() {
    let bed = Bed::new().await;
    let other = testing::unique("events.other");
    create_topic(&other, &[]).await;
    let payload: Vec<u8> = [&[0, 255, 0, 10, 13][..], &noise(500), &[0]].concat();
    bed.client
        .execute(
            "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, schema_version,
                 source, content_type, data_schema, correlation_id, causation_id, traceparent, tracestate, metadata,
                 occurred_at, topic, payload)
             VALUES ('0190a000-0000-7000-8000-000000000001', 'typé', 'schlüssel/1', 7, 'test.made', 2, '/test',
                 'application/json', 'x.Made', '0190a000-0000-7000-8000-000000000002',
                 '0190a000-0000-7000-8000-000000000003',
                 '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01', 'a=b', '{\"zz\":\"ü\",\"a\":\"1\",\"bb\":\"2\"}',
                 '2026-01-02T03:04:05.678901Z', $1, $2)",
            &[&other, &payload],
        )
        .await
        .expect("inserted");
    // Rows that name a topic go there, and its type is free.
    insert(&bed.client, "k", 1, None, None).await;
    let relay = RunningRelay::start(&bed.section("test", "")).await;
    bed.settled().await;
    relay.stop().await;
    let records = read(&other).await;
    assert_eq!(records.len(), 1);
    let record = &records[0];
    assert_eq!(record.key, "schlüssel/1");
    assert_eq!(record.payload.as_deref(), Some(&payload[..]));
    let pairs = record
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_deref()));
    let envelope = match Envelope::read(pairs) {
        Ok(envelope) => envelope,
        Err(error) => panic!("{error}: {record:?}"),
    };
    assert_eq!(
        (&*envelope.entity_id, envelope.version, envelope.schema_version),
        ("schlüssel/1", 7, 2)
    );
    assert_eq!(envelope.outbox_id, Some(1));
    assert_eq!(envelope.content_type, "application/json");
    assert_eq!(envelope.metadata.len(), 3);
    assert_eq!(
        envelope.occurred_at.to_rfc3339(),
        "2026-01-02T03:04:05.678901+00:00"
    );
    let mut written = Vec::new();
    envelope.write(|name, value| written.push((name.to_owned(), Some(value.to_vec()))));
    written.sort();
    let mut found = record.headers.clone();
    found.sort();
    assert_eq!(written, found);
    let tombstone = read(&bed.topic).await;
    assert_eq!(tombstone[0].payload, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_elses_table_is_relayed_as_it_is() {
    let bed = Bed::new().await;
    bed.client
        .batch_execute(
            "CREATE TABLE \"Event Log\" (\"Id\" uuid PRIMARY KEY DEFAULT gen_random_uuid(), kind varchar(20) NOT NULL, entity text,
                 entity_no varchar, version int, \"at\" timestamp NOT NULL DEFAULT now(), tenant text, body jsonb)",
        )
        .await
        .expect("created");
    let sections = bed.section(
        "test",
        "table = \"Event Log\"
         columns.id = \"position\"
         columns.event_id = \"Id\"
         columns.event_type = \"kind\"
         columns.aggregate_type = \"entity\"
         columns.aggregate_id = \"entity_no\"
         columns.aggregate_version = \"version\"
         columns.occurred_at = \"at\"
         columns.payload = \"body\"
         columns.schema_version = \"\"
         columns.topic = \"\"
         columns.source = \"\"
         columns.content_type = \"\"
         columns.data_schema = \"\"
         columns.correlation_id = \"\"
         columns.causation_id = \"\"
         columns.traceparent = \"\"
         columns.tracestate = \"\"
         columns.metadata = \"\"
         headers.static.x-region = \"eu\"
         headers.columns.x-tenant = \"tenant\"",
    );
    let (code, answer) = json(&sections, &["init"]).await;
    assert_eq!(code, 0, "{answer}");
    bed.client
        .batch_execute(
            "INSERT INTO \"Event Log\" (kind, entity, entity_no, version, \"at\", tenant, body)
             VALUES ('made', 'thing', 'n1', 1, '2026-01-02 03:04:05.5', 't1', '{\"a\": [1, 2]}'),
                    ('gone', 'thing', 'n1', 2, '2026-01-02 03:04:06', NULL, NULL)",
        )
        .await
        .expect("inserted");
    let relay = RunningRelay::start(&sections).await;
    wait_until("both are published", || async {
        read(&bed.topic).await.len() == 2
    })
    .await;
    relay.stop().await;
    let records = read(&bed.topic).await;
    assert_eq!(records[0].payload.as_deref(), Some(&b"{\"a\": [1, 2]}"[..]));
    assert_eq!(records[1].payload, None);
    let header = |name| records[0].header(name);
    assert_eq!(header("ce_type"), Some("made"));
    assert_eq!(header("ce_subject"), Some("thing/n1"));
    assert_eq!(header("ce_source"), Some("/test"), "the outbox's name");
    assert_eq!(header("ce_time"), Some("2026-01-02T03:04:05.500000Z"));
    assert_eq!(header("aggregate-version"), Some("1"));
    assert_eq!((header("x-region"), header("x-tenant")), (Some("eu"), Some("t1")));
    assert_eq!(
        records[1].header("x-tenant"),
        None,
        "NULL gives no header: {records:?}"
    );
    assert_eq!(header("meta-x"), None);
    let (code, answer) = json(&sections, &["verify"]).await;
    assert_eq!(code, 0, "{answer}");
}
