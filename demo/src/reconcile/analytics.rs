//! Analytics: the figures are what a fold of the topics gives, in every window, as both instances answer and as events tell.

use std::collections::{BTreeMap, HashMap, HashSet};

use chrono::{DateTime, SecondsFormat, Utc};
use contracts::catalogue::{order as order_types, payment as payment_types};
use contracts::shop::analytics::events::v1::{OrderAnalyticsUpdated, ProductSales, SalesFigures, WindowSize};
use contracts::shop::analytics::v1::SalesWindow;
use contracts::shop::order::events::v1::OrderPlaced;
use contracts::shop::payment::events::v1::{PaymentReceived, PaymentRefunded};
use contracts::wire::{time, timestamp};
use envelope::header;
use prost::Message as _;

use super::Parts;
use crate::topic::Record;

/// Sizes of windows, and how long they are in seconds.
pub(crate) const SIZES: [(WindowSize, i64); 3] = [
    (WindowSize::Minute, 60),
    (WindowSize::Hour, 60 * 60),
    (WindowSize::Day, 24 * 60 * 60),
];
/// Best sellers are so many.
const BEST: usize = 10;

/// What an instance answers about windows of one size.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    /// Which instance.
    pub(crate) instance: usize,
    pub(crate) size: WindowSize,
    pub(crate) windows: Vec<SalesWindow>,
}

/// What the topics say of an order.
#[derive(Debug, Default)]
struct Story {
    placed: Option<(DateTime<Utc>, String, Vec<ProductSales>)>,
    is_confirmed: bool,
    is_cancelled: bool,
    received: i64,
    refunded: i64,
}

type Windows = BTreeMap<DateTime<Utc>, Vec<SalesFigures>>;

/// What does not fit.
pub(super) fn compare(parts: &Parts) -> Vec<String> {
    let mut problems = Vec::new();
    let stories = match stories(parts) {
        Ok(stories) => stories,
        Err(error) => {
            return vec![format!(
                "a record of orders or payments is not understood: {error}"
            )];
        }
    };
    let mut told = told_by_topic(parts, &mut problems);
    for (size, seconds) in SIZES {
        let expected = windows(stories.values(), seconds);
        for answer in parts.summaries.iter().filter(|answer| answer.size == size) {
            let found: Windows = answer
                .windows
                .iter()
                .filter_map(|window| Some((time(window.window_start.as_ref())?, window.figures.clone())))
                .collect();
            problems.extend(differences(&expected, &found).map(|difference| {
                format!(
                    "instance {} of analytics-svc, {size:?}: {difference}",
                    answer.instance + 1
                )
            }));
            for window in &answer.windows {
                let sum = |of: fn(&SalesFigures) -> i64| window.figures.iter().map(of).sum::<i64>() as f64;
                let conversion =
                    sum(|figures| figures.orders_confirmed) / sum(|figures| figures.orders_placed);
                if (window.conversion - conversion).abs() > 1e-9 {
                    problems.push(format!("the conversion of {window:?} is {conversion}"));
                }
            }
        }
        if parts
            .summaries
            .iter()
            .filter(|answer| answer.size == size)
            .count()
            < 2
        {
            problems.push(format!(
                "not every instance of analytics-svc has answered about {size:?}"
            ));
        }
        let found: Windows = expected
            .keys()
            .filter_map(|start| Some((*start, told.remove(&name(size, *start))?)))
            .collect();
        let of_events = differences(&expected, &found);
        problems.extend(of_events.map(|difference| format!("events of analytics-svc: {difference}")));
    }
    problems.extend(
        told.keys()
            .map(|window| format!("events tell of {window}, in which there was no order")),
    );
    problems
}

fn differences(expected: &Windows, found: &Windows) -> impl Iterator<Item = String> {
    let starts: std::collections::BTreeSet<_> = expected.keys().chain(found.keys()).copied().collect();
    let differs = starts
        .into_iter()
        .filter(|start| expected.get(start) != found.get(start));
    differs.map(|start| {
        format!(
            "the window of {start} has {:?}, and a fold of the topics gives {:?}",
            found.get(&start),
            expected.get(&start)
        )
    })
}

