//! Compares our ledger with the provider's, and names every difference.
//!
//! Both may change meanwhile. The provider is read first: whatever it has done was stored here as unfinished before, so it is known
//! here, or is a difference. What is here and was not seen there is asked for once more by itself. What is unfinished is no
//! difference; it is counted apart.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::future::Future;
use std::time::Duration;

use diesel_async::AsyncPgConnection;
use serde::Serialize;
use service::shutdown::BoxError;
use service::telemetry::chain;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::Config;
use crate::domain::{Payment, PaymentId, Status};
use crate::provider::{CallError, Intent, IntentId, IntentState, MAX_PAGE, Provider, Refund, RefundStatus};
use crate::store;

/// Payments of ours read at a time.
const BATCH: i64 = 500;
/// Differences that are named; all are counted.
const NAMED: usize = 1000;
/// How often the provider is asked for one thing, and how long to wait in between.
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(500);

/// What was found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Charges of the provider's that took money.
    pub charges: u64,
    /// Payments of ours that were received, also those that were refunded since.
    pub received: u64,
    /// Refunds of the provider's that gave money back.
    pub refunds: u64,
    /// Payments of ours that were refunded.
    pub refunded: u64,
    /// Payments and refunds whose outcome is not known here yet.
    pub under_way: u64,
    /// How many differences there are.
    pub differences: u64,
    /// The first of them.
    pub named: Vec<Difference>,
}

/// What can be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The provider took money for something that is not in our ledger.
    UnknownCharge,
    /// The provider took money by a payment that we say failed.
    ChargeOfFailed,
    /// The provider took another amount.
    AmountDiffers,
    /// We received money of which the provider knows nothing.
    MissingCharge,
    /// The provider took money more than once for one order.
    OrderChargedTwice,
    /// The provider gave back what we did not ask it to.
    UnknownRefund,
    /// The provider gave back another amount, or by another refund than the one we know.
    RefundDiffers,
    /// We gave back what the provider says it has not.
    MissingRefund,
}

/// Something that should not be so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    pub kind: Kind,
    /// Ours, as far as they are known.
    pub payment_id: Option<Uuid>,
    pub order_id: Option<Uuid>,
    /// The provider's id of the charge or the refund.
    pub reference: String,
}

impl Report {
    fn add(&mut self, kind: Kind, payment: Option<&Payment>, reference: impl fmt::Display) {
        self.add_by_ids(
            kind,
            payment.map(|payment| payment.id.0),
            payment.map(|payment| payment.order_id.0),
            reference,
        );
    }

    fn add_by_ids(
        &mut self,
        kind: Kind,
        payment_id: Option<Uuid>,
        order_id: Option<Uuid>,
        reference: impl fmt::Display,
    ) {
        self.differences += 1;
        if self.named.len() < NAMED {
            self.named.push(Difference {
                kind,
                payment_id,
                order_id,
                reference: reference.to_string(),
            });
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            charges,
            received,
            refunds,
            refunded,
            under_way,
            differences,
            named,
        } = self;
        writeln!(
            f,
            "{charges} charges, {received} received; {refunds} refunds, {refunded} refunded; {under_way} under way: \
             {differences} differences"
        )?;
        for difference in named {
            let id = |id: Option<Uuid>| id.map_or_else(|| "unknown".to_owned(), |id| id.to_string());
            let (payment, order) = (id(difference.payment_id), id(difference.order_id));
            writeln!(
                f,
                "  {:?}: {} (payment {payment}, order {order})",
                difference.kind, difference.reference
            )?;
        }
        if *differences > named.len() as u64 {
            writeln!(f, "  … and {} more", differences - named.len() as u64)?;
        }
        Ok(())
    }
}

/// The ledgers differ; the report says how.
#[derive(Debug, thiserror::Error)]
#[error("our ledger and the provider's differ: {0} differences")]
pub struct Unequal(u64);

