#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::time::Duration;

use local_stack::Postgres;
use local_stack::certificates::Authority;
use local_stack::postgres::connect;
use local_stack::testing::{self, Database, Folder};
use local_stack::wait;
use tokio_postgres::error::SqlState;

/// What a client that trusts `ca_file` alone says about its connection.
fn with_psql(postgres: &Postgres, sslmode: &str, ca_file: &Path) -> Result<String, String> {
    let output = std::process::Command::new(postgres.binaries().join("psql"))
        .args(["-X", "-At", "-c"])
        .arg("SELECT ssl, current_user FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        .arg(postgres.url("postgres"))
        .env("PGSSLMODE", sslmode)
        .env("PGSSLROOTCERT", ca_file)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

#[tokio::test]
async fn tls_is_offered_under_a_certificate_of_an_authority_of_its_own() {
    let folder = Folder::create("postgres-tls");
    let postgres = Postgres::builder(folder.path().join("postgres"))
        .fsync(false)
        .tls()
        .start()
        .await
        .unwrap();
    let ca_file = postgres.ca_file().unwrap();
    assert_eq!(
        with_psql(&postgres, "verify-full", ca_file).unwrap(),
        "t|postgres"
    );
    assert_eq!(with_psql(&postgres, "disable", ca_file).unwrap(), "f|postgres");

    let stranger = Authority::in_folder(folder.path().join("stranger")).unwrap();
    let refused = with_psql(&postgres, "verify-full", &stranger.ca_file()).unwrap_err();
    assert!(refused.contains("certificate verify failed"), "{refused}");
}

#[tokio::test]
async fn whoever_comes_without_tls_is_turned_away_where_it_is_required() {
    let folder = Folder::create("postgres-tls-only");
    let start = || {
        Postgres::builder(folder.path().join("postgres"))
            .fsync(false)
            .tls_only()
            .start()
    };
    let mut postgres = start().await.unwrap();
    postgres.create_database("shop").await.unwrap();
    let ca_file = postgres.ca_file().unwrap().to_owned();
    assert_eq!(
        with_psql(&postgres, "verify-full", &ca_file).unwrap(),
        "t|postgres"
    );
    let refused = with_psql(&postgres, "disable", &ca_file).unwrap_err();
    assert!(refused.contains("no encryption"), "{refused}");
    connect(&postgres.admin_url("shop")).await.unwrap();

    // A start with the data that is there already.
    postgres.stop().await.unwrap();
    let again = start().await.unwrap();
    assert_eq!(again.ca_file().unwrap(), ca_file);
    assert_eq!(with_psql(&again, "verify-full", &ca_file).unwrap(), "t|postgres");
    connect(&again.admin_url("shop")).await.unwrap();

    let standby = again.standby(folder.path().join("standby")).await.unwrap();
    assert_eq!(
        with_psql(&standby, "verify-full", &ca_file).unwrap(),
        "t|postgres"
    );
    with_psql(&standby, "disable", &ca_file).unwrap_err();
}

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

#[tokio::test]
async fn a_standby_follows_and_takes_over() {
    let folder = Folder::create("postgres-standby");
    let mut primary = testing::private_postgres(&folder).await.unwrap();
    let url = primary.url("postgres");
    let client = connect(&url).await.unwrap();
    client
        .batch_execute("CREATE TABLE t (id int); INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    let mut standby = primary.standby(folder.path().join("standby")).await.unwrap();
    assert_ne!(standby.port(), primary.port());
    client.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    let count = async || -> anyhow::Result<i64> {
        let follower = connect(&standby.url("postgres")).await?;
        Ok(follower.query_one("SELECT count(*) FROM t", &[]).await?.get(0))
    };
    wait::until("it has followed", Duration::from_secs(20), async || {
        Ok((count().await? == 2).then_some(()))
    })
    .await
    .unwrap();
    let follower = connect(&standby.url("postgres")).await.unwrap();
    let refused = follower
        .batch_execute("INSERT INTO t VALUES (0)")
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION));

    // What is committed while it is away is lost with the primary.
    standby.stop().await.unwrap();
    client.batch_execute("INSERT INTO t VALUES (3)").await.unwrap();
    primary.kill().unwrap();
    standby.start().await.unwrap();
    standby.promote().await.unwrap();
    let promoted = connect(&standby.url("postgres")).await.unwrap();
    promoted.batch_execute("INSERT INTO t VALUES (4)").await.unwrap();
    let rows = promoted.query("SELECT id FROM t ORDER BY id", &[]).await.unwrap();
    let ids: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(ids, [1, 2, 4]);
}
