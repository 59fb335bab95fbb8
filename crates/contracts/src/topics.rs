//! Names of the Kafka topics.

/// Events of orders, keyed by order id.
pub const ORDER: &str = "events.order";

/// Every event topic.
pub const ALL: [&str; 1] = [ORDER];
