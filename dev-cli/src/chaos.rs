//! `--chaos`: kills the relay and the projection during the load, and starts them again.

use anyhow::Result;
use local_stack::Shop;
use tokio::sync::watch;

use crate::measure::Progress;

/// At which share of the orders placed somebody is killed: spread over the load, with the last one near its end.
const KILLS_AT_PERCENT: [u64; 8] = [6, 18, 30, 42, 55, 68, 81, 94];

/// Kills until the load is over; returns how often. Everything runs again when it returns.
pub(crate) async fn run(shop: &mut Shop, mut progress: watch::Receiver<Progress>) -> Result<u32> {
    let mut kills = 0;
    for (turn, percent) in KILLS_AT_PERCENT.into_iter().enumerate() {
        let due =
            |progress: &Progress| progress.orders > 0 && progress.placed * 100 >= progress.orders * percent;
        if progress.wait_for(due).await.is_err() {
            // The load has ended without getting there.
            break;
        }
        // Relay, projection, relay, other projection …
        let victim = match turn % 2 {
            0 => &mut shop.outbox_relay,
            _ => {
                let instances = shop.order_query_svc.len();
                &mut shop.order_query_svc[turn / 2 % instances]
            }
        };
        victim.kill()?;
        victim.start().await?;
        kills += 1;
    }
    Ok(kills)
}
