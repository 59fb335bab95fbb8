//! What is told to `./dev demo`: one JSON object a line.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::reconcile::Figures;

/// A line.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Message<'a> {
    Progress(Progress<'a>),
    Report(Report<'a>),
}

/// How far things have come.
#[derive(Debug, Serialize)]
pub(crate) struct Progress<'a> {
    pub(crate) phase: &'a str,
    pub(crate) orders: u64,
    pub(crate) placed: u64,
    pub(crate) outbox_rows: u64,
    pub(crate) kafka_records: u64,
    pub(crate) projected_events: u64,
}

/// What was found in the end.
#[derive(Debug, Serialize)]
pub(crate) struct Report<'a> {
    #[serde(flatten)]
    pub(crate) figures: &'a Figures,
    pub(crate) problems: &'a [String],
    pub(crate) load: &'a str,
}

/// The file that the messages go to.
pub(crate) struct Messages(Mutex<File>);

impl Messages {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self(Mutex::new(file)))
    }

    pub(crate) fn send(&self, message: &Message<'_>) -> Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        let mut file = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        file.write_all(&line).context("cannot write the messages")
    }
}
