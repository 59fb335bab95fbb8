//! How many outboxes this process leads, and when it may hand one over: by this, outboxes spread evenly over replicas.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::source::lease::Member;

/// Shared by the outboxes of a process.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leadership(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    leads: AtomicI32,
    handed_over: Mutex<Option<Instant>>,
}

/// While it lives, this process leads one outbox more.
#[derive(Debug)]
pub(crate) struct Leading(Leadership);

impl Drop for Leading {
    fn drop(&mut self) {
        self.0.0.leads.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Leadership {
    pub(crate) fn lead(&self) -> Leading {
        self.0.leads.fetch_add(1, Ordering::Relaxed);
        Leading(self.clone())
    }

    pub(crate) fn leads(&self) -> i32 {
        self.0.leads.load(Ordering::Relaxed)
    }

    /// Whom to hand an outbox to so that all lead about as many: one that leads at least two fewer, and that was heard of
    /// lately. One at a time, and then not before others have been told.
    pub(crate) fn who_should_lead(
        &self,
        me: &str,
        members: &[Member],
        heartbeat: Duration,
    ) -> Option<String> {
        if self.leads() < 2 {
            return None;
        }
        let pause = heartbeat * 2;
        let alive: Vec<Member> = members
            .iter()
            .filter(|member| member.seen_seconds <= pause.as_secs_f64())
            .cloned()
            .collect();
        let next = fewest(me, &alive)?;
        if self.leads() - next.leads < 2 {
            return None;
        }
        let mut last = self.0.handed_over.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|at| at.elapsed() < pause) {
            return None;
        }
        *last = Some(Instant::now());
        Some(next.instance.clone())
    }
}

/// The other member that leads the fewest outboxes.
pub(crate) fn fewest<'m>(me: &str, members: &'m [Member]) -> Option<&'m Member> {
    members
        .iter()
        .filter(|member| member.instance != me)
        .min_by_key(|member| member.leads)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(instance: &str, leads: i32) -> Member {
        Member {
            instance: instance.to_owned(),
            leads,
            seen_seconds: 0.0,
        }
    }

    #[test]
    fn one_is_handed_over_while_another_leads_two_fewer() {
        let leadership = Leadership::default();
        let held: Vec<Leading> = (0..3).map(|_| leadership.lead()).collect();
        let pause = Duration::from_secs(3600);
        let others = |leads| [member("me", 0), member("b", leads), member("c", leads + 1)];
        assert_eq!(leadership.who_should_lead("me", &others(2), pause), None);
        assert_eq!(
            leadership.who_should_lead("me", &others(1), pause).as_deref(),
            Some("b")
        );
        assert_eq!(
            leadership.who_should_lead("me", &others(1), pause),
            None,
            "not before the others know"
        );
        drop(held);
        assert_eq!(leadership.leads(), 0);
        let gone = Member {
            seen_seconds: 3.0,
            ..member("gone", 0)
        };
        let _held: Vec<Leading> = (0..3).map(|_| leadership.lead()).collect();
        let fresh = Leadership(Arc::clone(&leadership.0));
        *fresh.0.handed_over.lock().expect("not poisoned") = None;
        assert_eq!(
            fresh.who_should_lead("me", &[gone], Duration::from_secs(1)),
            None,
            "one that is silent is not trusted with it"
        );
        assert_eq!(leadership.who_should_lead("me", &[member("me", 0)], pause), None);
    }
}
