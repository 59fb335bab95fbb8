//! The binary: configuration, migration, health, metrics, and nothing personal anywhere.

use std::process::Command;

use local_stack::process::http_get;
use local_stack::testing::Database;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::common::*;

const BINARY: &str = env!("CARGO_BIN_EXE_notification-svc");

fn notification_svc(url: &str) -> Command {
    let mut command = Command::new(BINARY);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NOTIFICATION_SVC_")) {
        command.env_remove(name);
    }
    command.env("NOTIFICATION_SVC_DATABASE__URL", url);
    command.env("NOTIFICATION_SVC_KAFKA__BROKERS", "127.0.0.1:1");
    command.env("NOTIFICATION_SVC_SMTP__HOST", "localhost");
    command.env("NOTIFICATION_SVC_SMTP__FROM", FROM);
    command
}

#[test]
fn bad_configuration_is_reported_whole() {
    let output = notification_svc("mysql://hunter2@x")
        .arg("check-config")
        .env("NOTIFICATION_SVC_SMTP__FROM", "nobody")
        .env("NOTIFICATION_SVC_SMTP__COLOUR", "blue")
        .output()
        .expect("run");
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(78), "{text}");
    for part in ["smtp.from", "smtp.colour", "database.url"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("hunter2"), "{text}");
    let output = notification_svc("postgres://u@h/d")
        .arg("check-config")
        .output()
        .expect("run");
    assert_eq!(output.status.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn migrations_at_once_are_safe() {
    let database = Database::empty().await;
    let url = database.url();
    let runs: Vec<_> = (0..3)
        .map(|_| {
            let mut command = notification_svc(&url);
            command.arg("migrate");
            tokio::task::spawn_blocking(move || command.output().expect("run"))
        })
        .collect();
    for run in runs {
        let output = run.await.expect("no panic");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let sql = database.connect().await.expect("connected");
    let row = sql
        .query_one("SELECT count(*) FROM mails", &[])
        .await
        .expect("a table");
    assert_eq!(row.get::<_, i64>(0), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_healthy_measured_and_discreet() {
    let stage = Stage::new().await;
    let mut replica = stage
        .process("replica")
        .set("log.level", "trace")
        .start()
        .await
        .expect("started");
    replica.ready().await.expect("ready");
    let channel = tonic::transport::Channel::from_shared(replica.grpc_url().expect("listening"))
        .expect("a URL")
        .connect()
        .await
        .expect("connected");
    let mut health = HealthClient::new(channel);
    let answer = health
        .check(HealthCheckRequest {
            service: String::new(),
        })
        .await
        .expect("answered");
    assert_eq!(answer.into_inner().status, 1, "SERVING");

    let order = Order::new();
    stage
        .tell_address(&order, "secret-ann@example.org", "Secretann")
        .await;
    let placed = stage.tell_placed(&order, None).await.event_id;
    let other = Order::new();
    let own = stage
        .tell_placed(&other, Some("rcpt-550+secret-bea@example.org"))
        .await
        .event_id;
    stage.until(placed, "sent").await;
    stage.until(own, "failed").await;
    let metrics = local_stack::wait::until("the failed one is counted", LIMIT, || async {
        let (_, body) = http_get(replica.admin()?, "/metrics").await?;
        let counted = body
            .lines()
            .any(|line| line.starts_with("mails{") && line.contains("failed") && line.ends_with(" 1"));
        Ok(counted.then_some(body))
    })
    .await
    .expect("counted");
    for name in [
        "mail_attempts_total",
        "oldest_unsent_mail_seconds",
        "consumer_messages_total",
    ] {
        assert!(metrics.contains(name), "{name}: {metrics}");
    }
    assert!(replica.stop().await.expect("stopped").success());

    let log = std::fs::read_to_string(replica.log()).expect("a log");
    assert!(
        log.contains("recorded notification.sent") && log.contains(&placed.to_string()),
        "{log}"
    );
    for personal in ["secret-", "Secretann", "Lastname"] {
        assert!(!log.contains(personal), "{personal} in the log");
        assert!(!metrics.contains(personal), "{personal} in the metrics");
    }
    // What leaves the database by the outbox has neither.
    let query = "SELECT count(*) FROM outbox WHERE position('secret-'::bytea IN payload) > 0
                 OR position('Secretann'::bytea IN payload) > 0";
    stage.until_count(query, 0).await;
    stage.until_count("SELECT count(*) FROM outbox", 1).await;
}

#[test]
fn the_example_lists_every_setting_with_its_default() {
    use notification_svc::Config;
    use service::config::{Sources, parse};
    let example = include_str!("../../notification-svc.example.toml");
    // Commented out, except what must be given: so is every default.
    let uncommented: String = example
        .lines()
        .map(|line| line.strip_prefix("#: ").unwrap_or(line).to_owned() + "\n")
        .collect();
    let read = |text: &str| parse(Sources::new("TEST_").toml(text), Config::read).expect("valid");
    let (minimal, full) = (read(example), read(&uncommented));
    assert_eq!(format!("{minimal:?}"), format!("{full:?}"));
}
