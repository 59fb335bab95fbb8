//! The relay on every PostgreSQL that it promises to run on, the oldest and the newest ones: fetched, since a machine has
//! one. What depends on the server is gone through: init, reads and fence, quarantine, retention, verify.

#[expect(dead_code, reason = "the other tests use the rest")]
mod servers;

use local_stack::testing::{Folder, kafka_brokers, unique};
use local_stack::{Postgres, postgres, wait};
use outbox_relay::commands::{init, quarantine, verify};
use servers::{
    APPEND, PATIENCE, Relay, Writers, compare, create_topics, parse, plain, records, report, settled,
};

/// The oldest that has what is needed, and those after the one that Debian brings.
const VERSIONS: [&str; 3] = ["14.19.0", "17.6.0", "18.0.0"];

#[tokio::test(flavor = "multi_thread")]
async fn every_postgresql_from_14_on_is_relayed() {
    for version in VERSIONS {
        let folder = Folder::create(&format!("postgresql-{version}"));
        let binaries = tokio::task::spawn_blocking(move || postgres::fetch_version(version))
            .await
            .expect("no panic")
            .expect("fetched");
        let server = Postgres::builder(folder.path().join("postgres"))
            .binaries(binaries)
            .fsync(false)
            .start()
            .await
            .unwrap_or_else(|error| panic!("{version}: {error:#}"));
        relay_everything(version, &server.url("postgres")).await;
    }
}

async fn relay_everything(version: &str, url: &str) {
    let client = postgres::connect(url).await.expect("connected");
    let found: String = client
        .query_one("SELECT current_setting('server_version')", &[])
        .await
        .expect("asked")
        .get(0);
    assert!(
        version.starts_with(found.split(' ').next().unwrap_or_default()),
        "{found}"
    );

    let brokers = kafka_brokers();
    let (topic, missing) = (unique("versions"), unique("missing"));
    create_topics(&plain(&brokers), &[&topic], 3).await;
    let toml = format!(
        "kafka.brokers = \"{brokers}\"\n[outbox.v]\ndatabase_url = \"{url}\"\nlease_ttl = \"3s\"\nsave_interval = \"50ms\"\n\
         retention = \"1h\"\n"
    );
    let config = parse(&toml);
    // Twice: what is there is left alone.
    for _ in 0..2 {
        init::init(&config, None, &init::Options::default())
            .await
            .expect(version);
    }
    client
        .batch_execute("CREATE TABLE entity (id text PRIMARY KEY, version bigint NOT NULL)")
        .await
        .expect("created");

    let relay = Relay::start(&toml).await;
    let writers = Writers::start(url, 2, APPEND, &[&topic], "");
    // A hole that lives as long as its transaction, which is prepared, and one that is rolled back.
    client
        .batch_execute(
            "BEGIN; INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source, topic)
             VALUES (gen_random_uuid(), 'x', 'prepared', 1, 'x', '/x', 'gone'); PREPARE TRANSACTION 'p';
             BEGIN; INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source)
             VALUES (gen_random_uuid(), 'x', 'rolled back', 1, 'x', '/x'); ROLLBACK;",
        )
        .await
        .expect("prepared");
    servers::rows_reach(&client, "SELECT count(*) FROM outbox", 500).await;
    client
        .batch_execute("ROLLBACK PREPARED 'p'")
        .await
        .expect("rolled back");
    writers.stop().await;
    // One that waits in quarantine until its topic is there.
    client
        .execute(APPEND, &[&"poisoned", &missing])
        .await
        .expect("appended");
    settled(url, "v", "outbox", "id").await;
    relay.says("\"quarantined_keys\":1").await;
    create_topics(&plain(&brokers), &[&missing], 1).await;
    quarantine::retry(&config, None, Some("poisoned"))
        .await
        .expect("asked");
    wait::until("the quarantine is empty", PATIENCE, || async {
        let left = client
            .query_one("SELECT count(*) FROM outbox_relay_quarantine", &[])
            .await?;
        Ok((left.get::<_, i64>(0) == 0).then_some(()))
    })
    .await
    .expect(version);
    relay.stop().await;

    let answer = verify::verify(&config, None).await.expect("verified");
    assert_eq!(answer.code(), 0, "{version}: {}", answer.json());
    let records = records(&plain(&brokers), &[&topic, &missing]).await;
    let outcome = compare(&client, servers::ROWS, &records).await;
    assert!(
        outcome.rows >= 500 && outcome.ghosts == 0,
        "{version}: {outcome:?}"
    );
    report(&format!("PostgreSQL {version}"), &outcome);

    let removed: i64 = client
        .query_one("SELECT public.outbox_remove(floor, floor) FROM outbox_relay", &[])
        .await
        .expect("removed")
        .get(0);
    let left: i64 = client
        .query_one("SELECT count(*) FROM outbox", &[])
        .await
        .expect("counted")
        .get(0);
    assert!(removed > 0 && left == 0, "{version}: {removed}, {left} left");
}
