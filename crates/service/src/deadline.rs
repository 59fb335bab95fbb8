//! When a call must have its answer.

use std::time::Duration;

use tokio::time::Instant;

/// The moment by which a call must be answered: the client's deadline, or the server's cap if that comes first.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    at: Instant,
    asked: Option<Instant>,
}

impl Deadline {
    /// From what the client asked for, if anything, and the server's cap.
    pub fn new(asked: Option<Duration>, cap: Duration) -> Self {
        let now = Instant::now();
        Self {
            at: now + asked.map_or(cap, |asked| asked.min(cap)),
            asked: asked.and_then(|asked| now.checked_add(asked)),
        }
    }

    /// In `duration` from now.
    pub fn after(duration: Duration) -> Self {
        Self::new(None, duration)
    }

    /// The deadline of a gRPC call; calls that did not come through [`GrpcServer`](crate::grpc::GrpcServer) get `cap`.
    pub fn of<T>(request: &tonic::Request<T>, cap: Duration) -> Self {
        request
            .extensions()
            .get::<Self>()
            .copied()
            .unwrap_or_else(|| Self::after(cap))
    }

    /// The moment.
    pub fn at(self) -> Instant {
        self.at
    }

    /// What the client itself asked for, uncapped: server streams live until then.
    pub fn asked(self) -> Option<Instant> {
        self.asked
    }

    /// How long there is; zero when it has passed.
    pub fn remaining(self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// Whether it has passed.
    pub fn has_passed(self) -> bool {
        self.remaining().is_zero()
    }
}

/// Parses `grpc-timeout`: up to eight digits and a unit.
pub(crate) fn parse_grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_of_clients() {
        assert_eq!(parse_grpc_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(
            parse_grpc_timeout("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        for bad in ["", "m", "5", "-1S", "123456789S", "5x", "1.5S", "ä"] {
            assert_eq!(parse_grpc_timeout(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_cap_applies_to_the_answer_only() {
        let (hour, minute) = (Duration::from_secs(3600), Duration::from_secs(60));
        let deadline = Deadline::new(Some(hour), minute);
        assert!(deadline.remaining() > minute / 2 && deadline.remaining() <= minute);
        assert!(deadline.asked() > Some(deadline.at() + minute));
        assert!(!deadline.has_passed());
        assert!(Deadline::new(Some(Duration::ZERO), minute).has_passed());
    }
}
