#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::time::Duration;

use local_stack::postgres::connect;
use local_stack::testing::{self, Folder};
use local_stack::{Debezium, wait};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

const TOPIC: &str = "outbox.event.order";

#[derive(Debug)]
struct Record {
    key: Option<String>,
    value: Option<String>,
    headers: BTreeMap<String, String>,
}

fn reader(brokers: &str) -> BaseConsumer {
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "reader")
        .set("enable.auto.commit", "false")
        .set("allow.auto.create.topics", "false")
        .create()
        .unwrap();
    let mut partitions = TopicPartitionList::new();
    partitions
        .add_partition_offset(TOPIC, 0, Offset::Beginning)
        .unwrap();
    reader.assign(&partitions).unwrap();
    reader
}

async fn next(reader: &BaseConsumer) -> Record {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    wait::until("a record", Duration::from_secs(30), || async {
        // The topic may not be there yet.
        let Some(Ok(message)) = reader.poll(Duration::from_millis(50)) else {
            return Ok(None);
        };
        let headers = message.headers().into_iter().flat_map(Headers::iter);
        Ok(Some(Record {
            key: message.key().map(text),
            value: message.payload().map(text),
            headers: headers
                .map(|header| (header.key.to_owned(), text(header.value.unwrap_or(b"(null)"))))
                .collect(),
        }))
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn rows_of_an_outbox_arrive_as_records() {
    let folder = Folder::create("debezium");
    let postgres = testing::private_postgres(&folder).await.unwrap();
    let kafka = testing::private_kafka(&folder).await.unwrap();
    let database = connect(&postgres.url("postgres")).await.unwrap();
    database
        .batch_execute(
            "CREATE TABLE outbox_events (id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL, \
             aggregateid varchar(255) NOT NULL, type varchar(255) NOT NULL, payload jsonb)",
        )
        .await
        .unwrap();
    let mut debezium = Debezium::builder(
        folder.path().join("debezium"),
        &postgres.url("postgres"),
        &kafka.brokers(),
        "public.outbox_events",
    )
    .setting(
        "transforms.outbox.table.fields.additional.placement",
        "type:header:eventType",
    )
    .start()
    .await
    .unwrap();

    let insert = async |id: u128, payload: &str| {
        let id = uuid::Uuid::from_u128(id);
        database
            .batch_execute(&format!(
                "INSERT INTO outbox_events VALUES ('{id}', 'order', 'o-1', 'OrderPlaced', {payload})"
            ))
            .await
    };
    insert(1, r#"'{"total": 12.50,"note":"ü"}'"#).await.unwrap();
    insert(2, "NULL").await.unwrap();
    let reader = reader(&kafka.brokers());
    let first = next(&reader).await;
    assert_eq!(first.key.as_deref(), Some("o-1"));
    assert_eq!(
        first.value.as_deref(),
        Some(r#"{"note": "ü", "total": 12.50}"#),
        "as PostgreSQL writes jsonb"
    );
    assert_eq!(first.headers["id"], "00000000-0000-0000-0000-000000000001");
    assert_eq!(first.headers["eventType"], "OrderPlaced");
    let second = next(&reader).await;
    assert_eq!(second.value, None);

    // It goes on from where it left off, and sends again what it does not remember to have sent.
    debezium.stop().await.unwrap();
    insert(3, "'3'").await.unwrap();
    debezium.start().await.unwrap();
    while next(&reader).await.value.as_deref() != Some("3") {}
    debezium.kill().unwrap();
    insert(4, "'4'").await.unwrap();
    debezium.start().await.unwrap();
    while next(&reader).await.value.as_deref() != Some("4") {}
}
