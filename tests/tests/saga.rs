//! The saga, order by order: which event causes which, across all services, on whichever way an order goes. What goes wrong on the way is
//! in `payments.rs` and `one_down.rs`.

use anyhow::{Context, Result, bail, ensure};
use contracts::shop::order::v1::{
    CancelOrderRequest, GetOrderRequest, MarkDeliveredRequest, Order, OrderStatus, ShipOrderRequest,
};
use contracts::shop::orderquery::v1::GetOrderViewRequest;
use contracts::shop::payment::v1::{CreatePaymentMethodRequest, PaymentStatus};
use contracts::shop::user::v1::{CreateUserRequest, User};
use local_stack::cards;
use local_stack::shop::INVENTORY_SVC;
use local_stack::testing::Folder;
use tests::stage::{DEADLINE, Stage, Stop, Story, card, order_of, pay, payment_of, within};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

/// How many pieces there are of each product.
const PIECES: i64 = 10;

const CARRIER: &str = "Parcels & Sons";
const TRACKING_NUMBER: &str = "PS-4711";

#[tokio::test(flavor = "multi_thread")]
async fn every_way_that_an_order_can_go() {
    tests::run("saga", async |folder: &Folder| {
        let mut stage = Stage::start(folder, "10m").await?;
        delivered(&stage).await?;
        cancelled_when_reserved(&stage).await?;
        cancelled_when_confirmed(&stage).await?;
        before_the_reservation(&mut stage).await?;
        stage.sound().await
    })
    .await;
}

/// A product that no other case has.
async fn product(stage: &Stage) -> Result<String> {
    let product_id = Uuid::new_v4().to_string();
    stage.stocked(&product_id, PIECES).await?;
    Ok(product_id)
}

async fn now(stage: &Stage, order: &Order) -> Result<Order> {
    let request = GetOrderRequest {
        user_id: order.user_id.clone(),
        order_id: order.order_id.clone(),
    };
    let answer = stage.orders(0)?.get_order(within(request, DEADLINE)).await?;
    answer.into_inner().order.context("an order")
}

async fn cancel(stage: &Stage, order: &Order) -> Result<Order, Status> {
    let request = CancelOrderRequest {
        request_id: Uuid::new_v4().to_string(),
        user_id: order.user_id.clone(),
        order_id: order.order_id.clone(),
        reason: "changed my mind".to_owned(),
        expected_version: 0,
    };
    let client = stage.orders(1);
    let mut client = client.map_err(|error| Status::internal(error.to_string()))?;
    let answer = client.cancel_order(within(request, DEADLINE)).await?;
    Ok(answer.into_inner().order.unwrap_or_default())
}

/// Requires a call to have been refused for this reason.
fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, reason: &str) -> Result<()> {
    let status = match answer {
        Err(status) => status,
        Ok(answer) => bail!("not refused as {reason}: {answer:?}"),
    };
    let given = status.get_details_error_info().map(|info| info.reason);
    ensure!(
        status.code() == Code::FailedPrecondition && given.as_deref() == Some(reason),
        "{status:?} instead of {reason}"
    );
    Ok(())
}

/// How often the provider has charged an order, and how often it has given that back.
async fn charges_and_refunds(stage: &Stage, order: &Order) -> Result<(usize, usize)> {
    let ledger = stage.ledger().await?;
    let of_order = |key: &str| {
        let entries = ledger[key].as_array().map_or(&[][..], Vec::as_slice);
        let mine = entries
            .iter()
            .filter(|entry| entry["order_id"] == *order.order_id);
        mine.count()
    };
    Ok((of_order("charges"), of_order("refunds")))
}

