//! TLS, passwords and rights, at PostgreSQL and at Kafka. What is refused is said and waited for, and no secret is told.

#[expect(dead_code, reason = "the other tests use the rest")]
mod servers;

use std::path::Path;
use std::process::Stdio;

use local_stack::certificates::Authority;
use local_stack::kafka::USER;
use local_stack::postgres::connect;
use local_stack::testing::{self, Database, Folder};
use local_stack::{Kafka, Postgres, wait};
use outbox_relay::commands::quarantine;
use servers::*;

const COUNT: &str = "SELECT count(*) FROM outbox";
const WRONG: &str = "an-entirely-wrong-one";

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_is_reached_by_tls_under_the_right_authority_or_not_at_all() {
    let folder = Folder::create("postgres-tls");
    let mut postgres = Postgres::builder(folder.path().join("postgres"))
        .fsync(false)
        .tls_only()
        .start()
        .await
        .expect("started");
    let authority = Authority::in_folder(folder.path().join("postgres/tls")).expect("there");
    let own = authority.issue("relay").expect("issued");
    // Certificates of clients come from the same authority, and name the host as their user.
    std::fs::copy(authority.ca_file(), postgres.data().join("root.crt")).expect("copied");
    let admin = connect(&postgres.admin_url("postgres")).await.expect("connected");
    admin
        .batch_execute("ALTER SYSTEM SET ssl_ca_file = 'root.crt'; ")
        .await
        .expect("set");
    admin
        .batch_execute("CREATE ROLE localhost SUPERUSER LOGIN")
        .await
        .expect("made");
    let rules = postgres.data().join("pg_hba.conf");
    let given = std::fs::read_to_string(&rules).expect("read");
    std::fs::write(&rules, format!("hostssl all localhost all cert\n{given}")).expect("written");
    drop(admin);
    postgres.stop().await.expect("stopped");
    postgres.start().await.expect("started");
    let client = connect(&postgres.admin_url("postgres")).await.expect("connected");
    client.batch_execute(SCHEMA).await.expect("made");
    let (brokers, topic) = (testing::kafka_brokers(), testing::unique("tls"));
    create_topics(&plain(&brokers), &[&topic], 2).await;
    let toml = |url: &str, extra: &str| {
        format!(
            "kafka.brokers = \"{brokers}\"\n[outbox.test]\ndatabase_url = \"{url}\"\nlease_ttl = \"2s\"\n\
             save_interval = \"50ms\"\n{extra}\n"
        )
    };
    let ca_file = |file: &Path| format!("tls.ca_file = \"{}\"", path(file));
    client.execute(APPEND, &[&"a", &topic]).await.expect("appended");

    let relay = Relay::start(&toml(&postgres.url("postgres"), "")).await;
    relay.says("no encryption").await;
    relay.stop().await;
    let stranger = Authority::in_folder(folder.path().join("stranger")).expect("made");
    let relay = Relay::start(&toml(&postgres.url("postgres"), &ca_file(&stranger.ca_file()))).await;
    relay.says("invalid peer certificate").await;
    relay.stop().await;
    // The certificate is for 127.0.0.1 and localhost.
    let elsewhere = postgres.url("postgres") + "?host=elsewhere&hostaddr=127.0.0.1";
    let elsewhere = elsewhere.replace(&format!("127.0.0.1:{}", postgres.port()), "");
    let elsewhere = format!("{elsewhere}&port={}", postgres.port());
    let relay = Relay::start(&toml(&elsewhere, &ca_file(&authority.ca_file()))).await;
    relay.says("not valid for name").await;
    relay.stop().await;
    let relay = Relay::start(&toml(
        &postgres.url("postgres"),
        &ca_file(&folder.path().join("none")),
    ))
    .await;
    relay.says("TLS to PostgreSQL cannot be set up").await;
    relay.stop().await;
    assert_eq!(records(&plain(&brokers), &[&topic]).await.len(), 0);

    let relay = Relay::start(&toml(&postgres.url("postgres"), &ca_file(&authority.ca_file()))).await;
    settled(&postgres.admin_url("postgres"), "test", "outbox", "id").await;
    let ssl = "SELECT bool_and(s.ssl), count(*) FROM pg_stat_ssl s JOIN pg_stat_activity USING (pid)
                WHERE application_name LIKE 'outbox-relay%'";
    let row = client.query_one(ssl, &[]).await.expect("read");
    assert_eq!(
        row.get::<_, Option<bool>>(0),
        Some(true),
        "all of the relay's connections"
    );
    assert!(row.get::<_, i64>(1) >= 1);
    relay.stop().await;

    // As a role that only a certificate lets in.
    let as_role = postgres.url("postgres").replace("postgres@", "localhost@");
    let relay = Relay::start(&toml(&as_role, &ca_file(&authority.ca_file()))).await;
    relay.says("requires a valid client certificate").await;
    relay.stop().await;
    let with_own = format!(
        "{}\ntls.cert_file = \"{}\"\ntls.key_file = \"{}\"",
        ca_file(&authority.ca_file()),
        path(&own.certificate),
        path(&own.key)
    );
    client.execute(APPEND, &[&"a", &topic]).await.expect("appended");
    let relay = Relay::start(&toml(&as_role, &with_own)).await;
    settled(&postgres.admin_url("postgres"), "test", "outbox", "id").await;
    relay.stop().await;
    compare(&client, ROWS, &records(&plain(&brokers), &[&topic]).await).await;
}

