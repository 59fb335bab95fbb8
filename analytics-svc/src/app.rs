//! The queries.

use std::sync::Arc;

use futures::Stream;
use futures::stream::unfold;
use money::Currency;
use service::db::{Db, DbError};
use service::deadline::Deadline;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::domain::{self, Figures, Overflow, Size, WindowFigures};
use crate::feed::{Feed, Full, Watcher};
use crate::store::{self, Span};

/// Why a query has no answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// Of the figures over all windows.
    #[error("the total is too large")]
    TotalTooLarge(#[from] Overflow),
    #[error(transparent)]
    TooManyWatching(#[from] Full),
    /// The client's own deadline.
    #[error("the time that was asked for has passed")]
    TimeIsUp,
    #[error("this replica is stopping")]
    Stopping,
    #[error(transparent)]
    Database(#[from] DbError),
}

/// Figures of several windows, and over all of them.
#[derive(Debug)]
pub struct Summary {
    /// Oldest first.
    pub windows: Vec<WindowFigures>,
    /// By currency, without best sellers.
    pub total: Vec<Figures>,
}

/// What queries are answered from. Clones share it.
#[derive(Debug, Clone)]
pub struct Queries {
    db: Db,
    feed: Arc<Feed>,
    shutdown: CancellationToken,
}

impl Queries {
    pub fn new(db: Db, feed: Arc<Feed>, shutdown: CancellationToken) -> Self {
        Self { db, feed, shutdown }
    }

    /// Figures of the windows of a span.
    ///
    /// # Errors
    /// When the database does not answer in time, or a total does not fit.
    pub async fn summary(&self, span: Span, deadline: Deadline) -> Result<Summary, QueryError> {
        let windows = store::summary(&self.db, deadline, span).await?;
        let total = domain::total(&windows)?;
        Ok(Summary { windows, total })
    }

    /// The window of the present now and whenever its figures change, and then the next one. A reader that is slow gets the latest
    /// figures, not each one between; nothing is read from the database for one watcher alone.
    ///
    /// # Errors
    /// When too many watch. The stream itself ends with [`QueryError::Stopping`] when this replica stops, and with
    /// [`QueryError::TimeIsUp`] at the client's own deadline.
    pub fn watch(
        &self,
        size: Size,
        currency: Option<Currency>,
        deadline: Deadline,
    ) -> Result<impl Stream<Item = Result<WindowFigures, QueryError>> + Send + 'static, QueryError> {
        let watch = Watch {
            watcher: self.feed.enter(size)?,
            currency,
            sent: None,
            until: deadline.asked(),
            shutdown: self.shutdown.clone(),
        };
        Ok(unfold(Some(watch), |watch| async {
            let mut watch = watch?;
            let next = watch.next().await;
            // After an error there is nothing more, and the place among those who watch is free.
            let watch = next.is_ok().then_some(watch);
            Some((next, watch))
        }))
    }
}

/// A stream of [`Queries::watch`].
struct Watch {
    watcher: Watcher,
    currency: Option<Currency>,
    sent: Option<WindowFigures>,
    until: Option<Instant>,
    shutdown: CancellationToken,
}

impl Watch {
    async fn next(&mut self) -> Result<WindowFigures, QueryError> {
        let until = self.until;
        let deadline = async move {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        let (currency, watcher, sent) = (self.currency, &mut self.watcher, &mut self.sent);
        let news = async {
            loop {
                let latest = in_currency(&*watcher.next().await, currency);
                if sent.as_ref() != Some(&latest) {
                    return sent.insert(latest).clone();
                }
                watcher.changed().await;
            }
        };
        tokio::select! {
            news = news => Ok(news),
            () = deadline => Err(QueryError::TimeIsUp),
            () = self.shutdown.cancelled() => Err(QueryError::Stopping),
        }
    }
}

/// The figures in one currency, or all.
fn in_currency(window: &WindowFigures, currency: Option<Currency>) -> WindowFigures {
    let is_wanted = |figures: &&Figures| currency.is_none_or(|only| figures.currency == only);
    WindowFigures {
        window: window.window,
        figures: window.figures.iter().filter(is_wanted).cloned().collect(),
    }
}
