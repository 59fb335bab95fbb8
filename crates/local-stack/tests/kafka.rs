use std::time::Duration;

use local_stack::testing::{self, Folder};
use local_stack::{kafka, wait};

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
