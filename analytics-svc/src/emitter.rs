//! Events that tell how the figures of windows have changed: `order_analytics.updated`.
//!
//! Not one event per order, but for each window that has changed one with its figures as they are, and then none for a while. The last
//! change is always told. One replica at a time is at it, and an event commits with its version, so versions have no gaps and no figures
//! are told twice in a row, also when the figures were built anew: what was told last is not built anew with them, and figures are compared
//! with that.

use std::collections::HashMap;
use std::time::Duration;

use chrono::Utc;
use contracts::catalogue::order_analytics as types;
use contracts::shop::analytics::events::v1 as events;
use contracts::wire::timestamp;
use diesel_async::AsyncPgConnection;
use prometheus::IntCounter;
use prost::Message as _;
use service::db::{Db, DbError};
use service::deadline::Deadline;
use service::telemetry::chain;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use crate::domain::{Window, WindowFigures};
use crate::store::{self, Emission};

/// Who emits.
const SOURCE: &str = "/analytics-svc";
/// The only major version of the payload so far, and its message.
const SCHEMA_VERSION: i32 = 1;
/// Windows that are looked at in one transaction.
const BATCH: i64 = 200;
/// Deadline of the beginning of a step.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pauses between looks are a quarter of the interval, within these.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// Emits the figures of windows that have changed.
#[derive(Debug)]
pub struct Emitter {
    db: Db,
    interval: Duration,
    emitted: IntCounter,
}

/// What one step came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Another replica is at it.
    Busy,
    /// So many windows were looked at, and so many told of.
    Done { looked: usize, emitted: usize },
}

impl Emitter {
    /// Emits a window again at the earliest after `interval`, and counts the events in `emitted`.
    pub fn new(db: Db, interval: Duration, emitted: IntCounter) -> Self {
        Self {
            db,
            interval,
            emitted,
        }
    }

    /// Emits until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), std::convert::Infallible> {
        let pause = (self.interval / 4).clamp(PAUSE.0, PAUSE.1);
        let mut failing = false;
        while !shutdown.is_cancelled() {
            match self.step().await {
                Ok(step) => {
                    if std::mem::take(&mut failing) {
                        tracing::info!("changed figures are emitted again");
                    }
                    if step.is_full() {
                        continue;
                    }
                }
                Err(error) if failing => {
                    tracing::debug!(error = %chain(&error), "still no changed figures are emitted");
                }
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "changed figures cannot be emitted");
                    failing = true;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = shutdown.cancelled() => {}
            }
        }
        Ok(())
    }

    /// Looks at the windows that are due, a bounded number of them, and emits those whose figures are others than were told last.
    ///
    /// # Errors
    /// Every [`DbError`].
    pub async fn step(&self) -> Result<Step, DbError> {
        let deadline = Deadline::after(PATIENCE);
        let step = self
            .db
            .transaction(deadline, &self.interval, |connection, interval| {
                Box::pin(step(connection, *interval))
            })
            .await?;
        if let Step::Done { emitted, .. } = step {
            self.emitted.inc_by(emitted as u64);
        }
        Ok(step)
    }
}

impl Step {
    /// Whether there may be more to do at once.
    fn is_full(self) -> bool {
        matches!(self, Self::Done { looked, .. } if looked as i64 == BATCH)
    }
}

async fn step(connection: &mut AsyncPgConnection, interval: Duration) -> Result<Step, DbError> {
    if store::take_turn(connection).await?.is_none() {
        return Ok(Step::Busy);
    }
    let changed = store::take_changed(connection, interval, BATCH).await?;
    if changed.is_empty() {
        return Ok(Step::Done {
            looked: 0,
            emitted: 0,
        });
    }
    // After taking the notes: what is in the figures by now and was not noted then is noted still.
    let figures = store::figures(connection, &changed).await?;
    let told = store::emissions(connection, &changed).await?;
    let mut told: HashMap<Window, Emission> = told
        .into_iter()
        .map(|emission| (emission.window, emission))
        .collect();
    let (emissions, messages): (Vec<Emission>, Vec<outbox::Message>) = figures
        .iter()
        .filter_map(|figures| next(figures, told.remove(&figures.window)))
        .unzip();
    if !emissions.is_empty() {
        store::emit(connection, &emissions, &messages).await?;
    }
    Ok(Step::Done {
        looked: changed.len(),
        emitted: emissions.len(),
    })
}

/// What is to be told of a window, if that is anything else than was told last.
fn next(figures: &WindowFigures, told: Option<Emission>) -> Option<(Emission, outbox::Message)> {
    let window = figures.window;
    let mut event = events::OrderAnalyticsUpdated {
        window_size: events::WindowSize::from(window.size()).into(),
        window_start: Some(timestamp(window.start())),
        figures: figures.figures.iter().map(Into::into).collect(),
        updated_at: None,
    };
    let digest = Sha256::digest(event.encode_to_vec()).to_vec();
    let version = match &told {
        Some(told) if told.digest == digest => return None,
        Some(told) => told.version + 1,
        None => 1,
    };
    let now = Utc::now();
    event.updated_at = Some(timestamp(now));
    let message = outbox::Message {
        schema_version: SCHEMA_VERSION,
        occurred_at: now,
        ..outbox::Message::new(
            types::ENTITY_TYPE,
            window.to_string(),
            version,
            types::UPDATED,
            event.encode_to_vec(),
        )
    };
    let emission = Emission {
        window,
        version,
        digest,
    };
    let name = contracts::catalogue::message_name(types::UPDATED, SCHEMA_VERSION).unwrap_or_default();
    Some((emission, message.source(SOURCE).data_schema(name)))
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use money::Currency;

    use super::*;
    use crate::domain::{Counts, Figures, Size};

    fn figures(placed: i64) -> WindowFigures {
        let time = DateTime::from_timestamp(1_700_000_000, 0).expect("in range");
        WindowFigures {
            window: Window::of(Size::Hour, time),
            figures: vec![Figures {
                currency: Currency::from_code("EUR").expect("known"),
                counts: Counts {
                    placed,
                    ..Counts::default()
                },
                best_sellers: Vec::new(),
            }],
        }
    }

    #[test]
    fn an_event_tells_what_was_not_told_last() {
        let (first, message) = next(&figures(1), None).expect("never told");
        assert_eq!(first.version, 1);
        assert_eq!(message.aggregate_id, "hour/2023-11-14T22:00:00Z");
        assert_eq!(
            message.data_schema.as_deref(),
            Some("shop.analytics.events.v1.OrderAnalyticsUpdated")
        );
        assert_eq!(next(&figures(1), Some(first.clone())), None, "the same");
        let (second, message) = next(&figures(2), Some(first)).expect("another one");
        assert_eq!((second.version, message.aggregate_version), (2, 2));
        // A rebuild may find that there was nothing.
        let nothing = WindowFigures {
            figures: Vec::new(),
            ..figures(2)
        };
        let (third, message) = next(&nothing, Some(second)).expect("another one");
        let payload = message.payload.expect("there is one");
        let event = events::OrderAnalyticsUpdated::decode(payload.as_slice()).expect("an event");
        assert_eq!((third.version, event.figures.len()), (3, 0));
        assert!(event.updated_at.is_some());
    }
}
