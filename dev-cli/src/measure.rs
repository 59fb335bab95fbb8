//! What the `demo` program says while it places orders, and what it found in the end: one JSON object a line, in a file.

use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// A line of that file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Message {
    Progress(Progress),
    Report(Box<Report>),
}

/// How far things have come.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Progress {
    /// What is being done.
    pub(crate) phase: String,
    /// How many orders are to be placed.
    pub(crate) orders: u64,
    pub(crate) placed: u64,
    pub(crate) outbox_rows: u64,
    pub(crate) kafka_records: u64,
    /// How many events the read model has taken in.
    pub(crate) projected_events: u64,
}

/// The figures, in the order in which they are shown and under the keys of `--json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Figures {
    pub(crate) placed: u64,
    pub(crate) cancelled: u64,
    pub(crate) outbox_rows: u64,
    pub(crate) kafka_records: u64,
    pub(crate) lost: u64,
    pub(crate) repeated: u64,
    pub(crate) out_of_order: u64,
    pub(crate) projected: u64,
    pub(crate) kafka_p50_ms: f64,
    pub(crate) kafka_p99_ms: f64,
    pub(crate) view_p50_ms: f64,
    pub(crate) view_p99_ms: f64,
    pub(crate) reconciled: bool,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Report {
    #[serde(flatten)]
    pub(crate) figures: Figures,
    /// What does not fit, in words.
    pub(crate) problems: Vec<String>,
    /// Of what the load consisted, in words.
    pub(crate) load: String,
}

impl Figures {
    pub(crate) fn table(&self) -> String {
        let rows = [
            ("orders placed", self.placed.to_string(), ""),
            ("orders cancelled", self.cancelled.to_string(), ""),
            (
                "outbox rows",
                self.outbox_rows.to_string(),
                "one per event, in the orders database",
            ),
            (
                "records on Kafka",
                self.kafka_records.to_string(),
                "in events.order, repeats included",
            ),
            ("lost", self.lost.to_string(), "outbox rows without a record"),
            (
                "repeated",
                self.repeated.to_string(),
                "records seen again, byte for byte the same",
            ),
            (
                "out of order",
                self.out_of_order.to_string(),
                "orders whose first records are not 1, 2, 3 ...",
            ),
            (
                "projected",
                self.projected.to_string(),
                "orders that the read model has as they are",
            ),
            (
                "commit to Kafka",
                pair(self.kafka_p50_ms, self.kafka_p99_ms),
                "p50 / p99",
            ),
            (
                "commit to read model",
                pair(self.view_p50_ms, self.view_p99_ms),
                "p50 / p99",
            ),
            (
                "reconciled",
                if self.reconciled { "yes" } else { "NO" }.to_owned(),
                "",
            ),
        ];
        let lines =
            rows.map(|(name, value, note)| format!("  {name:<22}{value:>20}  {note}").trim_end().to_owned());
        lines.join("\n")
    }
}

fn pair(p50: f64, p99: f64) -> String {
    format!("{p50:.1} / {p99:.1} ms")
}

/// Reads the messages as they are written.
pub(crate) struct Messages {
    path: PathBuf,
    offset: u64,
}

impl Messages {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, offset: 0 }
    }

    /// What has come since the last call.
    pub(crate) fn read(&mut self) -> Result<Vec<Message>> {
        let mut file = match std::fs::File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        file.seek(SeekFrom::Start(self.offset))?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        // The last line may not be whole yet.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        self.offset += whole as u64;
        text[..whole]
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("not understood: {line}")))
            .collect()
    }
}
