//! The gRPC face: parses requests, calls the app, turns its errors into statuses.

use chrono::{Datelike as _, TimeDelta, Utc};
use contracts::shop::payment::v1 as proto;
use contracts::shop::payment::v1::payment_service_server::PaymentService;
use contracts::shop::payment::v1::process_payment_request::Method as WireMethod;
use contracts::wire;
use secrecy::SecretString;
use service::deadline::Deadline;
use service::requests::RequestKey;
use service::status::{Domain, RETRY_DELAY};
use service::telemetry::chain;
use service::validate::{Fields, has_check_digit};
use tonic::{Code, Request, Response, Status};

use crate::app::{CommandError, CreateMethod, Missing, Pay, PayBy, Payments, RefundWhole, card_refusal};
use crate::domain::{OrderId, PaymentId, PaymentMethodId, StartRefusal, UserId};
use crate::provider::Card;
use crate::store::StoreError;

/// Whose reasons the errors give.
pub const DOMAIN: Domain = Domain("payment.shop");

/// How far in the future a card may expire, in years.
const LONGEST_EXPIRY: i32 = 50;

/// The service over the app.
#[derive(Debug, Clone)]
pub struct PaymentGrpc {
    payments: Payments,
    max_deadline: std::time::Duration,
}

impl PaymentGrpc {
    /// `max_deadline` is for calls that bring none.
    pub fn new(payments: Payments, max_deadline: std::time::Duration) -> Self {
        Self {
            payments,
            max_deadline,
        }
    }
}

#[tonic::async_trait]
impl PaymentService for PaymentGrpc {
    async fn create_payment_method(
        &self,
        request: Request<proto::CreatePaymentMethodRequest>,
    ) -> Result<Response<proto::CreatePaymentMethodResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let command = CreateMethod::try_from(request.into_inner())?;
        Ok(Response::new(
            self.payments.create_method(deadline, command).await?,
        ))
    }

    async fn process_payment(
        &self,
        request: Request<proto::ProcessPaymentRequest>,
    ) -> Result<Response<proto::ProcessPaymentResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let command = Pay::try_from(request.into_inner())?;
        let payment = self.payments.pay(deadline, command).await?;
        Ok(Response::new(proto::ProcessPaymentResponse {
            payment: Some((&payment).into()),
        }))
    }

    async fn refund_payment(
        &self,
        request: Request<proto::RefundPaymentRequest>,
    ) -> Result<Response<proto::RefundPaymentResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let command = RefundWhole::try_from(request.into_inner())?;
        let payment = self.payments.refund(deadline, command).await?;
        Ok(Response::new(proto::RefundPaymentResponse {
            payment: Some((&payment).into()),
        }))
    }

    async fn get_payment(
        &self,
        request: Request<proto::GetPaymentRequest>,
    ) -> Result<Response<proto::GetPaymentResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let request = request.into_inner();
        let mut fields = Fields::new();
        let user = fields.uuid("user_id", &request.user_id);
        let payment = fields.uuid("payment_id", &request.payment_id);
        let (user, payment) = fields.finish(DOMAIN, user.zip(payment))?;
        let payment = self
            .payments
            .get(deadline, UserId(user), PaymentId(payment))
            .await?;
        Ok(Response::new(proto::GetPaymentResponse {
            payment: Some((&payment).into()),
        }))
    }
}

impl TryFrom<proto::CreatePaymentMethodRequest> for CreateMethod {
    type Error = Status;

    fn try_from(mut request: proto::CreatePaymentMethodRequest) -> Result<Self, Status> {
        let mut fields = Fields::new();
        let request_id = fields.uuid("request_id", &request.request_id);
        let user_id = fields.uuid("user_id", &request.user_id);
        let card = parse_card(&mut fields, request.card.take());
        let ((request_id, user_id), card) = fields.finish(DOMAIN, request_id.zip(user_id).zip(card))?;
        let method = "shop.payment.v1.PaymentService/CreatePaymentMethod";
        Ok(Self {
            // Without the card: a fingerprint of so few digits could be undone.
            request: RequestKey::new(user_id, method, request_id, &request),
            user_id: UserId(user_id),
            card,
        })
    }
}

