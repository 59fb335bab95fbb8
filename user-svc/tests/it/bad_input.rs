//! What is wrong with a request is said field by field, and never repeated.

use crate::common::*;
use contracts::shop::user::v1 as api;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

#[track_caller]
fn check_fields(status: &Status, fields: &[&str]) {
    check_status(status, Code::InvalidArgument, "INVALID_REQUEST");
    let details = status.get_error_details();
    let named: Vec<&str> = details
        .bad_request()
        .expect("violations")
        .field_violations
        .iter()
        .map(|violation| violation.field.as_str())
        .collect();
    assert_eq!(named, fields, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_field_by_field() {
    let database = database().await;
    let service = start(&database).await;
    let valid = create_request("ann@example.org");
    let nothing = service
        .create(api::CreateUserRequest::default())
        .await
        .expect_err("empty");
    check_fields(&nothing, &["request_id", "email", "first_name", "last_name"]);
    let too_long = format!("{}@example.org", "a".repeat(254));
    for email in [
        "",
        "Ann",
        "@example.org",
        "ann@",
        "ann@localhost",
        "ann lee@example.org",
        "Ann <ann@example.org>",
        "ann@example.org\r\nBcc: lee@example.org",
        "ann\0@example.org",
        too_long.as_str(),
    ] {
        let request = api::CreateUserRequest {
            email: email.into(),
            ..valid.clone()
        };
        check_fields(&service.create(request).await.expect_err(email), &["email"]);
    }
    let too_long = "\u{e9}".repeat(101);
    for name in [
        "",
        "  ",
        "Ann\nLee",
        "Ann\0",
        "4242 4242 4242 4242",
        too_long.as_str(),
    ] {
        let request = api::CreateUserRequest {
            first_name: name.into(),
            last_name: name.into(),
            ..valid.clone()
        };
        let refused = service.create(request).await.expect_err(name);
        check_fields(&refused, &["first_name", "last_name"]);
    }

    let user = service.create(valid).await.expect("valid");
    let request = api::UpdateUserRequest {
        request_id: "1".into(),
        user_id: "00000000-0000-0000-0000-000000000000".into(),
        email: Some(String::new()),
        first_name: Some(" ".into()),
        last_name: Some("Lee\0".into()),
        expected_version: -1,
    };
    let refused = service.update(request).await.expect_err("all wrong");
    let all = [
        "request_id",
        "user_id",
        "email",
        "first_name",
        "last_name",
        "expected_version",
    ];
    check_fields(&refused, &all);
    for (field, request) in [
        (
            "email",
            api::UpdateUserRequest {
                email: Some("x".into()),
                ..update_request(&user)
            },
        ),
        (
            "first_name",
            api::UpdateUserRequest {
                first_name: Some(String::new()),
                ..update_request(&user)
            },
        ),
    ] {
        check_fields(&service.update(request).await.expect_err(field), &[field]);
    }
    check_fields(&service.get("me").await.expect_err("no id"), &["user_id"]);
    assert_eq!(service.get(&user.user_id).await.expect("there"), user);
    service.stop().await;
}
