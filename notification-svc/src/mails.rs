//! The commands on mails: `mails list`, `show`, `settle`.

use std::fmt::Write as _;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use service::config::Database;
use service::db::Db;
use service::deadline::Deadline;
use service::shutdown::BoxError;
use uuid::Uuid;

use crate::domain::{MailId, State};
use crate::sender::log_sent;
use crate::store::{self, Audit, Decision, Listed};

/// For one command.
const PATIENCE: Duration = Duration::from_secs(30);

/// Mails, and what to do with those of which nobody knows whether they were sent.
#[derive(Debug, Clone, Subcommand)]
pub enum Mails {
    /// Mails that were not sent, or those of a state; first what came first.
    List {
        #[arg(long, value_enum)]
        state: Option<StateArg>,
        /// At most so many.
        #[arg(long, default_value_t = 1000)]
        limit: u32,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// One mail, and who decided what about it.
    Show {
        id: Uuid,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Decide about a mail that is unknown or failed.
    Settle {
        id: Uuid,
        #[command(flatten)]
        decision: DecisionArgs,
        /// Why; kept for ever.
        #[arg(long)]
        reason: String,
        /// Who decides.
        #[arg(long, env = "USER", default_value = "unknown")]
        by: String,
    },
}

/// One of them.
#[derive(Debug, Clone, Copy, Args)]
#[group(required = true, multiple = false)]
pub struct DecisionArgs {
    /// An unknown one was sent: so it is recorded, and told to the others.
    #[arg(long)]
    sent: bool,
    /// Send it, even if somebody gets it twice. The message has the same id as before.
    #[arg(long)]
    resend: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StateArg {
    Waiting,
    Pending,
    Sending,
    Sent,
    Failed,
    Unknown,
}

impl From<StateArg> for State {
    fn from(state: StateArg) -> Self {
        match state {
            StateArg::Waiting => Self::Waiting,
            StateArg::Pending => Self::Pending,
            StateArg::Sending => Self::Sending,
            StateArg::Sent => Self::Sent,
            StateArg::Failed => Self::Failed,
            StateArg::Unknown => Self::Unknown,
        }
    }
}

impl Mails {
    /// Does it and prints the answer on standard output.
    ///
    /// # Errors
    /// When it cannot be done.
    #[expect(clippy::print_stdout, reason = "the answer is the command's output")]
    pub async fn run(self, database: &Database, process: &str) -> Result<(), BoxError> {
        let db = Db::new(database, &format!("{process} mails"))?;
        let deadline = Deadline::after(PATIENCE);
        let text = match self {
            Self::List { state, limit, json } => {
                let input = (state.map(State::from), limit);
                let listed = db
                    .read(deadline, &input, |conn, &(state, limit)| {
                        Box::pin(store::list(conn, state, limit))
                    })
                    .await?;
                if json {
                    serde_json::to_string(&listed)?
                } else {
                    listed.iter().map(line).collect()
                }
            }
            Self::Show { id, json } => {
                let shown = db
                    .read(deadline, &MailId(id), |conn, id| Box::pin(store::show(conn, *id)))
                    .await?;
                if json {
                    serde_json::to_string(&shown)?
                } else {
                    let mut text = line(&shown.mail);
                    for audit in &shown.audit {
                        let Audit {
                            at,
                            decided_by,
                            action,
                            state,
                            trouble,
                            reason,
                        } = audit;
                        writeln!(
                            text,
                            "{at} {action} by {decided_by}, when it was {state} ({trouble}): {reason}"
                        )?;
                    }
                    text
                }
            }
            Self::Settle {
                id,
                decision,
                reason,
                by,
            } => {
                let decision = if decision.sent {
                    Decision::Sent
                } else {
                    Decision::Resend
                };
                let input = (MailId(id), decision, reason, by);
                let recorded = db
                    .transaction(deadline, &input, |conn, (id, decision, reason, by)| {
                        Box::pin(store::decide(conn, *id, *decision, reason, by))
                    })
                    .await?;
                if let Some(recorded) = &recorded {
                    log_sent(recorded);
                }
                match decision {
                    Decision::Sent => format!("{id} counts as sent"),
                    Decision::Resend => format!("{id} is to be sent"),
                }
            }
        };
        println!("{}", text.trim_end());
        Ok(())
    }
}

fn line(mail: &Listed) -> String {
    let Listed {
        notification_id,
        order_id,
        event_type,
        state,
        tries,
        trouble,
        created_at,
        attempt_by,
        ..
    } = mail;
    format!(
        "{notification_id} {state} {event_type} order {order_id}, since {created_at}, tries {tries}, trouble {}, attempt by {}\n",
        trouble.as_deref().unwrap_or("-"),
        attempt_by.as_deref().unwrap_or("-"),
    )
}
