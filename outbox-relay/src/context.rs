//! What the relay of one outbox works with, and what it remembers from term to term.

use std::collections::{HashMap, HashSet};

use rdkafka::config::ClientConfig;

use crate::config::Outbox;
use crate::leadership::Leadership;
use crate::metrics::OutboxMetrics;
use crate::protocol::Breaker;
use crate::publisher::PublishError;
use crate::record::Rendering;
use crate::source::SourceError;
use crate::status::Status;

/// Everything about one outbox that stays as it is.
pub(crate) struct Context {
    pub(crate) name: String,
    pub(crate) config: Outbox,
    pub(crate) rendering: Rendering,
    pub(crate) producer: ClientConfig,
    pub(crate) max_record_bytes: usize,
    /// Name of this process among those that may lead.
    pub(crate) owner: String,
    /// Whether a span is made for each record.
    pub(crate) traced: bool,
    pub(crate) metrics: OutboxMetrics,
    pub(crate) status: Status,
    pub(crate) leadership: Leadership,
}

/// Why a term of leading ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TermError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// So much fails at once that it cannot be about the records.
    #[error("an outage, nothing is given up: outbox row {id}: {problem}")]
    Outage { id: i64, problem: String },
    #[error("the sequence of the outbox was set back: it gave {given}, and {seen} was seen already")]
    SequenceSetBack { given: i64, seen: i64 },
}

impl TermError {
    /// Whether waiting does not help.
    pub(crate) fn is_permanent(&self) -> bool {
        matches!(
            self,
            Self::Source(SourceError::Unfit(_)) | Self::SequenceSetBack { .. }
        )
    }
}

/// A row that Kafka has refused once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Suspect {
    /// In a batch with others: the next time it goes alone.
    Accused(String),
    /// It was alone.
    Condemned(String),
}

/// What outlives a term.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) own_epoch: Option<i64>,
    pub(crate) suspects: HashMap<i64, Suspect>,
    pub(crate) breaker: Breaker,
    /// Topics that were missing for so long that they do not exist.
    pub(crate) missing_topics: HashSet<String>,
}
