//! `verify` and the database's own rules: each is shown to notice what it is for.

use crate::common::*;
use contracts::shop::user::v1 as api;
use diesel_async::{AsyncConnection as _, AsyncPgConnection};
use user_svc::verify::{Report, verify};

/// Turns triggers off, as only a superuser can; constraints still hold.
const UNGUARDED: &str = "SET session_replication_role = replica;";

async fn report(url: &str) -> Report {
    let mut conn = AsyncPgConnection::establish(url).await.expect("connected");
    verify(&mut conn).await.expect("verified")
}

#[tokio::test(flavor = "multi_thread")]
async fn tampering_is_noticed() {
    for (tamper, expected) in [
        (
            "UPDATE users SET version = 3 WHERE version = 2",
            "its row differs from its history in version",
        ),
        (
            "UPDATE users SET email = 'x@example.org' WHERE version = 2",
            "its row differs from its history in email",
        ),
        (
            "UPDATE users SET first_name = 'X', last_name = 'X' WHERE version = 1",
            "its row differs from its history in first_name, last_name",
        ),
        (
            "DELETE FROM users WHERE version = 2",
            "it has a history of 2 events and no row",
        ),
        (
            "DELETE FROM events WHERE event_type = 'user.updated'",
            "its row differs from its history in",
        ),
        (
            "UPDATE events SET payload = '\\xff' WHERE event_type = 'user.updated'",
            "cannot be read: the payload is not Protobuf",
        ),
        (
            "UPDATE events SET event_type = 'user.updated'",
            "user.updated cannot come first",
        ),
        (
            "DELETE FROM outbox WHERE event_type = 'user.updated'",
            "version 2 has no outbox row",
        ),
    ] {
        let database = database().await;
        let service = start(&database).await;
        service
            .create(create_request("ann@example.org"))
            .await
            .expect("created");
        let user = service
            .create(create_request("lee@example.org"))
            .await
            .expect("created");
        let update = api::UpdateUserRequest {
            email: Some("li@example.org".into()),
            ..update_request(&user)
        };
        service.update(update).await.expect("updated");
        service.stop().await;
        let sound = report(&database.url()).await;
        assert!(sound.sound().is_ok(), "{sound}");
        assert_eq!((sound.entities, sound.events, sound.outbox_rows), (2, 3, 3));

        let sql = database.connect().await.expect("connected");
        sql.batch_execute(&format!("{UNGUARDED} {tamper}"))
            .await
            .expect(tamper);
        let found = report(&database.url()).await;
        assert!(found.sound().is_err(), "{tamper} was not noticed");
        let text = found.to_string();
        assert!(text.contains(expected), "{tamper}: {text}");
        assert!(!text.contains("example.org"), "{tamper}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_refuses_what_no_user_can_be() {
    let database = database().await;
    let service = start(&database).await;
    service
        .create(create_request("ann@example.org"))
        .await
        .expect("created");
    service
        .create(create_request("lee@example.org"))
        .await
        .expect("created");
    service.stop().await;
    let sql = database.connect().await.expect("connected");
    let next = "UPDATE users SET version = version + 1";
    let row = "WHERE email = 'ann@example.org'";
    for (change, by) in [
        (format!("{next}, email = 'Lee@example.org' {row}"), "users_email"),
        (
            format!("{next}, email = 'ann@Example.org' {row}"),
            "users_email_shape",
        ),
        (
            format!("{next}, email = '@example.org' {row}"),
            "users_email_shape",
        ),
        (format!("{next}, email = 'ann' {row}"), "users_email_shape"),
        (
            format!("{next}, email = E'a\\n@example.org' {row}"),
            "users_email_shape",
        ),
        (
            format!("{next}, email = repeat('a', 250) || '@b.c' || 'd' {row}"),
            "users_email_shape",
        ),
        (format!("{next}, first_name = ' ' {row}"), "users_first_name"),
        (format!("{next}, first_name = E'A\\nB' {row}"), "users_first_name"),
        (
            format!("{next}, last_name = repeat('a', 101) {row}"),
            "users_last_name",
        ),
        (
            format!("UPDATE users SET last_name = 'X' {row}"),
            "this change is refused",
        ),
        (
            format!("{next}, user_id = gen_random_uuid() {row}"),
            "this change is refused",
        ),
        (
            format!("{next}, created_at = created_at - interval '1s' {row}"),
            "this change is refused",
        ),
        (
            format!("{next}, updated_at = updated_at - interval '1s' {row}"),
            "this change is refused",
        ),
        (format!("DELETE FROM users {row}"), "users are for ever"),
        ("TRUNCATE users".to_owned(), "users are for ever"),
    ] {
        let error = sql.batch_execute(&change).await.expect_err(&change);
        let text = error.as_db_error().map(ToString::to_string).unwrap_or_default();
        let constraint = error
            .as_db_error()
            .and_then(|error| error.constraint())
            .unwrap_or_default();
        assert!(constraint == by || text.contains(by), "{change}: {text}");
    }
    sql.batch_execute(&format!(
        "{next}, email = 'ANN@example.org', first_name = 'A' {row}"
    ))
    .await
    .expect("what a user can be, it takes");
}
