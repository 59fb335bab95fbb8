//! Pays an order as its plan says, and remembers what the client was told.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use contracts::shop::common::v1::Money;
use contracts::shop::order::v1::{Order, OrderStatus};
use contracts::shop::orderquery::v1::{GetOrderViewRequest, OrderView};
use contracts::shop::payment::v1::process_payment_request::Method;
use contracts::shop::payment::v1::{
    Card, CreatePaymentMethodRequest, GetPaymentRequest, Payment, PaymentStatus, ProcessPaymentRequest,
    ProcessPaymentResponse, RefundPaymentRequest, RefundPaymentResponse,
};
use local_stack::cards;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::load::{Told, ToldTry, refused, twice};
use crate::plan::{self, Means, Pay, Probe, Refund, Try};
use crate::rpc::{Clients, call};

/// How long a client follows a payment whose outcome is not known. What becomes of it later, the reconciliation finds.
const FOLLOW_FOR: Duration = Duration::from_secs(30);
const FIRST_LOOK_AFTER: Duration = Duration::from_millis(50);
const LAST_LOOK_AFTER: Duration = Duration::from_secs(1);

/// A client that pays one order.
pub(crate) struct Payer<'a> {
    clients: &'a Clients,
    order: &'a Order,
    pub(crate) tries: Vec<ToldTry>,
    /// The payment that was made for a method that came with the order, as far as the client looked.
    by_order: Option<String>,
}

impl<'a> Payer<'a> {
    pub(crate) fn new(clients: &'a Clients, order: &'a Order) -> Self {
        Self {
            clients,
            order,
            tries: Vec::new(),
            by_order: None,
        }
    }

    pub(crate) async fn pay(&mut self, plan: &plan::Order, told: &mut Told) -> Result<()> {
        match &plan.pay {
            Pay::Never => Ok(()),
            Pay::WithOrder(_, rest) => {
                // Who has nothing else to do with it does not wait.
                if rest.is_empty() && plan.cancel.is_none() && plan.refund.is_none() {
                    return Ok(());
                }
                if self.first_payment_ended().await? {
                    self.one_after_the_other(rest, told).await?;
                }
                Ok(())
            }
            Pay::ByCall(tries) => self.one_after_the_other(tries, told).await,
            Pay::TwiceAtOnce(first, second) => {
                let mut told_meanwhile = Told::default();
                let second = second.as_ref().unwrap_or(first);
                let (first, second) = tokio::join!(
                    process(self.clients, self.order, first, told),
                    process(self.clients, self.order, second, &mut told_meanwhile)
                );
                told.merge(told_meanwhile);
                self.tries.extend([first?, second?]);
                Ok(())
            }
        }
    }

    async fn one_after_the_other(&mut self, tries: &[Try], told: &mut Told) -> Result<()> {
        for attempt in tries {
            let tried = process(self.clients, self.order, attempt, told).await?;
            let failed = tried.payment.as_ref().map(Payment::status) == Some(PaymentStatus::Failed);
            self.tries.push(tried);
            if !failed {
                break;
            }
        }
        Ok(())
    }

    /// Waits until the payment by the method that came with the order has ended; whether it failed so that another may be tried.
    async fn first_payment_ended(&mut self) -> Result<bool> {
        let mut look = Look::new();
        while look.again().await {
            let view = view(self.clients, self.order).await?;
            let failed_for_good = view.status() == OrderStatus::Cancelled;
            if let Some(payment) = view.payments.first() {
                self.by_order = Some(payment.payment_id.clone());
                return Ok(payment.status() == PaymentStatus::Failed && !failed_for_good);
            }
            if failed_for_good {
                break;
            }
        }
        Ok(false)
    }

