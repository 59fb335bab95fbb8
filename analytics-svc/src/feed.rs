//! The windows of the present for those who watch, whichever replica changes them.
//!
//! There are three of them at any time, one of each size, however many watch. [`Feed::poll`] asks the database in one statement for those
//! that anybody watches, and hands what has changed to all at once.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use service::db::{Db, DbError};
use service::deadline::Deadline;
use service::telemetry::chain;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep};

use crate::domain::{Size, Window, WindowFigures};
use crate::store;

/// How often the database is asked while somebody watches.
const INTERVAL: Duration = Duration::from_millis(50);
/// Asking takes at most this part of the time: a slow database is asked less often.
const SHARE: u32 = 5;
/// Deadline of one question.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause after a question that failed.
const AFTER_FAILURE: Duration = Duration::from_millis(500);

/// The latest figures of one size's window of the present; `None` while nobody has asked.
type Latest = Option<Arc<WindowFigures>>;

/// What is watched. Bounded: each watcher holds memory and a stream.
#[derive(Debug)]
pub struct Feed {
    limit: usize,
    places: Arc<Semaphore>,
    /// In the order of [`Size::ALL`].
    latest: [watch::Sender<Latest>; 3],
    /// Somebody watches.
    somebody: Notify,
}

/// No more can watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many are watching")]
pub struct Full;

impl Feed {
    /// Lets `limit` watch at once.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            places: Arc::new(Semaphore::new(limit)),
            latest: std::array::from_fn(|_| watch::channel(None).0),
            somebody: Notify::new(),
        }
    }

    /// Enters someone who watches the windows of a size.
    ///
    /// # Errors
    /// When too many watch already.
    pub fn enter(&self, size: Size) -> Result<Watcher, Full> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| Full)?;
        let latest = self.of(size).subscribe();
        self.somebody.notify_one();
        Ok(Watcher {
            latest,
            _place: place,
        })
    }

    /// How many watch.
    pub fn watching(&self) -> usize {
        self.limit - self.places.available_permits()
    }

    /// Asks the database for ever, as long as somebody watches.
    pub async fn poll(self: Arc<Self>, db: Db) -> Result<(), Infallible> {
        let mut failing = false;
        loop {
            let asked = Instant::now();
            match self.look(&db, Utc::now()).await {
                Ok(true) => {
                    failing = false;
                    sleep(INTERVAL.max(asked.elapsed() * SHARE)).await;
                }
                Ok(false) => self.somebody.notified().await,
                Err(error) => {
                    if !failing {
                        tracing::warn!(error = %chain(&error), "watched figures cannot be read");
                    }
                    failing = true;
                    sleep(AFTER_FAILURE).await;
                }
            }
        }
    }

    /// Looks once, and tells everybody; `false` when nobody watches.
    ///
    /// # Errors
    /// When the database does not answer in time.
    pub async fn look(&self, db: &Db, now: DateTime<Utc>) -> Result<bool, DbError> {
        let (watched, alone): (Vec<Size>, Vec<Size>) = Size::ALL
            .into_iter()
            .partition(|size| self.of(*size).receiver_count() > 0);
        for size in alone {
            // Whoever comes later must not get figures from before.
            self.of(size).send_replace(None);
        }
        if watched.is_empty() {
            return Ok(false);
        }
        let windows = watched.iter().map(|size| Window::of(*size, now)).collect();
        for figures in store::windows(db, Deadline::after(PATIENCE), windows).await? {
            self.of(figures.window.size()).send_if_modified(|latest| {
                let is_news = latest.as_deref() != Some(&figures);
                if is_news {
                    *latest = Some(Arc::new(figures));
                }
                is_news
            });
        }
        Ok(true)
    }

    fn of(&self, size: Size) -> &watch::Sender<Latest> {
        let [minute, hour, day] = &self.latest;
        match size {
            Size::Minute => minute,
            Size::Hour => hour,
            Size::Day => day,
        }
    }
}

/// Someone who watches; leaves when dropped.
#[derive(Debug)]
pub struct Watcher {
    latest: watch::Receiver<Latest>,
    _place: OwnedSemaphorePermit,
}

impl Watcher {
    /// The window of the present, the first time as soon as it is known, and then whenever it is another one or its figures have
    /// changed. Whoever is slow gets the latest.
    pub async fn next(&mut self) -> Arc<WindowFigures> {
        loop {
            if let Some(latest) = self.latest.borrow_and_update().clone() {
                return latest;
            }
            self.changed().await;
        }
    }

    /// Waits until there is something else than was seen last.
    pub async fn changed(&mut self) {
        // The feed lives as long as the process serves.
        if self.latest.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watchers_are_bounded_and_leave_when_dropped() {
        let feed = Feed::new(2);
        let first = feed.enter(Size::Day).expect("room");
        let _second = feed.enter(Size::Hour).expect("room");
        assert_eq!(feed.enter(Size::Day).expect_err("full"), Full);
        drop(first);
        assert_eq!(feed.watching(), 1);
        let _third = feed.enter(Size::Minute).expect("room again");
    }
}
