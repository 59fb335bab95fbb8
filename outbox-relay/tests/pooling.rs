//! Through PgBouncer, which gives each transaction another server connection.

#[expect(dead_code, reason = "the other tests use the rest")]
mod servers;

use local_stack::postgres::connect;
use local_stack::testing::{self, Folder};
use local_stack::{Pgbouncer, Postgres, wait};
use outbox_relay::commands::{quarantine, status, verify};
use rdkafka::config::ClientConfig;
use servers::*;
use tokio_postgres::Client;

/// Rows that were ever written: some may be removed by now.
const COUNT: &str = "SELECT coalesce(sum(version), 0)::bigint FROM entity";

struct Pooled {
    bouncer: Pgbouncer,
    postgres: Postgres,
    client: Client,
    brokers: ClientConfig,
    topic: String,
    _folder: Folder,
}

impl Pooled {
    async fn new() -> Self {
        let folder = Folder::create("pooling");
        let postgres = testing::private_postgres(&folder).await.expect("started");
        let bouncer = Pgbouncer::start(folder.path().join("pgbouncer"), postgres.port())
            .await
            .expect("started");
        let client = connect(&postgres.url("postgres")).await.expect("connected");
        client.batch_execute(SCHEMA).await.expect("made");
        let (brokers, topic) = (plain(&testing::kafka_brokers()), testing::unique("pooled"));
        create_topics(&brokers, &[&topic], 3).await;
        Self {
            bouncer,
            postgres,
            client,
            brokers,
            topic,
            _folder: folder,
        }
    }

    fn toml(&self, extra: &str) -> String {
        format!(
            "kafka.brokers = \"{}\"\n[outbox.test]\ndatabase_url = \"{}\"\nlease_ttl = \"2s\"\nsave_interval = \"50ms\"\n\
             {extra}\n",
            testing::kafka_brokers(),
            self.bouncer.url("postgres")
        )
    }

    async fn more_rows(&self, more: i64) {
        let client = connect(&self.postgres.url("postgres")).await.expect("connected");
        let rows: i64 = client.query_one(COUNT, &[]).await.expect("read").get(0);
        rows_reach(&client, COUNT, rows + more).await;
    }

    async fn settled(&self) {
        settled(&self.postgres.url("postgres"), "test", "outbox", "id").await;
    }

