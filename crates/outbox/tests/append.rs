//! Appending on real PostgreSQL.

use diesel::result::Error::RollbackTransaction;
use diesel::result::{DatabaseErrorKind, Error};
use diesel::sql_types::{BigInt, Binary, Jsonb, Nullable, Text};
use diesel::{QueryResult, QueryableByName};
use diesel_async::async_connection_wrapper::AsyncConnectionWrapper;
use diesel_async::{
    AsyncConnection as _, AsyncMigrationHarness, AsyncPgConnection, RunQueryDsl as _,
    SimpleAsyncConnection as _,
};
use diesel_migrations::MigrationHarness as _;
use local_stack::testing::Database;
use outbox::{Message, append, append_blocking};

/// A database with an outbox and an entity beside it.
async fn database() -> (Database, AsyncPgConnection) {
    let database = Database::empty().await;
    let conn = AsyncPgConnection::establish(&database.url())
        .await
        .expect("connected");
    let mut harness = AsyncMigrationHarness::new(conn);
    harness
        .run_pending_migrations(outbox::MIGRATIONS)
        .expect("migrated");
    let mut conn = harness.into_inner();
    conn.batch_execute(
        "CREATE TABLE entity (id text PRIMARY KEY, version bigint NOT NULL); INSERT INTO entity VALUES ('k', 0)",
    )
    .await
    .expect("created");
    (database, conn)
}

fn message(version: i64) -> Message {
    Message::new(
        "test",
        "k",
        version,
        "test.moved",
        version.to_string().into_bytes(),
    )
    .source("/test")
}

/// Changes the entity and tells of it, within the caller's transaction.
async fn advance(conn: &mut AsyncPgConnection) -> QueryResult<()> {
    let moved: Version =
        diesel::sql_query("UPDATE entity SET version = version + 1 RETURNING version AS value")
            .get_result(conn)
            .await?;
    append(conn, &[message(moved.value)]).await
}

#[derive(QueryableByName)]
struct Version {
    #[diesel(sql_type = BigInt)]
    value: i64,
}

