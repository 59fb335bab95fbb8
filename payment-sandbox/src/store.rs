//! What the sandbox remembers: one redb file. A write is on disk before anybody hears of it.

use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::Rng as _;
use rand::distr::Alphanumeric;
use redb::{ReadTransaction, ReadableDatabase as _, ReadableTable as _, TableDefinition, WriteTransaction};
use serde::{Serialize, de::DeserializeOwned};

use crate::model::{Answer, Charge, Intent, Method, Refund};

type Records = TableDefinition<'static, &'static str, &'static [u8]>;

/// Answers by idempotency key.
const ANSWERS: Records = TableDefinition::new("answers");
/// The same keys by when they were stored, to forget them in time.
const ANSWER_TIMES: TableDefinition<'static, (u64, &'static str), ()> = TableDefinition::new("answer_times");
/// Whose creation faults have struck.
const STRUCK: TableDefinition<'static, &'static str, ()> = TableDefinition::new("struck");
const COUNTERS: TableDefinition<'static, &'static str, u64> = TableDefinition::new("counters");
const NEXT_ID: &str = "next_id";

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the storage file {0} cannot be opened")]
    Open(PathBuf, #[source] redb::DatabaseError),
    #[error("the storage file cannot be read or written")]
    Storage(#[source] redb::Error),
    #[error("a stored record is not understood")]
    Record(#[from] serde_json::Error),
}

macro_rules! from_storage {
    ($($type:ident),*) => {$(
        impl From<redb::$type> for StoreError {
            fn from(error: redb::$type) -> Self {
                Self::Storage(error.into())
            }
        }
    )*};
}

from_storage!(TransactionError, TableError, StorageError, CommitError);

/// Something kept under its id. Ids of one kind sort in the order in which they were made.
pub trait Record: Serialize + DeserializeOwned {
    const TABLE: Records;
    /// What its ids start with.
    const PREFIX: &'static str;

    fn id(&self) -> &str;
}

macro_rules! record {
    ($type:ident, $table:literal, $prefix:literal) => {
        impl Record for $type {
            const TABLE: Records = TableDefinition::new($table);
            const PREFIX: &'static str = $prefix;

            fn id(&self) -> &str {
                &self.id
            }
        }
    };
}

record!(Method, "methods", "pm_");
record!(Intent, "intents", "pi_");
record!(Charge, "charges", "ch_");
record!(Refund, "refunds", "re_");

/// The file. Clones share it.
#[derive(Debug, Clone)]
pub struct Store(Arc<redb::Database>);

impl Store {
    /// Opens the file, or makes it. Only one process can have it open.
    ///
    /// # Errors
    /// When the file cannot be used, or another process has it.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let opened =
            redb::Database::create(path).map_err(|error| StoreError::Open(path.to_owned(), error))?;
        let store = Self(Arc::new(opened));
        // Readers find every table.
        store.write(|write| {
            for table in [
                Method::TABLE,
                Intent::TABLE,
                Charge::TABLE,
                Refund::TABLE,
                ANSWERS,
            ] {
                write.0.open_table(table)?;
            }
            write.0.open_table(ANSWER_TIMES)?;
            write.0.open_table(STRUCK)?;
            write.0.open_table(COUNTERS)?;
            Ok(())
        })?;
        Ok(store)
    }

    /// Opens a file that is there, to read it.
    ///
    /// # Errors
    /// When there is none, or a process that runs has it.
    pub fn open_existing(path: &Path) -> Result<Self, StoreError> {
        let opened = redb::Database::open(path).map_err(|error| StoreError::Open(path.to_owned(), error))?;
        Ok(Self(Arc::new(opened)))
    }

    /// Runs `work` in a transaction that is on disk when this returns, or has not happened.
    pub fn write<T>(&self, work: impl FnOnce(&Write) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let write = Write(self.0.begin_write()?);
        let done = work(&write)?;
        write.0.commit()?;
        Ok(done)
    }

    /// What was written up to now.
    pub fn read(&self) -> Result<Read, StoreError> {
        Ok(Read(self.0.begin_read()?))
    }
}

/// A transaction that changes things.
pub struct Write(WriteTransaction);

impl Write {
    pub fn get<R: Record>(&self, id: &str) -> Result<Option<R>, StoreError> {
        let table = self.0.open_table(R::TABLE)?;
        let found = table.get(id)?;
        Ok(found
            .map(|bytes| serde_json::from_slice(bytes.value()))
            .transpose()?)
    }

    pub fn put<R: Record>(&self, record: &R) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(record)?;
        self.0
            .open_table(R::TABLE)?
            .insert(record.id(), bytes.as_slice())?;
        Ok(())
    }

    /// All records of a kind, oldest first. For the few moments when the sandbox looks at everything.
    pub fn all<R: Record>(&self) -> Result<Vec<R>, StoreError> {
        let table = self.0.open_table(R::TABLE)?;
        let rows = table.iter()?;
        rows.map(|row| Ok(serde_json::from_slice(row?.1.value())?))
            .collect()
    }

    /// An id after all others of its kind.
    pub fn new_id<R: Record>(&self) -> Result<String, StoreError> {
        let mut counters = self.0.open_table(COUNTERS)?;
        let number = counters.get(NEXT_ID)?.map_or(0, |number| number.value());
        counters.insert(NEXT_ID, number + 1)?;
        let tail: String = rand::rng()
            .sample_iter(&Alphanumeric)
            .take(10)
            .map(char::from)
            .collect();
        Ok(format!("{}{}{tail}", R::PREFIX, letters(number)))
    }

    /// Whether this is the first time that it is asked about `what`.
    pub fn strikes(&self, what: &str) -> Result<bool, StoreError> {
        Ok(self.0.open_table(STRUCK)?.insert(what, ())?.is_none())
    }

    pub fn answer(&self, key: &str) -> Result<Option<Answer>, StoreError> {
        let answers = self.0.open_table(ANSWERS)?;
        let found = answers.get(key)?;
        Ok(found
            .map(|bytes| serde_json::from_slice(bytes.value()))
            .transpose()?)
    }

    pub fn keep_answer(&self, key: &str, answer: &Answer) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(answer)?;
        self.0.open_table(ANSWERS)?.insert(key, bytes.as_slice())?;
        self.0.open_table(ANSWER_TIMES)?.insert((now(), key), ())?;
        Ok(())
    }

    /// Forgets answers that are older than `age`, `limit` at most. Returns how many.
    pub fn forget_answers(&self, age: Duration, limit: usize) -> Result<usize, StoreError> {
        let until = now().saturating_sub(age.as_secs());
        let mut times = self.0.open_table(ANSWER_TIMES)?;
        let mut answers = self.0.open_table(ANSWERS)?;
        let mut old = Vec::new();
        for row in times.range((0, "")..(until, ""))?.take(limit) {
            let (id, _) = row?;
            let (time, key) = id.value();
            old.push((time, key.to_owned()));
        }
        for (time, key) in &old {
            times.remove((*time, key.as_str()))?;
            answers.remove(key.as_str())?;
        }
        Ok(old.len())
    }
}