/// As events name it.
fn name(size: WindowSize, start: DateTime<Utc>) -> String {
    let size = size
        .as_str_name()
        .trim_start_matches("WINDOW_SIZE_")
        .to_lowercase();
    format!("{size}/{}", start.to_rfc3339_opts(SecondsFormat::Secs, true))
}

/// By window's name, the figures that the topic tells last.
fn told_by_topic(parts: &Parts, problems: &mut Vec<String>) -> BTreeMap<String, Vec<SalesFigures>> {
    let mut told: HashMap<String, (i64, Vec<SalesFigures>)> = HashMap::new();
    for record in parts.records_of(contracts::topics::ORDER_ANALYTICS) {
        let version = record
            .header(header::AGGREGATE_VERSION)
            .and_then(|version| version.parse().ok());
        let event = OrderAnalyticsUpdated::decode(record.payload.as_deref().unwrap_or_default());
        let (Some(version), Ok(event)) = (version, event) else {
            problems.push(format!("a record about {} is not understood", record.key_text()));
            continue;
        };
        let last = told.entry(record.key_text().to_owned()).or_default();
        // A repeat may come after what has happened since.
        if last.0 < version {
            *last = (version, event.figures);
        }
    }
    told.into_iter()
        .map(|(window, (_, figures))| (window, figures))
        .collect()
}

/// By order, what was heard; repeated records are heard once.
fn stories(parts: &Parts) -> Result<HashMap<String, Story>, prost::DecodeError> {
    let mut stories: HashMap<String, Story> = HashMap::new();
    let mut heard = HashSet::new();
    let records = [contracts::topics::ORDER, contracts::topics::PAYMENT]
        .into_iter()
        .flat_map(|topic| parts.records_of(topic));
    for record in records {
        if heard.insert(record.header(header::CE_ID)) {
            hear(&mut stories, record)?;
        }
    }
    Ok(stories)
}

fn hear(stories: &mut HashMap<String, Story>, record: &Record) -> Result<(), prost::DecodeError> {
    let payload = record.payload.as_deref().unwrap_or_default();
    let mut of = |order: &str, tell: &dyn Fn(&mut Story)| tell(stories.entry(order.to_owned()).or_default());
    match record.header(header::CE_TYPE).unwrap_or_default() {
        order_types::PLACED => {
            let event = OrderPlaced::decode(payload)?;
            let lines = event.items.iter().map(|item| ProductSales {
                product_id: item.product_id.clone(),
                quantity: item.quantity.into(),
                revenue_minor_units: i64::from(item.quantity) * item.unit_price_minor_units,
            });
            let at = time(event.created_at.as_ref()).unwrap_or_default();
            let currency = event.total.unwrap_or_default().currency_code;
            let placed = (at, currency, lines.collect::<Vec<_>>());
            of(record.key_text(), &|story| story.placed = Some(placed.clone()));
        }
        order_types::CONFIRMED => of(record.key_text(), &|story| story.is_confirmed = true),
        order_types::CANCELLED => of(record.key_text(), &|story| story.is_cancelled = true),
        payment_types::RECEIVED => {
            let event = PaymentReceived::decode(payload)?;
            let amount = event.amount.unwrap_or_default().minor_units;
            of(&event.order_id, &|story| story.received += amount);
        }
        payment_types::REFUNDED => {
            let event = PaymentRefunded::decode(payload)?;
            let amount = event.amount.unwrap_or_default().minor_units;
            of(&event.order_id, &|story| story.refunded += amount);
        }
        _ => {}
    }
    Ok(())
}

