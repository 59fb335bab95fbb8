//! The binary: configuration, migration, signals, trace context, `verify`.

use std::process::Command;
use std::time::Duration;

use crate::common::*;
use contracts::shop::user::v1::user_service_client::UserServiceClient;
use local_stack::testing::{Database, Folder, Process};
use tonic::Request;

const BINARY: &str = env!("CARGO_BIN_EXE_user-svc");
const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";

fn user_svc(url: &str) -> Command {
    let mut command = Command::new(BINARY);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("USER_SVC_")) {
        command.env_remove(name);
    }
    command.env("USER_SVC_DATABASE__URL", url);
    command
}

#[test]
fn bad_configuration_is_reported_whole() {
    let output = user_svc("mysql://hunter2@x")
        .arg("check-config")
        .env("USER_SVC_GRPC__LISTEN", "nowhere")
        .env("USER_SVC_GRPC__COLOUR", "blue")
        .output()
        .expect("run");
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(78), "{text}");
    for part in ["grpc.listen", "grpc.colour", "database.url"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("hunter2"), "{text}");
    let output = user_svc("postgres://u@h/d")
        .arg("check-config")
        .output()
        .expect("run");
    assert_eq!(output.status.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn migrations_at_once_are_safe() {
    let database = Database::empty().await;
    let url = database.url();
    let runs: Vec<_> = (0..4)
        .map(|_| {
            let mut command = user_svc(&url);
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
    assert_eq!(count(&sql, "SELECT count(*) FROM users").await, 0);
    assert!(count(&sql, "SELECT count(*) FROM __diesel_schema_migrations").await == 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_process_serves_traces_verifies_and_stops() {
    let database = database().await;
    let folder = Folder::create("user-svc-process");
    let mut process = Process::builder("user-svc", folder.path())
        .set("database.url", database.url())
        .start()
        .await
        .expect("started");
    process.ready().await.expect("ready");
    let mut client = UserServiceClient::connect(process.grpc_url().expect("listening"))
        .await
        .expect("connected");
    let mut request = Request::new(create_request("ann@example.org"));
    let traceparent = format!("00-{TRACE_ID}-b7ad6b7169203331-01");
    request
        .metadata_mut()
        .insert("traceparent", traceparent.parse().expect("ASCII"));
    request
        .metadata_mut()
        .insert("tracestate", "vendor=1".parse().expect("ASCII"));
    let user = client
        .create_user(request)
        .await
        .expect("created")
        .into_inner()
        .user
        .expect("a user");
    let untraced = client
        .create_user(create_request("lee@example.org"))
        .await
        .expect("created")
        .into_inner()
        .user
        .expect("a user");

    // The command continues its caller's trace; without one it begins its own.
    let sql = database.connect().await.expect("connected");
    for (user, expected) in [(&user, Some(TRACE_ID)), (&untraced, None)] {
        let query = "SELECT traceparent, tracestate FROM outbox WHERE aggregate_id = $1";
        let row = sql.query_one(query, &[&user.user_id]).await.expect("a row");
        let stored: String = row.get(0);
        let trace_id = service::telemetry::trace_id(&stored).expect("a trace id");
        assert_ne!(stored, traceparent, "a span of its own");
        match expected {
            Some(expected) => {
                assert_eq!(trace_id, expected);
                assert_eq!(row.get::<_, Option<String>>(1).as_deref(), Some("vendor=1"));
            }
            None => assert_ne!(trace_id, TRACE_ID),
        }
    }

    let sound = user_svc(&database.url())
        .args(["verify", "--json"])
        .output()
        .expect("run");
    assert!(
        sound.status.success(),
        "{}",
        String::from_utf8_lossy(&sound.stderr)
    );
    let report: serde_json::Value = serde_json::from_slice(&sound.stdout).expect("JSON");
    assert_eq!(
        (&report["entities"], &report["differences"]),
        (&2.into(), &0.into())
    );

    let started = std::time::Instant::now();
    let status = process.stop_within(LIMIT).await.expect("stopped");
    assert!(status.success(), "{status}");
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "{:?}",
        started.elapsed()
    );
    let log = std::fs::read_to_string(process.log()).expect("a log");
    for line in log.lines() {
        let line: serde_json::Value =
            serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}"));
        assert!(line["message"].is_string() && line["level"].is_string(), "{line}");
    }
    let created = log
        .lines()
        .find(|line| line.contains("recorded user.created"))
        .expect("logged");
    assert!(
        created.contains(TRACE_ID) && created.contains(&user.user_id),
        "{created}"
    );
    for personal in ["example.org", "Ann", "Lee"] {
        assert!(!log.contains(personal), "personal data in the log: {log}");
    }

    sql.batch_execute("SET session_replication_role = replica; DELETE FROM outbox")
        .await
        .expect("tampered");
    let unsound = user_svc(&database.url()).arg("verify").output().expect("run");
    assert_eq!(unsound.status.code(), Some(1));
    let text = String::from_utf8(unsound.stdout).expect("UTF-8");
    assert!(
        text.contains("2 differences") && text.contains("has no outbox row"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_the_process_at_once() {
    let database = database().await;
    let folder = Folder::create("user-svc-signals");
    let mut process = Process::builder("user-svc", folder.path())
        .set("database.url", database.url())
        .set("grpc.drain", "10m")
        .start()
        .await
        .expect("started");
    let blocker = database.connect().await.expect("connected");
    blocker
        .batch_execute("BEGIN; LOCK TABLE users IN EXCLUSIVE MODE")
        .await
        .expect("locked");
    let mut client = UserServiceClient::connect(process.grpc_url().expect("listening"))
        .await
        .expect("connected");
    let call = tokio::spawn(async move { client.create_user(create_request("lee@example.org")).await });
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock'";
    until("the call is in progress", async || {
        count(&blocker, waiting).await == 1
    })
    .await;

    let pid = process.id().expect("running").to_string();
    let terminate = || Command::new("kill").args(["-TERM", &pid]).status().expect("sent");
    terminate();
    let log = process.log().to_owned();
    until("it drains", async || {
        std::fs::read_to_string(&log).expect("a log").contains("stopping")
    })
    .await;
    assert!(process.is_running());
    terminate();
    let status = process.wait(LIMIT).await.expect("ended");
    assert_eq!(status.code(), Some(143));
    call.await.expect("no panic").expect_err("cut off");
}

#[test]
fn the_example_lists_every_setting_with_its_default() {
    use service::config::{Sources, parse};
    use user_svc::Config;
    let example = include_str!("../../user-svc.example.toml");
    // Commented out, except what must be given: so is every default.
    let uncommented: String = example
        .lines()
        .map(|line| line.strip_prefix("#: ").unwrap_or(line).to_owned() + "\n")
        .collect();
    let read = |text: &str| parse(Sources::new("TEST_").toml(text), Config::read).expect("valid");
    let (minimal, full) = (read(example), read(&uncommented));
    assert_eq!(format!("{minimal:?}"), format!("{full:?}"));
}
