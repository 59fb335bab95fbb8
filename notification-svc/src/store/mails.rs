//! Mails: who takes them, how attempts end, and what operators see and decide.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, SubsecRound as _, Utc};
use diesel::prelude::{OptionalExtension as _, QueryableByName};
use diesel::sql_types::{
    BigInt, Binary, Bool, Double, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid,
};
use diesel_async::{AsyncPgConnection, RunQueryDsl as _};
use event_store::{AppendError, Cause, Entity};
use serde::Serialize;
use service::telemetry;
use uuid::Uuid;

use super::{ENTITY_TYPE, SOURCE, StoreError};
use crate::codec;
use crate::domain::{MailId, Next, OrderId, State, Trouble};

/// Takes the mail that is due first: `$1` is the attempt's id, `$2` who makes it, `$3` the lease in seconds. What others are taking is
/// left to them, and so are mails behind an open one of the same order.
///
/// Materialized, since a plan that ran the inner query once per outer row would take more than one.
pub const CLAIM: &str = "
    WITH next AS MATERIALIZED (
        SELECT notification_id FROM mails m
        WHERE state = 'pending' AND due_at <= now()
          AND NOT EXISTS (SELECT FROM mails earlier
                          WHERE earlier.order_id = m.order_id AND earlier.number < m.number
                            AND earlier.state IN ('waiting', 'pending', 'sending'))
        ORDER BY due_at LIMIT 1 FOR UPDATE SKIP LOCKED)
    UPDATE mails m SET state = 'sending', due_at = NULL, attempt_id = $1, attempt_by = $2, lease_until = due_in($3)
    FROM next, orders o JOIN addressees a USING (user_id)
    WHERE m.notification_id = next.notification_id AND o.order_id = m.order_id
    RETURNING m.notification_id, m.order_id, m.event_type, m.schema_version, m.payload, m.tries, m.traceparent, m.tracestate,
              coalesce(o.email, a.email) AS email, a.first_name";

/// An attempt to send a mail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    pub attempt_id: Uuid,
    pub mail_id: MailId,
}

/// A mail that somebody has taken to send it. No `Debug`: it is personal.
#[derive(QueryableByName)]
pub struct Claimed {
    #[diesel(sql_type = SqlUuid)]
    pub notification_id: Uuid,
    #[diesel(sql_type = SqlUuid)]
    pub order_id: Uuid,
    #[diesel(sql_type = Text)]
    pub event_type: String,
    #[diesel(sql_type = Integer)]
    pub schema_version: i32,
    #[diesel(sql_type = Binary)]
    pub payload: Vec<u8>,
    /// Attempts in vain before this one.
    #[diesel(sql_type = Integer)]
    pub tries: i32,
    #[diesel(sql_type = Nullable<Text>)]
    pub traceparent: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub tracestate: Option<String>,
    /// The order's own address, or its user's.
    #[diesel(sql_type = Text)]
    pub email: String,
    #[diesel(sql_type = Nullable<Text>)]
    pub first_name: Option<String>,
}

#[derive(QueryableByName)]
struct IsDue {
    #[diesel(sql_type = Bool)]
    is_due: bool,
}

/// Whether there is anything to take.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn is_due(conn: &mut AsyncPgConnection) -> Result<bool, StoreError> {
    let found: IsDue = diesel::sql_query(
        "SELECT EXISTS (SELECT FROM mails WHERE state = 'pending' AND due_at <= now()) AS is_due",
    )
    .get_result(conn)
    .await?;
    Ok(found.is_due)
}

/// Takes a mail that is due, for `lease`: until then it belongs to the attempt. In a transaction of its own.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn claim(
    conn: &mut AsyncPgConnection,
    attempt_id: Uuid,
    by: &str,
    lease: Duration,
) -> Result<Option<Claimed>, StoreError> {
    let claimed = diesel::sql_query(CLAIM)
        .bind::<SqlUuid, _>(attempt_id)
        .bind::<Text, _>(by)
        .bind::<Double, _>(lease.as_secs_f64())
        .get_result(conn)
        .await
        .optional()?;
    Ok(claimed)
}

/// Gives back what an attempt has taken without beginning to send it.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn give_back(conn: &mut AsyncPgConnection, attempt_id: Uuid) -> Result<(), StoreError> {
    diesel::sql_query(
        "UPDATE mails SET state = 'pending', due_at = due_in(0), attempt_id = NULL, attempt_by = NULL, lease_until = NULL
         WHERE attempt_id = $1 AND state = 'sending'",
    )
    .bind::<SqlUuid, _>(attempt_id)
    .execute(conn)
    .await?;
    Ok(())
}

