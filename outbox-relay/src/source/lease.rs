//! The lease with its progress: one row, one guarded UPDATE. And those who could take it.

use super::*;
use crate::database::Param;
use crate::protocol::Progress;
use crate::schema::{MEMBERS, QUARANTINE, RELAY};
use crate::source::quarantine::Parked;

/// The lease as it was taken, with the progress of the leader before.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) epoch: i64,
    pub(crate) saves: i64,
    pub(crate) progress: Progress,
    /// On this process's clock, from before the statement was sent.
    pub(crate) expires: Instant,
}

/// Changes to the quarantine that are saved together with progress.
#[derive(Debug, Default)]
pub(crate) struct QuarantineChanges {
    pub(crate) parked: Vec<Parked>,
    /// Published after all: gone from it.
    pub(crate) released: Vec<i64>,
    /// A marker was published in their place.
    pub(crate) skipped: Vec<i64>,
}

impl QuarantineChanges {
    pub(crate) fn is_empty(&self) -> bool {
        self.parked.is_empty() && self.released.is_empty() && self.skipped.is_empty()
    }
}

/// A replica that could lead an outbox.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub(crate) struct Member {
    pub(crate) instance: String,
    /// How many outboxes it leads, of all that it knows.
    pub(crate) leads: i32,
    pub(crate) seen_seconds: f64,
}

/// The save, and the save with changes to the quarantine. Either is one statement, and changes all or nothing.
pub(super) fn save_sql(table: &TableName) -> (String, String) {
    let (relay, quarantine) = (table.sibling(RELAY), table.sibling(QUARANTINE));
    let save = format!(
        "UPDATE {relay}
            SET floor = $1, published = $2::text::int8multirange, saves = saves + 1, saved_at = clock_timestamp(),
                expires_at = clock_timestamp() + $3::bigint * interval '1 microsecond',
                figures = coalesce($8::text::jsonb, figures),
                figures_at = CASE WHEN $8::text IS NULL THEN figures_at ELSE clock_timestamp() END
          WHERE name = $4 AND epoch = $5 AND saves = $6 AND floor <= $1
            AND pg_postmaster_start_time()::text = $7
      RETURNING name, wanted_owner"
    );
    let with_quarantine = format!(
        "WITH saved AS ({save}),
              parked AS (
                INSERT INTO {quarantine} (name, id, aggregate_type, key, version, topic, headers, payload, problem, attempts,
                                          state)
                SELECT s.name, p.id, p.aggregate_type, p.key, p.version, p.topic, p.headers::jsonb, p.payload, p.problem,
                       (p.problem IS NOT NULL)::int, CASE WHEN p.is_retried THEN 'retry' ELSE 'frozen' END
                  FROM saved s, unnest($9::bigint[], $10::text[], $11::text[], $12::bigint[], $13::text[], $14::text[],
                                       $15::bytea[], $16::text[], $17::bool[])
                       p(id, aggregate_type, key, version, topic, headers, payload, problem, is_retried)
                ON CONFLICT DO NOTHING),
              released AS (
                DELETE FROM {quarantine} q USING saved s WHERE q.name = s.name AND q.id = ANY($18::bigint[])),
              skipped AS (
                UPDATE {quarantine} q SET state = 'skipped' FROM saved s
                 WHERE q.name = s.name AND q.id = ANY($19::bigint[]))
         SELECT name, wanted_owner FROM saved"
    );
    (save, with_quarantine)
}

