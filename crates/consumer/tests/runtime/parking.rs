//! Records that can never be handled: they park with their entity, and everything else goes on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use chrono::{TimeDelta, Utc};
use consumer::HandlerError;
use envelope::header;
use rdkafka::message::{Header, Headers as _, OwnedHeaders};

use crate::stage::{Act, Stage, event, headers, nothing, refusing};

fn without(headers: &OwnedHeaders, name: &str) -> OwnedHeaders {
    headers
        .iter()
        .filter(|header| header.key != name)
        .fold(OwnedHeaders::new(), |kept, header| kept.insert(header))
}

fn with(headers: OwnedHeaders, key: &str, value: &str) -> OwnedHeaders {
    let value = Some(value);
    headers.insert(Header { key, value })
}

/// Key, value and headers of a record, and the kind and text of its error.
type Bad<'a> = (Option<&'a str>, Option<&'a [u8]>, OwnedHeaders, &'a str, &'a str);

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_record_parks_with_a_dead_letter_that_says_why_and_the_partition_goes_on() {
    let stage = Stage::with_large_records(1).await;
    let client = stage.database.connect().await.unwrap();
    client
        .batch_execute("ALTER TABLE effects ADD CHECK (entity <> 'constraint')")
        .await
        .unwrap();
    let fine = |entity: &str| headers(&event(entity, 1));
    let mut future = event("future", 1);
    future.occurred_at = Utc::now() + TimeDelta::days(2);
    let long_key = "k".repeat(600);
    let large = vec![b'x'; 16 << 20];
    let payload: &[u8] = b"payload";
    let bad: Vec<Bad<'_>> = vec![
        (Some("null"), None, fine("null"), "unreadable", "it has no value"),
        (
            None,
            Some(payload),
            fine("keyless"),
            "unreadable",
            "it has no key",
        ),
        (
            Some(&long_key),
            Some(payload),
            fine(&long_key),
            "unreadable",
            "its key is no text of 1 to 512 bytes",
        ),
        (
            Some("a\0b"),
            Some(payload),
            fine("a\0b"),
            "unreadable",
            "its key is no text",
        ),
        (
            Some("bare"),
            Some(payload),
            OwnedHeaders::new(),
            "unreadable",
            "header ce_specversion is missing",
        ),
        (
            Some("missing"),
            Some(payload),
            without(&fine("missing"), header::CE_ID),
            "unreadable",
            "header ce_id is missing",
        ),
        (
            Some("twice"),
            Some(payload),
            with(fine("twice"), header::CE_ID, "x"),
            "unreadable",
            "header ce_id appears more than once",
        ),
        (
            Some("malformed"),
            Some(payload),
            with(
                without(&fine("malformed"), header::AGGREGATE_VERSION),
                header::AGGREGATE_VERSION,
                "1.5",
            ),
            "unreadable",
            "header aggregate-version is not a positive integer",
        ),
        (
            Some("zero"),
            Some(payload),
            with(without(&fine("zero"), header::CE_TYPE), header::CE_TYPE, "a\0b"),
            "unreadable",
            "zero byte",
        ),
        (
            Some("other"),
            Some(payload),
            fine("another"),
            "unreadable",
            "its key is not the entity id",
        ),
        (
            Some("large"),
            Some(&large),
            fine("large"),
            "too_large",
            "it has 16777221 bytes",
        ),
        (
            Some("future"),
            Some(payload),
            headers(&future),
            "future",
            "seconds from now",
        ),
        (
            Some("unreadable"),
            Some(b"unreadable"),
            fine("unreadable"),
            "payload",
            "the payload is no payload",
        ),
        (
            Some("panic"),
            Some(b"panic"),
            fine("panic"),
            "payload",
            "the reader panicked",
        ),
        (
            Some("refused"),
            Some(payload),
            fine("refused"),
            "refused",
            "not this one",
        ),
        (
            Some("constraint"),
            Some(payload),
            fine("constraint"),
            "refused",
            "violates check constraint",
        ),
        (
            Some("gap"),
            Some(payload),
            headers(&event("gap", 3)),
            "gap",
            "version 3 of the entity came where 1 was expected",
        ),
    ];
    for (number, (key, value, headers, ..)) in bad.iter().enumerate() {
        stage.publish("good", number as i64 + 1).await;
        stage.produce(*key, *value, headers.clone(), Some(0)).await;
    }
    // Behind each entity that can be told, a record that is fine.
    let entities = [
        "null",
        "bare",
        "other",
        "large",
        "unreadable",
        "refused",
        "constraint",
    ];
    for entity in entities {
        stage.publish(entity, 2).await;
    }
    let count = bad.len() + entities.len();
    let instance = stage.start("a", refusing("refused"));
    let parked = stage.parks(count).await;
    stage.all_committed((bad.len() + count) as i64).await;
    assert_eq!(
        stage.versions("good").await,
        (1..=bad.len() as i64).collect::<Vec<_>>()
    );
    assert_eq!(stage.effects().await.unwrap().len(), bad.len());
    for (key, _, _, kind, error) in &bad {
        let entity = key.filter(|key| !key.contains('\0') && key.len() < 600);
        assert!(
            parked.iter().any(|row| {
                row.entity.as_deref() == entity && row.kind == *kind && row.error.contains(error)
            }),
            "{key:?} {kind} {error}: {parked:#?}"
        );
    }
    for entity in entities {
        let mine: Vec<&str> = parked
            .iter()
            .filter(|row| row.entity.as_deref() == Some(entity))
            .map(|row| row.kind.as_str())
            .collect();
        assert_eq!((mine.len(), mine[1]), (2, "behind"), "{entity}");
    }
    assert_eq!(instance.status.problems(), Vec::<String>::new());
    assert_eq!(instance.metric("consumer_dead_letters_total", ""), count as f64);
    instance.stop().await;

    let letters: BTreeMap<i64, tokio_postgres::Row> = client
        .query(
            "SELECT dlt_original_offset, aggregate_id, payload, topic, dlt_error_kind, processing_error, dlt_original_bytes, \
                    dlt_original_headers, dlt_original_key, event_type, aggregate_version, failed_at, dlt_consumer FROM dead_letters",
            &[],
        )
        .await
        .unwrap()
        .into_iter()
        .map(|row| (row.get(0), row))
        .collect();
    assert_eq!(letters.len(), count);
    for (number, (key, value, _, kind, error)) in bad.iter().enumerate() {
        let offset = number as i64 * 2 + 1;
        let letter = &letters[&offset];
        let usable = key.filter(|key| !key.contains('\0') && key.len() < 600);
        let place = format!("{}/0/{offset}", stage.topic);
        assert_eq!(letter.get::<_, &str>(1), usable.unwrap_or(&place));
        if *kind == "too_large" {
            assert_eq!(
                (letter.get::<_, Option<&[u8]>>(2), letter.get::<_, i64>(6)),
                (None, 16 << 20)
            );
        } else {
            assert_eq!(letter.get::<_, Option<&[u8]>>(2), *value);
        }
        assert_eq!(letter.get::<_, &str>(3), format!("{}-dlt", stage.topic));
        assert_eq!(letter.get::<_, &str>(4), *kind);
        assert!(letter.get::<_, &str>(5).contains(error));
        assert_eq!(letter.get::<_, &str>(12), stage.group);
        let is_event = !["unreadable", "too_large"].contains(kind);
        assert_eq!(letter.get::<_, Option<&str>>(9).is_some(), is_event, "{key:?}");
        assert_eq!(letter.get::<_, Option<&str>>(7).is_some(), !is_event, "{key:?}");
        assert_eq!(
            letter.get::<_, Option<&str>>(8).is_some(),
            key.is_some() && usable.is_none()
        );
    }
    // The table has what Kafka had, whatever its size.
    let large = "SELECT length(value)::bigint FROM parked_records WHERE error_kind = 'too_large'";
    assert_eq!(stage.number(large).await, 16 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_again_is_parked_once() {
    let stage = Stage::new(1).await;
    stage.publish("bad", 1).await;
    stage
        .produce(Some("bare"), Some(b"x"), OwnedHeaders::new(), None)
        .await;
    stage.produce(None, Some(b"x"), OwnedHeaders::new(), None).await;
    for version in 2..=4 {
        stage.publish("bad", version).await;
        stage.publish("bare", version - 1).await;
        // And again, as after a crash of the relay.
        stage.publish("bad", version).await;
    }
    for round in 0..2 {
        let instance = stage.start(&format!("round-{round}"), refusing("bad"));
        stage.all_committed(12).await;
        instance.stop().await;
        assert_eq!(stage.parked().await.unwrap().len(), 4 + 4 + 1);
        assert_eq!(stage.number("SELECT count(*) FROM dead_letters").await, 9);
        assert_eq!(stage.effects().await.unwrap(), []);
        // As if it had died before any offset was committed.
        stage.rewind().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_in_a_hundred_is_bad_and_the_others_are_whole() {
    const ENTITIES: usize = 300;
    const VERSIONS: i64 = 5;
    let stage = Stage::new(4).await;
    for version in 1..=VERSIONS {
        let sent = (0..ENTITIES).map(|entity| {
            let stage = &stage;
            async move {
                let name = format!("e{entity}");
                let payload: &[u8] = match entity % 100 {
                    7 if version == 3 => b"unreadable",
                    _ => b"payload",
                };
                let headers = headers(&event(&name, version));
                stage.produce(Some(&name), Some(payload), headers, None).await;
            }
        });
        futures::future::join_all(sent).await;
    }
    let instance = stage.start("a", nothing());
    stage.all_committed(ENTITIES as i64 * VERSIONS).await;
    for entity in 0..ENTITIES {
        let versions = stage.versions(&format!("e{entity}")).await;
        let reached = if entity % 100 == 7 { 2 } else { VERSIONS };
        assert_eq!(versions, (1..=reached).collect::<Vec<_>>(), "e{entity}");
    }
    let parked = stage.parked().await.unwrap();
    assert_eq!(parked.len(), 9);
    for bad in ["e7", "e107", "e207"] {
        let mine: Vec<(i64, &str)> = parked
            .iter()
            .filter(|row| row.entity.as_deref() == Some(bad))
            .map(|row| (row.version.unwrap(), row.kind.as_str()))
            .collect();
        assert_eq!(mine, [(3, "payload"), (4, "behind"), (5, "behind")]);
    }
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_makes_the_handler_panic_parks_and_the_batch_goes_on() {
    let stage = Stage::new(1).await;
    stage.publish_all(5, 3).await;
    let panics = Arc::new(AtomicUsize::new(0));
    let act: Act = {
        let panics = Arc::clone(&panics);
        Arc::new(move |seen: Vec<(String, i64)>| {
            let bad = seen
                .iter()
                .any(|(entity, version)| entity == "e2" && *version == 2);
            if bad {
                panics.fetch_add(1, Ordering::SeqCst);
            }
            Box::pin(async move {
                assert!(!bad, "as the test wants it");
                Ok::<(), HandlerError>(())
            })
        })
    };
    let instance = stage.start("a", act);
    stage.all_committed(15).await;
    assert!(panics.load(Ordering::SeqCst) > 0);
    assert_eq!(stage.versions("e2").await, [1]);
    assert_eq!(stage.effects().await.unwrap().len(), 13);
    let parked = stage.parked().await.unwrap();
    assert_eq!(parked.len(), 2);
    assert!(parked[0].error.contains("the handler panicked"), "{parked:?}");
    instance.stop().await;
}
