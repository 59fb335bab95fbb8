//! Waiting for an order to be known or a payment to be settled, whichever replica does it.
//!
//! Whoever waits looks at the database now and then; a commit of this process wakes those who wait for it at once. The number of
//! those who wait is bounded, since every one of them asks.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use uuid::Uuid;

/// First and longest pause between two looks.
const PAUSES: (Duration, Duration) = (Duration::from_millis(25), Duration::from_millis(400));

/// Who waits for what.
#[derive(Debug)]
pub struct Waits {
    limit: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    waiting: usize,
    awaited: HashMap<Uuid, Awaited>,
}

#[derive(Debug)]
struct Awaited {
    changed: watch::Sender<()>,
    waiting: usize,
}

impl Waits {
    /// Lets `limit` wait at once.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            inner: Mutex::default(),
        }
    }

    /// Tells that something about an order or a payment has changed.
    pub fn wake(&self, id: Uuid) {
        if let Some(awaited) = self.lock().awaited.get(&id) {
            awaited.changed.send_replace(());
        }
    }

    /// Looks until `look` finds something or `until` has come. When too many wait already, it looks once.
    ///
    /// # Errors
    /// What `look` says.
    pub async fn find<T, E, F>(
        self: &Arc<Self>,
        id: Uuid,
        until: Instant,
        look: impl Fn() -> F,
    ) -> Result<Option<T>, E>
    where
        F: Future<Output = Result<Option<T>, E>>,
    {
        let Some(mut waiter) = self.enter(id) else {
            return look().await;
        };
        let mut pause = PAUSES.0;
        loop {
            if let Some(found) = look().await? {
                return Ok(Some(found));
            }
            if Instant::now() >= until {
                return Ok(None);
            }
            let wake_at = until.min(Instant::now() + pause);
            // The sender lives in the registry for as long as this waiter is entered.
            let _ = tokio::time::timeout_at(wake_at, waiter.changed.changed()).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    fn enter(self: &Arc<Self>, id: Uuid) -> Option<Waiter> {
        let mut inner = self.lock();
        if inner.waiting >= self.limit {
            return None;
        }
        inner.waiting += 1;
        let awaited = inner.awaited.entry(id).or_insert_with(|| Awaited {
            changed: watch::channel(()).0,
            waiting: 0,
        });
        awaited.waiting += 1;
        Some(Waiter {
            waits: Arc::clone(self),
            id,
            changed: awaited.changed.subscribe(),
        })
    }

    fn leave(&self, id: Uuid) {
        let mut inner = self.lock();
        inner.waiting -= 1;
        if let Some(awaited) = inner.awaited.get_mut(&id) {
            awaited.waiting -= 1;
            if awaited.waiting == 0 {
                inner.awaited.remove(&id);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics between two changes that belong together.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Waiter {
    waits: Arc<Waits>,
    id: Uuid,
    changed: watch::Receiver<()>,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.waits.leave(self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::convert::Infallible;

    use super::*;

    const ID: Uuid = Uuid::from_u128(1);

    #[tokio::test]
    async fn waking_makes_it_look_again_at_once() {
        let waits = Arc::new(Waits::new(1));
        let looks = Cell::new(0);
        let look = || async {
            looks.set(looks.get() + 1);
            // As if the change came right after the first look.
            waits.wake(ID);
            Ok::<_, Infallible>((looks.get() == 3).then_some("found"))
        };
        let far = Instant::now() + Duration::from_secs(60);
        let begun = Instant::now();
        assert_eq!(waits.find(ID, far, look).await, Ok(Some("found")));
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert!(waits.lock().awaited.is_empty());
    }

    #[tokio::test]
    async fn waiting_ends_in_time_and_is_bounded() {
        let waits = Arc::new(Waits::new(1));
        let soon = Instant::now() + Duration::from_millis(5);
        let nothing = || async { Ok::<Option<()>, Infallible>(None) };
        assert_eq!(waits.find(ID, soon, nothing).await, Ok(None));
        let _first = waits.enter(ID).expect("room");
        let far = Instant::now() + Duration::from_secs(3600);
        assert_eq!(
            waits.find(ID, far, nothing).await,
            Ok(None),
            "no room: looks once"
        );
    }
}
