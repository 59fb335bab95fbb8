//! The queries.

use std::sync::Arc;
use std::time::Duration;

use consumer::Parking;
use futures::Stream;
use futures::stream::unfold;
use service::db::{Db, DbError};
use service::deadline::Deadline;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::domain::journey::Journey;
use crate::domain::{Reached, Status, View};
use crate::store::{self, Position};
use crate::waits::{Full, Waiter, Waits};

/// Deadline of a read for a stream, which itself has none.
const STREAM_READ: Duration = Duration::from_secs(5);
/// A wait ends this long before the call's deadline, or a tenth of what is left if that is less: the answer that says so must
/// still reach the client.
const MARGIN: Duration = Duration::from_millis(100);

/// Why a query has no answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// There is none, or it is someone else's.
    #[error("there is no such order")]
    NotFound,
    /// Waited until the deadline.
    #[error("the read model has not reached that version yet")]
    NotYet,
    #[error(transparent)]
    TooManyWaiting(#[from] Full),
    #[error("this replica is stopping")]
    Stopping,
    #[error(transparent)]
    Database(#[from] DbError),
}

/// What queries are answered from. Clones share it.
#[derive(Debug, Clone)]
pub struct Queries {
    db: Db,
    parking: Parking,
    waits: Arc<Waits>,
    shutdown: CancellationToken,
}

/// Orders of one page, and where the next page begins, if there is one.
#[derive(Debug)]
pub struct Page {
    pub orders: Vec<View>,
    pub next: Option<Position>,
}

impl Queries {
    pub fn new(db: Db, parking: Parking, waits: Arc<Waits>, shutdown: CancellationToken) -> Self {
        Self {
            db,
            parking,
            waits,
            shutdown,
        }
    }

    /// A user's order, once its view has reached `at_least_version`; as it is when that is 0.
    ///
    /// # Errors
    /// [`QueryError::NotYet`] at the deadline. An order that is unknown may be one that is on its way, so with a version
    /// it is waited for, too; and someone else's is waited for just as long, so that nobody learns that it exists.
    pub async fn view(
        &self,
        user_id: Uuid,
        order_id: Uuid,
        at_least_version: i64,
        deadline: Deadline,
    ) -> Result<View, QueryError> {
        let read = async || self.read(user_id, order_id, deadline).await;
        let enough = |view: &View| view.order.version >= at_least_version;
        let give_up = deadline.at() - MARGIN.min(deadline.remaining() / 10);
        match read().await? {
            Some(view) if enough(&view) => return Ok(view),
            None if at_least_version == 0 => return Err(QueryError::NotFound),
            _ => {}
        }
        let mut waiter = self.waits.enter(order_id)?;
        // It may have come between the first look and the entry.
        if let Some(view) = read().await?.filter(enough) {
            return Ok(view);
        }
        tokio::select! {
            () = waiter.order(at_least_version) => {}
            () = sleep_until(give_up) => return Err(QueryError::NotYet),
            () = self.shutdown.cancelled() => return Err(QueryError::Stopping),
        }
        if let Some(view) = read().await?.filter(enough) {
            return Ok(view);
        }
        // The version is there and the user does not see it: the order is someone else's.
        tokio::select! {
            () = sleep_until(give_up) => Err(QueryError::NotYet),
            () = self.shutdown.cancelled() => Err(QueryError::Stopping),
        }
    }

    async fn read(&self, user_id: Uuid, order_id: Uuid, deadline: Deadline) -> Result<Option<View>, DbError> {
        store::get(&self.db, &self.parking, deadline, user_id, order_id).await
    }

    /// All that happened to a user's order, once its view has reached `at_least_version`. What comes by other topics than the order's
    /// own may be ahead of that or behind it.
    ///
    /// # Errors
    /// As [`view`](Self::view): until its placing has come nobody knows whose it is, so there is no journey either.
    pub async fn journey(
        &self,
        user_id: Uuid,
        order_id: Uuid,
        at_least_version: i64,
        deadline: Deadline,
    ) -> Result<Journey, QueryError> {
        self.view(user_id, order_id, at_least_version, deadline).await?;
        Ok(store::journey(&self.db, &self.parking, deadline, order_id).await?)
    }

    /// A page of a user's orders, newest first.
    ///
    /// # Errors
    /// When the database does not answer in time.
    pub async fn list(
        &self,
        user_id: Uuid,
        status: Option<Status>,
        after: Option<Position>,
        page_size: u16,
        deadline: Deadline,
    ) -> Result<Page, QueryError> {
        // One more tells whether there is a next page.
        let limit = page_size.saturating_add(1);
        let mut orders =
            store::list(&self.db, &self.parking, deadline, user_id, status, after, limit).await?;
        let more = orders.len() > usize::from(page_size);
        orders.truncate(usize::from(page_size));
        let next = orders
            .last()
            .filter(|_| more)
            .map(|view| Position::of(&view.order));
        Ok(Page { orders, next })
    }

    /// A user's order now and whenever it or a payment of it has changed, or it has been parked or is so no longer, until nothing more is
    /// expected of it: it is delivered, or it is cancelled and none of its money is with us. A reader that is slow gets the latest state,
    /// not each one between; nothing is read from the database ahead of it.
    ///
    /// # Errors
    /// When there is no such order. The stream itself ends with [`QueryError::Stopping`] when this replica stops, and with
    /// [`QueryError::NotYet`] at the client's own deadline.
    pub async fn watch(
        &self,
        user_id: Uuid,
        order_id: Uuid,
        deadline: Deadline,
    ) -> Result<impl Stream<Item = Result<View, QueryError>> + Send + 'static, QueryError> {
        let waiter = self.waits.enter(order_id)?;
        let view = self
            .read(user_id, order_id, deadline)
            .await?
            .ok_or(QueryError::NotFound)?;
        let watch = Watch {
            queries: self.clone(),
            waiter,
            user_id,
            order_id,
            until: deadline.asked(),
        };
        Ok(unfold(Some((watch, Seen::Now(Box::new(view)))), |state| async {
            let (mut watch, seen) = state?;
            let view = match seen {
                Seen::Now(view) => Ok(*view),
                Seen::Until(reached) => watch.beyond(reached).await,
            };
            // After the end there is nothing more, and the place among those who wait is free.
            let next = match &view {
                Ok(view) if !view.is_final() => Some((watch, Seen::Until(view.reached()))),
                _ => None,
            };
            Some((view, next))
        }))
    }
}

/// What a watcher has seen.
enum Seen {
    /// Nothing: this is what it is sent first.
    Now(Box<View>),
    /// The view up to here.
    Until(Reached),
}

/// A stream of [`Queries::watch`].
struct Watch {
    queries: Queries,
    waiter: Waiter,
    user_id: Uuid,
    order_id: Uuid,
    until: Option<Instant>,
}

impl Watch {
    async fn beyond(&mut self, seen: Reached) -> Result<View, QueryError> {
        const AGAIN: Duration = Duration::from_millis(20);
        let until = self.until;
        let deadline = async move {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        let changed = async {
            loop {
                self.waiter.beyond(seen).await;
                let deadline = Deadline::after(STREAM_READ);
                let read = self.queries.read(self.user_id, self.order_id, deadline).await;
                match read? {
                    Some(view) if view.reached().is_beyond(seen) => return Ok(view),
                    Some(_) => sleep(AGAIN).await,
                    None => return Err(QueryError::NotFound),
                }
            }
        };
        tokio::select! {
            view = changed => view,
            () = deadline => Err(QueryError::NotYet),
            () = self.queries.shutdown.cancelled() => Err(QueryError::Stopping),
        }
    }
}
