//! How one outbox is doing, for `/readyz`, `/status` and the page.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::source::lease::Member;

/// Longer without progress than this, and the outbox is not ready.
const PATIENCE: Duration = Duration::from_secs(15);

/// What the relay of an outbox is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Role {
    /// Something is away; the text says what.
    Waiting(String),
    /// Another process leads.
    Standby,
    /// Reads and publishes.
    Leading,
    /// A permanent error; somebody must act.
    Stopped(String),
}

impl Role {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Waiting(_) => "waiting",
            Self::Standby => "standby",
            Self::Leading => "leading",
            Self::Stopped(_) => "stopped",
        }
    }

    pub(crate) fn problem(&self) -> Option<&str> {
        match self {
            Self::Waiting(why) | Self::Stopped(why) => Some(why),
            Self::Standby | Self::Leading => None,
        }
    }
}

/// What the leader of an outbox says of itself; kept beside the progress, for those who do not lead.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Figures {
    /// The highest id that was seen.
    pub(crate) head: i64,
    /// Ids below it that may still turn up.
    pub(crate) holes: i64,
    pub(crate) backlog_rows: i64,
    /// `None` where rows have no time.
    pub(crate) oldest_age_seconds: Option<f64>,
    pub(crate) in_flight: usize,
    pub(crate) rate_rows_per_second: f64,
    /// From the row's time to the acknowledgement; `None` when nothing was published lately.
    pub(crate) latency_p50_seconds: Option<f64>,
    pub(crate) latency_p99_seconds: Option<f64>,
    /// In this term.
    pub(crate) published_total: u64,
    pub(crate) quarantined_keys: i64,
    pub(crate) quarantined_rows: i64,
}

/// What is known of an outbox beside the leader's figures.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Lead {
    pub(crate) leader: Option<String>,
    pub(crate) epoch: Option<i64>,
    pub(crate) lease_seconds: Option<f64>,
    pub(crate) members: Vec<Member>,
    pub(crate) floor: Option<i64>,
    pub(crate) removed_to: Option<i64>,
    /// Age of the figures.
    pub(crate) seen_seconds: Option<f64>,
}

impl Lead {
    /// What is shown was true some time ago: a lease that nobody renews runs out all the same.
    fn grow_older(&mut self, seconds: f64, leads_here: bool) {
        for age in self
            .seen_seconds
            .iter_mut()
            .chain(self.members.iter_mut().map(|member| &mut member.seen_seconds))
        {
            *age += seconds;
        }
        self.lease_seconds = self.lease_seconds.map(|left| (left - seconds).max(0.0));
        if self.lease_seconds == Some(0.0) && !leads_here {
            (self.leader, self.lease_seconds) = (None, None);
        }
    }
}

#[derive(Debug)]
struct State {
    role: Role,
    /// When it last read the outbox, and everything in flight was moving.
    progress: Instant,
    lead: Lead,
    figures: Option<Figures>,
    /// When these were shown.
    shown: Instant,
}

/// Shared between the relay of an outbox and whoever shows it.
#[derive(Debug, Clone)]
pub(crate) struct Status(Arc<Mutex<State>>);

impl Default for Status {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State {
            role: Role::Waiting("starting".to_owned()),
            progress: Instant::now(),
            lead: Lead::default(),
            figures: None,
            shown: Instant::now(),
        })))
    }
}

impl Status {
    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn set(&self, role: Role) {
        self.with(|state| {
            state.role = role;
            state.progress = Instant::now();
        });
    }

    /// The outbox was read, and what is in flight moved `ago`.
    pub(crate) fn progressed(&self, ago: Duration) {
        if let Some(at) = Instant::now().checked_sub(ago) {
            self.with(|state| state.progress = at);
        }
    }

    pub(crate) fn show(&self, lead: Lead, figures: Option<Figures>) {
        self.with(|state| {
            state.lead = lead;
            state.shown = Instant::now();
            if figures.is_some() {
                state.figures = figures;
            }
        });
    }

    pub(crate) fn role(&self) -> Role {
        self.with(|state| state.role.clone())
    }

    pub(crate) fn snapshot(&self) -> (Role, Lead, Option<Figures>) {
        self.with(|state| {
            let mut lead = state.lead.clone();
            lead.grow_older(state.shown.elapsed().as_secs_f64(), state.role == Role::Leading);
            (state.role.clone(), lead, state.figures.clone())
        })
    }

    /// Whether the outbox makes progress, or stands by; otherwise why not.
    pub(crate) fn ready(&self) -> Result<(), String> {
        self.with(|state| match &state.role {
            Role::Standby => Ok(()),
            Role::Leading if state.progress.elapsed() <= PATIENCE => Ok(()),
            Role::Leading => Err(format!(
                "no progress for {} s",
                state.progress.elapsed().as_secs()
            )),
            Role::Waiting(why) => Err(why.clone()),
            Role::Stopped(why) => Err(format!("stopped: {why}")),
        })
    }
}
