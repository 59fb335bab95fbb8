//! PlaceOrder of order-svc.

use anyhow::{Context, Result, ensure};
use contracts::shop::order::v1::order_service_client::OrderServiceClient;
use contracts::shop::order::v1::{OrderItem, PlaceOrderRequest};
use contracts::topics::{INVENTORY, PAYMENT};
use local_stack::Process;
use local_stack::shop::ORDER_SVC;
use uuid::Uuid;

use super::captured::{self, Fresh};
use super::{Command, Sizes, compare};
use crate::report::Report;
use crate::servers::Servers;
use crate::topics::{self, PARTITIONS};
use crate::ui;

const DATABASE: &str = "orders";

/// As ghz makes it: `{{newUUID}}` is another one each time.
const DATA: &str = r#"{"request_id": "{{newUUID}}", "user_id": "{{newUUID}}", "currency_code": "EUR", "user_email": "anna@example.org",
 "items": [{"product_id": "6f1c0e0a-58f5-4b7b-8a4c-0f6b1c1f7f11", "quantity": 2, "unit_price_minor_units": 1999},
           {"product_id": "0f6b1c1f-58f5-4b7b-8a4c-6f1c0e0a7f12", "quantity": 1, "unit_price_minor_units": 4999}]}"#;

pub(crate) async fn run(servers: &Servers, sizes: Sizes, report: &mut Report) -> Result<()> {
    let mut service = ui::quiet_step("order-svc", start(servers)).await?;
    let address = service.grpc()?.to_string();
    let units = captured::capture(servers, DATABASE, place(service.grpc_url()?)).await?;
    let command = Command {
        title: "PlaceOrder",
        key: "place_order",
        database: DATABASE,
        counted: "INSERT INTO \"orders\"",
        method: "shop.order.v1.OrderService/PlaceOrder",
        address,
        processes: vec![&service],
        fresh: Fresh::of(&units, &[], &[]),
        units,
    };
    compare(servers, sizes, report, command, async || Ok(DATA.to_owned())).await?;
    let status = service.stop().await?;
    ensure!(status.success(), "order-svc ended badly ({status})");
    Ok(())
}

async fn start(servers: &Servers) -> Result<Process> {
    for topic in [INVENTORY, PAYMENT] {
        topics::create(&servers.brokers(), topic, PARTITIONS, None).await?;
    }
    servers.postgres.create_database(DATABASE).await?;
    let builder = Process::builder(ORDER_SVC, servers.folder("commands"))
        .set("kafka.brokers", servers.brokers())
        .set("database.url", servers.url(DATABASE));
    builder.clone().arg("migrate").run_to_end().await?;
    let client = servers.connect(DATABASE).await?;
    client
        .batch_execute("CREATE EXTENSION pg_stat_statements")
        .await?;
    client.batch_execute(captured::FUNCTIONS).await?;
    let mut service = builder.start().await?;
    service.ready().await?;
    Ok(service)
}

/// Places an order, as ghz does, and returns its id and that of the request.
async fn place(url: String) -> Result<Vec<Uuid>> {
    let item = |product_id: &str, quantity, unit_price_minor_units| OrderItem {
        product_id: product_id.to_owned(),
        quantity,
        unit_price_minor_units,
    };
    let request_id = Uuid::new_v4();
    let request = PlaceOrderRequest {
        request_id: request_id.to_string(),
        user_id: Uuid::new_v4().to_string(),
        items: vec![
            item("6f1c0e0a-58f5-4b7b-8a4c-0f6b1c1f7f11", 2, 1999),
            item("0f6b1c1f-58f5-4b7b-8a4c-6f1c0e0a7f12", 1, 4999),
        ],
        currency_code: "EUR".to_owned(),
        user_email: "anna@example.org".to_owned(),
        payment_method_id: String::new(),
    };
    let placed = OrderServiceClient::connect(url)
        .await?
        .place_order(request)
        .await?;
    let order = placed.into_inner().order.context("an answer without an order")?;
    Ok(vec![request_id, Uuid::try_parse(&order.order_id)?])
}
