//! Windows of time.

use std::fmt;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};

/// How long a window is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Size {
    Minute,
    Hour,
    Day,
}

impl Size {
    /// All of them, shortest first.
    pub const ALL: [Self; 3] = [Self::Minute, Self::Hour, Self::Day];

    /// Its length in seconds. Unix time has no leap seconds.
    pub fn seconds(self) -> i64 {
        match self {
            Self::Minute => 60,
            Self::Hour => 3_600,
            Self::Day => 86_400,
        }
    }

    /// Its length.
    pub fn length(self) -> TimeDelta {
        TimeDelta::seconds(self.seconds())
    }
}

/// A whole minute, hour or day of UTC. In the order of sizes, then of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Window {
    size: Size,
    start: DateTime<Utc>,
}

impl Window {
    /// The one that a time is in.
    pub fn of(size: Size, time: DateTime<Utc>) -> Self {
        let seconds = time.timestamp();
        let start = DateTime::from_timestamp(seconds - seconds.rem_euclid(size.seconds()), 0);
        Self {
            size,
            // Only for the very first windows that a time can be in.
            start: start.unwrap_or(DateTime::<Utc>::MIN_UTC),
        }
    }

    pub fn size(self) -> Size {
        self.size
    }

    pub fn start(self) -> DateTime<Utc> {
        self.start
    }
}

/// As events name it: `hour/2026-11-21T19:00:00Z`.
impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = match self.size {
            Size::Minute => "minute",
            Size::Hour => "hour",
            Size::Day => "day",
        };
        let start = self.start.to_rfc3339_opts(SecondsFormat::Secs, true);
        write!(f, "{size}/{start}")
    }
}

/// Whether a time is one that windows are kept of: from 1970 to the end of 9999, which RFC 3339 can write and PostgreSQL can keep.
pub fn is_in_calendar(time: DateTime<Utc>) -> bool {
    const END: i64 = 253_402_300_800;
    (0..END).contains(&time.timestamp())
}
