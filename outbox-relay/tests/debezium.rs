//! The migration from Debezium as `docs/migrating-from-debezium.md` has it, with the real one and writers that never stop.

#[expect(dead_code, reason = "the other tests use the rest")]
mod servers;

use std::collections::BTreeMap;

use local_stack::postgres::connect;
use local_stack::testing::{self, Folder};
use local_stack::{Debezium, Kafka, Postgres, wait};
use outbox_relay::commands::init::{self, Options, StartAt};
use outbox_relay::commands::verify;
use servers::*;
use tokio_postgres::Client;

const TOPICS: [&str; 3] = ["outbox.event.order", "outbox.event.payment", "outbox.event.kinds"];

/// As Debezium's documentation has it, with a header from a column that may be NULL.
const TABLES: &str = "
    CREATE TABLE outbox_events (id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL,
        aggregateid varchar(255) NOT NULL, type varchar(255), payload jsonb);
    CREATE TABLE entity (id text PRIMARY KEY, version bigint NOT NULL);";

const WRITE: &str = "
    WITH e AS (INSERT INTO entity AS e VALUES ($1, 1)
               ON CONFLICT (id) DO UPDATE SET version = e.version + 1 RETURNING id, version)
    INSERT INTO outbox_events (id, aggregatetype, aggregateid, type, payload)
    SELECT gen_random_uuid(), $2, id, 'Moved', jsonb_build_object('n', version, 'of', id) FROM e";

/// In the order in which each entity's rows were written.
const WRITTEN: &str =
    "SELECT id::text, 'outbox.event.' || aggregatetype || '/' || aggregateid FROM outbox_events
    WHERE aggregatetype <> 'kinds' ORDER BY (payload->>'n')::bigint";

