//! Each part of the shop is stopped in turn, all instances of it: what does not need it goes on, what does says so or waits, and when it is
//! back everything comes to its end by itself. Kafka and PostgreSQL away are in `outages.rs`.

use std::fmt::Debug;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use contracts::shop::analytics::events::v1::WindowSize;
use contracts::shop::inventory::v1::SetStockRequest;
use contracts::shop::order::v1::{
    CancelOrderRequest, GetOrderHistoryRequest, GetOrderRequest, Order, OrderStatus, PlaceOrderRequest,
    ShipOrderRequest,
};
use contracts::shop::orderquery::v1::{GetOrderViewRequest, ListOrdersRequest};
use contracts::shop::payment::v1::process_payment_request::Method;
use contracts::shop::payment::v1::{CreatePaymentMethodRequest, PaymentStatus, ProcessPaymentRequest};
use contracts::shop::user::v1::{CreateUserRequest, GetUserRequest};
use local_stack::cards;
use local_stack::shop::{
    ANALYTICS_SVC, INVENTORY_SVC, NOTIFICATION_SVC, ORDER_QUERY_SVC, ORDER_SVC, OUTBOX_RELAY,
    PAYMENT_SANDBOX, PAYMENT_SVC, USER_SVC,
};
use local_stack::testing::Folder;
use tests::say;
use tests::stage::{DEADLINE, PIECES, PRODUCT, Stage, Stop, card, order_of, pay, within};
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

const MAIL_SERVER: &str = "the mail server";

/// Every part, and how it is stopped. A sender of mails that is killed amid one leaves it for an operator, which is tested elsewhere.
const PARTS: [(&str, Stop); 10] = [
    (USER_SVC, Stop::Kill),
    (INVENTORY_SVC, Stop::Kill),
    (PAYMENT_SVC, Stop::Kill),
    (NOTIFICATION_SVC, Stop::Orderly),
    (ANALYTICS_SVC, Stop::Orderly),
    (ORDER_QUERY_SVC, Stop::Kill),
    (OUTBOX_RELAY, Stop::Kill),
    (PAYMENT_SANDBOX, Stop::Kill),
    (MAIL_SERVER, Stop::Kill),
    (ORDER_SVC, Stop::Kill),
];

/// Of a call that will not be answered as it would like to be.
const IMPATIENCE: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread")]
async fn each_part_is_done_without_and_catches_up() {
    tests::run("one-down", one_after_the_other).await;
}

async fn one_after_the_other(folder: &Folder) -> Result<()> {
    let mut stage = Stage::start(folder, "10m").await?;
    let customer = Customer::sign_up(&stage).await?;
    let mut to_ship = stage.place_as(0, customer.order()).await?;
    let mut sold = 1;
    for (turn, (part, how)) in PARTS.into_iter().enumerate() {
        // Confirmed, and its mails are sent: whoever is stopped has nothing in hand.
        stage.until(&to_ship, "status = 'confirmed'").await?;
        stage.until_told(&to_ship, 2).await?;
        let to_pay = to_pay(&stage, &customer, turn).await?;
        let work = Work::new(&customer, &to_ship, &to_pay);
        let mails = stage.mail_server.received()?.len();
        match part {
            MAIL_SERVER => stage.mail_server.kill()?,
            service => stage.stop(service, how).await?,
        }

        let placed = work.ask(&stage, turn, part).await?;
        waits_or_goes_on(&stage, part, &to_pay, placed.as_ref()).await?;
        if [MAIL_SERVER, NOTIFICATION_SVC].contains(&part) {
            ensure!(stage.mail_server.received()?.len() == mails, "a mail was sent");
        }

        match part {
            MAIL_SERVER => stage.mail_server.restart().await?,
            service => stage.start_again(service).await?,
        }
        // Whoever was refused tries again, and whoever was not gets the same answer.
        let again = work
            .ask(&stage, turn + 1, "")
            .await?
            .context("an order was placed")?;
        if let Some(placed) = placed {
            ensure!(
                placed.order_id == again.order_id,
                "placed twice: {placed:?} and {again:?}"
            );
        }
        stage.until(&to_pay, "status = 'confirmed'").await?;
        stage.until(&again, "status = 'confirmed'").await?;
        stage.until(&to_ship, "status = 'shipped'").await?;
        stage.quiet().await.with_context(|| format!("after {part}"))?;
        stage.right().await.with_context(|| format!("after {part}"))?;
        sold += 2;
        let stock = stage.stock(PRODUCT).await?;
        ensure!(stock == (PIECES - sold, 0, sold), "after {part}: {stock:?}");
        // Nobody has ended over it.
        for process in stage.shop.processes_mut() {
            process.ready().await?;
        }
        say(&format!("{part}: done without, and caught up"));
        to_ship = again;
    }
    stage.sound().await
}

