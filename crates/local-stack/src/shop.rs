//! The shop's processes, as the demo, `./dev up` and tests across processes start them.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::postgres;
use crate::process::{self, Process};
use crate::wait;

/// The database of order-svc.
pub const ORDERS_DATABASE: &str = "orders";
/// The database of order-query-svc.
pub const ORDER_QUERY_DATABASE: &str = "order_query";
/// The topic of order events, and its number of partitions.
pub const ORDER_TOPIC: (&str, u32) = ("events.order", 6);

/// Two rebalances, one of which may have to wait for a member that is gone.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);

/// What the processes need to know.
#[derive(Debug, Clone)]
pub struct Plan {
    /// For logs.
    pub folder: PathBuf,
    /// Any database of the server on which the shop's databases are, with a user that may create databases.
    pub postgres_url: String,
    pub kafka_brokers: String,
    /// The first of [`PORTS`] ports; free ones if there is none.
    pub port_base: Option<u16>,
    /// How many instances of order-query-svc there are.
    pub order_query_instances: u16,
    /// How long the relay's lease outlives a relay that was killed; its default if not given.
    pub relay_lease: Option<Duration>,
}

/// How many ports a [`Plan`] with a base uses.
pub const PORTS: u16 = 40;

impl Plan {
    pub fn orders_url(&self) -> String {
        postgres::with_database(&self.postgres_url, ORDERS_DATABASE)
    }

    pub fn order_query_url(&self) -> String {
        postgres::with_database(&self.postgres_url, ORDER_QUERY_DATABASE)
    }

    /// Makes the databases.
    pub async fn create_databases(&self) -> Result<()> {
        postgres::create_database(&self.postgres_url, ORDERS_DATABASE).await?;
        postgres::create_database(&self.postgres_url, ORDER_QUERY_DATABASE).await
    }

    /// Brings the databases up to date.
    pub async fn migrate(&self) -> Result<()> {
        self.order_svc().arg("migrate").run_to_end().await?;
        self.order_query_svc(1).arg("migrate").run_to_end().await
    }

    /// Makes the topics that are missing.
    pub async fn create_topics(&self) -> Result<()> {
        let (topic, partitions) = ORDER_TOPIC;
        self.outbox_relay()
            .arg("create-topics")
            .arg(format!("{topic}={partitions}"))
            .run_to_end()
            .await
    }

    /// Rebuilds every order from its history and compares; fails if one differs.
    pub async fn verify(&self) -> Result<()> {
        self.order_svc().arg("verify").run_to_end().await
    }

    /// Starts the processes and waits until they are ready.
    pub async fn start(&self) -> Result<Shop> {
        let (mut order_svc, mut outbox_relay) =
            tokio::try_join!(self.order_svc().start(), self.outbox_relay().start())?;
        let mut order_query_svc = Vec::new();
        for instance in 1..=self.order_query_instances {
            order_query_svc.push(self.order_query_svc(instance).start().await?);
        }
        order_svc.ready().await?;
        outbox_relay.ready().await?;
        for instance in &mut order_query_svc {
            instance.ready().await?;
        }
        Ok(Shop {
            order_svc,
            order_query_svc,
            outbox_relay,
        })
    }

    fn order_svc(&self) -> process::Builder {
        let builder = Process::builder("order-svc", &self.folder).set("database.url", self.orders_url());
        self.ports(builder, 10)
    }

    fn order_query_svc(&self, instance: u16) -> process::Builder {
        let name = format!("order-query-svc-{instance}");
        let builder = Process::builder("order-query-svc", &self.folder)
            .instance(&name)
            .set("service.instance", &name)
            .set("database.url", self.order_query_url())
            .set("kafka.brokers", &self.kafka_brokers);
        self.ports(builder, 20 + 2 * (instance - 1))
    }

    fn outbox_relay(&self) -> process::Builder {
        let builder = Process::builder("outbox-relay", &self.folder)
            .set("kafka.brokers", &self.kafka_brokers)
            .set("outbox.orders.database_url", self.orders_url());
        let builder = match self.relay_lease {
            Some(lease) => builder.set("outbox.orders.lease_ttl", format!("{}ms", lease.as_millis())),
            None => builder,
        };
        self.ports(builder, 30)
    }

    fn ports(&self, builder: process::Builder, offset: u16) -> process::Builder {
        match self.port_base {
            Some(base) => builder.grpc_port(base + offset).admin_port(base + offset + 1),
            None => builder,
        }
    }
}

/// The running processes. Dropping it kills them.
#[derive(Debug)]
pub struct Shop {
    pub order_svc: Process,
    pub order_query_svc: Vec<Process>,
    pub outbox_relay: Process,
}

impl Shop {
    /// All processes.
    pub fn processes(&mut self) -> impl Iterator<Item = &mut Process> {
        [&mut self.order_svc, &mut self.outbox_relay]
            .into_iter()
            .chain(&mut self.order_query_svc)
    }

    /// Waits until the instances of order-query-svc have shared out the partitions among them, each with some: until
    /// then events wait.
    pub async fn projection_settled(&self) -> Result<()> {
        wait::until("the partitions are shared out", SETTLE_LIMIT, || async {
            let mut shares = Vec::new();
            for instance in &self.order_query_svc {
                shares.push(metric(&instance.metrics().await?, "consumer_assigned_partitions"));
            }
            let all = shares.iter().sum::<f64>() == f64::from(ORDER_TOPIC.1);
            Ok((all && shares.iter().all(|share| *share >= 1.0)).then_some(()))
        })
        .await
    }

    /// Stops all of them in order: commands first, then what carries their events on.
    pub async fn stop(&mut self) -> Result<()> {
        self.order_svc.stop().await?;
        self.outbox_relay.stop().await?;
        for instance in &mut self.order_query_svc {
            instance.stop().await?;
        }
        Ok(())
    }
}

/// The sum over all labels of a metric, in what /metrics answers.
fn metric(text: &str, name: &str) -> f64 {
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        // Not the beginning of a longer name.
        rest.starts_with([' ', '{'])
            .then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
    });
    values.sum()
}

#[cfg(test)]
mod tests {
    use super::metric;

    #[test]
    fn a_metric_is_summed_over_its_labels() {
        let text = "# HELP a A.\na{t=\"x\"} 2\na{t=\"y\"} 1\nab 7\n";
        assert_eq!(metric(text, "a"), 3.0);
        assert_eq!(metric(text, "ab"), 7.0);
        assert_eq!(metric(text, "b"), 0.0);
    }
}
