//! What becomes of an attempt to send a mail.

use std::time::Duration;

/// The class of what went wrong. Never a text of the mail server's, which may name the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// No connection to the mail server.
    Unreachable,
    /// No encryption, or not with whom it should be.
    Tls,
    /// The mail server does not let us in.
    LoginRefused,
    /// The mail server does not take mails from us.
    SenderRefused,
    /// The mail server asks us to come back later.
    ServerBusy,
    /// The connection ended before the message was handed over.
    ConnectionLost,
    /// It took too long before the message was handed over.
    Timeout,
    /// We were stopped before the message was handed over.
    Interrupted,
    /// The mail server does not take mails for this address now.
    RecipientDeferred,
    /// Nor ever.
    RecipientRefused,
    /// The mail server does not take this message now.
    MessageDeferred,
    /// Nor ever.
    MessageRefused,
    /// It is no address.
    AddressInvalid,
    /// It has characters that the mail server cannot handle.
    AddressNotSupported,
    /// The event that it answers cannot be read.
    Unreadable,
    /// The message was handed over, and no answer came.
    NoAnswer,
    /// Whoever was at it has not said in time how it ended.
    LeasePassed,
}

impl Trouble {
    /// As it is written in the database and in logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Tls => "tls",
            Self::LoginRefused => "login_refused",
            Self::SenderRefused => "sender_refused",
            Self::ServerBusy => "server_busy",
            Self::ConnectionLost => "connection_lost",
            Self::Timeout => "timeout",
            Self::Interrupted => "interrupted",
            Self::RecipientDeferred => "recipient_deferred",
            Self::RecipientRefused => "recipient_refused",
            Self::MessageDeferred => "message_deferred",
            Self::MessageRefused => "message_refused",
            Self::AddressInvalid => "address_invalid",
            Self::AddressNotSupported => "address_not_supported",
            Self::Unreadable => "unreadable",
            Self::NoAnswer => "no_answer",
            Self::LeasePassed => "lease_passed",
        }
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The mail server has taken it.
    Taken,
    /// It was surely not taken, and the mail server is to blame: every mail fares like this.
    ServerAway(Trouble),
    /// It was surely not taken, and may be another time.
    Deferred(Trouble),
    /// It was surely not taken, and never will be.
    Refused(Trouble),
    /// It may have been taken.
    Unknown(Trouble),
}

impl Outcome {
    /// Whether the mail server has answered last, so that the connection is good for another mail.
    pub fn leaves_connection(self) -> bool {
        match self {
            Self::Taken | Self::Refused(_) => true,
            Self::Deferred(trouble) => !matches!(trouble, Trouble::ConnectionLost | Trouble::Timeout),
            Self::ServerAway(_) | Self::Unknown(_) => false,
        }
    }
}

/// What a mail goes on as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Sent,
    /// To be tried again after a pause, having been tried in vain so often.
    Again {
        after: Duration,
        tries: i32,
        trouble: Trouble,
    },
    Failed(Trouble),
    Unknown(Trouble),
}

/// The pauses between attempts: from the first, each twice the one before, to the longest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    pub first: Duration,
    pub longest: Duration,
}

impl Retry {
    /// The pause after so many attempts in vain.
    pub fn pause(self, tries: u32) -> Duration {
        let doublings = tries.saturating_sub(1).min(31);
        self.first.saturating_mul(1 << doublings).min(self.longest)
    }

    /// What an attempt leads to for a mail that was tried `tries` times in vain before.
    pub fn next(self, outcome: Outcome, tries: i32) -> Next {
        match outcome {
            Outcome::Taken => Next::Sent,
            // No fault of this mail's: it does not count, and who waits is the sender.
            Outcome::ServerAway(trouble) => Next::Again {
                after: Duration::ZERO,
                tries,
                trouble,
            },
            Outcome::Deferred(trouble) => {
                let tries = tries.saturating_add(1);
                Next::Again {
                    after: self.pause(tries.unsigned_abs()),
                    tries,
                    trouble,
                }
            }
            Outcome::Refused(trouble) => Next::Failed(trouble),
            Outcome::Unknown(trouble) => Next::Unknown(trouble),
        }
    }
}
