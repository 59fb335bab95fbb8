//! What requests do, each within one transaction: together with the answer that is repeated under its idempotency key, so
//! that no crash can part the two. Only one transaction writes at a time, so no two requests ever see the same moment.

use crate::card::{self, Behaviour, Fault, Refusal};
use crate::error::ApiError;
use crate::model::{Answer, Charge, Intent, LastError, Metadata, Method, Refund, RefundStatus, Status};
use crate::params::Params;
use crate::store::{StoreError, Write, now};
use serde_json::Value;

const MAX_AMOUNT: u64 = 99_999_999;

/// What is asked for.
#[derive(Debug, Clone)]
pub enum Operation {
    CreateMethod,
    CreateIntent,
    Confirm(String),
    Cancel(String),
    Refund,
}

/// A request that changes something.
#[derive(Debug)]
pub struct Request {
    pub operation: Operation,
    pub params: Params,
    pub key: Option<String>,
    pub fingerprint: String,
}

/// How far a request has come.
#[derive(Debug)]
pub enum Step {
    /// It is done, or not possible.
    Answer {
        status: u16,
        body: Value,
        replayed: bool,
        delivery: Delivery,
    },
    /// Nothing was done, and nothing is said.
    Silence,
    /// The bank takes its time: [`finish`] it later.
    Later(Pending),
}

/// How an answer goes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    Send,
    /// It never does.
    Hang,
    /// The connection is dropped instead.
    Drop,
    /// The request comes again first, and the second answer is sent.
    Again,
}

/// What the bank works on.
#[derive(Debug, Clone)]
pub enum Pending {
    Charge(String),
    Refund(String),
}

