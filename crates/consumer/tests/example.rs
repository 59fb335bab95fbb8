//! The example does what it says.

use std::time::Duration;

use local_stack::testing::events::{Topic, envelope};
use local_stack::testing::{self, Database};
use local_stack::wait;
use tokio_util::sync::CancellationToken;

#[path = "../examples/totals.rs"]
mod totals;

#[tokio::test(flavor = "multi_thread")]
async fn orders_are_counted_by_day() {
    let database = Database::empty().await;
    let topic = Topic::create(&testing::kafka_brokers(), "events.order", 2)
        .await
        .unwrap();
    totals::prepare(&database.url()).await.unwrap();
    for order in 0..30 {
        let id = format!("o{order}");
        for (version, event_type) in [(1, "order.placed"), (2, "order.paid")] {
            topic
                .publish(&envelope("order", &id, version, event_type), b"")
                .await
                .unwrap();
        }
    }
    let shutdown = CancellationToken::new();
    let (brokers, name, url) = (testing::kafka_brokers(), topic.name().to_owned(), database.url());
    let running = tokio::spawn({
        let shutdown = shutdown.clone();
        async move {
            let group = testing::unique("orders-by-day");
            totals::count(&brokers, &name, &url, &group, shutdown).await
        }
    });
    let client = database.connect().await.unwrap();
    wait::until("all to be counted", Duration::from_secs(60), || async {
        let sql = "SELECT coalesce(sum(orders), 0)::bigint, (SELECT count(*) FROM consumer_marks WHERE version = 2) FROM orders_by_day";
        let row = client.query_one(sql, &[]).await?;
        Ok(((row.get::<_, i64>(0), row.get::<_, i64>(1)) == (30, 30)).then_some(()))
    })
    .await
    .unwrap();
    shutdown.cancel();
    running.await.unwrap().unwrap();
}
