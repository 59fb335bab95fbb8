//! The service on the wire: parses, asks, answers.

use std::pin::Pin;
use std::time::Duration;

use contracts::shop::common::v1::Money;
use contracts::shop::order::v1 as order;
use contracts::shop::orderquery::v1 as wire;
use contracts::shop::orderquery::v1::order_query_service_server::OrderQueryService;
use contracts::shop::payment::v1 as payment;
use contracts::wire::timestamp;
use futures::{Stream, StreamExt as _};
use service::deadline::Deadline;
use service::status::{Domain, RETRY_DELAY};
use service::validate::Fields;
use tonic::{Code, Request, Response, Status};
use uuid::Uuid;

use crate::app::{Queries, QueryError};
use crate::domain::journey::{Journey, ParkedRecord, Reservation, ReservationStatus, Step};
use crate::domain::{self, Payment, PaymentStatus, View};
use crate::page;

/// Whose reasons the errors give.
pub const DOMAIN: Domain = Domain("orderquery.shop");

const DEFAULT_PAGE: u16 = 50;
const MAX_PAGE: u16 = 200;

/// `shop.orderquery.v1.OrderQueryService`.
#[derive(Debug, Clone)]
pub struct OrderQueries {
    queries: Queries,
    max_deadline: Duration,
}

impl OrderQueries {
    /// `max_deadline` is for calls that did not come through a server which knows their deadline.
    pub fn new(queries: Queries, max_deadline: Duration) -> Self {
        Self {
            queries,
            max_deadline,
        }
    }
}

type Answers = Pin<Box<dyn Stream<Item = Result<wire::WatchOrderResponse, Status>> + Send>>;

