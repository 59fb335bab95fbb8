//! The SQL that makes, completes and upgrades an outbox and what its relay keeps beside it. Every statement may run again.

use crate::config::{Layout, TableName};

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
    [
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
        ("{relay}", shared(RELAY)),
        ("{members}", shared(MEMBERS)),
        ("{floors}", shared(FLOORS)),
        ("{removed}", shared(REMOVED)),
        ("{quarantine}", shared(QUARANTINE)),
        ("{quarantine_by_key}", index(format!("{QUARANTINE}_by_key"))),
        ("{quarantine_decided}", index(format!("{QUARANTINE}_decided"))),
        ("{role}", identifier(role)),
        ("{role_literal}", literal(&identifier(role))),
    ]
    .iter()
    .fold(template.to_owned(), |text, (name, value)| {
        text.replace(name, value)
    })
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

/// An SQL identifier, quoted where it must be.
pub(crate) fn identifier(name: &str) -> String {
    let plain = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        && !RESERVED.contains(&name);
    if plain {
        name.to_owned()
    } else {
        format!("\"{}\"", name.replace('"', "\"\""))
    }
}

/// Reserved words that somebody may name a table, a column or a role.
const RESERVED: [&str; 24] = [
    "all",
    "analyze",
    "array",
    "case",
    "check",
    "column",
    "default",
    "desc",
    "end",
    "from",
    "grant",
    "group",
    "in",
    "limit",
    "offset",
    "order",
    "primary",
    "references",
    "select",
    "table",
    "to",
    "user",
    "when",
    "where",
];

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
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

    #[test]
    fn identifiers_and_literals_are_quoted_where_they_must_be() {
        assert_eq!(identifier("outbox_1"), "outbox_1");
        assert_eq!(identifier("Order"), "\"Order\"");
        assert_eq!(identifier("user"), "\"user\"");
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
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
