//! The binary: configuration, storage, the ledger command.

use std::process::{Command, Output};

use local_stack::cards;
use local_stack::process::http_get;
use payment_sandbox::{Config, ENV_PREFIX};
use serde_json::Value;
use service::config::{Sources, parse};

use crate::stage::*;

fn sandbox(args: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_payment-sandbox"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with(ENV_PREFIX)) {
        command.env_remove(name);
    }
    command
        .args(args)
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

#[test]
fn configuration_is_checked() {
    assert!(sandbox(&["check-config"], &[]).status.success());
    let bad = sandbox(&["check-config"], &[("PAYMENT_SANDBOX_HTTP__LISTEN", "nowhere")]);
    assert_eq!(bad.status.code(), Some(78));
    assert!(String::from_utf8(bad.stderr).unwrap().contains("http.listen"));
}

#[test]
fn the_example_lists_every_setting_with_its_default() {
    let example = include_str!("../../payment-sandbox.example.toml");
    let uncommented: String = example
        .lines()
        .map(|line| line.strip_prefix("#: ").unwrap_or(line).to_owned() + "\n")
        .collect();
    let read = |text: &str| parse(Sources::new("TEST_").toml(text), Config::read).unwrap();
    assert_eq!(
        format!("{:?}", read(example)),
        format!("{:?}", read(&uncommented))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ledger_is_printed_from_the_file_or_the_url_and_no_card_is_kept() {
    let mut stage = Stage::start().await;
    let client = stage.client.clone();
    stage.process.ready().await.unwrap();
    let (status, metrics) = http_get(stage.process.admin().unwrap(), "/metrics")
        .await
        .unwrap();
    assert!(status == 200 && metrics.contains("build_info"), "{metrics}");
    for serial in 0..40 {
        let method = client.method(&cards::fine(serial)).await;
        let intent = client.intent(&method).await;
        client.confirm(&intent, "").await.ok();
        client
            .post("/v1/refunds", "", &[("payment_intent", &intent)])
            .await
            .ok();
    }
    let expected = client.ledger().await;

    let storage = stage.folder.path().join("sandbox.redb");
    let path = [("PAYMENT_SANDBOX_STORAGE__PATH", storage.to_str().unwrap())];
    let locked = sandbox(&["ledger"], &path);
    assert_eq!(locked.status.code(), Some(1));
    let url = stage.process.http_url().unwrap();
    let printed = sandbox(&["ledger", "--url", &url], &[]);
    assert_eq!(
        serde_json::from_slice::<Value>(&printed.stdout).unwrap(),
        expected
    );
    assert!(stage.process.stop().await.unwrap().success());
    let printed = sandbox(&["ledger"], &path);
    assert_eq!(
        serde_json::from_slice::<Value>(&printed.stdout).unwrap(),
        expected
    );

    let kept = std::fs::read(&storage).unwrap();
    let log = std::fs::read(stage.process.log()).unwrap();
    for serial in 0..40 {
        let number = cards::fine(serial);
        for place in [&kept, &log] {
            let found = place.windows(number.len()).any(|part| part == number.as_bytes());
            assert!(!found, "{number} was kept");
        }
    }
}