/// A snapshot.
pub struct Read(ReadTransaction);

impl Read {
    pub fn get<R: Record>(&self, id: &str) -> Result<Option<R>, StoreError> {
        let table = self.0.open_table(R::TABLE)?;
        let found = table.get(id)?;
        Ok(found
            .map(|bytes| serde_json::from_slice(bytes.value()))
            .transpose()?)
    }

    /// Records that are older than `after`, or all, newest first.
    pub fn newest_first<R: Record>(
        &self,
        after: Option<&str>,
    ) -> Result<impl Iterator<Item = Result<R, StoreError>> + use<R>, StoreError> {
        let end = after.map_or(Bound::Unbounded, Bound::Excluded);
        let rows = self
            .0
            .open_table(R::TABLE)?
            .range::<&str>((Bound::Unbounded, end))?;
        Ok(rows.rev().map(|row| Ok(serde_json::from_slice(row?.1.value())?)))
    }
}

/// Seconds of Unix time.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

/// Sorts like the number. Letters only, so that no id ever looks like a card number.
fn letters(mut number: u64) -> String {
    let mut text = [b'a'; 9];
    for letter in text.iter_mut().rev() {
        *letter += u8::try_from(number % 26).unwrap_or_default();
        number /= 26;
    }
    text.map(char::from).iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_sort_like_numbers() {
        let texts: Vec<String> = [0, 1, 25, 26, 700, 5_000_000_000].map(letters).to_vec();
        assert!(texts.is_sorted());
        assert_eq!(texts[3], "aaaaaaaba");
    }
}
