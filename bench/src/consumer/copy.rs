//! The limit on PostgreSQL's side: the projection's rows, copied into tables like its own.

use std::time::Instant;

use anyhow::Result;
use bytes::Bytes;
use futures::{SinkExt as _, TryStreamExt as _};
use tokio_postgres::Client;

use super::Run;
use crate::report::{Section, number, thousands};
use crate::servers::Servers;
use crate::stats::median;
use crate::ui;

const TABLES: [&str; 2] = ["order_views", "order_payments"];
/// Bytes in one message to the server.
const CHUNK: usize = 64 << 10;

struct Copied {
    rate: f64,
    cpu_s_per_million: f64,
}

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let projection = run.projected().await?;
    let client = run.servers.connect(&projection.database).await?;
    let mut rows = 0;
    let mut contents = Vec::new();
    for table in TABLES {
        let count: i64 = client
            .query_one(&format!("SELECT count(*) FROM {table}"), &[])
            .await?
            .get(0);
        rows += count;
        contents.push(read(&client, table).await?);
    }
    let mut copies = Vec::new();
    for round in 1..=run.sizes.runs {
        let work = copy(&run.servers, &client, &contents, rows as f64);
        let outcome = |copied: &Copied| format!("{} rows/s", thousands(copied.rate));
        copies.push(ui::step(format!("COPY ({round}/{})", run.sizes.runs), outcome, work).await?);
    }
    let rate = median(copies.iter().map(|copied| copied.rate));
    let cpu = median(copies.iter().map(|copied| copied.cpu_s_per_million));
    let mut section = Section::new("COPY")
        .note(format!(
            "One connection copies the rows of order_views and order_payments as they are in the end, in binary from memory, into tables \
             like them, with their indexes and constraints, in one transaction. A row stands for {:.2} events, each of which the \
             projection writes into it, and for a version mark, which is not copied.",
            projection.backlog.events as f64 / rows as f64
        ))
        .columns(&["rows", "rows/s", "CPU s of PostgreSQL per million rows"]);
    section.row([
        thousands(rows as f64),
        thousands(rate.unwrap_or_default()),
        number(cpu, 2),
    ]);
    run.report.section(section);
    run.report.figure("copy_rate", rate);
    run.report.figure("copy_cpu_s_per_million", cpu);
    Ok(())
}

/// All of a table, in chunks as they are sent back.
async fn read(client: &Client, table: &str) -> Result<Vec<Bytes>> {
    let rows = client
        .copy_out(&format!("COPY {table} TO STDOUT (FORMAT binary)"))
        .await?;
    futures::pin_mut!(rows);
    let mut chunks = Vec::new();
    let mut chunk = Vec::with_capacity(CHUNK * 2);
    while let Some(row) = rows.try_next().await? {
        chunk.extend_from_slice(&row);
        if chunk.len() >= CHUNK {
            chunks.push(Bytes::from(std::mem::replace(
                &mut chunk,
                Vec::with_capacity(CHUNK * 2),
            )));
        }
    }
    chunks.push(Bytes::from(chunk));
    Ok(chunks)
}

async fn copy(servers: &Servers, client: &Client, contents: &[Vec<Bytes>], rows: f64) -> Result<Copied> {
    for table in TABLES {
        let make = format!(
            "DROP TABLE IF EXISTS copy_of_{table}; CREATE TABLE copy_of_{table} (LIKE {table} INCLUDING ALL)"
        );
        client.batch_execute(&make).await?;
    }
    client.batch_execute("CHECKPOINT").await?;
    let (began, before) = (Instant::now(), servers.postgres_cpu()?);
    client.batch_execute("BEGIN").await?;
    for (table, chunks) in TABLES.iter().zip(contents) {
        let sink = client
            .copy_in::<_, Bytes>(&format!("COPY copy_of_{table} FROM STDIN (FORMAT binary)"))
            .await?;
        futures::pin_mut!(sink);
        for chunk in chunks {
            sink.send(chunk.clone()).await?;
        }
        sink.finish().await?;
    }
    client.batch_execute("COMMIT").await?;
    Ok(Copied {
        rate: rows / began.elapsed().as_secs_f64(),
        cpu_s_per_million: (servers.postgres_cpu()? - before) / rows * 1e6,
    })
}