    /// Asks for the money back, if any is known to have been taken.
    pub(crate) async fn refund(&self, plan: &Refund, told: &mut Told) -> Result<()> {
        let received = self
            .tries
            .iter()
            .filter_map(|tried| tried.payment.as_ref())
            .find(|payment| payment.status() == PaymentStatus::Received)
            .map(|payment| &payment.payment_id);
        let Some(payment_id) = received.or(self.by_order.as_ref()) else {
            return Ok(());
        };
        let request = RefundPaymentRequest {
            request_id: plan.request_id.clone(),
            user_id: self.order.user_id.clone(),
            payment_id: payment_id.clone(),
        };
        let same = |one: &RefundPaymentResponse, other: &RefundPaymentResponse| {
            one.payment.as_ref().map(|payment| &payment.payment_id)
                == other.payment.as_ref().map(|payment| &payment.payment_id)
        };
        let refunding = twice(plan.repeat, told, same, || {
            call(request.clone(), |request| {
                let mut client = self.clients.payments();
                async move { client.refund_payment(request).await }
            })
        });
        match refunding.await {
            Ok(response) => {
                let status = response.payment.unwrap_or_default().status();
                if ![PaymentStatus::RefundPending, PaymentStatus::Refunded].contains(&status) {
                    told.problems.push(format!("RefundPayment answered {status:?}"));
                }
            }
            // What was not received is not given back.
            Err(refusal) if refusal.code() == Code::FailedPrecondition && received.is_none() => {
                told.refused += 1;
            }
            Err(refusal) => told
                .problems
                .push(format!("RefundPayment of {payment_id} answered {refusal:?}")),
        }
        Ok(())
    }
}

/// Hands the card of a try to payment-svc; our own id of it.
pub(crate) async fn create_method(
    clients: &Clients,
    attempt: &Try,
    user_id: &str,
    told: &mut Told,
) -> Result<String> {
    let request = CreatePaymentMethodRequest {
        request_id: attempt.method_request_id.clone(),
        user_id: user_id.to_owned(),
        card: Some(attempt.card.clone()),
    };
    let creating = twice(attempt.repeat, told, PartialEq::eq, || {
        call(request.clone(), |request| {
            let mut client = clients.payments();
            async move { client.create_payment_method(request).await }
        })
    });
    let method = creating
        .await
        .context("CreatePaymentMethod failed")?
        .payment_method;
    let method = method.context("CreatePaymentMethod answered without a payment method")?;
    if !attempt.card.number.ends_with(&method.last_four) || method.user_id != user_id {
        told.problems
            .push(format!("CreatePaymentMethod answered another card: {method:?}"));
    }
    Ok(method.payment_method_id)
}

/// Tries to pay, and follows the payment until its outcome is known.
async fn process(clients: &Clients, order: &Order, attempt: &Try, told: &mut Told) -> Result<ToldTry> {
    let method = match attempt.means {
        Means::Inline => Method::Card(attempt.card.clone()),
        Means::Method => {
            Method::PaymentMethodId(create_method(clients, attempt, &order.user_id, told).await?)
        }
    };
    let request = ProcessPaymentRequest {
        request_id: attempt.request_id.clone(),
        user_id: order.user_id.clone(),
        order_id: order.order_id.clone(),
        amount: order.total.clone(),
        method: Some(method),
    };
    let same = |one: &ProcessPaymentResponse, other: &ProcessPaymentResponse| {
        one.payment.as_ref().map(|payment| &payment.payment_id)
            == other.payment.as_ref().map(|payment| &payment.payment_id)
    };
    let paying = twice(attempt.repeat, told, same, || {
        call(request.clone(), |request| {
            let mut client = clients.payments();
            async move { client.process_payment(request).await }
        })
    });
    let payment = match paying.await {
        Ok(response) => {
            let payment = response
                .payment
                .context("ProcessPayment answered without a payment")?;
            Some(follow(clients, payment).await?)
        }
        // The order is cancelled, closed or paid, or another payment of it is under way: the facts have to show it.
        Err(refusal) if refusal.code() == Code::FailedPrecondition => {
            told.refused += 1;
            None
        }
        Err(refusal) => {
            told.problems.push(format!("ProcessPayment answered {refusal:?}"));
            None
        }
    };
    Ok(ToldTry {
        outcome: attempt.outcome,
        payment,
    })
}

