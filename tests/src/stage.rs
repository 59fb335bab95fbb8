//! A whole shop of a test's own: every process of it, two instances of each service, on its own PostgreSQL, Kafka and mail server. Any part
//! may be killed; whatever was done, [`Stage::right`] says in the end whether everything is as it should be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use contracts::catalogue::order_analytics;
use contracts::shop::analytics::events::v1::{OrderAnalyticsUpdated, SalesFigures, WindowSize};
use contracts::shop::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use contracts::shop::analytics::v1::{GetSalesSummaryRequest, GetSalesSummaryResponse};
use contracts::shop::inventory::v1::inventory_service_client::InventoryServiceClient;
use contracts::shop::inventory::v1::{GetStockRequest, SetStockRequest};
use contracts::shop::order::v1::order_service_client::OrderServiceClient;
use contracts::shop::order::v1::{Order, OrderItem, PlaceOrderRequest};
use contracts::shop::orderquery::v1::order_query_service_client::OrderQueryServiceClient;
use contracts::shop::payment::v1::payment_service_client::PaymentServiceClient;
use contracts::shop::payment::v1::process_payment_request::Method;
use contracts::shop::payment::v1::{Card, Payment, ProcessPaymentRequest};
use contracts::shop::user::v1::user_service_client::UserServiceClient;
use local_stack::kafka::Kafka;
use local_stack::postgres::{self, Postgres};
use local_stack::process::http_get;
use local_stack::shop::{
    ANALYTICS_SVC, INVENTORY_SVC, MAIL_DOMAIN, ORDER_QUERY_SVC, ORDER_SVC, PAYMENT_SVC, Plan, SERVICES, Shop,
    USER_SVC, events,
};
use local_stack::smtp::{Smtp, Tls};
use local_stack::testing::{Folder, private_kafka, private_postgres};
use local_stack::wait;
use prost::Message as _;
use tokio_postgres::Client;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use crate::{PATIENCE, assert_sound, check, databases, shop, topic};

/// Of a call that is expected to be answered.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// The product that there is, and how many pieces of it.
pub const PRODUCT: &str = "0190bbbb-0000-7000-8000-000000000001";
pub const PIECES: i64 = 1_000;

/// The running shop, on servers of its own.
pub struct Stage {
    // Dropped in this order.
    pub shop: Shop,
    plan: Plan,
    databases: BTreeMap<&'static str, Arc<Client>>,
    pub kafka: Kafka,
    pub mail_server: Smtp,
    postgres: Postgres,
}

/// How a process is ended.
#[derive(Debug, Clone, Copy)]
pub enum Stop {
    /// SIGTERM.
    Orderly,
    /// SIGKILL.
    Kill,
}

/// How far everything has come.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    /// By consumer, events taken in and events that there are to take in.
    consumed: Vec<(i64, i64)>,
    /// What is still to happen: to orders, payments and reservations, to mails, to figures of sales, and in outboxes.
    open: [i64; 6],
}

impl Seen {
    fn is_settled(&self) -> bool {
        self.open.iter().all(|open| *open == 0) && self.consumed.iter().all(|(taken, there)| taken == there)
    }
}

impl Stage {
    /// With so long to pay.
    pub async fn start(folder: &Folder, pay_within: &str) -> Result<Self> {
        let (postgres, kafka, mail_server) = tokio::try_join!(
            private_postgres(folder),
            private_kafka(folder),
            Smtp::start(folder.path().join("mail"), Tls::Implicit)
        )?;
        let plan = Plan::new(
            folder.path(),
            postgres.url("postgres"),
            kafka.brokers(),
            &mail_server,
            None,
        )?
        .set(ORDER_SVC, "orders.pay_within", pay_within)
        .relay_lease(Duration::from_secs(1));
        plan.create_databases().await?;
        tokio::try_join!(plan.migrate(), plan.create_topics())?;
        let shop = plan.start().await?;
        shop.consumers_settled().await?;
        let mut databases = BTreeMap::new();
        for name in local_stack::shop::databases() {
            let client = postgres::connect(&plan.database_url(name)).await?;
            databases.insert(name, Arc::new(client));
        }
        let stage = Self {
            shop,
            plan,
            databases,
            kafka,
            mail_server,
            postgres,
        };
        stage.stocked(PRODUCT, PIECES).await?;
        Ok(stage)
    }

    /// A connection to a database.
    pub fn database(&self, name: &str) -> Result<Arc<Client>> {
        let client = self.databases.get(name).cloned();
        client.with_context(|| format!("there is no database {name}"))
    }

    async fn count(&self, database: &str, sql: &str) -> Result<i64> {
        let client = self.database(database)?;
        databases::count(&client, sql).await
    }

