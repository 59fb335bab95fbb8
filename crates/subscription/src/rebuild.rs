//! The command that builds a projection anew beside the live one: `rebuild`.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use consumer::{Config, Handler, Progress, Rebuilt};
use service::admin::{AdminServer, Readiness};
use service::config::Database;
use service::db::Db;
use service::shutdown::BoxError;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Build the read model anew from the beginning of the topics, while the old one serves, and swap. Started again after a crash, it
/// goes on.
#[derive(Debug, Clone, clap::Args)]
pub struct Rebuild {
    /// Give up the one that was begun.
    #[arg(long)]
    abandon: bool,
    /// Serve /metrics, /livez and /readyz at this address while it runs: the live process has its own.
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<SocketAddr>,
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
        (process, version): (&'static str, &'static str),
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
        let registry = service::metrics::registry(process, version)?;
        let rebuild = consumer::Rebuild::new(config, db.pool().clone(), migrations, handler, &registry)?;
        if self.abandon {
            let generation = rebuild.abandon().await?;
            tracing::info!(consumer.generation = generation, "the rebuild was given up");
            return Ok(());
        }
        let served = match self.admin {
            None => None,
            Some(address) => Some(Served::start(address, registry, rebuild.status()).await?),
        };
        if let Some(Served { address, .. }) = &served {
            tracing::info!(admin = %address, "metrics and probes are served");
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

/// Metrics and probes, for as long as it lives.
struct Served {
    address: SocketAddr,
    _serving: AbortOnDropHandle<()>,
    _watching: AbortOnDropHandle<Result<(), Infallible>>,
}

impl Served {
    async fn start(
        address: SocketAddr,
        registry: prometheus::Registry,
        status: consumer::Status,
    ) -> Result<Self, BoxError> {
        let readiness = Readiness::default();
        let check = readiness.check("rebuild");
        let server = AdminServer::bind(address, registry, readiness).await?;
        let address = server.local_addr();
        let serving = async {
            if let Err(error) = server.serve().await {
                tracing::error!(error.message = %error, "metrics and probes are served no longer");
            }
        };
        Ok(Self {
            address,
            _serving: AbortOnDropHandle::new(tokio::spawn(serving)),
            _watching: AbortOnDropHandle::new(tokio::spawn(crate::watch(status, check))),
        })
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

#[cfg(test)]
mod tests {
    use local_stack::process::http_get;
    use local_stack::wait;
    use prometheus::{IntGauge, Registry};

    use super::*;

    #[tokio::test]
    async fn metrics_and_probes_are_served_as_long_as_it_lives() {
        let registry = Registry::new();
        let gauge = IntGauge::new("done", "What is done.").expect("a gauge");
        gauge.set(7);
        registry.register(Box::new(gauge)).expect("registered");
        let any = "127.0.0.1:0".parse().expect("an address");
        let served = Served::start(any, registry, consumer::Status::default()).await;
        let served = served.expect("served");
        let (code, metrics) = http_get(served.address, "/metrics").await.expect("answered");
        assert!(code == 200 && metrics.contains("done 7"), "{code} {metrics}");
        let ready = async || Ok((http_get(served.address, "/readyz").await?.0 == 200).then_some(()));
        let limit = Duration::from_secs(10);
        wait::until("it to be ready", limit, ready).await.expect("ready");
        let address = served.address;
        drop(served);
        let gone = async || Ok(http_get(address, "/livez").await.is_err().then_some(()));
        wait::until("it to be gone", limit, gone).await.expect("gone");
    }
}
