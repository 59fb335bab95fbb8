//! Records that Kafka does not take: their keys wait in order, everything else flows.

use std::time::Duration;

use local_stack::testing;
use outbox_relay::commands::{CommandError, quarantine, verify};

use crate::kit::*;
use crate::support::{Bed, RunningRelay};

const SMALL_RECORDS: &str = "kafka.properties.\"message.max.bytes\" = 20000\n";

fn small_records(bed: &Bed) -> String {
    format!("{SMALL_RECORDS}{}", bed.section("test", ""))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oversize_row_freezes_its_key_alone_until_it_is_skipped() {
    let bed = Bed::new().await;
    let sections = small_records(&bed);
    let config = config(&sections);
    let relay = RunningRelay::start(&sections).await;
    for version in 1..=3 {
        let payload = vec![7; if version == 2 { 40_000 } else { 10 }];
        insert(&bed.client, "poisoned", version, None, Some(&payload)).await;
        insert(&bed.client, "well", version, None, Some(b"x")).await;
    }
    bed.settled().await;
    let records = read(&bed.topic).await;
    assert_eq!(versions(&records, "poisoned"), [1]);
    assert_eq!(versions(&records, "well"), [1, 2, 3]);
    let rows = quarantined(&bed.client).await;
    assert_eq!(rows.len(), 2, "{rows:?}");
    let problem = rows[0].3.as_deref().expect("a problem");
    assert!(
        problem.contains("message.max.bytes is 20000") && problem.contains("40"),
        "{problem}"
    );
    assert_eq!(rows[1].3, None, "it waits behind the other");
    let admin = relay.admin;
    wait_until("the metrics tell of it", || async move {
        metric(admin, "outbox_relay_quarantined_keys").await == 1.0
            && metric(admin, "outbox_relay_quarantined_rows").await == 2.0
    })
    .await;

    relay.crash().await;
    let relay = RunningRelay::start(&sections).await;
    insert(&bed.client, "poisoned", 4, None, Some(b"4")).await;
    insert(&bed.client, "well", 4, None, Some(b"4")).await;
    bed.settled().await;
    let records = read(&bed.topic).await;
    assert_eq!(
        versions(&records, "poisoned"),
        [1],
        "a restart forgot the quarantine"
    );
    assert_eq!(versions(&records, "well"), [1, 2, 3, 4]);
    let poisoned = |version| ("poisoned".to_owned(), version);
    assert_eq!(kept(&bed.client).await, [2, 3, 4].map(poisoned));

    // It does not get smaller.
    quarantine::retry(&config, None, Some("poisoned"))
        .await
        .expect("asked");
    wait_until("it is tried again", || async {
        let rows = quarantined(&bed.client).await;
        rows[0].4 == 2 && rows.iter().all(|row| row.2 == "frozen")
    })
    .await;
    let listed = quarantine::list(&config, None).await.expect("listed");
    let first = listed.json()["keys"][0].clone();
    assert_eq!(
        (&first["rows"], &first["attempts"], &first["first_version"]),
        (&3.into(), &2.into(), &2.into())
    );
    let id = first["first_id"].as_i64().expect("an id");

    let refused = quarantine::skip(&config, None, id + 2, "why not").await;
    assert!(
        matches!(refused, Err(CommandError::Refused(_))),
        "skipped a row that is not the first: {refused:?}"
    );
    let refused = quarantine::skip(&config, None, id, "  ").await;
    assert!(matches!(refused, Err(CommandError::Usage(_))), "{refused:?}");
    quarantine::skip(&config, None, id, "too large for anybody")
        .await
        .expect("skipped");
    until_quarantine_is_empty(&bed).await;
    wait_until("the key flows again", || async {
        metric(relay.admin, "outbox_relay_quarantined_keys").await == 0.0
    })
    .await;
    insert(&bed.client, "poisoned", 5, None, Some(b"5")).await;
    bed.settled().await;
    let records = read(&bed.topic).await;
    assert_eq!(versions(&records, "poisoned"), [1, 2, 3, 4, 5]);
    let marker = records
        .iter()
        .find(|record| record.key == "poisoned" && record.version() == 2)
        .expect("a marker");
    assert_eq!(marker.header("ce_type"), Some("outbox.row.skipped"));
    assert_eq!(marker.header("outbox-skipped"), Some("too large for anybody"));
    assert_eq!(marker.payload.as_deref(), Some(&[][..]), "not a tombstone");
    relay.stop().await;
    let sound = verify::verify(&config, None).await.expect("verified");
    assert_eq!(sound.code(), 0, "{}", sound.json());
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_topic_that_does_not_exist_wait_and_then_go_as_they_would_have() {
    let bed = Bed::new().await;
    let sections = bed.section("test", "");
    let config = config(&sections);
    let missing = testing::unique("events.missing");
    let relay = RunningRelay::start(&sections).await;
    for version in 1..=3 {
        insert(&bed.client, "m", version, Some(&missing), Some(&noise(50))).await;
        insert(&bed.client, "well", version, None, Some(b"x")).await;
    }
    // One that is made just now is waited for.
    let soon = testing::unique("events.soon");
    insert(&bed.client, "s", 1, Some(&soon), None).await;
    create_topic(&soon, &[]).await;
    // A tombstone among them.
    insert(&bed.client, "m", 4, Some(&missing), None).await;
    let never = testing::unique("events.never");
    let first = insert(&bed.client, "n", 1, Some(&never), Some(b"1")).await;
    insert(&bed.client, "n", 2, None, Some(b"2")).await;
    bed.settled().await;
    assert_eq!(versions(&read(&bed.topic).await, "well"), [1, 2, 3]);
    let rows = quarantined(&bed.client).await;
    assert_eq!(rows.len(), 6, "{rows:?}");
    assert!(
        rows[0].3.as_deref().is_some_and(|p| p.contains("create-topics")),
        "{rows:?}"
    );

    // There is no topic for its marker.
    quarantine::skip(&config, None, first, "no such topic")
        .await
        .expect("skipped");
    wait_until("the row behind is published", || async {
        versions(&read(&bed.topic).await, "n") == [2]
    })
    .await;

    create_topic(&missing, &[]).await;
    quarantine::retry(&config, None, Some("m")).await.expect("asked");
    until_quarantine_is_empty(&bed).await;
    insert(&bed.client, "m", 5, Some(&missing), Some(b"5")).await;
    bed.settled().await;
    relay.stop().await;
    let records = read(&missing).await;
    assert_eq!(versions(&records, "m"), [1, 2, 3, 4, 5]);
    assert_eq!(records[3].payload, None);
    // Replay makes records of the rows themselves.
    let (code, answer) = json(&sections, &["replay", "--key", "m"]).await;
    assert_eq!((code, &answer["rows"]), (0, &5.into()), "{answer}");
    let all = read(&missing).await;
    assert_eq!(all.len(), 10);
    assert_eq!(all[..5], all[5..], "what was kept is not what the row says");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_broker_refuses_of_a_batch_is_found_out() {
    let bed = Bed::without_topic().await;
    create_topic(&bed.topic, &[("max.message.bytes", "5000")]).await;
    let sections = bed.section("test", "");
    let config = config(&sections);
    for version in 1..=3 {
        for key in 0..20 {
            insert(
                &bed.client,
                &format!("well-{key}"),
                version,
                None,
                Some(&noise(300)),
            )
            .await;
        }
        let size = if version == 2 { 9_000 } else { 300 };
        insert(&bed.client, "guilty", version, None, Some(&noise(size))).await;
    }
    let relay = RunningRelay::start(&sections).await;
    bed.settled().await;
    let records = read(&bed.topic).await;
    for key in 0..20 {
        let mut seen = versions(&records, &format!("well-{key}"));
        seen.dedup();
        assert_eq!(seen, [1, 2, 3], "well-{key}");
    }
    assert_eq!(versions(&records, "guilty"), [1]);
    let guilty = |version| ("guilty".to_owned(), version);
    assert_eq!(kept(&bed.client).await, [2, 3].map(guilty));
    let rows = quarantined(&bed.client).await;
    assert!(
        rows[0].3.as_deref().is_some_and(|p| p.contains("Kafka refuses")),
        "{rows:?}"
    );
    assert_eq!(
        (&rows[1].3, rows[1].4),
        (&None, 0),
        "the row behind is not at fault"
    );

    // Behind the first there is another one; those between go out, and the second is found.
    for version in 4..=8 {
        let size = if version == 6 { 9_000 } else { 300 };
        insert(&bed.client, "guilty", version, None, Some(&noise(size))).await;
    }
    bed.settled().await;
    for (left, reason) in [(vec![6, 7, 8], "first"), (vec![], "second")] {
        let listed = quarantine::list(&config, None).await.expect("listed");
        let id = listed.json()["keys"][0]["first_id"].as_i64().expect("an id");
        quarantine::skip(&config, None, id, reason)
            .await
            .expect("skipped");
        wait_until("what is behind is tried", || async {
            let rows = quarantined(&bed.client).await;
            let found: Vec<i64> = rows.iter().map(|row| row.1).collect();
            found == left
                && rows
                    .first()
                    .is_none_or(|row| row.2 == "frozen" && row.3.is_some())
        })
        .await;
    }
    relay.stop().await;
    let mut seen = versions(&read(&bed.topic).await, "guilty");
    seen.dedup();
    assert_eq!(seen, [1, 2, 3, 4, 5, 6, 7, 8]);
    let sound = verify::verify(&config, None).await.expect("verified");
    assert_eq!(sound.code(), 0, "{}", sound.json());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_keys_that_fail_at_once_are_an_outage_and_wait() {
    let bed = Bed::without_topic().await;
    bed.client
        .batch_execute(
            "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source)
             SELECT gen_random_uuid(), 'test', 'k' || n, v, 'x', '/x' FROM generate_series(1, 2) v, generate_series(1, 150) n",
        )
        .await
        .expect("inserted");
    let sections = bed.section("test", "");
    let relay = RunningRelay::start(&sections).await;
    wait_until("it says why it waits", || async {
        let answer = relay.readyz().await;
        answer.contains("503") && answer.contains("does not exist")
    })
    .await;
    // Several terms, and none of them says that it is ready or gives up more.
    let terms = metric(relay.admin, "outbox_relay_leader_changes_total").await;
    wait_until("it tries again", || async {
        let answer = relay.readyz().await;
        assert!(answer.contains("503"), "{answer}");
        metric(relay.admin, "outbox_relay_leader_changes_total").await >= terms + 3.0
    })
    .await;
    let frozen = kept(&bed.client).await.len();
    assert!(frozen <= 20, "{frozen} keys are frozen in an outage");
    create_topic(&bed.topic, &[]).await;
    bed.settled().await;
    let config = config(&sections);
    quarantine::retry(&config, None, None).await.expect("asked");
    until_quarantine_is_empty(&bed).await;
    wait_until("it is ready", || async {
        relay.readyz().await.contains("200 OK")
    })
    .await;
    relay.stop().await;
    let records = read(&bed.topic).await;
    assert_eq!(records.len(), 300);
    for key in 1..=150 {
        assert_eq!(versions(&records, &format!("k{key}")), [1, 2]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_in_a_hundred_is_poisoned_and_the_others_flow() {
    let bed = Bed::new().await;
    bed.client
        .batch_execute(
            "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source, payload)
             SELECT gen_random_uuid(), 'test', 'k' || n, v, 'x', '/x',
                    CASE WHEN n % 100 = 0 AND v = 2 THEN convert_to(repeat('x', 30000), 'UTF8') END
               FROM generate_series(1, 3) v, generate_series(1, 2000) n",
        )
        .await
        .expect("inserted");
    let relay = RunningRelay::start(&small_records(&bed)).await;
    bed.settled().await;
    assert_eq!(
        metric(relay.admin, "outbox_relay_leader_changes_total").await,
        1.0,
        "it was taken for an outage"
    );
    relay.stop().await;
    let records = read(&bed.topic).await;
    assert_eq!(records.len(), 1_980 * 3 + 20);
    assert_eq!(versions(&records, "k100"), [1]);
    assert_eq!(versions(&records, "k101"), [1, 2, 3]);
    assert_eq!(kept(&bed.client).await.len(), 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_arrive_during_a_retry_keep_their_order_and_a_crash_does_not_end_it() {
    let bed = Bed::new().await;
    let missing = testing::unique("events.missing");
    let sections = bed.section("test", "");
    let config = config(&sections);
    bed.client
        .execute(
            "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source, topic)
             SELECT gen_random_uuid(), 'test', 'r', v, 'x', '/x', $1 FROM generate_series(1, 3000) v",
            &[&missing],
        )
        .await
        .expect("inserted");
    let mut relay = RunningRelay::start(&sections).await;
    bed.settled().await;
    assert_eq!(kept(&bed.client).await.len(), 3000);
    create_topic(&missing, &[]).await;
    let writer = bed.connect().await;
    let topic = missing.clone();
    let writing = tokio::spawn(async move {
        for version in 3_001..=3_600 {
            insert(&writer, "r", version, Some(&topic), None).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    quarantine::retry(&config, None, Some("r")).await.expect("asked");
    for most in [2_500, 1_000] {
        wait_until("it goes on", || async { kept(&bed.client).await.len() < most }).await;
        relay.crash().await;
        relay = RunningRelay::start(&sections).await;
    }
    writing.await.expect("written");
    until_quarantine_is_empty(&bed).await;
    bed.settled().await;
    relay.stop().await;
    let records = read(&missing).await;
    let (mut next, mut repeats) = (1, 0);
    for version in versions(&records, "r") {
        if version == next {
            next += 1;
        } else {
            assert!(version < next, "{version} before {next}");
            repeats += 1;
        }
    }
    assert_eq!(next, 3_601);
    assert!(repeats < 1_500, "{repeats} repeats of two crashes");
}
