//! `quarantine list | show | retry | skip`.

use serde_json::json;

use super::{Answer, CommandError, asker, connect, pick, quarantine_of, seconds, shown, table};
use crate::config::Config;

/// Keys, or rows of a key, of one listing.
const LIMIT: i64 = 1_000;

/// The keys that wait, those first that have waited longest.
///
/// # Errors
/// When the database cannot be asked.
pub async fn list(config: &Config, name: Option<&str>) -> Result<Answer, CommandError> {
    let (name, outbox) = pick(config, name)?;
    let db = connect(outbox, "quarantine").await?;
    let keys = quarantine_of(&db, name, outbox).keys(LIMIT).await?;
    let text = if keys.is_empty() {
        format!("nothing is in quarantine in outbox {name}")
    } else {
        table(
            &[
                "type", "key", "rows", "first", "version", "since", "tries", "state", "problem",
            ],
            keys.iter().map(|key| {
                vec![
                    key.aggregate_type.clone(),
                    key.key.clone(),
                    key.rows.to_string(),
                    key.first_id.to_string(),
                    shown(key.first_version),
                    seconds(key.since_seconds),
                    key.attempts.to_string(),
                    key.state.clone(),
                    key.problem.clone(),
                ]
            }),
        )
    };
    Ok(Answer::new(json!({ "outbox": name, "keys": keys }), text))
}

/// The rows of a key, those that were skipped included, without payloads.
///
/// # Errors
/// When there are none, or the database cannot be asked.
pub async fn show(config: &Config, name: Option<&str>, key: &str) -> Result<Answer, CommandError> {
    let (name, outbox) = pick(config, name)?;
    let db = connect(outbox, "quarantine").await?;
    let rows = quarantine_of(&db, name, outbox).rows(key, LIMIT).await?;
    if rows.is_empty() {
        return Err(CommandError::Refused(format!(
            "key {key} is not in the quarantine of outbox {name}"
        )));
    }
    let text = table(
        &[
            "id",
            "version",
            "topic",
            "bytes",
            "state",
            "tries",
            "by",
            "problem or reason",
        ],
        rows.iter().map(|row| {
            vec![
                row.id.to_string(),
                shown(row.version),
                row.topic.clone(),
                shown(row.payload_bytes),
                row.state.clone(),
                row.attempts.to_string(),
                shown(row.decided_by.as_ref()),
                row.reason
                    .clone()
                    .or_else(|| row.problem.clone())
                    .unwrap_or_else(|| "waits behind another row of its key".to_owned()),
            ]
        }),
    );
    Ok(Answer::new(
        json!({ "outbox": name, "key": key, "rows": rows }),
        text,
    ))
}

/// Asks the leader to publish a key again, or with `None` all of them.
///
/// # Errors
/// When nothing of it is in quarantine, or the database cannot be asked.
pub async fn retry(config: &Config, name: Option<&str>, key: Option<&str>) -> Result<Answer, CommandError> {
    let (name, outbox) = pick(config, name)?;
    let db = connect(outbox, "quarantine").await?;
    let keys = quarantine_of(&db, name, outbox)
        .retry(None, key, &asker())
        .await?;
    if keys == 0
        && let Some(key) = key
    {
        return Err(CommandError::Refused(format!(
            "key {key} is not in the quarantine of outbox {name}"
        )));
    }
    let text = format!("{keys} keys are tried again by the leader; see quarantine list");
    Ok(Answer::new(json!({ "outbox": name, "keys": keys }), text))
}

/// Asks the leader to publish a marker with the row's key and version instead of it, then what is behind.
///
/// # Errors
/// When the row is not the first of a key in quarantine, or the database cannot be asked.
pub async fn skip(
    config: &Config,
    name: Option<&str>,
    id: i64,
    reason: &str,
) -> Result<Answer, CommandError> {
    let (name, outbox) = pick(config, name)?;
    if reason.trim().is_empty() {
        return Err(CommandError::Usage("--reason must say why".to_owned()));
    }
    let db = connect(outbox, "quarantine").await?;
    if !quarantine_of(&db, name, outbox)
        .skip(id, reason.trim(), &asker())
        .await?
    {
        return Err(CommandError::Refused(format!(
            "row {id} is not the first of a key in the quarantine of outbox {name}; see quarantine list"
        )));
    }
    let text = format!("row {id} is skipped by the leader: a marker takes its place");
    Ok(Answer::new(json!({ "outbox": name, "id": id }), text))
}