/// The versions in the outbox by id, and the entity's own as somebody else sees it.
async fn seen(database: &Database) -> (Vec<i64>, i64) {
    let client = database.connect().await.expect("connected");
    let rows = client
        .query("SELECT aggregate_version FROM outbox ORDER BY id", &[])
        .await
        .expect("read");
    let entity = client
        .query_one("SELECT version FROM entity", &[])
        .await
        .expect("read");
    (rows.iter().map(|row| row.get(0)).collect(), entity.get(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn event_and_change_are_committed_together_or_not_at_all() {
    let (database, mut conn) = database().await;
    conn.transaction(async |conn| {
        advance(conn).await?;
        assert_eq!(seen(&database).await, (vec![], 0), "visible before the commit");
        QueryResult::Ok(())
    })
    .await
    .expect("committed");
    assert_eq!(seen(&database).await, (vec![1], 1));

    conn.transaction(async |conn| {
        advance(conn).await?;
        QueryResult::<()>::Err(RollbackTransaction)
    })
    .await
    .expect_err("rolled back");
    assert_eq!(seen(&database).await, (vec![1], 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_savepoint_that_is_rolled_back_takes_its_events_along() {
    let (database, mut conn) = database().await;
    conn.transaction(async |conn| {
        advance(conn).await?;
        conn.transaction(async |conn| {
            advance(conn).await?;
            QueryResult::<()>::Err(RollbackTransaction)
        })
        .await
        .expect_err("rolled back");
        advance(conn).await
    })
    .await
    .expect("committed");
    assert_eq!(seen(&database).await, (vec![1, 2], 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_event_aborts_the_transaction_with_its_change() {
    let (database, mut conn) = database().await;
    conn.transaction(async |conn| {
        advance(conn).await?;
        append(conn, &[message(0)]).await.expect_err("the version is 0");
        // Whoever passes over the error gets no further.
        advance(conn).await
    })
    .await
    .expect_err("aborted");
    assert_eq!(seen(&database).await, (vec![], 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_are_in_the_order_of_the_slice() {
    let (database, mut conn) = database().await;
    append(&conn, &[]).await.expect("nothing to do");
    // More than one statement holds.
    let messages: Vec<Message> = (1..=10_000).map(message).collect();
    conn.transaction(async |conn| append(conn, &messages).await)
        .await
        .expect("committed");
    assert_eq!(seen(&database).await.0, (1..=10_000).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_without_async_appends_as_well() {
    let (database, _conn) = database().await;
    let url = database.url();
    let appended = tokio::task::spawn_blocking(move || {
        type Blocking = AsyncConnectionWrapper<AsyncPgConnection>;
        let mut conn = <Blocking as diesel::Connection>::establish(&url).expect("connected");
        diesel::Connection::transaction(&mut conn, |conn| {
            append_blocking(conn, &[])?;
            append_blocking(conn, &[message(1)])?;
            append_blocking(conn, &(2..=10_000).map(message).collect::<Vec<_>>())
        })
    });
    appended.await.expect("no panic").expect("committed");
    assert_eq!(seen(&database).await.0, (1..=10_000).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused() {
    let (database, conn) = database().await;
    let bad = |change: fn(&mut Message)| {
        let mut message = message(1);
        change(&mut message);
        message
    };
    for (message, constraint) in [
        (bad(|m| m.aggregate_id.clear()), "outbox_aggregate_id_check"),
        (bad(|m| m.aggregate_type.clear()), "outbox_aggregate_type_check"),
        (bad(|m| m.event_type.clear()), "outbox_event_type_check"),
        (message(0), "outbox_aggregate_version_check"),
        (bad(|m| m.schema_version = 0), "outbox_schema_version_check"),
        (message(1).topic("a topic"), "outbox_topic_check"),
        (message(1).topic(""), "outbox_topic_check"),
        (message(1).topic("x".repeat(250)), "outbox_topic_check"),
        (
            bad(|m| m.metadata = serde_json::json!([])),
            "outbox_metadata_check",
        ),
    ] {
        match append(&conn, &[message]).await {
            Err(Error::DatabaseError(DatabaseErrorKind::CheckViolation, information)) => {
                assert_eq!(information.constraint_name(), Some(constraint));
            }
            other => panic!("{constraint}: {other:?}"),
        }
    }
    assert_eq!(seen(&database).await, (vec![], 0));
}

#[derive(QueryableByName)]
struct Stored {
    #[diesel(sql_type = Text)]
    content_type: String,
    #[diesel(sql_type = Nullable<Binary>)]
    payload: Option<Vec<u8>>,
    #[diesel(sql_type = Jsonb)]
    metadata: serde_json::Value,
    /// The optional columns, each after its name.
    #[diesel(sql_type = Text)]
    others: String,
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_message_says_is_in_its_row() {
    let (_database, mut conn) = database().await;
    let (process, cause) = (uuid::Uuid::now_v7(), uuid::Uuid::now_v7());
    let messages = [
        message(1),
        Message::json("test", "k", 2, "test.moved", &serde_json::json!({"to": 2}))
            .expect("JSON")
            .source("/test")
            .topic("elsewhere")
            .data_schema("test.Moved")
            .correlated(process, cause)
            .trace(
                "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                Some("a=b".to_owned()),
            )
            .metadata("tenant", "t1")
            .metadata("region", "eu"),
        Message::tombstone("test", "k", 3, "test.deleted").content_type("text/plain"),
    ];
    append(&conn, &messages).await.expect("appended");
    let rows: Vec<Stored> = diesel::sql_query(
        "SELECT content_type, payload, metadata,
                concat_ws(' ', source, topic, data_schema, correlation_id, causation_id, traceparent, tracestate) AS others
           FROM outbox ORDER BY id",
    )
    .load(&mut conn)
    .await
    .expect("read");
    let [plain, json, tombstone] = &rows[..] else {
        panic!("{} rows", rows.len());
    };
    assert_eq!(
        (&*plain.content_type, plain.payload.as_deref(), &*plain.others),
        ("application/protobuf", Some(&b"1"[..]), "/test")
    );
    assert_eq!(plain.metadata, serde_json::json!({}));
    assert_eq!(
        (&*json.content_type, json.payload.as_deref()),
        ("application/json", Some(&br#"{"to":2}"#[..]))
    );
    assert_eq!(json.metadata, serde_json::json!({"tenant": "t1", "region": "eu"}));
    assert_eq!(
        json.others,
        format!(
            "/test elsewhere test.Moved {process} {cause} 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01 a=b"
        )
    );
    assert_eq!(
        (&*tombstone.content_type, tombstone.payload.as_deref()),
        ("text/plain", None)
    );
}