impl Source {
    /// Takes the lease if nobody else holds it, under a new epoch, with the progress saved so far. `own_epoch` is the
    /// last epoch that this very process led: it need not wait for a lease of its own to expire.
    ///
    /// # Errors
    /// [`SourceError::Unfit`] when the progress belongs to another cluster.
    pub(crate) async fn acquire(
        &self,
        owner: &str,
        own_epoch: Option<i64>,
        ttl: Duration,
    ) -> Result<Option<Lease>, SourceError> {
        let relay = self.table.sibling(RELAY);
        let cluster = self.system_identifier().await?;
        let insert = format!(
            "INSERT INTO {relay} (name, outbox, system_identifier) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
        );
        let outbox = self.table.to_string();
        self.db
            .execute(
                "make the relay's row",
                &insert,
                &[
                    (&self.name, Type::TEXT),
                    (&outbox, Type::TEXT),
                    (&cluster, Type::INT8),
                ],
            )
            .await?;
        let before = Instant::now();
        // Who was asked to lead goes first, unless it does not come.
        let update = format!(
            "UPDATE {relay}
                SET epoch = epoch + 1, owner = $2, outbox = $6, wanted_owner = NULL,
                    expires_at = clock_timestamp() + $3::bigint * interval '1 microsecond'
              WHERE name = $1
                AND ((expires_at < clock_timestamp()
                      AND (coalesce(wanted_owner, '') IN ('', $2)
                           OR expires_at < clock_timestamp() - $3::bigint * interval '1 microsecond'))
                     OR (owner = $2 AND epoch = $5 AND wanted_owner IS NULL))
          RETURNING epoch, saves, floor, coalesce(system_identifier, $4),
                    (SELECT coalesce(array_agg(lower(r)), '{{}}') FROM unnest(published) r),
                    (SELECT coalesce(array_agg(upper(r)), '{{}}') FROM unnest(published) r)"
        );
        let rows = self
            .db
            .query(
                "take the lease",
                &update,
                &[
                    (&self.name, Type::TEXT),
                    (&owner, Type::TEXT),
                    (&micros(ttl), Type::INT8),
                    (&cluster, Type::INT8),
                    (&own_epoch, Type::INT8),
                    (&outbox, Type::TEXT),
                ],
            )
            .await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let saved_cluster: i64 = row.get(3);
        if saved_cluster != cluster {
            return Err(SourceError::Unfit(format!(
                "the progress of outbox {} belongs to cluster {saved_cluster}, and this is {cluster}: the database was \
                 restored or copied. When it is really the one to relay from now on, run outbox-relay adopt {}",
                self.name, self.name
            )));
        }
        let (starts, ends): (Vec<i64>, Vec<i64>) = (row.get(4), row.get(5));
        let published: RangeSet = starts
            .into_iter()
            .zip(ends)
            .map(|(start, end)| start..end)
            .collect();
        Ok(Some(Lease {
            epoch: row.get(0),
            saves: row.get(1),
            progress: Progress {
                floor: row.get(2),
                published,
            },
            expires: before + ttl,
        }))
    }

    /// Removes the relay's row, as if it had never been there.
    pub(crate) async fn forget(&self) -> Result<(), SourceError> {
        // The relay's role may not delete: a row as it is made stands for none.
        let text = format!(
            "UPDATE {} SET epoch = 0, saves = 0, owner = '', expires_at = '-infinity' WHERE name = $1 AND floor = 0",
            self.table.sibling(RELAY)
        );
        self.db
            .execute("forget the relay", &text, &[(&self.name, Type::TEXT)])
            .await?;
        Ok(())
    }

    async fn system_identifier(&self) -> Result<i64, SourceError> {
        let row = self
            .db
            .query_one(
                "ask for the system identifier",
                "SELECT system_identifier, pg_is_in_recovery() FROM pg_control_system()",
                &[],
            )
            .await?;
        if row.get(1) {
            return Err(SourceError::Standby);
        }
        Ok(row.get(0))
    }

