//! Figures as messages.

use contracts::shop::analytics::events::v1 as events;
use contracts::shop::analytics::v1 as wire;
use contracts::wire::timestamp;

use crate::domain::{BestSeller, Counts, Figures, Size, WindowFigures};

impl From<Size> for events::WindowSize {
    fn from(size: Size) -> Self {
        match size {
            Size::Minute => Self::Minute,
            Size::Hour => Self::Hour,
            Size::Day => Self::Day,
        }
    }
}

/// The size of a window as a client gives it.
pub(crate) fn size(number: i32) -> Option<Size> {
    Size::ALL
        .into_iter()
        .find(|size| i32::from(events::WindowSize::from(*size)) == number)
}

impl From<&Figures> for events::SalesFigures {
    fn from(figures: &Figures) -> Self {
        let Counts {
            placed,
            confirmed,
            cancelled,
            refunded,
            ..
        } = figures.counts;
        let product = |best: &BestSeller| events::ProductSales {
            product_id: best.product_id.to_string(),
            quantity: best.sales.quantity,
            revenue_minor_units: best.sales.revenue,
        };
        Self {
            currency_code: figures.currency.code().to_owned(),
            orders_placed: placed,
            orders_confirmed: confirmed,
            orders_cancelled: cancelled,
            revenue_minor_units: figures.counts.revenue(),
            refunded_minor_units: refunded,
            best_sellers: figures.best_sellers.iter().map(product).collect(),
        }
    }
}

impl From<&WindowFigures> for wire::SalesWindow {
    fn from(window: &WindowFigures) -> Self {
        Self {
            window_size: events::WindowSize::from(window.window.size()).into(),
            window_start: Some(timestamp(window.window.start())),
            conversion: conversion(&window.figures),
            figures: window.figures.iter().map(Into::into).collect(),
        }
    }
}

/// Confirmed orders of those placed; 0 when none was.
pub(crate) fn conversion(figures: &[Figures]) -> f64 {
    let sum = |of: fn(&Counts) -> i64| -> f64 { figures.iter().map(|f| of(&f.counts) as f64).sum() };
    let placed = sum(|counts| counts.placed);
    if placed > 0.0 {
        sum(|counts| counts.confirmed) / placed
    } else {
        0.0
    }
}
