//! From a client's call to the read model, and what operators see of the processes on the way.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use contracts::shop::order::v1::order_service_client::OrderServiceClient;
use contracts::shop::order::v1::{
    CancelOrderRequest, GetOrderHistoryRequest, Order, OrderStatus, PlaceOrderRequest,
};
use contracts::shop::orderquery::v1::order_query_service_client::OrderQueryServiceClient;
use contracts::shop::orderquery::v1::{
    GetOrderViewRequest, ListOrdersRequest, OrderView, WatchOrderRequest, WatchOrderResponse,
};
use local_stack::process::http_get;
use local_stack::testing::Folder;
use local_stack::{Process, wait};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tests::load::place_request;
use tests::shop::{self, Shop, order_client, view_client};
use tests::{PATIENCE, databases, seed, topic};
use tokio_stream::StreamExt as _;
use tonic::transport::Channel;
use tonic::{Request, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use uuid::Uuid;

const DEADLINE: Duration = Duration::from_secs(60);
/// A stop is an orderly one: half a second as NOT_SERVING, then whatever is under way.
const STOP: Duration = Duration::from_secs(20);

struct Running {
    order_svc: Process,
    relay: Process,
    queries: Vec<Process>,
}

impl Running {
    async fn start(shop: &Shop) -> Result<Self> {
        let debug = "info,consumer=debug";
        let mut running = Self {
            order_svc: shop.order_svc().start().await?,
            relay: shop.outbox_relay().start().await?,
            queries: vec![
                shop.order_query_svc(1).set("log.level", debug).start().await?,
                shop.order_query_svc(2).set("log.level", debug).start().await?,
            ],
        };
        for process in running.all() {
            process.ready().await?;
        }
        Ok(running)
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Process> {
        [&mut self.order_svc, &mut self.relay]
            .into_iter()
            .chain(&mut self.queries)
    }

    fn views(&self) -> Result<Vec<OrderQueryServiceClient<Channel>>> {
        self.queries.iter().map(view_client).collect()
    }
}

fn with_deadline<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(DEADLINE);
    request
}

async fn place(client: &mut OrderServiceClient<Channel>, request: PlaceOrderRequest) -> Result<Order> {
    let answer = client.place_order(with_deadline(request)).await?.into_inner();
    answer.order.context("no order")
}

async fn cancel(client: &mut OrderServiceClient<Channel>, order: &Order) -> Result<Order> {
    let request = CancelOrderRequest {
        request_id: Uuid::new_v4().to_string(),
        user_id: order.user_id.clone(),
        order_id: order.order_id.clone(),
        reason: "changed my mind".to_owned(),
        expected_version: order.version,
    };
    let answer = client.cancel_order(with_deadline(request)).await?.into_inner();
    answer.order.context("no order")
}

async fn view(client: &mut OrderQueryServiceClient<Channel>, order: &Order) -> Result<OrderView> {
    let request = GetOrderViewRequest {
        user_id: order.user_id.clone(),
        order_id: order.order_id.clone(),
        at_least_version: order.version,
    };
    let answer = client.get_order_view(with_deadline(request)).await?.into_inner();
    answer.order.context("no view")
}

/// What the read model has to say about an order.
fn expected_view(order: &Order) -> OrderView {
    OrderView {
        order_id: order.order_id.clone(),
        user_id: order.user_id.clone(),
        status: order.status,
        items: order.items.clone(),
        total: order.total.clone(),
        version: order.version,
        placed_at: order.created_at,
        updated_at: order.updated_at,
        pay_by: order.pay_by,
        cancel_reason: order.cancel_reason.clone(),
        tracking_number: order.tracking_number.clone(),
        carrier: order.carrier.clone(),
        payments: Vec::new(),
        parked: false,
    }
}

async fn next(watch: &mut Streaming<WatchOrderResponse>) -> Result<Option<OrderView>> {
    let next = tokio::time::timeout(PATIENCE, watch.next()).await?;
    match next {
        Some(answer) => Ok(Some(answer?.order.context("no order")?)),
        None => Ok(None),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_read_what_they_wrote_from_any_replica() {
    tests::run("end-to-end", read_your_writes).await;
}

async fn read_your_writes(folder: &Folder) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed("end_to_end"));
    let shop = Shop::new(folder).await?;
    let mut running = Running::start(&shop).await?;
    let mut orders = order_client(&running.order_svc)?;
    let mut views = running.views()?;

    // One user's orders, each read at once, in turn from either replica.
    let user_id = Uuid::new_v4().to_string();
    let mut mine = Vec::new();
    for turn in 0..20 {
        let mut request = place_request(&mut rng);
        request.user_id.clone_from(&user_id);
        let order = place(&mut orders, request).await?;
        let found = view(&mut views[turn % 2], &order).await?;
        ensure!(found == expected_view(&order), "{found:?} instead of {order:?}");
        mine.push(order);
    }

    // Each replica watches orders whose events the other may get.
    for order in &mut mine[..4] {
        let mut watches = Vec::new();
        for views in &mut views {
            let request = WatchOrderRequest {
                user_id: user_id.clone(),
                order_id: order.order_id.clone(),
            };
            let mut watch = views.watch_order(Request::new(request)).await?.into_inner();
            let now = next(&mut watch).await?;
            ensure!(now == Some(expected_view(order)), "{now:?}");
            watches.push(watch);
        }
        *order = cancel(&mut orders, order).await?;
        for mut watch in watches {
            let then = next(&mut watch).await?;
            ensure!(then == Some(expected_view(order)), "{then:?}");
            ensure!(
                next(&mut watch).await?.is_none(),
                "the stream of a cancelled order goes on"
            );
        }
        for views in &mut views {
            let found = view(views, order).await?;
            ensure!(found == expected_view(order), "{found:?}");
        }
    }

    // Both list the same, newest first, page after page.
    mine.reverse();
    let cancelled = OrderStatus::Cancelled;
    for views in &mut views {
        for status in [OrderStatus::Unspecified, cancelled] {
            let mut listed = Vec::new();
            let mut request = ListOrdersRequest {
                user_id: user_id.clone(),
                status: status.into(),
                page_size: 3,
                page_token: String::new(),
            };
            loop {
                let page = views
                    .list_orders(with_deadline(request.clone()))
                    .await?
                    .into_inner();
                listed.extend(page.orders);
                if page.next_page_token.is_empty() {
                    break;
                }
                request.page_token = page.next_page_token;
            }
            let expected: Vec<OrderView> = mine
                .iter()
                .filter(|order| status != cancelled || order.status() == cancelled)
                .map(expected_view)
                .collect();
            ensure!(listed == expected, "{listed:#?} instead of {expected:#?}");
        }
    }

    for process in running.all() {
        let (name, started) = (process.name().to_owned(), Instant::now());
        let status = process.stop_within(STOP).await?;
        ensure!(
            status.success() && started.elapsed() < STOP,
            "{name} ended with {status}"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_goes_from_the_client_to_the_projection() {
    tests::run("trace", follow_a_trace).await;
}

async fn follow_a_trace(folder: &Folder) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed("trace"));
    let shop = Shop::new(folder).await?;
    let running = Running::start(&shop).await?;
    let mut orders = order_client(&running.order_svc)?;
    let trace_id = Uuid::new_v4().simple().to_string();
    let mut request = with_deadline(place_request(&mut rng));
    let traceparent = format!("00-{trace_id}-b7ad6b7169203331-01");
    request.metadata_mut().insert("traceparent", traceparent.parse()?);
    let order = orders.place_order(request).await?.into_inner().order;
    let order = order.context("no order")?;
    view(&mut running.views()?[0], &order).await?;

    let of = |traceparent: &str| traceparent.split('-').nth(1).map(str::to_owned);
    let sql = shop.orders.connect().await?;
    let row = sql
        .query_one(
            "SELECT traceparent FROM outbox WHERE aggregate_id = $1",
            &[&order.order_id],
        )
        .await?;
    let stored: String = row.get(0);
    ensure!(of(&stored) == Some(trace_id.clone()), "in the outbox: {stored}");
    let records = topic::read(&shop.brokers, &shop.topic).await?;
    let carried = records
        .first()
        .and_then(|record| record.header("traceparent"))
        .context("no record with a traceparent")?;
    ensure!(carried == stored, "on Kafka: {carried}, in the outbox: {stored}");
    let history = GetOrderHistoryRequest {
        user_id: order.user_id.clone(),
        order_id: order.order_id.clone(),
        ..Default::default()
    };
    let history = orders
        .get_order_history(with_deadline(history))
        .await?
        .into_inner();
    let shown: Vec<&str> = history
        .events
        .iter()
        .map(|event| event.trace_id.as_str())
        .collect();
    ensure!(shown == [trace_id.as_str()], "in the history: {shown:?}");

    // One of the replicas says that it applied the event, order-svc that it recorded it.
    let mut logs: Vec<&Process> = running.queries.iter().collect();
    wait::until("the projection's log has the trace", PATIENCE, || {
        let found = logs
            .iter()
            .any(|process| has_line(process, &trace_id, "event applied"));
        async move { Ok(found.then_some(())) }
    })
    .await?;
    logs = vec![&running.order_svc];
    wait::until("the service's log has the trace", PATIENCE, || {
        let found = logs
            .iter()
            .any(|process| has_line(process, &trace_id, "order.placed"));
        async move { Ok(found.then_some(())) }
    })
    .await
}

/// Whether a process has logged a line of JSON with these texts.
fn has_line(process: &Process, trace_id: &str, message: &str) -> bool {
    let log = std::fs::read_to_string(process.log()).unwrap_or_default();
    log.lines().any(|line| {
        let Ok(fields) = serde_json::from_str::<serde_json::Value>(line) else {
            return false;
        };
        fields["message"]
            .as_str()
            .is_some_and(|text| text.contains(message))
            && line.contains(trace_id)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_can_look_into_every_process_and_stop_it() {
    tests::run("operators", look_and_stop).await;
}

async fn look_and_stop(folder: &Folder) -> Result<()> {
    let shop = Shop::new(folder).await?;
    let mut running = Running::start(&shop).await?;
    let mut orders = order_client(&running.order_svc)?;
    let order = place(&mut orders, place_request(&mut StdRng::seed_from_u64(1))).await?;
    for views in &mut running.views()? {
        view(views, &order).await?;
    }
    databases::published(&shop.orders.connect().await?).await?;

    for (process, service) in [
        (&running.order_svc, "shop.order.v1.OrderService"),
        (&running.queries[0], "shop.orderquery.v1.OrderQueryService"),
    ] {
        let channel = shop::channel(process)?;
        let mut health = HealthClient::new(channel.clone());
        for name in ["", service] {
            let request = HealthCheckRequest {
                service: name.to_owned(),
            };
            let status = health.check(with_deadline(request)).await?.into_inner().status();
            ensure!(
                status == ServingStatus::Serving,
                "{service} is {status:?} as {name:?}"
            );
        }
        for listed in [
            services_v1(channel.clone()).await?,
            services_v1alpha(channel).await?,
        ] {
            ensure!(
                listed.iter().any(|name| name == service),
                "{service} is not among {listed:?}"
            );
        }
    }

    for (process, metrics) in [
        (
            &running.order_svc,
            ["rpc_server_call_duration", "db_pool_connections"],
        ),
        (
            &running.relay,
            ["outbox_relay_published_total", "outbox_relay_leader"],
        ),
        (
            &running.queries[0],
            ["rpc_server_call_duration", "consumer_messages_total"],
        ),
    ] {
        let text = process.metrics().await?;
        for metric in metrics.into_iter().chain(["build_info"]) {
            ensure!(
                text.contains(metric),
                "{} has no metric {metric}:\n{text}",
                process.name()
            );
        }
        ensure!(
            !text.contains(&order.order_id),
            "{} has an id in its metrics",
            process.name()
        );
        for path in ["/livez", "/readyz"] {
            let (code, body) = http_get(process.admin()?, path).await?;
            ensure!(
                code == 200,
                "{} answers {path} with {code}: {body}",
                process.name()
            );
        }
    }

    for process in running.all() {
        let (name, started) = (process.name().to_owned(), Instant::now());
        let status = process.stop_within(STOP).await?;
        ensure!(
            status.success() && started.elapsed() < STOP,
            "{name} ended with {status} after {:?}",
            started.elapsed()
        );
    }
    Ok(())
}

async fn services_v1(channel: Channel) -> Result<Vec<String>> {
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let requests = with_deadline(tokio_stream::once(request));
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(requests)
        .await?
        .into_inner();
    match answers
        .message()
        .await?
        .and_then(|answer| answer.message_response)
    {
        Some(MessageResponse::ListServicesResponse(list)) => {
            Ok(list.service.into_iter().map(|service| service.name).collect())
        }
        other => anyhow::bail!("reflection answers {other:?}"),
    }
}

async fn services_v1alpha(channel: Channel) -> Result<Vec<String>> {
    use tonic_reflection::pb::v1alpha::ServerReflectionRequest;
    use tonic_reflection::pb::v1alpha::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1alpha::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1alpha::server_reflection_response::MessageResponse;
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let requests = with_deadline(tokio_stream::once(request));
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(requests)
        .await?
        .into_inner();
    match answers
        .message()
        .await?
        .and_then(|answer| answer.message_response)
    {
        Some(MessageResponse::ListServicesResponse(list)) => {
            Ok(list.service.into_iter().map(|service| service.name).collect())
        }
        other => anyhow::bail!("reflection answers {other:?}"),
    }
}
