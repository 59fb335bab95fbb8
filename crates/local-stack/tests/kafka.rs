#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use local_stack::certificates::Authority;
use local_stack::testing::{self, Folder};
use local_stack::{Kafka, kafka, wait};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::KafkaError;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::types::RDKafkaErrorCode;

#[tokio::test]
async fn a_broker_comes_back_after_kill_and_freeze() {
    let folder = Folder::create("kafka");
    let mut broker = testing::private_kafka(&folder).await.unwrap();
    let port = broker.port();
    assert!(kafka::is_ready(port).await);

    broker.kill().unwrap();
    assert!(!kafka::is_ready(port).await);
    broker.start().await.unwrap();
    assert_eq!(broker.port(), port);
    assert!(kafka::is_ready(port).await);

    broker.pause().unwrap();
    assert!(!kafka::is_ready(port).await, "frozen");
    broker.resume().unwrap();
    wait::until("it answers again", Duration::from_secs(30), || async {
        Ok(kafka::is_ready(port).await.then_some(()))
    })
    .await
    .unwrap();

    broker.stop().await.unwrap();
    broker.start().await.unwrap();
    assert!(kafka::is_ready(port).await);
}

fn producer(broker: &Kafka, (user, password): (&str, &str), ca_file: &std::path::Path) -> FutureProducer {
    ClientConfig::new()
        .set("bootstrap.servers", broker.sasl_tls_brokers().unwrap())
        .set("security.protocol", "sasl_ssl")
        .set("ssl.ca.location", ca_file.to_string_lossy())
        .set("sasl.mechanism", "PLAIN")
        .set("sasl.username", user)
        .set("sasl.password", password)
        .set("message.timeout.ms", "3000")
        .create()
        .unwrap()
}

async fn send(producer: &FutureProducer) -> Result<(), KafkaError> {
    let record = FutureRecord::<str, str>::to("orders").payload("hello");
    let sent = producer.send(record, Duration::ZERO).await;
    sent.map(|_| ()).map_err(|(error, _)| error)
}

#[tokio::test]
async fn a_user_logs_in_by_tls_and_can_be_denied_a_topic() {
    let folder = Folder::create("kafka-sasl");
    let broker = Kafka::builder(folder.path().join("kafka"))
        .sasl_tls()
        .authorizer()
        .start()
        .await
        .unwrap();
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", broker.brokers())
        .create()
        .unwrap();
    let topic = NewTopic::new("orders", 1, TopicReplication::Fixed(1));
    admin
        .create_topics([&topic], &AdminOptions::new())
        .await
        .unwrap()
        .remove(0)
        .unwrap();

    let ca_file = broker.ca_file().unwrap();
    let relay = producer(&broker, kafka::USER, ca_file);
    send(&relay).await.unwrap();
    let stranger = producer(&broker, ("relay", "wrong"), ca_file);
    send(&stranger).await.unwrap_err();
    let other = Authority::in_folder(folder.path().join("other")).unwrap();
    let mistrustful = producer(&broker, kafka::USER, &other.ca_file());
    send(&mistrustful).await.unwrap_err();

    broker.deny_write("relay", "orders").await.unwrap();
    let denied = RDKafkaErrorCode::TopicAuthorizationFailed;
    wait::until("the denial holds", Duration::from_secs(20), || async {
        let sent = send(&relay).await;
        Ok(sent
            .is_err_and(|error| error.rdkafka_error_code() == Some(denied))
            .then_some(()))
    })
    .await
    .unwrap();
    send(&producer(&broker, kafka::ADMIN, ca_file)).await.unwrap();

    broker.allow_write("relay", "orders").await.unwrap();
    wait::until("it may write again", Duration::from_secs(20), || async {
        Ok(send(&relay).await.ok())
    })
    .await
    .unwrap();
}
