//! Parsing of request fields: collects every violation, echoes no value.

use tonic::Status;
use uuid::Uuid;

use crate::status::{Domain, Violation};

/// The fields of one request, read one after the other.
///
/// Getters give `None` for what is wrong and note it. Read all fields first, then [`Fields::finish`], so that the caller
/// learns everything at once.
#[derive(Debug, Default)]
pub struct Fields {
    violations: Vec<Violation>,
}

impl Fields {
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes that a field is wrong.
    pub fn reject<T>(&mut self, field: impl Into<String>, description: &'static str) -> Option<T> {
        self.violations.push(Violation::new(field, description));
        None
    }

    /// A UUID in its usual form of 36 characters, not nil.
    pub fn uuid(&mut self, field: &str, text: &str) -> Option<Uuid> {
        match Uuid::try_parse(text) {
            Ok(id) if text.len() == 36 && !id.is_nil() => Some(id),
            _ => self.reject(field, "must be a UUID, not nil"),
        }
    }

    /// The same, where empty text means that there is none.
    pub fn optional_uuid(&mut self, field: &str, text: &str) -> Option<Uuid> {
        if text.is_empty() {
            None
        } else {
            self.uuid(field, text)
        }
    }

    /// Free text of at most `max` characters; may be empty. No control characters but line breaks and tabs, and nothing
    /// that looks like a card number: this text is stored and published.
    pub fn text(&mut self, field: &str, text: &str, max: usize) -> Option<String> {
        if text.chars().nth(max).is_some() {
            return self.reject(field, "is too long");
        }
        if text
            .chars()
            .any(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t'))
        {
            return self.reject(field, "must not contain control characters");
        }
        if contains_card_number(text) {
            return self.reject(field, "must not contain a card number");
        }
        Some(text.to_owned())
    }

    /// An e-mail address, where empty text means that there is none. Only what is surely wrong is refused: the mail
    /// server decides in the end.
    pub fn optional_email(&mut self, field: &str, text: &str) -> Option<String> {
        if text.is_empty() {
            return None;
        }
        let text = self.text(field, text, 254)?;
        let shape = text.rsplit_once('@').is_some_and(|(local, domain)| {
            !local.is_empty() && local.len() <= 64 && domain.contains('.') && !domain.starts_with(['.', '-'])
        });
        if shape && !text.chars().any(|c| c.is_whitespace() || "<>,;\"\\".contains(c)) {
            Some(text)
        } else {
            self.reject(field, "must be an e-mail address")
        }
    }

    /// A page size: `default` when 0.
    pub fn page_size(&mut self, field: &str, size: i32, default: u16, max: u16) -> Option<u16> {
        match u16::try_from(size) {
            Ok(0) => Some(default),
            Ok(size) => Some(size.min(max)),
            Err(_) if size > 0 => Some(max),
            Err(_) => self.reject(field, "must not be negative"),
        }
    }

    /// Whether nothing was wrong so far.
    pub fn are_valid(&self) -> bool {
        self.violations.is_empty()
    }

    /// # Errors
    /// INVALID_ARGUMENT that names every field which is wrong.
    pub fn finish<T>(self, domain: Domain, value: Option<T>) -> Result<T, Status> {
        match value {
            Some(value) if self.violations.is_empty() => Ok(value),
            _ => Err(domain.invalid_argument(&self.violations)),
        }
    }
}

/// Whether text holds 13 to 19 digits, alone or in groups joined by single spaces, dots or hyphens, that end in a valid check
/// digit of Luhn's algorithm (ISO/IEC 7812-1) and start as card numbers do.
pub fn contains_card_number(text: &str) -> bool {
    let characters: Vec<char> = text.chars().collect();
    let is_digit = |at: usize| characters.get(at).is_some_and(char::is_ascii_digit);
    (0..characters.len())
        .filter(|&at| is_digit(at) && (at == 0 || !is_digit(at - 1)))
        .any(|start| {
            let mut digits: Vec<u32> = Vec::with_capacity(19);
            let mut at = start;
            while digits.len() <= 19 {
                let Some(digit) = characters.get(at).and_then(|c| c.to_digit(10)) else {
                    break;
                };
                digits.push(digit);
                at += 1;
                if !is_digit(at) {
                    if is_card_number(&digits) {
                        return true;
                    }
                    // The next group, if it follows directly.
                    if matches!(characters.get(at), Some(' ' | '-' | '.')) {
                        at += 1;
                    }
                }
            }
            false
        })
}

fn is_card_number(digits: &[u32]) -> bool {
    if !(13..=19).contains(&digits.len()) || !(2..=6).contains(&digits[0]) {
        return false;
    }
    luhn(digits.iter().copied())
}

/// Whether text is digits, the last of which is the check digit of Luhn's algorithm (ISO/IEC 7812-1, annex B).
pub fn has_check_digit(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && luhn(text.bytes().map(|byte| u32::from(byte - b'0')))
}

fn luhn(digits: impl DoubleEndedIterator<Item = u32>) -> bool {
    let sum: u32 = digits
        .rev()
        .zip([1, 2].into_iter().cycle())
        .map(|(digit, weight)| digit * weight / 10 + digit * weight % 10)
        .sum();
    sum.is_multiple_of(10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn card_numbers_are_found() {
        for text in [
            "4242424242424242",
            "pay with 4242 4242 4242 4242 please",
            "4242-4242-4242-4242.",
            "call 12345 4242424242424242",
            "x5555555555554444y",
            "Amex 3782 822463 10005",
            "6011.1111.1111.1117",
            "4222222222222",
        ] {
            assert!(contains_card_number(text), "{text}");
        }
        for text in [
            "",
            "changed my mind",
            "4242424242424241",
            "order 7f0c1e52-0b7e-4f0e-8c57-3d0f4d1b2a77",
            "0000000000000000",
            "phone +49 170 1234567",
            "42424242424242424242424242",
            "4242  4242  4242  4242",
            "424242424242",
        ] {
            assert!(!contains_card_number(text), "{text}");
        }
    }

    #[test]
    fn check_digits() {
        for text in [
            "4242424242424242",
            "378282246310005",
            "4222222222222",
            "79927398713",
        ] {
            assert!(has_check_digit(text), "{text}");
        }
        for text in [
            "4242424242424241",
            "4242 4242 4242 4242",
            "424242424242424\u{0664}",
            "79927398710",
        ] {
            assert!(!has_check_digit(text), "{text}");
        }
    }

    #[track_caller]
    fn check(read: impl FnOnce(&mut Fields) -> Option<String>, expected: Result<&'static str, &'static str>) {
        let mut fields = Fields::new();
        let value = read(&mut fields);
        match expected {
            Ok(text) => {
                assert_eq!(value.as_deref(), Some(text));
                assert!(fields.are_valid());
            }
            Err(description) => assert_eq!(fields.violations, [Violation::new("f", description)]),
        }
    }

    #[test]
    fn fields() {
        let id = "0190a8c0-0000-7000-8000-000000000001";
        let uuid = |text: &'static str| move |f: &mut Fields| f.uuid("f", text).map(|id| id.to_string());
        check(uuid(id), Ok(id));
        for bad in [
            "",
            "x",
            "00000000-0000-0000-0000-000000000000",
            "0190a8c0000070008000000000000001",
            "{0190a8c0-0000-7000-8000-000000000001}",
            "0190a8c0-0000-7000-8000-00000000000\0",
        ] {
            check(uuid(bad), Err("must be a UUID, not nil"));
        }
        let text = |text: &'static str| move |f: &mut Fields| f.text("f", text, 5);
        check(text("äöü\nß"), Ok("äöü\nß"));
        check(text(""), Ok(""));
        check(text("123456"), Err("is too long"));
        check(text("a\0b"), Err("must not contain control characters"));
        let email = |text: &'static str| move |f: &mut Fields| f.optional_email("f", text);
        check(email("a.b+c@example.org"), Ok("a.b+c@example.org"));
        for bad in ["a", "@b.c", "a@", "a@b", "a b@c.d", "a@.b", "<a@b.c>"] {
            check(email(bad), Err("must be an e-mail address"));
        }
        check(
            email("4242424242424242@example.org"),
            Err("must not contain a card number"),
        );
        let size = |size| move |f: &mut Fields| f.page_size("f", size, 100, 1000).map(|n| n.to_string());
        check(size(0), Ok("100"));
        check(size(7), Ok("7"));
        check(size(1001), Ok("1000"));
        check(size(i32::MAX), Ok("1000"));
        check(size(-1), Err("must not be negative"));
    }
}
