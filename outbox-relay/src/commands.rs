//! What people ask of a relay and its outboxes on the command line. Answers go to standard output, as tables or, with
//! `--json`, as one JSON document; errors and progress go to standard error.

use std::process::ExitCode;

use serde_json::{Value, json};
use tokio_postgres::error::SqlState;

use crate::config::{Config, Outbox, Versions};
use crate::context::TermError;
use crate::database::{Database, DatabaseError};
use crate::source::SourceError;
use crate::source::quarantine::Quarantine;

pub mod init;
pub mod quarantine;
pub mod replay;
pub mod status;
mod topics;
pub mod verify;

/// Something is not as it should be: `verify` has found differences.
pub const EXIT_DIFFERENCES: u8 = 3;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error(transparent)]
    Source(SourceError),
    #[error("Kafka: {doing}")]
    Kafka {
        doing: &'static str,
        source: rdkafka::error::KafkaError,
    },
    /// Words are missing or wrong.
    #[error("{0}")]
    Usage(String),
    /// It cannot be done as things are.
    #[error("{0}")]
    Refused(String),
}

impl From<SourceError> for CommandError {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Database(DatabaseError::Unavailable { source, .. })
                if source.code() == Some(&SqlState::UNDEFINED_TABLE) =>
            {
                let problem = source
                    .as_db_error()
                    .map_or("a table is missing", |error| error.message());
                Self::Refused(format!("{problem}: make it with outbox-relay init"))
            }
            other => Self::Source(other),
        }
    }
}

impl From<DatabaseError> for CommandError {
    fn from(error: DatabaseError) -> Self {
        SourceError::from(error).into()
    }
}

impl From<TermError> for CommandError {
    fn from(error: TermError) -> Self {
        match error {
            TermError::Source(error) => error.into(),
            other => Self::Refused(service::telemetry::chain(&other).to_string()),
        }
    }
}

/// How answers look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Table,
    Json,
}

/// What a command answers.
#[derive(Debug)]
pub struct Answer {
    json: Value,
    text: String,
    code: u8,
}

impl Answer {
    fn new(json: Value, text: impl Into<String>) -> Self {
        Self {
            json,
            text: text.into(),
            code: 0,
        }
    }

    fn with_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// The answer as JSON.
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// The exit code that goes with it.
    pub fn code(&self) -> u8 {
        self.code
    }

    /// As it is printed.
    pub fn render(&self, format: Format) -> String {
        match format {
            Format::Json => self.json.to_string(),
            Format::Table => self.text.clone(),
        }
    }
}

/// Runs a command to its end and prints what it answers.
pub fn run(format: Format, command: impl Future<Output = Result<Answer, CommandError>>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(format, &error.to_string()),
    };
    let asked = runtime.block_on(command);
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    match asked {
        Ok(answer) => {
            #[expect(clippy::print_stdout, reason = "what a command answers")]
            {
                println!("{}", answer.render(format));
            }
            ExitCode::from(answer.code)
        }
        Err(CommandError::Usage(problem)) => {
            fail(format, &problem);
            ExitCode::from(2)
        }
        Err(error) => fail(format, &service::telemetry::chain(&error).to_string()),
    }
}

fn fail(format: Format, problem: &str) -> ExitCode {
    #[expect(clippy::print_stderr, reason = "what a command says when it fails")]
    match format {
        Format::Table => eprintln!("error: {problem}"),
        Format::Json => eprintln!("{}", json!({ "error": problem })),
    }
    ExitCode::FAILURE
}

/// The outbox of this name; the only one, when no name is given.
fn pick<'c>(config: &'c Config, name: Option<&str>) -> Result<(&'c str, &'c Outbox), CommandError> {
    let names = || {
        config
            .outboxes
            .keys()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(", ")
    };
    match name {
        Some(name) => match config.outboxes.get_key_value(name) {
            Some((name, outbox)) => Ok((name, outbox)),
            None => Err(CommandError::Usage(format!(
                "there is no outbox {name}; the configuration has {}",
                names()
            ))),
        },
        None => match config.outboxes.iter().next() {
            Some((name, outbox)) if config.outboxes.len() == 1 => Ok((name, outbox)),
            _ => Err(CommandError::Usage(format!("say which outbox: {}", names()))),
        },
    }
}

async fn connect(outbox: &Outbox, command: &str) -> Result<Database, CommandError> {
    let application = format!("outbox-relay {command}");
    Ok(Database::connect(&outbox.connection, &application, LIMIT).await?)
}

/// Bound on a statement of a command.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(30);

fn quarantine_of<'a>(db: &'a Database, name: &'a str, outbox: &'a Outbox) -> Quarantine<'a> {
    Quarantine {
        db,
        table: &outbox.table,
        name,
        by_version: outbox.versions == Versions::Contiguous,
    }
}

/// Rows below headings, without lines.
fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = comfy_table::Table::new();
    table
        .load_preset(comfy_table::presets::NOTHING)
        .set_header(headings.to_vec());
    for row in rows {
        table.add_row(row);
    }
    table.trim_fmt()
}

fn shown<T: std::fmt::Display>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn seconds(value: f64) -> String {
    if value < 1.0 {
        format!("{:.1} ms", value * 1e3)
    } else {
        humantime::format_duration(std::time::Duration::from_secs(value as u64)).to_string()
    }
}

/// Says who asks, for the record.
pub(crate) fn asker() -> String {
    std::env::var("USER").unwrap_or_else(|_| "command line".to_owned())
}
