use local_stack::Pgbouncer;
use local_stack::postgres::connect;
use local_stack::testing::{self, Folder};

#[tokio::test]
async fn sessions_share_connections_between_transactions() {
    let folder = Folder::create("pgbouncer");
    let postgres = testing::private_postgres(&folder).await.unwrap();
    let server = connect(&postgres.url("postgres")).await.unwrap();
    server
        .batch_execute("CREATE ROLE relay LOGIN PASSWORD 'secret'")
        .await
        .unwrap();
    let mut bouncer = Pgbouncer::start(folder.path().join("pgbouncer"), postgres.port())
        .await
        .unwrap();

    let as_relay = bouncer.url("postgres").replace("postgres@", "relay@");
    let first = connect(&as_relay).await.unwrap();
    let second = connect(&as_relay).await.unwrap();
    first.simple_query("SET search_path = elsewhere").await.unwrap();
    let shown = second.simple_query("SHOW search_path").await.unwrap();
    let left_behind = shown.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    assert_eq!(left_behind, Some("elsewhere"), "another session's setting");

    // What PgBouncer before 1.21 is known for.
    let prepared = first.prepare("SELECT current_user").await.unwrap();
    second.batch_execute("BEGIN").await.unwrap();
    let elsewhere = first.query(&prepared, &[]).await.unwrap_err();
    assert_eq!(
        elsewhere.code(),
        Some(&tokio_postgres::error::SqlState::INVALID_SQL_STATEMENT_NAME)
    );

    bouncer.kill().unwrap();
    assert!(connect(&as_relay).await.is_err());
    bouncer.restart().await.unwrap();
    connect(&as_relay).await.unwrap();
}