/// A database of its own on the shared PostgreSQL.
async fn database() -> Database {
    let database = Database::empty().await;
    let client = database.connect().await.expect("connected");
    client.batch_execute(SCHEMA).await.expect("made");
    database
}

fn sasl(kafka: &Kafka, database: &Database, password: &str) -> String {
    format!(
        "[kafka]\nbrokers = \"{}\"\n{password}\n[kafka.properties]\n\"security.protocol\" = \"sasl_ssl\"\n\
         \"ssl.ca.location\" = \"{}\"\n\"sasl.mechanism\" = \"PLAIN\"\n\"sasl.username\" = \"{}\"\n\
         [outbox.test]\ndatabase_url = \"{}\"\nlease_ttl = \"2s\"\nsave_interval = \"50ms\"\n",
        kafka.sasl_tls_brokers().expect("there"),
        path(kafka.ca_file().expect("there")),
        USER.0,
        database.url(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_takes_a_password_and_a_topic_can_be_forbidden() {
    let folder = Folder::create("kafka-sasl");
    let kafka = Kafka::builder(folder.path().join("kafka"))
        .sasl_tls()
        .authorizer()
        .start()
        .await
        .expect("started");
    let brokers = plain(&kafka.brokers());
    create_topics(&brokers, &["open", "closed"], 2).await;
    let database = database().await;
    let client = database.connect().await.expect("connected");
    client.execute(APPEND, &[&"a", &"open"]).await.expect("appended");

    // The program itself, since it is its logs that must be silent.
    let log = folder.path().join("wrong.log");
    let config = folder.path().join("wrong.toml");
    let endpoints = folder.path().join("endpoints.json");
    let text = sasl(&kafka, &database, &format!("sasl_password = \"{WRONG}\""));
    let text = text.replace("postgres://postgres@", "postgres://postgres:db-secret@");
    let text = format!(
        "admin.listen = \"127.0.0.1:0\"\nlog.level = \"debug\"\nservice.endpoints_file = \"{}\"\n{text}",
        path(&endpoints)
    );
    std::fs::write(&config, text).expect("written");
    let output = std::fs::File::create(&log).expect("made");
    let mut program = tokio::process::Command::new(env!("CARGO_BIN_EXE_outbox-relay"))
        .args(["--config", path(&config)])
        .stdout(output.try_clone().expect("cloned"))
        .stderr(output)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("it starts");
    let told = wait::until("it says what is wrong", PATIENCE, async || {
        let Ok(text) = std::fs::read_to_string(&endpoints) else {
            return Ok(None);
        };
        let Some(admin) = text.split('"').find_map(|part| part.parse().ok()) else {
            return Ok(None);
        };
        let status = local_stack::process::http_get(admin, "/status").await;
        Ok(status
            .ok()
            .map(|(_, text)| text)
            .filter(|text| text.contains("uthentication")))
    })
    .await
    .expect("told");
    assert!(told.contains("\"role\":\"waiting\""), "{told}");
    program.kill().await.expect("killed");
    let logged = std::fs::read_to_string(&log).expect("read");
    assert!(logged.contains("uthentication"), "{logged}");
    for secret in [WRONG, "db-secret"] {
        assert!(
            !told.contains(secret) && !logged.contains(secret),
            "{secret}: {told} {logged}"
        );
    }
    let debug = format!("{:?}", parse(&std::fs::read_to_string(&config).expect("read")));
    assert!(!debug.contains(WRONG) && !debug.contains("db-secret"), "{debug}");

    // The right one, from a file.
    let secret = folder.path().join("password");
    std::fs::write(&secret, format!("{}\n", USER.1)).expect("written");
    let toml = sasl(
        &kafka,
        &database,
        &format!("sasl_password_file = \"{}\"", path(&secret)),
    );
    let relay = Relay::start(&toml).await;
    settled(&database.url(), "test", "outbox", "id").await;

    // Five entities of one topic wait, those of the other flow.
    let five = |topic: &'static str| (0..5).map(move |n| (format!("{topic}-{n}"), topic));
    let append = async |topic: &'static str| {
        for (key, topic) in five(topic) {
            client.execute(APPEND, &[&key, &topic]).await.expect("appended");
        }
    };
    append("closed").await;
    settled(&database.url(), "test", "outbox", "id").await;
    kafka.deny_write(USER.0, "closed").await.expect("denied");
    let frozen = wait::until("the denial holds", PATIENCE, async || {
        append("closed").await;
        append("open").await;
        let answer = quarantine::list(&parse(&toml), Some("test")).await?;
        let text = answer.json().to_string();
        Ok((0..5)
            .all(|n| text.contains(&format!("closed-{n}")))
            .then_some(text))
    })
    .await
    .expect("frozen");
    assert!(!frozen.contains("open-"), "{frozen}");
    append("closed").await;
    append("open").await;
    settled(&database.url(), "test", "outbox", "id").await;
    let open =
        "SELECT event_id::text, topic || '/' || aggregate_id FROM outbox WHERE topic = 'open' ORDER BY id";
    let found = records(&brokers, &["open"]).await;
    compare(&client, open, &found).await;

    kafka.allow_write(USER.0, "closed").await.expect("allowed");
    wait::until("all is retried", PATIENCE, async || {
        quarantine::retry(&parse(&toml), Some("test"), None).await?;
        let waiting: i64 = client
            .query_one("SELECT count(*) FROM outbox_relay_quarantine", &[])
            .await?
            .get(0);
        Ok((waiting == 0).then_some(()))
    })
    .await
    .expect("published");
    append("closed").await;
    settled(&database.url(), "test", "outbox", "id").await;
    // Settled is also what follows the last rows of the quarantine into it, to be published from there.
    wait::until("the quarantine stays empty", PATIENCE, async || {
        let waiting = "SELECT count(*) FROM outbox_relay_quarantine";
        Ok((client.query_one(waiting, &[]).await?.get::<_, i64>(0) == 0).then_some(()))
    })
    .await
    .expect("published");
    relay.stop().await;
    let outcome = compare(&client, ROWS, &records(&brokers, &["open", "closed"]).await).await;
    report("a topic denied and allowed", &outcome);
    let rows: i64 = client.query_one(COUNT, &[]).await.expect("read").get(0);
    assert_eq!(outcome.rows as i64, rows);
}
