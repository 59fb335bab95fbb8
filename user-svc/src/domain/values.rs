//! Values that are valid once they exist. What is personal does not show itself in logs.

use std::fmt;

use uuid::Uuid;

/// The longest address, in characters.
pub const MAX_EMAIL: usize = 254;
/// The longest first or last name, in characters.
pub const MAX_NAME: usize = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserId(pub Uuid);

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An e-mail address of 3 to [`MAX_EMAIL`] characters, the domain in lower case.
#[derive(Clone, PartialEq, Eq)]
pub struct Email(String);

impl Email {
    /// `None` when it has no local part, no domain, blanks, or not the right length.
    pub fn parse(text: &str) -> Option<Self> {
        let (local, domain) = text.rsplit_once('@')?;
        let address = format!("{local}@{}", domain.to_lowercase());
        let is_valid = !local.is_empty()
            && !domain.is_empty()
            && address.chars().count() <= MAX_EMAIL
            && !address.contains(|c: char| c.is_whitespace() || c.is_control());
        is_valid.then_some(Self(address))
    }

    /// The address itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Email {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Email(..)")
    }
}

/// A first or last name of 1 to [`MAX_NAME`] characters, on one line and not blank.
#[derive(Clone, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    /// `None` when it is too long, blank, or has control characters.
    pub fn parse(text: &str) -> Option<Self> {
        let is_valid = !text.trim().is_empty()
            && text.chars().nth(MAX_NAME).is_none()
            && !text.contains(|c: char| c.is_control());
        is_valid.then(|| Self(text.to_owned()))
    }

    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Name(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, kept) in [
            ("a@b", Some("a@b")),
            ("Ann.O'Neil+x@Example.ORG", Some("Ann.O'Neil+x@example.org")),
            ("\u{fc}@B\u{dc}cher.example", Some("\u{fc}@b\u{fc}cher.example")),
            ("a@b@C.example", Some("a@b@c.example")),
            ("", None),
            ("a", None),
            ("@b", None),
            ("a@", None),
            ("a b@c.example", None),
            ("a@c.example\n", None),
            ("a\0@c.example", None),
        ] {
            assert_eq!(Email::parse(text).as_ref().map(Email::as_str), kept, "{text:?}");
        }
        let longest = format!("{}@example.org", "a".repeat(MAX_EMAIL - 12));
        assert!(Email::parse(&longest).is_some());
        assert!(Email::parse(&format!("a{longest}")).is_none());
    }

    #[test]
    fn names() {
        for text in ["A", "Anna Maria", "\u{674e}", &"\u{e9}".repeat(MAX_NAME)] {
            assert_eq!(Name::parse(text).as_ref().map(Name::as_str), Some(text));
        }
        for text in [
            "",
            " ",
            "A\nBcc: x",
            "A\0",
            "A\tB",
            &"\u{e9}".repeat(MAX_NAME + 1),
        ] {
            assert!(Name::parse(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn nothing_personal_shows_itself() {
        let (email, name) = (Email::parse("ann@example.org"), Name::parse("Ann"));
        assert_eq!(format!("{email:?} {name:?}"), "Some(Email(..)) Some(Name(..))");
    }
}
