//! Commands and queries, their events, and what repeats and races lead to.

use crate::common::*;
use contracts::shop::user::events::v1 as events;
use contracts::shop::user::v1 as api;
use tonic::Code;

/// Type, version, payload as JSON and causation of the events of a user in the outbox, in the order of their ids.
async fn outbox(
    sql: &tokio_postgres::Client,
    user_id: &str,
) -> Vec<(String, i64, serde_json::Value, String)> {
    let query = "SELECT event_type, aggregate_version, payload, causation_id::text FROM outbox
                 WHERE aggregate_type = 'user' AND aggregate_id = $1 ORDER BY id";
    let rows = sql.query(query, &[&user_id]).await.expect("rows");
    rows.iter()
        .map(|row| {
            let event_type: String = row.get(0);
            let payload = contracts::catalogue::payload_json(&event_type, 1, row.get(2)).expect("known");
            (event_type, row.get(1), payload, row.get(3))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn users_are_created_changed_and_read() {
    let database = database().await;
    let service = start(&database).await;
    let create = create_request("Ann@Example.ORG");
    let user = service.create(create.clone()).await.expect("created");
    assert_eq!(
        (
            user.email.as_str(),
            user.first_name.as_str(),
            user.last_name.as_str(),
            user.version
        ),
        ("Ann@example.org", "Ann", "Lee", 1)
    );
    assert_eq!(user.created_at, user.updated_at);
    assert_eq!(service.get(&user.user_id).await.expect("there"), user);

    let update = api::UpdateUserRequest {
        email: Some("lee@example.org".into()),
        last_name: Some("Li".into()),
        expected_version: 1,
        ..update_request(&user)
    };
    let updated = service.update(update.clone()).await.expect("updated");
    let expected = api::User {
        email: "lee@example.org".into(),
        last_name: "Li".into(),
        version: 2,
        updated_at: updated.updated_at,
        ..user.clone()
    };
    assert_eq!(updated, expected);
    assert_eq!(service.get(&user.user_id).await.expect("there"), expected);

    // Events say all of the user, whatever has changed.
    let sql = database.connect().await.expect("connected");
    let told = outbox(&sql, &user.user_id).await;
    let types: Vec<_> = told
        .iter()
        .map(|(event_type, version, _, cause)| (event_type.as_str(), *version, cause.as_str()))
        .collect();
    assert_eq!(
        types,
        [
            ("user.created", 1, create.request_id.as_str()),
            ("user.updated", 2, update.request_id.as_str())
        ]
    );
    for (payload, user, time) in [
        (&told[0].2, &user, "createdAt"),
        (&told[1].2, &updated, "updatedAt"),
    ] {
        let expected = [&user.user_id, &user.email, &user.first_name, &user.last_name];
        let said =
            ["userId", "email", "firstName", "lastName"].map(|name| payload[name].as_str().expect(name));
        assert_eq!(said, expected.map(String::as_str));
        assert!(payload[time].is_string(), "{payload}");
    }

    for missing in [
        service.get(&id()).await.expect_err("nobody"),
        service
            .update(api::UpdateUserRequest {
                user_id: id(),
                ..update_request(&user)
            })
            .await
            .expect_err("nobody"),
    ] {
        check_status(&missing, Code::NotFound, "USER_NOT_FOUND");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_that_changes_nothing_emits_nothing() {
    let database = database().await;
    let service = start(&database).await;
    let user = service
        .create(create_request("ann@example.org"))
        .await
        .expect("created");
    for update in [
        update_request(&user),
        api::UpdateUserRequest {
            email: Some("ann@EXAMPLE.org".into()),
            first_name: Some("Ann".into()),
            last_name: Some("Lee".into()),
            expected_version: 1,
            ..update_request(&user)
        },
    ] {
        assert_eq!(service.update(update).await.expect("done"), user);
    }
    let sql = database.connect().await.expect("connected");
    assert_eq!(count(&sql, "SELECT count(*) FROM outbox").await, 1);
    assert_eq!(count(&sql, "SELECT count(*) FROM events").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_one_user() {
    let database = database().await;
    let service = start(&database).await;
    let umlaut = "\u{fc}nal@example.org";
    let first = service.create(create_request(umlaut)).await.expect("created");
    let second = service
        .create(create_request("lee@example.org"))
        .await
        .expect("created");
    for email in [umlaut, "\u{dc}NAL@example.org", "\u{dc}nal@EXAMPLE.org"] {
        let taken = service.create(create_request(email)).await.expect_err(email);
        check_status(&taken, Code::AlreadyExists, "EMAIL_TAKEN");
        let update = api::UpdateUserRequest {
            email: Some(email.into()),
            ..update_request(&second)
        };
        let taken = service.update(update).await.expect_err(email);
        check_status(&taken, Code::AlreadyExists, "EMAIL_TAKEN");
    }
    assert_eq!(service.get(&second.user_id).await.expect("there"), second);

    // His own he may write otherwise; and what he gave up is free.
    let update = |email: &str| api::UpdateUserRequest {
        email: Some(email.into()),
        ..update_request(&first)
    };
    service
        .update(update("\u{dc}nal@example.org"))
        .await
        .expect("his own");
    service.update(update("other@example.org")).await.expect("free");
    let request = create_request(umlaut);
    service.create(request.clone()).await.expect("free again");

    // A failure is not stored: the same request may be tried again.
    let retried = create_request("OTHER@example.org");
    let taken = service.create(retried.clone()).await.expect_err("taken");
    check_status(&taken, Code::AlreadyExists, "EMAIL_TAKEN");
    service.update(update("third@example.org")).await.expect("free");
    service.create(retried).await.expect("free by now");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_want_an_address_at_once_one_gets_it() {
    let database = database().await;
    let service = start(&database).await;
    let creates = (0..12).map(|number| {
        let client = service.client.clone();
        let email = if number % 2 == 0 {
            "ann@example.org"
        } else {
            "ANN@example.org"
        };
        let request = create_request(email);
        tokio::spawn(async move { client.clone().create_user(request).await })
    });
    let mut created = 0;
    for create in creates.collect::<Vec<_>>() {
        match create.await.expect("no panic") {
            Ok(_) => created += 1,
            Err(status) => check_status(&status, Code::AlreadyExists, "EMAIL_TAKEN"),
        }
    }
    assert_eq!(created, 1);
    let sql = database.connect().await.expect("connected");
    for table in ["users", "events", "outbox", "requests"] {
        assert_eq!(
            count(&sql, &format!("SELECT count(*) FROM {table}")).await,
            1,
            "{table}"
        );
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_takes_effect_once() {
    let database = database().await;
    let service = start(&database).await;
    let request = create_request("ann@example.org");
    // At once, and later.
    let repeats: Vec<_> = (0..8)
        .map(|_| {
            let (client, request) = (service.client.clone(), request.clone());
            tokio::spawn(async move { client.clone().create_user(request).await })
        })
        .collect();
    let first = service.create(request.clone()).await.expect("created");
    for repeat in repeats {
        let response = repeat.await.expect("no panic").expect("the same");
        assert_eq!(response.into_inner().user.as_ref(), Some(&first));
    }
    let update = api::UpdateUserRequest {
        first_name: Some("Anna".into()),
        ..update_request(&first)
    };
    let updated = service.update(update.clone()).await.expect("updated");
    assert_eq!(service.update(update.clone()).await.expect("the same"), updated);
    // The first answer, whatever has happened since.
    assert_eq!(service.create(request.clone()).await.expect("the same"), first);

    let other = api::CreateUserRequest {
        first_name: "Bea".into(),
        ..request.clone()
    };
    let reused = service.create(other).await.expect_err("another content");
    check_status(&reused, Code::AlreadyExists, "REQUEST_ID_REUSED");
    let reused = api::UpdateUserRequest {
        first_name: Some("Bea".into()),
        ..update.clone()
    };
    let reused = service.update(reused).await.expect_err("another content");
    check_status(&reused, Code::AlreadyExists, "REQUEST_ID_REUSED");

    // An id is scoped: of another method, and of another user, it is another one.
    let by_method = api::UpdateUserRequest {
        request_id: request.request_id,
        ..update_request(&first)
    };
    service.update(by_method).await.expect("another method");
    let second = service
        .create(create_request("lee@example.org"))
        .await
        .expect("created");
    let by_user = api::UpdateUserRequest {
        user_id: second.user_id,
        ..update
    };
    assert_eq!(service.update(by_user).await.expect("another user").version, 2);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_can_be_bound_to_a_version() {
    let database = database().await;
    let service = start(&database).await;
    let user = service
        .create(create_request("ann@example.org"))
        .await
        .expect("created");
    let update = |name: &str, expected_version| api::UpdateUserRequest {
        first_name: Some(name.into()),
        expected_version,
        ..update_request(&user)
    };
    service.update(update("Anna", 1)).await.expect("updated");
    let stale = service.update(update("Anne", 1)).await.expect_err("stale");
    check_status(&stale, Code::Aborted, "VERSION_MISMATCH");
    service.update(update("Anne", 2)).await.expect("updated");

    // Without one, all of them win, one after the other.
    let updates: Vec<_> = (0..10)
        .map(|number| {
            let (client, request) = (service.client.clone(), update(&format!("A{number}"), 0));
            tokio::spawn(async move { client.clone().update_user(request).await })
        })
        .collect();
    for update in updates {
        update.await.expect("no panic").expect("updated");
    }
    assert_eq!(service.get(&user.user_id).await.expect("there").version, 13);
    service.stop().await;
}

/// What is published can be read as what the contract says it is.
#[tokio::test(flavor = "multi_thread")]
async fn payloads_are_of_the_contract() {
    use prost::Message as _;
    let database = database().await;
    let service = start(&database).await;
    let user = service
        .create(create_request("ann@example.org"))
        .await
        .expect("created");
    let sql = database.connect().await.expect("connected");
    let row = sql
        .query_one("SELECT payload, data_schema FROM outbox", &[])
        .await
        .expect("a row");
    let created = events::UserCreated::decode(row.get::<_, Vec<u8>>(0).as_slice()).expect("Protobuf");
    assert_eq!(created.created_at, user.created_at);
    assert_eq!(row.get::<_, &str>(1), "shop.user.events.v1.UserCreated");
    service.stop().await;
}
