//! The command that builds a projection anew beside the live one: `rebuild`.

use std::time::Duration;

use consumer::{Config, Handler, Progress, Rebuilt};
use service::config::Database;
use service::db::Db;
use service::shutdown::BoxError;
use tokio_util::sync::CancellationToken;

/// Build the read model anew from the beginning of the topics, while the old one serves, and swap. Started again after a crash, it
/// goes on.
#[derive(Debug, Clone, clap::Args)]
pub struct Rebuild {
    /// Give up the one that was begun.
    #[arg(long)]
    abandon: bool,
    /// Print one JSON document at the end.
    #[arg(long)]
    json: bool,
}

impl Rebuild {
    /// Does it; progress goes to the log, the result to standard output.
    ///
    /// # Errors
    /// When it did not come to its end.
    #[expect(clippy::print_stdout, reason = "the answer is the command's output")]
    pub async fn run<H: Handler>(
        self,
        config: Config,
        database: &Database,
        process: &str,
        migrations: fn() -> consumer::Migrations,
        handler: H,
        shutdown: CancellationToken,
    ) -> Result<(), BoxError> {
        // It has the machine to itself, and latency does not matter.
        let config = Config {
            batch_records: config.batch_records.max(5_000),
            in_flight_records: config.in_flight_records.max(200_000),
            in_flight_bytes: config.in_flight_bytes.max(256 << 20),
            ..config
        };
        let database = Database {
            // What keeps others out, the swap, and one to make the tables by.
            pool_size: config.workers + 3,
            ..database.clone()
        };
        let db = Db::new(&database, &format!("{process} rebuild"))?;
        let rebuild = consumer::Rebuild::new(config, db.pool().clone(), migrations, handler);
        if self.abandon {
            let generation = rebuild.abandon().await?;
            tracing::info!(consumer.generation = generation, "the rebuild was given up");
            return Ok(());
        }
        let Rebuilt {
            generation,
            records,
            took,
            swap,
        } = rebuild.run(tell, &shutdown).await?;
        if self.json {
            println!(
                "{}",
                serde_json::json!({
                    "generation": generation,
                    "records": records,
                    "seconds": took.as_secs_f64(),
                    "rate": records as f64 / took.as_secs_f64(),
                    "swap_ms": swap.as_secs_f64() * 1000.0,
                })
            );
        } else {
            println!(
                "generation {generation} is live: {records} records in {took:.1?}, the live one was held up for {swap:.1?}"
            );
        }
        Ok(())
    }
}

fn tell(progress: Progress) {
    let Progress {
        generation,
        done,
        total,
        rate,
    } = progress;
    let left = total.saturating_sub(done);
    let eta = (rate > 0.0).then(|| Duration::from_secs_f64((left as f64 / rate).min(1e9)).as_secs());
    tracing::info!(
        consumer.generation = generation,
        done,
        total,
        rate = rate.round(),
        seconds_left = eta,
        "rebuilding"
    );
}