/// The event of a mail that was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    pub event_id: Uuid,
    pub event_type: &'static str,
    pub mail_id: MailId,
    pub order_id: OrderId,
}

#[derive(QueryableByName)]
struct SentMail {
    #[diesel(sql_type = SqlUuid)]
    order_id: Uuid,
    #[diesel(sql_type = Text)]
    event_type: String,
}

/// What every way out of an attempt clears.
const LEFT: &str = "attempt_id = NULL, attempt_by = NULL, lease_until = NULL";

/// Writes how an attempt ended, and the event and its outbox row if the mail was sent, in the caller's transaction. `None` when the mail
/// is the attempt's no more: an operator has decided meanwhile.
///
/// Of an attempt whose lease has passed, so that its mail is unknown by now, it is still taken that it was sent, or refused for good.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn finish(
    conn: &mut AsyncPgConnection,
    attempt: Attempt,
    next: Next,
) -> Result<Option<Option<Recorded>>, StoreError> {
    let Attempt { attempt_id, mail_id } = attempt;
    let written = match next {
        Next::Sent => {
            let at = Utc::now().trunc_subsecs(6);
            let sql = format!(
                "UPDATE mails SET state = 'sent', sent_at = $3, trouble = NULL, {LEFT}
                 WHERE notification_id = $1 AND attempt_id = $2 AND state IN ('sending', 'unknown')
                 RETURNING order_id, event_type"
            );
            let sent: Option<SentMail> = diesel::sql_query(sql)
                .bind::<SqlUuid, _>(mail_id.0)
                .bind::<SqlUuid, _>(attempt_id)
                .bind::<Timestamptz, _>(at)
                .get_result(conn)
                .await
                .optional()?;
            return match sent {
                None => Ok(None),
                Some(mail) => Ok(Some(Some(append(conn, mail_id, &mail, at).await?))),
            };
        }
        Next::Again {
            after,
            tries,
            trouble,
        } => {
            let sql = format!(
                "UPDATE mails SET state = 'pending', due_at = due_in($3), tries = $4, trouble = $5, {LEFT}
                 WHERE notification_id = $1 AND attempt_id = $2 AND state = 'sending'"
            );
            diesel::sql_query(sql)
                .bind::<SqlUuid, _>(mail_id.0)
                .bind::<SqlUuid, _>(attempt_id)
                .bind::<Double, _>(after.as_secs_f64())
                .bind::<Integer, _>(tries)
                .bind::<Text, _>(trouble.name())
                .execute(conn)
                .await?
        }
        Next::Failed(trouble) => {
            let sql = format!(
                "UPDATE mails SET state = 'failed', trouble = $3, {LEFT}
                 WHERE notification_id = $1 AND attempt_id = $2 AND state IN ('sending', 'unknown')"
            );
            diesel::sql_query(sql)
                .bind::<SqlUuid, _>(mail_id.0)
                .bind::<SqlUuid, _>(attempt_id)
                .bind::<Text, _>(trouble.name())
                .execute(conn)
                .await?
        }
        // It keeps its attempt, in case the answer turns up after all.
        Next::Unknown(trouble) => {
            diesel::sql_query(
                "UPDATE mails SET state = 'unknown', trouble = $3
                 WHERE notification_id = $1 AND attempt_id = $2 AND state = 'sending'",
            )
            .bind::<SqlUuid, _>(mail_id.0)
            .bind::<SqlUuid, _>(attempt_id)
            .bind::<Text, _>(trouble.name())
            .execute(conn)
            .await?
        }
    };
    Ok((written == 1).then_some(None))
}

async fn append(
    conn: &mut AsyncPgConnection,
    mail_id: MailId,
    mail: &SentMail,
    at: DateTime<Utc>,
) -> Result<Recorded, StoreError> {
    let broken = StoreError::Broken {
        id: mail_id,
        column: "event_type",
    };
    let template = codec::template(&mail.event_type).ok_or(broken)?;
    let order_id = OrderId(mail.order_id);
    let event = codec::encode_sent(mail_id, template, order_id, at);
    let event_type = event.event_type;
    let entity = Entity {
        entity_type: ENTITY_TYPE,
        entity_id: mail_id.to_string(),
        topic: None,
    };
    let trace = telemetry::current_trace_context();
    let cause = Cause {
        source: SOURCE,
        correlation_id: order_id.0,
        causation_id: Some(mail_id.0),
        traceparent: trace.traceparent,
        tracestate: trace.tracestate,
    };
    let ids = event_store::append(conn, &entity, 0, &[event], &cause)
        .await
        .map_err(|error| match error {
            AppendError::Conflict => StoreError::SentBefore(mail_id),
            AppendError::Database(error) => error.into(),
        })?;
    Ok(Recorded {
        event_id: ids.into_iter().next().unwrap_or_default(),
        event_type,
        mail_id,
        order_id,
    })
}

