//! Published rows go once they are older than the retention, and no others.

use std::time::Duration;

use outbox_relay::commands::init::{self, Options, StartAt};

use crate::kit::*;
use crate::support::{Bed, RunningRelay};

async fn rows(bed: &Bed) -> i64 {
    let count = bed.client.query_one("SELECT count(*) FROM outbox", &[]).await;
    count.expect("counted").get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_go_up_to_the_lowest_floor_and_never_above_it() {
    let bed = Bed::new().await;
    let short = bed.section("test", "retention = \"1s\"");
    // A second relay of the same table, which lags: it began, and is not running.
    let lagging = bed.section("lagging", "retention = \"1s\"");
    let options = Options {
        start_at: Some(StartAt::Beginning),
        ..Options::default()
    };
    init::init(&config(&lagging), None, &options)
        .await
        .expect("begun");
    let relay = RunningRelay::start(&short).await;
    for n in 0..30 {
        bed.append(&format!("e{}", n % 3)).await;
    }
    bed.settled().await;
    // Nothing goes, however long it takes: five rounds of removal are seen by what they remember.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert_eq!(rows(&bed).await, 30, "the lagging relay has not published them");

    let behind = RunningRelay::start(&lagging).await;
    wait_until("both have published them, and they go", || async {
        rows(&bed).await == 0
    })
    .await;
    behind.stop().await;
    // What an open transaction keeps the floor from is kept as well.
    bed.client
        .batch_execute("DELETE FROM outbox_relay WHERE name = 'lagging'")
        .await
        .expect("forgotten");
    let mut slow = bed.connect().await;
    let open = slow.transaction().await.expect("begun");
    insert(&open, "late", 1, None, None).await;
    for n in 0..5 {
        insert(&bed.client, &format!("f{n}"), 1, None, None).await;
    }
    wait_until("they are published", || async {
        versions(&read(&bed.topic).await, "f4").len() == 1
    })
    .await;
    tokio::time::sleep(Duration::from_millis(2_000)).await;
    assert_eq!(rows(&bed).await, 5, "above the floor");
    open.commit().await.expect("committed");
    wait_until("they go too", || async { rows(&bed).await == 0 }).await;
    // A stopped relay costs space, and nothing else.
    relay.stop().await;
    for n in 0..10 {
        bed.append(&format!("g{n}")).await;
    }
    assert_eq!(rows(&bed).await, 10);
    let relay = RunningRelay::start(&short).await;
    wait_until("they go after the restart", || async { rows(&bed).await == 0 }).await;
    relay.stop().await;
    let records = read(&bed.topic).await;
    assert_eq!(versions(&records, "late"), [1]);
    for n in 0..10 {
        assert!(!versions(&records, &format!("g{n}")).is_empty(), "g{n} is lost");
    }
    let (code, answer) = json(&short, &["replay", "--since", "1h"]).await;
    assert_eq!((code, &answer["rows"]), (0, &0.into()), "{answer}");
    let output = run(&short, &["replay", "--since", "1h"]).await;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("no row") && text.contains("still there"), "{text}");
    // The end of the outbox is gone, and what a relay writes next has the next id.
    let removed = bed
        .client
        .query_one("SELECT removed_to FROM outbox_relay_removed", &[])
        .await
        .expect("read");
    assert_eq!(removed.get::<_, i64>(0), bed.floor_and_last().await.1);
}
