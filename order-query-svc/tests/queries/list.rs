//! ListOrders: pages that neither skip nor repeat.

use contracts::shop::order::v1::OrderStatus;
use contracts::shop::orderquery::v1 as wire;
use uuid::Uuid;

use crate::stage::{Replica, Stage, assert_bad_field, cancelled, placed, status_of};

fn request(user: Uuid, status: OrderStatus, page_size: i32, page_token: &str) -> wire::ListOrdersRequest {
    wire::ListOrdersRequest {
        user_id: user.to_string(),
        status: status.into(),
        page_size,
        page_token: page_token.to_owned(),
    }
}

async fn all(replica: &Replica, user: Uuid, status: OrderStatus, page_size: i32) -> Vec<wire::OrderView> {
    let mut orders = Vec::new();
    let mut token = String::new();
    loop {
        let page = replica
            .list(request(user, status, page_size, &token))
            .await
            .unwrap();
        assert!(page.orders.len() <= page_size as usize);
        orders.extend(page.orders);
        token = page.next_page_token;
        if token.is_empty() {
            return orders;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_newest_first_by_user_and_status() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let (user, other) = (Uuid::now_v7(), Uuid::now_v7());
    // Pairs are placed at the same moment, so that the id decides between them.
    let mut orders: Vec<(i64, Uuid)> = (0..21).map(|n| (n / 2, Uuid::now_v7())).collect();
    for (n, (moment, order)) in orders.iter().enumerate() {
        stage.publish(*order, 1, placed(user, *moment)).await;
        if n % 3 == 0 {
            stage.publish(*order, 2, cancelled()).await;
        }
    }
    stage.publish(Uuid::now_v7(), 1, placed(other, 3)).await;
    for (n, (_, order)) in orders.iter().enumerate() {
        replica
            .view(user, *order, if n % 3 == 0 { 2 } else { 1 })
            .await
            .unwrap();
    }
    let cancelled: Vec<Uuid> = orders.iter().step_by(3).map(|(_, order)| *order).collect();
    orders.sort_unstable_by(|a, b| b.cmp(a));
    let newest_first: Vec<String> = orders.iter().map(|(_, order)| order.to_string()).collect();
    for page_size in [1, 4, 7, 21, 100] {
        let found: Vec<String> = all(&replica, user, OrderStatus::Unspecified, page_size)
            .await
            .into_iter()
            .map(|view| view.order_id)
            .collect();
        assert_eq!(found, newest_first, "by {page_size}");
    }
    let found = all(&replica, user, OrderStatus::Cancelled, 2).await;
    assert!(found.iter().all(|view| status_of(view) == OrderStatus::Cancelled));
    assert_eq!(found.len(), cancelled.len());
    assert_eq!(all(&replica, user, OrderStatus::Shipped, 2).await, []);
    assert_eq!(
        all(&replica, Uuid::now_v7(), OrderStatus::Unspecified, 2).await,
        []
    );
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_that_come_between_pages_move_nothing() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let user = Uuid::now_v7();
    let orders: Vec<Uuid> = (0..6).map(|_| Uuid::now_v7()).collect();
    for (order, moment) in orders.iter().zip(10..) {
        stage.publish(*order, 1, placed(user, moment)).await;
        replica.view(user, *order, 1).await.unwrap();
    }
    let first = replica
        .list(request(user, OrderStatus::Unspecified, 3, ""))
        .await
        .unwrap();
    for moment in [100, 101] {
        let order = Uuid::now_v7();
        stage.publish(order, 1, placed(user, moment)).await;
        replica.view(user, order, 1).await.unwrap();
    }
    let second = replica
        .list(request(user, OrderStatus::Unspecified, 3, &first.next_page_token))
        .await
        .unwrap();
    let found: Vec<String> = first
        .orders
        .into_iter()
        .chain(second.orders)
        .map(|view| view.order_id)
        .collect();
    assert_eq!(
        found,
        orders.iter().rev().map(Uuid::to_string).collect::<Vec<_>>()
    );
    assert_eq!(second.next_page_token, "");
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_another_query_is_refused() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let user = Uuid::now_v7();
    for moment in 0..2 {
        let order = Uuid::now_v7();
        stage.publish(order, 1, placed(user, moment)).await;
        replica.view(user, order, 1).await.unwrap();
    }
    let page = replica
        .list(request(user, OrderStatus::Unspecified, 1, ""))
        .await
        .unwrap();
    let token = page.next_page_token.as_str();
    assert!(!token.is_empty());
    let other_user = request(Uuid::now_v7(), OrderStatus::Unspecified, 1, token);
    assert_bad_field(replica.list(other_user).await, "page_token");
    assert_bad_field(
        replica.list(request(user, OrderStatus::Pending, 1, token)).await,
        "page_token",
    );
    assert_bad_field(
        replica
            .list(request(user, OrderStatus::Unspecified, 1, &token[1..]))
            .await,
        "page_token",
    );
    // The size of a page may change on the way.
    replica
        .list(request(user, OrderStatus::Unspecified, 9, token))
        .await
        .unwrap();
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_is_one_range_of_an_index() {
    let stage = Stage::new().await;
    let client = stage.database.connect().await.unwrap();
    client
        .batch_execute(
            "INSERT INTO order_views \
             SELECT gen_random_uuid(), ('00000000-0000-0000-0000-0000000000' || lpad((n % 20)::text, 2, '0'))::uuid, \
                    1 + n % 6, '[]', 1, 'EUR', 1, now() - n * interval '1 second', now(), NULL, '', '', '', NULL \
             FROM generate_series(1, 20000) n; \
             ANALYZE order_views;",
        )
        .await
        .unwrap();
    let user = "user_id = '00000000-0000-0000-0000-000000000007'";
    let behind = "AND placed_at <= now() - interval '1 hour' \
                  AND (placed_at < now() - interval '1 hour' OR order_id < gen_random_uuid())";
    for (filter, index) in [
        (user.to_owned(), "order_views_by_user on"),
        (format!("{user} {behind}"), "order_views_by_user on"),
        (
            format!("{user} AND status = 2"),
            "order_views_by_user_and_status on",
        ),
        (
            format!("{user} AND status = 2 {behind}"),
            "order_views_by_user_and_status on",
        ),
    ] {
        let statement = format!(
            "EXPLAIN SELECT * FROM order_views WHERE {filter} ORDER BY placed_at DESC, order_id DESC LIMIT 51"
        );
        let rows = client.query(&statement, &[]).await.unwrap();
        let plan: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let plan = plan.join("\n");
        assert!(
            plan.contains(&format!("Index Scan Backward using {index}")),
            "{plan}"
        );
        assert!(!plan.contains("Sort") && !plan.contains("Seq Scan"), "{plan}");
    }
}