/// Somebody who has an address, and a card at the provider.
struct Customer {
    user_id: String,
    method_id: String,
}

impl Customer {
    async fn sign_up(stage: &Stage) -> Result<Self> {
        let answer = stage.users(0)?.create_user(within(new_user(), DEADLINE)).await?;
        let user_id = answer.into_inner().user.context("a user")?.user_id;
        let request = new_method(&user_id);
        let mut payments = stage.payments(0)?;
        let answer = payments.create_payment_method(within(request, DEADLINE)).await?;
        let method = answer.into_inner().payment_method.context("a payment method")?;
        Ok(Self {
            user_id,
            method_id: method.payment_method_id,
        })
    }

    /// One that is charged once it is reserved.
    fn order(&self) -> PlaceOrderRequest {
        PlaceOrderRequest {
            user_id: self.user_id.clone(),
            payment_method_id: self.method_id.clone(),
            // His own address is used.
            user_email: String::new(),
            ..order_of(PRODUCT, 1999)
        }
    }
}

fn new_user() -> CreateUserRequest {
    let request_id = Uuid::new_v4().to_string();
    CreateUserRequest {
        // Not so long that it could be taken for a card's number.
        email: format!("{}@example.org", &request_id[..8]),
        request_id,
        first_name: "Ann".to_owned(),
        last_name: "Other".to_owned(),
    }
}

fn new_method(user_id: &str) -> CreatePaymentMethodRequest {
    CreatePaymentMethodRequest {
        request_id: Uuid::new_v4().to_string(),
        user_id: user_id.to_owned(),
        card: Some(card(cards::VISA)),
    }
}

/// An order that everybody has heard of, and that is not paid.
async fn to_pay(stage: &Stage, customer: &Customer, turn: usize) -> Result<Order> {
    let request = PlaceOrderRequest {
        payment_method_id: String::new(),
        ..customer.order()
    };
    let order = stage.place_as(turn, request).await?;
    stage.until(&order, "reserved_at IS NOT NULL").await?;
    let request = view_of(&order, 2);
    stage
        .views(turn)?
        .get_order_view(within(request, DEADLINE))
        .await?;
    stage.until_told(&order, 1).await?;
    let payments = stage.database("payments")?;
    let sql = "SELECT count(*) FROM known_orders WHERE order_id::text = $1";
    local_stack::wait::until("payment-svc has heard of the order", DEADLINE, || async {
        let row = payments.query_one(sql, &[&order.order_id]).await?;
        Ok((row.get::<_, i64>(0) == 1).then_some(()))
    })
    .await?;
    Ok(order)
}

fn view_of(order: &Order, at_least_version: i64) -> GetOrderViewRequest {
    GetOrderViewRequest {
        user_id: order.user_id.clone(),
        order_id: order.order_id.clone(),
        at_least_version,
    }
}

/// An answer, or none from whoever is down: that is UNAVAILABLE.
fn answered<T: Debug>(service: &str, down: &str, answer: Result<Response<T>, Status>) -> Result<Option<T>> {
    match answer {
        Ok(answer) if service != down => Ok(Some(answer.into_inner())),
        Err(status) if service == down && status.code() == Code::Unavailable => Ok(None),
        answer => bail!("{service} answers {answer:?} while {down:?} is down"),
    }
}

/// What clients ask of all services. Repeated, it is the same.
struct Work {
    user: CreateUserRequest,
    get_user: GetUserRequest,
    stock: SetStockRequest,
    method: CreatePaymentMethodRequest,
    payment: ProcessPaymentRequest,
    /// Charged once it is reserved.
    place: PlaceOrderRequest,
    /// Cancelled at once.
    give_up: PlaceOrderRequest,
    cancel_id: String,
    ship: ShipOrderRequest,
    to_pay: Order,
}

