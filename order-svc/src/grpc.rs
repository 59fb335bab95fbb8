//! The gRPC face: parses requests, calls the app, turns its errors into statuses.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use contracts::shop::order::v1 as proto;
use contracts::shop::order::v1::order_service_server::OrderService;
use contracts::wire::timestamp;
use event_store::StoredEvent;
use service::deadline::Deadline;
use service::requests::RequestKey;
use service::status::Domain;
use service::telemetry::{chain, trace_id};
use service::validate::Fields;
use tonic::{Code, Request, Response, Status};

use crate::app::{CancelOrder, CommandError, MarkDelivered, Orders, PlaceOrder, ShipOrder};
use crate::domain::{
    Currency, Items, ItemsError, Line, MAX_ITEMS, OrderId, PaymentMethodId, ProductId, Refusal, Shipment,
    UserId,
};
use crate::store::StoreError;

/// Whose reasons the errors give.
pub const DOMAIN: Domain = Domain("order.shop");

/// The longest reason of a cancellation, in characters.
const MAX_REASON: usize = 500;
/// The longest carrier and the longest tracking number, in characters.
const MAX_SHIPMENT: usize = 100;
const DEFAULT_PAGE: u16 = 100;
const MAX_PAGE: u16 = 1000;

/// The service over the app.
#[derive(Debug, Clone)]
pub struct OrderGrpc {
    orders: Orders,
    max_deadline: std::time::Duration,
}

impl OrderGrpc {
    /// `max_deadline` is for calls that bring none.
    pub fn new(orders: Orders, max_deadline: std::time::Duration) -> Self {
        Self { orders, max_deadline }
    }
}

#[tonic::async_trait]
impl OrderService for OrderGrpc {
    async fn place_order(
        &self,
        request: Request<proto::PlaceOrderRequest>,
    ) -> Result<Response<proto::PlaceOrderResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let command = PlaceOrder::try_from(request.into_inner())?;
        Ok(Response::new(self.orders.place(deadline, command).await?))
    }

    async fn cancel_order(
        &self,
        request: Request<proto::CancelOrderRequest>,
    ) -> Result<Response<proto::CancelOrderResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let command = CancelOrder::try_from(request.into_inner())?;
        Ok(Response::new(self.orders.cancel(deadline, command).await?))
    }

    async fn ship_order(
        &self,
        request: Request<proto::ShipOrderRequest>,
    ) -> Result<Response<proto::ShipOrderResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let command = ShipOrder::try_from(request.into_inner())?;
        Ok(Response::new(self.orders.ship(deadline, command).await?))
    }

    async fn mark_delivered(
        &self,
        request: Request<proto::MarkDeliveredRequest>,
    ) -> Result<Response<proto::MarkDeliveredResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let command = MarkDelivered::try_from(request.into_inner())?;
        Ok(Response::new(
            self.orders.mark_delivered(deadline, command).await?,
        ))
    }

    async fn get_order(
        &self,
        request: Request<proto::GetOrderRequest>,
    ) -> Result<Response<proto::GetOrderResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let request = request.into_inner();
        let mut fields = Fields::new();
        let user = fields.uuid("user_id", &request.user_id);
        let order = fields.uuid("order_id", &request.order_id);
        let (user, order) = fields.finish(DOMAIN, user.zip(order))?;
        let order = self.orders.get(deadline, UserId(user), OrderId(order)).await?;
        Ok(Response::new(proto::GetOrderResponse {
            order: Some((&order).into()),
        }))
    }

    async fn get_order_history(
        &self,
        request: Request<proto::GetOrderHistoryRequest>,
    ) -> Result<Response<proto::GetOrderHistoryResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let request = request.into_inner();
        let mut fields = Fields::new();
        let user = fields.uuid("user_id", &request.user_id);
        let order = fields.uuid("order_id", &request.order_id);
        let size = fields.page_size("page_size", request.page_size, DEFAULT_PAGE, MAX_PAGE);
        let after = match order {
            Some(id) if !request.page_token.is_empty() => PageToken::parse(&request.page_token, OrderId(id))
                .or_else(|| fields.reject("page_token", "must be a next_page_token of the same order")),
            _ => Some(PageToken { after: 0 }),
        };
        let all = user.zip(order).zip(size.zip(after));
        let ((user, order), (size, after)) = fields.finish(DOMAIN, all)?;
        let id = OrderId(order);
        let mut events = self
            .orders
            .history(deadline, UserId(user), id, after.after, size + 1)
            .await?;
        let next_page_token = if events.len() > usize::from(size) {
            events.truncate(usize::from(size));
            events
                .last()
                .map(|last| PageToken { after: last.version }.text(id))
                .unwrap_or_default()
        } else {
            String::new()
        };
        let events = events.into_iter().map(history_event).collect::<Result<_, _>>()?;
        Ok(Response::new(proto::GetOrderHistoryResponse {
            events,
            next_page_token,
        }))
    }
}

impl TryFrom<proto::PlaceOrderRequest> for PlaceOrder {
    type Error = Status;

