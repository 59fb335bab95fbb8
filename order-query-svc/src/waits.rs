//! Waiting for views to change, whichever replica changes them.
//!
//! Whoever waits for an order is entered here *before* looking at its view. Two things tell that the view has moved: [`Waits::poll`],
//! which asks the database in one statement how far all orders are that are waited for, whoever has applied what; and this replica's
//! projection right after its commit of an order's event. The first alone is enough for being right; the second makes it fast.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use consumer::Parking;
use service::db::Db;
use service::deadline::Deadline;
use service::telemetry::chain;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::domain::Reached;
use crate::store;

/// How often the database is asked while somebody waits.
const INTERVAL: Duration = Duration::from_millis(20);
/// Asking takes at most this part of the time: with many waiting, or a slow database, it is asked less often.
const SHARE: u32 = 5;
/// Deadline of one question.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause after a question that failed.
const AFTER_FAILURE: Duration = Duration::from_millis(500);

/// Who waits for what. Bounded: every waiter holds memory and adds to the questions.
#[derive(Debug)]
pub struct Waits {
    limit: usize,
    orders: Mutex<Orders>,
    /// Somebody waits although nobody did before.
    somebody: Notify,
}

#[derive(Debug, Default)]
struct Orders {
    waiters: usize,
    orders: HashMap<Uuid, Order>,
}

#[derive(Debug)]
struct Order {
    /// What the view is known to have reached.
    reached: watch::Sender<Reached>,
    waiters: usize,
}

/// No more can wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many are waiting")]
pub struct Full;

impl Waits {
    /// Lets `limit` wait at once.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            orders: Mutex::default(),
            somebody: Notify::new(),
        }
    }

    /// Enters someone who waits for an order. Look at the view after this, not before.
    ///
    /// # Errors
    /// When too many wait already.
    pub fn enter(self: &Arc<Self>, order_id: Uuid) -> Result<Waiter, Full> {
        let mut inner = self.lock();
        if inner.waiters >= self.limit {
            return Err(Full);
        }
        inner.waiters += 1;
        let order = inner.orders.entry(order_id).or_insert_with(|| Order {
            reached: watch::channel(Reached::default()).0,
            waiters: 0,
        });
        order.waiters += 1;
        let reached = order.reached.subscribe();
        if inner.waiters == 1 {
            self.somebody.notify_one();
        }
        Ok(Waiter {
            waits: Arc::clone(self),
            order_id,
            reached,
        })
    }

    /// Tells how far an order's view has come, at least.
    pub fn reached(&self, order_id: Uuid, now: Reached) {
        if let Some(order) = self.lock().orders.get(&order_id) {
            order.reached.send_if_modified(|reached| {
                let further = now.is_beyond(*reached);
                *reached = reached.then(now);
                further
            });
        }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.lock().waiters
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Asks the database for ever, as long as somebody waits.
    pub async fn poll(self: Arc<Self>, db: Db, parking: Parking) -> Result<(), std::convert::Infallible> {
        let mut failing = false;
        loop {
            let orders: Vec<Uuid> = self.lock().orders.keys().copied().collect();
            if orders.is_empty() {
                self.somebody.notified().await;
                continue;
            }
            let asked = Instant::now();
            match store::reached(&db, &parking, Deadline::after(PATIENCE), orders).await {
                Ok(reached) => {
                    for (order_id, reached) in reached {
                        self.reached(order_id, reached);
                    }
                    failing = false;
                    sleep(INTERVAL.max(asked.elapsed() * SHARE)).await;
                }
                Err(error) => {
                    if !failing {
                        tracing::warn!(error = %chain(&error), "how far awaited orders are cannot be read");
                    }
                    failing = true;
                    sleep(AFTER_FAILURE).await;
                }
            }
        }
    }

    fn leave(&self, order_id: Uuid) {
        let mut inner = self.lock();
        inner.waiters -= 1;
        if let Some(order) = inner.orders.get_mut(&order_id) {
            order.waiters -= 1;
            if order.waiters == 0 {
                inner.orders.remove(&order_id);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Orders> {
        // Nothing in here panics between two changes that belong together.
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Someone who waits for an order; leaves when dropped.
#[derive(Debug)]
pub struct Waiter {
    waits: Arc<Waits>,
    order_id: Uuid,
    reached: watch::Receiver<Reached>,
}

impl Waiter {
    /// Waits until the view is known to have reached this version of the order. Does not end otherwise.
    pub async fn order(&mut self, version: i64) {
        self.until(|reached| reached.order >= version).await;
    }

    /// Waits until the view is known to be further than this by any source. Does not end otherwise.
    pub async fn beyond(&mut self, seen: Reached) {
        self.until(|reached| reached.is_beyond(seen)).await;
    }

    async fn until(&mut self, enough: impl Fn(&Reached) -> bool) {
        // The sender lives in the registry for as long as this waiter is entered.
        if self.reached.wait_for(enough).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.waits.leave(self.order_id);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    const ORDER: Uuid = Uuid::from_u128(1);

    fn at(order: i64, payments: i64) -> Reached {
        Reached {
            order,
            payments,
            parked: None,
        }
    }

    #[tokio::test]
    async fn waiters_wake_at_what_they_wait_for() {
        let waits = Arc::new(Waits::new(10));
        let mut low = waits.enter(ORDER).expect("room");
        let mut high = waits.enter(ORDER).expect("room");
        waits.reached(ORDER, at(2, 0));
        low.order(2).await;
        assert_eq!(high.order(3).now_or_never(), None);
        waits.reached(ORDER, at(1, 0));
        assert_eq!(high.order(3).now_or_never(), None, "it never goes back");
        waits.reached(ORDER, at(3, 0));
        high.order(3).await;
        assert_eq!(low.beyond(at(3, 0)).now_or_never(), None);
        // By another source, from one who does not know the first.
        waits.reached(ORDER, at(0, 1));
        low.beyond(at(3, 0)).await;
        assert_eq!(low.beyond(at(3, 1)).now_or_never(), None);
    }

    #[test]
    fn the_registry_is_bounded_and_forgets_those_who_leave() {
        let waits = Arc::new(Waits::new(2));
        let first = waits.enter(ORDER).expect("room");
        let _second = waits.enter(Uuid::from_u128(2)).expect("room");
        assert_eq!(waits.enter(ORDER).expect_err("full"), Full);
        drop(first);
        assert_eq!(waits.len(), 1);
        assert!(!waits.lock().orders.contains_key(&ORDER));
        let _third = waits.enter(ORDER).expect("room again");
    }
}
