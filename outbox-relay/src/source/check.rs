//! Refuses a table on which the protocol would not hold.

use std::collections::BTreeMap;

use super::*;
use crate::config::{Columns, HeaderStyle, Layout};
use crate::database::Param;
use crate::schema::{FLOORS, MEMBERS, QUARANTINE, RELAY, REMOVED, remove_function};

/// Oldest PostgreSQL that has multiranges.
const OLDEST_SERVER: i32 = 140_000;

/// What the checks found out.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) table: u32,
    pub(crate) sequence: u32,
    /// Types of the table's columns, as PostgreSQL writes them.
    pub(crate) types: BTreeMap<String, String>,
}

/// # Errors
/// [`SourceError::Unfit`] says what is wrong and what to do.
pub(crate) async fn check(db: &Database, table: &TableName, layout: &Layout) -> Result<Checked, SourceError> {
    let ask = |sql: &'static str, params: Vec<String>| async move {
        let params: Vec<Param<'_>> = params.iter().map(|p| (p as _, Type::TEXT)).collect();
        db.query("check the outbox table", sql, &params).await
    };
    let unfit = |problem: String| Err(SourceError::Unfit(format!("outbox table {table}: {problem}")));
    let id = &layout.columns.id;

    let server = ask(
        "SELECT current_setting('server_version_num')::int, current_setting('server_version')",
        vec![],
    )
    .await?;
    if server[0].get::<_, i32>(0) < OLDEST_SERVER {
        let version: &str = server[0].get(1);
        return unfit(format!("PostgreSQL {version} is too old, 14 or newer is needed"));
    }

    let found = ask(
        "SELECT c.oid, c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
          WHERE n.nspname = $1 AND c.relname = $2",
        vec![table.schema().to_owned(), table.name().to_owned()],
    )
    .await?;
    let Some(found) = found.first() else {
        return unfit("it does not exist: make it with outbox-relay init".to_owned());
    };
    let (oid, kind): (u32, &str) = (found.get(0), found.get(1));
    if kind != "r" {
        return unfit(format!("it is not an ordinary table (relkind {kind})"));
    }

    let usable = ask(
        "SELECT quote_ident($1) WHERE has_schema_privilege($1, 'USAGE')",
        vec![table.schema().to_owned()],
    )
    .await?;
    if usable.is_empty() {
        return unfit(lacks(&format!("USAGE on schema {}", table.schema())));
    }

    let columns = ask(
        "SELECT attname::text, format_type(atttypid, NULL), attidentity::text
           FROM pg_attribute WHERE attrelid = $1::oid AND attnum > 0 AND NOT attisdropped",
        vec![oid.to_string()],
    )
    .await?;
    let types: BTreeMap<String, String> = columns.iter().map(|row| (row.get(0), row.get(1))).collect();
    for name in named(layout) {
        if !types.contains_key(name) {
            return unfit(format!(
                "the column {name} is missing: outbox-relay init adds what an outbox needs, and \
                 outbox.NAME.columns says how columns are called"
            ));
        }
    }
    match types.get(id).map(String::as_str) {
        Some("bigint") => {}
        other => {
            let other = other.unwrap_or_default();
            return unfit(format!("the column {id} is {other}, and must be bigint"));
        }
    }
    if columns
        .iter()
        .any(|row| row.get::<_, &str>(0) == id && row.get::<_, &str>(2) != "a")
    {
        return unfit(format!(
            "the column {id} must be GENERATED ALWAYS AS IDENTITY: writers could supply ids"
        ));
    }
    let cloud_events = layout.headers.style == HeaderStyle::CloudEvents;
    if cloud_events && (layout.columns.event_id.is_none() || layout.columns.event_type.is_none()) {
        return unfit("CloudEvents need the columns event_id and event_type".to_owned());
    }

    let sequence = ask(
        "SELECT seqrelid, seqcache, seqincrement, seqcycle FROM pg_sequence
          WHERE seqrelid = pg_get_serial_sequence($1, $2)::regclass",
        vec![table.quoted(), id.clone()],
    )
    .await?;
    let Some(sequence) = sequence.first() else {
        return unfit(format!("the sequence of {id} cannot be read"));
    };
    let (sequence, cache, increment, cycle): (u32, i64, i64, bool) =
        (sequence.get(0), sequence.get(1), sequence.get(2), sequence.get(3));
    if cache != 1 {
        return unfit(format!(
            "its sequence has CACHE {cache}: ids would not rise with the order of inserts; use 1"
        ));
    }
    if increment != 1 || cycle {
        return unfit("its sequence must have INCREMENT 1 and NO CYCLE".to_owned());
    }

    let unusual = ask(
        "SELECT 'a primary key or unique index on ' || $2 || ' alone is missing'
          WHERE NOT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
                             WHERE i.indrelid = $1::oid AND i.indisunique AND i.indisvalid AND i.indnatts = 1
                               AND i.indpred IS NULL AND a.attname = $2)
         UNION ALL
         SELECT format('trigger %I runs before each insert: it could draw an id out of order', tgname)
           FROM pg_trigger WHERE tgrelid = $1::oid AND NOT tgisinternal AND tgenabled <> 'D'
            AND tgtype & 4 = 4 AND tgtype & 2 = 2 AND tgtype & 1 = 1
         UNION ALL
         SELECT 'nothing guards it against DELETE, UPDATE and TRUNCATE: run outbox-relay init'
          WHERE NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = $1::oid AND NOT tgisinternal AND tgenabled <> 'D'
                               AND tgname = (SELECT (relname || '_insert_only')::name FROM pg_class WHERE oid = $1::oid))
         UNION ALL
         SELECT 'row security hides rows from the relay'
           FROM pg_class WHERE oid = $1::oid AND relrowsecurity AND row_security_active(oid)
         UNION ALL
         SELECT 'a logical replication subscription writes to it: its ids come from elsewhere'
           FROM pg_subscription_rel WHERE srrelid = $1::oid",
        vec![oid.to_string(), id.clone()],
    )
    .await?;
    if let Some(problem) = unusual.first() {
        return unfit(problem.get(0));
    }

    for beside in [RELAY, MEMBERS, FLOORS, REMOVED, QUARANTINE] {
        let exists = ask(
            "SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2",
            vec![table.schema().to_owned(), beside.to_owned()],
        )
        .await?;
        if exists.is_empty() {
            return unfit(format!(
                "the table {} is missing: make it with outbox-relay init",
                table.sibling(beside)
            ));
        }
    }
    let missing = ask(
        "SELECT format('%s on %s', p.privilege, r.relation)
           FROM (VALUES ($1, '{SELECT}'), ($2, '{SELECT,INSERT,UPDATE}'), ($3, '{SELECT,INSERT,UPDATE,DELETE}'),
                        ($4, '{SELECT,INSERT,UPDATE,DELETE}'), ($5, '{SELECT,INSERT,UPDATE,DELETE}'), ($6, '{SELECT}'))
                r(relation, privileges), unnest(r.privileges::text[]) p(privilege)
          WHERE NOT has_table_privilege(r.relation, p.privilege)
         UNION ALL
         SELECT format('SELECT on sequence %s', pg_get_serial_sequence($1, $7))
          WHERE NOT has_sequence_privilege(pg_get_serial_sequence($1, $7), 'SELECT')
         UNION ALL
         SELECT format('EXECUTE on function %s', f) FROM unnest(ARRAY[$8 || '(bigint, bigint)', 'pg_control_system()']) f
          WHERE to_regprocedure(f) IS NOT NULL AND NOT has_function_privilege(f, 'EXECUTE')
         UNION ALL
         SELECT format('the function %s', $8) WHERE to_regprocedure($8 || '(bigint, bigint)') IS NULL",
        vec![
            table.quoted(),
            table.sibling(RELAY),
            table.sibling(MEMBERS),
            table.sibling(FLOORS),
            table.sibling(QUARANTINE),
            table.sibling(REMOVED),
            id.clone(),
            remove_function(table),
        ],
    )
    .await?;
    if let Some(privilege) = missing.first() {
        return unfit(lacks(privilege.get(0)));
    }
    Ok(Checked {
        table: oid,
        sequence,
        types,
    })
}

