//! Stock: every piece is where orders and the warehouse have put it.

use std::collections::{BTreeMap, HashMap};

use contracts::catalogue::stock as types;
use contracts::shop::inventory::events::v1::StockUpdated;
use contracts::shop::inventory::v1::Stock;
use contracts::shop::order::v1::OrderStatus;
use envelope::header;
use prost::Message as _;

use super::Parts;

/// What does not fit. Per product, what is available, reserved and sold is what the warehouse put there; what is reserved is what open
/// orders want, and what is sold what confirmed ones have. The rows are what the topic tells last and what GetStock answers, and each order
/// has the reservation that its end asks for.
pub(super) fn compare(parts: &Parts) -> Vec<String> {
    let mut problems = Vec::new();
    let mut wanted: HashMap<&str, (i64, i64)> = HashMap::new();
    for order in &parts.orders {
        let status = order.status();
        for item in &order.items {
            let (open, sold) = wanted.entry(&item.product_id).or_default();
            match status {
                OrderStatus::Pending | OrderStatus::Paid => *open += i64::from(item.quantity),
                OrderStatus::Confirmed | OrderStatus::Shipped | OrderStatus::Delivered => {
                    *sold += i64::from(item.quantity);
                }
                OrderStatus::Cancelled | OrderStatus::Unspecified => {}
            }
        }
    }
    let told = told_by_topic(parts, &mut problems);
    let answers: HashMap<&str, &Stock> = parts
        .stock_answers
        .iter()
        .map(|answer| (answer.product_id.as_str(), answer))
        .collect();
    let mut rows: BTreeMap<&str, &Stock> = parts
        .stock
        .iter()
        .map(|row| (row.product_id.as_str(), row))
        .collect();
    for (product, stocked) in &parts.stocked {
        let Some(row) = rows.remove(product.as_str()) else {
            problems.push(format!(
                "product {product} was put into the warehouse and is not there"
            ));
            continue;
        };
        let (open, sold) = wanted.remove(product.as_str()).unwrap_or_default();
        if row.available + row.reserved + row.sold != *stocked {
            problems.push(format!(
                "there were {stocked} pieces of a product, and there are {row:?}"
            ));
        }
        if row.available < 0 || (row.reserved, row.sold) != (open, sold) {
            problems.push(format!(
                "orders want {open} pieces of a product and have {sold}, and there are {row:?}"
            ));
        }
        if told.get(product) != Some(row) {
            problems.push(format!(
                "the topic tells {:?} last, and the row of state is {row:?}",
                told.get(product)
            ));
        }
        if answers.get(product.as_str()) != Some(&row) {
            problems.push(format!(
                "GetStock answers {:?}, and the row of state is {row:?}",
                answers.get(product.as_str())
            ));
        }
    }
    problems.extend(rows.values().map(|row| format!("nobody has put there {row:?}")));
    problems.extend(wrong_reservations(parts));
    problems
}

/// Stock as the topic tells of it, last version by last version.
fn told_by_topic(parts: &Parts, problems: &mut Vec<String>) -> HashMap<String, Stock> {
    let mut told: HashMap<String, Stock> = HashMap::new();
    let records = parts.sources.iter().flat_map(|source| &source.records);
    for record in records.filter(|record| record.header(header::CE_TYPE) == Some(types::UPDATED)) {
        let version = record.header(header::AGGREGATE_VERSION);
        let version = version
            .and_then(|version| version.parse().ok())
            .unwrap_or_default();
        match StockUpdated::decode(record.payload.as_deref().unwrap_or_default()) {
            Ok(event) => {
                let stock = Stock {
                    product_id: event.product_id,
                    available: event.available,
                    reserved: event.reserved,
                    sold: event.sold,
                    version,
                    updated_at: event.updated_at,
                };
                // A repeat may come after what has happened since.
                if told
                    .get(&stock.product_id)
                    .is_none_or(|known| known.version < version)
                {
                    told.insert(stock.product_id.clone(), stock);
                }
            }
            Err(error) => problems.push(format!(
                "a record of {} is not understood: {error}",
                types::UPDATED
            )),
        }
    }
    told
}

/// Orders whose reservation does not fit their end.
fn wrong_reservations(parts: &Parts) -> Vec<String> {
    let mut reservations: HashMap<&str, &str> = parts
        .reservations
        .iter()
        .map(|reservation| (reservation.order_id.as_str(), reservation.status.as_str()))
        .collect();
    let mut problems = Vec::new();
    for order in &parts.orders {
        let found = reservations.remove(order.order_id.as_str());
        let fits = match order.status() {
            OrderStatus::Confirmed | OrderStatus::Shipped | OrderStatus::Delivered => {
                found == Some("committed")
            }
            OrderStatus::Cancelled => matches!(found, Some("released" | "rejected")),
            _ => true,
        };
        if !fits {
            problems.push(format!(
                "order {} is {:?}, and its reservation is {found:?}",
                order.order_id,
                order.status()
            ));
        }
    }
    let unknown = reservations.keys();
    problems.extend(unknown.map(|order| format!("there is no order {order}, and it has a reservation")));
    problems
}