    fn try_from(request: proto::PlaceOrderRequest) -> Result<Self, Status> {
        let mut fields = Fields::new();
        let request_id = fields.uuid("request_id", &request.request_id);
        let user_id = fields.uuid("user_id", &request.user_id);
        let user_email = fields.optional_email("user_email", &request.user_email);
        let payment_method_id = fields.optional_uuid("payment_method_id", &request.payment_method_id);
        let currency = Currency::from_code(&request.currency_code).or_else(|| {
            fields.reject(
                "currency_code",
                "must be the upper-case ISO 4217 code of a currency",
            )
        });
        let items = parse_items(&mut fields, &request.items, currency);
        let all = request_id.zip(user_id).zip(items);
        let ((request_id, user_id), items) = fields.finish(DOMAIN, all)?;
        let method = "shop.order.v1.OrderService/PlaceOrder";
        Ok(Self {
            request: RequestKey::new(user_id, method, request_id, &request),
            user_id: UserId(user_id),
            items,
            user_email,
            payment_method_id: payment_method_id.map(PaymentMethodId),
        })
    }
}

fn parse_items(fields: &mut Fields, items: &[proto::OrderItem], currency: Option<Currency>) -> Option<Items> {
    if items.is_empty() || items.len() > MAX_ITEMS {
        return fields.reject("items", "must have 1 to 100 items");
    }
    let line = |(index, item): (usize, &proto::OrderItem)| {
        let product_id = fields.uuid(&format!("items[{index}].product_id"), &item.product_id)?;
        let (quantity, unit_price) = (item.quantity, item.unit_price_minor_units);
        Some(Line {
            product_id: ProductId(product_id),
            quantity,
            unit_price,
        })
    };
    // All products are looked at, for a list of everything that is wrong with them.
    let lines: Vec<Option<Line>> = items.iter().enumerate().map(line).collect();
    let lines = lines.into_iter().collect::<Option<Vec<Line>>>()?;
    let error = match Items::new(lines, currency?) {
        Ok(items) => return Some(items),
        Err(error) => error,
    };
    match error {
        ItemsError::Count => fields.reject("items", "must have 1 to 100 items"),
        ItemsError::Repeated(index) => fields.reject(
            format!("items[{index}].product_id"),
            "appears in another item already",
        ),
        ItemsError::Quantity(index) => {
            fields.reject(format!("items[{index}].quantity"), "must be 1 to 10000")
        }
        ItemsError::Price(index) => fields.reject(
            format!("items[{index}].unit_price_minor_units"),
            "must be positive",
        ),
        ItemsError::LineTotal(index) => fields.reject(
            format!("items[{index}].unit_price_minor_units"),
            "times the quantity is too large",
        ),
        ItemsError::Total => fields.reject("items", "cost more than can be expressed"),
    }
}

impl TryFrom<proto::CancelOrderRequest> for CancelOrder {
    type Error = Status;

    fn try_from(request: proto::CancelOrderRequest) -> Result<Self, Status> {
        let mut fields = Fields::new();
        let request_id = fields.uuid("request_id", &request.request_id);
        let user_id = fields.uuid("user_id", &request.user_id);
        let order_id = fields.uuid("order_id", &request.order_id);
        let reason = fields.text("reason", &request.reason, MAX_REASON);
        let expected_version = expected_version(&mut fields, request.expected_version);
        let all = request_id
            .zip(user_id)
            .zip(order_id)
            .zip(reason)
            .zip(expected_version);
        let ((((request_id, user_id), order_id), reason), expected_version) = fields.finish(DOMAIN, all)?;
        let method = "shop.order.v1.OrderService/CancelOrder";
        Ok(Self {
            request: RequestKey::new(user_id, method, request_id, &request),
            user_id: UserId(user_id),
            order_id: OrderId(order_id),
            reason,
            expected_version,
        })
    }
}

impl TryFrom<proto::ShipOrderRequest> for ShipOrder {
    type Error = Status;

    fn try_from(request: proto::ShipOrderRequest) -> Result<Self, Status> {
        let mut fields = Fields::new();
        let request_id = fields.uuid("request_id", &request.request_id);
        let order_id = fields.uuid("order_id", &request.order_id);
        let carrier = words(&mut fields, "carrier", &request.carrier);
        let tracking_number = words(&mut fields, "tracking_number", &request.tracking_number);
        let expected_version = expected_version(&mut fields, request.expected_version);
        let all = request_id
            .zip(order_id)
            .zip(carrier)
            .zip(tracking_number)
            .zip(expected_version);
        let ((((request_id, order_id), carrier), tracking_number), expected_version) =
            fields.finish(DOMAIN, all)?;
        let method = "shop.order.v1.OrderService/ShipOrder";
        Ok(Self {
            request: RequestKey::new(order_id, method, request_id, &request),
            order_id: OrderId(order_id),
            shipment: Shipment {
                tracking_number,
                carrier,
            },
            expected_version,
        })
    }
}

impl TryFrom<proto::MarkDeliveredRequest> for MarkDelivered {
    type Error = Status;