    /// A channel to an instance: to each of them in turn.
    pub fn channel(&self, service: &str, turn: usize) -> Result<Channel> {
        let process = self.shop.of(service).nth(turn % 2).context("two instances")?;
        shop::channel(process)
    }

    pub fn orders(&self, turn: usize) -> Result<OrderServiceClient<Channel>> {
        Ok(OrderServiceClient::new(self.channel(ORDER_SVC, turn)?))
    }

    pub fn payments(&self, turn: usize) -> Result<PaymentServiceClient<Channel>> {
        Ok(PaymentServiceClient::new(self.channel(PAYMENT_SVC, turn)?))
    }

    pub fn inventory(&self, turn: usize) -> Result<InventoryServiceClient<Channel>> {
        Ok(InventoryServiceClient::new(self.channel(INVENTORY_SVC, turn)?))
    }

    pub fn users(&self, turn: usize) -> Result<UserServiceClient<Channel>> {
        Ok(UserServiceClient::new(self.channel(USER_SVC, turn)?))
    }

    pub fn views(&self, turn: usize) -> Result<OrderQueryServiceClient<Channel>> {
        Ok(OrderQueryServiceClient::new(self.channel(ORDER_QUERY_SVC, turn)?))
    }

    pub fn sales(&self, turn: usize) -> Result<AnalyticsServiceClient<Channel>> {
        Ok(AnalyticsServiceClient::new(self.channel(ANALYTICS_SVC, turn)?))
    }

    /// Ends all instances of a service.
    pub async fn stop(&mut self, service: &str, how: Stop) -> Result<()> {
        for instance in 0..self.shop.of(service).count() {
            let process = self.shop.instance_mut(service, instance)?;
            match how {
                Stop::Orderly => process.stop().await?,
                Stop::Kill => process.kill()?,
            };
        }
        Ok(())
    }

    /// Starts them again, and waits until they are ready.
    pub async fn start_again(&mut self, service: &str) -> Result<()> {
        let instances = self.shop.of(service).count();
        for instance in 0..instances {
            self.shop.instance_mut(service, instance)?.start().await?;
        }
        for instance in 0..instances {
            self.shop.instance_mut(service, instance)?.ready().await?;
        }
        Ok(())
    }

    /// Has so many pieces of a product.
    pub async fn stocked(&self, product_id: &str, available: i64) -> Result<()> {
        let request = SetStockRequest {
            request_id: Uuid::new_v4().to_string(),
            product_id: product_id.to_owned(),
            available,
            expected_version: None,
        };
        self.inventory(0)?.set_stock(within(request, DEADLINE)).await?;
        Ok(())
    }

    /// Available, reserved and sold of a product.
    pub async fn stock(&self, product_id: &str) -> Result<(i64, i64, i64)> {
        let request = GetStockRequest {
            product_id: product_id.to_owned(),
        };
        let answer = self.inventory(1)?.get_stock(within(request, DEADLINE)).await?;
        let stock = answer.into_inner().stock.context("stock")?;
        Ok((stock.available, stock.reserved, stock.sold))
    }

    /// An order of a piece of the product that there is.
    pub async fn place(&self, turn: usize) -> Result<Order> {
        self.place_for(turn, PRODUCT).await
    }

    /// An order of a piece of a product.
    pub async fn place_for(&self, turn: usize, product_id: &str) -> Result<Order> {
        self.place_as(turn, order_of(product_id, 1000 + turn as i64))
            .await
    }

    pub async fn place_as(&self, turn: usize, request: PlaceOrderRequest) -> Result<Order> {
        let answer = self.orders(turn)?.place_order(within(request, DEADLINE)).await?;
        answer.into_inner().order.context("an order")
    }

    /// Waits until order-svc's row of an order says this.
    pub async fn until(&self, order: &Order, condition: &str) -> Result<()> {
        let sql = format!("SELECT count(*) FROM orders WHERE order_id::text = $1 AND {condition}");
        let what = format!("order {} has {condition}", order.order_id);
        let orders = self.database("orders")?;
        wait::until(&what, PATIENCE, || async {
            let row = orders.query_one(&sql, &[&order.order_id]).await?;
            Ok((row.get::<_, i64>(0) == 1).then_some(()))
        })
        .await
    }

    /// Waits until the only payment of an order has this status.
    pub async fn until_paid(&self, order: &Order, status: &str) -> Result<()> {
        let sql = "SELECT count(*) FROM payments WHERE order_id::text = $1 AND status = $2";
        let payments = self.database("payments")?;
        let what = format!("the payment of order {} is {status}", order.order_id);
        wait::until(&what, PATIENCE, || async {
            let row = payments.query_one(sql, &[&order.order_id, &status]).await?;
            Ok((row.get::<_, i64>(0) == 1).then_some(()))
        })
        .await
    }