impl TryFrom<proto::ProcessPaymentRequest> for Pay {
    type Error = Status;

    fn try_from(mut request: proto::ProcessPaymentRequest) -> Result<Self, Status> {
        let mut fields = Fields::new();
        let request_id = fields.uuid("request_id", &request.request_id);
        let user_id = fields.uuid("user_id", &request.user_id);
        let order_id = fields.uuid("order_id", &request.order_id);
        let amount = wire::money(request.amount.as_ref()).or_else(|| {
            fields.reject(
                "amount",
                "must be positive, in a currency given by its upper-case ISO 4217 code",
            )
        });
        let by = match request.method.take() {
            Some(WireMethod::PaymentMethodId(id)) => {
                let by = fields
                    .uuid("payment_method_id", &id)
                    .map(|id| PayBy::Kept(PaymentMethodId(id)));
                request.method = Some(WireMethod::PaymentMethodId(id));
                by
            }
            Some(WireMethod::Card(card)) => {
                // Only that there was one goes into the fingerprint: so few digits could be found out from it.
                request.method = Some(WireMethod::Card(proto::Card::default()));
                parse_card(&mut fields, Some(card)).map(PayBy::Card)
            }
            None => fields.reject("method", "must be a payment_method_id or a card"),
        };
        let all = request_id.zip(user_id).zip(order_id).zip(amount).zip(by);
        let ((((request_id, user_id), order_id), amount), by) = fields.finish(DOMAIN, all)?;
        let method = "shop.payment.v1.PaymentService/ProcessPayment";
        Ok(Self {
            request: RequestKey::new(user_id, method, request_id, &request),
            user_id: UserId(user_id),
            order_id: OrderId(order_id),
            amount,
            by,
        })
    }
}

impl TryFrom<proto::RefundPaymentRequest> for RefundWhole {
    type Error = Status;

    fn try_from(request: proto::RefundPaymentRequest) -> Result<Self, Status> {
        let mut fields = Fields::new();
        let request_id = fields.uuid("request_id", &request.request_id);
        let user_id = fields.uuid("user_id", &request.user_id);
        let payment_id = fields.uuid("payment_id", &request.payment_id);
        let all = request_id.zip(user_id).zip(payment_id);
        let ((request_id, user_id), payment_id) = fields.finish(DOMAIN, all)?;
        let method = "shop.payment.v1.PaymentService/RefundPayment";
        Ok(Self {
            request: RequestKey::new(user_id, method, request_id, &request),
            user_id: UserId(user_id),
            payment_id: PaymentId(payment_id),
        })
    }
}

/// A card whose number and dates can be right. Nothing of it is ever echoed.
fn parse_card(fields: &mut Fields, card: Option<proto::Card>) -> Option<Card> {
    let Some(card) = card else {
        return fields.reject("card", "must be given");
    };
    let proto::Card {
        number,
        expiry_month,
        expiry_year,
        cvv,
    } = card;
    let (number, cvv) = (SecretString::from(number), SecretString::from(cvv));
    let number = if is_card_number(&number) {
        Some(number)
    } else {
        fields.reject("card.number", "must be 12 to 19 digits with a valid check digit")
    };
    let cvv = if has_digits(&cvv, 3..=4) {
        Some(cvv)
    } else {
        fields.reject("card.cvv", "must be three or four digits")
    };
    let month = match u8::try_from(expiry_month) {
        Ok(month @ 1..=12) => Some(month),
        _ => fields.reject("card.expiry_month", "must be 1 to 12"),
    };
    // Where the day is still yesterday, the card may still be good.
    let today = Utc::now() - TimeDelta::days(1);
    let year = match u16::try_from(expiry_year) {
        Ok(year) if (today.year()..=today.year() + LONGEST_EXPIRY).contains(&expiry_year) => Some(year),
        _ => fields.reject("card.expiry_year", "must be four digits, and not in the past"),
    };
    let (month, year) = month.zip(year)?;
    if expiry_year == today.year() && u32::from(month) < today.month() {
        return fields.reject("card.expiry_month", "must not be in the past");
    }
    let (number, cvv) = number.zip(cvv)?;
    Some(Card {
        number,
        expiry_month: month,
        expiry_year: year,
        cvv,
    })
}

