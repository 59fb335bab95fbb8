//! Writers who break the rules: denied, or found out before consumers see it.

use crate::kit::*;
use crate::support::{Bed, RunningRelay};

#[tokio::test(flavor = "multi_thread")]
async fn versions_that_do_not_count_by_one_are_found_out() {
    let bed = Bed::new().await;
    let relay = bed.relay().await;
    for key in ["gap", "again", "late", "swapped"] {
        insert(&bed.client, key, 1, None, Some(b"1")).await;
    }
    bed.settled().await;

    // An advisory lock that was let go before the commit: version 3 is there before version 2.
    let mut slow = bed.connect().await;
    let late = slow.transaction().await.expect("begun");
    insert(&late, "late", 2, None, Some(b"2")).await;
    insert(&bed.client, "late", 3, None, Some(b"3")).await;
    // A version that nobody will ever write.
    insert(&bed.client, "gap", 3, None, Some(b"3")).await;
    insert(&bed.client, "gap", 4, None, Some(b"4")).await;
    // An insert before a blind version + 1: two writers read the same version.
    insert(&bed.client, "again", 2, None, Some(b"2a")).await;
    insert(&bed.client, "again", 2, None, Some(b"2b")).await;
    // Two rows of one entity in one INSERT, in the wrong order.
    bed.client
        .batch_execute(
            "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source)
             VALUES (gen_random_uuid(), 'test', 'swapped', 3, 'x', '/x'), (gen_random_uuid(), 'test', 'swapped', 2, 'x', '/x'),
                    (gen_random_uuid(), 'test', 'new', 2, 'x', '/x'), (gen_random_uuid(), 'test', 'new', 1, 'x', '/x')",
        )
        .await
        .expect("inserted");
    insert(&bed.client, "well", 1, None, None).await;
    wait_until("others flow meanwhile", || async {
        let records = read(&bed.topic).await;
        versions(&records, "well") == [1] && versions(&records, "again") == [1, 2]
    })
    .await;
    let records = read(&bed.topic).await;
    assert_eq!(
        versions(&records, "late"),
        [1],
        "version 2 may still come: its writer is open"
    );
    assert_eq!(versions(&records, "gap"), [1]);
    late.commit().await.expect("committed");
    bed.settled().await;
    relay.stop().await;
    let records = read(&bed.topic).await;
    assert_eq!(versions(&records, "late"), [1, 2, 3]);
    assert_eq!(versions(&records, "swapped"), [1, 2, 3]);
    assert_eq!(versions(&records, "gap"), [1], "a consumer saw the gap");
    assert_eq!(versions(&records, "again"), [1, 2]);
    assert_eq!(
        versions(&records, "new"),
        [2],
        "nothing was known of it, and then version 1 came too late"
    );
    let rows = quarantined(&bed.client).await;
    let problem = |key: &str, version: i64| {
        let row = rows.iter().find(|row| row.0 == key && row.1 == version);
        row.and_then(|row| row.3.clone()).unwrap_or_default()
    };
    assert_eq!(rows.len(), 4, "{rows:?}");
    assert!(
        problem("gap", 3).contains("what is between is missing"),
        "{rows:?}"
    );
    assert!(problem("again", 2).contains("was published already"), "{rows:?}");
    assert!(problem("new", 1).contains("was published already"), "{rows:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_may_be_anything_when_they_are_not_checked() {
    let bed = Bed::new().await;
    let sections = bed.section("test", "versions = \"unchecked\"");
    let relay = RunningRelay::start(&sections).await;
    insert(&bed.client, "k", 1, None, None).await;
    bed.settled().await;
    for version in [5, 5, 2] {
        insert(&bed.client, "k", version, None, None).await;
    }
    bed.settled().await;
    relay.stop().await;
    assert_eq!(versions(&read(&bed.topic).await, "k"), [1, 5, 5, 2]);
    let (code, answer) = json(&sections, &["verify"]).await;
    assert_eq!(
        (code, &answer["out_of_order"]),
        (0, &0.into()),
        "their order is that of the ids: {answer}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_denies_what_would_break_the_promises() {
    let bed = Bed::new().await;
    bed.append("k").await;
    let columns = "event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source";
    let values = "gen_random_uuid(), 'test', 'k', 2, 'x', '/x'";
    for statement in [
        format!("INSERT INTO outbox (id, {columns}) VALUES (99, {values})"),
        "DELETE FROM outbox".to_owned(),
        "UPDATE outbox SET aggregate_version = 7".to_owned(),
        "TRUNCATE outbox".to_owned(),
    ] {
        let denied = bed.client.batch_execute(&statement).await;
        let code = denied.as_ref().err().and_then(|error| error.code().cloned());
        let code = code.map(|code| code.code().to_owned());
        assert!(
            matches!(code.as_deref(), Some("428C9" | "23001")),
            "{statement}: {denied:?}"
        );
    }
    bed.client
        .batch_execute("ALTER TABLE outbox ALTER id SET CACHE 10")
        .await
        .expect("altered");
    let problem = bed.relay().await.failure().await;
    assert!(
        problem.contains("CACHE 10") && problem.contains("use 1"),
        "{problem}"
    );
}