/// The command: compares, prints the report on standard output, fails if something differs.
///
/// # Errors
/// [`Unequal`], or whatever keeps the database or the provider from answering.
#[expect(clippy::print_stdout, reason = "the report is the command's output")]
pub async fn command(config: &Config, json: bool, shutdown: CancellationToken) -> Result<(), BoxError> {
    let mut conn = service::db::connect_unbounded(&config.database, "payment-svc reconcile").await?;
    let provider = Provider::new(&config.provider, &prometheus::Registry::new())?;
    let report = tokio::select! {
        report = reconcile(&mut conn, &provider) => report?,
        () = shutdown.cancelled() => return Err("interrupted".into()),
    };
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    match report.differences {
        0 => Ok(()),
        differences => Err(Unequal(differences).into()),
    }
}

/// Compares everything. In memory is an entry for each charge and each refund; payments and pages are read piece by piece.
///
/// # Errors
/// Whatever keeps the database or the provider from answering. Differences are not errors: they are in the report.
pub async fn reconcile(conn: &mut AsyncPgConnection, provider: &Provider) -> Result<Report, BoxError> {
    let mut report = Report::default();
    let charged = compare_charges(conn, provider, &mut report).await?;
    let refunded = compare_refunds(conn, provider, &mut report).await?;
    compare_payments(conn, provider, &charged, &refunded, &mut report).await?;
    Ok(report)
}

/// Everything that took money is known here, once for each order. Returns the payments whose charges were seen.
async fn compare_charges(
    conn: &mut AsyncPgConnection,
    provider: &Provider,
    report: &mut Report,
) -> Result<HashSet<PaymentId>, BoxError> {
    let mut charged = HashSet::new();
    let mut by_order: HashMap<Uuid, u32> = HashMap::new();
    let mut after: Option<IntentId> = None;
    loop {
        let page = patiently(|| provider.list_intents(after.as_ref(), MAX_PAGE)).await?;
        after = page.items.last().map(|intent| intent.id.clone());
        let taken: Vec<&Intent> = page
            .items
            .iter()
            .filter(|intent| intent.state == IntentState::Succeeded)
            .collect();
        let ids: Vec<&str> = taken.iter().map(|intent| intent.id.as_str()).collect();
        let ours = by_intent(store::of_intents(conn, &ids).await?);
        for intent in taken {
            report.charges += 1;
            let payment = ours.get(intent.id.as_str());
            match payment {
                None => report.add_by_ids(
                    Kind::UnknownCharge,
                    intent.payment_id,
                    intent.order_id,
                    &intent.id,
                ),
                Some(payment) => {
                    charged.insert(payment.id);
                    if payment.status == Status::Failed {
                        report.add(Kind::ChargeOfFailed, Some(payment), &intent.id);
                    }
                    if !is_amount(payment, intent.amount, &intent.currency) {
                        report.add(Kind::AmountDiffers, Some(payment), &intent.id);
                    }
                }
            }
            if let Some(order) = payment.map(|payment| payment.order_id.0).or(intent.order_id) {
                let times = by_order.entry(order).or_default();
                *times += 1;
                if *times > 1 {
                    let payment_id = payment.map(|payment| payment.id.0).or(intent.payment_id);
                    report.add_by_ids(Kind::OrderChargedTwice, payment_id, Some(order), &intent.id);
                }
            }
        }
        if !page.has_more || after.is_none() {
            return Ok(charged);
        }
    }
}

