//! The commands on a consumer's parked records: `dlt list`, `show`, `replay`, `discard`.

use std::fmt::Write as _;

use clap::Subcommand;
use consumer::{Audit, Config, End, Handler, Outcome, Parked, Redrive, Run, Shown, Which};
use serde_json::{Value, json};
use service::config::Database;
use service::db::Db;
use service::shutdown::BoxError;

/// Records that could not be handled, and the later ones of their entities.
#[derive(Debug, Clone, Subcommand)]
pub enum Dlt {
    /// What is parked, first what was parked first.
    List {
        /// Also what was settled.
        #[arg(long)]
        settled: bool,
        /// At most so many.
        #[arg(long, default_value_t = 1000)]
        limit: u32,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Everything about one record, but its key and value, which may be personal.
    Show {
        id: i64,
        /// Key and value too, in JSON as arrays of bytes.
        #[arg(long)]
        value: bool,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Hand records to the service again, those of each entity in their order, up to the first that still fails.
    Replay {
        /// Records; each stands for its entity.
        #[arg(required_unless_present = "all")]
        ids: Vec<i64>,
        /// All entities.
        #[arg(long, conflicts_with = "ids")]
        all: bool,
        /// Do it, say what happens, and roll it back.
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        decision: Decision,
    },
    /// Give up the first record of its entity, and replay what waits behind it.
    Discard {
        id: i64,
        /// Why; kept for ever.
        #[arg(long)]
        reason: String,
        #[command(flatten)]
        decision: Decision,
    },
}

/// Of commands that change something.
#[derive(Debug, Clone, clap::Args)]
pub struct Decision {
    /// Who decides.
    #[arg(long, env = "USER", default_value = "unknown")]
    by: String,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

impl Dlt {
    /// Does it and prints the answer on standard output.
    ///
    /// # Errors
    /// When it cannot be done, and when a record still fails.
    #[expect(clippy::print_stdout, reason = "the answer is the command's output")]
    pub async fn run<H: Handler>(
        self,
        config: Config,
        database: &Database,
        process: &str,
        handler: H,
    ) -> Result<(), BoxError> {
        let db = Db::new(database, &format!("{process} dlt"))?;
        let redrive = Redrive::new(config, db.pool().clone(), handler);
        let (text, failed) = match self {
            Self::List { settled, limit, json } => {
                let records = redrive.list(settled, limit.into()).await?;
                let text = if json {
                    serde_json::to_string(&records)?
                } else {
                    records.iter().map(line).collect()
                };
                (text, 0)
            }
            Self::Show { id, value, json } => (show(redrive.show(id).await?, value, json)?, 0),
            Self::Replay {
                ids,
                all,
                dry_run,
                decision,
            } => {
                let which = if all { Which::All } else { Which::Of(ids) };
                let run = if dry_run { Run::Dry } else { Run::Real };
                told(&redrive.replay(&which, run, &decision.by).await?, decision.json)?
            }
            Self::Discard { id, reason, decision } => {
                told(&redrive.discard(id, &reason, &decision.by).await?, decision.json)?
            }
        };
        println!("{}", text.trim_end());
        if failed > 0 {
            return Err(format!("{failed} records still cannot be handled").into());
        }
        Ok(())
    }
}

fn line(record: &Parked) -> String {
    format!(
        "{} {} {}/{}/{} {} {} {} {}: {}\n",
        record.id,
        record.state,
        record.topic,
        record.partition,
        record.offset,
        record.entity_id.as_deref().unwrap_or("-"),
        record
            .version
            .map_or("-".to_owned(), |version| format!("v{version}")),
        record.event_type.as_deref().unwrap_or("-"),
        record.error_kind,
        record.error,
    )
}

fn show(shown: Shown, value: bool, json: bool) -> Result<String, BoxError> {
    let bytes = |bytes: &Option<Vec<u8>>| bytes.as_ref().map(Vec::len);
    let (key_bytes, value_bytes) = (bytes(&shown.key), bytes(&shown.value));
    let mut document = serde_json::to_value(&shown)?;
    if let Value::Object(fields) = &mut document {
        fields.insert("key_bytes".to_owned(), json!(key_bytes));
        fields.insert("value_bytes".to_owned(), json!(value_bytes));
        if !value {
            fields.remove("key");
            fields.remove("value");
        }
    }
    if json {
        return Ok(document.to_string());
    }
    let mut text = line(&shown.record);
    writeln!(
        text,
        "attempts {}, parked at {}",
        shown.record.attempts, shown.record.parked_at
    )?;
    for header in shown.headers.as_array().into_iter().flatten() {
        writeln!(text, "header {header}")?;
    }
    let length = |bytes: Option<usize>| bytes.map_or("none".to_owned(), |bytes| format!("{bytes} bytes"));
    writeln!(text, "key {}, value {}", length(key_bytes), length(value_bytes))?;
    if value {
        let show = |bytes: &Option<Vec<u8>>| {
            bytes
                .as_ref()
                .map(|bytes| bytes.escape_ascii().to_string())
                .unwrap_or_default()
        };
        writeln!(text, "key {}\nvalue {}", show(&shown.key), show(&shown.value))?;
    }
    for Audit {
        at,
        decided_by,
        action,
        outcome,
        reason,
    } in &shown.audit
    {
        let reason = reason.as_deref().unwrap_or("-");
        writeln!(
            text,
            "{at} {action} by {decided_by}: {outcome} (reason: {reason})"
        )?;
    }
    Ok(text)
}

/// In words or as JSON, and how many failed.
fn told(outcomes: &[Outcome], json: bool) -> Result<(String, usize), BoxError> {
    let failed = outcomes
        .iter()
        .filter(|outcome| matches!(outcome.end, End::Failed { .. }))
        .count();
    if json {
        return Ok((serde_json::to_string(outcomes)?, failed));
    }
    let mut text = String::new();
    for Outcome { id, end } in outcomes {
        match end {
            End::Replayed => writeln!(text, "{id} replayed")?,
            End::Repeated => writeln!(text, "{id} was there before")?,
            End::Discarded => writeln!(text, "{id} discarded")?,
            End::Failed { error, .. } => writeln!(text, "{id} failed: {error}")?,
        }
    }
    if outcomes.is_empty() {
        writeln!(text, "nothing is parked")?;
    }
    Ok((text, failed))
}
