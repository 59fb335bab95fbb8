//! `deploy/compose.yaml` says the same as what is started without containers.

use local_stack::testing::{self, Folder};

const COMPOSE: &str = include_str!("../../../deploy/compose.yaml");

#[tokio::test]
async fn containers_have_the_same_settings() {
    let folder = Folder::create("compose");
    let kafka = testing::private_kafka(&folder).await.unwrap();
    let properties = std::fs::read_to_string(folder.path().join("kafka/server.properties")).unwrap();
    // Where it listens and where its data is differs by nature.
    let own = [
        "listener",
        "log.dirs",
        "controller.quorum.voters",
        "node.id",
        "process.roles",
    ];
    let mut compared = 0;
    for line in properties.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.split_once('=').unwrap();
        if own.iter().any(|part| name.contains(part)) {
            continue;
        }
        let variable = format!("KAFKA_{}", name.replace('.', "_").to_uppercase());
        let expected = format!("{variable}: \"{value}\"");
        assert!(COMPOSE.contains(&expected), "compose.yaml lacks {expected}");
        compared += 1;
    }
    assert!(compared > 5, "{properties}");
    drop(kafka);

    let postgres = testing::private_postgres(&folder).await.unwrap();
    let conf = std::fs::read_to_string(postgres.data().join("local-stack.conf")).unwrap();
    for name in [
        "max_connections",
        "track_commit_timestamp",
        "wal_level",
        "max_prepared_transactions",
    ] {
        let line = conf.lines().find(|line| line.starts_with(name)).unwrap();
        let expected = format!("-c{}", line.replace(" = ", "=").replace('\'', ""));
        assert!(COMPOSE.contains(&expected), "compose.yaml lacks {expected}");
    }
    assert!(COMPOSE.contains(&format!("apache/kafka:{}", local_stack::kafka::VERSION)));
    drop(postgres);
}
