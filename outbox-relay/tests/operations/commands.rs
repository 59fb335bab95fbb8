//! The commands, through the binary: what they do, what they answer, and their exit codes.

use local_stack::testing::{self, Database};
use serde_json::json;
use tokio_postgres::Client;

use crate::kit::*;
use crate::support::{Bed, RunningRelay};

fn section(database: &Database, extra: &str) -> String {
    format!("[outbox.test]\ndatabase_url = \"{}\"\n{extra}\n", database.url())
}

/// Everything that `init` makes, as the catalogue has it.
async fn catalogue(client: &Client) -> Vec<String> {
    let rows = client
        .query(
            "SELECT 'column ' || format('%s.%s %s %s %s %s', c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                    a.attidentity, pg_get_expr(d.adbin, d.adrelid))
               FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
               LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
              WHERE n.nspname !~ '^(pg_|information)' AND c.relkind = 'r' AND a.attnum > 0
             UNION ALL SELECT 'index ' || indexdef FROM pg_indexes WHERE schemaname !~ '^(pg_|information)'
             UNION ALL SELECT 'trigger ' || pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
             UNION ALL SELECT 'check ' || conrelid::regclass || pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid <> 0
             UNION ALL SELECT 'function ' || pg_get_functiondef(p.oid) FROM pg_proc p
                         JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname !~ '^(pg_|information)'
             ORDER BY 1",
            &[],
        )
        .await
        .expect("read");
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn init_makes_completes_and_may_run_again() {
    let (by_init, by_script) = (Database::empty().await, Database::empty().await);
    let (client, other) = (
        by_init.connect().await.expect("connected"),
        by_script.connect().await.expect("connected"),
    );
    let sections = section(&by_init, "");
    let (code, answer) = json(&sections, &["init"]).await;
    assert_eq!(
        (code, answer),
        (0, json!({"outbox": "test", "table": "public.outbox"}))
    );
    let made = catalogue(&client).await;
    assert!(made.len() > 50, "{made:?}");
    let output = run(&sections, &["init", "--sql"]).await;
    assert!(output.status.success());
    let script = String::from_utf8(output.stdout).expect("UTF-8");
    for _ in 0..2 {
        other.batch_execute(&script).await.expect("it runs");
        assert_eq!(catalogue(&other).await, made);
    }
    // A transaction that wrote is open: nobody waits for it.
    let mut slow = by_init.connect().await.expect("connected");
    let open = slow.transaction().await.expect("begun");
    insert(&open, "open", 1, None, None).await;
    let (code, answer) = json(&sections, &["init"]).await;
    assert_eq!(code, 0, "{answer}");
    open.rollback().await.expect("rolled back");
    // What is missing comes back, and what is there stays.
    insert(&client, "k", 1, None, None).await;
    for lost in [
        "DROP TRIGGER outbox_insert_only ON outbox",
        "DROP FUNCTION outbox_remove(bigint, bigint)",
        "DROP TABLE outbox_relay_quarantine",
        "DROP TABLE outbox_relay_members, outbox_relay_floors",
        "DROP INDEX outbox_relay_quarantine_by_key",
    ] {
        client.batch_execute(lost).await.expect("dropped");
        let (code, answer) = json(&sections, &["init"]).await;
        assert_eq!(code, 0, "{lost}: {answer}");
        assert_eq!(catalogue(&client).await, made, "{lost}");
    }
    let rows = client.query_one("SELECT count(*) FROM outbox", &[]).await;
    assert_eq!(rows.expect("counted").get::<_, i64>(0), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn init_takes_any_name_and_the_relay_works_there() {
    let database = Database::empty().await;
    let client = database.connect().await.expect("connected");
    let topic = testing::unique("events.test");
    create_topic(&topic, &[]).await;
    let long = "x".repeat(60);
    let names = [
        ("my \"app\"", "Out'box {id} $1"),
        ("window", "union"),
        ("public", &long),
        ("public", "Überweisung"),
    ];
    for (position, (schema, table)) in names.into_iter().enumerate() {
        let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
        client
            .batch_execute(&format!("CREATE SCHEMA IF NOT EXISTS {}", quoted(schema)))
            .await
            .expect("created");
        let sections = format!(
            "[outbox.test{position}]\ndatabase_url = \"{}\"\ntopic = \"{topic}\"\ntable = '''{schema}.{table}'''\n",
            database.url()
        );
        for _ in 0..2 {
            let (code, answer) = json(&sections, &["init"]).await;
            assert_eq!(code, 0, "{table}: {answer}");
        }
        client
            .batch_execute(&format!(
                "INSERT INTO {}.{} (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source)
                 VALUES (gen_random_uuid(), 't', 'k{position}', 1, 'x', '/x')",
                quoted(schema),
                quoted(table)
            ))
            .await
            .expect("inserted");
        let relay = RunningRelay::start(&sections).await;
        wait_until(table, || async {
            versions(&read(&topic).await, &format!("k{position}")) == [1]
        })
        .await;
        relay.stop().await;
        let (code, answer) = json(&sections, &["verify"]).await;
        assert_eq!(code, 0, "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_begins_where_init_says() {
    let bed = Bed::new().await;
    let name = |name: &str| bed.section(name, "");
    for n in 1..=3 {
        bed.append(&format!("e{n}")).await;
    }
    // Holes of what was rolled back, and a transaction that is open.
    for _ in 0..3 {
        let _ = bed
            .client
            .batch_execute("BEGIN; INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source) VALUES (gen_random_uuid(), 't', 'gone', 1, 'x', '/x'); ROLLBACK")
            .await;
    }
    let mut slow = bed.connect().await;
    let open = slow.transaction().await.expect("begun");
    insert(&open, "open", 1, None, None).await;
    bed.append("e1").await;
    let end_section = name("end");
    let end = tokio::spawn(async move { json(&end_section, &["init", "--start-at", "end"]).await });
    // It waits for the open transaction, and holds the lease meanwhile.
    wait_until("it has begun", || async {
        let row = bed
            .client
            .query_opt("SELECT FROM outbox_relay WHERE name = 'end' AND epoch = 1", &[])
            .await;
        row.expect("read").is_some()
    })
    .await;
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let (code, answer) = json(&name("end"), &["init", "--start-at", "end"]).await;
    assert_eq!(code, 1);
    assert!(
        answer["error"]
            .as_str()
            .is_some_and(|e| e.contains("being relayed")),
        "{answer}"
    );
    open.commit().await.expect("committed");
    let (code, answer) = end.await.expect("ended");
    assert_eq!((code, &answer["to_publish"]), (0, &json!(1)), "{answer}");
    let (code, answer) = json(&name("end"), &["init", "--start-at", "beginning"]).await;
    assert_eq!(code, 1);
    assert!(
        answer["error"]
            .as_str()
            .is_some_and(|e| e.contains("relayed already")),
        "{answer}"
    );

    bed.append("e2").await;
    let relay = RunningRelay::start(&name("end")).await;
    wait_until("what came after is published", || async {
        read(&bed.topic).await.len() == 2
    })
    .await;
    let records = read(&bed.topic).await;
    assert_eq!(
        versions(&records, "open"),
        [1],
        "it was committed after the start"
    );
    assert_eq!(versions(&records, "e2"), [2]);

    let (code, answer) = json(&name("id"), &["init", "--start-at", "2"]).await;
    assert_eq!((code, &answer["floor"]), (0, &json!(2)), "{answer}");
    let (code, answer) = json(&name("far"), &["init", "--start-at", "1000"]).await;
    assert_eq!(code, 1, "{answer}");
    // A refused start leaves no trace, and another may follow.
    let (code, answer) = json(&name("far"), &["init", "--start-at", "beginning"]).await;
    assert_eq!((code, &answer["floor"]), (0, &json!(0)), "{answer}");

    // e2 at 2 is on Kafka, and e2 at 1 is not.
    let (code, answer) = json(&name("published"), &["init", "--start-at", "published"]).await;
    assert_eq!(code, 1);
    assert!(
        answer["error"]
            .as_str()
            .is_some_and(|e| e.contains("comes before it")),
        "{answer}"
    );
    let (code, answer) = json(&name("test"), &["replay", "--ids", "1..3"]).await;
    assert_eq!(
        (code, &answer["rows"]),
        (0, &json!(0)),
        "nothing was published by it: {answer}"
    );
    // As another relay would have published them.
    let (code, answer) = json(&name("end"), &["replay", "--ids", "1..3"]).await;
    assert_eq!((code, &answer["rows"]), (0, &json!(3)), "{answer}");
    relay.stop().await;
    bed.append("e3").await;
    let (code, answer) = json(&name("published"), &["init", "--start-at", "published"]).await;
    assert_eq!(
        (code, &answer["to_publish"]),
        (0, &json!(2)),
        "e1 at 2 and e3 at 2: {answer}"
    );
    let relay = RunningRelay::start(&name("published")).await;
    wait_until("the rest is published", || async {
        read(&bed.topic).await.len() == 7
    })
    .await;
    relay.stop().await;
    let records = read(&bed.topic).await;
    assert_eq!(versions(&records, "e1"), [1, 2]);
    assert_eq!(versions(&records, "e3"), [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_finds_what_is_missing_out_of_order_changed_and_repeated() {
    let bed = Bed::new().await;
    let sections = bed.section("test", "");
    let relay = RunningRelay::start(&sections).await;
    for key in ["a", "b", "c"] {
        for version in 1..=2 {
            insert(&bed.client, key, version, None, Some(b"payload")).await;
        }
    }
    bed.settled().await;
    relay.stop().await;
    let (code, answer) = json(&sections, &["verify"]).await;
    assert_eq!(code, 0, "{answer}");
    assert_eq!(
        (&answer["rows"], &answer["records"], &answer["repeated"]),
        (&json!(6), &json!(6), &json!(0))
    );
    let (code, answer) = json(&sections, &["replay", "--key", "a"]).await;
    assert_eq!(code, 0, "{answer}");
    let (code, answer) = json(&sections, &["verify"]).await;
    assert_eq!((code, &answer["repeated"]), (0, &json!(2)), "{answer}");

    let missing = insert(&bed.client, "d", 1, None, Some(b"1")).await;
    let (code, answer) = json(&sections, &["verify"]).await;
    assert_eq!((code, &answer["pending"]), (0, &json!(1)), "{answer}");
    bed.client
        .execute("UPDATE outbox_relay SET floor = $1", &[&missing])
        .await
        .expect("advanced");
    let (code, answer) = json(&sections, &["verify"]).await;
    assert_eq!(
        (code, &answer["missing"], &answer["missing_ids"]),
        (3, &json!(1), &json!([missing])),
        "{answer}"
    );
    let output = run(&sections, &["verify"]).await;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains(&format!("count as published and are not on Kafka: {missing}")),
        "{text}"
    );
    let (code, _) = json(&sections, &["replay", "--key", "d"]).await;
    assert_eq!(code, 0);

    // Somebody publishes the second before the first, and something else for a third.
    let (first, second) = (
        insert(&bed.client, "e", 1, None, Some(b"1")).await,
        insert(&bed.client, "e", 2, None, Some(b"2")).await,
    );
    let third = insert(&bed.client, "f", 1, None, Some(b"right")).await;
    bed.client
        .execute("UPDATE outbox_relay SET floor = $1", &[&third])
        .await
        .expect("advanced");
    for id in [second, first] {
        let (code, _) = json(&sections, &["replay", "--ids", &id.to_string()]).await;
        assert_eq!(code, 0);
    }
    bed.client
        .batch_execute("ALTER TABLE outbox DISABLE TRIGGER outbox_insert_only")
        .await
        .expect("disabled");
    let change = "UPDATE outbox SET payload = $2 WHERE id = $1";
    bed.client
        .execute(change, &[&third, &&b"wrong"[..]])
        .await
        .expect("changed");
    bed.client
        .batch_execute("ALTER TABLE outbox ENABLE TRIGGER outbox_insert_only")
        .await
        .expect("enabled");
    let (code, _) = json(&sections, &["replay", "--ids", &third.to_string()]).await;
    assert_eq!(code, 0);
    bed.client
        .batch_execute("ALTER TABLE outbox DISABLE TRIGGER outbox_insert_only")
        .await
        .expect("disabled");
    bed.client
        .execute(change, &[&third, &&b"right"[..]])
        .await
        .expect("changed");
    bed.client
        .batch_execute("ALTER TABLE outbox ENABLE TRIGGER outbox_insert_only")
        .await
        .expect("enabled");
    let (code, answer) = json(&sections, &["verify"]).await;
    assert_eq!(
        (
            code,
            &answer["missing"],
            &answer["out_of_order_ids"],
            &answer["changed_ids"]
        ),
        (3, &json!(0), &json!([first]), &json!([third])),
        "{answer}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_publishes_the_same_bytes_again_in_order_and_nothing_else() {
    let bed = Bed::new().await;
    let sections = format!(
        "kafka.properties.\"message.max.bytes\" = 20000\n{}",
        bed.section("test", "")
    );
    let relay = RunningRelay::start(&sections).await;
    for version in 1..=4 {
        insert(&bed.client, "k", version, None, Some(&noise(100))).await;
        insert(&bed.client, "l", version, None, None).await;
    }
    insert(&bed.client, "k", 5, None, Some(&[0; 30_000])).await;
    bed.settled().await;
    relay.stop().await;
    insert(&bed.client, "l", 5, None, None).await;
    let before = read(&bed.topic).await;
    assert_eq!(before.len(), 8);
    for (words, rows) in [
        (&["replay", "--since", "1h", "--dry-run"][..], 8),
        (&["replay", "--since", "2020-01-01T00:00:00Z", "--dry-run"], 8),
        (&["replay", "--since", "2999-01-01T00:00:00Z"], 0),
        (&["replay", "--key", "nobody"], 0),
        (&["replay", "--ids", "1..2", "--key", "l", "--dry-run"], 1),
    ] {
        let (code, answer) = json(&sections, words).await;
        assert_eq!((code, &answer["rows"]), (0, &json!(rows)), "{words:?}: {answer}");
    }
    assert_eq!(read(&bed.topic).await.len(), 8, "a dry run publishes nothing");
    let (code, answer) = json(&sections, &["replay", "--since", "1h"]).await;
    assert_eq!((code, &answer["rows"]), (0, &json!(8)), "{answer}");
    let after = read(&bed.topic).await;
    for key in ["k", "l"] {
        let of = |records: &[Raw]| -> Vec<Raw> { records.iter().filter(|r| r.key == key).cloned().collect() };
        assert_eq!(of(&after), [of(&before), of(&before)].concat());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn quarantine_and_lead_are_shown_and_changed() {
    let bed = Bed::new().await;
    let sections = format!(
        "kafka.properties.\"message.max.bytes\" = 20000\n{}",
        bed.section("test", "")
    );
    let relay = RunningRelay::start(&sections).await;
    insert(&bed.client, "k", 1, None, Some(&[0; 30_000])).await;
    insert(&bed.client, "k", 2, None, None).await;
    bed.settled().await;
    let (code, answer) = json(&sections, &["quarantine", "list"]).await;
    assert_eq!((code, &answer["keys"][0]["rows"]), (0, &json!(2)), "{answer}");
    let text = run(&sections, &["quarantine", "list"]).await.stdout;
    let text = String::from_utf8_lossy(&text);
    assert!(
        text.contains("message.max.bytes is 20000") && text.contains("frozen"),
        "{text}"
    );
    let (code, answer) = json(&sections, &["quarantine", "show", "k"]).await;
    assert_eq!(
        (code, &answer["rows"][0]["payload_bytes"]),
        (0, &json!(30_000)),
        "{answer}"
    );
    for words in [
        &["quarantine", "show", "nobody"][..],
        &["quarantine", "retry", "nobody"],
        &["quarantine", "skip", "2", "--reason", "x"],
        &["handover", "--to", "nobody", "missing-outbox"],
    ] {
        let (code, answer) = json(&sections, words).await;
        assert!(code == 1 || code == 2, "{words:?}: {code} {answer}");
    }
    let (code, answer) = json(&sections, &["quarantine", "skip", "1", "--reason", "too large"]).await;
    assert_eq!(code, 0, "{answer}");
    until_quarantine_is_empty(&bed).await;
    let (_, answer) = json(&sections, &["quarantine", "show", "k"]).await;
    assert_eq!(
        (&answer["rows"][0]["state"], &answer["rows"][0]["reason"]),
        (&json!("skipped"), &json!("too large")),
        "what was skipped stays on record"
    );

    wait_until("status knows the leader and its figures", || async {
        let (code, answer) = json(&sections, &["status"]).await;
        let outbox = &answer["outboxes"][0];
        assert_eq!(code, 0, "{answer}");
        outbox["lead"]["leader"].is_string() && outbox["figures"]["head"] == 2 && outbox["lead"]["floor"] == 2
    })
    .await;
    let text = run(&sections, &["status"]).await.stdout;
    let text = String::from_utf8_lossy(&text);
    assert!(text.contains("leader") && text.contains("relay-"), "{text}");

    // The other takes over by name.
    let named = sections.replace("[outbox.test]", "[outbox.test]\n");
    let second = RunningRelay::start(&named).await;
    let (_, answer) = json(&sections, &["status"]).await;
    let leader = answer["outboxes"][0]["lead"]["leader"].clone();
    wait_until("both are known", || async {
        let (_, answer) = json(&sections, &["status"]).await;
        let members = &answer["outboxes"][0]["lead"]["members"];
        members.as_array().is_some_and(|members| members.len() == 2)
    })
    .await;
    // The leader learns of it with its next heartbeat.
    wait_until("the other leads", || async {
        let (code, answer) = json(&sections, &["handover"]).await;
        assert!(code == 0 || code == 1, "{answer}");
        let (_, answer) = json(&sections, &["status"]).await;
        let now = &answer["outboxes"][0]["lead"]["leader"];
        now.is_string() && *now != leader
    })
    .await;
    relay.stop().await;
    second.stop().await;
    let (code, answer) = json(&sections, &["handover"]).await;
    assert_eq!(code, 1);
    assert!(
        answer["error"]
            .as_str()
            .is_some_and(|e| e.contains("nobody leads")),
        "{answer}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn another_cluster_must_be_adopted() {
    let bed = Bed::new().await;
    let sections = bed.section("test", "");
    let (code, answer) = json(&sections, &["adopt"]).await;
    assert_eq!(code, 1, "{answer}");
    let relay = RunningRelay::start(&sections).await;
    bed.append("k").await;
    bed.settled().await;
    relay.stop().await;
    bed.client
        .batch_execute("UPDATE outbox_relay SET system_identifier = 1")
        .await
        .expect("changed");
    let problem = RunningRelay::start(&sections).await.failure().await;
    assert!(problem.contains("outbox-relay adopt test"), "{problem}");
    let (code, answer) = json(&sections, &["adopt", "test"]).await;
    assert_eq!((code, &answer["adopted"]), (0, &json!(true)));
    let relay = RunningRelay::start(&sections).await;
    bed.append("k").await;
    bed.settled().await;
    relay.stop().await;
    assert_eq!(versions(&read(&bed.topic).await, "k"), [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_tell_what_went_wrong() {
    let bed = Bed::new().await;
    let sections = bed.section("test", "");
    for words in [
        &["nonsense"][..],
        &["replay", "--ids", "9..1"],
        &["replay", "--since", "yesterday"],
        &["replay"],
        &["replay", "--key", "k", "no-such-outbox"],
        &["quarantine", "retry"],
        &["quarantine", "skip", "1"],
        &["quarantine", "skip", "1", "--reason", " "],
        &["init", "--start-at", "noon"],
        &["init", "--sql", "--start-at", "end"],
        &["verify", "no-such-outbox"],
    ] {
        let output = run(&sections, words).await;
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
        assert!(!said.trim().is_empty() && output.stdout.is_empty(), "{words:?}");
    }
    let two = [bed.section("a", ""), bed.section("b", "")].concat();
    let (code, answer) = json(&two, &["verify"]).await;
    assert_eq!(code, 2);
    assert!(
        answer["error"].as_str().is_some_and(|e| e.contains("a, b")),
        "{answer}"
    );
    let output = run("[outbox.test]\nno_such_word = 1\n", &["status"]).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert!(
        said.contains("no_such_word") && said.contains("database_url"),
        "{said}"
    );

    let away = sections.replace(
        &bed.database.url(),
        "postgres://postgres:hunter2@127.0.0.1:1/somewhere",
    );
    for words in [
        &["init"][..],
        &["verify"],
        &["status"],
        &["replay", "--key", "k"],
        &["quarantine", "list"],
        &["adopt"],
        &["handover"],
    ] {
        let output = run(&away, words).await;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {said}");
        assert!(
            said.contains("refused") && said.contains("database_url"),
            "{words:?} does not say what to do: {said}"
        );
        assert!(!said.contains("hunter2"), "{said}");
    }
    let empty = Database::empty().await;
    for words in [
        &["verify"][..],
        &["replay", "--key", "k"],
        &["quarantine", "list"],
        &["status"],
    ] {
        let output = run(&section(&empty, ""), words).await;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {said}");
        assert!(said.contains("init"), "{words:?} does not say what to do: {said}");
    }
}
