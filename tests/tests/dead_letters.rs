//! A record that the projection cannot handle, from the wire to the dead-letter topic and back by an operator's hand.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use local_stack::testing::Folder;
use local_stack::wait;
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use tests::load::Load;
use tests::shop::{Shop, order_client};
use tests::{PATIENCE, databases, topic};
use uuid::Uuid;

#[tokio::test(flavor = "multi_thread")]
async fn bad_records_reach_the_dead_letter_topic_as_they_were_and_are_replayed_by_hand() {
    tests::run("dead-letters", park_and_redrive).await;
}

async fn park_and_redrive(folder: &Folder) -> Result<()> {
    let shop = Shop::new(folder).await?;
    let (orders, views) = (shop.orders.connect().await?, shop.order_query.connect().await?);
    let mut order_svc = shop.order_svc().start().await?;
    let relay = shop.outbox_relay_with_dead_letters().start().await?;
    let view = shop.order_query_svc(1).start().await?;
    order_svc.ready().await?;

    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &shop.brokers)
        .set("partitioner", "murmur2_random")
        .create()?;
    let bad: BTreeMap<String, Vec<u8>> = (0..5)
        .map(|number| (Uuid::now_v7().to_string(), vec![0, 0, 0, 0, number]))
        .collect();
    for (key, value) in &bad {
        let event_id = Uuid::now_v7().to_string();
        let subject = format!("order/{key}");
        let headers = [
            ("ce_specversion", "1.0"),
            ("ce_id", &event_id),
            ("ce_source", "/stranger"),
            ("ce_type", "order.placed"),
            ("ce_subject", &subject),
            ("ce_time", "2026-01-01T00:00:00Z"),
            ("aggregate-version", "1"),
        ];
        let headers = headers
            .into_iter()
            .fold(OwnedHeaders::new(), |headers, (key, value)| {
                let value = Some(value);
                headers.insert(Header { key, value })
            });
        let record = FutureRecord::to(&shop.topic)
            .key(key)
            .payload(value)
            .headers(headers);
        let sent = producer.send_result(record).map_err(|(error, _)| error)?;
        sent.await?.map_err(|(error, _)| error)?;
    }
    // Real ones among them.
    let load = Load::start(
        &order_client(&order_svc)?,
        2,
        std::time::Duration::from_millis(15),
        7,
    );
    wait::until("all bad ones are parked", PATIENCE, || async {
        let parked = databases::count(&views, "SELECT count(*) FROM parked_records").await?;
        Ok((parked == bad.len() as i64).then_some(()))
    })
    .await?;
    load.finish().await?;
    databases::projected(&orders, &views).await?;

    let letters = wait::until("the dead letters are published", PATIENCE, || async {
        let letters = topic::read(&shop.brokers, &format!("{}-dlt", shop.topic)).await?;
        Ok((letters.len() >= bad.len()).then_some(letters))
    })
    .await?;
    ensure!(letters.len() == bad.len(), "{} dead letters", letters.len());
    for letter in &letters {
        let key = String::from_utf8(letter.key.clone().context("a key")?)?;
        ensure!(
            letter.payload.as_ref() == bad.get(&key),
            "{key}: the value is another one"
        );
        for (name, value) in [
            ("dlt-type", "event.processing.failed"),
            ("dlt-original-topic", shop.topic.as_str()),
            ("dlt-consumer", shop.group.as_str()),
            ("dlt-error-kind", "payload"),
            ("dlt-attempt", "1"),
            ("ce_type", "order.placed"),
            ("ce_source", "/stranger"),
        ] {
            ensure!(letter.header(name) == Some(value), "{name}: {:?}", letter.headers);
        }
        let error = letter.header("processing_error").context("an error")?;
        ensure!(error.contains("the payload is not what its type says"), "{error}");
        for name in [
            "dlt-original-partition",
            "dlt-original-offset",
            "dlt-original-timestamp",
        ] {
            let _: i64 = letter.header(name).context(name)?.parse()?;
        }
        ensure!(letter.header("failed_at").is_some());
    }

    let dlt = || shop.order_query_svc(9).arg("dlt");
    dlt().arg("list").arg("--json").run_to_end().await?;
    ensure!(
        dlt()
            .arg("replay")
            .arg("--all")
            .arg("--dry-run")
            .run_to_end()
            .await
            .is_err(),
        "it is still bad"
    );
    let attempts = "SELECT sum(attempts)::bigint FROM parked_records";
    ensure!(
        databases::count(&views, attempts).await? == 5,
        "a dry run counts for nothing"
    );
    ensure!(
        dlt().arg("replay").arg("--all").run_to_end().await.is_err(),
        "it is still bad"
    );
    ensure!(databases::count(&views, attempts).await? == 10);
    let first = databases::count(&views, "SELECT min(id) FROM parked_records")
        .await?
        .to_string();
    dlt().arg("show").arg(&first).run_to_end().await?;
    ensure!(
        dlt().arg("discard").arg(&first).run_to_end().await.is_err(),
        "no reason is given"
    );
    let discard = dlt().arg("discard").arg(&first).arg("--by").arg("ops");
    discard
        .arg("--reason")
        .arg("nobody placed it")
        .run_to_end()
        .await?;
    let audit = "SELECT count(*) FROM parked_audit WHERE action = 'discard' AND decided_by = 'ops' AND reason = 'nobody placed it'";
    ensure!(databases::count(&views, audit).await? == 1);
    ensure!(
        databases::count(
            &views,
            "SELECT count(*) FROM parked_records WHERE state = 'parked'"
        )
        .await?
            == 4
    );
    // Nothing went back to the topic.
    let records = topic::read(&shop.brokers, &shop.topic).await?;
    let again = records.iter().filter(|record| {
        record
            .key
            .as_ref()
            .is_some_and(|key| bad.contains_key(&*String::from_utf8_lossy(key)))
    });
    ensure!(again.count() == bad.len());
    drop((order_svc, relay, view));
    Ok(())
}