#[tonic::async_trait]
impl OrderQueryService for OrderQueries {
    async fn get_order_view(
        &self,
        request: Request<wire::GetOrderViewRequest>,
    ) -> Result<Response<wire::GetOrderViewResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let wire::GetOrderViewRequest {
            user_id,
            order_id,
            at_least_version,
        } = request.get_ref();
        let mut fields = Fields::new();
        let whose = order_of_user(&mut fields, user_id, order_id, *at_least_version);
        let (user_id, order_id) = fields.finish(DOMAIN, whose)?;
        let view = self
            .queries
            .view(user_id, order_id, *at_least_version, deadline)
            .await?;
        Ok(Response::new(wire::GetOrderViewResponse {
            order: Some(view.into()),
        }))
    }

    async fn get_order_journey(
        &self,
        request: Request<wire::GetOrderJourneyRequest>,
    ) -> Result<Response<wire::GetOrderJourneyResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let wire::GetOrderJourneyRequest {
            user_id,
            order_id,
            at_least_version,
        } = request.get_ref();
        let mut fields = Fields::new();
        let whose = order_of_user(&mut fields, user_id, order_id, *at_least_version);
        let (user_id, order_id) = fields.finish(DOMAIN, whose)?;
        let journey = self
            .queries
            .journey(user_id, order_id, *at_least_version, deadline)
            .await?;
        Ok(Response::new(journey.into()))
    }

    async fn list_orders(
        &self,
        request: Request<wire::ListOrdersRequest>,
    ) -> Result<Response<wire::ListOrdersResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let wire::ListOrdersRequest {
            user_id,
            status,
            page_size,
            page_token,
        } = request.get_ref();
        let mut fields = Fields::new();
        let user_id = fields.uuid("user_id", user_id);
        let only = match order::OrderStatus::try_from(*status) {
            Ok(status) => from_wire(status),
            Err(_) => fields.reject("status", "must be a known status"),
        };
        let page_size = fields.page_size("page_size", *page_size, DEFAULT_PAGE, MAX_PAGE);
        let query = user_id.map(|user_id| page::Query {
            user_id,
            status: *status,
        });
        let after = match query {
            Some(query) if !page_token.is_empty() => page::position(query, page_token)
                .or_else(|| fields.reject("page_token", "must come from the same query")),
            _ => None,
        };
        let (query, page_size) = fields.finish(DOMAIN, query.zip(page_size))?;
        let page = self
            .queries
            .list(query.user_id, only, after, page_size, deadline)
            .await?;
        Ok(Response::new(wire::ListOrdersResponse {
            orders: page.orders.into_iter().map(Into::into).collect(),
            next_page_token: page.next.map(|next| page::token(query, next)).unwrap_or_default(),
        }))
    }

    type WatchOrderStream = Answers;

    async fn watch_order(
        &self,
        request: Request<wire::WatchOrderRequest>,
    ) -> Result<Response<Answers>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let wire::WatchOrderRequest { user_id, order_id } = request.get_ref();
        let mut fields = Fields::new();
        let user_id = fields.uuid("user_id", user_id);
        let order_id = fields.uuid("order_id", order_id);
        let (user_id, order_id) = fields.finish(DOMAIN, user_id.zip(order_id))?;
        let views = self.queries.watch(user_id, order_id, deadline).await?;
        let answers = views.map(|view| {
            Ok(wire::WatchOrderResponse {
                order: Some(view.map_err(Status::from)?.into()),
            })
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

/// What the queries for one order have in common.
fn order_of_user(
    fields: &mut Fields,
    user_id: &str,
    order_id: &str,
    at_least_version: i64,
) -> Option<(Uuid, Uuid)> {
    let user_id = fields.uuid("user_id", user_id);
    let order_id = fields.uuid("order_id", order_id);
    if at_least_version < 0 {
        let _ = fields.reject::<()>("at_least_version", "must not be negative");
    }
    user_id.zip(order_id)
}

impl From<QueryError> for Status {
    fn from(error: QueryError) -> Self {
        let message = error.to_string();
        match error {
            QueryError::NotFound => DOMAIN.status(Code::NotFound, "ORDER_NOT_FOUND", message).build(),
            // The call did not finish in its time; a longer one may. Nothing is wrong with the request or the order.
            QueryError::NotYet => DOMAIN
                .status(Code::DeadlineExceeded, "VERSION_NOT_REACHED", message)
                .retry_after(RETRY_DELAY)
                .build(),
            QueryError::TooManyWaiting(_) => DOMAIN
                .status(Code::ResourceExhausted, "TOO_MANY_WAITING", message)
                .retry_after(RETRY_DELAY)
                .build(),
            QueryError::Stopping => DOMAIN
                .status(Code::Unavailable, "STOPPING", message)
                .retry_after(RETRY_DELAY)
                .build(),
            QueryError::Database(error) => error.to_status(DOMAIN),
        }
    }
}

impl From<View> for wire::OrderView {
    fn from(
        View {
            order: view,
            payments,
            is_parked,
        }: View,
    ) -> Self {
        Self {
            order_id: view.order_id.to_string(),
            user_id: view.user_id.to_string(),
            status: to_wire(view.status).into(),
            items: view
                .items
                .into_iter()
                .map(|item| order::OrderItem {
                    product_id: item.product_id.to_string(),
                    quantity: item.quantity,
                    unit_price_minor_units: item.unit_price_minor_units,
                })
                .collect(),
            total: Some(Money {
                minor_units: view.total_minor_units,
                currency_code: view.currency_code,
            }),
            version: view.version,
            placed_at: Some(timestamp(view.placed_at)),
            updated_at: Some(timestamp(view.updated_at)),
            pay_by: view.pay_by.map(timestamp),
            cancel_reason: view.cancel_reason,
            tracking_number: view.tracking_number,
            carrier: view.carrier,
            payments: payments.into_iter().map(Into::into).collect(),
            parked: is_parked,
        }
    }
}

impl From<Payment> for wire::PaymentView {
    fn from(view: Payment) -> Self {
        let (status, failure) = match view.status {
            PaymentStatus::Received => (payment::PaymentStatus::Received, None),
            PaymentStatus::Failed(failure) => (payment::PaymentStatus::Failed, Some(failure)),
            PaymentStatus::Refunded => (payment::PaymentStatus::Refunded, None),
        };
        Self {
            payment_id: view.payment_id.to_string(),
            status: status.into(),
            amount: Some(Money {
                minor_units: view.amount_minor_units,
                currency_code: view.currency_code,
            }),
            brand: view.brand,
            last_four: view.last_four,
            failure: failure.map(|failure| payment::PaymentFailure {
                reason: failure.reason,
                another_try: failure.another_try,
            }),
            version: view.version,
            updated_at: Some(timestamp(view.updated_at)),
        }
    }
}

impl From<Journey> for wire::GetOrderJourneyResponse {
    fn from(mut journey: Journey) -> Self {
        let mail = |(template, step): (i32, &Step)| wire::MailView {
            template,
            answers_event_id: step.entity_id.to_string(),
            sent_at: Some(timestamp(step.occurred_at)),
        };
        Self {
            reservation: journey.reservation().map(Into::into),
            mails: journey.mails().map(mail).collect(),
            more_events: journey.is_cut,
            parked: std::mem::take(&mut journey.parked)
                .into_iter()
                .map(Into::into)
                .collect(),
            events: journey.into_steps().into_iter().map(Into::into).collect(),
        }
    }
}

impl From<Step> for wire::JourneyEvent {
    fn from(step: Step) -> Self {
        Self {
            event_id: step.event_id.to_string(),
            event_type: step.event_type,
            entity_id: step.entity_id.to_string(),
            version: step.version,
            occurred_at: Some(timestamp(step.occurred_at)),
            topic: step.topic,
            partition: step.partition,
            offset: step.offset,
            trace_id: step.trace_id.unwrap_or_default(),
        }
    }
}

impl From<Reservation> for wire::ReservationView {
    fn from(reservation: Reservation) -> Self {
        let status = match reservation.status {
            ReservationStatus::Reserved => wire::ReservationStatus::Reserved,
            ReservationStatus::Rejected => wire::ReservationStatus::Rejected,
            ReservationStatus::Released => wire::ReservationStatus::Released,
            ReservationStatus::Committed => wire::ReservationStatus::Committed,
        };
        Self {
            status: status.into(),
            version: reservation.version,
            updated_at: Some(timestamp(reservation.updated_at)),
        }
    }
}

impl From<ParkedRecord> for wire::ParkedRecord {
    fn from(record: ParkedRecord) -> Self {
        Self {
            topic: record.topic,
            partition: record.partition,
            offset: record.offset,
            event_type: record.event_type.unwrap_or_default(),
            error_kind: record.error_kind,
            parked_at: Some(timestamp(record.parked_at)),
        }
    }
}

fn to_wire(status: domain::Status) -> order::OrderStatus {
    match status {
        domain::Status::Pending => order::OrderStatus::Pending,
        domain::Status::Paid => order::OrderStatus::Paid,
        domain::Status::Confirmed => order::OrderStatus::Confirmed,
        domain::Status::Shipped => order::OrderStatus::Shipped,
        domain::Status::Delivered => order::OrderStatus::Delivered,
        domain::Status::Cancelled => order::OrderStatus::Cancelled,
    }
}

/// `None`: of any status.
fn from_wire(status: order::OrderStatus) -> Option<domain::Status> {
    match status {
        order::OrderStatus::Unspecified => None,
        order::OrderStatus::Pending => Some(domain::Status::Pending),
        order::OrderStatus::Paid => Some(domain::Status::Paid),
        order::OrderStatus::Confirmed => Some(domain::Status::Confirmed),
        order::OrderStatus::Shipped => Some(domain::Status::Shipped),
        order::OrderStatus::Delivered => Some(domain::Status::Delivered),
        order::OrderStatus::Cancelled => Some(domain::Status::Cancelled),
    }
}