impl Work {
    fn new(customer: &Customer, to_ship: &Order, to_pay: &Order) -> Self {
        let request_id = || Uuid::new_v4().to_string();
        Self {
            user: new_user(),
            get_user: GetUserRequest {
                user_id: customer.user_id.clone(),
            },
            stock: SetStockRequest {
                request_id: request_id(),
                product_id: request_id(),
                available: 5,
                expected_version: None,
            },
            method: new_method(&customer.user_id),
            payment: ProcessPaymentRequest {
                request_id: request_id(),
                user_id: customer.user_id.clone(),
                order_id: to_pay.order_id.clone(),
                amount: to_pay.total.clone(),
                method: Some(Method::PaymentMethodId(customer.method_id.clone())),
            },
            place: customer.order(),
            give_up: PlaceOrderRequest {
                payment_method_id: String::new(),
                ..customer.order()
            },
            cancel_id: request_id(),
            ship: ShipOrderRequest {
                request_id: request_id(),
                order_id: to_ship.order_id.clone(),
                carrier: "Parcels & Sons".to_owned(),
                tracking_number: "PS-4711".to_owned(),
                expected_version: 0,
            },
            to_pay: to_pay.clone(),
        }
    }

    /// Asks everything while `down` is, each service by itself. Gives the order that was placed, if any could be.
    async fn ask(&self, stage: &Stage, turn: usize, down: &str) -> Result<Option<Order>> {
        let mut users = stage.users(turn)?;
        let answer = users.create_user(within(self.user.clone(), DEADLINE)).await;
        answered(USER_SVC, down, answer)?;
        let answer = users.get_user(within(self.get_user.clone(), DEADLINE)).await;
        answered(USER_SVC, down, answer)?;

        let mut inventory = stage.inventory(turn)?;
        let answer = inventory.set_stock(within(self.stock.clone(), DEADLINE)).await;
        answered(INVENTORY_SVC, down, answer)?;

        self.ask_payments(stage, turn, down).await?;
        let placed = self.ask_orders(stage, turn, down).await?;
        self.ask_views(stage, turn, down, placed.as_ref()).await?;

        if down == ANALYTICS_SVC {
            let refused = stage
                .summary(turn, WindowSize::Hour)
                .await
                .err()
                .context("an answer")?;
            let code = refused.downcast_ref::<Status>().map(Status::code);
            ensure!(code == Some(Code::Unavailable), "{refused:?}");
        } else {
            let summary = stage.summary(turn, WindowSize::Hour).await?;
            ensure!(!summary.windows.is_empty(), "{summary:?}");
        }
        Ok(placed)
    }

    async fn ask_payments(&self, stage: &Stage, turn: usize, down: &str) -> Result<()> {
        let mut payments = stage.payments(turn)?;
        let method = payments
            .create_payment_method(within(self.method.clone(), DEADLINE))
            .await;
        if down == PAYMENT_SANDBOX {
            let status = method.err().context("a card was kept by nobody")?;
            let reason = status.get_details_error_info().map(|info| info.reason);
            ensure!(
                status.code() == Code::Unavailable
                    && reason.as_deref() == Some("PROVIDER_UNAVAILABLE")
                    && status.get_details_retry_info().is_some(),
                "{status:?}"
            );
        } else {
            answered(PAYMENT_SVC, down, method)?;
        }
        // It was heard of before, so it is paid whoever else is down.
        let deadline = if down == PAYMENT_SANDBOX {
            IMPATIENCE
        } else {
            DEADLINE
        };
        let payment = pay(payments, self.payment.clone(), deadline).await;
        let payment = answered(PAYMENT_SVC, down, payment.map(Response::new))?;
        let expected = match down {
            PAYMENT_SVC => return Ok(()),
            PAYMENT_SANDBOX => PaymentStatus::Pending,
            // What the provider has to be asked about is settled by and by.
            "" => return Ok(()),
            _ => PaymentStatus::Received,
        };
        ensure!(
            payment
                .as_ref()
                .is_some_and(|payment| payment.status() == expected),
            "{payment:?}"
        );
        Ok(())
    }

