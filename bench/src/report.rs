//! What a run found: figures for programs, tables for people, and on what machine it was.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use chrono::{DateTime, Utc};
use comfy_table::{Table, presets};
use local_stack::{debezium, kafka};
use serde_json::{Map, Value};
use tokio_postgres::Client;

use crate::ui;

/// Where results are kept, from the workspace's folder.
const FOLDER: &str = "bench/results";

/// A table with what is to be said of it.
pub(crate) struct Section {
    title: String,
    notes: Vec<String>,
    table: Option<Table>,
}

impl Section {
    pub(crate) fn new(title: &str) -> Self {
        Self {
            title: title.to_owned(),
            notes: Vec::new(),
            table: None,
        }
    }

    pub(crate) fn note(mut self, text: impl Into<String>) -> Self {
        self.notes.push(text.into());
        self
    }

    /// With what everything was measured.
    pub(crate) fn settings(settings: impl IntoIterator<Item = String>) -> Self {
        let lines = settings.into_iter().map(|line| format!("- {line}"));
        lines.fold(Self::new("Settings"), Self::note)
    }

    pub(crate) fn columns(mut self, names: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN).set_header(names);
        self.table = Some(table);
        self
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().collect();
        if let Some(table) = &mut self.table {
            table.add_row(cells);
        }
    }

    /// A row for the good circumstance and one for the bad: name, rate, and behind the second one their ratio, which is returned.
    pub(crate) fn compare(&mut self, names: [&str; 2], rates: [Option<f64>; 2]) -> Option<f64> {
        let ratio = rates[0].zip(rates[1]).map(|(good, bad)| bad / good);
        let ratios = [String::new(), number(ratio, 3)];
        for ((name, rate), ratio) in names.into_iter().zip(rates).zip(ratios) {
            self.row([name.to_owned(), thousands(rate.unwrap_or_default()), ratio]);
        }
        ratio
    }

    fn text(&self) -> String {
        let mut text = format!("## {}\n\n", self.title);
        for note in &self.notes {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{note}");
        }
        if let Some(table) = &self.table {
            if !self.notes.is_empty() {
                text.push('\n');
            }
            let _ = writeln!(text, "{table}");
        }
        text
    }
}

/// Where the result goes besides standard output.
#[derive(Debug, clap::Args)]
pub(crate) struct Output {
    /// Print the result as one JSON object on the last line
    #[arg(long)]
    json: bool,
    /// Write no file
    #[arg(long)]
    no_file: bool,
}

/// Everything that a run found.
pub(crate) struct Report {
    name: &'static str,
    started: DateTime<Utc>,
    sections: Vec<Section>,
    figures: Map<String, Value>,
}

impl Report {
    /// `keys` are in the result even when they are not measured, as null.
    pub(crate) fn new(name: &'static str, keys: &[&str]) -> Self {
        Self {
            name,
            started: Utc::now(),
            sections: Vec::new(),
            figures: keys.iter().map(|key| ((*key).to_owned(), Value::Null)).collect(),
        }
    }

    pub(crate) fn section(&mut self, section: Section) {
        self.sections.push(section);
    }

    /// A figure, rounded to four digits or to what is left of the point.
    pub(crate) fn figure(&mut self, key: &str, value: Option<f64>) {
        let value = value.filter(|value| value.is_finite()).map(round);
        self.figures
            .insert(key.to_owned(), value.map_or(Value::Null, Value::from));
    }

    pub(crate) fn get(&self, key: &str) -> Option<f64> {
        self.figures.get(key)?.as_f64()
    }

    /// Tells everyone who wants to know.
    pub(crate) fn tell(&self, machine: &[String], output: &Output) -> Result<()> {
        let mut out = std::io::stdout();
        writeln!(out, "{}", self.text(machine))?;
        if !output.no_file {
            ui::done(&format!("written to {}", self.write(machine)?.display()));
        }
        if output.json {
            writeln!(out, "{}", self.json())?;
        }
        Ok(())
    }

    /// The document, as it is kept.
    fn text(&self, machine: &[String]) -> String {
        let mut text = format!(
            "# ./dev bench {} of {}\n\n",
            self.name,
            self.started.format("%Y-%m-%d %H:%M UTC")
        );
        for line in machine {
            let _ = writeln!(text, "- {line}");
        }
        for section in &self.sections {
            let _ = write!(text, "\n{}", section.text());
        }
        text
    }

    /// Writes the document, with the figures at its end, and returns where.
    fn write(&self, machine: &[String]) -> Result<PathBuf> {
        fs::create_dir_all(FOLDER).with_context(|| format!("cannot make {FOLDER}"))?;
        let path = PathBuf::from(format!(
            "{FOLDER}/{}-{}.md",
            self.name,
            self.started.format("%Y-%m-%d-%H%M")
        ));
        let text = format!("{}\n```json\n{}\n```\n", self.text(machine), self.json());
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// The figures as one object on one line.
    fn json(&self) -> String {
        Value::Object(self.figures.clone()).to_string()
    }
}

/// Four digits, or all that are left of the point.
fn round(value: f64) -> f64 {
    if value == 0.0 || value.abs() >= 1000.0 {
        return value.round();
    }
    let places = 3 - value.abs().log10().floor() as i32;
    let factor = 10f64.powi(places);
    (value * factor).round() / factor
}

/// The machine, and the versions of what runs on it.
pub(crate) async fn machine(database: &Client) -> Result<Vec<String>> {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown CPU", |(_, model)| model);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let gib = memory
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .split_whitespace()
                .next()?
                .parse::<f64>()
                .ok()
        })
        .unwrap_or_default()
        / 1024.0
        / 1024.0;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').take(3).collect::<Vec<_>>().join(" ");
    let postgres: String = database.query_one("SHOW server_version", &[]).await?.get(0);
    let java = kafka::find_java().map(|java| output(Command::new(java).arg("-version")));
    let java = java
        .as_deref()
        .and_then(|text| text.split('"').nth(1))
        .unwrap_or("unknown")
        .to_owned();
    let commit = output(Command::new("git").args(["describe", "--always", "--dirty", "--exclude=*"]));
    Ok(vec![
        format!("{cores} cores of {model}, {gib:.0} GiB, Linux {}", kernel.trim()),
        format!("load average before: {load}"),
        format!("PostgreSQL {postgres}"),
        format!(
            "Apache Kafka {}, Debezium {}, Java {java}",
            kafka::VERSION,
            debezium::VERSION
        ),
        format!(
            "librdkafka {}, commit {}",
            rdkafka::util::get_rdkafka_version().1,
            commit.trim()
        ),
    ])
}

/// What a command prints, wherever it prints it.
fn output(command: &mut Command) -> String {
    command
        .output()
        .map(|output| {
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
        })
        .unwrap_or_default()
}

/// `123,456`
pub(crate) fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// With so many places, or a dash.
pub(crate) fn number(value: Option<f64>, places: usize) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.places$}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_rounded_and_those_that_are_missing_are_null() {
        let mut report = Report::new("x", &["a", "b", "c"]);
        report.figure("a", Some(123_456.7));
        report.figure("b", Some(0.012_345_6));
        assert_eq!(report.json(), r#"{"a":123457.0,"b":0.01235,"c":null}"#);
        assert_eq!(thousands(1_234_567.4), "1,234,567");
        assert_eq!(thousands(123.0), "123");
    }
}
