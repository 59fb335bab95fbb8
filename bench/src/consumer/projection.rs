//! order-query-svc as a process, over a backlog: live, and building itself anew.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use local_stack::child;
use local_stack::process::{self, Process, http_get};
use local_stack::shop::ORDER_QUERY_SVC;
use serde::Deserialize;
use tokio_postgres::Client;

use super::backlog::Backlog;
use crate::drain::{self, Count, Drain, Sampler};
use crate::meter;
use crate::servers::Servers;

/// A rebuild that takes longer is stuck.
const REBUILD_LIMIT: Duration = Duration::from_secs(900);
/// How often what it has used is read: what it uses after the last time is not counted.
const METER_EVERY: Duration = Duration::from_millis(10);

/// A database of order-query-svc, and the topics that are read into it.
#[derive(Debug, Clone)]
pub(crate) struct Projection {
    pub(crate) database: String,
    pub(crate) backlog: Backlog,
}

/// What a rebuild took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rebuilt {
    /// Events a second from its beginning to after the swap.
    pub(crate) rate: f64,
    /// Milliseconds for which the live one is held up.
    pub(crate) swap_ms: f64,
    pub(crate) cpu_s_per_million: f64,
    pub(crate) postgres_cpu_s_per_million: f64,
    pub(crate) peak_mb: f64,
    /// Per cent of a core while it ran: of the process, of PostgreSQL, of Kafka.
    pub(crate) shares: [f64; 3],
}

/// What the command prints.
#[derive(Debug, Deserialize)]
struct Answer {
    records: u64,
    rate: f64,
    swap_ms: f64,
}

impl Projection {
    /// An empty one, in a database of its own.
    pub(crate) async fn create(servers: &Servers, database: &str, backlog: &Backlog) -> Result<Self> {
        servers.postgres.create_database(database).await?;
        let projection = Self {
            database: database.to_owned(),
            backlog: backlog.clone(),
        };
        projection.process(servers).arg("migrate").run_to_end().await?;
        Ok(projection)
    }

    fn process(&self, servers: &Servers) -> process::Builder {
        Process::builder(ORDER_QUERY_SVC, servers.folder(ORDER_QUERY_SVC))
            .set("database.url", servers.url(&self.database))
            .set("kafka.brokers", servers.brokers())
            // Offsets are the group's, and each database begins at the beginning.
            .set("consumer.group", format!("order-query-{}", self.database))
            .set("consumer.order_topic", &self.backlog.order_topic)
            .set("consumer.payment_topic", &self.backlog.payment_topic)
            .set("consumer.inventory_topic", &self.backlog.empty_topics[0])
            .set("consumer.notification_topic", &self.backlog.empty_topics[1])
    }

    /// Lets it work off its topics.
    pub(crate) async fn drain(&self, servers: &Servers) -> Result<Drain> {
        let started = Instant::now();
        let mut process = self.process(servers).start().await?;
        let pid = process.id().context("it has ended")?;
        let sampler = Sampler::start(Applied(process.admin()?));
        let check = || ensure_running(&mut process);
        let drain = drain::measure(servers, sampler, (pid, started), self.backlog.good, check).await?;
        let status = process.stop().await?;
        ensure!(status.success(), "{ORDER_QUERY_SVC} ended badly ({status})");
        Ok(drain)
    }