    fn try_from(request: proto::MarkDeliveredRequest) -> Result<Self, Status> {
        let mut fields = Fields::new();
        let request_id = fields.uuid("request_id", &request.request_id);
        let order_id = fields.uuid("order_id", &request.order_id);
        let expected_version = expected_version(&mut fields, request.expected_version);
        let all = request_id.zip(order_id).zip(expected_version);
        let ((request_id, order_id), expected_version) = fields.finish(DOMAIN, all)?;
        let method = "shop.order.v1.OrderService/MarkDelivered";
        Ok(Self {
            request: RequestKey::new(order_id, method, request_id, &request),
            order_id: OrderId(order_id),
            expected_version,
        })
    }
}

/// Text of a shipment, which must say something.
fn words(fields: &mut Fields, field: &str, text: &str) -> Option<String> {
    if text.trim().is_empty() {
        return fields.reject(field, "must not be empty");
    }
    fields.text(field, text, MAX_SHIPMENT)
}

/// `Some(None)` when it does not matter.
fn expected_version(fields: &mut Fields, version: i64) -> Option<Option<i64>> {
    match version {
        0 => Some(None),
        version if version > 0 => Some(Some(version)),
        _ => fields.reject("expected_version", "must not be negative"),
    }
}

impl From<CommandError> for Status {
    fn from(error: CommandError) -> Self {
        match error {
            CommandError::NotFound => not_found(),
            CommandError::VersionMismatch => {
                let message = "the order is not at expected_version: read it again";
                DOMAIN.status(Code::Aborted, "VERSION_MISMATCH", message).build()
            }
            CommandError::Refused(refusal) => refused(&refusal),
            CommandError::Request(error) => error.to_status(DOMAIN),
            CommandError::Store(StoreError::Database(error)) => error.to_status(DOMAIN),
            // The row was locked, so this takes two orders of one id; a repeat tells.
            CommandError::Store(StoreError::Conflict(_)) => DOMAIN
                .status(
                    Code::Aborted,
                    "CONCURRENT_CHANGE",
                    "another command came first: try again",
                )
                .build(),
            CommandError::Store(error @ (StoreError::Broken { .. } | StoreError::Undecodable { .. })) => {
                tracing::error!(error = %chain(&error), "an order cannot be read");
                internal()
            }
        }
    }
}

fn not_found() -> Status {
    DOMAIN
        .status(Code::NotFound, "ORDER_NOT_FOUND", "there is no such order")
        .build()
}

fn internal() -> Status {
    DOMAIN
        .status(Code::Internal, "INTERNAL", "internal error")
        .build()
}

fn refused(refusal: &Refusal) -> Status {
    let reason = match refusal {
        Refusal::Unknown => return not_found(),
        Refusal::Cancelled => "ORDER_CANCELLED",
        Refusal::Shipped => "ORDER_SHIPPED",
        Refusal::Delivered => "ORDER_DELIVERED",
        Refusal::NotConfirmed => "ORDER_NOT_CONFIRMED",
        Refusal::NotShipped => "ORDER_NOT_SHIPPED",
        Refusal::Exists
        | Refusal::PayByPassed
        | Refusal::PaidOtherwise
        | Refusal::WrongAmount
        | Refusal::NotDue
        | Refusal::Inconsistent(_) => {
            tracing::error!(error = %chain(refusal), "a command met a state that should not exist");
            return internal();
        }
    };
    let message = refusal.to_string();
    DOMAIN
        .status(Code::FailedPrecondition, reason, message.clone())
        .precondition("ORDER_STATUS", "order", &message)
        .build()
}

fn history_event(event: StoredEvent) -> Result<proto::OrderHistoryEvent, Status> {
    let payload = contracts::catalogue::payload_json(&event.event_type, event.schema_version, &event.payload);
    let payload_json = payload.map_err(|error| {
        tracing::error!(error = %chain(&error), event.id = %event.event_id, "a stored event cannot be shown");
        internal()
    })?;
    Ok(proto::OrderHistoryEvent {
        event_id: event.event_id.to_string(),
        version: event.version,
        schema_version: event.schema_version,
        occurred_at: Some(timestamp(event.occurred_at)),
        correlation_id: event.correlation_id.to_string(),
        causation_id: event.causation_id.map(|id| id.to_string()).unwrap_or_default(),
        trace_id: event
            .traceparent
            .as_deref()
            .and_then(trace_id)
            .unwrap_or_default()
            .to_owned(),
        payload_json: payload_json.to_string(),
        r#type: event.event_type,
    })
}

/// Where the next page of a history begins; opaque to clients, bound to its order.
struct PageToken {
    after: i64,
}

impl PageToken {
    fn text(&self, id: OrderId) -> String {
        BASE64.encode(format!("{id}:{}", self.after))
    }

    fn parse(text: &str, id: OrderId) -> Option<Self> {
        let decoded = String::from_utf8(BASE64.decode(text).ok()?).ok()?;
        let after = decoded.strip_prefix(&format!("{id}:"))?.parse().ok()?;
        (after > 0).then_some(Self { after })
    }
}
