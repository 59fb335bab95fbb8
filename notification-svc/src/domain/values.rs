//! Values that are valid once they exist. What is personal does not show itself in logs.

use std::fmt;

use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

macro_rules! personal {
    ($(#[$doc:meta])* $name:ident, $length:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq)]
        pub struct $name(String);

        impl $name {
            /// `None` when it does not have the right length, or has control characters.
            pub fn parse(text: &str) -> Option<Self> {
                let is_valid = $length.contains(&text.chars().count()) && !text.contains(char::is_control);
                is_valid.then(|| Self(text.to_owned()))
            }

            /// The text itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(..)"))
            }
        }
    };
}

id!(OrderId);
id!(UserId);
id!(
    /// A mail's: the id of the event that it answers.
    MailId
);

personal!(
    /// What should be an e-mail address, of 3 to 254 characters: whether it is one turns out when a mail is sent there.
    Email,
    (3..=254)
);
personal!(
    /// What a user is addressed by, of 1 to 100 characters.
    Name,
    (1..=100)
);
