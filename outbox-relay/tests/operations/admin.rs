//! The admin port: its page, what it tells, and what it lets do.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::kit::*;
use crate::support::{Bed, RunningRelay};

/// Every name of an outbox in `/status`.
const NAMES: [&str; 23] = [
    "backlog_rows",
    "epoch",
    "floor",
    "head",
    "holes",
    "in_flight",
    "latency_p50_seconds",
    "latency_p99_seconds",
    "leader",
    "lease_seconds",
    "members",
    "name",
    "oldest_age_seconds",
    "problem",
    "published_total",
    "quarantined_keys",
    "quarantined_rows",
    "rate_rows_per_second",
    "removed_to",
    "retention_seconds",
    "role",
    "seen_seconds",
    "table",
];

async fn status(relay: &RunningRelay) -> Value {
    let answer = get(relay.admin, "/status").await;
    assert_eq!(answer.code, 200, "{answer:?}");
    let status = answer.json();
    let names: BTreeSet<&str> = NAMES.into_iter().collect();
    for outbox in status["outboxes"].as_array().expect("outboxes") {
        let found: BTreeSet<&str> = outbox
            .as_object()
            .expect("an object")
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(found, names, "{outbox}");
    }
    status
}

async fn until_role(relay: &RunningRelay, outbox: usize, role: &str) -> Value {
    let found: OnceLock<Value> = OnceLock::new();
    wait_until(role, || async {
        let status = status(relay).await;
        let outbox = status["outboxes"][outbox].clone();
        let is_complete = role == "waiting" || role == "stopped" || !outbox["leader"].is_null();
        if outbox["role"] == role && is_complete {
            let _ = found.set(outbox);
        }
        found.get().is_some()
    })
    .await;
    found.into_inner().expect("found")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_served_under_a_policy_and_unknown_things_are_not_found() {
    let bed = Bed::new().await;
    let relay = bed.relay().await;
    let page = get(relay.admin, "/").await;
    assert_eq!(page.code, 200);
    assert!(page.body.contains("<html"), "{}", page.body);
    for part in [
        "content-security-policy: default-src 'none'",
        "frame-ancestors 'none'",
        "x-content-type-options: nosniff",
    ] {
        assert!(page.head.contains(part), "{part}: {}", page.head);
    }
    assert!(
        !page.body.contains("src=\"http") && !page.body.contains("href=\"http"),
        "it loads nothing from elsewhere"
    );
    for (path, body) in [
        ("quarantine/retry", "{\"all\": true}"),
        ("quarantine/skip", "{\"id\": 1, \"reason\": \"x\"}"),
        ("handover", "{}"),
    ] {
        let own = format!("/outboxes/test/{path}");
        for headers in ["content-type: application/json\r\n", ""] {
            let refused = http(relay.admin, "POST", &own, headers, body).await;
            assert_eq!(refused.code, 403, "{own}: {refused:?}");
            assert!(refused.json()["error"].is_string(), "{refused:?}");
        }
        let refused = post(relay.admin, &own, "{\"nonsense\": 1}").await;
        assert!((400..500).contains(&refused.code), "{refused:?}");
        assert!(refused.json()["error"].is_string(), "{refused:?}");
        let unknown = post(relay.admin, &format!("/outboxes/other/{path}"), body).await;
        assert_eq!(unknown.code, 404, "{unknown:?}");
        assert!(unknown.json()["error"].is_string(), "{unknown:?}");
    }
    assert_eq!(get(relay.admin, "/outboxes/other/quarantine").await.code, 404);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn status_tells_of_every_role_without_secrets() {
    let bed = Bed::new().await;
    let second_bed = Bed::without_topic().await;
    let broken = Bed::new().await;
    broken
        .client
        .batch_execute("DROP TRIGGER outbox_insert_only ON outbox")
        .await
        .expect("dropped");
    let url = bed.database.url();
    let with_password = url.replacen("postgres@", "postgres:hunter2@", 1);
    assert_ne!(url, with_password);
    let sections = [
        bed.section("a", "retention = \"1h\"")
            .replace(&url, &with_password),
        broken.section("b", "").replace("postgres@", "postgres:hunter2@"),
        // Nothing listens there.
        second_bed.section("c", "").replace(
            &second_bed.database.url(),
            "postgres://postgres:hunter2@127.0.0.1:1/x",
        ),
    ]
    .concat();
    bed.append("secret-customer").await;
    let relay = RunningRelay::start(&sections).await;
    let first = until_role(&relay, 0, "leading").await;
    let standby = RunningRelay::start(&sections).await;
    assert!(
        first["leader"]
            .as_str()
            .is_some_and(|leader| leader.starts_with("relay-")),
        "{first}"
    );
    assert_eq!(
        (
            &first["name"],
            &first["table"],
            &first["retention_seconds"],
            &first["problem"]
        ),
        (&json!("a"), &json!("public.outbox"), &json!(3600.0), &Value::Null)
    );
    wait_until("figures and both replicas are known", || async {
        let status = status(&relay).await;
        let outbox = &status["outboxes"][0];
        outbox["floor"] == 1
            && outbox["head"] == 1
            && outbox["published_total"] == 1
            && outbox["lease_seconds"].as_f64().is_some_and(|left| left > 0.0)
            && outbox["members"]
                .as_array()
                .is_some_and(|members| members.len() == 2)
    })
    .await;
    let second = until_role(&standby, 0, "standby").await;
    assert_eq!(
        (&second["leader"], &second["epoch"]),
        (&first["leader"], &json!(1))
    );
    wait_until("the standby knows the leader's figures", || async {
        let status = status(&standby).await;
        let outbox = &status["outboxes"][0];
        outbox["head"] == 1 && outbox["published_total"] == 1 && outbox["seen_seconds"].is_f64()
    })
    .await;
    let stopped = until_role(&relay, 1, "stopped").await;
    assert!(
        stopped["problem"]
            .as_str()
            .is_some_and(|p| p.contains("outbox-relay init")),
        "{stopped}"
    );
    let waiting = until_role(&relay, 2, "waiting").await;
    assert!(
        waiting["problem"].is_string() && waiting["head"].is_null(),
        "{waiting}"
    );
    let status = get(relay.admin, "/status").await;
    assert_eq!(status.json()["ready"], false);
    for path in ["/", "/status", "/metrics", "/readyz", "/outboxes/a/quarantine"] {
        let answer = get(relay.admin, path).await;
        for secret in ["hunter2", "postgres://", "secret-customer"] {
            assert!(
                !answer.body.contains(secret),
                "{path} shows {secret}: {}",
                answer.body
            );
        }
    }
    relay.stop().await;
    standby.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_known_of_a_lease_grows_old_when_the_database_goes() {
    let bed = Bed::new().await;
    let relay = bed.relay().await;
    until_role(&relay, 0, "leading").await;
    wait_until("it knows itself", || async {
        status(&relay).await["outboxes"][0]["lease_seconds"].is_f64()
    })
    .await;
    // Nobody gets in any more.
    let admin = local_stack::postgres::connect(&local_stack::testing::postgres_url())
        .await
        .expect("connected");
    let name = bed.database.name();
    admin
        .batch_execute(&format!("ALTER DATABASE \"{name}\" ALLOW_CONNECTIONS false"))
        .await
        .expect("altered");
    admin
        .execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1",
            &[&name],
        )
        .await
        .expect("ended");
    wait_until("nobody is shown as the leader", || async {
        let status = status(&relay).await;
        let outbox = &status["outboxes"][0];
        outbox["role"] == "waiting"
            && outbox["leader"].is_null()
            && outbox["lease_seconds"].is_null()
            && outbox["seen_seconds"].as_f64().is_some_and(|age| age > 1.0)
    })
    .await;
    admin
        .batch_execute(&format!("ALTER DATABASE \"{name}\" ALLOW_CONNECTIONS true"))
        .await
        .expect("altered");
    until_role(&relay, 0, "leading").await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_quarantine_and_the_lead_are_in_the_operators_hands() {
    let bed = Bed::new().await;
    let sections = format!(
        "kafka.properties.\"message.max.bytes\" = 20000\n{}",
        bed.section("test", "")
    );
    let first = RunningRelay::start(&sections).await;
    until_role(&first, 0, "leading").await;
    let second = RunningRelay::start(&sections).await;
    insert(&bed.client, "k1", 1, None, Some(&[0; 30_000])).await;
    insert(&bed.client, "k1", 2, None, Some(b"2")).await;
    bed.settled().await;
    let listing = get(first.admin, "/outboxes/test/quarantine").await.json();
    assert_eq!(listing["more"], false);
    let key = &listing["keys"][0];
    for (name, value) in [
        ("aggregate_type", json!("test")),
        ("key", json!("k1")),
        ("topic", json!(bed.topic)),
        ("rows", json!(2)),
        ("first_id", json!(1)),
        ("first_version", json!(1)),
        ("state", json!("frozen")),
        ("attempts", json!(1)),
    ] {
        assert_eq!(key[name], value, "{name} of {key}");
    }
    assert!(
        key["problem"].is_string() && key["since_seconds"].is_f64(),
        "{key}"
    );

    let asked = post(first.admin, "/outboxes/test/quarantine/retry", "{}").await;
    assert_eq!(asked.code, 400, "{asked:?}");
    let both = "{\"all\": true, \"key\": \"k1\"}";
    let asked = post(first.admin, "/outboxes/test/quarantine/retry", both).await;
    assert_eq!(asked.code, 400, "{asked:?}");
    for body in [
        "{\"aggregate_type\": \"test\", \"key\": \"k1\"}",
        "{\"all\": true}",
    ] {
        let asked = post(second.admin, "/outboxes/test/quarantine/retry", body).await;
        assert_eq!((asked.code, asked.json()), (202, json!({"keys": 1})));
    }
    wait_until("it was tried again", || async {
        let rows = quarantined(&bed.client).await;
        rows[0].4 >= 2 && rows.iter().all(|row| row.2 == "frozen")
    })
    .await;
    let skip = "/outboxes/test/quarantine/skip";
    let asked = post(first.admin, skip, "{\"id\": 2, \"reason\": \"why\"}").await;
    assert_eq!(asked.code, 409, "{asked:?}");
    let asked = post(first.admin, skip, "{\"id\": 1, \"reason\": \" \"}").await;
    assert_eq!(asked.code, 400, "{asked:?}");
    let asked = post(first.admin, skip, "{\"id\": 1, \"reason\": \"why\"}").await;
    assert_eq!((asked.code, asked.json()), (202, json!({"keys": 1})));
    until_quarantine_is_empty(&bed).await;
    bed.settled().await;
    assert_eq!(versions(&read(&bed.topic).await, "k1"), [1, 2]);

    let leader = until_role(&first, 0, "leading").await["leader"].clone();
    wait_until("the leader knows of the other", || async {
        let known = &status(&first).await["outboxes"][0]["members"];
        known.as_array().is_some_and(|members| members.len() == 2)
    })
    .await;
    let asked = post(second.admin, "/outboxes/test/handover", "{}").await;
    assert_eq!((asked.code, asked.json()), (202, json!({"leader": leader})));
    let new = until_role(&second, 0, "leading").await["leader"].clone();
    assert_ne!(new, leader);
    until_role(&first, 0, "standby").await;
    bed.append("after").await;
    bed.settled().await;
    wait_until("the leader knows of the other", || async {
        let known = &status(&second).await["outboxes"][0]["members"];
        known.as_array().is_some_and(|members| members.len() == 2)
    })
    .await;
    let body = json!({ "to": leader }).to_string();
    let asked = post(first.admin, "/outboxes/test/handover", &body).await;
    assert_eq!(asked.code, 202, "{asked:?}");
    until_role(&first, 0, "leading").await;
    first.stop().await;
    second.stop().await;
}
