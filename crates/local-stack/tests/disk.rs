use std::time::Duration;

use local_stack::postgres::connect;
use local_stack::testing::{self, Folder};
use local_stack::{Kafka, Postgres, wait};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::producer::{FutureProducer, FutureRecord};
use tokio_postgres::error::SqlState;

const MEGABYTE: u64 = 1024 * 1024;

#[tokio::test]
async fn postgres_runs_out_of_room_and_gets_more() {
    let folder = Folder::create("postgres-disk");
    let Some(disk) = testing::disk(192 * MEGABYTE) else {
        return;
    };
    let postgres = Postgres::builder(folder.path().join("postgres"))
        .data_in(disk.path())
        .fsync(false)
        .start()
        .await
        .unwrap();
    let client = connect(&postgres.url("postgres")).await.unwrap();
    client.batch_execute("CREATE TABLE t (text text)").await.unwrap();
    let insert = "INSERT INTO t SELECT repeat('x', 1000) FROM generate_series(1, 1000)";
    client.batch_execute(insert).await.unwrap();

    disk.fill().unwrap();
    let error = client.batch_execute(insert).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::DISK_FULL), "{error:?}");

    disk.resize(256 * MEGABYTE).unwrap();
    client.batch_execute(insert).await.unwrap();
    disk.fill().unwrap();
    client.batch_execute(insert).await.unwrap_err();
    disk.free().unwrap();
    client.batch_execute(insert).await.unwrap();
}

#[tokio::test]
async fn kafka_ends_for_want_of_room_and_comes_back_with_more() {
    let folder = Folder::create("kafka-disk");
    let Some(disk) = testing::disk(128 * MEGABYTE) else {
        return;
    };
    let mut broker = Kafka::builder(folder.path().join("kafka"))
        .data_in(disk.path())
        .start()
        .await
        .unwrap();
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", broker.brokers())
        .set("message.timeout.ms", "2000");
    let admin: AdminClient<DefaultClientContext> = config.create().unwrap();
    let topic = NewTopic::new("orders", 1, TopicReplication::Fixed(1));
    let mut made = admin.create_topics([&topic], &AdminOptions::new()).await.unwrap();
    made.remove(0).unwrap();
    let producer: FutureProducer = config.create().unwrap();
    let payload = vec![7; 500_000];
    let send = async || {
        let record = FutureRecord::<str, [u8]>::to("orders").payload(&payload);
        producer
            .send(record, Duration::ZERO)
            .await
            .map_err(|(error, _)| error)
    };
    send().await.unwrap();

    disk.fill().unwrap();
    wait::until("the broker ends", Duration::from_secs(60), || {
        let ended = !broker.is_running();
        let send = &send;
        async move {
            let _ = send().await;
            Ok(ended.then_some(()))
        }
    })
    .await
    .unwrap();

    disk.resize(256 * MEGABYTE).unwrap();
    broker.start().await.unwrap();
    // The client takes longer to come back than a record may wait.
    let taken = async || Ok(send().await.ok());
    wait::until("a record is taken again", Duration::from_secs(60), taken)
        .await
        .unwrap();
}
