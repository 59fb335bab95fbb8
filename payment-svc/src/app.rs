//! What payment-svc does: a function per command and per query.

use std::sync::Arc;
use std::time::Duration;

use contracts::shop::payment::v1 as proto;
use contracts::wire::timestamp;
use diesel_async::AsyncPgConnection;
use money::Money;
use service::command::Commands;
use service::db::{Db, DbError, TransactionError};
use service::deadline::Deadline;
use service::requests::{self, Claim, RequestError, RequestKey};
use service::telemetry;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::attempt::{Access, Driver, now};
use crate::domain::{
    CardSummary, Change, KnownOrder, Method, NewPayment, OrderId, Payment, PaymentId, PaymentMethodId,
    Refusal, StartRefusal, Status, UserId,
};
use crate::facts::Facts;
use crate::failpoints::{self, pass};
use crate::provider::{CallError, Card, Decline, DeclineReason, Provider, UnknownOutcome};
use crate::store::{self, Cause, Due, Fact, KnownMethod, Lock, StoreError};
use crate::waits::Waits;

/// Part of a call's time that is kept for the answer, and its bounds.
const ANSWER_SHARE: u32 = 10;
const ANSWER_TIME: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// Pause while the provider is busy with the same card for the same request.
const TOKEN_PAUSE: Duration = Duration::from_millis(50);

/// What someone who asks does not get to know: whether it is someone else's, or not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    #[error("there is no such payment of this user")]
    Payment,
    #[error("there is no such order of this user")]
    Order,
    #[error("there is no such payment method of this user")]
    Method,
}

