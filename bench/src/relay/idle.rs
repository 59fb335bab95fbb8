//! What a relay costs that has nothing to do.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::contender::{self, RelayOptions};
use super::outbox::Poison;
use super::{Run, filled};
use crate::report::{Section, number};
use crate::topics::{self, PARTITIONS};
use crate::{meter, ui};

/// Until what has just happened no longer matters: rows published, files of theirs flushed.
const CALM: Duration = Duration::from_secs(3);

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let outbox = filled(&run.servers, "idle", 10_000, Poison::None).await?;
    let topic = run.topic();
    topics::create(&run.servers.brokers(), &topic, PARTITIONS, None).await?;
    let servers = &run.servers;
    let (relay, postgres, alone) = ui::step("idle", |(relay, ..)| format!("{relay:.2} % of a core"), async {
        tokio::time::sleep(CALM).await;
        let (began, before) = (Instant::now(), servers.postgres_cpu()?);
        tokio::time::sleep(run.sizes.idle).await;
        let alone = (servers.postgres_cpu()? - before) / began.elapsed().as_secs_f64() * 100.0;

        outbox.begin_at(0).await?;
        let running = contender::relay(servers, &outbox.url, &topic, &RelayOptions::DEFAULT).await?;
        local_stack::wait::until("everything is published", Duration::from_secs(60), async || {
            Ok((outbox.floor().await? >= outbox.rows).then_some(()))
        })
        .await?;
        tokio::time::sleep(CALM).await;
        let pid = running.pid()?;
        let (began, before) = (
            Instant::now(),
            (meter::cpu_seconds(pid)?, servers.postgres_cpu()?),
        );
        tokio::time::sleep(run.sizes.idle).await;
        let seconds = began.elapsed().as_secs_f64();
        let relay = (meter::cpu_seconds(pid)? - before.0) / seconds * 100.0;
        let postgres = (servers.postgres_cpu()? - before.1) / seconds * 100.0;
        running.stop().await?;
        Ok((relay, postgres, alone))
    })
    .await?;
    run.delete(&[&topic]).await?;
    let mut section = Section::new("Idle")
        .note(format!(
            "{:?} with nothing to publish, per cent of a core. PostgreSQL: with all its sessions, less what it takes without a relay.",
            run.sizes.idle
        ))
        .columns(&["outbox-relay", "PostgreSQL because of it"]);
    section.row([number(Some(relay), 2), number(Some(postgres - alone), 2)]);
    run.report.section(section);
    run.report.figure("relay_idle_cpu_percent", Some(relay));
    run.report
        .figure("idle_postgres_cpu_percent", Some(postgres - alone));
    Ok(())
}
