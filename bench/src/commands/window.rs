//! A stretch of steady load: how many commands were done in it, by which statements, and what that cost.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use tokio_postgres::Client;

use super::load::{Latency, Load};
use super::{Command, Sizes};
use crate::meter;
use crate::servers::Servers;

/// By the server's id of the statement: its text and its calls.
type Statements = BTreeMap<i64, (String, i64)>;

#[derive(Debug)]
pub(crate) struct Window {
    /// Commands a second.
    pub(crate) rate: f64,
    pub(crate) latency: Option<Latency>,
    /// Cores that each party kept busy.
    pub(crate) cpu: Vec<(String, f64)>,
    commands: i64,
    /// Transactions that committed, single statements included.
    transactions: i64,
    calls: Statements,
}

struct Snapshot {
    at: Instant,
    transactions: i64,
    statements: Statements,
    cpu: Vec<(String, f64)>,
}

/// Watches `load`, which has just begun, and waits for its end.
pub(crate) async fn measure(
    servers: &Servers,
    sizes: Sizes,
    command: &Command<'_>,
    mut load: Load,
) -> Result<Window> {
    let client = servers.connect(command.database).await?;
    tokio::select! {
        () = tokio::time::sleep(sizes.warm_up) => {}
        ended = load.ended() => ended?,
    }
    let before = snapshot(servers, &client, command, &load).await?;
    tokio::time::sleep(sizes.measured).await;
    let after = snapshot(servers, &client, command, &load).await?;
    let latency = load.end().await?;

    let elapsed = (after.at - before.at).as_secs_f64();
    let mut calls = after.statements;
    for (id, (_, calls)) in &mut calls {
        *calls -= before.statements.get(id).map_or(0, |(_, calls)| *calls);
    }
    let commands = calls.values().find(|(text, _)| text.starts_with(command.counted));
    let commands = commands.map_or(0, |(_, calls)| *calls);
    ensure!(commands > 0, "no commands were done");
    let cpu = after.cpu.into_iter().zip(before.cpu);
    Ok(Window {
        rate: commands as f64 / elapsed,
        latency,
        cpu: cpu
            .map(|((name, after), (_, before))| (name, (after - before) / elapsed))
            .collect(),
        commands,
        transactions: after.transactions - before.transactions,
        calls,
    })
}

async fn snapshot(
    servers: &Servers,
    client: &Client,
    command: &Command<'_>,
    load: &Load,
) -> Result<Snapshot> {
    let rows = client
        .query(
            "SELECT queryid, query, sum(calls)::bigint FROM pg_stat_statements
             WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND query NOT LIKE '%pg_stat_statements%'
             GROUP BY 1, 2",
            &[],
        )
        .await
        .context("the statements cannot be counted")?;
    let statements = rows.into_iter().map(|row| (row.get(0), (row.get(1), row.get(2))));
    let transactions = client
        .query_one(
            "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()",
            &[],
        )
        .await?
        .get(0);
    let mut cpu = Vec::new();
    for process in &command.processes {
        cpu.push((
            process.name().to_owned(),
            meter::cpu_seconds(process.id().context("it has ended")?)?,
        ));
    }
    cpu.push(("PostgreSQL".to_owned(), servers.postgres_cpu()?));
    cpu.push((load.name().to_owned(), meter::cpu_seconds(load.id()?)?));
    cpu.push(("Kafka".to_owned(), servers.kafka_cpu()?));
    Ok(Snapshot {
        at: Instant::now(),
        transactions,
        statements: statements.collect(),
        cpu,
    })
}

/// Of all windows together.
pub(crate) fn transactions_per_command(windows: &[Window]) -> f64 {
    let commands: i64 = windows.iter().map(|window| window.commands).sum();
    let transactions: i64 = windows.iter().map(|window| window.transactions).sum();
    transactions as f64 / commands as f64
}

/// Of all windows together.
pub(crate) fn calls_per_command(windows: &[Window]) -> BTreeMap<i64, f64> {
    let commands: i64 = windows.iter().map(|window| window.commands).sum();
    let mut all = BTreeMap::new();
    for (id, (_, calls)) in windows.iter().flat_map(|window| &window.calls) {
        *all.entry(*id).or_default() += *calls as f64 / commands as f64;
    }
    all
}

/// The texts of all statements.
pub(crate) fn texts<'a>(windows: impl Iterator<Item = &'a Window>) -> BTreeMap<i64, &'a str> {
    let calls = windows.flat_map(|window| &window.calls);
    calls.map(|(id, (text, _))| (*id, text.as_str())).collect()
}
