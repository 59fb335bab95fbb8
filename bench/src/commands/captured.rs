//! What a command asks of PostgreSQL, as the server's log tells it, and a script of pgbench that asks the same.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use local_stack::Postgres;
use uuid::Uuid;

use crate::servers::Servers;

/// Commands in one run of a script: their fresh ids are fetched together, by one statement that the service does not have.
pub(crate) const COMMANDS: usize = 16;

/// In that statement, and in none of the service's.
pub(crate) const MARK: &str = "bench_id";

/// Ids that begin with the time, as the services make them.
pub(crate) const FUNCTIONS: &str = "
CREATE FUNCTION bench_id() RETURNS uuid LANGUAGE sql VOLATILE AS $$
    SELECT encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
        PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3) FROM 1 FOR 6), 52, 1), 53, 1), 'hex')::uuid
$$";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Statement {
    pub(crate) text: String,
    parameters: Vec<Option<String>>,
}

/// A transaction, or a statement outside of any; in the order in which they ended.
pub(crate) type Unit = Vec<Statement>;

/// Does `command` with the server's log switched on, and returns what the service asked in those transactions that have to do with one
/// of the ids that it returns.
pub(crate) async fn capture(
    servers: &Servers,
    database: &str,
    command: impl Future<Output = Result<Vec<Uuid>>>,
) -> Result<Vec<Unit>> {
    log_statements(servers, "all").await?;
    let before = read(&servers.postgres)?.len();
    let ids = command.await?;
    // What is done after the answer.
    tokio::time::sleep(Duration::from_millis(500)).await;
    log_statements(servers, "none").await?;
    let log = read(&servers.postgres)?;
    let ids: Vec<String> = ids.iter().map(Uuid::to_string).collect();
    let units = units(&log[before..], database).into_iter();
    let units: Vec<Unit> = units.filter(|unit| mentions(unit, &ids)).collect();
    ensure!(
        !units.is_empty(),
        "the log of PostgreSQL has nothing of the command"
    );
    Ok(units)
}

fn mentions(unit: &Unit, ids: &[String]) -> bool {
    let mut parameters = unit.iter().flat_map(|statement| &statement.parameters).flatten();
    parameters.any(|parameter| ids.iter().any(|id| parameter.contains(id)))
}

fn read(postgres: &Postgres) -> Result<String> {
    let path = postgres.log();
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

async fn log_statements(servers: &Servers, which: &str) -> Result<()> {
    let client = servers.connect("postgres").await?;
    // ALTER SYSTEM takes no transaction, which several statements at once would be.
    for statement in [
        &format!("ALTER SYSTEM SET log_statement = '{which}'"),
        "SELECT pg_reload_conf()",
    ] {
        client.batch_execute(statement).await?;
    }
    // Sessions learn it with their next statement once they were told.
    tokio::time::sleep(Duration::from_millis(500)).await;
    Ok(())
}

/// Lines are `… [pid] database LOG:  execute s1: SELECT …`, followed by `… DETAIL:  parameters: $1 = '…', …`.
fn units(log: &str, database: &str) -> Vec<Unit> {
    let mut open: BTreeMap<&str, Unit> = BTreeMap::new();
    let mut units: Vec<(&str, Unit)> = Vec::new();
    for line in log.lines() {
        let Some((pid, message)) = line
            .split_once(" [")
            .and_then(|(_, rest)| rest.split_once("] "))
            .and_then(|(pid, rest)| Some((pid, rest.strip_prefix(database)?.strip_prefix(' ')?)))
        else {
            continue;
        };
        if let Some(parameters) = message.strip_prefix("DETAIL:  parameters: ") {
            let unit = match open.get_mut(pid) {
                Some(unit) => Some(unit),
                None => units
                    .iter_mut()
                    .rev()
                    .find(|(of, _)| *of == pid)
                    .map(|(_, unit)| unit),
            };
            if let Some(statement) = unit.and_then(|unit| unit.last_mut()) {
                statement.parameters = parse(parameters);
            }
            continue;
        }
        let text = match message.strip_prefix("LOG:  statement: ") {
            Some(text) => text,
            None => match message
                .strip_prefix("LOG:  execute ")
                .and_then(|rest| rest.split_once(": "))
            {
                Some((_, text)) => text,
                None => continue,
            },
        };
        let statement = Statement {
            text: text.to_owned(),
            parameters: Vec::new(),
        };
        let ends = ["COMMIT", "ROLLBACK"].contains(&text);
        if text == "BEGIN" {
            open.insert(pid, vec![statement]);
        } else if let Some(unit) = open.get_mut(pid) {
            unit.push(statement);
            if ends {
                units.extend(open.remove_entry(pid));
            }
        } else {
            units.push((pid, vec![statement]));
        }
    }
    units.into_iter().map(|(_, unit)| unit).collect()
}

/// `$1 = 'it''s', $2 = NULL`
fn parse(text: &str) -> Vec<Option<String>> {
    let mut values = Vec::new();
    let mut rest = text;
    while let Some((_, after)) = rest.split_once(" = ") {
        let Some(mut quoted) = after.strip_prefix('\'') else {
            values.push(None);
            rest = after;
            continue;
        };
        let mut value = String::new();
        while let Some((part, after)) = quoted.split_once('\'') {
            value.push_str(part);
            quoted = after;
            match quoted.strip_prefix('\'') {
                Some(after) => {
                    value.push('\'');
                    quoted = after;
                }
                None => break,
            }
        }
        values.push(Some(value));
        rest = quoted;
    }
    values
}

/// For pgbench: a script, and the values of its variables that are always the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Script {
    pub(crate) text: String,
    pub(crate) constants: Vec<(String, String)>,
}

