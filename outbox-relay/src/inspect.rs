//! What the database knows of an outbox and its relay, for those who do not lead it.

use std::time::Duration;

use tokio_postgres::types::Type;

use crate::config::TableName;
use crate::database::Database;
use crate::schema::RELAY;
use crate::source::SourceError;
use crate::source::lease::members_of;
use crate::source::retention::removed_to;
use crate::status::{Figures, Lead};

/// Reads it. `ttl` is how long a replica counts after it was seen last.
pub(crate) async fn look(
    db: &Database,
    table: &TableName,
    name: &str,
    ttl: Duration,
) -> Result<(Lead, Option<Figures>), SourceError> {
    let text = format!(
        "SELECT CASE WHEN expires_at > clock_timestamp() THEN owner END, epoch,
                greatest(0, extract(epoch FROM expires_at - clock_timestamp()))::float8, floor,
                extract(epoch FROM clock_timestamp() - figures_at)::float8, figures
           FROM {} WHERE name = $1",
        table.sibling(RELAY)
    );
    let rows = db
        .query("look at the relay", &text, &[(&name, Type::TEXT)])
        .await?;
    let Some(row) = rows.first() else {
        return Ok((Lead::default(), None));
    };
    let leader: Option<String> = row.get(0);
    let floor: i64 = row.get(3);
    let figures: Option<Figures> = row
        .get::<_, Option<serde_json::Value>>(5)
        .and_then(|figures| serde_json::from_value(figures).ok());
    // The floor is saved more often than the figures are.
    let figures = figures.map(|figures| Figures {
        head: figures.head.max(floor),
        ..figures
    });
    Ok((
        Lead {
            lease_seconds: leader.is_some().then(|| row.get(2)),
            leader,
            epoch: row.get(1),
            members: members_of(db, table, name, ttl).await?,
            floor: Some(floor),
            removed_to: Some(removed_to(db, table).await?),
            seen_seconds: row.get(4),
        },
        figures,
    ))
}