    async fn ask_orders(&self, stage: &Stage, turn: usize, down: &str) -> Result<Option<Order>> {
        let mut orders = stage.orders(turn)?;
        let (user_id, order_id) = (self.to_pay.user_id.clone(), self.to_pay.order_id.clone());
        let request = GetOrderRequest {
            user_id: user_id.clone(),
            order_id: order_id.clone(),
        };
        answered(ORDER_SVC, down, orders.get_order(within(request, DEADLINE)).await)?;
        let request = GetOrderHistoryRequest {
            user_id,
            order_id,
            ..Default::default()
        };
        answered(
            ORDER_SVC,
            down,
            orders.get_order_history(within(request, DEADLINE)).await,
        )?;
        let answer = orders.ship_order(within(self.ship.clone(), DEADLINE)).await;
        answered(ORDER_SVC, down, answer)?;
        let answer = orders.place_order(within(self.place.clone(), DEADLINE)).await;
        let placed = answered(ORDER_SVC, down, answer)?.and_then(|answer| answer.order);
        let answer = orders.place_order(within(self.give_up.clone(), DEADLINE)).await;
        let Some(given_up) = answered(ORDER_SVC, down, answer)?.and_then(|answer| answer.order) else {
            return Ok(None);
        };
        let request = CancelOrderRequest {
            request_id: self.cancel_id.clone(),
            user_id: given_up.user_id,
            order_id: given_up.order_id,
            reason: "changed my mind".to_owned(),
            expected_version: 0,
        };
        let answer = orders.cancel_order(within(request, DEADLINE)).await?.into_inner();
        let status = answer.order.map(|order| order.status());
        ensure!(status == Some(OrderStatus::Cancelled), "{status:?}");
        Ok(placed)
    }

    async fn ask_views(&self, stage: &Stage, turn: usize, down: &str, placed: Option<&Order>) -> Result<()> {
        let mut views = stage.views(turn)?;
        let answer = views
            .get_order_view(within(view_of(&self.to_pay, 2), DEADLINE))
            .await;
        answered(ORDER_QUERY_SVC, down, answer)?;
        let request = ListOrdersRequest {
            user_id: self.to_pay.user_id.clone(),
            ..Default::default()
        };
        let answer = views.list_orders(within(request, DEADLINE)).await;
        answered(ORDER_QUERY_SVC, down, answer)?;
        let Some(placed) = placed else { return Ok(()) };
        let request = view_of(placed, placed.version);
        if down == OUTBOX_RELAY {
            // Nobody can tell the read model of it.
            let answer = views.get_order_view(within(request, IMPATIENCE)).await;
            let status = answer.err().context("a view of what nobody has told of")?;
            let reason = status.get_details_error_info().map(|info| info.reason);
            ensure!(
                status.code() == Code::DeadlineExceeded && reason.as_deref() == Some("VERSION_NOT_REACHED"),
                "{status:?}"
            );
        } else {
            let answer = views.get_order_view(within(request, DEADLINE)).await;
            answered(ORDER_QUERY_SVC, down, answer)?;
        }
        Ok(())
    }
}

/// How far orders come without `down`.
async fn waits_or_goes_on(stage: &Stage, down: &str, to_pay: &Order, placed: Option<&Order>) -> Result<()> {
    match (down, placed) {
        // It is paid; nobody can take that in.
        (ORDER_SVC, None) => {
            stage.until_paid(to_pay, "received").await?;
            stage.until(to_pay, "status = 'pending'").await
        }
        (_, None) => bail!("no order was placed without {down}"),
        (OUTBOX_RELAY, Some(placed)) => {
            stage.until_paid(to_pay, "received").await?;
            stage.until(to_pay, "status = 'pending'").await?;
            stage.until(placed, "version = 1").await
        }
        (PAYMENT_SVC | PAYMENT_SANDBOX, Some(placed)) => {
            stage.until(to_pay, "status = 'pending'").await?;
            stage
                .until(placed, "status = 'pending' AND reserved_at IS NOT NULL")
                .await
        }
        (INVENTORY_SVC, Some(placed)) => {
            stage.until(to_pay, "status = 'confirmed'").await?;
            stage.until(placed, "version = 1").await
        }
        (_, Some(placed)) => {
            stage.until(to_pay, "status = 'confirmed'").await?;
            stage.until(placed, "status = 'confirmed'").await
        }
    }
}
