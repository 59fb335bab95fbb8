//! A row of an outbox as PostgreSQL sent it, in binary form: selected one by one, or out of a COPY.

use bytes::Bytes;
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, Type};
use uuid::Uuid;

/// A row that was read by [`select_list`](crate::record::select_list).
#[derive(Debug)]
pub(crate) enum OutboxRow {
    Selected(Row),
    Copied(Tuple),
}

/// One tuple of `COPY … (FORMAT binary)`: a count, then for each column its length, -1 for NULL, and its bytes.
#[derive(Debug)]
pub(crate) struct Tuple {
    bytes: Bytes,
    /// Bit `n` is set when column `n` is a UUID.
    uuids: u32,
}

/// What a COPY begins with: a signature, flags, and an extension, of which there is none.
const SIGNATURE: &[u8; 11] = b"PGCOPY\n\xff\r\n\0";
const COPY_HEADER: usize = SIGNATURE.len() + 4 + 4;
/// What it ends with, instead of a count of columns.
const COPY_END: [u8; 2] = [0xff, 0xff];

impl Tuple {
    /// The tuple of one message of a COPY. The first message has the header before it; the last is no tuple.
    pub(crate) fn of_message(mut message: Bytes, uuids: u32) -> Option<Self> {
        if message.starts_with(SIGNATURE) {
            drop(message.split_to(COPY_HEADER.min(message.len())));
        }
        let is_tuple = message.len() > COPY_END.len() && !message.starts_with(&COPY_END);
        is_tuple.then_some(Self {
            bytes: message,
            uuids,
        })
    }
}

impl OutboxRow {
    pub(crate) fn id(&self) -> i64 {
        self.columns().int8().unwrap_or_default()
    }

    pub(crate) fn columns(&self) -> Columns<'_> {
        match self {
            Self::Selected(row) => Columns::Selected { row, next: 0 },
            Self::Copied(tuple) => Columns::Copied {
                rest: tuple.bytes.get(2..).unwrap_or_default(),
                uuids: tuple.uuids,
            },
        }
    }
}

/// The columns of a row, one after the other.
pub(crate) enum Columns<'a> {
    Selected { row: &'a Row, next: usize },
    Copied { rest: &'a [u8], uuids: u32 },
}

/// An id as its column has it.
pub(crate) enum Id<'a> {
    Uuid(Uuid),
    Text(&'a [u8]),
}

/// Text that is no UTF-8: the database's encoding is SQL_ASCII.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotText;

impl<'a> Columns<'a> {
    /// The bytes of the next column; `None` is NULL. The first eight of an integer, and so on: as its type sends it.
    #[inline]
    pub(crate) fn bytes(&mut self) -> Option<&'a [u8]> {
        match self {
            Self::Selected { row, next } => {
                *next += 1;
                let row: &'a Row = row;
                row.get::<_, Option<Raw<'a>>>(*next - 1).map(|raw| raw.0)
            }
            Self::Copied { rest, uuids } => {
                *uuids >>= 1;
                let (length, behind) = rest.split_first_chunk()?;
                let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) else {
                    *rest = behind;
                    return None;
                };
                let (value, behind) = behind.split_at_checked(length)?;
                *rest = behind;
                Some(value)
            }
        }
    }

    #[inline]
    pub(crate) fn int8(&mut self) -> Option<i64> {
        self.bytes()?.try_into().ok().map(i64::from_be_bytes)
    }

    #[inline]
    pub(crate) fn int4(&mut self) -> Option<i32> {
        self.bytes()?.try_into().ok().map(i32::from_be_bytes)
    }

    #[inline]
    pub(crate) fn text(&mut self) -> Result<Option<&'a str>, NotText> {
        self.bytes().map(str::from_utf8).transpose().map_err(|_| NotText)
    }

    #[inline]
    pub(crate) fn id(&mut self) -> Option<Id<'a>> {
        let is_uuid = match self {
            Self::Selected { row, next } => {
                row.columns().get(*next).map(|column| column.type_()) == Some(&Type::UUID)
            }
            Self::Copied { uuids, .. } => *uuids & 1 == 1,
        };
        let bytes = self.bytes()?;
        match bytes.try_into() {
            Ok(uuid) if is_uuid => Some(Id::Uuid(Uuid::from_bytes(uuid))),
            _ => Some(Id::Text(bytes)),
        }
    }

    /// JSON text.
    #[inline]
    pub(crate) fn jsonb(&mut self) -> Option<&'a [u8]> {
        // One byte of version first.
        self.bytes()?.get(1..)
    }
}

/// A value of any type, as it came.
struct Raw<'a>(&'a [u8]);

impl<'a> FromSql<'a> for Raw<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(raw))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(header: bool, columns: &[Option<&[u8]>]) -> Bytes {
        let mut bytes = Vec::new();
        if header {
            bytes.extend_from_slice(SIGNATURE);
            bytes.extend_from_slice(&[0; 8]);
        }
        bytes.extend_from_slice(&(columns.len() as i16).to_be_bytes());
        for column in columns {
            match column {
                None => bytes.extend_from_slice(&(-1i32).to_be_bytes()),
                Some(value) => {
                    bytes.extend_from_slice(&(value.len() as i32).to_be_bytes());
                    bytes.extend_from_slice(value);
                }
            }
        }
        bytes.into()
    }

    #[test]
    fn tuples_of_a_copy_are_read_column_by_column() {
        let uuid = Uuid::from_u128(7);
        let columns: [Option<&[u8]>; 5] = [
            Some(&9i64.to_be_bytes()),
            Some(uuid.as_bytes()),
            None,
            Some(b"sixteen bytes!!!"),
            Some("ä".as_bytes()),
        ];
        for header in [true, false] {
            let tuple = Tuple::of_message(message(header, &columns), 0b10).expect("a tuple");
            let row = OutboxRow::Copied(tuple);
            assert_eq!(row.id(), 9);
            let mut columns = row.columns();
            assert_eq!(columns.int8(), Some(9));
            assert!(matches!(columns.id(), Some(Id::Uuid(found)) if found == uuid));
            assert!(columns.id().is_none());
            assert!(
                matches!(columns.id(), Some(Id::Text(b"sixteen bytes!!!"))),
                "text of a UUID's length"
            );
            assert_eq!(columns.text(), Ok(Some("ä")));
            assert_eq!(columns.bytes(), None, "there is no more");
        }
        assert!(Tuple::of_message(Bytes::from_static(&COPY_END), 0).is_none());
    }

    #[test]
    fn a_tuple_that_is_cut_off_is_null_from_there() {
        let whole = message(false, &[Some(&9i64.to_be_bytes()), Some(b"text")]);
        for length in 3..whole.len() {
            let row = OutboxRow::Copied(Tuple::of_message(whole.slice(..length), 0).expect("a tuple"));
            let mut columns = row.columns();
            let found = (columns.int8(), columns.bytes());
            assert!(
                found.1.is_none() && (found.0 == Some(9)) == (length >= 14),
                "{length}: {found:?}"
            );
        }
    }
}
