//! ProcessPayment of payment-svc, with payment-sandbox for the provider. The orders to be paid are written to what payment-svc knows of
//! orders, as the events would.

use anyhow::{Context, Result, ensure};
use chrono::Datelike as _;
use contracts::shop::common::v1::Money;
use contracts::shop::payment::v1::payment_service_client::PaymentServiceClient;
use contracts::shop::payment::v1::process_payment_request::Method;
use contracts::shop::payment::v1::{Card, CreatePaymentMethodRequest, PaymentStatus, ProcessPaymentRequest};
use contracts::topics::ORDER;
use local_stack::Process;
use local_stack::shop::{PAYMENT_SANDBOX, PAYMENT_SVC};
use uuid::Uuid;

use super::captured::{self, Fresh};
use super::{Command, Sizes, compare};
use crate::report::Report;
use crate::servers::Servers;
use crate::topics::{self, PARTITIONS};
use crate::ui;

const DATABASE: &str = "payments";

/// Of whom all orders are, and what each costs.
const USER: Uuid = Uuid::from_u128(0x5a3c_f0de_0000_4000_8000_0000_0000_0001);
const TOTAL: i64 = 8_997;

/// More calls a second than this there are not.
const MOST: u64 = 3_000;

/// Orders are numbered; pgbench takes their numbers from a sequence, and so does the harness for ghz, many at once.
const ORDERS: &str = "
CREATE SEQUENCE bench_orders;
CREATE FUNCTION bench_order(number bigint) RETURNS uuid LANGUAGE sql IMMUTABLE
    AS $$ SELECT ('0f000000-0000-4000-8000-' || lpad(to_hex(number), 12, '0'))::uuid $$";

struct Running {
    sandbox: Process,
    service: Process,
}

pub(crate) async fn run(servers: &Servers, sizes: Sizes, report: &mut Report) -> Result<()> {
    let Running {
        mut sandbox,
        mut service,
    } = ui::quiet_step("payment-svc and payment-sandbox", start(servers)).await?;
    // Each of the three contenders, each time.
    let enough = MOST * sizes.load().as_secs() * 3 * u64::from(sizes.runs);
    ui::quiet_step("orders to be paid", seed(servers, enough)).await?;
    let mut client = PaymentServiceClient::connect(service.grpc_url()?).await?;
    let method = CreatePaymentMethodRequest {
        request_id: Uuid::new_v4().to_string(),
        user_id: USER.to_string(),
        card: Some(Card {
            // The sandbox's own for payments that succeed.
            number: "4242424242424242".to_owned(),
            expiry_month: 12,
            expiry_year: chrono::Utc::now().year() + 3,
            cvv: "123".to_owned(),
        }),
    };
    let method = client
        .create_payment_method(method)
        .await?
        .into_inner()
        .payment_method;
    let method = Uuid::try_parse(&method.context("an answer without a method")?.payment_method_id)?;

    let order = order(take(servers, 1).await?);
    let pay = async {
        let request_id = Uuid::new_v4();
        let request = ProcessPaymentRequest {
            request_id: request_id.to_string(),
            user_id: USER.to_string(),
            order_id: order.to_string(),
            amount: Some(Money {
                minor_units: TOTAL,
                currency_code: "EUR".to_owned(),
            }),
            method: Some(Method::PaymentMethodId(method.to_string())),
        };
        let paid = client.process_payment(request).await?.into_inner().payment;
        let paid = paid.context("an answer without a payment")?;
        ensure!(
            paid.status() == PaymentStatus::Received,
            "the payment is {:?}",
            paid.status()
        );
        Ok(vec![request_id, order, Uuid::try_parse(&paid.payment_id)?])
    };
    let units = captured::capture(servers, DATABASE, pay).await?;
    let next = "bench_order(nextval('bench_orders'))";
    let command = Command {
        title: "ProcessPayment",
        key: "process_payment",
        database: DATABASE,
        counted: "INSERT INTO \"payments\"",
        method: "shop.payment.v1.PaymentService/ProcessPayment",
        address: service.grpc()?.to_string(),
        processes: vec![&service, &sandbox],
        fresh: Fresh::of(&units, &[USER, method], &[(order, next)]),
        units,
    };
    let data = async || {
        let first = take(servers, MOST * sizes.load().as_secs()).await?;
        Ok(format!(
            r#"{{"request_id": "{{{{newUUID}}}}", "user_id": "{USER}", "payment_method_id": "{method}",
             "order_id": "{{{{printf `0f000000-0000-4000-8000-%012x` (add {first} .RequestNumber)}}}}",
             "amount": {{"minor_units": {TOTAL}, "currency_code": "EUR"}}}}"#
        ))
    };
    compare(servers, sizes, report, command, data).await?;
    for process in [&mut service, &mut sandbox] {
        let status = process.stop().await?;
        ensure!(status.success(), "{} ended badly ({status})", process.name());
    }
    Ok(())
}

async fn start(servers: &Servers) -> Result<Running> {
    topics::create(&servers.brokers(), ORDER, PARTITIONS, None).await?;
    servers.postgres.create_database(DATABASE).await?;
    let folder = servers.folder("commands");
    let mut sandbox = Process::builder(PAYMENT_SANDBOX, &folder)
        .set(
            "storage.path",
            folder.join("payment-sandbox.redb").to_string_lossy(),
        )
        .start()
        .await?;
    sandbox.ready().await?;
    let builder = Process::builder(PAYMENT_SVC, folder)
        .set("kafka.brokers", servers.brokers())
        .set("database.url", servers.url(DATABASE))
        .set("provider.base_url", sandbox.http_url()?)
        .set("provider.secret_key", "sk_test_sandbox");
    builder.clone().arg("migrate").run_to_end().await?;
    let mut service = builder.start().await?;
    service.ready().await?;
    Ok(Running { sandbox, service })
}

async fn seed(servers: &Servers, orders: u64) -> Result<()> {
    let client = servers.connect(DATABASE).await?;
    client
        .batch_execute("CREATE EXTENSION pg_stat_statements")
        .await?;
    client.batch_execute(captured::FUNCTIONS).await?;
    client.batch_execute(ORDERS).await?;
    client
        .execute(
            "INSERT INTO known_orders (order_id, user_id, total_minor_units, currency, reserved, closed, cancelled, version)
             SELECT bench_order(number), $1, $2, 'EUR', true, false, false, 2 FROM generate_series(1, $3::bigint) number",
            &[&USER, &TOTAL, &i64::try_from(orders)?],
        )
        .await?;
    client.batch_execute("VACUUM ANALYZE").await?;
    Ok(())
}

/// The first of so many numbers that nobody else gets.
async fn take(servers: &Servers, numbers: u64) -> Result<i64> {
    let client = servers.connect(DATABASE).await?;
    let first = client
        .query_one("SELECT nextval('bench_orders')", &[])
        .await?
        .get(0);
    let last = first + i64::try_from(numbers)?;
    client
        .execute("SELECT setval('bench_orders', $1)", &[&last])
        .await?;
    Ok(first)
}

/// As `bench_order` has it.
fn order(number: i64) -> Uuid {
    Uuid::from_u128(0x0f00_0000_0000_4000_8000_0000_0000_0000 | number as u128)
}