    /// Saves progress, with what changed in the quarantine, and renews the lease, which a `ttl` of zero gives up. Updates
    /// `lease`. Returns who is asked to lead next, if anybody.
    ///
    /// # Errors
    /// [`SourceError::LeaseLost`] when the row has moved on; after any other error too the outcome is unknown, and the
    /// progress must be loaded again.
    pub(crate) async fn save(
        &self,
        lease: &mut Lease,
        progress: &Progress,
        ttl: Duration,
        figures: Option<&str>,
        changes: &QuarantineChanges,
    ) -> Result<Option<String>, SourceError> {
        let before = Instant::now();
        let (published, ttl_micros) = (multirange(&progress.published), micros(ttl));
        let mut params: Vec<Param<'_>> = vec![
            (&progress.floor as _, Type::INT8),
            (&published as _, Type::TEXT),
            (&ttl_micros as _, Type::INT8),
            (&self.name as _, Type::TEXT),
            (&lease.epoch as _, Type::INT8),
            (&lease.saves as _, Type::INT8),
            (&self.server as _, Type::TEXT),
            (&figures as _, Type::TEXT),
        ];
        let columns = quarantine::columns(&changes.parked);
        let row = if changes.is_empty() {
            self.db.first("save the progress", &self.save, &params).await?
        } else {
            params.extend(columns.params());
            params.push((&changes.released, Type::INT8_ARRAY));
            params.push((&changes.skipped, Type::INT8_ARRAY));
            self.db
                .first(
                    "save the progress and the quarantine",
                    &self.save_with_quarantine,
                    &params,
                )
                .await?
        };
        let Some(row) = row else {
            return Err(SourceError::LeaseLost);
        };
        let wanted = row.get(1);
        lease.saves += 1;
        lease.expires = before + ttl;
        Ok(wanted)
    }

    /// Says who is to lead next; `None`: whoever comes.
    pub(crate) async fn want(&self, lease: &Lease, next: Option<&str>) -> Result<(), SourceError> {
        let text = format!(
            "UPDATE {} SET wanted_owner = $2 WHERE name = $1 AND epoch = $3",
            self.table.sibling(RELAY)
        );
        let params = [
            (&self.name as _, Type::TEXT),
            (&next as _, Type::TEXT),
            (&lease.epoch as _, Type::INT8),
        ];
        self.db.execute("say who is to lead next", &text, &params).await?;
        Ok(())
    }

    /// Says that this replica is there, and how many outboxes it leads. Returns all that are.
    pub(crate) async fn join(
        &self,
        instance: &str,
        leads: i32,
        ttl: Duration,
    ) -> Result<Vec<Member>, SourceError> {
        let members = self.table.sibling(MEMBERS);
        let text = format!(
            "INSERT INTO {members} AS m (name, instance, leads, seen_at) VALUES ($1, $2, $3, clock_timestamp())
             ON CONFLICT (name, instance) DO UPDATE SET leads = $3, seen_at = clock_timestamp()"
        );
        let params = [
            (&self.name as _, Type::TEXT),
            (&instance as _, Type::TEXT),
            (&leads as _, Type::INT4),
        ];
        self.db
            .execute("say that this replica is there", &text, &params)
            .await?;
        // Names of replicas may change with each start: those long gone must not pile up.
        let text = format!(
            "DELETE FROM {members} WHERE name = $1 AND seen_at < clock_timestamp() - interval '1 day'"
        );
        self.db
            .execute("forget replicas", &text, &[(&self.name, Type::TEXT)])
            .await?;
        self.members(ttl).await
    }

    /// The replicas that are there.
    pub(crate) async fn members(&self, ttl: Duration) -> Result<Vec<Member>, SourceError> {
        members_of(&self.db, &self.table, &self.name, ttl).await
    }

    /// Says that this replica is there no more.
    pub(crate) async fn leave(&self, instance: &str) -> Result<(), SourceError> {
        let members = self.table.sibling(MEMBERS);
        let text = format!("DELETE FROM {members} WHERE name = $1 AND instance = $2");
        let params = [(&self.name as _, Type::TEXT), (&instance as _, Type::TEXT)];
        self.db
            .execute("say that this replica leaves", &text, &params)
            .await?;
        Ok(())
    }
}

/// The replicas seen within `ttl`, by name.
pub(crate) async fn members_of(
    db: &Database,
    table: &TableName,
    name: &str,
    ttl: Duration,
) -> Result<Vec<Member>, SourceError> {
    let text = format!(
        "SELECT instance, leads, extract(epoch FROM clock_timestamp() - seen_at)::float8 FROM {}
          WHERE name = $1 AND seen_at > clock_timestamp() - $2::bigint * interval '1 microsecond' ORDER BY instance",
        table.sibling(MEMBERS)
    );
    let rows = db
        .query(
            "list the replicas",
            &text,
            &[(&name, Type::TEXT), (&micros(ttl), Type::INT8)],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| Member {
            instance: row.get(0),
            leads: row.get(1),
            seen_seconds: row.get(2),
        })
        .collect())
}

/// Asks the leader of an outbox to hand over, to `to` or to whoever comes. Returns who leads; `None` when nobody does.
///
/// # Errors
/// When the database cannot be asked.
pub(crate) async fn ask_to_hand_over(
    db: &Database,
    table: &TableName,
    name: &str,
    to: &str,
) -> Result<Option<String>, SourceError> {
    let text = format!(
        "UPDATE {} SET wanted_owner = $2 WHERE name = $1 AND expires_at > clock_timestamp() RETURNING owner",
        table.sibling(RELAY)
    );
    let rows = db
        .query(
            "ask for a handover",
            &text,
            &[(&name, Type::TEXT), (&to, Type::TEXT)],
        )
        .await?;
    Ok(rows.first().map(|row| row.get(0)))
}
