//! The indexes of a generation that is being built: made at its end, since every write would have to keep them up to date.

use diesel::QueryResult;
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection as _};

/// Takes away the indexes of the tables in `schema`, and keeps in a table there how they are made. Those that are rules stay: what is
/// unique, and what a constraint rests on. Does nothing where that was done before.
pub(crate) async fn take_away(connection: &mut AsyncPgConnection, schema: &str) -> QueryResult<()> {
    run(connection, schema, include_str!("indexes_away.sql")).await
}

/// Makes them, all or none. Writers of the tables wait.
pub(crate) async fn make(connection: &mut AsyncPgConnection, schema: &str) -> QueryResult<()> {
    run(connection, schema, include_str!("indexes_made.sql")).await
}

/// However long it takes: it depends on the size of the tables.
async fn run(connection: &mut AsyncPgConnection, schema: &str, sql: &str) -> QueryResult<()> {
    let sql = sql.replace("{schema}", &schema.replace('\'', "''"));
    connection
        .batch_execute(&format!("BEGIN; SET LOCAL statement_timeout = 0; {sql}; COMMIT"))
        .await
}