/// Inside a transaction, what is not `Ok` has either changed nothing or what it is meant to leave behind.
enum Failure {
    Api(ApiError),
    Store(StoreError),
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

enum Outcome {
    Reply(Value, Delivery),
    Silence,
    Later(Pending),
}

/// Does a request, unless its key says that it was done before.
pub fn begin(write: &Write, request: &Request) -> Result<Step, StoreError> {
    if let Some(key) = &request.key
        && let Some(answer) = write.answer(key)?
    {
        let is_same = answer.fingerprint == request.fingerprint;
        return Ok(if is_same {
            Step::Answer {
                status: answer.status,
                body: answer.body,
                replayed: true,
                delivery: Delivery::Send,
            }
        } else {
            failed(&ApiError::key_reused())
        });
    }
    let params = request.params.clone();
    let outcome = match &request.operation {
        Operation::CreateMethod => create_method(write, params),
        Operation::CreateIntent => create_intent(write, params),
        Operation::Confirm(id) => confirm(write, id, params),
        Operation::Cancel(id) => cancel(write, id, params),
        Operation::Refund => refund(write, params),
    };
    answer(write, request, outcome)
}

/// Ends what was under way.
pub fn finish(write: &Write, request: &Request, pending: &Pending) -> Result<Step, StoreError> {
    let outcome = match pending {
        Pending::Charge(id) => end_charge(write, id),
        Pending::Refund(id) => end_refund(write, id),
    };
    answer(write, request, outcome)
}

/// Ends all that was under way when the sandbox was stopped. Whoever asked for it is gone.
pub fn settle(write: &Write) -> Result<(), StoreError> {
    for mut intent in write.all::<Intent>()? {
        if intent.status == Status::Processing {
            capture(write, &mut intent)?;
        }
    }
    for mut refund in write.all::<Refund>()? {
        if refund.status == RefundStatus::Pending {
            refund.status = RefundStatus::Succeeded;
            write.put(&refund)?;
        }
    }
    Ok(())
}

fn answer(write: &Write, request: &Request, outcome: Result<Outcome, Failure>) -> Result<Step, StoreError> {
    let (status, body, delivery, kept) = match outcome {
        Ok(Outcome::Silence) => return Ok(Step::Silence),
        Ok(Outcome::Later(pending)) => return Ok(Step::Later(pending)),
        Ok(Outcome::Reply(body, delivery)) => (200, body, delivery, true),
        Err(Failure::Api(error)) => (error.status, error.body(), Delivery::Send, error.kept),
        Err(Failure::Store(error)) => return Err(error),
    };
    if let (Some(key), true) = (&request.key, kept) {
        let answer = Answer {
            fingerprint: request.fingerprint.clone(),
            status,
            body: body.clone(),
        };
        write.keep_answer(key, &answer)?;
    }
    Ok(Step::Answer {
        status,
        body,
        replayed: false,
        delivery,
    })
}

/// An answer that nothing was done for.
pub fn failed(error: &ApiError) -> Step {
    Step::Answer {
        status: error.status,
        body: error.body(),
        replayed: false,
        delivery: Delivery::Send,
    }
}

fn create_method(write: &Write, mut params: Params) -> Result<Outcome, Failure> {
    if params.required("type")? != "card" {
        return Err(ApiError::unusable("type").into());
    }
    let number = params.required("card[number]")?.replace(' ', "");
    let month: u8 = params.parsed("card[exp_month]")?.unwrap_or(0);
    let year: u16 = params.parsed("card[exp_year]")?.unwrap_or(0);
    let cvc = params.optional("card[cvc]");
    params.metadata()?;
    params.finish()?;
    if !card::is_valid(&number) {
        return Err(ApiError::bad_card("incorrect_number", "number").into());
    }
    if !(1..=12).contains(&month) {
        return Err(ApiError::bad_card("invalid_expiry_month", "exp_month").into());
    }
    // The day does not matter enough for a calendar: years of 365.2425 days.
    let this_year = 1970 + now() / 31_556_952;
    if u64::from(year) < this_year || u64::from(year) > this_year + 50 {
        return Err(ApiError::bad_card("invalid_expiry_year", "exp_year").into());
    }
    let is_cvc = |cvc: &String| (3..=4).contains(&cvc.len()) && cvc.bytes().all(|b| b.is_ascii_digit());
    if !cvc.as_ref().is_none_or(is_cvc) {
        return Err(ApiError::bad_card("invalid_cvc", "cvc").into());
    }
    let method = Method {
        id: write.new_id::<Method>()?,
        brand: card::brand(&number).to_owned(),
        last_four: number[number.len() - 4..].to_owned(),
        expiry_month: month,
        expiry_year: year,
        behaviour: Behaviour::of(&number),
        created: now(),
    };
    write.put(&method)?;
    Ok(Outcome::Reply(method.show(), Delivery::Send))
}

fn create_intent(write: &Write, mut params: Params) -> Result<Outcome, Failure> {
    let amount: u64 = params.parsed("amount")?.unwrap_or(0);
    let currency = params.required("currency")?.to_ascii_lowercase();
    let method = params.optional("payment_method");
    let confirms = params.parsed("confirm")?.unwrap_or(false);
    let fail_on_action = params.parsed("error_on_requires_action")?.unwrap_or(false);
    let metadata = params.metadata()?;
    params.method_types()?;
    params.finish()?;
    if !(1..=MAX_AMOUNT).contains(&amount) {
        return Err(ApiError::unusable("amount").into());
    }
    if currency.len() != 3 || !currency.bytes().all(|byte| byte.is_ascii_lowercase()) {
        return Err(ApiError::unusable("currency").into());
    }
    let method = method.map(|id| method_of(write, &id)).transpose()?;
    let fault = match &method {
        Some(method) => creation_fault(write, method, &metadata)?,
        None => Fault::None,
    };
    if fault == Fault::HangBefore {
        return Ok(Outcome::Silence);
    }
    let intent = Intent {
        id: write.new_id::<Intent>()?,
        amount,
        currency,
        status: match method {
            Some(_) => Status::RequiresConfirmation,
            None => Status::RequiresPaymentMethod,
        },
        method: method.map(|method| method.id),
        metadata,
        created: now(),
        canceled: None,
        charge: None,
        last_error: None,
        refunds: Vec::new(),
        pay_struck: false,
        refund_struck: false,
    };
    write.put(&intent)?;
    if confirms {
        return authorise(write, intent, fail_on_action);
    }
    with_fault(fault, intent.show())
}

/// It strikes once for each payment that the caller says it is for.
fn creation_fault(write: &Write, method: &Method, metadata: &Metadata) -> Result<Fault, StoreError> {
    let fault = method.behaviour.create;
    if fault == Fault::None {
        return Ok(fault);
    }
    let payment = metadata.get("payment_id").map_or("", String::as_str);
    let strikes = write.strikes(&format!("{} {payment}", method.id))?;
    Ok(if strikes { fault } else { Fault::None })
}

fn confirm(write: &Write, id: &str, mut params: Params) -> Result<Outcome, Failure> {
    let method = params.optional("payment_method");
    let fail_on_action = params.parsed("error_on_requires_action")?.unwrap_or(false);
    params.finish()?;
    let mut intent = intent_of(write, id, "intent")?;
    if let Some(method) = method {
        let waits = matches!(
            intent.status,
            Status::RequiresPaymentMethod | Status::RequiresConfirmation | Status::RequiresAction
        );
        if waits {
            intent.method = Some(method_of(write, &method)?.id);
            intent.status = Status::RequiresConfirmation;
        }
    }
    if intent.status != Status::RequiresConfirmation {
        return Err(ApiError::unexpected_state(&intent, "confirm").into());
    }
    authorise(write, intent, fail_on_action)
}

/// Asks the bank. The intent has a method and has not been charged.
fn authorise(write: &Write, mut intent: Intent, fail_on_action: bool) -> Result<Outcome, Failure> {
    let Some(method) = &intent.method else {
        return Err(ApiError::unexpected_state(&intent, "confirm").into());
    };
    let method = method_of(write, method)?;
    let has_struck = std::mem::replace(&mut intent.pay_struck, true);
    let fault = match method.behaviour.pay {
        stays @ (Fault::Refused(_) | Fault::AskCustomer) => stays,
        _ if has_struck => Fault::None,
        strikes => strikes,
    };
    let refusal = match fault {
        Fault::Refused(refusal) => Some(refusal),
        Fault::AskCustomer if fail_on_action => Some(Refusal::AuthenticationRequired),
        _ => None,
    };
    if let Some(refusal) = refusal {
        let last_error = LastError { refusal, method };
        intent.status = Status::RequiresPaymentMethod;
        intent.method = None;
        intent.last_error = Some(last_error.clone());
        write.put(&intent)?;
        return Err(ApiError::declined(&last_error, &intent).into());
    }
    match fault {
        Fault::HangBefore => {
            write.put(&intent)?;
            Ok(Outcome::Silence)
        }
        Fault::ErrorBefore => {
            write.put(&intent)?;
            Err(ApiError::internal().into())
        }
        Fault::Slow => {
            intent.status = Status::Processing;
            write.put(&intent)?;
            Ok(Outcome::Later(Pending::Charge(intent.id)))
        }
        Fault::AskCustomer => {
            intent.status = Status::RequiresAction;
            write.put(&intent)?;
            Ok(Outcome::Reply(intent.show(), Delivery::Send))
        }
        _ => {
            capture(write, &mut intent)?;
            with_fault(fault, intent.show())
        }
    }
}

/// Takes the money.
fn capture(write: &Write, intent: &mut Intent) -> Result<(), StoreError> {
    let charge = Charge {
        id: write.new_id::<Charge>()?,
        intent: intent.id.clone(),
        method: intent.method.clone().unwrap_or_default(),
        amount: intent.amount,
        refunded: 0,
        currency: intent.currency.clone(),
        metadata: intent.metadata.clone(),
        created: now(),
    };
    intent.status = Status::Succeeded;
    intent.charge = Some(charge.id.clone());
    intent.last_error = None;
    write.put(&charge)?;
    write.put(intent)
}

fn end_charge(write: &Write, id: &str) -> Result<Outcome, Failure> {
    let mut intent = intent_of(write, id, "intent")?;
    if intent.status == Status::Processing {
        capture(write, &mut intent)?;
    }
    Ok(Outcome::Reply(intent.show(), Delivery::Send))
}

fn cancel(write: &Write, id: &str, mut params: Params) -> Result<Outcome, Failure> {
    params.optional("cancellation_reason");
    params.finish()?;
    let mut intent = intent_of(write, id, "intent")?;
    if matches!(
        intent.status,
        Status::Processing | Status::Succeeded | Status::Canceled
    ) {
        return Err(ApiError::unexpected_state(&intent, "cancel").into());
    }
    intent.status = Status::Canceled;
    intent.canceled = Some(now());
    write.put(&intent)?;
    Ok(Outcome::Reply(intent.show(), Delivery::Send))
}

fn refund(write: &Write, mut params: Params) -> Result<Outcome, Failure> {
    let intent = params.required("payment_intent")?;
    let amount: Option<u64> = params.parsed("amount")?;
    let metadata = params.metadata()?;
    params.optional("reason");
    params.finish()?;
    let mut intent = intent_of(write, &intent, "payment_intent")?;
    let charge = match &intent.charge {
        Some(charge) => write.get::<Charge>(charge)?,
        None => None,
    };
    let Some(mut charge) = charge else {
        let message = "This PaymentIntent does not have a successful charge to refund.";
        return Err(ApiError::state(None, message, None).into());
    };
    let left = charge.amount - charge.refunded;
    if left == 0 {
        let message = format!("Charge {} has already been refunded.", charge.id);
        return Err(ApiError::state(Some("charge_already_refunded"), &message, None).into());
    }
    let amount = amount.unwrap_or(left);
    if !(1..=left).contains(&amount) {
        return Err(ApiError::unusable("amount").into());
    }
    let method = method_of(write, &charge.method)?;
    let has_struck = std::mem::replace(&mut intent.refund_struck, true);
    let fault = if has_struck {
        Fault::None
    } else {
        method.behaviour.refund
    };
    if matches!(fault, Fault::HangBefore | Fault::ErrorBefore) {
        write.put(&intent)?;
        return if fault == Fault::HangBefore {
            Ok(Outcome::Silence)
        } else {
            Err(ApiError::internal().into())
        };
    }
    let refund = Refund {
        id: write.new_id::<Refund>()?,
        intent: intent.id.clone(),
        charge: charge.id.clone(),
        amount,
        currency: charge.currency.clone(),
        status: match fault {
            Fault::Slow => RefundStatus::Pending,
            Fault::Refused(_) => RefundStatus::Failed,
            _ => RefundStatus::Succeeded,
        },
        metadata,
        charge_metadata: charge.metadata.clone(),
        created: now(),
    };
    intent.refunds.push(refund.id.clone());
    if refund.status != RefundStatus::Failed {
        charge.refunded += amount;
        write.put(&charge)?;
    }
    write.put(&intent)?;
    write.put(&refund)?;
    if fault == Fault::Slow {
        return Ok(Outcome::Later(Pending::Refund(refund.id)));
    }
    with_fault(fault, refund.show())
}

fn end_refund(write: &Write, id: &str) -> Result<Outcome, Failure> {
    let Some(mut refund) = write.get::<Refund>(id)? else {
        return Err(ApiError::missing("id", id).into());
    };
    if refund.status == RefundStatus::Pending {
        refund.status = RefundStatus::Succeeded;
        write.put(&refund)?;
    }
    Ok(Outcome::Reply(refund.show(), Delivery::Send))
}

/// The answer to what was done, as the fault has it.
fn with_fault(fault: Fault, done: Value) -> Result<Outcome, Failure> {
    let delivery = match fault {
        Fault::ErrorAfter => return Err(ApiError::internal().into()),
        Fault::HangAfter => Delivery::Hang,
        Fault::DropAfter => Delivery::Drop,
        Fault::Twice => Delivery::Again,
        _ => Delivery::Send,
    };
    Ok(Outcome::Reply(done, delivery))
}

fn method_of(write: &Write, id: &str) -> Result<Method, Failure> {
    write
        .get(id)?
        .ok_or_else(|| ApiError::missing("payment_method", id).into())
}

fn intent_of(write: &Write, id: &str, param: &str) -> Result<Intent, Failure> {
    write.get(id)?.ok_or_else(|| ApiError::missing(param, id).into())
}