/// Values of a captured command that are others in every command, each with the expression that makes it.
#[derive(Debug)]
pub(crate) struct Fresh(Vec<(String, String)>);

impl Fresh {
    /// All ids in `units` but the `constant` ones, and the provider's ids of charges. `made` are those with an expression of their own.
    pub(crate) fn of(units: &[Unit], constant: &[Uuid], made: &[(Uuid, &str)]) -> Self {
        let mut fresh: Vec<(String, String)> = Vec::new();
        let statements = units.iter().flatten();
        for value in statements.flat_map(|statement| &statement.parameters).flatten() {
            if fresh.iter().any(|(known, _)| known == value) {
                continue;
            }
            if let Some(charge) = value.strip_prefix("pi_") {
                if charge.chars().all(|letter| letter.is_ascii_alphanumeric()) {
                    fresh.push((value.clone(), "'pi_' || gen_random_uuid()".to_owned()));
                }
                continue;
            }
            let Ok(id) = Uuid::try_parse(value) else { continue };
            if value.len() != 36 || constant.contains(&id) {
                continue;
            }
            let made = made
                .iter()
                .find(|(of, _)| *of == id)
                .map(|(_, expression)| *expression);
            let expression = made.unwrap_or(match id.get_version_num() {
                7 => "bench_id()",
                _ => "gen_random_uuid()",
            });
            fresh.push((value.clone(), expression.to_owned()));
        }
        Self(fresh)
    }

    /// `value` in a command of the script as an expression, if it is another one in each.
    fn expression(&self, value: &str, command: usize) -> Option<String> {
        let mut expression = format!("'{}'", value.replace('\'', "''"));
        let mut found = false;
        for (place, (captured, _)) in self.0.iter().enumerate() {
            if value.contains(captured) {
                found = true;
                expression = expression.replace(captured, &format!("' || c{command}.f{place} || '"));
            }
        }
        found.then_some(expression)
    }
}