    /// Waits until so many mails about an order are sent.
    pub async fn until_told(&self, order: &Order, mails: i64) -> Result<()> {
        let sql = "SELECT count(*) FROM mails WHERE order_id::text = $1 AND state = 'sent'";
        let notifications = self.database("notifications")?;
        let what = format!("mails about order {} are sent", order.order_id);
        wait::until(&what, PATIENCE, || async {
            let row = notifications.query_one(sql, &[&order.order_id]).await?;
            Ok((row.get::<_, i64>(0) == mails).then_some(()))
        })
        .await
    }

    /// Waits until payment-svc has heard of so many orders.
    pub async fn known(&self, count: i64) -> Result<()> {
        let payments = self.database("payments")?;
        wait::until("payment-svc has heard of the orders", PATIENCE, || async {
            let known = databases::count(&payments, "SELECT count(*) FROM known_orders").await?;
            Ok((known == count).then_some(()))
        })
        .await
    }

    /// Waits until nothing is under way any more: every order, payment and mail has come to its end, and every event is published and has
    /// been taken in by all who read it.
    pub async fn quiet(&self) -> Result<()> {
        // One look is not taken at one moment: what is done has to be so twice.
        let last: Mutex<Option<Seen>> = Mutex::default();
        let quiet = wait::until("everything is settled and told", PATIENCE, || async {
            let seen = self.look().await?;
            let settled = seen.is_settled();
            let before = last
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .replace(seen.clone());
            Ok((settled && before == Some(seen)).then_some(()))
        });
        quiet.await.with_context(|| format!("seen last: {last:?}"))
    }

    async fn look(&self) -> Result<Seen> {
        let mut consumed = Vec::new();
        for service in SERVICES.iter().filter(|service| !service.consumes.is_empty()) {
            let client = self.database(service.database.context("a consumer has a database")?)?;
            let parked = "SELECT count(*) FROM parked_records";
            ensure!(
                databases::count(&client, parked).await? == 0,
                "{} has parked records",
                service.name
            );
            let taken = "SELECT coalesce(sum(version), 0)::bigint FROM consumer_marks";
            let taken = databases::count(&client, taken).await?;
            let mut there = 0;
            for (database, kind) in events() {
                if service.consumes.contains(&kind.topic) {
                    let sql = format!(
                        "SELECT count(*) FROM outbox WHERE aggregate_type = '{}'",
                        kind.entity_type
                    );
                    there += self.count(database, &sql).await?;
                }
            }
            consumed.push((taken, there));
        }
        let mut unpublished = 0;
        for database in local_stack::shop::outboxes() {
            let sql = "SELECT coalesce((SELECT max(id) FROM outbox), 0) > coalesce((SELECT max(floor) FROM outbox_relay), 0)";
            let row = self.database(database)?.query_one(sql, &[]).await?;
            unpublished += i64::from(row.get::<_, bool>(0));
        }
        let open = [
            ("orders", "orders WHERE status IN ('pending', 'paid')"),
            (
                "payments",
                "payments WHERE status IN ('pending', 'refund_pending')",
            ),
            ("inventory", "reservations WHERE status = 'reserved'"),
            ("notifications", "mails WHERE state <> 'sent'"),
            ("analytics", "sales_changes"),
        ];
        let mut counts = [0, 0, 0, 0, 0, unpublished];
        for ((database, what), count) in open.iter().zip(&mut counts) {
            let sql = format!("SELECT count(*) FROM {what}");
            *count = self.count(database, &sql).await?;
        }
        Ok(Seen {
            consumed,
            open: counts,
        })
    }

    /// What has happened because of an order: of each kind of entity its events, as "cause > event". A cause is an event, a `call`, or
    /// that its `time` had come.
    pub async fn story(&self, order: &Order) -> Result<Story> {
        let mut names: BTreeMap<Uuid, String> = BTreeMap::new();
        let mut told = Vec::new();
        for database in ["orders", "inventory", "payments", "notifications"] {
            // What happens to stock is joined by the product; it was caused by what happened to the order.
            let sql = "SELECT event_id, causation_id, entity_type, event_type, correlation_id::text = $1 \
                       FROM events WHERE correlation_id::text = $1 OR entity_type = 'stock' ORDER BY occurred_at, version";
            for row in self.database(database)?.query(sql, &[&order.order_id]).await? {
                let kind: String = row.get(3);
                if row.get(4) {
                    names.insert(row.get(0), kind.clone());
                }
                told.push((row.get::<_, Option<Uuid>>(1), row.get::<_, String>(2), kind));
            }
        }
        let mut story = Story::default();
        for (cause, entity, event) in told {
            let cause = match cause {
                None => "time",
                Some(cause) => match names.get(&cause) {
                    Some(event) => event,
                    // Other orders' and the warehouse's.
                    None if entity == "stock" => continue,
                    None => "call",
                },
            };
            let line = format!("{cause} > {event}");
            story.0.entry(entity).or_default().push(line);
        }
        Ok(story)
    }

