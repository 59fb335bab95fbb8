//! The relay and the writers with the rights that `init` grants, and no others.

use local_stack::postgres;
use local_stack::testing::{self, Database};
use outbox_relay::topics::{self, Topic};
use tokio_postgres::Client;

use crate::kit::*;
use crate::support::{RunningRelay, brokers};

/// A role of its own, gone at the end.
struct Role(String);

impl Role {
    async fn create(client: &Client, name: &str) -> Self {
        let name = testing::unique(name);
        client
            .batch_execute(&format!("CREATE ROLE \"{name}\" LOGIN"))
            .await
            .expect("created");
        Self(name)
    }

    fn url(&self, url: &str) -> String {
        url.replacen("postgres@", &format!("{}@", self.0), 1)
    }
}

fn section(url: &str, topic: &str) -> String {
    format!(
        "kafka.properties.\"message.max.bytes\" = 20000\n[outbox.test]\ndatabase_url = \"{url}\"\ntopic = \"{topic}\"\n\
         lease_ttl = \"2s\"\nsave_interval = \"50ms\"\nretention = \"30s\"\ntable = \"app.outbox\"\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn relay_and_writer_can_do_what_they_need_and_no_more() {
    let database = Database::empty().await;
    let owner = database.connect().await.expect("connected");
    owner.batch_execute("CREATE SCHEMA app").await.expect("created");
    let (relay_role, writer_role) = (
        Role::create(&owner, "Relay role").await,
        Role::create(&owner, "writer").await,
    );
    let topic = testing::unique("events.test");
    let wanted = Topic {
        name: topic.clone(),
        partitions: 2,
    };
    topics::create(&brokers(), &[wanted], 1).await.expect("created");
    let as_relay = section(&relay_role.url(&database.url()), &topic);
    let database_url = database.url();
    let words = [
        "init",
        "--database-url",
        &database_url,
        "--relay-role",
        &relay_role.0,
        "--writer-role",
        &writer_role.0,
    ];
    for _ in 0..2 {
        let (code, answer) = json(&as_relay, &words).await;
        assert_eq!(code, 0, "{answer}");
    }

    let writer = postgres::connect(&writer_role.url(&database_url))
        .await
        .expect("connected");
    let columns = "event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source, payload";
    for (version, size) in [(1, 1), (2, 30_000), (3, 1)] {
        let statement = format!(
            "INSERT INTO app.outbox ({columns})
             VALUES (gen_random_uuid(), 'test', 'k', {version}, 'x', '/x', convert_to(repeat('x', {size}), 'UTF8'))"
        );
        writer.batch_execute(&statement).await.expect("inserted");
    }
    for denied in [
        "SELECT * FROM app.outbox",
        "UPDATE app.outbox SET payload = NULL",
        "DELETE FROM app.outbox",
        "TRUNCATE app.outbox",
        "SELECT nextval('app.outbox_id_seq')",
        "SELECT setval('app.outbox_id_seq', 1)",
        "INSERT INTO app.outbox (id, event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source)
         OVERRIDING SYSTEM VALUE VALUES (7, gen_random_uuid(), 't', 'k', 1, 'x', '/x')",
        "COPY app.outbox (id, event_id) FROM STDIN",
        "SELECT * FROM app.outbox_relay",
        "UPDATE app.outbox_relay SET floor = 99",
        "SELECT app.outbox_remove(99, 99)",
    ] {
        let code = writer.batch_execute(denied).await.err();
        let code = code.and_then(|error| Some(error.code()?.code().to_owned()));
        assert_eq!(code.as_deref(), Some("42501"), "the writer may {denied}");
    }

    let relay = RunningRelay::start(&as_relay).await;
    wait_until("the rows behind the oversize one wait", || async {
        let rows = owner
            .query_one("SELECT count(*) FROM app.outbox_relay_quarantine", &[])
            .await;
        rows.expect("counted").get::<_, i64>(0) == 2
    })
    .await;
    for (words, wanted) in [
        (&["quarantine", "list"][..], 0),
        (&["quarantine", "retry", "--all"], 0),
        (&["quarantine", "skip", "2", "--reason", "too large"], 0),
        (&["status"], 0),
    ] {
        let (code, answer) = json(&as_relay, words).await;
        assert_eq!(code, wanted, "{words:?}: {answer}");
    }
    wait_until("all are published", || async {
        versions(&read(&topic).await, "k") == [1, 2, 3]
    })
    .await;
    wait_until("floors are remembered for the retention", || async {
        let floors = owner
            .query_one("SELECT count(*) FROM app.outbox_relay_floors", &[])
            .await;
        floors.expect("counted").get::<_, i64>(0) > 0
    })
    .await;
    for words in [
        &["verify"][..],
        &["replay", "--key", "k"],
        &["quarantine", "show", "k"],
    ] {
        let (code, answer) = json(&as_relay, words).await;
        assert_eq!(code, 0, "{words:?}: {answer}");
    }
    relay.stop().await;

    let client = postgres::connect(&relay_role.url(&database_url))
        .await
        .expect("connected");
    let removed = client.query_one("SELECT app.outbox_remove(2, 10)", &[]).await;
    assert_eq!(removed.expect("removed").get::<_, i64>(0), 2, "retention works");
    let removed = client.query_one("SELECT app.outbox_remove(99, 10)", &[]).await;
    assert_eq!(removed.expect("removed").get::<_, i64>(0), 3, "above the floor");
    for denied in [
        "INSERT INTO app.outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source)
         VALUES (gen_random_uuid(), 't', 'k', 1, 'x', '/x')",
        "UPDATE app.outbox SET payload = NULL",
        "DELETE FROM app.outbox",
        "TRUNCATE app.outbox",
        "SELECT nextval('app.outbox_id_seq')",
        "DELETE FROM app.outbox_relay",
        "DROP TABLE app.outbox_relay_floors",
        "CREATE TABLE app.x ()",
    ] {
        let code = client.batch_execute(denied).await.err();
        let code = code.and_then(|error| Some(error.code()?.code().to_owned()));
        assert_eq!(code.as_deref(), Some("42501"), "the relay may {denied}");
    }

    // Whatever is missing is named.
    let role = &relay_role.0;
    for (missing, named) in [
        ("SELECT ON app.outbox", "SELECT on app.outbox"),
        ("UPDATE ON app.outbox_relay", "UPDATE on app.outbox_relay"),
        (
            "INSERT ON app.outbox_relay_members",
            "INSERT on app.outbox_relay_members",
        ),
        (
            "INSERT ON app.outbox_relay_floors",
            "INSERT on app.outbox_relay_floors",
        ),
        (
            "UPDATE ON app.outbox_relay_quarantine",
            "UPDATE on app.outbox_relay_quarantine",
        ),
        (
            "SELECT ON app.outbox_relay_removed",
            "SELECT on app.outbox_relay_removed",
        ),
        (
            "SELECT ON SEQUENCE app.outbox_id_seq",
            "SELECT on sequence app.outbox_id_seq",
        ),
        (
            "EXECUTE ON FUNCTION app.outbox_remove(bigint, bigint)",
            "app.outbox_remove",
        ),
        ("USAGE ON SCHEMA app", "USAGE on schema app"),
    ] {
        owner
            .batch_execute(&format!("REVOKE {missing} FROM \"{role}\""))
            .await
            .expect("revoked");
        let problem = RunningRelay::start(&as_relay).await.failure().await;
        assert!(
            problem.contains(named) && problem.contains("--relay-role"),
            "{missing}: {problem}"
        );
        owner
            .batch_execute(&format!("GRANT {missing} TO \"{role}\""))
            .await
            .expect("granted");
    }
    let replicated = format!("{as_relay}durability = \"replicated\"\n");
    let problem = RunningRelay::start(&replicated).await.failure().await;
    assert!(
        problem.contains(&format!("GRANT pg_monitor TO \"{role}\"")),
        "{problem}"
    );
    drop((client, writer));
    for role in [relay_role, writer_role] {
        owner
            .batch_execute(&format!("DROP OWNED BY \"{0}\"; DROP ROLE \"{0}\"", role.0))
            .await
            .expect("dropped");
    }
}
