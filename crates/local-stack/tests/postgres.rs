use local_stack::postgres::connect;
use local_stack::testing::{self, Database, Folder};

#[tokio::test]
async fn committed_rows_survive_kill_and_stop() {
    let folder = Folder::create("postgres");
    let mut postgres = testing::private_postgres(&folder).await.unwrap();
    postgres.create_database("shop").await.unwrap();
    postgres.create_database("shop").await.unwrap();
    let url = postgres.url("shop");
    let client = connect(&url).await.unwrap();
    client
        .batch_execute("CREATE TABLE t (id int); INSERT INTO t VALUES (1)")
        .await
        .unwrap();

    postgres.kill().unwrap();
    assert!(connect(&url).await.is_err());
    postgres.start().await.unwrap();
    assert_eq!(postgres.url("shop"), url, "the same port");
    let client = connect(&url).await.unwrap();
    client.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();

    postgres.stop().await.unwrap();
    postgres.start().await.unwrap();
    let client = connect(&url).await.unwrap();
    let count: i64 = client
        .query_one("SELECT count(*) FROM t", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(count, 2);
    let setting: String = client
        .query_one("SHOW track_commit_timestamp", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(setting, "on");
}

#[tokio::test]
async fn databases_are_copies_of_a_template_made_once() {
    let made = std::sync::atomic::AtomicUsize::new(0);
    let template = testing::unique("template");
    let create = || {
        Database::create(&template, async |url| {
            made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let client = connect(&url).await?;
            client
                .batch_execute("CREATE TABLE t (id int); INSERT INTO t VALUES (7)")
                .await?;
            anyhow::Ok(())
        })
    };
    let (a, b, c) = tokio::join!(create(), create(), create());
    assert_eq!(made.into_inner(), 1);
    a.connect()
        .await
        .unwrap()
        .batch_execute("DELETE FROM t")
        .await
        .unwrap();
    for database in [&b, &c] {
        let client = database.connect().await.unwrap();
        let id: i32 = client.query_one("SELECT id FROM t", &[]).await.unwrap().get(0);
        assert_eq!(id, 7, "a database of its own");
    }

    // Dropped with a connection still open.
    let open = a.connect().await.unwrap();
    let name = a.name().to_owned();
    drop(a);
    drop(open);
    let server = connect(&testing::postgres_url()).await.unwrap();
    let left = server
        .query_opt("SELECT FROM pg_database WHERE datname = $1", &[&name])
        .await
        .unwrap();
    assert!(left.is_none());
}