/// The figures of every window of so many seconds in which there was an order.
fn windows<'a>(stories: impl Iterator<Item = &'a Story>, seconds: i64) -> Windows {
    type Sold<'a> = BTreeMap<&'a str, ProductSales>;
    let mut windows: BTreeMap<(DateTime<Utc>, &str), (SalesFigures, Sold<'_>)> = BTreeMap::new();
    for story in stories {
        let Some((at, currency, lines)) = &story.placed else {
            continue;
        };
        let start = at.timestamp().div_euclid(seconds) * seconds;
        let start = DateTime::from_timestamp(start, 0).unwrap_or_default();
        let (figures, products) = windows.entry((start, currency)).or_default();
        figures.currency_code.clone_from(currency);
        figures.orders_placed += 1;
        figures.orders_confirmed += i64::from(story.is_confirmed);
        figures.orders_cancelled += i64::from(story.is_cancelled);
        figures.revenue_minor_units += story.received - story.refunded;
        figures.refunded_minor_units += story.refunded;
        if story.is_confirmed && !story.is_cancelled {
            for line in lines {
                let product = products.entry(&line.product_id).or_default();
                product.product_id.clone_from(&line.product_id);
                product.quantity += line.quantity;
                product.revenue_minor_units += line.revenue_minor_units;
            }
        }
    }
    let mut by_start = Windows::new();
    for ((start, _), (mut figures, products)) in windows {
        figures.best_sellers = products.into_values().collect();
        figures
            .best_sellers
            .sort_by_key(|product| std::cmp::Reverse(product.quantity));
        figures.best_sellers.truncate(BEST);
        by_start.entry(start).or_default().push(figures);
    }
    by_start
}

/// A span of whole windows of one size that has all orders in it.
pub(crate) fn span(
    times: impl Iterator<Item = DateTime<Utc>>,
    seconds: i64,
) -> Option<[prost_types::Timestamp; 2]> {
    let starts = times.map(|at| at.timestamp().div_euclid(seconds) * seconds);
    let (first, last) = starts.fold((i64::MAX, i64::MIN), |(first, last), start| {
        (first.min(start), last.max(start))
    });
    let at = |seconds| DateTime::from_timestamp(seconds, 0).map(timestamp);
    (first <= last).then_some([at(first)?, at(last + seconds)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn story(at: &str, is_confirmed: bool, is_cancelled: bool, quantities: &[(&str, i64)]) -> Story {
        let lines = quantities.iter().map(|(product, quantity)| ProductSales {
            product_id: (*product).to_owned(),
            quantity: *quantity,
            revenue_minor_units: 3 * quantity,
        });
        Story {
            placed: Some((at.parse().unwrap(), "EUR".to_owned(), lines.collect())),
            is_confirmed,
            is_cancelled,
            received: 30,
            refunded: if is_cancelled { 30 } else { 0 },
        }
    }

    #[test]
    fn orders_count_in_the_window_in_which_they_were_placed() {
        let stories = [
            story("2026-11-21T10:59:59.9Z", true, false, &[("b", 2), ("a", 2)]),
            story("2026-11-21T11:00:00Z", true, true, &[("a", 9)]),
            story("2026-11-21T11:30:00Z", false, false, &[("a", 7)]),
        ];
        let hours = windows(stories.iter(), 3600);
        let [first, second] = &hours.values().map(|figures| &figures[0]).collect::<Vec<_>>()[..] else {
            panic!("{hours:?}");
        };
        let counts = |figures: &SalesFigures| {
            [
                figures.orders_placed,
                figures.orders_confirmed,
                figures.orders_cancelled,
                figures.revenue_minor_units,
                figures.refunded_minor_units,
            ]
        };
        assert_eq!(counts(first), [1, 1, 0, 30, 0]);
        assert_eq!(counts(second), [2, 1, 1, 30, 30]);
        let best: Vec<&str> = first
            .best_sellers
            .iter()
            .map(|sold| sold.product_id.as_str())
            .collect();
        assert_eq!(best, ["a", "b"]);
        assert!(second.best_sellers.is_empty());
        assert_eq!(windows(stories.iter(), 86_400).len(), 1);
    }

    #[test]
    fn a_span_has_whole_windows() {
        let times = ["2026-11-21T10:59:59Z", "2026-11-21T11:00:01Z"].map(|at| at.parse().unwrap());
        let [start, end] = span(times.into_iter(), 3600).unwrap();
        assert_eq!(end.seconds - start.seconds, 2 * 3600);
        assert_eq!(span(std::iter::empty(), 3600), None);
    }
}
