//! The saga over stock and money, across processes: two instances of everything that consumes, the real relay, a provider with a ledger of
//! its own. What is done to them here has one outcome: who paid gets his order or his money back, once.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use contracts::shop::order::v1::CancelOrderRequest;
use contracts::shop::payment::v1::PaymentStatus;
use local_stack::shop::{INVENTORY_SVC, OUTBOX_RELAY};
use local_stack::testing::Folder;
use local_stack::{cards, wait};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tests::stage::{DEADLINE, PIECES, PRODUCT, Stage, pay, payment_of, within};
use tests::{PATIENCE, databases, say, seed};
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tonic::Code;
use tonic_types::StatusExt as _;
use uuid::Uuid;

/// How many orders have this status and this reason to be cancelled.
async fn orders_with(orders: &Client, status: &str, cancelled_by: Option<&str>) -> Result<i64> {
    let sql = "SELECT count(*) FROM orders WHERE status = $1 AND cancelled_by IS NOT DISTINCT FROM $2";
    Ok(orders.query_one(sql, &[&status, &cancelled_by]).await?.get(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn who_paid_while_the_broker_was_away_is_not_cancelled() {
    tests::run("expiry-without-kafka", expire_without_kafka).await;
}

async fn expire_without_kafka(folder: &Folder) -> Result<()> {
    const ORDERS: i64 = 20;
    let mut stage = Stage::start(folder, "20s").await?;
    let mut placed = Vec::new();
    for turn in 0..ORDERS as usize {
        placed.push(stage.place(turn).await?);
    }
    stage.known(ORDERS).await?;
    for order in &placed {
        stage.until(order, "reserved_at IS NOT NULL").await?;
    }
    stage.kafka.kill()?;

    // Every other one is paid. What tells of it waits in payment-svc's outbox.
    let (paid, unpaid) = placed.split_at(placed.len() / 2);
    for (turn, order) in paid.iter().enumerate() {
        let request = payment_of(order, &cards::fine(turn as u64));
        let payment = pay(stage.payments(turn)?, request, DEADLINE).await?;
        ensure!(payment.status() == PaymentStatus::Received, "{payment:?}");
    }
    // Their time is over for all of them, as far as order-svc can know.
    let orders = stage.database("orders")?;
    wait::until("every order is overdue", PATIENCE, || async {
        let overdue = "SELECT count(*) FROM events WHERE event_type = 'order.overdue'";
        Ok((databases::count(&orders, overdue).await? == ORDERS).then_some(()))
    })
    .await?;
    ensure!(
        orders_with(&orders, "pending", None).await? == ORDERS,
        "cancelled on no answer"
    );

    stage.kafka.start().await?;
    wait::until("every order has its end", PATIENCE, || async {
        Ok((orders_with(&orders, "pending", None).await? == 0).then_some(()))
    })
    .await?;
    stage.quiet().await?;
    let not_paid = orders_with(&orders, "cancelled", Some("not_paid_in_time")).await?;
    ensure!(
        orders_with(&orders, "confirmed", None).await? == paid.len() as i64,
        "who paid has no order"
    );
    ensure!(
        not_paid == unpaid.len() as i64,
        "{not_paid} of {} were cancelled",
        unpaid.len()
    );
    let story = stage.story(&unpaid[0]).await?;
    let way = story.of(&["order", "reservation", "payment"]);
    way.require(&[
        (
            "order",
            &[
                "call > order.placed",
                "inventory.reserved > order.reserved",
                "time > order.overdue",
                "payment.failed > order.cancelled",
            ],
        ),
        ("payment", &["order.overdue > payment.failed"]),
        (
            "reservation",
            &[
                "order.placed > inventory.reserved",
                "order.cancelled > inventory.released",
            ],
        ),
    ])?;
    let ledger = stage.ledger().await?;
    ensure!(
        ledger["charges"].as_array().map(Vec::len) == Some(paid.len()),
        "{ledger}"
    );
    ensure!(ledger["refunds"].as_array().map(Vec::len) == Some(0), "{ledger}");
    let sold = paid.len() as i64;
    ensure!(
        stage.stock(PRODUCT).await? == (PIECES - sold, 0, sold),
        "{:?}",
        stage.stock(PRODUCT).await?
    );
    stage.sound().await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_paid_for_what_is_not_there_gets_the_money_back() {
    tests::run("out-of-stock", pay_for_nothing).await;
}

/// inventory-svc does not answer until the orders are paid.
async fn pay_for_nothing(folder: &Folder) -> Result<()> {
    const ORDERS: usize = 20;
    let mut stage = Stage::start(folder, "10m").await?;
    for instance in 0..2 {
        stage.shop.instance_mut(INVENTORY_SVC, instance)?.pause()?;
    }
    let nobody_has = Uuid::new_v4().to_string();
    for turn in 0..ORDERS {
        let product = if turn % 2 == 0 { PRODUCT } else { &nobody_has };
        let order = stage.place_for(turn, product).await?;
        let request = payment_of(&order, &cards::fine(turn as u64));
        let payment = pay(stage.payments(turn)?, request, DEADLINE).await?;
        ensure!(payment.status() == PaymentStatus::Received, "{payment:?}");
    }
    let orders = stage.database("orders")?;
    wait::until("all are paid and wait", PATIENCE, || async {
        Ok((orders_with(&orders, "paid", None).await? == ORDERS as i64).then_some(()))
    })
    .await?;
    for instance in 0..2 {
        stage.shop.instance_mut(INVENTORY_SVC, instance)?.resume()?;
    }
    wait::until("every order has its end", PATIENCE, || async {
        Ok((orders_with(&orders, "paid", None).await? == 0).then_some(()))
    })
    .await?;
    stage.quiet().await?;
    let half = ORDERS as i64 / 2;
    ensure!(orders_with(&orders, "confirmed", None).await? == half);
    ensure!(orders_with(&orders, "cancelled", Some("out_of_stock")).await? == half);
    let ledger = stage.ledger().await?;
    ensure!(
        ledger["charges"].as_array().map(Vec::len) == Some(ORDERS),
        "{ledger}"
    );
    ensure!(
        ledger["refunds"].as_array().map(Vec::len) == Some(ORDERS / 2),
        "{ledger}"
    );
    ensure!(stage.stock(PRODUCT).await? == (PIECES - half, 0, half));
    stage.sound().await
}

#[tokio::test(flavor = "multi_thread")]
async fn paying_before_the_order_is_heard_of_and_while_it_is_cancelled() {
    tests::run("paying", async |folder| {
        let mut stage = Stage::start(folder, "10m").await?;
        pay_before_it_is_known(&mut stage).await?;
        cancel_while_paying(&stage).await?;
        // The two that were paid and not cancelled.
        let stock = stage.stock(PRODUCT).await?;
        ensure!(stock == (PIECES - 2, 0, 2), "{stock:?}");
        stage.sound().await
    })
    .await;
}

/// The relay is stopped, so order.placed does not arrive.
async fn pay_before_it_is_known(stage: &mut Stage) -> Result<()> {
    stage.shop.instance_mut(OUTBOX_RELAY, 0)?.pause()?;
    let (early, patient) = (stage.place(0).await?, stage.place(1).await?);

    // Whoever has no time is told to come again, with the same request_id.
    let request = payment_of(&early, &cards::fine(100));
    let refused = pay(stage.payments(0)?, request.clone(), Duration::from_secs(1)).await;
    let status = refused.err().context("nobody can know of the order yet")?;
    ensure!(status.code() == Code::Unavailable, "{status:?}");
    let reason = status.get_details_error_info().map(|info| info.reason);
    ensure!(reason.as_deref() == Some("ORDER_NOT_KNOWN_YET"), "{status:?}");
    ensure!(status.get_details_retry_info().is_some(), "{status:?}");

    // Whoever waits is answered once it has arrived, on either instance.
    let waiting = tokio::spawn(pay(
        stage.payments(1)?,
        payment_of(&patient, &cards::fine(101)),
        DEADLINE,
    ));
    stage.shop.instance_mut(OUTBOX_RELAY, 0)?.resume()?;
    let payment = waiting.await??;
    ensure!(payment.status() == PaymentStatus::Received, "{payment:?}");
    let again = pay(stage.payments(1)?, request, DEADLINE).await?;
    ensure!(again.status() == PaymentStatus::Received, "{again:?}");
    stage.quiet().await
}

/// One cancels and one pays, at once, in whatever order it comes: the order is cancelled, and no money is kept.
async fn cancel_while_paying(stage: &Stage) -> Result<()> {
    const ORDERS: usize = 60;
    let mut rng = StdRng::seed_from_u64(seed("cancel_while_paying"));
    let mut placed = Vec::new();
    for turn in 0..ORDERS {
        placed.push(stage.place(turn).await?);
    }
    let mut all: JoinSet<Result<()>> = JoinSet::new();
    for (turn, order) in placed.iter().enumerate() {
        let card = match turn % 4 {
            0 => cards::fault(cards::Fault::Slow, cards::Fault::None, turn as u16),
            1 => cards::fault(cards::Fault::ErrorAfter, cards::Fault::ErrorAfter, turn as u16),
            _ => cards::fine(1000 + turn as u64),
        };
        let paying = pay(stage.payments(turn)?, payment_of(order, &card), DEADLINE);
        // The moment is the point here: somewhere before, between and behind the steps of the payment.
        let moment = Duration::from_micros(rng.random_range(0..40_000));
        let request = CancelOrderRequest {
            request_id: Uuid::new_v4().to_string(),
            user_id: order.user_id.clone(),
            order_id: order.order_id.clone(),
            reason: "changed my mind".to_owned(),
            expected_version: 0,
        };
        let mut orders = stage.orders(turn)?;
        all.spawn(async move {
            match paying.await {
                Ok(_) => Ok(()),
                Err(status) if status.code() == Code::FailedPrecondition => Ok(()),
                Err(status) => Err(status.into()),
            }
        });
        all.spawn(async move {
            tokio::time::sleep(moment).await;
            orders.cancel_order(within(request, DEADLINE)).await?;
            Ok(())
        });
    }
    while let Some(ended) = all.join_next().await {
        ended??;
    }
    stage.quiet().await?;

    let ids: Vec<String> = placed.iter().map(|order| order.order_id.clone()).collect();
    let orders = stage.database("orders")?;
    let kept = "SELECT count(*) FROM orders WHERE order_id::text = ANY($1) AND status <> 'cancelled'";
    ensure!(
        orders.query_one(kept, &[&ids]).await?.get::<_, i64>(0) == 0,
        "an order is not cancelled"
    );
    let payments = stage.database("payments")?;
    let sql = "SELECT status, count(*) FROM payments WHERE order_id::text = ANY($1) GROUP BY status ORDER BY status";
    let ends: Vec<(String, i64)> = payments
        .query(sql, &[&ids])
        .await?
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    say(&format!("cancelled while paying: {ends:?}"));
    ensure!(
        ends.iter()
            .all(|(status, _)| ["failed", "refunded"].contains(&status.as_str())),
        "money was kept: {ends:?}"
    );
    let ledger = stage.ledger().await?;
    let of_these = |key: &str| -> Vec<&str> {
        let entries = ledger[key].as_array().map_or(&[][..], Vec::as_slice);
        let mut orders: Vec<&str> = entries
            .iter()
            .filter_map(|entry| entry["order_id"].as_str())
            .filter(|id| ids.iter().any(|known| known == id))
            .collect();
        orders.sort_unstable();
        orders
    };
    let charged = of_these("charges");
    ensure!(
        charged.windows(2).all(|pair| pair[0] != pair[1]),
        "an order was charged twice"
    );
    ensure!(charged == of_these("refunds"), "charges are not refunds");
    Ok(())
}
