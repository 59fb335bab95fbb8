//! Sends what is to be sent, several mails at once. Replicas share the work: what one of them has taken, the others pass over.
//!
//! A mail is taken only when the mail server has let us in, so nothing is written while that is away. It is "sending" before a byte of it
//! leaves, for the time of a lease by the database's clock, and everything that is done with it ends before that: whoever finds the
//! lease passed knows that the sender is gone, and that nobody knows what the mail server did.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use lettre::Message;
use lettre::message::Mailbox;
use rand::Rng as _;
use service::admin::Check;
use service::db::{Db, DbError};
use service::deadline::Deadline;
use service::shutdown::BoxError;
use service::telemetry::{chain, set_parent};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;
use uuid::Uuid;

use crate::codec;
use crate::domain::{MailId, Next, OrderId, Outcome, Retry, Trouble};
use crate::failpoints::{self, pass};
use crate::letter::Letter;
use crate::metrics::Metrics;
use crate::smtp::{Away, Server, Session};
use crate::store::{self, Attempt, Claimed, Recorded, StoreError};

/// For one look at the database, and one write.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a connection may lie idle and be used again.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// The pauses between attempts to reach the mail server, and to write an outcome.
const SERVER_RETRY: Retry = Retry {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(15),
};

/// How mails are sent.
#[derive(Debug, Clone)]
pub struct Config {
    /// `mails.senders`: how many are sent at once.
    pub senders: usize,
    /// `mails.poll`: how often to look for mails to be sent.
    pub poll: Duration,
    /// `mails.lease`: how long a mail belongs to whoever sends it. Longer than sending takes.
    pub lease: Duration,
    /// `mails.retry_first` and `mails.retry_longest`: the pauses before a mail is sent again that the mail server did not take.
    pub retry: Retry,
    /// `mails.drain`: how long mails that are being sent at shutdown may take.
    pub drain: Duration,
}

/// Sends mails.
#[derive(Debug, Clone)]
pub struct Sender {
    db: Db,
    server: Server,
    config: Config,
    /// Who takes mails.
    instance: String,
    wake: Arc<Notify>,
    metrics: Metrics,
    /// Whether the mail server lets us in.
    check: Check,
    was_up: Arc<Mutex<Option<bool>>>,
}

/// What a sender keeps from mail to mail.
#[derive(Default)]
struct Line {
    session: Option<(Session, Instant)>,
    /// An attempt whose claim did not say how it ended.
    doubtful: Option<Uuid>,
}

/// What came of one turn.
enum Turn {
    Worked,
    /// There is nothing to send.
    Idle,
    ServerAway(Away),
    /// The mail server took against us with a mail in hand, which is pending again.
    Broken(Trouble),
}

impl Sender {
    /// `instance` names the process among its replicas; `wake` tells when there may be something to send.
    pub fn new(
        db: Db,
        server: Server,
        config: Config,
        instance: String,
        wake: Arc<Notify>,
        metrics: Metrics,
        check: Check,
    ) -> Self {
        Self {
            db,
            server,
            config,
            instance,
            wake,
            metrics,
            check,
            was_up: Arc::default(),
        }
    }