/// Everything that gave money back was asked for here. Returns the payments whose refunds were seen.
async fn compare_refunds(
    conn: &mut AsyncPgConnection,
    provider: &Provider,
    report: &mut Report,
) -> Result<HashSet<PaymentId>, BoxError> {
    let mut refunded = HashSet::new();
    let mut after = None;
    loop {
        let page = patiently(|| provider.list_refunds(after.as_ref(), MAX_PAGE)).await?;
        after = page.items.last().map(|refund| refund.id.clone());
        let given: Vec<&Refund> = page
            .items
            .iter()
            .filter(|refund| refund.status == RefundStatus::Succeeded)
            .collect();
        let ids: Vec<&str> = given
            .iter()
            .filter_map(|refund| refund.intent.as_ref())
            .map(IntentId::as_str)
            .collect();
        let ours = by_intent(store::of_intents(conn, &ids).await?);
        for refund in given {
            report.refunds += 1;
            let intent = refund.intent.as_ref().map_or("", IntentId::as_str);
            let Some(payment) = ours.get(intent) else {
                report.add_by_ids(Kind::UnknownRefund, refund.payment_id, None, &refund.id);
                continue;
            };
            let is_known = payment.refund.as_deref() == Some(refund.id.as_str());
            match payment.status {
                Status::Refunded if is_known => {
                    refunded.insert(payment.id);
                }
                Status::Refunded => report.add(Kind::RefundDiffers, Some(payment), &refund.id),
                Status::RefundPending => {}
                Status::Pending | Status::Received | Status::Failed => {
                    report.add(Kind::UnknownRefund, Some(payment), &refund.id);
                }
            }
            if !is_amount(payment, refund.amount, &refund.currency) {
                report.add(Kind::RefundDiffers, Some(payment), &refund.id);
            }
        }
        if !page.has_more || after.is_none() {
            return Ok(refunded);
        }
    }
}

/// Everything that we have received and given back is so at the provider.
async fn compare_payments(
    conn: &mut AsyncPgConnection,
    provider: &Provider,
    charged: &HashSet<PaymentId>,
    refunded: &HashSet<PaymentId>,
    report: &mut Report,
) -> Result<(), BoxError> {
    let mut after = Uuid::nil();
    loop {
        let payments = store::payments_after(conn, after, BATCH).await?;
        let Some(last) = payments.last() else {
            return Ok(());
        };
        after = last.id.0;
        for payment in &payments {
            report.under_way += u64::from(payment.is_unfinished());
            let (Status::Received | Status::RefundPending | Status::Refunded, Some(intent)) =
                (payment.status, &payment.intent)
            else {
                continue;
            };
            report.received += 1;
            let intent = IntentId::new(intent.as_str());
            if !charged.contains(&payment.id) && !is_charged(provider, &intent).await? {
                report.add(Kind::MissingCharge, Some(payment), &intent);
            }
            if payment.status == Status::Refunded {
                report.refunded += 1;
                let was_seen = refunded.contains(&payment.id);
                if !was_seen && !is_refunded(provider, &intent, payment.refund.as_deref()).await? {
                    let reference = payment.refund.as_deref().unwrap_or_default();
                    report.add(Kind::MissingRefund, Some(payment), reference);
                }
            }
        }
    }
}

async fn is_charged(provider: &Provider, intent: &IntentId) -> Result<bool, BoxError> {
    match patiently(|| provider.intent(intent)).await {
        Ok(intent) => Ok(intent.state == IntentState::Succeeded),
        // It has no such charge.
        Err(CallError::Refused { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

async fn is_refunded(provider: &Provider, intent: &IntentId, refund: Option<&str>) -> Result<bool, BoxError> {
    match patiently(|| provider.refunds(intent)).await {
        Ok(refunds) => Ok(refunds
            .iter()
            .any(|given| given.status == RefundStatus::Succeeded && Some(given.id.as_str()) == refund)),
        Err(CallError::Refused { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn is_amount(payment: &Payment, amount: i64, currency: &str) -> bool {
    payment.amount.minor_units() == amount && payment.amount.currency().code() == currency
}

fn by_intent(payments: Vec<Payment>) -> BTreeMap<String, Payment> {
    payments
        .into_iter()
        .filter_map(|payment| Some((payment.intent.clone()?, payment)))
        .collect()
}

/// Asks again when the provider does not answer; asking changes nothing.
async fn patiently<T, F>(ask: impl Fn() -> F) -> Result<T, CallError>
where
    F: Future<Output = Result<T, CallError>>,
{
    let mut attempt = 1;
    loop {
        match ask().await {
            Err(error @ CallError::Unknown(_)) if attempt < ATTEMPTS => {
                tracing::warn!(error = %chain(&error), "the provider is asked again");
                tokio::time::sleep(PAUSE * attempt).await;
                attempt += 1;
            }
            answer => return answer,
        }
    }
}