    async fn outcome(&self) -> Outcome {
        let client = connect(&self.postgres.url("postgres")).await.expect("connected");
        compare(&client, ROWS, &records(&self.brokers, &[&self.topic]).await).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_through_a_transaction_pooler() {
    let mut pooled = Pooled::new().await;
    let toml = pooled.toml("pooling = \"transaction\"\nretention = \"4s\"\n");
    let first = Relay::start(&toml).await;
    let missing = testing::unique("missing");
    // Others come through the pooler too, and leave their settings behind in its connections.
    let others = connect(&pooled.bouncer.url("postgres")).await.expect("connected");
    let untidy = tokio::spawn(async move {
        let left =
            "SET timezone = 'Asia/Tokyo'; SET search_path = nowhere; SET default_transaction_read_only = on;
                    SET default_transaction_isolation = 'serializable'; SET statement_timeout = '1ms'";
        while others.batch_execute(left).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    });
    let topic = pooled.topic.clone();
    let direct = pooled.postgres.url("postgres");
    let writers = Writers::start(&direct, 4, APPEND, &[&topic], "");
    pooled.more_rows(300).await;

    // The fence: an id is open, and all that is behind it flows.
    let mut late = connect(&direct).await.expect("connected");
    let open = late.transaction().await.expect("begun");
    open.execute(APPEND, &[&"late", &topic]).await.expect("appended");
    let id: i64 = open
        .query_one("SELECT max(id) FROM outbox WHERE aggregate_id = 'late'", &[])
        .await
        .expect("read")
        .get(0);
    pooled.more_rows(300).await;
    wait::until("what is behind is published", PATIENCE, async || {
        let row = pooled
            .client
            .query_one(
                "SELECT floor, coalesce(upper(published), 0) FROM outbox_relay",
                &[],
            )
            .await?;
        let (floor, highest): (i64, i64) = (row.get(0), row.get(1));
        assert!(floor < id, "the floor passed an id whose transaction is open");
        Ok((highest > id + 200).then_some(()))
    })
    .await
    .expect("published");
    open.rollback().await.expect("rolled back");

    // The quarantine.
    pooled
        .client
        .execute(APPEND, &[&"lost", &missing])
        .await
        .expect("appended");
    wait::until("it is in quarantine", PATIENCE, async || {
        let answer = quarantine::list(&parse(&toml), Some("test")).await?;
        Ok(answer.json().to_string().contains(&missing).then_some(()))
    })
    .await
    .expect("frozen");
    create_topics(&pooled.brokers, &[&missing], 1).await;
    wait::until("it is released", PATIENCE, async || {
        quarantine::retry(&parse(&toml), Some("test"), None).await?;
        let waiting = "SELECT count(*) FROM outbox_relay_quarantine";
        Ok((pooled.client.query_one(waiting, &[]).await?.get::<_, i64>(0) == 0).then_some(()))
    })
    .await
    .expect("released");

    // A second one takes over.
    let second = Relay::start(&toml).await;
    second.says("\"role\":\"standby\"").await;
    first.crash().await;
    second.says("\"role\":\"leading\"").await;
    let answer = status::status(&parse(&toml)).await.expect("answered");
    assert_eq!(answer.code(), 0, "{}", answer.json());

    // The pooler, and the server behind it.
    pooled.more_rows(100).await;
    pooled.bouncer.kill().expect("killed");
    pooled.more_rows(100).await;
    pooled.bouncer.restart().await.expect("started");
    pooled.more_rows(100).await;
    pooled.postgres.kill().expect("killed");
    pooled.postgres.start().await.expect("started");
    pooled.more_rows(300).await;
    writers.stop().await;
    pooled.settled().await;

    let verified = verify::verify(&parse(&toml), Some("test"))
        .await
        .expect("verified");
    assert_eq!(verified.code(), 0, "{}", verified.json());
    // Retention has removed what is old: what is left is enough to compare the end with, and the rest went by then.
    let client = connect(&direct).await.expect("connected");
    let removed = "SELECT count(*) FROM outbox_relay_removed WHERE removed_to > 0";
    rows_reach(&client, removed, 1).await;
    let all = records(&pooled.brokers, &[&topic, &missing]).await;
    second.stop().await;
    let versions = client
        .query("SELECT id, version FROM entity ORDER BY id", &[])
        .await
        .expect("read");
    let mut repeats = all.len();
    for row in &versions {
        let (key, last): (String, i64) = (row.get(0), row.get(1));
        let mut first_seen: Vec<i64> = Vec::new();
        for record in all.iter().filter(|record| record.key == key) {
            let version = record
                .header("aggregate-version")
                .expect("there")
                .parse()
                .expect("a number");
            if !first_seen.contains(&version) {
                first_seen.push(version);
            }
        }
        repeats -= first_seen.len();
        assert_eq!(first_seen, (1..=last).collect::<Vec<_>>(), "versions of {key}");
    }
    report("through a transaction pooler", &(all.len(), repeats));
    untidy.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_restarted_behind_the_pooler_is_noticed() {
    let mut pooled = Pooled::new().await;
    let relay = Relay::start(&pooled.toml("pooling = \"transaction\"")).await;
    pooled
        .client
        .execute(APPEND, &[&"a", &pooled.topic])
        .await
        .expect("appended");
    pooled.settled().await;
    let epoch = async |client: &Client| -> i64 {
        let epoch = client.query_one("SELECT epoch FROM outbox_relay", &[]).await;
        epoch.expect("read").get(0)
    };
    let before = epoch(&pooled.client).await;
    // The pooler keeps its clients' connections.
    pooled.postgres.stop().await.expect("stopped");
    pooled.postgres.start().await.expect("started");
    pooled.client = connect(&pooled.postgres.url("postgres"))
        .await
        .expect("connected");
    wait::until("a new epoch", PATIENCE, async || {
        Ok((epoch(&pooled.client).await > before).then_some(()))
    })
    .await
    .expect("begun");
    pooled
        .client
        .execute(APPEND, &[&"a", &pooled.topic])
        .await
        .expect("appended");
    pooled.settled().await;
    relay.stop().await;
    assert_eq!(pooled.outcome().await.ghosts, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_pooler_that_is_taken_for_a_session_is_refused_before_it_does_harm() {
    let pooled = Pooled::new().await;
    // Somebody's server connection is there to be shared.
    let through = connect(&pooled.bouncer.url("postgres")).await.expect("connected");
    pooled
        .client
        .execute(APPEND, &[&"a", &pooled.topic])
        .await
        .expect("appended");
    let relay = Relay::start(&pooled.toml("")).await;
    relay.says("set pooling = ").await;
    relay.stop().await;
    for _ in 0..5 {
        let shown = through.simple_query("SHOW search_path").await.expect("answered");
        let path = shown.iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        assert_eq!(path, Some("\"$user\", public"), "settings stayed behind");
    }
    assert_eq!(records(&pooled.brokers, &[&pooled.topic]).await.len(), 0);
    let relay = Relay::start(&pooled.toml("pooling = \"transaction\"")).await;
    pooled.settled().await;
    relay.stop().await;
    assert_eq!(pooled.outcome().await.repeats, 0);
}