/// Why a command or a query did not succeed. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error(transparent)]
    Missing(#[from] Missing),
    #[error("the order is not known yet")]
    OrderNotKnownYet,
    #[error(transparent)]
    NotStarted(#[from] StartRefusal),
    #[error("the payment was not received")]
    NotReceived,
    #[error("the provider does not take the card")]
    CardRefused(Decline),
    #[error("the request id was used with another card")]
    OtherCard,
    #[error("the provider could not be asked")]
    Provider(#[source] CallError),
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<DbError> for CommandError {
    fn from(error: DbError) -> Self {
        Self::Store(error.into())
    }
}

impl TransactionError for CommandError {
    fn database(&self) -> Option<&DbError> {
        match self {
            Self::Request(RequestError::Database(error)) | Self::Store(StoreError::Database(error)) => {
                Some(error)
            }
            _ => None,
        }
    }
}

/// A valid CreatePaymentMethod.
#[derive(Debug)]
pub struct CreateMethod {
    pub request: RequestKey,
    pub user_id: UserId,
    pub card: Card,
}

/// What to pay by.
#[derive(Debug)]
pub enum PayBy {
    Kept(PaymentMethodId),
    Card(Card),
}

/// A valid ProcessPayment.
#[derive(Debug)]
pub struct Pay {
    pub request: RequestKey,
    pub user_id: UserId,
    pub order_id: OrderId,
    pub amount: Money,
    pub by: PayBy,
}

/// A valid RefundPayment.
#[derive(Debug)]
pub struct RefundWhole {
    pub request: RequestKey,
    pub user_id: UserId,
    pub payment_id: PaymentId,
}

/// The commands and queries on payments. Clones share everything.
#[derive(Debug, Clone)]
pub struct Payments {
    pub db: Db,
    pub commands: Commands,
    pub provider: Provider,
    pub access: Access,
    pub driver: Driver,
    /// Room for payments that calls bring on. Where there is none, they are left to the settler.
    pub drives: Arc<Semaphore>,
    pub facts: Facts,
    pub waits: Arc<Waits>,
    /// Ends what commands bring on, between two steps; the settler of a later process goes on.
    pub stop: CancellationToken,
}

impl Payments {
    /// Hands a card to the provider and keeps what it is called there.
    ///
    /// # Errors
    /// [`CommandError`]
    pub async fn create_method(
        &self,
        deadline: Deadline,
        command: CreateMethod,
    ) -> Result<proto::CreatePaymentMethodResponse, CommandError> {
        if let Some(response) = self.find_response(deadline, &command.request).await? {
            return Ok(response);
        }
        let known = self
            .tokenise(
                deadline,
                command.user_id,
                &command.request,
                "method",
                &command.card,
            )
            .await?;
        let (db, request) = (self.db.clone(), command.request);
        let input = (request, known);
        let task = async move {
            db.transaction(deadline, &input, |conn, (request, known)| {
                Box::pin(create_method(conn, request, known))
            })
            .await
        };
        self.commands.run(task).await
    }

    /// Pays an order. The payment may be pending when the time for the answer has come.
    ///
    /// # Errors
    /// [`CommandError`]
    pub async fn pay(&self, deadline: Deadline, command: Pay) -> Result<Payment, CommandError> {
        let answer_by = answer_by(deadline);
        let (repeated, order) = self.look_up(deadline, &command).await?;
        if let Some(id) = repeated {
            return self.settled(id, answer_by, Status::Pending).await;
        }
        let order = match order {
            Some(order) => order,
            None => self.known_order(&command, answer_by, deadline).await?,
        };
        if order.user_id != command.user_id {
            return Err(Missing::Order.into());
        }
        let method_id = match self.method_of(deadline, &command, &order).await {
            Ok(id) => id,
            // What stands in the way may be this very request, which came twice at once.
            Err(CommandError::NotStarted(refusal)) => {
                return match self.repeated(deadline, &command.request).await? {
                    Some(id) => self.settled(id, answer_by, Status::Pending).await,
                    None => Err(refusal.into()),
                };
            }
            Err(error) => return Err(error),
        };
        let room = self.room();
        // Chosen here, so that it stays the same when the transaction has to be begun again.
        let start = Start {
            id: PaymentId(Uuid::now_v7()),
            request: command.request,
            user_id: command.user_id,
            order_id: command.order_id,
            amount: command.amount,
            method_id,
            lease: self.lease(&room),
        };
        self.begin(
            deadline,
            answer_by,
            Status::Pending,
            start,
            room,
            |conn, start| Box::pin(pay(conn, start)),
        )
        .await
    }

    /// Gives back the whole of a payment. It may be on its way when the time for the answer has come.
    ///
    /// # Errors
    /// [`CommandError`]
    pub async fn refund(&self, deadline: Deadline, command: RefundWhole) -> Result<Payment, CommandError> {
        let answer_by = answer_by(deadline);
        let room = self.room();
        let input = (command, self.lease(&room));
        self.begin(
            deadline,
            answer_by,
            Status::RefundPending,
            input,
            room,
            |conn, (command, lease)| Box::pin(refund(conn, command, *lease)),
        )
        .await
    }

    /// A payment of this user.
    ///
    /// # Errors
    /// [`CommandError::Missing`], also when it is someone else's.
    pub async fn get(
        &self,
        deadline: Deadline,
        user_id: UserId,
        id: PaymentId,
    ) -> Result<Payment, CommandError> {
        let payment = self.load(deadline, id).await?;
        Ok(payment
            .filter(|payment| payment.user_id == user_id)
            .ok_or(Missing::Payment)?)
    }

    /// Room to bring a payment on, if there is any.
    fn room(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.drives).try_acquire_owned().ok()
    }

    /// How long the payment belongs to this call; not at all if it cannot bring it on.
    fn lease(&self, room: &Option<OwnedSemaphorePermit>) -> Duration {
        room.as_ref().map_or(Duration::ZERO, |_| self.driver.lease())
    }

    /// Runs a transaction that stores what is to be done, and then, if there is room, does it, in a task that nobody drops.
    /// Answers when it is done, or as far as it is when the time has come. `unsettled` is the status that is waited out.
    async fn begin<I, F>(
        &self,
        deadline: Deadline,
        answer_by: Instant,
        unsettled: Status,
        input: I,
        room: Option<OwnedSemaphorePermit>,
        transaction: F,
    ) -> Result<Payment, CommandError>
    where
        I: Send + Sync + 'static,
        F: for<'c> Fn(
                &'c mut AsyncPgConnection,
                &'c I,
            ) -> service::db::BoxFuture<'c, Result<Begun, CommandError>>
            + Send
            + Sync
            + 'static,
    {
        let this = self.clone();
        let (tell, told) = oneshot::channel();
        let task = async move {
            let begun = this.db.transaction(deadline, &input, transaction).await?;
            this.facts.committed(&begun.facts);
            let due = begun.due();
            let drives = !begun.facts.is_empty();
            if drives {
                pass(match unsettled {
                    Status::RefundPending => failpoints::REFUND_STORED,
                    _ => failpoints::PAYMENT_STORED,
                });
            }
            // Nobody listens any more when the client has gone.
            let _ = tell.send(begun.payment);
            if !drives || room.is_none() {
                return Ok(None);
            }
            let driven = this.driver.drive(due, &this.stop).await;
            let driven = driven.inspect_err(|error| {
                tracing::warn!(
                    entity.id = %due.payment_id, error = %telemetry::chain(error),
                    "a payment cannot be brought on, and is taken up again later"
                );
            });
            Ok::<_, CommandError>(driven.ok())
        };
        let run = self.commands.run(task);
        tokio::pin!(run, told);
        // First what is stored, then as much of the rest as there is time for.
        let mut driven = None;
        let payment = tokio::select! {
            biased;
            Ok(payment) = &mut told => {
                // Whoever brings it on here knows first how it ended.
                tokio::select! {
                    // What is stored is sure, whatever became of bringing it on.
                    ended = &mut run => driven = ended.ok().flatten(),
                    () = tokio::time::sleep_until(answer_by) => {}
                }
                payment
            }
            ended = &mut run => {
                driven = ended?;
                told.try_recv().map_err(|_| DbError::DeadlinePassed)?
            }
            () = tokio::time::sleep_until(deadline.at()) => return Err(DbError::DeadlinePassed.into()),
        };
        let payment = driven.unwrap_or(payment);
        if payment.status != unsettled {
            return Ok(payment);
        }
        tokio::select! {
            settled = self.settled(payment.id, answer_by, unsettled) => match settled {
                Ok(payment) => Ok(payment),
                // What is stored is sure, whatever keeps the database from telling more.
                Err(CommandError::Store(_)) => Ok(payment),
                Err(error) => Err(error),
            },
            () = tokio::time::sleep_until(answer_by + ANSWER_TIME.0) => Ok(payment),
        }
    }

    /// The payment once it is out of a status, or as it is when the time has come.
    async fn settled(&self, id: PaymentId, until: Instant, status: Status) -> Result<Payment, CommandError> {
        let deadline = deadline_at(until + ANSWER_TIME.1);
        let look = || async move {
            let payment = self.load(deadline, id).await?.ok_or(Missing::Payment)?;
            Ok::<_, CommandError>((payment.status != status).then_some(payment))
        };
        match self.waits.find(id.0, until, look).await? {
            Some(payment) => Ok(payment),
            None => Ok(self.load(deadline, id).await?.ok_or(Missing::Payment)?),
        }
    }

    /// The payment that a request has started, if it came before.
    async fn repeated(
        &self,
        deadline: Deadline,
        request: &RequestKey,
    ) -> Result<Option<PaymentId>, CommandError> {
        let response: Option<proto::ProcessPaymentResponse> = self.find_response(deadline, request).await?;
        response.as_ref().map(paid_by).transpose()
    }

    /// The payment that a request has started, if it came before, and the order, if it is known: in one round trip.
    async fn look_up(
        &self,
        deadline: Deadline,
        command: &Pay,
    ) -> Result<(Option<PaymentId>, Option<KnownOrder>), CommandError> {
        self.db
            .read(deadline, command, |conn, command| {
                let conn = &*conn;
                Box::pin(async move {
                    let response = async { Ok(requests::find(conn, &command.request).await?) };
                    let order = async {
                        Ok::<_, CommandError>(store::load_order(conn, command.order_id, Lock::None).await?)
                    };
                    let (response, order) = tokio::try_join!(biased; response, order)?;
                    Ok((response.as_ref().map(paid_by).transpose()?, order))
                })
            })
            .await
    }

    /// What to pay by; a card is handed to the provider.
    async fn method_of(
        &self,
        deadline: Deadline,
        command: &Pay,
        order: &KnownOrder,
    ) -> Result<PaymentMethodId, CommandError> {
        let card = match &command.by {
            PayBy::Kept(id) => return Ok(*id),
            PayBy::Card(card) => card,
        };
        // It is not handed on for nothing. What counts is looked at again under the lock.
        self.db
            .read(deadline, &(order, command.amount), |conn, &(order, amount)| {
                Box::pin(may_start(conn, order, amount))
            })
            .await?;
        let known = self
            .tokenise(deadline, command.user_id, &command.request, "payment", card)
            .await?;
        Ok(self.keep(deadline, known).await?.method.id)
    }

    /// The order, waited for if it is not known yet.
    async fn known_order(
        &self,
        command: &Pay,
        until: Instant,
        deadline: Deadline,
    ) -> Result<KnownOrder, CommandError> {
        let order_id = command.order_id;
        let look = || async move {
            self.db
                .read(deadline, &order_id, |conn, id| {
                    Box::pin(async { Ok::<_, CommandError>(store::load_order(conn, *id, Lock::None).await?) })
                })
                .await
        };
        let order = self.waits.find(order_id.0, until, look).await?;
        order.ok_or(CommandError::OrderNotKnownYet)
    }

    async fn load(&self, deadline: Deadline, id: PaymentId) -> Result<Option<Payment>, CommandError> {
        self.db
            .read(deadline, &id, |conn, id| {
                Box::pin(async {
                    let stored = store::load_payment(conn, *id, Lock::None).await?;
                    Ok(stored.map(|stored| stored.payment))
                })
            })
            .await
    }

    async fn find_response<R: prost::Message + Default>(
        &self,
        deadline: Deadline,
        request: &RequestKey,
    ) -> Result<Option<R>, CommandError> {
        self.db
            .read(deadline, request, |conn, request| {
                Box::pin(async { Ok(requests::find(conn, request).await?) })
            })
            .await
    }

    async fn keep(&self, deadline: Deadline, known: KnownMethod) -> Result<KnownMethod, CommandError> {
        let db = self.db.clone();
        let task = async move {
            db.transaction(deadline, &known, |conn, known| {
                Box::pin(async { Ok::<_, CommandError>(store::keep_method(conn, known).await?) })
            })
            .await
        };
        self.commands.run(task).await
    }

    /// Hands a card to the provider. The key belongs to the request, so that a repeat gets the same token, and another card is
    /// refused under it.
    async fn tokenise(
        &self,
        deadline: Deadline,
        user_id: UserId,
        request: &RequestKey,
        what: &str,
        card: &Card,
    ) -> Result<KnownMethod, CommandError> {
        let key = format!("{user_id}-{what}-{}", request.request_id());
        let call = async {
            loop {
                match self.provider.create_method(&key, card).await {
                    // The same request came twice at once: the other one's answer is this one's.
                    Err(CallError::Unknown(UnknownOutcome::Status { status: 409, .. })) => {
                        tokio::time::sleep(TOKEN_PAUSE).await;
                    }
                    answer => return answer,
                }
            }
        };
        let answer = tokio::time::timeout_at(deadline.at(), call)
            .await
            .map_err(|_| DbError::DeadlinePassed)?;
        self.access.saw(&answer);
        let method = answer.map_err(|error| match error {
            CallError::Refused { decline, .. } => CommandError::CardRefused(decline),
            CallError::KeyReused => CommandError::OtherCard,
            error @ (CallError::Unknown(_) | CallError::Unauthorized) => CommandError::Provider(error),
        })?;
        Ok(KnownMethod {
            method: Method {
                id: PaymentMethodId(Uuid::now_v7()),
                card: CardSummary {
                    brand: method.brand,
                    last_four: method.last_four,
                },
            },
            user_id,
            provider_token: method.id.to_string(),
            expiry_month: method.expiry_month,
            expiry_year: method.expiry_year,
            created_at: now(),
        })
    }
}

/// When a call that waits has to stop waiting, so that its answer still comes in time.
fn answer_by(deadline: Deadline) -> Instant {
    let reserve = (deadline.remaining() / ANSWER_SHARE).clamp(ANSWER_TIME.0, ANSWER_TIME.1);
    deadline.at() - reserve
}

fn deadline_at(at: Instant) -> Deadline {
    Deadline::after(at.saturating_duration_since(Instant::now()))
}

/// The payment that a stored response names.
fn paid_by(response: &proto::ProcessPaymentResponse) -> Result<PaymentId, CommandError> {
    let payment = response.payment.as_ref();
    let id = payment.and_then(|payment| Uuid::try_parse(&payment.payment_id).ok());
    Ok(PaymentId(id.ok_or(RequestError::Incomplete)?))
}

/// What a transaction has stored.
struct Begun {
    payment: Payment,
    /// Empty if somebody else brings the payment on.
    facts: Vec<Fact>,
}

impl Begun {
    /// Something that was done before, or is being done.
    fn before(payment: Payment) -> Self {
        Self {
            payment,
            facts: Vec::new(),
        }
    }

    fn due(&self) -> Due {
        Due {
            payment_id: self.payment.id,
            order_id: self.payment.order_id,
        }
    }
}

/// A payment to be started.
struct Start {
    id: PaymentId,
    request: RequestKey,
    user_id: UserId,
    order_id: OrderId,
    amount: Money,
    method_id: PaymentMethodId,
    lease: Duration,
}

async fn create_method(
    conn: &mut AsyncPgConnection,
    request: &RequestKey,
    known: &KnownMethod,
) -> Result<proto::CreatePaymentMethodResponse, CommandError> {
    let ticket = match requests::claim(conn, request).await? {
        Claim::New(ticket) => ticket,
        Claim::Repeat(response) => return Ok(response),
    };
    let kept = store::keep_method(conn, known).await?;
    let response = proto::CreatePaymentMethodResponse {
        payment_method: Some(proto::PaymentMethod {
            payment_method_id: kept.method.id.to_string(),
            user_id: kept.user_id.to_string(),
            brand: kept.method.card.brand,
            last_four: kept.method.card.last_four,
            expiry_month: kept.expiry_month.into(),
            expiry_year: kept.expiry_year.into(),
            created_at: Some(timestamp(kept.created_at)),
        }),
    };
    ticket.complete(conn, &response).await?;
    Ok(response)
}

async fn pay(conn: &AsyncPgConnection, start: &Start) -> Result<Begun, CommandError> {
    let claim = async {
        let claim = requests::claim::<proto::ProcessPaymentResponse>(conn, &start.request).await;
        claim.map_err(CommandError::from)
    };
    let found = async {
        // The payment last, under the order's lock.
        let found = tokio::try_join!(
            biased;
            store::find_method(conn, start.method_id),
            store::load_order(conn, start.order_id, Lock::Update),
            store::live_payments(conn, std::slice::from_ref(&start.order_id)),
        );
        found.map_err(CommandError::from)
    };
    // One round trip. A repeat has no use for what was found.
    let (claim, (known, order, live)) = tokio::try_join!(biased; claim, found)?;
    let ticket = match claim {
        Claim::New(ticket) => ticket,
        Claim::Repeat(response) => {
            let stored = store::load_payment(conn, paid_by(&response)?, Lock::None).await?;
            return Ok(Begun::before(stored.ok_or(Missing::Payment)?.payment));
        }
    };
    let order = order
        .filter(|order| order.user_id == start.user_id)
        .ok_or(Missing::Order)?;
    let live = live.first().map(|stored| stored.payment.status);
    order.may_start(start.amount, live)?;
    let known = known
        .filter(|known| known.user_id == start.user_id)
        .ok_or(Missing::Method)?;
    let new = NewPayment {
        id: start.id,
        order_id: order.id,
        user_id: order.user_id,
        amount: order.total,
        method: Some(known.method),
    };
    let change = Change::start(new, now());
    let response = proto::ProcessPaymentResponse {
        payment: Some(change.payment().into()),
    };
    let request = async { Ok(ticket.complete(conn, &response).await?) };
    let cause = cause(&start.request);
    let payment = async { Ok::<_, CommandError>(store::save(conn, &change, &cause, start.lease).await?) };
    let ((), facts) = tokio::try_join!(biased; request, payment)?;
    Ok(Begun {
        payment: change.into_payment(),
        facts,
    })
}

async fn refund(
    conn: &mut AsyncPgConnection,
    command: &RefundWhole,
    lease: Duration,
) -> Result<Begun, CommandError> {
    let found = find(conn, command, Lock::None).await?;
    let ticket = match requests::claim::<proto::RefundPaymentResponse>(conn, &command.request).await? {
        Claim::New(ticket) => ticket,
        Claim::Repeat(_) => return Ok(Begun::before(find(conn, command, Lock::None).await?)),
    };
    store::load_order(conn, found.order_id, Lock::Update).await?;
    let payment = find(conn, command, Lock::Update).await?;
    let change = match Change::of(payment.clone()).refunding(now()) {
        Ok(change) => change,
        Err(Refusal::Settled(_)) => Change::of(payment),
        Err(_) => return Err(CommandError::NotReceived),
    };
    let response = proto::RefundPaymentResponse {
        payment: Some(change.payment().into()),
    };
    ticket.complete(conn, &response).await?;
    let is_new = change.before().map(|(status, _)| status) != Some(change.payment().status);
    let facts = if is_new {
        store::save(conn, &change, &cause(&command.request), lease).await?
    } else {
        Vec::new()
    };
    Ok(Begun {
        payment: change.into_payment(),
        facts,
    })
}

async fn find(
    conn: &mut AsyncPgConnection,
    command: &RefundWhole,
    lock: Lock,
) -> Result<Payment, CommandError> {
    let stored = store::load_payment(conn, command.payment_id, lock).await?;
    let payment = stored.map(|stored| stored.payment);
    Ok(payment
        .filter(|payment| payment.user_id == command.user_id)
        .ok_or(Missing::Payment)?)
}

/// Whether a payment of this amount may be started.
async fn may_start(conn: &AsyncPgConnection, order: &KnownOrder, amount: Money) -> Result<(), CommandError> {
    let live = store::live_payments(conn, &[order.id]).await?;
    let status = live.first().map(|stored| stored.payment.status);
    Ok(order.may_start(amount, status)?)
}

fn cause(request: &RequestKey) -> Cause {
    let trace = telemetry::current_trace_context();
    Cause {
        causation_id: request.request_id(),
        traceparent: trace.traceparent,
        tracestate: trace.tracestate,
    }
}

/// Why a card was refused, for people.
pub fn card_refusal(decline: Decline) -> &'static str {
    match decline.reason {
        DeclineReason::ExpiredCard => "the card has expired",
        DeclineReason::IncorrectCardDetails => "the card's number, expiry or cvv is not right",
        DeclineReason::NotSupported => "such a card is not supported",
        DeclineReason::CardBlocked
        | DeclineReason::Declined
        | DeclineReason::InsufficientFunds
        | DeclineReason::AuthenticationRequired => "the card was declined",
    }
}
