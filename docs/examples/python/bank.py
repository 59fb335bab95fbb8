"""A small bank with an outbox: transfers between two accounts, each of which tells what happened to it.

    pip install 'psycopg[binary]'
    DATABASE_URL=postgres://... python3 bank.py 100

opens its accounts if they are missing and transfers a hundred times. The outbox's own tables must be there.
crates/outbox/examples/bank.rs is the same bank in Rust, and both may run at once.
"""

import json
import os
import sys
import uuid

import psycopg
from psycopg.types.json import Jsonb

ACCOUNTS = 5

SCHEMA = """
    CREATE TABLE IF NOT EXISTS accounts (
        id text PRIMARY KEY,
        balance bigint NOT NULL CHECK (balance >= 0),
        version bigint NOT NULL
    )
"""

# No id: PostgreSQL gives it. Columns that are not named have defaults.
APPEND = """
    INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type,
                        source, content_type, correlation_id, metadata, payload)
    VALUES (%s, 'account', %s, %s, %s, '/bank/python', 'application/json', %s, %s, %s)
"""


def append(conn, account, version, event_type, payload, *, correlation_id=None, metadata=None):
    """Appends an event of an account. Last in the transaction, with the version that the change returned."""
    conn.execute(
        APPEND,
        (
            uuid.uuid4(),
            account,
            version,
            event_type,
            correlation_id,
            Jsonb(metadata or {}),  # an object of strings
            json.dumps(payload).encode(),  # bytes: the relay publishes them untouched
        ),
    )


def open_accounts(conn):
    """Opens the accounts that do not exist. Their first event has version 1."""
    conn.execute(SCHEMA)
    for number in range(1, ACCOUNTS + 1):
        account = f"a{number}"
        with conn.transaction():
            # A row that is inserted is locked, as one that is updated.
            opened = conn.execute(
                "INSERT INTO accounts VALUES (%s, 100, 1) ON CONFLICT DO NOTHING", (account,)
            )
            if opened.rowcount == 1:
                append(conn, account, 1, "account.opened", {"balance": 100})


def transfer(conn, source, target, amount):
    """Moves an amount from one account to another. False when it is not there: then nothing is changed or told."""
    with conn.transaction():  # commits at its end, and rolls back on any exception
        # 1. Lock both accounts before any id of the outbox is drawn; in one order everywhere, against deadlocks.
        balances = dict(
            conn.execute(
                "SELECT id, balance FROM accounts WHERE id = ANY(%s) ORDER BY id FOR UPDATE",
                ([source, target],),
            )
        )
        if balances[source] < amount:
            return False

        # 2. Change them. The statements return the versions that the events get.
        debited, source_balance = add(conn, source, -amount)
        credited, target_balance = add(conn, target, amount)

        # 3. Tell of it, last. The correlation id joins the two events.
        common = {"correlation_id": uuid.uuid4(), "metadata": {"channel": "example"}}
        debit = {"other": target, "amount": amount, "balance": source_balance}
        credit = {"other": source, "amount": amount, "balance": target_balance}
        append(conn, source, debited, "account.debited", debit, **common)
        append(conn, target, credited, "account.credited", credit, **common)
        return True


def add(conn, account, amount):
    """Returns the new version and balance."""
    return conn.execute(
        """
        UPDATE accounts SET balance = balance + %s, version = version + 1
         WHERE id = %s RETURNING version, balance
        """,
        (amount, account),
    ).fetchone()


def main():
    url = os.environ.get("DATABASE_URL") or sys.exit("set DATABASE_URL to the bank's database")
    transfers = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    # autocommit: transactions begin and end where the code says so.
    with psycopg.connect(url, autocommit=True) as conn:
        open_accounts(conn)
        made = 0
        for n in range(transfers):
            # All pairs of two different accounts come up.
            source = n % ACCOUNTS
            target = (source + 1 + n % (ACCOUNTS - 1)) % ACCOUNTS
            made += transfer(conn, f"a{source + 1}", f"a{target + 1}", 1 + n * 13 % 60)
    print(f"{made} transfers, {transfers - made} refused for lack of money")


if __name__ == "__main__":
    main()
