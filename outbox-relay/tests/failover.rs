//! What servers lose, and how they come back: failover, restore, crash, freeze, a full disk. Writers go on through it all.

#[expect(dead_code, reason = "the other tests use the rest")]
mod servers;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use local_stack::postgres::connect;
use local_stack::testing::{self, Database, Folder};
use local_stack::{Kafka, Postgres, wait};
use outbox_relay::commands::status;
use rdkafka::config::ClientConfig;
use servers::*;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

const COUNT: &str = "SELECT count(*) FROM outbox";
const MEGABYTE: u64 = 1024 * 1024;

fn section(brokers: &str, url: &str, extra: &str) -> String {
    format!(
        "kafka.brokers = \"{brokers}\"\n[outbox.test]\ndatabase_url = \"{url}\"\nlease_ttl = \"2s\"\n\
         save_interval = \"50ms\"\n{extra}\n"
    )
}

/// A topic of its own on the shared Kafka.
async fn shared_topic() -> (ClientConfig, String) {
    let (brokers, topic) = (plain(&testing::kafka_brokers()), testing::unique("failover"));
    create_topics(&brokers, &[&topic], 3).await;
    (brokers, topic)
}

/// A database of its own on the shared PostgreSQL.
async fn shared_database() -> Database {
    let database = Database::empty().await;
    let client = database.connect().await.expect("connected");
    client.batch_execute(SCHEMA).await.expect("made");
    database
}

async fn with_schema(postgres: &Postgres) -> Client {
    let client = connect(&postgres.url("postgres")).await.expect("connected");
    client.batch_execute(SCHEMA).await.expect("made");
    client
}

async fn count(client: &Client) -> i64 {
    client.query_one(COUNT, &[]).await.expect("read").get(0)
}

/// Waits until so many more rows are written.
async fn more_rows(client: &Client, more: i64) {
    rows_reach(client, COUNT, count(client).await + more).await;
}