/// A user signs up and leaves a card; what he orders is charged once it is reserved, goes out and arrives.
async fn delivered(stage: &Stage) -> Result<()> {
    let email = "ann@example.org";
    let request = CreateUserRequest {
        request_id: Uuid::new_v4().to_string(),
        email: email.to_owned(),
        first_name: "Ann".to_owned(),
        last_name: "Other".to_owned(),
    };
    let answer = stage.users(0)?.create_user(within(request, DEADLINE)).await?;
    let User { user_id, .. } = answer.into_inner().user.context("a user")?;
    let request = CreatePaymentMethodRequest {
        request_id: Uuid::new_v4().to_string(),
        user_id: user_id.clone(),
        card: Some(card(cards::VISA)),
    };
    let mut payments = stage.payments(0)?;
    let answer = payments.create_payment_method(within(request, DEADLINE)).await?;
    let method = answer.into_inner().payment_method.context("a payment method")?;

    let product = product(stage).await?;
    let mut request = order_of(&product, 1250);
    request.user_id.clone_from(&user_id);
    request.payment_method_id = method.payment_method_id;
    // Mails go to the user's own address.
    request.user_email.clear();
    let order = stage.place_as(0, request).await?;
    ensure!(
        order.status() == OrderStatus::Pending && order.version == 1,
        "{order:?}"
    );
    stage.until(&order, "status = 'confirmed'").await?;
    let deliver = MarkDeliveredRequest {
        request_id: Uuid::new_v4().to_string(),
        order_id: order.order_id.clone(),
        expected_version: 0,
    };
    let mut orders = stage.orders(1)?;
    refused(
        orders.mark_delivered(within(deliver.clone(), DEADLINE)).await,
        "ORDER_NOT_SHIPPED",
    )?;
    let ship = ShipOrderRequest {
        request_id: Uuid::new_v4().to_string(),
        order_id: order.order_id.clone(),
        carrier: CARRIER.to_owned(),
        tracking_number: TRACKING_NUMBER.to_owned(),
        expected_version: 0,
    };
    let answer = orders.ship_order(within(ship, DEADLINE)).await?;
    let shipped = answer.into_inner().order.context("an order")?;
    ensure!(shipped.status() == OrderStatus::Shipped, "{shipped:?}");
    refused(cancel(stage, &order).await, "ORDER_SHIPPED")?;
    let answer = orders.mark_delivered(within(deliver, DEADLINE)).await?;
    let delivered = answer.into_inner().order.context("an order")?;
    ensure!(delivered.status() == OrderStatus::Delivered, "{delivered:?}");
    refused(cancel(stage, &order).await, "ORDER_DELIVERED")?;

    let request = GetOrderViewRequest {
        user_id,
        order_id: order.order_id.clone(),
        at_least_version: delivered.version,
    };
    let answer = stage.views(1)?.get_order_view(within(request, DEADLINE)).await?;
    let view = answer.into_inner().order.context("a view")?;
    ensure!(
        view.status() == OrderStatus::Delivered
            && view.carrier == CARRIER
            && view.tracking_number == TRACKING_NUMBER,
        "{view:?}"
    );
    stage.quiet().await?;
    let story = stage.story(&order).await?;
    story.require(&[
        (
            "order",
            &[
                "call > order.placed",
                "inventory.reserved > order.reserved",
                "payment.received > order.paid",
                "payment.received > order.confirmed",
                "call > order.shipped",
                "call > order.completed",
            ],
        ),
        (
            "reservation",
            &[
                "order.placed > inventory.reserved",
                "order.confirmed > inventory.committed",
            ],
        ),
        (
            "stock",
            &["order.placed > stock.updated", "order.confirmed > stock.updated"],
        ),
        ("payment", &["order.reserved > payment.received"]),
        (
            "notification",
            &[
                "order.placed > notification.sent",
                "order.confirmed > notification.sent",
                "order.shipped > notification.sent",
            ],
        ),
    ])?;
    ensure!(stage.stock(&product).await? == (PIECES - 1, 0, 1));
    ensure!(charges_and_refunds(stage, &order).await? == (1, 0));
    let mails = stage.mail_server.received()?;
    let mine: Vec<_> = mails.iter().filter(|mail| mail.recipients == [email]).collect();
    ensure!(mine.len() == 3, "{mine:?}");
    ensure!(
        mine[2].text.contains(CARRIER) && mine[2].text.contains(TRACKING_NUMBER),
        "{}",
        mine[2].text
    );
    // The figures of sales have it by now, and events have told of them.
    stage.right().await
}

/// Nobody has paid: stock comes back, and nothing can be paid any more.
async fn cancelled_when_reserved(stage: &Stage) -> Result<()> {
    let product = product(stage).await?;
    let order = stage.place_for(1, &product).await?;
    stage.until(&order, "reserved_at IS NOT NULL").await?;
    ensure!(stage.stock(&product).await? == (PIECES - 1, 1, 0));
    cancel(stage, &order).await?;
    stage.quiet().await?;
    let late = pay(stage.payments(0)?, payment_of(&order, &cards::fine(1)), DEADLINE).await;
    refused(late, "ORDER_CANCELLED")?;
    refused(cancel(stage, &order).await, "ORDER_CANCELLED")?;
    let story = stage.story(&order).await?;
    story.require(&[
        (
            "order",
            &[
                "call > order.placed",
                "inventory.reserved > order.reserved",
                "call > order.cancelled",
            ],
        ),
        (
            "reservation",
            &[
                "order.placed > inventory.reserved",
                "order.cancelled > inventory.released",
            ],
        ),
        (
            "stock",
            &["order.placed > stock.updated", "order.cancelled > stock.updated"],
        ),
        (
            "notification",
            &[
                "order.placed > notification.sent",
                "order.cancelled > notification.sent",
            ],
        ),
    ])?;
    ensure!(stage.stock(&product).await? == (PIECES, 0, 0));
    ensure!(charges_and_refunds(stage, &order).await? == (0, 0));
    Ok(())
}

