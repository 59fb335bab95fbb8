//! What the `demo` program says while it sends its load, and what it found in the end: one JSON object a line, in a file that
//! `./dev demo` reads as it is written.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// A line of that file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    Progress(Progress),
    Report(Box<Report>),
}

/// How far things have come.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done.
    pub phase: String,
    /// How many orders are to be placed.
    pub orders: u64,
    pub placed: u64,
    /// In all outboxes together.
    pub outbox_rows: u64,
    /// In all topics together.
    pub kafka_records: u64,
    /// How many events the read model has taken in.
    pub projected_events: u64,
    /// Orders, payments, reservations, mails and figures that have not come to their end.
    pub open: u64,
}

/// The figures, in the order in which they are shown and under the keys of `--json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    pub placed: u64,
    pub cancelled: u64,
    /// Orders that were cancelled because their stock was not to be had.
    pub out_of_stock: u64,
    /// Orders that were sent off, those delivered included.
    pub shipped: u64,
    /// Orders whose money was taken, also if it was given back.
    pub paid: u64,
    /// Payments that a bank refused.
    pub declined: u64,
    /// Payments that were given back.
    pub refunded: u64,
    pub outbox_rows: u64,
    pub kafka_records: u64,
    pub lost: u64,
    pub repeated: u64,
    pub out_of_order: u64,
    pub projected: u64,
    /// The provider's ledger has one charge of each order paid, of its total, and no other.
    pub charges_match: bool,
    /// The provider's ledger has one refund of each cancelled order that was paid, and no other.
    pub refunds_match: bool,
    /// Every piece of every product is where orders and the warehouse have put it.
    pub stock_conserved: bool,
    /// Every event that users are told of has its mail, which the mail server has once, or never when nobody knows what became of it.
    pub mails_match: bool,
    pub mails_sent: u64,
    /// Mails of which nobody knows whether the mail server has them.
    pub mails_unknown: u64,
    /// The figures of sales are what a fold of the topics gives.
    pub analytics_match: bool,
    /// Orders, payments and reservations that have not come to their end.
    pub sagas_open: u64,
    pub kafka_p50_ms: f64,
    pub kafka_p99_ms: f64,
    pub view_p50_ms: f64,
    pub view_p99_ms: f64,
    pub reconciled: bool,
}

/// What was found in the end.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    #[serde(flatten)]
    pub figures: Figures,
    /// What does not fit, in words.
    pub problems: Vec<String>,
    /// Of what the load consisted, in words.
    pub load: String,
}

impl Figures {
    /// For people.
    pub fn table(&self) -> String {
        let rows = [
            ("orders placed", self.placed.to_string(), ""),
            (
                "orders cancelled",
                self.cancelled.to_string(),
                "by users, out of stock, unpaid in time, or for good refused",
            ),
            (
                "orders out of stock",
                self.out_of_stock.to_string(),
                "among those cancelled",
            ),
            (
                "orders shipped",
                self.shipped.to_string(),
                "those delivered included",
            ),
            (
                "orders paid",
                self.paid.to_string(),
                "those refunded later included",
            ),
            (
                "payments declined",
                self.declined.to_string(),
                "by the card's bank",
            ),
            (
                "payments refunded",
                self.refunded.to_string(),
                "of cancelled orders",
            ),
            (
                "outbox rows",
                self.outbox_rows.to_string(),
                "one per event, in all databases",
            ),
            (
                "records on Kafka",
                self.kafka_records.to_string(),
                "in all topics of events, repeats included",
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
                "entities whose first records are not 1, 2, 3 ...",
            ),
            (
                "projected",
                self.projected.to_string(),
                "orders that the read model has as they are",
            ),
            (
                "charges match",
                yes(self.charges_match),
                "the provider's ledger = orders paid, each once",
            ),
            (
                "refunds match",
                yes(self.refunds_match),
                "the provider's ledger = cancelled paid orders",
            ),
            (
                "stock conserved",
                yes(self.stock_conserved),
                "available + reserved + sold, as orders and the warehouse say",
            ),
            (
                "mails match",
                yes(self.mails_match),
                "one per event that users are told of, each sent once",
            ),
            (
                "mails sent / unknown",
                format!("{} / {}", self.mails_sent, self.mails_unknown),
                "unknown: cut off while it was handed over",
            ),
            (
                "analytics match",
                yes(self.analytics_match),
                "figures of sales = a fold of the topics",
            ),
            (
                "sagas open",
                self.sagas_open.to_string(),
                "orders, payments, reservations without an end",
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
            ("reconciled", yes(self.reconciled), ""),
        ];
        let lines =
            rows.map(|(name, value, note)| format!("  {name:<22}{value:>20}  {note}").trim_end().to_owned());
        lines.join("\n")
    }
}

fn yes(is: bool) -> String {
    if is { "yes" } else { "NO" }.to_owned()
}

fn pair(p50: f64, p99: f64) -> String {
    format!("{p50:.1} / {p99:.1} ms")
}

/// The writing end.
#[derive(Debug)]
pub struct Writer(Mutex<File>);

impl Writer {
    /// Begins the file.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self(Mutex::new(file)))
    }

    /// Adds a line.
    pub fn send(&self, message: &Message) -> Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(&line).context("cannot write the messages")
    }
}

/// The reading end; the file need not be there yet.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    offset: u64,
}

impl Reader {
    pub fn new(path: PathBuf) -> Self {
        Self { path, offset: 0 }
    }

    /// What has come since the last call.
    pub fn read(&mut self) -> Result<Vec<Message>> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        // The last line may not be whole yet.
        let whole = bytes
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |end| end + 1);
        self.offset += whole as u64;
        bytes[..whole]
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| {
                serde_json::from_slice(line)
                    .with_context(|| format!("not understood: {}", String::from_utf8_lossy(line)))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_once_and_by_whole_lines() -> Result<()> {
        let path = std::env::temp_dir().join(format!("measure-{}", uuid::Uuid::new_v4()));
        let mut reader = Reader::new(path.clone());
        assert!(reader.read()?.is_empty());
        let writer = Writer::create(&path)?;
        let progress = Progress {
            phase: "ünder way".to_owned(),
            orders: 3,
            ..Progress::default()
        };
        writer.send(&Message::Progress(progress.clone()))?;
        std::fs::OpenOptions::new()
            .append(true)
            .open(&path)?
            .write_all(b"{\"progress")?;
        let read = reader.read()?;
        assert!(matches!(read.as_slice(), [Message::Progress(found)] if *found == progress));
        assert!(reader.read()?.is_empty());
        std::fs::remove_file(path)?;
        Ok(())
    }
}