/// Whether the role can see how far standbys are, which others' rows of a view tell.
///
/// # Errors
/// [`SourceError::Unfit`] when it cannot: everything would wait for standbys that it does not see.
pub(crate) async fn sees_standbys(db: &Database) -> Result<(), SourceError> {
    let asked = "SELECT pg_has_role('pg_read_all_stats', 'USAGE'), current_user::text";
    let row = db.query_one("ask for the role's rights", asked, &[]).await?;
    if row.get(0) {
        return Ok(());
    }
    let role = crate::sql::identifier(row.get(1));
    Err(SourceError::Unfit(format!(
        "durability = \"replicated\" needs a role that sees the standbys: GRANT pg_monitor TO {role}"
    )))
}

fn lacks(privilege: &str) -> String {
    format!("the relay's role lacks {privilege}: outbox-relay init --relay-role grants all that it needs")
}

/// Who else may do what would break the promises, for the operator's ears.
pub(crate) async fn loose_grants(
    db: &Database,
    table: &TableName,
    layout: &Layout,
) -> Result<Vec<String>, SourceError> {
    // The owner can do anything anyway. Those who may insert an id can get past ALWAYS with COPY.
    let sql = "SELECT format('role %s may %s', g.grantee::regrole, g.privilege)
           FROM (SELECT a.grantee, a.privilege_type AS privilege FROM pg_class c, aclexplode(c.relacl) a
                  WHERE c.oid = $1::regclass AND a.grantee <> c.relowner AND a.privilege_type IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE')
                 UNION ALL
                 SELECT a.grantee, 'INSERT (' || t.attname || ')' FROM pg_attribute t JOIN pg_class c ON c.oid = t.attrelid, aclexplode(t.attacl) a
                  WHERE t.attrelid = $1::regclass AND t.attname = $2 AND a.grantee <> c.relowner AND a.privilege_type = 'INSERT'
                 UNION ALL
                 SELECT a.grantee, a.privilege_type || ' on its sequence' FROM pg_class c, aclexplode(c.relacl) a
                  WHERE c.oid = pg_get_serial_sequence($1, $2)::regclass AND a.grantee <> c.relowner
                    AND a.privilege_type IN ('USAGE', 'UPDATE')) g ORDER BY 1";
    let quoted = table.quoted();
    let rows = db
        .query(
            "look at the grants",
            sql,
            &[(&quoted, Type::TEXT), (&layout.columns.id, Type::TEXT)],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// The columns that a layout needs.
fn named(layout: &Layout) -> impl Iterator<Item = &str> {
    let Columns {
        id,
        event_id,
        aggregate_type,
        aggregate_id,
        aggregate_version,
        event_type,
        schema_version,
        topic,
        source,
        content_type,
        data_schema,
        correlation_id,
        causation_id,
        traceparent,
        tracestate,
        metadata,
        occurred_at,
        payload,
    } = &layout.columns;
    let optional = [
        event_id,
        aggregate_type,
        aggregate_version,
        event_type,
        schema_version,
        topic,
        source,
        content_type,
        data_schema,
        correlation_id,
        causation_id,
        traceparent,
        tracestate,
        metadata,
        occurred_at,
    ];
    [id, aggregate_id, payload]
        .into_iter()
        .chain(optional.into_iter().flatten())
        .chain(layout.headers.columns.iter().map(|(_, column)| column))
        .map(String::as_str)
}
