//! `--chaos`: kills every process during the load and starts it again, Kafka and the mail server too, and freezes the payment provider.

use std::time::Duration;

use anyhow::Result;
use local_stack::measure::Progress;
use local_stack::shop::{
    ANALYTICS_SVC, INVENTORY_SVC, NOTIFICATION_SVC, ORDER_QUERY_SVC, ORDER_SVC, OUTBOX_RELAY,
    PAYMENT_SANDBOX, PAYMENT_SVC, USER_SVC,
};
use local_stack::smtp::Smtp;
use local_stack::{Kafka, Shop};
use tokio::sync::watch;

/// Whom it may hit.
pub(crate) struct Targets<'a> {
    pub(crate) shop: &'a mut Shop,
    pub(crate) kafka: &'a mut Kafka,
    pub(crate) mail_server: &'a mut Smtp,
}

/// What is done.
#[derive(Debug, Clone, Copy)]
enum Blow {
    /// SIGKILL of an instance of a service, and a new start.
    Kill(&'static str, usize),
    /// SIGSTOP of it, and SIGCONT after a while: as an outage of the network looks like.
    Freeze(&'static str, usize),
    /// SIGKILL of the broker, and a new start.
    Kafka,
    /// SIGKILL of the mail server, and a new start.
    MailServer,
}

/// Longer than a call to the provider is waited for.
const FROZEN: Duration = Duration::from_millis(2_500);

/// In turn; every process is killed once at least.
const BLOWS: [Blow; 23] = [
    Blow::Kill(OUTBOX_RELAY, 0),
    Blow::Kill(PAYMENT_SVC, 0),
    Blow::Kill(ORDER_QUERY_SVC, 0),
    Blow::Kill(NOTIFICATION_SVC, 0),
    Blow::Kill(INVENTORY_SVC, 0),
    Blow::Kill(ORDER_SVC, 0),
    Blow::Kill(ANALYTICS_SVC, 0),
    Blow::Kill(PAYMENT_SANDBOX, 0),
    Blow::Kill(USER_SVC, 0),
    Blow::Kill(OUTBOX_RELAY, 0),
    Blow::Kafka,
    Blow::Kill(PAYMENT_SVC, 1),
    Blow::Freeze(PAYMENT_SANDBOX, 0),
    Blow::Kill(ORDER_SVC, 1),
    Blow::MailServer,
    Blow::Kill(INVENTORY_SVC, 1),
    Blow::Kill(NOTIFICATION_SVC, 1),
    Blow::Kill(ORDER_QUERY_SVC, 1),
    Blow::Kill(USER_SVC, 1),
    Blow::Kill(ANALYTICS_SVC, 1),
    Blow::Kill(PAYMENT_SANDBOX, 0),
    Blow::Kill(NOTIFICATION_SVC, 0),
    Blow::Kill(OUTBOX_RELAY, 0),
];
/// At which share of the orders placed the first and the last one falls; the others are spread between them.
const FIRST_AT_PERCENT: u64 = 5;
const LAST_AT_PERCENT: u64 = 95;

/// How often it hit.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Done {
    pub(crate) kills: u32,
    /// Of Kafka and the mail server.
    pub(crate) restarts: u32,
    pub(crate) freezes: u32,
    /// Whether the load lasted until everybody was hit.
    pub(crate) everybody: bool,
}

/// Goes on until the load is over. Everything runs again when it returns.
pub(crate) async fn run(targets: &mut Targets<'_>, mut progress: watch::Receiver<Progress>) -> Result<Done> {
    let mut done = Done::default();
    for (turn, blow) in (0u64..).zip(BLOWS) {
        let percent =
            FIRST_AT_PERCENT + turn * (LAST_AT_PERCENT - FIRST_AT_PERCENT) / (BLOWS.len() as u64 - 1);
        let due =
            |progress: &Progress| progress.orders > 0 && progress.placed * 100 >= progress.orders * percent;
        if progress.wait_for(due).await.is_err() {
            // The load has ended without getting there.
            return Ok(done);
        }
        match blow {
            Blow::Kill(service, instance) => {
                let victim = targets.shop.instance_mut(service, instance)?;
                victim.kill()?;
                victim.start().await?;
                done.kills += 1;
            }
            Blow::Freeze(service, instance) => {
                let victim = targets.shop.instance_mut(service, instance)?;
                victim.pause()?;
                tokio::time::sleep(FROZEN).await;
                victim.resume()?;
                done.freezes += 1;
            }
            Blow::Kafka => {
                targets.kafka.kill()?;
                targets.kafka.start().await?;
                done.restarts += 1;
            }
            Blow::MailServer => {
                targets.mail_server.kill()?;
                targets.mail_server.restart().await?;
                done.restarts += 1;
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
                let hit = |blow: &Blow| matches!(blow, Blow::Kill(name, of) if (*name, *of) == (service.name, instance));
                assert!(BLOWS.iter().any(hit), "{} {instance}", service.name);
            }
        }
    }
}