    /// Charges and refunds of the provider, as JSON.
    pub async fn ledger(&self) -> Result<serde_json::Value> {
        let address = self.plan.sandbox_url().trim_start_matches("http://").parse()?;
        let (status, body) = http_get(address, "/sandbox/ledger").await?;
        ensure!(status == 200, "the ledger answers {status}");
        Ok(serde_json::from_str(&body)?)
    }

    /// Requires of what is quiet: the read model is as the orders are; who is to be told by mail was told once; the figures of sales are what
    /// happened, whoever is asked.
    pub async fn right(&self) -> Result<()> {
        let (orders, views) = (self.database("orders")?, self.database("order_query")?);
        assert_sound(&check::same(
            ["orders", "order_views"],
            &databases::states(&orders).await?,
            &databases::views(&views).await?,
        ));
        self.mails_are_right().await?;
        self.figures_are_right().await
    }

    async fn mails_are_right(&self) -> Result<()> {
        let mut answered = BTreeSet::new();
        for database in ["orders", "payments"] {
            let sql = "SELECT event_id FROM events WHERE event_type IN \
                       ('order.placed', 'order.confirmed', 'order.shipped', 'order.cancelled', 'payment.refunded')";
            let rows = self.database(database)?.query(sql, &[]).await?;
            answered.extend(rows.iter().map(|row| row.get::<_, Uuid>(0)));
        }
        let mut missing: BTreeSet<String> = answered
            .iter()
            .map(|id| format!("<{id}@{MAIL_DOMAIN}>"))
            .collect();
        for mail in self.mail_server.received()? {
            let id = mail.header("message-id");
            ensure!(missing.remove(id), "{id} was sent twice, or answers no event");
        }
        ensure!(missing.is_empty(), "nobody was told {missing:?}");
        let sent = "SELECT entity_id::uuid FROM events WHERE event_type = 'notification.sent'";
        let rows = self.database("notifications")?.query(sent, &[]).await?;
        let sent: BTreeSet<Uuid> = rows.iter().map(|row| row.get(0)).collect();
        ensure!(sent == answered, "notification.sent tells of {sent:?}");
        Ok(())
    }

    async fn figures_are_right(&self) -> Result<()> {
        let (orders, payments) = (self.database("orders")?, self.database("payments")?);
        let happened = |kind| format!("SELECT count(*) FROM events WHERE event_type = '{kind}'");
        let money = |condition| {
            format!(
                "SELECT coalesce(sum(amount_minor_units), 0)::bigint FROM payments WHERE status IN ({condition})"
            )
        };
        let expected = SalesFigures {
            currency_code: "EUR".to_owned(),
            orders_placed: databases::count(&orders, &happened("order.placed")).await?,
            orders_confirmed: databases::count(&orders, &happened("order.confirmed")).await?,
            orders_cancelled: databases::count(&orders, &happened("order.cancelled")).await?,
            revenue_minor_units: databases::count(&payments, &money("'received'")).await?,
            refunded_minor_units: databases::count(&payments, &money("'refunded'")).await?,
            best_sellers: Vec::new(),
        };
        let told = self.figures_told().await?;
        for (turn, size) in [
            (0, WindowSize::Minute),
            (1, WindowSize::Hour),
            (0, WindowSize::Day),
        ] {
            let answer = self.summary(turn, size).await?;
            let total = answer.total.context("a total")?.figures;
            ensure!(
                total == [expected.clone()],
                "{size:?}: {total:?}, and {expected:?} happened"
            );
            for window in answer.windows {
                let start = window.window_start.context("a start")?;
                let last = told.get(&(size as i32, start.seconds));
                ensure!(
                    last == Some(&window.figures),
                    "{size:?} of {start}: events tell {last:?} last, GetSalesSummary {:?}",
                    window.figures
                );
            }
        }
        Ok(())
    }

