//! Each RPC's good path, what commands leave in the database, and what they refuse.

use crate::common::*;
use contracts::shop::inventory::events::v1::StockUpdated;
use prost::Message as _;
use tonic::Code;
use uuid::Uuid;

#[tokio::test(flavor = "multi_thread")]
async fn stock_is_set_adjusted_and_remembered() {
    let database = database().await;
    let service = start(&database).await;
    let product = Uuid::new_v4();
    let request = set_request(product, 7);
    let set = service.set(request.clone()).await.expect("set");
    assert_eq!(set.product_id, product.to_string());
    assert_eq!((set.available, set.reserved, set.sold, set.version), (7, 0, 0, 1));
    assert!(set.updated_at.is_some());
    let adjusted = service
        .adjust(adjust_request(product, -3))
        .await
        .expect("adjusted");
    assert_eq!((adjusted.available, adjusted.version), (4, 2));
    assert_eq!(service.get(product).await.expect("known"), adjusted);
    // It is like that already.
    let same = service.set(set_request(product, 4)).await.expect("set");
    assert_eq!(same, adjusted);

    let sql = database.connect().await.expect("connected");
    let rows = sql
        .query(
            "SELECT e.version, e.causation_id, e.correlation_id, o.topic, o.aggregate_type, o.source, o.payload
             FROM events e JOIN outbox o USING (event_id) WHERE e.entity_id = $1 ORDER BY o.id",
            &[&product.to_string()],
        )
        .await
        .expect("rows");
    assert_eq!(rows.len(), 2);
    for (row, stock) in rows.iter().zip([&set, &adjusted]) {
        assert_eq!(row.get::<_, i64>(0), stock.version);
        assert_eq!(row.get::<_, Uuid>(2), product);
        assert_eq!(row.get::<_, Option<&str>>(3), None);
        assert_eq!(
            (row.get::<_, &str>(4), row.get::<_, &str>(5)),
            ("stock", "/inventory-svc")
        );
        let event = StockUpdated::decode(row.get::<_, &[u8]>(6)).expect("Protobuf");
        assert_eq!(
            (event.available, event.reserved, event.sold, event.updated_at),
            (stock.available, stock.reserved, stock.sold, stock.updated_at)
        );
    }
    assert_eq!(rows[0].get::<_, Uuid>(1).to_string(), request.request_id);
    service.stop().await;
    let report = report(&database).await;
    assert!(report.sound().is_ok(), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_gets_the_first_response() {
    let database = database().await;
    let service = start(&database).await;
    let product = Uuid::new_v4();
    let set = set_request(product, 7);
    let first = service.set(set.clone()).await.expect("set");
    let adjust = adjust_request(product, 5);
    let second = service.adjust(adjust.clone()).await.expect("adjusted");
    assert_eq!(
        service.set(set.clone()).await.expect("repeat"),
        first,
        "as it was then"
    );
    assert_eq!(service.adjust(adjust.clone()).await.expect("repeat"), second);
    assert_eq!(service.get(product).await.expect("known"), second);

    let mut other = set.clone();
    other.available += 1;
    let status = service.set(other).await.expect_err("another content");
    check_status(&status, Code::AlreadyExists, "REQUEST_ID_REUSED");
    let mut other = adjust.clone();
    other.expected_version = Some(2);
    let status = service.adjust(other).await.expect_err("another content");
    check_status(&status, Code::AlreadyExists, "REQUEST_ID_REUSED");
    // An id is another one for another method or product.
    let mut elsewhere = adjust_request(product, 1);
    elsewhere.request_id = set.request_id.clone();
    assert_eq!(service.adjust(elsewhere).await.expect("adjusted").available, 13);
    let mut elsewhere = set_request(Uuid::new_v4(), 1);
    elsewhere.request_id = set.request_id;
    assert_eq!(service.set(elsewhere).await.expect("set").version, 1);

    // Ten at once under one id are one.
    let request = adjust_request(product, 1);
    let calls = (0..10).map(|_| service.adjust(request.clone()));
    for answer in futures::future::join_all(calls).await {
        assert_eq!(answer.expect("adjusted").available, 14);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn expected_versions_are_held() {
    let database = database().await;
    let service = start(&database).await;
    let product = Uuid::new_v4();
    let expecting = |available, version| {
        let mut request = set_request(product, available);
        request.expected_version = Some(version);
        request
    };
    let status = service.set(expecting(5, 1)).await.expect_err("not there yet");
    check_status(&status, Code::Aborted, "VERSION_MISMATCH");
    assert_eq!(service.set(expecting(5, 0)).await.expect("new").version, 1);
    let status = service.set(expecting(6, 0)).await.expect_err("known");
    check_status(&status, Code::Aborted, "VERSION_MISMATCH");
    assert_eq!(service.set(expecting(6, 1)).await.expect("set").version, 2);
    let mut adjust = adjust_request(product, 1);
    adjust.expected_version = Some(1);
    // A failure is not kept: the same request goes through once it fits.
    let status = service.adjust(adjust.clone()).await.expect_err("moved on");
    check_status(&status, Code::Aborted, "VERSION_MISMATCH");
    adjust.expected_version = Some(2);
    assert_eq!(service.adjust(adjust).await.expect("adjusted").available, 7);
    // Of many that expect one version, one is first.
    let calls = (0..8).map(|n| service.set(expecting(100 + n, 3)));
    let won = futures::future::join_all(calls).await;
    assert_eq!(won.iter().filter(|answer| answer.is_ok()).count(), 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stock_does_not_allow_is_refused() {
    let database = database().await;
    let service = start(&database).await;
    let unknown = Uuid::new_v4();
    let status = service.get(unknown).await.expect_err("unknown");
    check_status(&status, Code::NotFound, "PRODUCT_NOT_FOUND");
    let status = service
        .adjust(adjust_request(unknown, 1))
        .await
        .expect_err("unknown");
    check_status(&status, Code::NotFound, "PRODUCT_NOT_FOUND");
    let product = service.product(5).await;
    let status = service
        .adjust(adjust_request(product, -6))
        .await
        .expect_err("too few");
    check_status(&status, Code::FailedPrecondition, "NOT_ENOUGH_STOCK");
    for change in [1_000_000_000_000, i64::MAX] {
        let status = service
            .adjust(adjust_request(product, change))
            .await
            .expect_err("too many");
        check_status(&status, Code::FailedPrecondition, "TOO_MUCH_STOCK");
    }
    assert_eq!(service.counts(product).await, (5, 0, 0));
    let sql = database.connect().await.expect("connected");
    assert_eq!(count(&sql, "SELECT count(*) FROM outbox").await, 1);
    assert_eq!(count(&sql, "SELECT count(*) FROM requests").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn adjustments_at_once_all_count_and_a_product_is_made_once() {
    let database = database().await;
    let (a, b) = (start(&database).await, start(&database).await);
    let product = a.product(100).await;
    let calls = (0..60).map(|n| {
        let service = if n % 2 == 0 { &a } else { &b };
        service.adjust(adjust_request(product, if n % 3 == 0 { -2 } else { 1 }))
    });
    for answer in futures::future::join_all(calls).await {
        answer.expect("adjusted");
    }
    assert_eq!(a.counts(product).await, (100, 0, 0));
    assert_eq!(a.get(product).await.expect("known").version, 61);

    // Whoever comes second is told to try again, or finds the product.
    let new = Uuid::new_v4();
    let calls = (0..20).map(|n| {
        let service = if n % 2 == 0 { &a } else { &b };
        service.set(set_request(new, n + 1))
    });
    let mut made = 0;
    for answer in futures::future::join_all(calls).await {
        match answer {
            Ok(_) => made += 1,
            Err(status) => check_status(&status, Code::Aborted, "CONCURRENT_CHANGE"),
        }
    }
    assert_eq!(a.get(new).await.expect("known").version, made);
    a.stop().await;
    b.stop().await;
    let report = report(&database).await;
    assert!(report.sound().is_ok(), "{report}");
}