/// A mail whose attempt has not said in time how it ended.
#[derive(Debug, Clone, QueryableByName)]
pub struct Expired {
    #[diesel(sql_type = SqlUuid)]
    pub notification_id: Uuid,
    #[diesel(sql_type = SqlUuid)]
    pub order_id: Uuid,
    #[diesel(sql_type = Text)]
    pub attempt_by: String,
}

/// Makes mails unknown whose lease has passed: whoever was at them has died, perhaps after the mail server took them.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn expire(conn: &mut AsyncPgConnection) -> Result<Vec<Expired>, StoreError> {
    let expired = diesel::sql_query(
        "UPDATE mails SET state = 'unknown', trouble = $1
         WHERE state = 'sending' AND lease_until < now() RETURNING notification_id, order_id, attempt_by",
    )
    .bind::<Text, _>(Trouble::LeasePassed.name())
    .load(conn)
    .await?;
    Ok(expired)
}

/// How many mails there are, by state, without those that were sent; and for how long the oldest has been on its way.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Counts {
    pub mails: BTreeMap<String, i64>,
    pub oldest_seconds: f64,
}

#[derive(QueryableByName)]
struct CountRow {
    #[diesel(sql_type = Text)]
    state: String,
    #[diesel(sql_type = BigInt)]
    mails: i64,
    #[diesel(sql_type = Double)]
    oldest_seconds: f64,
}

/// Counts.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn count(conn: &mut AsyncPgConnection) -> Result<Counts, StoreError> {
    let rows: Vec<CountRow> = diesel::sql_query(
        "SELECT state, count(*) AS mails, extract(epoch FROM clock_timestamp() - min(created_at))::float8 AS oldest_seconds
         FROM mails WHERE state IN ('waiting', 'pending', 'sending') GROUP BY state
         UNION ALL
         SELECT state, count(*), 0 FROM mails WHERE state IN ('failed', 'unknown') GROUP BY state",
    )
    .load(conn)
    .await?;
    let mut counts = Counts::default();
    for row in rows {
        if row.state != State::Waiting.name() {
            counts.oldest_seconds = counts.oldest_seconds.max(row.oldest_seconds);
        }
        counts.mails.insert(row.state, row.mails);
    }
    Ok(counts)
}

/// A mail as operators see it: nothing of it is personal.
#[derive(Debug, Clone, Serialize, QueryableByName)]
pub struct Listed {
    #[diesel(sql_type = SqlUuid)]
    pub notification_id: Uuid,
    #[diesel(sql_type = SqlUuid)]
    pub order_id: Uuid,
    #[diesel(sql_type = Text)]
    pub event_type: String,
    #[diesel(sql_type = Text)]
    pub state: String,
    #[diesel(sql_type = Integer)]
    pub tries: i32,
    #[diesel(sql_type = Nullable<Text>)]
    pub trouble: Option<String>,
    #[diesel(sql_type = Timestamptz)]
    pub created_at: DateTime<Utc>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub due_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Text>)]
    pub attempt_by: Option<String>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub sent_at: Option<DateTime<Utc>>,
}

const LISTED: &str =
    "notification_id, order_id, event_type, state, tries, trouble, created_at, due_at, attempt_by, sent_at";

/// Mails in a state, or all that were not sent; first what came first, at most `limit`.
///
/// # Errors
/// Whatever PostgreSQL says.
pub async fn list(
    conn: &mut AsyncPgConnection,
    state: Option<State>,
    limit: u32,
) -> Result<Vec<Listed>, StoreError> {
    let sql = format!(
        "SELECT {LISTED} FROM mails WHERE CASE WHEN $1 IS NULL THEN state <> 'sent' ELSE state = $1 END
         ORDER BY number LIMIT $2"
    );
    let listed = diesel::sql_query(sql)
        .bind::<Nullable<Text>, _>(state.map(State::name))
        .bind::<BigInt, _>(i64::from(limit))
        .load(conn)
        .await?;
    Ok(listed)
}