    /// All windows of a size in which this test can have placed an order.
    pub async fn summary(&self, turn: usize, size: WindowSize) -> Result<GetSalesSummaryResponse> {
        let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
        let (start, end) = match size {
            WindowSize::Day => (now - 48 * hour, now + hour),
            _ => (now - 2 * hour, now + hour),
        };
        let request = GetSalesSummaryRequest {
            window_size: size.into(),
            start: Some(start.into()),
            end: Some(end.into()),
            currency_code: String::new(),
        };
        let mut sales = self.sales(turn)?;
        let answer = sales.get_sales_summary(within(request, DEADLINE)).await?;
        Ok(answer.into_inner())
    }

    /// By size and start of a window, the figures that its last event tells.
    async fn figures_told(&self) -> Result<BTreeMap<(i32, i64), Vec<SalesFigures>>> {
        let sql = "SELECT payload FROM outbox WHERE event_type = $1 ORDER BY id";
        let updated = order_analytics::UPDATED;
        let rows = self.database("analytics")?.query(sql, &[&updated]).await?;
        let mut told = BTreeMap::new();
        for row in rows {
            let event = OrderAnalyticsUpdated::decode(row.get::<_, &[u8]>(0))?;
            let start = event.window_start.context("a start")?.seconds;
            told.insert((event.window_size, start), event.figures);
        }
        Ok(told)
    }

    /// Every event of every service is in its topic, in its entity's order, and nothing else is.
    pub async fn published(&self) -> Result<()> {
        for (database, kind) in events() {
            let table = format!(
                "(SELECT *, xmin FROM outbox WHERE aggregate_type = '{}') AS of_kind",
                kind.entity_type
            );
            let client = self.database(database)?;
            let rows = databases::outbox_rows(&client, &table).await?;
            let records = topic::read(&self.kafka.brokers(), kind.topic).await?;
            assert_sound(&check::topic(&rows, &records).problems);
        }
        Ok(())
    }

    /// Waits until it is quiet, requires everything to be right and to be its history's, and ends it.
    pub async fn sound(self) -> Result<()> {
        self.quiet().await?;
        self.right().await?;
        self.published().await?;
        tokio::try_join!(self.plan.reconcile(), self.plan.verify())?;
        let Self {
            shop,
            mut kafka,
            mut postgres,
            ..
        } = self;
        shop.stop().await?;
        kafka.stop().await?;
        postgres.stop().await
    }
}

/// By kind of entity, what happened in its order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Story(BTreeMap<String, Vec<String>>);

impl Story {
    /// Of these kinds of entities alone.
    #[must_use]
    pub fn of(mut self, entities: &[&str]) -> Self {
        self.0.retain(|entity, _| entities.contains(&entity.as_str()));
        self
    }

    /// Requires this to have happened, of each kind of entity that is named, and of no other.
    pub fn require(&self, expected: &[(&str, &[&str])]) -> Result<()> {
        let expected = expected.iter().map(|(entity, lines)| {
            let lines = lines.iter().map(|line| (*line).to_owned()).collect();
            ((*entity).to_owned(), lines)
        });
        let expected = Self(expected.collect());
        ensure!(*self == expected, "{self:#?}\ninstead of {expected:#?}");
        Ok(())
    }
}

/// Of a piece of a product, with an address of its own for mails.
pub fn order_of(product_id: &str, unit_price_minor_units: i64) -> PlaceOrderRequest {
    PlaceOrderRequest {
        request_id: Uuid::new_v4().to_string(),
        user_id: Uuid::new_v4().to_string(),
        items: vec![OrderItem {
            product_id: product_id.to_owned(),
            quantity: 1,
            unit_price_minor_units,
        }],
        currency_code: "EUR".to_owned(),
        user_email: "somebody@example.org".to_owned(),
        payment_method_id: String::new(),
    }
}

pub fn card(number: &str) -> Card {
    Card {
        number: number.to_owned(),
        expiry_month: 12,
        expiry_year: 2040,
        cvv: "123".to_owned(),
    }
}

/// Of all of an order, by a card.
pub fn payment_of(order: &Order, number: &str) -> ProcessPaymentRequest {
    ProcessPaymentRequest {
        request_id: Uuid::new_v4().to_string(),
        user_id: order.user_id.clone(),
        order_id: order.order_id.clone(),
        amount: order.total.clone(),
        method: Some(Method::Card(card(number))),
    }
}

pub async fn pay(
    mut client: PaymentServiceClient<Channel>,
    request: ProcessPaymentRequest,
    deadline: Duration,
) -> Result<Payment, Status> {
    let answer = client.process_payment(within(request, deadline)).await;
    let payment = answer.map(Response::into_inner)?.payment;
    payment.ok_or_else(|| Status::internal("no payment in the answer"))
}

/// By a call that is to be answered within `deadline`.
pub fn within<T>(message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}
