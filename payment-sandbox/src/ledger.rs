//! The ledger: every charge and every refund, newest first, as one JSON object.
//!
//! `{"charges": [{id, payment_intent, amount, currency, created, payment_id, order_id}, …],
//! "refunds": [{id, charge, payment_intent, amount, currency, status, created, payment_id, order_id}, …]}`; amounts in the
//! units of Stripe's API, times in seconds of Unix time.

use std::io::{self, Write as _};

use serde_json::Value;

use crate::model::{Charge, Refund};
use crate::store::{Read, Record, StoreError};

/// The ledger could not be written.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("the ledger cannot be read")]
    Store(#[from] StoreError),
    #[error("the ledger cannot be written")]
    Output(#[from] io::Error),
}

/// Writes one moment's ledger, one entry a line, holding only a few entries at a time.
///
/// # Errors
/// When it cannot be read, or `out` takes no more.
pub fn write(read: &Read, out: impl io::Write) -> Result<(), LedgerError> {
    let mut out = io::BufWriter::with_capacity(64 << 10, out);
    out.write_all(b"{\"charges\":[")?;
    entries::<Charge>(read, &mut out, Charge::entry)?;
    out.write_all(b"],\"refunds\":[")?;
    entries::<Refund>(read, &mut out, Refund::entry)?;
    out.write_all(b"]}\n")?;
    Ok(out.flush()?)
}

fn entries<R: Record>(
    read: &Read,
    out: &mut impl io::Write,
    entry: fn(&R) -> Value,
) -> Result<(), LedgerError> {
    let mut separator = "\n";
    for record in read.newest_first::<R>(None)? {
        write!(out, "{separator}{}", entry(&record?))?;
        separator = ",\n";
    }
    Ok(())
}