    /// Sends until `shutdown`, then ends what is under way, within [`Config::drain`].
    ///
    /// # Errors
    /// When a sender panicked: its mail will be unknown.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), BoxError> {
        let mut senders = JoinSet::new();
        for _ in 0..self.config.senders {
            senders.spawn(self.clone().send_all(shutdown.clone()));
        }
        while let Some(ended) = senders.join_next().await {
            ended?;
        }
        Ok(())
    }

    async fn send_all(self, shutdown: CancellationToken) {
        let mut line = Line::default();
        let mut away = 0;
        let mut failing = false;
        while !shutdown.is_cancelled() {
            let pause = match self.turn(&mut line, &shutdown).await {
                Ok(turn) => {
                    failing = false;
                    match turn {
                        Turn::Worked => {
                            away = 0;
                            self.server_is(Ok(()));
                            continue;
                        }
                        Turn::Idle => {
                            away = 0;
                            self.config.poll
                        }
                        Turn::ServerAway(problem) => {
                            self.server_is(Err(problem.to_string()));
                            away += 1;
                            SERVER_RETRY.pause(away)
                        }
                        // It is we who took leave.
                        Turn::Broken(_) if shutdown.is_cancelled() => break,
                        Turn::Broken(trouble) => {
                            self.server_is(Err(trouble.name().to_owned()));
                            away += 1;
                            SERVER_RETRY.pause(away)
                        }
                    }
                }
                Err(error) => {
                    if failing {
                        tracing::debug!(error = %chain(&error), "still no look for mails");
                    } else {
                        tracing::warn!(error = %chain(&error), "mails cannot be looked for");
                    }
                    failing = true;
                    self.config.poll
                }
            };
            // Senders must not all come at once.
            let pause = pause.mul_f64(rand::rng().random_range(0.75..=1.0));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                // While the mail server is away, more mails are no reason to ask it sooner.
                () = self.wake.notified(), if away == 0 => {}
                () = shutdown.cancelled() => {}
            }
            if line
                .session
                .as_ref()
                .is_some_and(|(_, used)| used.elapsed() > IDLE_LIMIT)
            {
                quit(&mut line).await;
            }
        }
        quit(&mut line).await;
    }

    /// Sends one mail, if there is one and the mail server lets us in.
    async fn turn(&self, line: &mut Line, shutdown: &CancellationToken) -> Result<Turn, StoreError> {
        if let Some(attempt_id) = line.doubtful {
            self.db
                .transaction(Deadline::after(PATIENCE), &attempt_id, |conn, id| {
                    Box::pin(store::give_back(conn, *id))
                })
                .await?;
            line.doubtful = None;
        }
        let is_due = self.db.read(Deadline::after(PATIENCE), &(), |conn, ()| {
            Box::pin(store::is_due(conn))
        });
        let is_due = is_due.await?;
        // With nothing to send it is still of interest whether the mail server is there: at the start, and after an outage that ended
        // when another replica sent everything.
        if !is_due && self.check.holds() {
            return Ok(Turn::Idle);
        }
        let mut session = match self.session(line).await {
            Ok(session) => session,
            Err(away) => return Ok(Turn::ServerAway(away)),
        };
        if !is_due {
            self.server_is(Ok(()));
            line.session = Some((session, Instant::now()));
            return Ok(Turn::Idle);
        }
        // Counted from before the database begins to count.
        let begun = Instant::now();
        let attempt_id = Uuid::now_v7();
        let Some(mail) = self.claim(line, attempt_id).await? else {
            line.session = Some((session, begun));
            return Ok(Turn::Idle);
        };
        pass(failpoints::MAIL_CLAIMED);
        let span = tracing::info_span!(
            parent: None,
            "send mail",
            entity.id = %mail.notification_id,
            order.id = %mail.order_id,
        );
        set_parent(&span, mail.traceparent.as_deref(), mail.tracestate.as_deref());
        async {
            let outcome = self.send(&mut session, &mail, begun, shutdown).await;
            if outcome == Outcome::Taken {
                pass(failpoints::MAIL_TAKEN);
            }
            let attempt = Attempt {
                attempt_id,
                mail_id: MailId(mail.notification_id),
            };
            self.finish(attempt, &mail, outcome, begun, shutdown).await;
            if outcome.leaves_connection() {
                line.session = Some((session, Instant::now()));
            }
            match outcome {
                Outcome::ServerAway(trouble) => Ok(Turn::Broken(trouble)),
                _ => Ok(Turn::Worked),
            }
        }
        .instrument(span)
        .await
    }

    /// The connection of the mail before, if it is still good, or a new one.
    async fn session(&self, line: &mut Line) -> Result<Session, Away> {
        if let Some((mut session, used)) = line.session.take()
            && used.elapsed() <= IDLE_LIMIT
            && session.is_usable(self.server.config().timeout).await
        {
            return Ok(session);
        }
        self.server.connect().await
    }

    async fn claim(&self, line: &mut Line, attempt_id: Uuid) -> Result<Option<Claimed>, StoreError> {
        let input = (attempt_id, self.instance.as_str(), self.config.lease);
        let claimed = self
            .db
            .transaction(Deadline::after(PATIENCE), &input, |conn, &(id, by, lease)| {
                Box::pin(store::claim(conn, id, by, lease))
            })
            .await;
        if claimed.is_err() {
            line.doubtful = Some(attempt_id);
        }
        claimed
    }

    /// Sends a mail, within the time that there is for it.
    async fn send(
        &self,
        session: &mut Session,
        mail: &Claimed,
        begun: Instant,
        shutdown: &CancellationToken,
    ) -> Outcome {
        let message = match self.message(mail) {
            Ok(message) => message,
            Err(trouble) => return Outcome::Refused(trouble),
        };
        let (timeout, data_timeout) = (self.server.config().timeout, self.server.config().data_timeout);
        let hand_over_by = begun + timeout;
        let handed_over = AtomicBool::new(false);
        let mut sending = pin!(session.send(&message, hand_over_by, &handed_over));
        let drained = async {
            shutdown.cancelled().await;
            tokio::time::sleep(self.config.drain).await;
        };
        let late = async {
            // The configuration sees to it that this ends before the lease does.
            tokio::time::sleep_until(hand_over_by).await;
            if handed_over.load(Ordering::SeqCst) {
                tokio::time::sleep(data_timeout).await;
            }
        };
        let outcome = tokio::select! {
            biased;
            outcome = &mut sending => return outcome,
            () = late => Outcome::Deferred(Trouble::Timeout),
            () = drained => Outcome::ServerAway(Trouble::Interrupted),
        };
        if handed_over.load(Ordering::SeqCst) {
            Outcome::Unknown(Trouble::NoAnswer)
        } else {
            outcome
        }
    }

    fn message(&self, mail: &Claimed) -> Result<Message, Trouble> {
        let (order_id, content) = codec::content(&mail.event_type, mail.schema_version, &mail.payload)
            .map_err(|error| {
                tracing::error!(error = %chain(&error), "the event that a mail answers cannot be read");
                Trouble::Unreadable
            })?;
        let letter = Letter {
            id: MailId(mail.notification_id),
            order_id,
            content: &content,
            first_name: mail.first_name.as_deref(),
        };
        let to = mail.email.parse().map_err(|_| Trouble::AddressInvalid)?;
        letter
            .message(
                &self.server.config().from,
                Mailbox::new(None, to),
                SystemTime::now(),
            )
            .map_err(|error| {
                tracing::error!(error = %chain(&error), "a mail cannot be written");
                Trouble::Unreadable
            })
    }

    /// Writes how it ended. While the database is away this goes on for as long as the lease: a mail that was sent must not be held for
    /// unknown if that can be helped.
    async fn finish(
        &self,
        attempt: Attempt,
        mail: &Claimed,
        outcome: Outcome,
        begun: Instant,
        shutdown: &CancellationToken,
    ) {
        let next = self.config.retry.next(outcome, mail.tries);
        let mut tries = 0;
        let until = begun + self.config.lease;
        loop {
            let written = self
                .db
                .transaction(
                    Deadline::after(PATIENCE),
                    &(attempt, next),
                    |conn, &(attempt, next)| Box::pin(store::finish(conn, attempt, next)),
                )
                .await;
            match written {
                Ok(Some(recorded)) => {
                    pass(failpoints::OUTCOME_STORED);
                    self.metrics.ended(next);
                    tell(mail, next, recorded.as_ref());
                    return;
                }
                Ok(None) => {
                    tracing::warn!("a mail was settled by others while it was being sent");
                    return;
                }
                Err(error) if is_away(&error) && Instant::now() < until && !shutdown.is_cancelled() => {
                    tracing::warn!(error = %chain(&error), "the outcome of a mail cannot be written, and is tried again");
                    tries += 1;
                    tokio::time::sleep(SERVER_RETRY.pause(tries)).await;
                }
                Err(error) => {
                    tracing::error!(error = %chain(&error), "the outcome of a mail could not be written: it will be unknown");
                    return;
                }
            }
        }
    }

    /// Keeps readiness up to date, and logs when it changes.
    fn server_is(&self, state: Result<(), String>) {
        let mut was_up = self.was_up.lock().unwrap_or_else(PoisonError::into_inner);
        if *was_up != Some(state.is_ok()) {
            match &state {
                Ok(()) => tracing::info!("the mail server lets us in"),
                Err(error) => tracing::warn!(error, "the mail server cannot be used, and is waited for"),
            }
            *was_up = Some(state.is_ok());
        }
        self.check.set(state);
    }
}

