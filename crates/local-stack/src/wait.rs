//! Waiting for a condition, with a deadline and without guessing how long it takes.

use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Asks `check` until it gives a value; fails at once if it fails, and after `limit` saying that `what` did not happen.
pub async fn until<T, F, Fut>(what: &str, limit: Duration, mut check: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<Option<T>>>,
{
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(5);
    loop {
        // The check itself may hang, for example on a stopped server.
        let left = deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left.max(Duration::from_millis(1)), check()).await {
            Ok(answer) => {
                if let Some(value) = answer? {
                    return Ok(value);
                }
            }
            Err(_) => bail!("{what}: not within {limit:?}"),
        }
        if Instant::now() >= deadline {
            bail!("{what}: not within {limit:?}");
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}
