//! Finds card numbers and CVVs in bytes: dumps, records, logs, traces, files. Pure, and it never shows what it finds.
//!
//! - **Numbers that are known to have been used**, wherever they stand, also with spaces, dashes or dots between the digits.
//! - **Whatever looks like a card number**: 13 to 19 digits that begin with 2 to 6, with the check digit of ISO/IEC 7812-1 (Luhn's),
//!   standing alone. What machines write with many digits (UUIDs, trace ids, timestamps, fractions) is passed over.
//! - **CVVs** by what stands before them: `cvv: 123`, `card[cvc]=123`, a dump's column of that name, and the Protobuf encoding of
//!   `shop.payment.v1.Card`.
//!
//! All of it also in UTF-16, in hexadecimal, in Base64, and in one of these in another.

mod cvv;
mod encoding;
mod number;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;

pub use encoding::Encoding;

/// How many encodings in each other are looked through.
const DEEPEST: usize = 2;

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum What {
    /// A number that is known to be a card's.
    KnownNumber { last_four: [u8; 4] },
    /// What looks like a card number.
    Number { last_four: [u8; 4] },
    /// A card verification value.
    Cvv,
}

/// Something that should not be there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// The first byte of it, or of the encoded text that it is in.
    pub at: usize,
    pub what: What,
    /// From the outermost to the innermost; none where it stands in clear.
    pub encodings: Vec<Encoding>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, digits) = match self.what {
            What::KnownNumber { last_four } => ("a card number that was used", Some(last_four)),
            What::Number { last_four } => ("what looks like a card number", Some(last_four)),
            What::Cvv => ("a CVV", None),
        };
        f.write_str(name)?;
        if let Some(digits) = digits {
            write!(f, " ending in {}", String::from_utf8_lossy(&digits))?;
        }
        for encoding in &self.encodings {
            write!(f, " in {encoding}")?;
        }
        write!(f, " at byte {}", self.at)
    }
}

/// Looks for card data.
#[derive(Debug, Clone, Default)]
pub struct Scanner {
    /// Known numbers by their lengths.
    known: BTreeMap<usize, HashSet<u64>>,
}

impl Scanner {
    /// Knows these card numbers; what are no digits in them is passed over.
    pub fn new<S: AsRef<str>>(known: impl IntoIterator<Item = S>) -> Self {
        let mut scanner = Self::default();
        for number in known {
            let digits: String = number.as_ref().chars().filter(char::is_ascii_digit).collect();
            if let Ok(value) = digits.parse() {
                scanner.known.entry(digits.len()).or_default().insert(value);
            }
        }
        scanner
    }

    /// All that is in these bytes, in order, each once.
    pub fn scan(&self, bytes: &[u8]) -> Vec<Finding> {
        let mut findings = BTreeSet::new();
        self.look(bytes, &mut Vec::new(), None, &mut findings);
        findings.into_iter().collect()
    }

    fn look(
        &self,
        bytes: &[u8],
        encodings: &mut Vec<Encoding>,
        outermost: Option<usize>,
        findings: &mut BTreeSet<Finding>,
    ) {
        let mut found = number::known(bytes, &self.known);
        let places: HashSet<usize> = found.iter().map(|(at, _)| *at).collect();
        found.extend(number::generic(bytes).filter(|(at, _)| !places.contains(at)));
        found.extend(cvv::find(bytes).map(|at| (at, What::Cvv)));
        findings.extend(found.into_iter().map(|(at, what)| Finding {
            at: outermost.unwrap_or(at),
            what,
            encodings: encodings.clone(),
        }));
        if encodings.len() == DEEPEST {
            return;
        }
        encoding::decoded(bytes, |encoding, at, decoded| {
            encodings.push(encoding);
            self.look(decoded, encodings, Some(outermost.unwrap_or(at)), findings);
            encodings.pop();
        });
    }
}

#[cfg(test)]
mod tests;