/// Both hosts in one URL, as a client writes it that wants the primary.
fn either(primary: &Postgres, standby: &Postgres) -> String {
    format!(
        "postgres://postgres@127.0.0.1:{},127.0.0.1:{}/postgres?target_session_attrs=read-write",
        primary.port(),
        standby.port()
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_failover_that_lost_commits_all_that_the_new_primary_has_is_published_in_order() {
    let folder = Folder::create("failover");
    let mut primary = testing::private_postgres(&folder).await.expect("started");
    let client = with_schema(&primary).await;
    let mut standby = primary
        .standby(folder.path().join("standby"))
        .await
        .expect("started");
    let (brokers, topic) = shared_topic().await;
    let relay = Relay::start(&section(
        &testing::kafka_brokers(),
        &either(&primary, &standby),
        "",
    ))
    .await;
    let writers = Writers::start(&primary.url("postgres"), 4, APPEND, &[&topic], "");
    more_rows(&client, 300).await;

    // What is committed from here on is lost, and published all the same.
    standby.stop().await.expect("stopped");
    more_rows(&client, 200).await;
    writers.stop().await;
    settled(&primary.url("postgres"), "test", "outbox", "id").await;
    let published_before = count(&client).await;
    // It does not even refuse connections.
    primary.pause().expect("frozen");
    standby.start().await.expect("started");
    standby.promote().await.expect("promoted");
    let client = connect(&standby.url("postgres")).await.expect("connected");
    let lost = published_before - count(&client).await;
    let writers = Writers::start(&standby.url("postgres"), 4, APPEND, &[&topic], "");
    more_rows(&client, 300).await;
    writers.stop().await;
    settled(&standby.url("postgres"), "test", "outbox", "id").await;
    relay.stop().await;

    let outcome = compare(&client, ROWS, &records(&brokers, &[&topic]).await).await;
    report("failover to an asynchronous standby", &outcome);
    assert!(lost > 100, "{lost} rows were lost");
    assert_eq!(
        outcome.ghosts as i64, lost,
        "records of rows that went with the old primary"
    );
    primary.kill().expect("killed");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_when_replicated_survives_the_primary() {
    let folder = Folder::create("replicated");
    let mut primary = testing::private_postgres(&folder).await.expect("started");
    let client = with_schema(&primary).await;
    let mut standby = primary
        .standby(folder.path().join("standby"))
        .await
        .expect("started");
    for statement in [
        "ALTER SYSTEM SET synchronous_standby_names = '*'",
        "SELECT pg_reload_conf()",
    ] {
        client.batch_execute(statement).await.expect("set");
    }
    let (brokers, topic) = shared_topic().await;
    // The relay's own commits wait for the standby too: they must not be what keeps rows back.
    let toml = |durability: &str| {
        let url = either(&primary, &standby);
        let toml = section(
            &testing::kafka_brokers(),
            &url,
            &format!("durability = \"{durability}\""),
        );
        toml.replace("\"2s\"", "\"12s\"").replace("\"50ms\"", "\"4s\"")
    };
    let (replicated, flushed) = (toml("replicated"), toml("flushed"));
    let relay = Relay::start(&replicated).await;
    let local = "SET synchronous_commit = local";
    let writers = Writers::start(&primary.url("postgres"), 4, APPEND, &[&topic], local);
    more_rows(&client, 200).await;
    // All of them, although their commits wait for nobody.
    writers.stop().await;
    settled(&primary.url("postgres"), "test", "outbox", "id").await;
    let before = records(&brokers, &[&topic]).await.len();
    assert!(before >= 200);

    standby.stop().await.expect("stopped");
    let writers = Writers::start(&primary.url("postgres"), 4, APPEND, &[&topic], local);
    more_rows(&client, 100).await;
    relay.says("\"role\":\"waiting\"").await;
    writers.stop().await;
    assert_eq!(
        records(&brokers, &[&topic]).await.len(),
        before,
        "rows are published that only the primary has"
    );
    standby.start().await.expect("started");
    settled(&primary.url("postgres"), "test", "outbox", "id").await;
    assert!(
        records(&brokers, &[&topic]).await.len() >= before + 100,
        "it went on"
    );

    standby.stop().await.expect("stopped");
    let writers = Writers::start(&primary.url("postgres"), 4, APPEND, &[&topic], local);
    more_rows(&client, 100).await;
    relay.says("\"role\":\"waiting\"").await;
    writers.stop().await;
    primary.kill().expect("killed");
    relay.stop().await;
    standby.start().await.expect("started");
    standby.promote().await.expect("promoted");
    let client = connect(&standby.url("postgres")).await.expect("connected");
    // Nobody stands by the new primary.
    let relay = Relay::start(&flushed).await;
    let writers = Writers::start(&standby.url("postgres"), 4, APPEND, &[&topic], "");
    more_rows(&client, 100).await;
    writers.stop().await;
    settled(&standby.url("postgres"), "test", "outbox", "id").await;
    relay.stop().await;
    let outcome = compare(&client, ROWS, &records(&brokers, &[&topic]).await).await;
    report("failover, published when replicated", &outcome);
    assert_eq!(
        outcome.ghosts, 0,
        "records of rows that the new primary does not have"
    );
}

fn run(program: &Path, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect("it starts");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_database_is_relayed_once_somebody_says_so() {
    let folder = Folder::create("restore");
    let postgres = testing::private_postgres(&folder).await.expect("started");
    let client = with_schema(&postgres).await;
    let (brokers, topic) = shared_topic().await;
    let url = postgres.url("postgres");
    let relay = Relay::start(&section(&testing::kafka_brokers(), &url, "")).await;
    let writers = Writers::start(&url, 2, APPEND, &[&topic], "");
    more_rows(&client, 100).await;
    relay.stop().await;
    // These wait when the dump is taken.
    more_rows(&client, 100).await;
    let dump = folder.path().join("dump.sql");
    let dump = dump.to_str().expect("UTF-8");
    run(&postgres.binaries().join("pg_dump"), &["-d", &url, "-f", dump]);
    writers.stop().await;
    let restored = Database::empty().await;
    let arguments = [
        "-X",
        "-q",
        "-v",
        "ON_ERROR_STOP=1",
        "-d",
        &restored.url(),
        "-f",
        dump,
    ];
    run(&postgres.binaries().join("psql"), &arguments);

    let toml = section(&testing::kafka_brokers(), &restored.url(), "");
    let refused = Relay::start(&toml).await.failure().await;
    assert!(refused.contains("outbox-relay adopt test"), "{refused}");
    let client = restored.connect().await.expect("connected");
    let before = records(&brokers, &[&topic]).await.len();
    status::adopt(&parse(&toml), Some("test")).await.expect("adopted");
    let relay = Relay::start(&toml).await;
    let writers = Writers::start(&restored.url(), 2, APPEND, &[&topic], "");
    more_rows(&client, 100).await;
    writers.stop().await;
    settled(&restored.url(), "test", "outbox", "id").await;
    relay.stop().await;
    let outcome = compare(&client, ROWS, &records(&brokers, &[&topic]).await).await;
    report("restore from a dump", &outcome);
    assert_eq!((outcome.ghosts, outcome.repeats), (0, 0));
    assert!(outcome.records >= before + 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_that_was_set_back_while_no_relay_ran_stops_the_outbox() {
    let database = shared_database().await;
    let client = database.connect().await.expect("connected");
    let (_, topic) = shared_topic().await;
    let toml = section(&testing::kafka_brokers(), &database.url(), "");
    let relay = Relay::start(&toml).await;
    for _ in 0..5 {
        client.execute(APPEND, &[&"a", &topic]).await.expect("appended");
    }
    settled(&database.url(), "test", "outbox", "id").await;
    relay.stop().await;
    client
        .batch_execute("SELECT setval('outbox_id_seq', 2)")
        .await
        .expect("set back");
    let failure = Relay::start(&toml).await.failure().await;
    assert!(
        failure.contains("was set back: it gave 2, and 5 was seen"),
        "{failure}"
    );
}

/// Kills a PostgreSQL whose commits do not wait for the disk, and returns what came of it.
async fn crash_without_the_disk(durability: &str, unflushed: i64) -> Outcome {
    let folder = Folder::create("asynchronous");
    let mut postgres = Postgres::builder(folder.path().join("postgres"))
        .setting("wal_writer_delay", "10s")
        .setting("synchronous_commit", "off")
        .start()
        .await
        .expect("started");
    let client = with_schema(&postgres).await;
    client.batch_execute("CHECKPOINT").await.expect("on disk");
    // It writes full pages all the time, and what is written outlives the processes.
    let writer = "SELECT pid::text FROM pg_stat_activity WHERE backend_type = 'walwriter'";
    let writer: String = client.query_one(writer, &[]).await.expect("read").get(0);
    run(Path::new("kill"), &["-STOP", &writer]);
    let (brokers, topic) = shared_topic().await;
    let url = postgres.url("postgres");
    // What the relay itself commits goes to the disk, and takes with it what others did.
    let mut toml = section(
        &testing::kafka_brokers(),
        &url,
        &format!("durability = \"{durability}\""),
    );
    toml = toml.replace("\"2s\"", "\"30s\"").replace("\"50ms\"", "\"5s\"");
    let relay = Relay::start(&toml).await;
    let writers = Writers::start(&url, 4, APPEND, &[&topic], "");
    rows_reach(&client, COUNT, 300).await;
    wait::until("enough is not on disk", PATIENCE, async || {
        let behind = "SELECT (pg_current_wal_insert_lsn() - pg_current_wal_flush_lsn())::bigint";
        Ok((client.query_one(behind, &[]).await?.get::<_, i64>(0) >= unflushed).then_some(()))
    })
    .await
    .expect("written");
    postgres.kill().expect("killed");
    postgres.start().await.expect("started");
    let client = connect(&url).await.expect("connected");
    more_rows(&client, 100).await;
    writers.stop().await;
    let ids = client
        .query("SELECT event_id::text FROM outbox", &[])
        .await
        .expect("read");
    wait::until("all is published", PATIENCE, async || {
        let records = records(&brokers, &[&topic]).await;
        let found: std::collections::HashSet<&str> = records.iter().map(Record::event_id).collect();
        Ok(ids
            .iter()
            .all(|row| found.contains(row.get::<_, &str>(0)))
            .then_some(()))
    })
    .await
    .expect("published");
    relay.stop().await;
    compare(&client, ROWS, &records(&brokers, &[&topic]).await).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_when_flushed_survives_a_crash() {
    let flushed = crash_without_the_disk("flushed", 0).await;
    report("crash, published when flushed", &flushed);
    assert_eq!(flushed.ghosts, 0, "records of rows that are gone");
    // That this is not for want of anything to lose:
    let committed = crash_without_the_disk("committed", 100_000).await;
    report("crash, published when committed", &committed);
    assert!(committed.ghosts > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_killed_or_frozen_costs_time_and_nothing_else() {
    let folder = Folder::create("broker");
    let mut kafka = testing::private_kafka(&folder).await.expect("started");
    let database = shared_database().await;
    let client = database.connect().await.expect("connected");
    let brokers = plain(&kafka.brokers());
    create_topics(&brokers, &["a", "b"], 3).await;
    let toml = section(&kafka.brokers(), &database.url(), "delivery_timeout = \"2s\"");
    let relay = Relay::start(&toml).await;
    let writers = Writers::start(&database.url(), 4, APPEND, &["a", "b"], "");
    more_rows(&client, 200).await;
    kafka.kill().expect("killed");
    more_rows(&client, 200).await;
    kafka.start().await.expect("started");
    more_rows(&client, 200).await;

    kafka.pause().expect("frozen");
    relay.says("acknowledged nothing for 2s").await;
    more_rows(&client, 200).await;
    kafka.resume().expect("goes on");
    more_rows(&client, 200).await;
    writers.stop().await;
    settled(&database.url(), "test", "outbox", "id").await;
    relay.stop().await;
    let outcome = compare(&client, ROWS, &records(&brokers, &["a", "b"]).await).await;
    report("broker killed and frozen", &outcome);
    assert_eq!(outcome.ghosts, 0);
    kafka.kill().expect("killed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_whose_disk_is_full_goes_on_with_a_larger_one() {
    let folder = Folder::create("broker-disk");
    let Some(disk) = testing::disk(128 * MEGABYTE) else {
        return;
    };
    let mut kafka = Kafka::builder(folder.path().join("kafka"))
        .data_in(disk.path())
        .start()
        .await
        .expect("started");
    let database = shared_database().await;
    let client = database.connect().await.expect("connected");
    let brokers = plain(&kafka.brokers());
    create_topics(&brokers, &["a"], 2).await;
    let relay = Relay::start(&section(
        &kafka.brokers(),
        &database.url(),
        "delivery_timeout = \"5s\"",
    ))
    .await;
    let writers = Writers::start(&database.url(), 4, APPEND, &["a"], "");
    more_rows(&client, 200).await;
    disk.fill().expect("filled");
    // Small records fit into the last page for a while.
    wait::until("the broker ends", PATIENCE, || {
        let ended = !kafka.is_running();
        async move { Ok(ended.then_some(())) }
    })
    .await
    .expect("ended");
    more_rows(&client, 200).await;
    disk.resize(256 * MEGABYTE).expect("enlarged");
    kafka.start().await.expect("started");
    more_rows(&client, 200).await;
    writers.stop().await;
    settled(&database.url(), "test", "outbox", "id").await;
    relay.stop().await;
    let outcome = compare(&client, ROWS, &records(&brokers, &["a"]).await).await;
    report("broker's disk full", &outcome);
    assert_eq!(outcome.ghosts, 0);
    kafka.kill().expect("killed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_whose_disk_is_full_refuses_business_and_loses_nothing() {
    let folder = Folder::create("database-disk");
    let Some(disk) = testing::disk(192 * MEGABYTE) else {
        return;
    };
    let postgres = Postgres::builder(folder.path().join("postgres"))
        .data_in(disk.path())
        .fsync(false)
        .start()
        .await
        .expect("started");
    let client = with_schema(&postgres).await;
    let (brokers, topic) = shared_topic().await;
    let url = postgres.url("postgres");
    let relay = Relay::start(&section(&testing::kafka_brokers(), &url, "")).await;
    let writers = Writers::start(&url, 4, APPEND, &[&topic], "");
    more_rows(&client, 200).await;
    disk.fill().expect("filled");
    wait::until("business is refused", PATIENCE, async || {
        let refused = client.execute(APPEND, &[&"mine", &topic]).await.err();
        let full = refused.is_some_and(|error| error.code() == Some(&SqlState::DISK_FULL));
        Ok(full.then_some(()))
    })
    .await
    .expect("refused");
    tokio::time::sleep(Duration::from_secs(1)).await;
    disk.free().expect("freed");
    let client = connect(&url).await.expect("connected");
    more_rows(&client, 200).await;
    writers.stop().await;
    settled(&url, "test", "outbox", "id").await;
    relay.stop().await;
    let outcome = compare(&client, ROWS, &records(&brokers, &[&topic]).await).await;
    report("database's disk full", &outcome);
    assert_eq!(outcome.ghosts, 0);
}
