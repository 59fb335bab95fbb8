//! Where a consumer works: on what is served, or on a generation that is being built beside it.

use crate::config::Config;
use crate::marks::Generation;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Whatever generation is served.
    Live,
    /// One that is being built, whose tables are in a schema of its own.
    Rebuild { generation: i32, schema: String },
}

impl Lane {
    pub(crate) fn generation(&self) -> Generation {
        match self {
            Self::Live => Generation::Live,
            Self::Rebuild { generation, .. } => Generation::Of(*generation),
        }
    }

    pub(crate) fn is_rebuild(&self) -> bool {
        matches!(self, Self::Rebuild { .. })
    }

    /// The Kafka group.
    pub(crate) fn group(&self, consumer: &str) -> String {
        match self {
            Self::Live => consumer.to_owned(),
            Self::Rebuild { generation, .. } => format!("{consumer}.rebuild-{generation}"),
        }
    }

    /// Begins a transaction that is bounded. On the live side it holds the [lock](swap_lock) until its end: the generation cannot
    /// change in between.
    pub(crate) fn begin(&self, config: &Config) -> String {
        let side = match self {
            Self::Live => format!(
                "SELECT pg_advisory_xact_lock_shared({})",
                swap_lock(&config.group)
            ),
            Self::Rebuild { schema, .. } => format!("SET LOCAL search_path = {}, public", quoted(schema)),
        };
        format!(
            "BEGIN; SET LOCAL statement_timeout = {}; SET LOCAL idle_in_transaction_session_timeout = {}; {side}",
            config.transaction_timeout.as_millis(),
            config.idle_transaction_timeout.as_millis(),
        )
    }
}

/// The advisory lock that whoever writes the live generation of a consumer shares, and a swap takes alone.
pub(crate) fn swap_lock(consumer: &str) -> i64 {
    // FNV-1a: the same in every build.
    let hash = consumer.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    hash.cast_signed()
}

/// An identifier in SQL.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
