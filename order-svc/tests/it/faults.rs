//! Clients that go away, a database that goes away, too many calls, shutdown in the middle of things.

use std::time::Duration;

use crate::common::*;
use contracts::shop::order::v1 as api;
use local_stack::testing::{Folder, private_postgres};
use tonic::transport::Channel;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Holds up every PlaceOrder until it is dropped or rolled back: they wait for the lock when they write the order's row.
async fn hold_orders(sql: &tokio_postgres::Client) {
    sql.batch_execute("BEGIN; LOCK TABLE orders IN EXCLUSIVE MODE")
        .await
        .expect("locked");
}

async fn release(sql: &tokio_postgres::Client) {
    sql.batch_execute("ROLLBACK").await.expect("released");
}

/// Sessions of the service that wait for a lock.
async fn waiting(sql: &tokio_postgres::Client) -> i64 {
    let query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                 AND application_name = 'order-svc' AND wait_event_type = 'Lock'";
    count(sql, query).await
}

async fn in_transaction(sql: &tokio_postgres::Client) -> i64 {
    let query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                 AND application_name = 'order-svc' AND state <> 'idle'";
    count(sql, query).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_times_out_finds_out_by_repeating() {
    let database = database().await;
    let service = start(&database).await;
    let (blocker, observer) = (
        database.connect().await.expect("one"),
        database.connect().await.expect("two"),
    );
    hold_orders(&blocker).await;

    let request = place_request();
    let mut timed = Request::new(request.clone());
    timed.set_timeout(Duration::from_millis(100));
    let status = service
        .client
        .clone()
        .place_order(timed)
        .await
        .expect_err("held up");
    assert!(
        matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled),
        "{status:?}"
    );
    // The command is still running, whole: it was not cut off midway.
    assert_eq!(waiting(&observer).await, 1);
    release(&blocker).await;

    let order = service.place(request.clone()).await.expect("the one result");
    assert_eq!(service.place(request).await.expect("again"), order);
    until("the sessions are idle", async || {
        in_transaction(&observer).await == 0
    })
    .await;
    assert_eq!(count(&observer, "SELECT count(*) FROM orders").await, 1);
    assert_eq!(count(&observer, "SELECT count(*) FROM outbox").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_itself_says_that_the_deadline_has_passed() {
    let database = database().await;
    let service = start_with(config(&database.url(), &[("grpc.max_deadline", "100ms")])).await;
    let blocker = database.connect().await.expect("connected");
    hold_orders(&blocker).await;
    let status = service.place(place_request()).await.expect_err("held up");
    check_status(&status, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    release(&blocker).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_cancels_leaves_nothing_half_done() {
    let database = database().await;
    let service = start(&database).await;
    let (blocker, observer) = (
        database.connect().await.expect("one"),
        database.connect().await.expect("two"),
    );
    hold_orders(&blocker).await;
    let request = place_request();
    let call = {
        let (mut client, request) = (service.client.clone(), request.clone());
        tokio::spawn(async move { client.place_order(request).await })
    };
    until("the command waits", async || waiting(&observer).await == 1).await;
    call.abort();
    assert!(call.await.expect_err("aborted").is_cancelled());

    // A repeat while the first is in flight waits for it.
    let repeat = {
        let (mut client, request) = (service.client.clone(), request.clone());
        tokio::spawn(async move { client.place_order(request).await })
    };
    until("both wait", async || waiting(&observer).await == 2).await;
    release(&blocker).await;
    let order = repeat
        .await
        .expect("no panic")
        .expect("placed")
        .into_inner()
        .order
        .expect("an order");
    assert_eq!(service.place(request).await.expect("again"), order);
    assert_eq!(count(&observer, "SELECT count(*) FROM orders").await, 1);
    assert_eq!(count(&observer, "SELECT count(*) FROM events").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_does_the_work_when_the_first_fails() {
    let database = database().await;
    let service = start(&database).await;
    let (first, observer) = (
        database.connect().await.expect("one"),
        database.connect().await.expect("two"),
    );
    let request = place_request();
    // Somebody else, say another replica, has claimed the id and not committed.
    let claim = "BEGIN; INSERT INTO requests (caller, method, request_id, fingerprint)
                 VALUES ($1, 'shop.order.v1.OrderService/PlaceOrder', $2, decode(repeat('00', 32), 'hex'))";
    let claim = claim
        .replace("$1", &format!("'{}'", request.user_id))
        .replace("$2", &format!("'{}'", request.request_id));
    first.batch_execute(&claim).await.expect("claimed");
    let call = {
        let (mut client, request) = (service.client.clone(), request.clone());
        tokio::spawn(async move { client.place_order(request).await })
    };
    until("it waits", async || waiting(&observer).await == 1).await;
    release(&first).await;
    call.await.expect("no panic").expect("placed");
    assert_eq!(count(&observer, "SELECT count(*) FROM orders").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_too_long_for_a_lock_is_unavailable() {
    let database = database().await;
    let service = start_with(config(&database.url(), &[("database.lock_timeout", "50ms")])).await;
    let blocker = database.connect().await.expect("connected");
    hold_orders(&blocker).await;
    let request = place_request();
    check_status(
        &service.place(request.clone()).await.expect_err("held up"),
        Code::Unavailable,
        "DATABASE_TIMEOUT",
    );
    release(&blocker).await;
    service.place(request).await.expect("placed");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_pool_is_unavailable() {
    let database = database().await;
    let settings = [("database.pool_size", "1"), ("database.acquire_timeout", "50ms")];
    let service = start_with(config(&database.url(), &settings)).await;
    let (blocker, observer) = (
        database.connect().await.expect("one"),
        database.connect().await.expect("two"),
    );
    hold_orders(&blocker).await;
    let held = {
        let mut client = service.client.clone();
        tokio::spawn(async move { client.place_order(place_request()).await })
    };
    until("it waits", async || waiting(&observer).await == 1).await;
    check_status(
        &service.place(place_request()).await.expect_err("no connection"),
        Code::Unavailable,
        "DATABASE_BUSY",
    );
    release(&blocker).await;
    held.await.expect("no panic").expect("placed");
    service.place(place_request()).await.expect("placed");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_calls_are_shed() {
    let database = database().await;
    let service = start_with(config(&database.url(), &[("grpc.max_concurrent_calls", "1")])).await;
    let (blocker, observer) = (
        database.connect().await.expect("one"),
        database.connect().await.expect("two"),
    );
    hold_orders(&blocker).await;
    let held = {
        let mut client = service.client.clone();
        tokio::spawn(async move { client.place_order(place_request()).await })
    };
    until("it waits", async || waiting(&observer).await == 1).await;
    check_status(
        &service.place(place_request()).await.expect_err("shed"),
        Code::ResourceExhausted,
        "OVERLOADED",
    );
    // Probes are always answered.
    let mut health = HealthClient::new(service.channel.clone());
    health.check(HealthCheckRequest::default()).await.expect("alive");
    release(&blocker).await;
    held.await.expect("no panic").expect("placed");
    service.place(place_request()).await.expect("placed");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_are_ended_do_not_show() {
    let database = database().await;
    let service = start(&database).await;
    let sql = database.connect().await.expect("connected");
    // Fill the pool.
    let calls: Vec<_> = (0..8)
        .map(|_| {
            let mut client = service.client.clone();
            tokio::spawn(async move { client.place_order(place_request()).await })
        })
        .collect();
    for call in calls {
        call.await.expect("no panic").expect("placed");
    }
    for _ in 0..20 {
        sql.batch_execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = 'order-svc'",
        )
        .await
        .expect("ended");
        let order = service
            .place(place_request())
            .await
            .expect("on a fresh connection");
        service.get(&order.user_id, &order.order_id).await.expect("read");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_goes_and_comes_back() {
    let folder = Folder::create("order-svc-database");
    let mut postgres = private_postgres(&folder).await.expect("PostgreSQL");
    postgres.create_database("orders").await.expect("created");
    let url = postgres.url("orders");
    migrate(url.clone()).await.expect("migrated");
    let service = start_with(config(&url, &[])).await;
    let order = service.place(place_request()).await.expect("placed");
    let readyz = || readyz(service.admin);
    until("ready", async || readyz().await.starts_with("HTTP/1.1 200")).await;

    postgres.kill().expect("killed");
    for _ in 0..5 {
        let request = place_request();
        let status = service.place(request).await.expect_err("away");
        check_status(&status, Code::Unavailable, "DATABASE_UNAVAILABLE");
        let status = service
            .get(&order.user_id, &order.order_id)
            .await
            .expect_err("away");
        check_status(&status, Code::Unavailable, "DATABASE_UNAVAILABLE");
    }
    // Alive, not ready.
    let mut health = HealthClient::new(service.channel.clone());
    let state = health
        .check(HealthCheckRequest::default())
        .await
        .expect("alive")
        .into_inner();
    assert_eq!(state.status(), ServingStatus::Serving);
    until("not ready", async || readyz().await.starts_with("HTTP/1.1 503")).await;

    postgres.start().await.expect("back");
    let request = place_request();
    until("placing works again", async || {
        service.place(request.clone()).await.is_ok()
    })
    .await;
    assert_eq!(
        service.get(&order.user_id, &order.order_id).await.expect("kept"),
        order
    );
    until("ready again", async || readyz().await.starts_with("HTTP/1.1 200")).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_hangs_is_unavailable() {
    let folder = Folder::create("order-svc-hang");
    let mut postgres = private_postgres(&folder).await.expect("PostgreSQL");
    postgres.create_database("orders").await.expect("created");
    let url = postgres.url("orders");
    migrate(url.clone()).await.expect("migrated");
    let service = start_with(config(&url, &[("database.command_timeout", "200ms")])).await;
    let order = service.place(place_request()).await.expect("placed");

    postgres.pause().expect("frozen");
    let request = place_request();
    let status = service.place(request.clone()).await.expect_err("hanging");
    check_status(&status, Code::Unavailable, "DATABASE_TIMEOUT");
    let mut read = Request::new(api::GetOrderRequest {
        user_id: order.user_id.clone(),
        order_id: order.order_id.clone(),
    });
    read.set_timeout(Duration::from_millis(100));
    let status = service.client.clone().get_order(read).await.expect_err("hanging");
    assert!(
        matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled),
        "{status:?}"
    );

    postgres.resume().expect("thawed");
    until("placing works again", async || {
        service.place(request.clone()).await.is_ok()
    })
    .await;
    // Whatever became of the first try, there is one result.
    let sql = local_stack::postgres::connect(&url).await.expect("connected");
    assert_eq!(count(&sql, "SELECT count(*) FROM orders").await, 2);
    assert_eq!(count(&sql, "SELECT count(*) FROM outbox").await, 2);
    service.stop().await;
}

async fn readyz(admin: std::net::SocketAddr) -> String {
    fetch(admin, "/readyz").await
}

async fn fetch(admin: std::net::SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(admin).await.expect("listening");
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("asked");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("answered");
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_lets_calls_end() {
    let database = database().await;
    let service = start(&database).await;
    let (blocker, observer) = (
        database.connect().await.expect("one"),
        database.connect().await.expect("two"),
    );
    hold_orders(&blocker).await;
    let in_flight = {
        let mut client = service.client.clone();
        tokio::spawn(async move { client.place_order(place_request()).await })
    };
    let timed_out = {
        let mut client = service.client.clone();
        let mut request = Request::new(place_request());
        request.set_timeout(Duration::from_millis(50));
        tokio::spawn(async move { client.place_order(request).await })
    };
    until("both wait", async || waiting(&observer).await == 2).await;
    timed_out.await.expect("no panic").expect_err("held up");

    let mut health = HealthClient::new(service.channel.clone());
    let name = "shop.order.v1.OrderService";
    let mut watch = health
        .watch(HealthCheckRequest { service: name.into() })
        .await
        .expect("watching")
        .into_inner();
    let first = watch.message().await.expect("a state").expect("a state");
    assert_eq!(first.status(), ServingStatus::Serving);
    service.shutdown.cancel();
    let second = watch.message().await.expect("a state").expect("a state");
    assert_eq!(second.status(), ServingStatus::NotServing);
    drop((watch, health));

    release(&blocker).await;
    in_flight.await.expect("no panic").expect("it was let end");
    service.stop().await;
    assert_eq!(
        count(&observer, "SELECT count(*) FROM orders").await,
        2,
        "also the one whose client was gone"
    );
    assert_eq!(count(&observer, "SELECT count(*) FROM outbox").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection() {
    use tonic_reflection::pb::{v1, v1alpha};
    let database = database().await;
    let service = start(&database).await;
    let mut health = HealthClient::new(service.channel.clone());
    for name in ["", "shop.order.v1.OrderService"] {
        let state = health
            .check(HealthCheckRequest { service: name.into() })
            .await
            .expect(name)
            .into_inner();
        assert_eq!(state.status(), ServingStatus::Serving);
    }
    let status = health
        .check(HealthCheckRequest { service: "x".into() })
        .await
        .expect_err("unknown");
    assert_eq!(status.code(), Code::NotFound);

    async fn names_v1(channel: Channel) -> Vec<String> {
        let request = v1::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(
                String::new(),
            )),
        };
        let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel);
        let mut answers = client
            .server_reflection_info(tokio_stream::iter([request]))
            .await
            .expect("v1")
            .into_inner();
        match answers
            .message()
            .await
            .expect("an answer")
            .expect("an answer")
            .message_response
        {
            Some(v1::server_reflection_response::MessageResponse::ListServicesResponse(list)) => {
                list.service.into_iter().map(|service| service.name).collect()
            }
            other => panic!("{other:?}"),
        }
    }
    async fn names_v1alpha(channel: Channel) -> Vec<String> {
        let request = v1alpha::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(v1alpha::server_reflection_request::MessageRequest::ListServices(
                String::new(),
            )),
        };
        let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
        let mut answers = client
            .server_reflection_info(tokio_stream::iter([request]))
            .await
            .expect("v1alpha")
            .into_inner();
        match answers
            .message()
            .await
            .expect("an answer")
            .expect("an answer")
            .message_response
        {
            Some(v1alpha::server_reflection_response::MessageResponse::ListServicesResponse(list)) => {
                list.service.into_iter().map(|service| service.name).collect()
            }
            other => panic!("{other:?}"),
        }
    }
    let channel = || service.channel.clone();
    for names in [names_v1(channel()).await, names_v1alpha(channel()).await] {
        assert!(
            names.iter().any(|name| name == "shop.order.v1.OrderService"),
            "{names:?}"
        );
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn old_requests_are_cleaned_away() {
    let database = database().await;
    // The service's own cleaner leaves the rows to this test.
    let service = start_with(config(&database.url(), &[("requests.keep", "10d")])).await;
    let (old, young) = (place_request(), place_request());
    let first = service.place(old.clone()).await.expect("placed");
    service.place(young.clone()).await.expect("placed");
    let sql = database.connect().await.expect("connected");
    let age = format!(
        "UPDATE requests SET created_at = now() - interval '3 days' WHERE request_id = '{}'",
        old.request_id
    );
    sql.batch_execute(&age).await.expect("aged");
    let db = service::db::Db::new(&config(&database.url(), &[]).database, "cleaner").expect("a pool");
    let two_days = Duration::from_secs(2 * 24 * 3600);
    assert_eq!(
        service::requests::clean_once(&db, two_days)
            .await
            .expect("cleaned"),
        1
    );
    assert_eq!(
        service::requests::clean_once(&db, two_days)
            .await
            .expect("cleaned"),
        0
    );
    assert_ne!(
        service.place(old).await.expect("a new order").order_id,
        first.order_id
    );
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_measured_by_method_and_code() {
    let database = database().await;
    let service = start(&database).await;
    service.place(place_request()).await.expect("placed");
    service.get(&id(), &id()).await.expect_err("not found");
    let mut grpc = tonic::client::Grpc::new(service.channel.clone());
    grpc.ready().await.expect("ready");
    let codec = tonic_prost::ProstCodec::<api::GetOrderRequest, api::GetOrderResponse>::default();
    let path = http::uri::PathAndQuery::from_static("/shop.order.v1.OrderService/Xyzzy");
    let request = Request::new(api::GetOrderRequest::default());
    let status = grpc
        .unary(request, path, codec)
        .await
        .expect_err("no such method");
    check_status(&status, Code::Unimplemented, "UNIMPLEMENTED");

    let expected = [
        ("PlaceOrder", "OK"),
        ("GetOrder", "NOT_FOUND"),
        ("unknown", "UNIMPLEMENTED"),
    ];
    until("all are counted", async || {
        let metrics = fetch(service.admin, "/metrics").await;
        expected.iter().all(|(method, code)| {
            metrics.contains(&format!(
                "rpc_server_call_duration_seconds_count{{rpc_grpc_status_code=\"{code}\",rpc_method=\"{method}\",\
                 rpc_service=\"shop.order.v1.OrderService\"}} 1"
            ))
        }) && metrics.contains("rpc_server_calls_in_progress 0")
    })
    .await;
    let metrics = fetch(service.admin, "/metrics").await;
    assert!(!metrics.contains("Xyzzy"), "{metrics}");
    assert!(
        metrics.contains("db_pool_connections{state=\"max\"} 8"),
        "{metrics}"
    );
    service.stop().await;
}