/// Who decided what about a mail.
#[derive(Debug, Clone, Serialize, QueryableByName)]
pub struct Audit {
    #[diesel(sql_type = Timestamptz)]
    pub at: DateTime<Utc>,
    #[diesel(sql_type = Text)]
    pub decided_by: String,
    #[diesel(sql_type = Text)]
    pub action: String,
    #[diesel(sql_type = Text)]
    pub state: String,
    #[diesel(sql_type = Text)]
    pub trouble: String,
    #[diesel(sql_type = Text)]
    pub reason: String,
}

/// A mail, and who decided what about it.
#[derive(Debug, Clone, Serialize)]
pub struct Shown {
    #[serde(flatten)]
    pub mail: Listed,
    pub audit: Vec<Audit>,
}

/// A mail and its audit.
///
/// # Errors
/// [`StoreError::NoMail`]
pub async fn show(conn: &mut AsyncPgConnection, id: MailId) -> Result<Shown, StoreError> {
    let sql = format!("SELECT {LISTED} FROM mails WHERE notification_id = $1");
    let mail = diesel::sql_query(sql)
        .bind::<SqlUuid, _>(id.0)
        .get_result(conn)
        .await
        .optional()?;
    let audit = diesel::sql_query(
        "SELECT at, decided_by, action, state, trouble, reason FROM mails_audit WHERE notification_id = $1 ORDER BY id",
    )
    .bind::<SqlUuid, _>(id.0)
    .load(conn)
    .await?;
    Ok(Shown {
        mail: mail.ok_or(StoreError::NoMail(id))?,
        audit,
    })
}

/// What an operator decides about a mail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// An unknown one was sent.
    Sent,
    /// An unknown or failed one is to be sent, even if somebody gets it twice.
    Resend,
}

#[derive(QueryableByName)]
struct ToDecide {
    #[diesel(sql_type = Text)]
    state: String,
    #[diesel(sql_type = Nullable<Text>)]
    trouble: Option<String>,
    #[diesel(sql_type = SqlUuid)]
    order_id: Uuid,
    #[diesel(sql_type = Text)]
    event_type: String,
}

/// Does what an operator decides, and keeps who, what and why, in the caller's transaction.
///
/// # Errors
/// [`StoreError::NoMail`] and [`StoreError::NotToSettle`].
pub async fn decide(
    conn: &mut AsyncPgConnection,
    id: MailId,
    decision: Decision,
    reason: &str,
    by: &str,
) -> Result<Option<Recorded>, StoreError> {
    let mail: ToDecide = diesel::sql_query(
        "SELECT state, trouble, order_id, event_type FROM mails WHERE notification_id = $1 FOR UPDATE",
    )
    .bind::<SqlUuid, _>(id.0)
    .get_result(conn)
    .await
    .optional()?
    .ok_or(StoreError::NoMail(id))?;
    let (action, allowed): (_, &[State]) = match decision {
        Decision::Sent => ("sent", &[State::Unknown]),
        Decision::Resend => ("resend", &[State::Unknown, State::Failed]),
    };
    if !allowed.iter().any(|state| state.name() == mail.state) {
        return Err(StoreError::NotToSettle {
            id,
            state: mail.state,
            allowed: match decision {
                Decision::Sent => "unknown",
                Decision::Resend => "unknown or failed",
            },
        });
    }
    diesel::sql_query(
        "INSERT INTO mails_audit (notification_id, action, state, trouble, reason, decided_by) VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind::<SqlUuid, _>(id.0)
    .bind::<Text, _>(action)
    .bind::<Text, _>(&mail.state)
    .bind::<Text, _>(mail.trouble.unwrap_or_default())
    .bind::<Text, _>(reason)
    .bind::<Text, _>(by)
    .execute(conn)
    .await?;
    let at = Utc::now().trunc_subsecs(6);
    let (change, sent_at) = match decision {
        Decision::Sent => ("state = 'sent', trouble = NULL", Some(at)),
        Decision::Resend => ("state = 'pending', tries = 0, due_at = due_in(0)", None),
    };
    diesel::sql_query(format!(
        "UPDATE mails SET {change}, sent_at = $2, {LEFT} WHERE notification_id = $1"
    ))
    .bind::<SqlUuid, _>(id.0)
    .bind::<Nullable<Timestamptz>, _>(sent_at)
    .execute(conn)
    .await?;
    match decision {
        Decision::Resend => Ok(None),
        Decision::Sent => {
            let ToDecide {
                order_id, event_type, ..
            } = mail;
            let sent = SentMail { order_id, event_type };
            append(conn, id, &sent, at).await.map(Some)
        }
    }
}