async fn quit(line: &mut Line) {
    if let Some((session, _)) = line.session.take() {
        session.quit().await;
    }
}

/// Whether another attempt may fare better: also after a commit whose answer was lost, since writing an outcome twice is harmless.
fn is_away(error: &StoreError) -> bool {
    matches!(error, StoreError::Database(error) if !matches!(error, DbError::Refused(_) | DbError::Panicked(_)))
}

/// Logs what is a fact now.
fn tell(mail: &Claimed, next: Next, recorded: Option<&Recorded>) {
    let (id, order_id) = (MailId(mail.notification_id), OrderId(mail.order_id));
    match (next, recorded) {
        (_, Some(recorded)) => log_sent(recorded),
        (Next::Sent, None) => {}
        (Next::Again { trouble, .. }, None) => tracing::info!(
            entity.id = %id, order.id = %order_id, mail.trouble = trouble.name(),
            "a mail was not taken, and is tried again"
        ),
        (Next::Failed(trouble), None) => tracing::warn!(
            entity.id = %id, order.id = %order_id, mail.trouble = trouble.name(),
            "a mail was refused for good"
        ),
        (Next::Unknown(trouble), None) => tracing::error!(
            entity.id = %id, order.id = %order_id, mail.trouble = trouble.name(),
            "nobody knows whether a mail was taken: it is not sent again by itself"
        ),
    }
}

/// Logs an event that was recorded.
pub(crate) fn log_sent(recorded: &Recorded) {
    let Recorded {
        event_id,
        event_type,
        mail_id,
        order_id,
    } = recorded;
    tracing::info!(
        event.id = %event_id,
        event.r#type = event_type,
        entity.r#type = store::ENTITY_TYPE,
        entity.id = %mail_id,
        entity.version = 1,
        order.id = %order_id,
        "recorded {event_type}"
    );
}