/// Asks until the outcome is known, or patience ends.
async fn follow(clients: &Clients, mut payment: Payment) -> Result<Payment> {
    let mut look = Look::new();
    while payment.status() == PaymentStatus::Pending && look.again().await {
        payment = get(clients, &payment.user_id, &payment.payment_id).await?;
    }
    Ok(payment)
}

/// GetPayment.
pub(crate) async fn get(clients: &Clients, user_id: &str, payment_id: &str) -> Result<Payment, Status> {
    let request = GetPaymentRequest {
        user_id: user_id.to_owned(),
        payment_id: payment_id.to_owned(),
    };
    let answer = call(request, |request| {
        let mut client = clients.payments();
        async move { client.get_payment(request).await }
    });
    Ok(answer.await?.payment.unwrap_or_default())
}

async fn view(clients: &Clients, order: &Order) -> Result<OrderView, Status> {
    let request = GetOrderViewRequest {
        user_id: order.user_id.clone(),
        order_id: order.order_id.clone(),
        at_least_version: order.version,
    };
    let answer = call(request, |request| {
        let mut client = clients.views();
        async move { client.get_order_view(request).await }
    });
    Ok(answer.await?.order.unwrap_or_default())
}

/// When to look again, less and less often.
pub(crate) struct Look {
    until: Instant,
    pause: Duration,
}

impl Look {
    pub(crate) fn new() -> Self {
        Self {
            until: Instant::now() + FOLLOW_FOR,
            pause: FIRST_LOOK_AFTER,
        }
    }

    /// Waits for the next time; false when there is none.
    pub(crate) async fn again(&mut self) -> bool {
        if Instant::now() > self.until {
            return false;
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LAST_LOOK_AFTER);
        true
    }
}

/// A call of ProcessPayment that must be refused.
pub(crate) async fn try_probe(clients: &Clients, probe: Probe, order: &Order) -> Told {
    let total = order.total.clone().unwrap_or_default();
    let card = Card {
        number: cards::VISA.to_owned(),
        expiry_month: 12,
        expiry_year: 2030,
        cvv: "123".to_owned(),
    };
    let mut request = ProcessPaymentRequest {
        request_id: Uuid::new_v4().to_string(),
        user_id: order.user_id.clone(),
        order_id: order.order_id.clone(),
        amount: Some(total.clone()),
        method: Some(Method::Card(card.clone())),
    };
    // Before it looks at the amount, payment-svc may find that the order's own payment is under way or has ended it.
    let (what, codes) = match probe {
        Probe::PaidByAnother => {
            request.user_id = Uuid::new_v4().to_string();
            ("somebody else's order, paid", vec![Code::NotFound])
        }
        Probe::WrongCurrency => {
            let other = if total.currency_code == "EUR" {
                "USD"
            } else {
                "EUR"
            };
            request.amount = Some(Money {
                currency_code: other.to_owned(),
                ..total
            });
            (
                "another currency",
                vec![Code::InvalidArgument, Code::FailedPrecondition],
            )
        }
        Probe::UnknownMethod => {
            request.method = Some(Method::PaymentMethodId(Uuid::new_v4().to_string()));
            (
                "an unknown payment method",
                vec![Code::NotFound, Code::FailedPrecondition],
            )
        }
        Probe::MistypedCard => {
            request.method = Some(Method::Card(Card {
                number: "4242424242424241".to_owned(),
                ..card
            }));
            ("a mistyped card number", vec![Code::InvalidArgument])
        }
        _ => {
            request.amount = Some(Money {
                minor_units: total.minor_units + 1,
                ..total
            });
            (
                "a wrong amount",
                vec![Code::InvalidArgument, Code::FailedPrecondition],
            )
        }
    };
    let answer = call(request, |request| {
        let mut client = clients.payments();
        async move { client.process_payment(request).await }
    });
    refused(what, &codes, answer.await)
}
