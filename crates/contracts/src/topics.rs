//! Names of the Kafka topics.

/// Events of orders, keyed by order id.
pub const ORDER: &str = "events.order";

/// Events of payments, keyed by payment id.
pub const PAYMENT: &str = "events.payment";

/// Events of users, keyed by user id.
pub const USER: &str = "events.user";

/// Events of reservations, keyed by order id.
pub const INVENTORY: &str = "events.inventory";

/// Events of the stock of products, keyed by product id.
pub const STOCK: &str = "events.stock";

/// Events of mails, keyed by the id of the event that they answer.
pub const NOTIFICATION: &str = "events.notification";

/// Events of the figures of windows, keyed by size and start.
pub const ORDER_ANALYTICS: &str = "events.order_analytics";
