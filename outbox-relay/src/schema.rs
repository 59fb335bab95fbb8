//! The SQL that makes, completes and upgrades an outbox and what its relay keeps beside it. Every statement may run again.

use crate::config::{Layout, TableName};
use crate::sql::{identifier, literal};

/// A role in GRANT statements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role<'a> {
    /// Runs the relay.
    Relay(&'a str),
    /// Writes events.
    Writer(&'a str),
}

/// The whole script for one outbox.
pub fn script(table: &TableName, layout: &Layout, roles: &[Role<'_>]) -> String {
    let id = layout.columns.id.as_str();
    let own = include_str!("schema/outbox.sql");
    let beside = include_str!("schema/relay.sql");
    let adopt = include_str!("schema/adopt.sql");
    // What the guard names comes before it.
    let guard = include_str!("schema/guard.sql");
    let templates = if layout.owned {
        [own, beside, guard]
    } else {
        [beside, adopt, guard]
    };
    let mut parts: Vec<String> = templates
        .iter()
        .map(|template| fill(template, table, id, ""))
        .collect();
    for role in roles {
        parts.push(match role {
            Role::Relay(name) => fill(include_str!("schema/grants.sql"), table, id, name),
            Role::Writer(name) => fill(include_str!("schema/writer.sql"), table, id, name),
        });
    }
    parts.join("\n")
}

fn fill(template: &str, table: &TableName, id: &str, role: &str) -> String {
    let own = |suffix: &str| table.sibling(&format!("{}_{suffix}", table.name()));
    let shared = |name: &str| table.sibling(name);
    let index = |name: String| identifier(&name);
    let values = [
        ("{outbox}", table.quoted()),
        ("{outbox_name}", literal(&table.to_string())),
        ("{outbox_regclass}", literal(&table.quoted())),
        ("{schema}", identifier(table.schema())),
        ("{id}", identifier(id)),
        ("{id_name}", literal(id)),
        ("{id_index}", index(format!("{}_{id}_key", table.name()))),
        ("{refuse}", own("refuse_change")),
        ("{remove}", own("remove")),
        ("{guard}", identifier(&format!("{}_insert_only", table.name()))),
        ("{guard_name}", literal(&format!("{}_insert_only", table.name()))),
        ("{relay}", shared(RELAY)),
        ("{members}", shared(MEMBERS)),
        ("{floors}", shared(FLOORS)),
        ("{removed}", shared(REMOVED)),
        ("{quarantine}", shared(QUARANTINE)),
        ("{quarantine_by_key}", index(format!("{QUARANTINE}_by_key"))),
        ("{quarantine_decided}", index(format!("{QUARANTINE}_decided"))),
        ("{role}", identifier(role)),
        ("{role_literal}", literal(&identifier(role))),
    ];
    // In one pass: a name may look like a placeholder.
    let mut filled = String::with_capacity(template.len() * 2);
    let mut rest = template;
    while let Some(start) = rest.find('{') {
        filled.push_str(&rest[..start]);
        rest = &rest[start..];
        let (name, value) = values
            .iter()
            .find(|(name, _)| rest.starts_with(name))
            .map_or(("{", "{"), |(name, value)| (*name, value.as_str()));
        filled.push_str(value);
        rest = &rest[name.len()..];
    }
    filled.push_str(rest);
    filled
}

pub(crate) const RELAY: &str = "outbox_relay";
pub(crate) const MEMBERS: &str = "outbox_relay_members";
pub(crate) const FLOORS: &str = "outbox_relay_floors";
pub(crate) const REMOVED: &str = "outbox_relay_removed";
pub(crate) const QUARANTINE: &str = "outbox_relay_quarantine";

/// The function that removes published rows.
pub(crate) fn remove_function(table: &TableName) -> String {
    table.sibling(&format!("{}_remove", table.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `UPDATE_MIGRATION=1 cargo test` writes it anew.
    #[test]
    fn the_migration_is_what_init_runs() {
        let script = script(&TableName::default(), &Layout::default(), &[]);
        let file = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../migrations/outbox/2026-01-01-000001_outbox/up.sql"
        );
        if std::env::var_os("UPDATE_MIGRATION").is_some() {
            std::fs::write(file, &script).expect("written");
        }
        let migration = std::fs::read_to_string(file).expect("there");
        assert_eq!(migration, script, "run this test with UPDATE_MIGRATION=1");
        assert!(!script.contains("{outbox") && !script.contains("{re"), "{script}");
    }

    /// `UPDATE_MIGRATION=1 cargo test` writes that part of it anew.
    #[test]
    fn the_migration_of_dead_letters_ends_in_what_init_runs() {
        let table: TableName = "public.dead_letters".parse().expect("a name");
        let script = script(&table, &Layout::default(), &[]);
        // The table itself has columns of its own.
        let own = fill(include_str!("schema/outbox.sql"), &table, "id", "");
        let beside = script
            .strip_prefix(&format!("{own}\n"))
            .expect("the table comes first");
        let file = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../migrations/consumer/2026-01-04-000002_parking/up.sql"
        );
        let marker = "-- From here on as `outbox-relay init` makes it for this table.\n";
        let migration = std::fs::read_to_string(file).expect("there");
        let (mine, found) = migration.split_once(marker).expect("the marker");
        if std::env::var_os("UPDATE_MIGRATION").is_some() {
            std::fs::write(file, format!("{mine}{marker}{beside}")).expect("written");
        } else {
            assert_eq!(found, beside, "run this test with UPDATE_MIGRATION=1");
        }
    }

    #[test]
    fn names_are_quoted_where_they_must_be() {
        let table: TableName = "my-app.Out'box".parse().expect("a name");
        let script = script(&table, &Layout::default(), &[Role::Writer("app user")]);
        assert!(
            script.contains("CREATE TABLE IF NOT EXISTS \"my-app\".\"Out'box\" ("),
            "{script}"
        );
        assert!(script.contains("'my-app.Out''box'"), "{script}");
        assert!(script.contains("FROM \"app user\""), "{script}");
    }
}
