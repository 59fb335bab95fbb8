//! `--chaos`: kills every kind of process during the load and starts it again, and freezes the payment provider.

use std::time::Duration;

use anyhow::Result;
use local_stack::Shop;
use local_stack::measure::Progress;
use local_stack::shop::{
    INVENTORY_SVC, ORDER_QUERY_SVC, ORDER_SVC, OUTBOX_RELAY, PAYMENT_SANDBOX, PAYMENT_SVC,
};
use tokio::sync::watch;

/// What is done to an instance of a service.
#[derive(Debug, Clone, Copy)]
enum Blow {
    /// SIGKILL, and a new start.
    Kill,
    /// SIGSTOP, and SIGCONT after a while: as an outage of the network looks like.
    Freeze,
}

/// Longer than a call to the provider is waited for.
const FROZEN: Duration = Duration::from_millis(2_500);

/// Whom it hits, in turn: everybody at least once.
const BLOWS: [(&str, usize, Blow); 14] = [
    (OUTBOX_RELAY, 0, Blow::Kill),
    (PAYMENT_SVC, 0, Blow::Kill),
    (ORDER_QUERY_SVC, 0, Blow::Kill),
    (INVENTORY_SVC, 0, Blow::Kill),
    (ORDER_SVC, 0, Blow::Kill),
    (PAYMENT_SANDBOX, 0, Blow::Kill),
    (OUTBOX_RELAY, 0, Blow::Kill),
    (PAYMENT_SVC, 1, Blow::Kill),
    (PAYMENT_SANDBOX, 0, Blow::Freeze),
    (ORDER_SVC, 1, Blow::Kill),
    (INVENTORY_SVC, 1, Blow::Kill),
    (ORDER_QUERY_SVC, 1, Blow::Kill),
    (PAYMENT_SANDBOX, 0, Blow::Kill),
    (OUTBOX_RELAY, 0, Blow::Kill),
];
/// At which share of the orders placed the first and the last one falls; the others are spread between them.
const FIRST_AT_PERCENT: u64 = 5;
const LAST_AT_PERCENT: u64 = 95;

/// How often it hit.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Done {
    pub(crate) kills: u32,
    pub(crate) freezes: u32,
    /// Whether the load lasted until everybody was hit.
    pub(crate) everybody: bool,
}

/// Goes on until the load is over. Everything runs again when it returns.
pub(crate) async fn run(shop: &mut Shop, mut progress: watch::Receiver<Progress>) -> Result<Done> {
    let mut done = Done::default();
    for (turn, (service, instance, blow)) in (0u64..).zip(BLOWS) {
        let step = (LAST_AT_PERCENT - FIRST_AT_PERCENT) / (BLOWS.len() as u64 - 1);
        let percent = FIRST_AT_PERCENT + turn * step;
        let due =
            |progress: &Progress| progress.orders > 0 && progress.placed * 100 >= progress.orders * percent;
        if progress.wait_for(due).await.is_err() {
            // The load has ended without getting there.
            return Ok(done);
        }
        let victim = shop.instance_mut(service, instance)?;
        match blow {
            Blow::Kill => {
                victim.kill()?;
                victim.start().await?;
                done.kills += 1;
            }
            Blow::Freeze => {
                victim.pause()?;
                tokio::time::sleep(FROZEN).await;
                victim.resume()?;
                done.freezes += 1;
            }
        }
    }
    done.everybody = true;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use local_stack::shop::SERVICES;

    use super::*;

    #[test]
    fn everybody_is_killed() {
        for service in SERVICES {
            for instance in 0..usize::from(service.instances) {
                let hit = |(name, of, blow): &(&str, usize, Blow)| {
                    (*name, *of) == (service.name, instance) && matches!(blow, Blow::Kill)
                };
                assert!(BLOWS.iter().any(hit), "{} {instance}", service.name);
            }
        }
    }
}