/// What was sold comes back, and so does the money.
async fn cancelled_when_confirmed(stage: &Stage) -> Result<()> {
    let product = product(stage).await?;
    let order = stage.place_for(0, &product).await?;
    stage.until(&order, "reserved_at IS NOT NULL").await?;
    let payment = pay(stage.payments(1)?, payment_of(&order, &cards::fine(2)), DEADLINE).await?;
    ensure!(payment.status() == PaymentStatus::Received, "{payment:?}");
    stage.until(&order, "status = 'confirmed'").await?;
    // It is sold before it comes back.
    stage.quiet().await?;
    ensure!(stage.stock(&product).await? == (PIECES - 1, 0, 1));
    cancel(stage, &order).await?;
    stage.quiet().await?;
    let story = stage.story(&order).await?;
    story.require(&[
        (
            "order",
            &[
                "call > order.placed",
                "inventory.reserved > order.reserved",
                "payment.received > order.paid",
                "payment.received > order.confirmed",
                "call > order.cancelled",
            ],
        ),
        (
            "reservation",
            &[
                "order.placed > inventory.reserved",
                "order.confirmed > inventory.committed",
                "order.cancelled > inventory.released",
            ],
        ),
        (
            "stock",
            &[
                "order.placed > stock.updated",
                "order.confirmed > stock.updated",
                "order.cancelled > stock.updated",
            ],
        ),
        (
            "payment",
            &["call > payment.received", "order.cancelled > payment.refunded"],
        ),
        (
            "notification",
            &[
                "order.placed > notification.sent",
                "order.confirmed > notification.sent",
                "order.cancelled > notification.sent",
                "payment.refunded > notification.sent",
            ],
        ),
    ])?;
    ensure!(stage.stock(&product).await? == (PIECES, 0, 0));
    ensure!(charges_and_refunds(stage, &order).await? == (1, 1));
    Ok(())
}

/// What happened to an order, its goods and its money.
async fn way(stage: &Stage, order: &Order) -> Result<Story> {
    let story = stage.story(order).await?;
    Ok(story.of(&["order", "reservation", "payment"]))
}

/// inventory-svc is away: orders are cancelled before anybody has heard of their stock, unpaid and paid; others are paid, and wait for
/// what becomes of them.
async fn before_the_reservation(stage: &mut Stage) -> Result<()> {
    let product = product(stage).await?;
    stage.stop(INVENTORY_SVC, Stop::Kill).await?;
    let nobody_has = Uuid::new_v4().to_string();
    let unpaid = stage.place_for(0, &product).await?;
    let given_up = stage.place_for(1, &product).await?;
    let kept = stage.place_for(2, &product).await?;
    let short = stage.place_for(3, &nobody_has).await?;
    for (turn, order) in [&given_up, &kept, &short].into_iter().enumerate() {
        let request = payment_of(order, &cards::fine(10 + turn as u64));
        let payment = pay(stage.payments(turn)?, request, DEADLINE).await?;
        ensure!(payment.status() == PaymentStatus::Received, "{payment:?}");
        stage.until(order, "status = 'paid'").await?;
    }
    cancel(stage, &unpaid).await?;
    cancel(stage, &given_up).await?;
    // The money does not wait for the stock.
    stage.until_paid(&given_up, "refunded").await?;
    for order in [&kept, &short] {
        ensure!(now(stage, order).await?.status() == OrderStatus::Paid);
    }
    stage.start_again(INVENTORY_SVC).await?;
    stage.quiet().await?;

    let released: (&str, &[&str]) = (
        "reservation",
        &[
            "order.placed > inventory.reserved",
            "order.cancelled > inventory.released",
        ],
    );
    way(stage, &unpaid).await?.require(&[
        ("order", &["call > order.placed", "call > order.cancelled"]),
        released,
    ])?;
    way(stage, &given_up).await?.require(&[
        (
            "order",
            &[
                "call > order.placed",
                "payment.received > order.paid",
                "call > order.cancelled",
            ],
        ),
        (
            "payment",
            &["call > payment.received", "order.cancelled > payment.refunded"],
        ),
        released,
    ])?;
    way(stage, &kept).await?.require(&[
        (
            "order",
            &[
                "call > order.placed",
                "payment.received > order.paid",
                "inventory.reserved > order.reserved",
                "inventory.reserved > order.confirmed",
            ],
        ),
        ("payment", &["call > payment.received"]),
        (
            "reservation",
            &[
                "order.placed > inventory.reserved",
                "order.confirmed > inventory.committed",
            ],
        ),
    ])?;
    way(stage, &short).await?.require(&[
        (
            "order",
            &[
                "call > order.placed",
                "payment.received > order.paid",
                "inventory.rejected > order.cancelled",
            ],
        ),
        (
            "payment",
            &["call > payment.received", "order.cancelled > payment.refunded"],
        ),
        ("reservation", &["order.placed > inventory.rejected"]),
    ])?;
    ensure!(stage.stock(&product).await? == (PIECES - 1, 0, 1));
    for (order, expected) in [
        (&unpaid, (0, 0)),
        (&given_up, (1, 1)),
        (&kept, (1, 0)),
        (&short, (1, 1)),
    ] {
        let found = charges_and_refunds(stage, order).await?;
        ensure!(found == expected, "{order:?}: {found:?}");
    }
    Ok(())
}