/// What is awkward about payloads and headers.
const KINDS: [(&str, &str); 5] = [
    (
        "'Made'",
        r#"'{"b":1.50,"a":"ü","n":null,"big":12345678901234567890.10}'"#,
    ),
    ("'Gone'", "NULL"),
    ("NULL", r#"'{"a": [1, 2,   3]}'"#),
    ("''", "'\"text\"'"),
    ("'Null'", "'null'"),
];

async fn write_kinds(client: &Client, table: &str, kinds: &[(&str, &str)]) {
    for (number, (kind, payload)) in kinds.iter().enumerate() {
        let insert = format!(
            "INSERT INTO {table} (id, aggregatetype, aggregateid, type, payload)
             VALUES (gen_random_uuid(), 'kinds', 'kind {number} ü', {kind}, {payload})"
        );
        client.batch_execute(&insert).await.expect("inserted");
    }
}

/// What of a record depends on its row alone: key, value and headers but for those that tell where Debezium read it, and
/// with another id.
type Shape = (String, Option<Vec<u8>>, Vec<(String, Option<Vec<u8>>)>);

fn shape(record: &Record) -> Shape {
    let headers = record
        .headers
        .iter()
        .filter(|(name, _)| !name.starts_with("__debezium."));
    let headers = headers.map(|(name, value)| match name.as_str() {
        "id" => (name.clone(), value.as_ref().map(|_| b"an id".to_vec())),
        _ => (name.clone(), value.clone()),
    });
    let mut headers: Vec<_> = headers.collect();
    // `id` comes first; of the others ours are in the order of their names.
    headers[1..].sort();
    (record.key.clone(), record.value.clone(), headers)
}

/// The records of the kinds, of which the first half is Debezium's and the second the relay's.
fn same_shapes(records: &[Record], kinds: usize) {
    let mut of_key: BTreeMap<&str, Vec<Shape>> = BTreeMap::new();
    for record in records {
        of_key.entry(&record.key).or_default().push(shape(record));
    }
    assert_eq!(of_key.len(), kinds);
    for (key, shapes) in of_key {
        assert_eq!(shapes.len(), 2, "records of {key}");
        assert_eq!(shapes[0], shapes[1], "Debezium's and the relay's record of {key}");
    }
}

async fn on_kafka(brokers: &str, topic: &str, at_least: usize) -> Vec<Record> {
    let brokers = plain(brokers);
    wait::until("Debezium's records are there", PATIENCE, async || {
        let found = records(&brokers, &[topic]).await;
        Ok((found.len() >= at_least).then_some(found))
    })
    .await
    .expect("published")
}

struct Servers {
    postgres: Postgres,
    kafka: Kafka,
    client: Client,
    folder: Folder,
}

async fn servers(topics: &[&str]) -> Servers {
    let folder = Folder::create("migration");
    let postgres = testing::private_postgres(&folder).await.expect("started");
    let kafka = testing::private_kafka(&folder).await.expect("started");
    create_topics(&plain(&kafka.brokers()), topics, 4).await;
    let client = connect(&postgres.url("postgres")).await.expect("connected");
    Servers {
        postgres,
        kafka,
        client,
        folder,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_takes_over_from_debezium_while_writers_go_on() {
    let Servers {
        postgres,
        kafka,
        client,
        folder,
    } = servers(&TOPICS).await;
    let url = postgres.url("postgres");
    let brokers = plain(&kafka.brokers());
    client.batch_execute(TABLES).await.expect("made");
    let debezium = Debezium::builder(
        folder.path().join("debezium"),
        &url,
        &kafka.brokers(),
        "public.outbox_events",
    );
    let mut debezium = debezium
        .setting(
            "transforms.outbox.table.fields.additional.placement",
            "type:header:eventType",
        )
        .start()
        .await
        .expect("started");
    let writers = Writers::start(&url, 4, WRITE, &["order", "payment"], "");
    write_kinds(&client, "outbox_events", &KINDS).await;
    let count = "SELECT count(*) FROM outbox_events";
    rows_reach(&client, count, 300).await;
    on_kafka(&kafka.brokers(), TOPICS[2], KINDS.len()).await;

    // Step: the column, the index and the guard, while Debezium goes on.
    let toml = format!(
        "kafka.brokers = \"{}\"\n[outbox.events]\ndatabase_url = \"{url}\"\ntable = \"outbox_events\"\n\
         profile = \"debezium\"\nheaders.columns.eventType = \"type\"\nlease_ttl = \"2s\"\nsave_interval = \"50ms\"\n",
        kafka.brokers()
    );
    let config = parse(&toml);
    init::init(&config, Some("events"), &Options::default())
        .await
        .expect("prepared");
    let altered_at: i64 = client.query_one(count, &[]).await.expect("read").get(0);
    rows_reach(&client, count, altered_at + 300).await;
    let denied = client
        .batch_execute("DELETE FROM outbox_events")
        .await
        .expect_err("rows are kept");
    assert!(
        denied
            .as_db_error()
            .is_some_and(|error| error.message().contains("insert-only")),
        "{denied:?}"
    );
    let after: String = client
        .query_one(
            "SELECT id::text FROM outbox_events ORDER BY seq DESC LIMIT 1",
            &[],
        )
        .await
        .expect("read")
        .get(0);
    wait::until("Debezium publishes what came after", PATIENCE, async || {
        let found = records(&brokers, &TOPICS[..2]).await;
        Ok(found
            .iter()
            .any(|record| record.event_id() == after)
            .then_some(()))
    })
    .await
    .expect("published");

    // Step: the cutover.
    debezium.stop().await.expect("stopped");
    let by_debezium = records(&brokers, &TOPICS).await;
    let options = Options {
        start_at: Some(StartAt::Published),
        ..Options::default()
    };
    let started = init::init(&config, Some("events"), &options)
        .await
        .expect("found");
    let relay = Relay::start(&toml).await;
    write_kinds(&client, "outbox_events", &KINDS).await;
    let at_cutover: i64 = client.query_one(count, &[]).await.expect("read").get(0);
    rows_reach(&client, count, at_cutover + 300).await;
    writers.stop().await;
    settled(&url, "events", "outbox_events", "seq").await;
    relay.stop().await;

    // Step: the checks.
    let all = records(&brokers, &TOPICS).await;
    let moved: Vec<Record> = all.iter().filter(|r| r.topic != TOPICS[2]).cloned().collect();
    let outcome = compare(&client, WRITTEN, &moved).await;
    report(
        "migration from Debezium",
        &(&outcome, by_debezium.len(), started.json()),
    );
    assert_eq!((outcome.repeats, outcome.ghosts), (0, 0), "repeats or strangers");
    assert_eq!(outcome.records, outcome.rows);
    assert!(by_debezium.len() > 600 && outcome.rows > by_debezium.len() + 300);
    for record in &all {
        let names: Vec<&str> = record.headers.iter().map(|(name, _)| name.as_str()).collect();
        let names: Vec<&str> = names.into_iter().filter(|name| !name.starts_with("__")).collect();
        assert_eq!(names, ["id", "eventType"]);
        let value = record.value.as_deref().unwrap_or_default();
        assert!(
            !String::from_utf8_lossy(value).contains("seq"),
            "the new column is in a record"
        );
    }
    let kinds: Vec<Record> = all.into_iter().filter(|r| r.topic == TOPICS[2]).collect();
    same_shapes(&kinds, KINDS.len());
    let verified = verify::verify(&config, Some("events")).await.expect("verified");
    assert_eq!(verified.code(), 0, "{}", verified.json());

    // Step: back. Debezium repeats from where it stopped, and goes on; nothing is lost that way either.
    debezium.start().await.expect("started");
    let writers = Writers::start(&url, 2, WRITE, &["order", "payment"], "");
    let before: i64 = client.query_one(count, &[]).await.expect("read").get(0);
    rows_reach(&client, count, before + 100).await;
    writers.stop().await;
    let newest: String = client
        .query_one(
            "SELECT id::text FROM outbox_events ORDER BY seq DESC LIMIT 1",
            &[],
        )
        .await
        .expect("read")
        .get(0);
    wait::until("Debezium goes on", PATIENCE, async || {
        let found = records(&brokers, &TOPICS[..2]).await;
        Ok(found
            .iter()
            .any(|record| record.event_id() == newest)
            .then_some(()))
    })
    .await
    .expect("published");
    debezium.stop().await.expect("stopped");
    let outcome = compare(&client, WRITTEN, &records(&brokers, &TOPICS[..2]).await).await;
    report("back to Debezium", &outcome);
    assert!(outcome.repeats <= outcome.rows - by_debezium.len() + KINDS.len());
}

/// Debezium publishes one row of each kind from `table`, and then the relay does, as `settings` and `ours` have it.
async fn both_publish(
    servers: &Servers,
    table: &str,
    settings: &[(&str, &str)],
    ours: &str,
    kinds: &[(&str, &str)],
) {
    let url = servers.postgres.url("postgres");
    let mut debezium = Debezium::builder(
        servers.folder.path().join(table),
        &url,
        &servers.kafka.brokers(),
        &format!("public.{table}"),
    );
    let slot = format!("debezium_{table}");
    let topic = format!("events.{table}");
    let route = [
        ("slot.name", slot.as_str()),
        ("publication.name", &slot),
        ("transforms.outbox.route.topic.replacement", &topic),
    ];
    for (name, value) in route.iter().chain(settings) {
        debezium = debezium.setting(name, value);
    }
    let mut debezium = debezium.start().await.expect("started");
    write_kinds(&servers.client, table, kinds).await;
    on_kafka(&servers.kafka.brokers(), &topic, kinds.len()).await;
    debezium.stop().await.expect("stopped");

    let toml = format!(
        "kafka.brokers = \"{}\"\n[outbox.{table}]\ndatabase_url = \"{url}\"\ntable = \"{table}\"\ntopic = \"{topic}\"\n\
         profile = \"debezium\"\n{ours}",
        servers.kafka.brokers()
    );
    let options = Options {
        start_at: Some(StartAt::Published),
        ..Options::default()
    };
    init::init(&parse(&toml), None, &options).await.expect("prepared");
    let relay = Relay::start(&toml).await;
    write_kinds(&servers.client, table, kinds).await;
    settled(&url, table, table, "seq").await;
    relay.stop().await;
    same_shapes(
        &records(&plain(&servers.kafka.brokers()), &[&topic]).await,
        kinds.len(),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn payloads_of_other_types_are_the_same_bytes() {
    let servers = servers(&["events.json_events", "events.byte_events"]).await;
    let columns = "aggregatetype varchar(255) NOT NULL, aggregateid varchar(255) NOT NULL, type text";
    servers
        .client
        .batch_execute(&format!(
            "CREATE TABLE json_events (id uuid PRIMARY KEY, {columns}, payload json);
             CREATE TABLE byte_events (id uuid PRIMARY KEY, {columns}, payload bytea);"
        ))
        .await
        .expect("made");
    let kinds = [("'A'", r#"'{"b" : 1,  "a":2, "a":3}'"#), ("NULL", "NULL")];
    both_publish(&servers, "json_events", &[], "", &kinds).await;

    let kinds = [("'A'", r"'\x00ff10'"), ("'B'", r"''"), ("NULL", "NULL")];
    let binary = [
        ("value.converter", "io.debezium.converters.BinaryDataConverter"),
        (
            "transforms.outbox.table.fields.additional.placement",
            "type:header,aggregatetype:header:kind",
        ),
    ];
    let ours = "headers.columns.type = \"type\"\nheaders.columns.kind = \"aggregatetype\"\n";
    both_publish(&servers, "byte_events", &binary, ours, &kinds).await;
}