fn has_digits(text: &SecretString, lengths: std::ops::RangeInclusive<usize>) -> bool {
    use secrecy::ExposeSecret as _;
    let text = text.expose_secret();
    lengths.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_card_number(text: &SecretString) -> bool {
    use secrecy::ExposeSecret as _;
    has_digits(text, 12..=19) && has_check_digit(text.expose_secret())
}

impl From<CommandError> for Status {
    fn from(error: CommandError) -> Self {
        match error {
            CommandError::Missing(missing) => {
                let reason = match missing {
                    Missing::Payment => "PAYMENT_NOT_FOUND",
                    Missing::Order => "ORDER_NOT_FOUND",
                    Missing::Method => "PAYMENT_METHOD_NOT_FOUND",
                };
                DOMAIN.status(Code::NotFound, reason, missing.to_string()).build()
            }
            CommandError::OrderNotKnownYet => DOMAIN
                .status(
                    Code::Unavailable,
                    "ORDER_NOT_KNOWN_YET",
                    "the order is not known here yet: try again with the same request_id",
                )
                .retry_after(RETRY_DELAY)
                .build(),
            CommandError::NotStarted(refusal) => not_started(refusal),
            CommandError::NotReceived => {
                let message = "the payment was not received: there is nothing to give back";
                DOMAIN
                    .status(Code::FailedPrecondition, "NOT_RECEIVED", message)
                    .precondition("PAYMENT_STATUS", "payment", message)
                    .build()
            }
            CommandError::CardRefused(decline) => {
                let message = card_refusal(decline);
                DOMAIN
                    .status(Code::FailedPrecondition, "CARD_REFUSED", message)
                    .precondition("CARD", "card", message)
                    .build()
            }
            CommandError::OtherCard => DOMAIN
                .status(
                    Code::AlreadyExists,
                    "REQUEST_ID_REUSED",
                    "request_id was used before, with another card",
                )
                .build(),
            CommandError::Provider(error) => {
                tracing::warn!(error = %chain(&error), "the provider is not available to a call");
                let message = "the payment provider is not available: try again with the same request_id";
                DOMAIN
                    .status(Code::Unavailable, "PROVIDER_UNAVAILABLE", message)
                    .retry_after(RETRY_DELAY)
                    .build()
            }
            CommandError::Request(error) => error.to_status(DOMAIN),
            CommandError::Store(StoreError::Database(error)) => error.to_status(DOMAIN),
            // The order's row was locked, so this takes a defect; a repeat tells.
            CommandError::Store(StoreError::Conflict(_) | StoreError::OtherPayment) => DOMAIN
                .status(
                    Code::Aborted,
                    "CONCURRENT_CHANGE",
                    "another command came first: try again",
                )
                .build(),
            CommandError::Store(error) => {
                tracing::error!(error = %chain(&error), "a row cannot be read");
                DOMAIN
                    .status(Code::Internal, "INTERNAL", "internal error")
                    .build()
            }
        }
    }
}

fn not_started(refusal: StartRefusal) -> Status {
    let reason = match refusal {
        StartRefusal::Cancelled => "ORDER_CANCELLED",
        StartRefusal::InProgress => "PAYMENT_IN_PROGRESS",
        StartRefusal::Paid => "ORDER_PAID",
        StartRefusal::Refunded => "PAYMENT_REFUNDED",
        StartRefusal::Closed => "PAYMENT_CLOSED",
        StartRefusal::WrongAmount => "WRONG_AMOUNT",
    };
    let message = refusal.to_string();
    DOMAIN
        .status(Code::FailedPrecondition, reason, message.clone())
        .precondition("ORDER", "order", &message)
        .build()
}