/// The same statements for [`COMMANDS`] commands: each unit as one pipeline, or each statement on its own.
pub(crate) fn script(units: &[Unit], fresh: &Fresh, pipelined: bool) -> Script {
    let mut constants: Vec<String> = Vec::new();
    let mut columns: Vec<String> = Vec::new();
    let mut body = String::new();
    for command in 0..COMMANDS {
        let mut own: Vec<String> = Vec::new();
        for unit in units {
            if pipelined {
                body.push_str("\\startpipeline\n");
            }
            for Statement { text, parameters } in unit {
                // From the last one, since $1 is the beginning of $10.
                let mut text = text.clone();
                for (position, value) in parameters.iter().enumerate().rev() {
                    let variable = match value {
                        // Nobody defines it, which is NULL.
                        None => "nothing".to_owned(),
                        Some(value) => match fresh.expression(value, command) {
                            Some(expression) => format!("v{command}_{}", place(&mut own, expression)),
                            None => format!("c{}", place(&mut constants, value.clone())),
                        },
                    };
                    text = text.replace(&format!("${}", position + 1), &format!(":{variable}"));
                }
                let _ = writeln!(body, "{text};");
            }
            if pipelined {
                body.push_str("\\endpipeline\n");
            }
        }
        let own = own.into_iter().enumerate();
        columns.extend(own.map(|(place, expression)| format!("{expression} AS v{command}_{place}")));
    }
    let made: Vec<String> = fresh
        .0
        .iter()
        .enumerate()
        .map(|(place, (_, made))| format!("{made} AS f{place}"))
        .collect();
    let sources: Vec<String> = (0..COMMANDS)
        // Without OFFSET each use of an id could become a call of its own.
        .map(|command| format!("(SELECT '' AS {MARK}, {} OFFSET 0) c{command}", made.join(", ")))
        .collect();
    let text = format!(
        "SELECT {} FROM {} \\gset\n{body}",
        columns.join(", "),
        sources.join(", ")
    );
    let constants = constants.into_iter().enumerate();
    Script {
        text,
        constants: constants
            .map(|(place, value)| (format!("c{place}"), value))
            .collect(),
    }
}

fn place(known: &mut Vec<String>, value: String) -> usize {
    known.iter().position(|known| *known == value).unwrap_or_else(|| {
        known.push(value);
        known.len() - 1
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
2026-01-01 00:00:00.000 UTC [7] shop LOG:  statement: BEGIN
2026-01-01 00:00:00.000 UTC [8] shop LOG:  execute s0: SELECT 1
2026-01-01 00:00:00.000 UTC [7] shop LOG:  execute s1: INSERT INTO t VALUES ($1, $2, DEFAULT)
2026-01-01 00:00:00.000 UTC [7] shop DETAIL:  parameters: $1 = '01890a5d-ac96-774b-bcce-b302099a8057', $2 = 'it''s, $3 = x'
2026-01-01 00:00:00.000 UTC [9] other LOG:  statement: BEGIN
2026-01-01 00:00:00.000 UTC [7] shop LOG:  statement: COMMIT
2026-01-01 00:00:00.000 UTC [8] shop LOG:  execute s2: SELECT $1, $2
2026-01-01 00:00:00.000 UTC [8] shop DETAIL:  parameters: $1 = NULL, $2 = '{01890a5d-ac96-774b-bcce-b302099a8057}'
";

    #[test]
    fn transactions_are_read_from_the_log_and_asked_again() {
        let units = units(LOG, "shop");
        let texts: Vec<Vec<&str>> = units
            .iter()
            .map(|unit| unit.iter().map(|statement| statement.text.as_str()).collect())
            .collect();
        let insert = "INSERT INTO t VALUES ($1, $2, DEFAULT)";
        assert_eq!(
            texts,
            [
                vec!["SELECT 1"],
                vec!["BEGIN", insert, "COMMIT"],
                vec!["SELECT $1, $2"]
            ]
        );

        let fresh = Fresh::of(&units, &[], &[]);
        let script = script(&units[1..], &fresh, true);
        assert_eq!(script.constants, [("c0".to_owned(), "it's, $3 = x".to_owned())]);
        let first: Vec<&str> = script.text.lines().take(9).collect();
        assert!(
            first[0].starts_with("SELECT '' || c0.f0 || '' AS v0_0, '{' || c0.f0 || '}' AS v0_1,"),
            "{}",
            first[0]
        );
        assert_eq!(
            first[1..],
            [
                "\\startpipeline",
                "BEGIN;",
                "INSERT INTO t VALUES (:v0_0, :c0, DEFAULT);",
                "COMMIT;",
                "\\endpipeline",
                "\\startpipeline",
                "SELECT :nothing, :v0_1;",
                "\\endpipeline"
            ]
        );
    }
}
