//! Writers of an outbox that do whatever transactions can do: several events, rollbacks, savepoints, prepared transactions.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinSet;
use tokio_postgres::{Client, GenericClient};
use uuid::Uuid;

/// What to write.
#[derive(Debug, Clone)]
pub struct Load {
    /// The outbox table; the entities are in a table beside it.
    pub table: String,
    pub writers: u32,
    /// What the names of the entities begin with. All writers share them.
    pub prefix: String,
    pub entities: u32,
    /// Of the rows; `None`: the relay's.
    pub topic: Option<String>,
    /// Pause of a writer between transactions.
    pub pace: Duration,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            table: "outbox".to_owned(),
            writers: 4,
            prefix: "entity".to_owned(),
            entities: 40,
            topic: None,
            pace: Duration::from_millis(4),
        }
    }
}

/// Writers at work. Dropping them ends them.
#[derive(Debug)]
pub struct Writers {
    stop: Arc<AtomicBool>,
    running: JoinSet<Result<()>>,
}

/// Makes the table of the entities beside the outbox `table`.
pub async fn prepare(client: &Client, table: &str) -> Result<()> {
    let sql = format!("CREATE TABLE {table}_entity (id text PRIMARY KEY, version bigint NOT NULL)");
    Ok(client.batch_execute(&sql).await?)
}

impl Load {
    /// Starts the writers, each on a connection of its own.
    pub async fn start(self, database: &local_stack::testing::Database, seed: u64) -> Result<Writers> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut running = JoinSet::new();
        for number in 0..self.writers {
            let writer = Writer {
                client: database.connect().await?,
                rng: StdRng::seed_from_u64(seed ^ (u64::from(number) + 1)),
                load: self.clone(),
                // The server has room for few prepared transactions.
                prepares: number == 0,
            };
            running.spawn(writer.run(Arc::clone(&stop)));
        }
        Ok(Writers { stop, running })
    }
}

impl Writers {
    /// Lets every writer end its transaction.
    pub async fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.running.join_next().await {
            ended??;
        }
        Ok(())
    }
}

struct Writer {
    client: Client,
    rng: StdRng,
    load: Load,
    prepares: bool,
}

impl Writer {
    /// Transactions of one to three events; one in five is rolled back, some roll back to a savepoint, and some of one
    /// writer's are prepared and then stay open for a moment.
    async fn run(mut self, stop: Arc<AtomicBool>) -> Result<()> {
        while !stop.load(Ordering::Relaxed) {
            let prepared = (self.prepares && self.rng.random_bool(0.1)).then(Uuid::new_v4);
            self.client.batch_execute("BEGIN").await?;
            // In one order, so that writers do not deadlock.
            let mut entities: Vec<u32> = (0..self.rng.random_range(1..=3))
                .map(|_| self.rng.random_range(0..self.load.entities))
                .collect();
            entities.sort_unstable();
            for entity in entities {
                if self.rng.random_bool(0.1) {
                    self.client.batch_execute("SAVEPOINT s").await?;
                    self.load.append(&self.client, entity).await?;
                    self.client.batch_execute("ROLLBACK TO SAVEPOINT s").await?;
                }
                self.load.append(&self.client, entity).await?;
            }
            let end = if self.rng.random_bool(0.2) {
                "ROLLBACK"
            } else {
                "COMMIT"
            };
            match prepared {
                None => self.client.batch_execute(end).await?,
                Some(name) => {
                    let prepare = format!("PREPARE TRANSACTION '{name}'");
                    self.client.batch_execute(&prepare).await?;
                    tokio::time::sleep(Duration::from_millis(self.rng.random_range(0..80))).await;
                    let end = format!("{end} PREPARED '{name}'");
                    self.client.batch_execute(&end).await?;
                }
            }
            tokio::time::sleep(self.load.pace).await;
        }
        Ok(())
    }
}

impl Load {
    /// The protocol's form: the outbox row comes last, fed from the statement that locks the entity.
    async fn append(&self, client: &impl GenericClient, entity: u32) -> Result<()> {
        let Self {
            table, prefix, topic, ..
        } = self;
        let sql = format!(
            "WITH e AS (INSERT INTO {table}_entity AS e VALUES ($1, 1)
                        ON CONFLICT (id) DO UPDATE SET version = e.version + 1 RETURNING id, version)
             INSERT INTO {table} (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, source, topic, payload)
             SELECT gen_random_uuid(), 'test', id, version, 'test.moved', '/test', $2, convert_to(id || ' at ' || version, 'UTF8')
               FROM e"
        );
        client
            .execute(&sql, &[&format!("{prefix}-{entity}"), topic])
            .await?;
        Ok(())
    }
}
