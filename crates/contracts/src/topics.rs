//! Names of the Kafka topics.

/// Events of orders, keyed by order id.
pub const ORDER: &str = "events.order";

/// Events of payments, keyed by payment id.
pub const PAYMENT: &str = "events.payment";

/// Every event topic.
pub const ALL: [&str; 2] = [ORDER, PAYMENT];
