//! `status`, `handover` and `adopt`: who leads, how far, and who is to.

use serde_json::json;
use tokio_postgres::types::Type;

use super::{Answer, CommandError, connect, pick, quarantine_of, seconds, shown, table};
use crate::config::Config;
use crate::inspect::look;
use crate::schema::RELAY;
use crate::source::lease::ask_to_hand_over;

/// Every outbox of the configuration, as its database knows it. One that cannot be asked is shown with its problem.
///
/// # Errors
/// None; problems are in the answer, with exit code 1.
pub async fn status(config: &Config) -> Result<Answer, CommandError> {
    let mut all = Vec::new();
    let mut rows = Vec::new();
    let mut code = 0;
    for (name, outbox) in &config.outboxes {
        let asked = async {
            let db = connect(outbox, "status").await?;
            let (lead, figures) = look(&db, &outbox.table, name, outbox.lease_ttl).await?;
            let counts = quarantine_of(&db, name, outbox).counts().await?;
            Ok::<_, CommandError>((lead, figures, counts))
        };
        match asked.await {
            Ok((lead, figures, (keys, kept))) => {
                let live: Vec<&str> = lead.members.iter().map(|m| m.instance.as_str()).collect();
                rows.push(vec![
                    name.clone(),
                    shown(lead.leader.as_ref()),
                    shown(lead.epoch),
                    shown(lead.floor),
                    shown(figures.as_ref().map(|f| f.head)),
                    shown(figures.as_ref().map(|f| f.backlog_rows)),
                    shown(figures.as_ref().and_then(|f| f.oldest_age_seconds).map(seconds)),
                    shown(figures.as_ref().map(|f| f.holes)),
                    format!("{keys} / {kept}"),
                    live.join(" "),
                    shown(lead.seen_seconds.map(seconds)),
                ]);
                all.push(json!({
                    "name": name, "table": outbox.table.to_string(), "lead": lead, "figures": figures,
                    "quarantined_keys": keys, "quarantined_rows": kept,
                }));
            }
            Err(error) => {
                code = 1;
                let problem = service::telemetry::chain(&error).to_string();
                rows.push(vec![name.clone(), format!("error: {problem}")]);
                all.push(json!({ "name": name, "table": outbox.table.to_string(), "error": problem }));
            }
        }
    }
    let text = table(
        &[
            "outbox",
            "leader",
            "epoch",
            "floor",
            "head",
            "backlog",
            "oldest",
            "holes",
            "quarantine",
            "replicas",
            "as of",
        ],
        rows,
    );
    Ok(Answer::new(json!({ "outboxes": all }), text).with_code(code))
}

/// Asks the leader to hand over, to `to` or to whichever other replica leads the fewest.
///
/// # Errors
/// When nobody leads, or the database cannot be asked.
pub async fn handover(config: &Config, name: Option<&str>, to: Option<&str>) -> Result<Answer, CommandError> {
    let (name, outbox) = pick(config, name)?;
    let db = connect(outbox, "handover").await?;
    let Some(leader) = ask_to_hand_over(&db, &outbox.table, name, to.unwrap_or_default()).await? else {
        return Err(CommandError::Refused(format!("nobody leads outbox {name}")));
    };
    let text = format!("{leader} was asked to hand outbox {name} over");
    Ok(Answer::new(json!({ "outbox": name, "leader": leader }), text))
}

/// Says that this cluster is the one to relay from now on, after a restore.
///
/// # Errors
/// When the outbox was never relayed, or the database cannot be asked.
pub async fn adopt(config: &Config, name: Option<&str>) -> Result<Answer, CommandError> {
    let (name, outbox) = pick(config, name)?;
    let db = connect(outbox, "adopt").await?;
    let text = format!(
        "UPDATE {} SET system_identifier = (SELECT system_identifier FROM pg_control_system()) WHERE name = $1",
        outbox.table.sibling(RELAY)
    );
    if db
        .execute("adopt the cluster", &text, &[(&name, Type::TEXT)])
        .await?
        == 0
    {
        return Err(CommandError::Refused(format!("outbox {name} was never relayed")));
    }
    let text = format!("outbox {name} is relayed from this cluster from now on");
    Ok(Answer::new(json!({ "outbox": name, "adopted": true }), text))
}