    /// Builds it anew, and fails unless the outcome is what was there before.
    pub(crate) async fn rebuild(&self, servers: &Servers) -> Result<Rebuilt> {
        let client = servers.connect(&self.database).await?;
        client.batch_execute(&keep_all()).await?;
        let mut child = self.process(servers).arg("rebuild").arg("--json").command()?;
        let pid = child.id();
        let began = Instant::now();
        let before = [0.0, servers.postgres_cpu()?, servers.kafka_cpu()?];
        let (mut cpu, mut peak_mb) = (0.0, 0.0);
        let status = loop {
            if let Some(status) = child.exited()? {
                break status;
            }
            // It may end at this very moment.
            if let (Ok(now), Ok(most)) = (meter::cpu_seconds(pid), meter::peak_mb(pid)) {
                (cpu, peak_mb) = (now, most);
            }
            ensure!(began.elapsed() < REBUILD_LIMIT, "the rebuild does not end");
            tokio::time::sleep(METER_EVERY).await;
        };
        let took = began.elapsed().as_secs_f64();
        let after = [cpu, servers.postgres_cpu()?, servers.kafka_cpu()?];
        let log = child::tail(child.log(), 20);
        ensure!(status.success(), "the rebuild failed ({status}):\n{log}");
        let answer = log
            .lines()
            .rev()
            .find_map(|line| serde_json::from_str::<Answer>(line).ok());
        let answer = answer.with_context(|| format!("the rebuild printed no result:\n{log}"))?;
        ensure!(
            answer.records == self.backlog.events,
            "the rebuild says that it has handled {} records of {}",
            answer.records,
            self.backlog.events
        );
        same(&client).await?;
        let used = |party: usize| after[party] - before[party];
        let per_million = |party| used(party) / answer.records as f64 * 1e6;
        Ok(Rebuilt {
            rate: answer.rate,
            swap_ms: answer.swap_ms,
            cpu_s_per_million: per_million(0),
            postgres_cpu_s_per_million: per_million(1),
            peak_mb,
            shares: [0, 1, 2].map(|party| used(party) / took * 100.0),
        })
    }
}

fn ensure_running(process: &mut Process) -> Result<()> {
    ensure!(
        process.is_running(),
        "it has ended; the end of its log:\n{}",
        child::tail(process.log(), 20)
    );
    Ok(())
}

/// What there is of each table, but for generations and when something was written. Copies are called `kept_…`.
const TABLES: [(&str, &str); 5] = [
    ("order_views", "SELECT * FROM order_views"),
    ("order_payments", "SELECT * FROM order_payments"),
    ("order_journey", "SELECT * FROM order_journey"),
    (
        "marks",
        "SELECT topic, entity_id, version, event_id, parked FROM consumer_marks m WHERE generation = \
         coalesce((SELECT live FROM consumer_generations g WHERE g.consumer = m.consumer), 1)",
    ),
    (
        "parked",
        "SELECT topic, partition, kafka_offset, record_time, entity_id, version, event_id, event_type, key, value, headers, \
         error_kind, error FROM parked_records WHERE state = 'parked'",
    ),
];

fn keep_all() -> String {
    let keep = |(name, rows): &(&str, &str)| {
        format!("DROP TABLE IF EXISTS kept_{name}; CREATE TABLE kept_{name} AS {rows};")
    };
    TABLES.iter().map(keep).collect::<String>() + "CHECKPOINT"
}

/// Fails unless every table says what its copy does, row for row.
async fn same(client: &Client) -> Result<()> {
    for (name, rows) in TABLES {
        let differences = format!(
            "SELECT count(*) FROM ((({rows}) EXCEPT ALL SELECT * FROM kept_{name}) \
             UNION ALL (SELECT * FROM kept_{name} EXCEPT ALL ({rows}))) d"
        );
        let count: i64 = client.query_one(&differences, &[]).await?.get(0);
        ensure!(count == 0, "{count} rows of {name} are not what they were");
    }
    let rows: i64 = client
        .query_one("SELECT count(*) FROM kept_order_views", &[])
        .await?
        .get(0);
    ensure!(rows > 0, "there was nothing to compare");
    Ok(())
}

/// How many records a process says that it has applied.
struct Applied(std::net::SocketAddr);

impl Count for Applied {
    const EVERY: Duration = Duration::from_millis(50);

    async fn count(&mut self) -> Result<u64> {
        let (_, text) = http_get(self.0, "/metrics").await?;
        Ok(applied(&text))
    }
}

fn applied(metrics: &str) -> u64 {
    let values = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix("consumer_messages_total{")?;
        let (labels, value) = rest.split_once("} ")?;
        labels
            .contains("outcome=\"applied\"")
            .then(|| value.parse::<f64>().ok())?
    });
    values.sum::<f64>() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_applied_is_counted_over_all_topics() {
        let text = "# TYPE consumer_messages_total counter\n\
                    consumer_messages_total{consumer=\"a\",outcome=\"applied\",topic=\"x\"} 2\n\
                    consumer_messages_total{consumer=\"a\",outcome=\"repeat\",topic=\"x\"} 5\n\
                    consumer_messages_total{consumer=\"a\",outcome=\"applied\",topic=\"y\"} 3\n";
        assert_eq!(applied(text), 5);
    }
}
