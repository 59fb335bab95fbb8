//! A small bank with an outbox: transfers between two accounts, each of which tells what happened to it.
//!
//! ```text
//! DATABASE_URL=postgres://… cargo run --example bank -- 100
//! ```
//! opens its accounts if they are missing and transfers a hundred times. The outbox's own tables must be there.
//! `docs/examples/python/bank.py` is the same bank in Python, and both may run at once.

use diesel::prelude::*;
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection as _};
use outbox::Message;
use serde::Serialize;
use uuid::Uuid;

type Error = Box<dyn std::error::Error + Send + Sync>;

diesel::table! {
    accounts (id) {
        id -> Text,
        balance -> BigInt,
        version -> BigInt,
    }
}

const ACCOUNTS: i64 = 5;
const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS accounts (
        id text PRIMARY KEY,
        balance bigint NOT NULL CHECK (balance >= 0),
        version bigint NOT NULL
    )";

/// The payload of `account.opened`.
#[derive(Serialize)]
struct Opened {
    balance: i64,
}

/// The payload of `account.debited` and `account.credited`.
#[derive(Serialize)]
struct Moved<'a> {
    /// The account at the other end.
    other: &'a str,
    amount: i64,
    /// After it.
    balance: i64,
}

/// Opens the accounts that do not exist. Their first event has version 1.
async fn open(conn: &mut AsyncPgConnection) -> Result<(), Error> {
    conn.batch_execute(SCHEMA).await?;
    for number in 1..=ACCOUNTS {
        let (id, balance) = (format!("a{number}"), 100);
        conn.transaction(async |conn| {
            // A row that is inserted is locked, as one that is updated.
            let opened = diesel::insert_into(accounts::table)
                .values((
                    accounts::id.eq(&id),
                    accounts::balance.eq(balance),
                    accounts::version.eq(1),
                ))
                .on_conflict_do_nothing()
                .execute(conn)
                .await?;
            if opened == 1 {
                let message = Message::json("account", &id, 1, "account.opened", &Opened { balance })?
                    .source("/bank/rust");
                outbox::append(conn, &[message]).await?;
            }
            Ok::<_, Error>(())
        })
        .await?;
    }
    Ok(())
}

/// Moves `amount` from one account to another. `false` when it is not there: then nothing is changed, and nothing told.
async fn transfer(conn: &mut AsyncPgConnection, from: &str, to: &str, amount: i64) -> Result<bool, Error> {
    conn.transaction(async |conn| {
        // 1. Lock both accounts before any id of the outbox is drawn; in one order everywhere, against deadlocks.
        let locked: Vec<(String, i64)> = accounts::table
            .filter(accounts::id.eq_any([from, to]))
            .order(accounts::id)
            .select((accounts::id, accounts::balance))
            .for_update()
            .load(conn)
            .await?;
        if !locked
            .iter()
            .any(|(id, balance)| id == from && *balance >= amount)
        {
            return Ok(false);
        }

        // 2. Change them. The statements return the versions that the events get.
        let (debited, from_balance) = add(conn, from, -amount).await?;
        let (credited, to_balance) = add(conn, to, amount).await?;

        // 3. Tell of it, last.
        let debit = Moved {
            other: to,
            amount,
            balance: from_balance,
        };
        let credit = Moved {
            other: from,
            amount,
            balance: to_balance,
        };
        // Joins the two events.
        let transfer = Uuid::now_v7();
        let messages = [
            Message::json("account", from, debited, "account.debited", &debit)?,
            Message::json("account", to, credited, "account.credited", &credit)?,
        ]
        .map(|message| {
            message
                .source("/bank/rust")
                .correlated(transfer, None)
                .metadata("channel", "example")
        });
        outbox::append(conn, &messages).await?;
        Ok(true)
    })
    .await
}

/// Returns the new version and balance.
async fn add(conn: &mut AsyncPgConnection, account: &str, amount: i64) -> QueryResult<(i64, i64)> {
    diesel::update(accounts::table.find(account))
        .set((
            accounts::balance.eq(accounts::balance + amount),
            accounts::version.eq(accounts::version + 1),
        ))
        .returning((accounts::version, accounts::balance))
        .get_result(conn)
        .await
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let url = std::env::var("DATABASE_URL").map_err(|_| "set DATABASE_URL to the bank's database")?;
    let transfers: i64 = std::env::args()
        .nth(1)
        .map_or(Ok(100), |n| n.parse())
        .map_err(|_| "the argument must be the number of transfers")?;
    let mut conn = AsyncPgConnection::establish(&url).await?;
    open(&mut conn).await?;

    let mut made = 0;
    for n in 0..transfers {
        // All pairs of two different accounts come up.
        let from = n % ACCOUNTS;
        let to = (from + 1 + n % (ACCOUNTS - 1)) % ACCOUNTS;
        let amount = 1 + n * 13 % 60;
        if transfer(
            &mut conn,
            &format!("a{}", from + 1),
            &format!("a{}", to + 1),
            amount,
        )
        .await?
        {
            made += 1;
        }
    }
    #[expect(clippy::print_stdout, reason = "what the example answers")]
    {
        println!("{made} transfers, {} refused for lack of money", transfers - made);
    }
    Ok(())
}
