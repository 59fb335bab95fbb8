//! The service on the wire: parses, asks, answers.

use std::pin::Pin;
use std::time::Duration;

use chrono::{DateTime, Utc};
use contracts::shop::analytics::v1 as wire;
use contracts::shop::analytics::v1::analytics_service_server::AnalyticsService;
use contracts::wire::{time, timestamp};
use futures::{Stream, StreamExt as _};
use money::Currency;
use prost_types::Timestamp;
use service::deadline::Deadline;
use service::status::{Domain, RETRY_DELAY};
use service::validate::Fields;
use tonic::{Code, Request, Response, Status};

use crate::app::{Queries, QueryError, Summary};
use crate::domain::{Size, is_in_calendar};
use crate::store::Span;
use crate::wire::{conversion, size};

/// Whose reasons the errors give.
pub const DOMAIN: Domain = Domain("analytics.shop");

/// Windows that one call may ask for.
const MAX_WINDOWS: i32 = 1_500;

/// `shop.analytics.v1.AnalyticsService`.
#[derive(Debug, Clone)]
pub struct Analytics {
    queries: Queries,
    max_deadline: Duration,
}

impl Analytics {
    /// `max_deadline` is for calls that did not come through a server which knows their deadline.
    pub fn new(queries: Queries, max_deadline: Duration) -> Self {
        Self {
            queries,
            max_deadline,
        }
    }
}

type Answers = Pin<Box<dyn Stream<Item = Result<wire::WatchSalesResponse, Status>> + Send>>;

#[tonic::async_trait]
impl AnalyticsService for Analytics {
    async fn get_sales_summary(
        &self,
        request: Request<wire::GetSalesSummaryRequest>,
    ) -> Result<Response<wire::GetSalesSummaryResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let wire::GetSalesSummaryRequest {
            window_size,
            start,
            end,
            currency_code,
        } = request.get_ref();
        let mut fields = Fields::new();
        let size = window_size_of(&mut fields, *window_size);
        let start = moment(&mut fields, "start", start.as_ref());
        let end = moment(&mut fields, "end", end.as_ref());
        let currency = currency_of(&mut fields, currency_code);
        if let (Some(size), Some(start), Some(end)) = (size, start, end) {
            if end <= start {
                let _ = fields.reject::<()>("end", "must be later than start");
            } else if end - start > size.length() * MAX_WINDOWS {
                let _ = fields.reject::<()>("end", "must not be more than 1,500 windows after start");
            }
        }
        let span = size.zip(start.zip(end)).map(|(size, (start, end))| Span {
            size,
            start,
            end,
            currency: currency.flatten(),
        });
        let span = fields.finish(DOMAIN, span)?;
        let first = span.start;
        let Summary { windows, total } = self.queries.summary(span, deadline).await?;
        Ok(Response::new(wire::GetSalesSummaryResponse {
            windows: windows.iter().map(Into::into).collect(),
            total: Some(wire::SalesWindow {
                window_start: Some(timestamp(first)),
                conversion: conversion(&total),
                figures: total.iter().map(Into::into).collect(),
                ..wire::SalesWindow::default()
            }),
        }))
    }

    type WatchSalesStream = Answers;

    async fn watch_sales(
        &self,
        request: Request<wire::WatchSalesRequest>,
    ) -> Result<Response<Answers>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let wire::WatchSalesRequest {
            window_size,
            currency_code,
        } = request.get_ref();
        let mut fields = Fields::new();
        let size = window_size_of(&mut fields, *window_size);
        let currency = currency_of(&mut fields, currency_code);
        let (size, currency) = fields.finish(DOMAIN, size.zip(currency))?;
        let windows = self.queries.watch(size, currency, deadline)?;
        let answers = windows.map(|window| {
            Ok(wire::WatchSalesResponse {
                window: Some((&window.map_err(Status::from)?).into()),
            })
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

fn window_size_of(fields: &mut Fields, number: i32) -> Option<Size> {
    size(number).or_else(|| fields.reject("window_size", "must be a known size"))
}

fn moment(fields: &mut Fields, field: &str, given: Option<&Timestamp>) -> Option<DateTime<Utc>> {
    let moment = time(given).filter(|time| is_in_calendar(*time));
    moment.or_else(|| fields.reject(field, "must be a time from 1970 to 9999"))
}

/// `Some(None)`: all currencies.
fn currency_of(fields: &mut Fields, code: &str) -> Option<Option<Currency>> {
    if code.is_empty() {
        return Some(None);
    }
    let known = Currency::from_code(code).map(Some);
    known.or_else(|| fields.reject("currency_code", "must be an ISO 4217 code"))
}

impl From<QueryError> for Status {
    fn from(error: QueryError) -> Self {
        let message = error.to_string();
        match error {
            QueryError::TotalTooLarge(_) => DOMAIN
                .status(Code::OutOfRange, "TOTAL_TOO_LARGE", message)
                .build(),
            QueryError::TooManyWatching(_) => DOMAIN
                .status(Code::ResourceExhausted, "TOO_MANY_WATCHING", message)
                .retry_after(RETRY_DELAY)
                .build(),
            QueryError::TimeIsUp => DOMAIN
                .status(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", message)
                .build(),
            QueryError::Stopping => DOMAIN
                .status(Code::Unavailable, "STOPPING", message)
                .retry_after(RETRY_DELAY)
                .build(),
            QueryError::Database(error) => error.to_status(DOMAIN),
        }
    }
}
