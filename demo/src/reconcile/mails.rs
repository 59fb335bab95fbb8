//! Mails: one for each event that users are told of, sent once, to an address of whom it concerns.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use contracts::catalogue::{order as order_types, payment as payment_types};
use contracts::shop::order::v1::Order;
use local_stack::shop::MAIL_DOMAIN;
use local_stack::smtp::Mail;
use uuid::Uuid;

use super::Parts;
use crate::databases::MailRow;

/// The events that users are told of.
const ANSWERED: [&str; 5] = [
    order_types::PLACED,
    order_types::CONFIRMED,
    order_types::SHIPPED,
    order_types::CANCELLED,
    payment_types::REFUNDED,
];

/// What does not fit. Each event that is to be answered has its row and no other event has; what is sent, the mail server has once, and
/// there is an event of it; what is not known it has once at most, and there is nothing else.
pub(super) fn compare(parts: &Parts) -> Vec<String> {
    let mut problems = Vec::new();
    let mut rows: BTreeMap<Uuid, &MailRow> = parts
        .mails
        .iter()
        .map(|mail| (mail.notification_id, mail))
        .collect();
    let mut received: BTreeMap<&str, Vec<&Mail>> = BTreeMap::new();
    for mail in &parts.received {
        received.entry(mail.header("message-id")).or_default().push(mail);
    }
    let addresses = Addresses::of(parts);
    let mut sent = BTreeSet::new();
    let events = parts.sources.iter().flat_map(|source| &source.events);
    for event in events.filter(|event| ANSWERED.contains(&event.event_type.as_str())) {
        let what = format!("the mail about {} {}", event.event_type, event.event_id);
        let Some(row) = rows.remove(&event.event_id) else {
            problems.push(format!("{what} was never thought of"));
            continue;
        };
        if row.event_type != event.event_type {
            problems.push(format!("{what} answers a {}", row.event_type));
        }
        let id = format!("<{}@{MAIL_DOMAIN}>", event.event_id);
        let copies = received.remove(id.as_str()).unwrap_or_default();
        let fits = match row.state.as_str() {
            "sent" => {
                sent.insert(event.event_id.to_string());
                copies.len() == 1
            }
            "unknown" => copies.len() <= 1,
            _ => false,
        };
        if !fits {
            let (state, copies) = (&row.state, copies.len());
            problems.push(format!(
                "{what} is {state}, and the mail server has {copies} of it"
            ));
        }
        for mail in copies {
            problems.extend(addresses.wrong(row, mail).map(|wrong| format!("{what} {wrong}")));
        }
    }
    problems.extend(
        rows.keys()
            .map(|id| format!("mail {id} answers no event of the shop's")),
    );
    problems.extend(
        received
            .keys()
            .map(|id| format!("the mail server has {id}, which is no mail of ours")),
    );

    let told: BTreeSet<String> = parts
        .events_of(contracts::topics::NOTIFICATION)
        .map(|event| event.entity_id.clone())
        .collect();
    problems.extend(told.symmetric_difference(&sent).map(|id| {
        format!("of mail {id} there is an event and it was not sent, or it was sent and there is none")
    }));
    problems
}

/// Where mails may go.
struct Addresses<'a> {
    orders: HashMap<&'a str, &'a Order>,
    users: HashMap<&'a str, &'a [String]>,
}

impl<'a> Addresses<'a> {
    fn of(parts: &'a Parts) -> Self {
        let orders = parts.orders.iter();
        let users = parts.users.iter();
        Self {
            orders: orders.map(|order| (order.order_id.as_str(), order)).collect(),
            users: users
                .map(|told| (told.user.user_id.as_str(), told.emails.as_slice()))
                .collect(),
        }
    }

    /// What is wrong with how a mail was sent.
    fn wrong(&self, row: &MailRow, mail: &Mail) -> Option<&'static str> {
        let order = self.orders.get(row.order_id.as_str());
        let right = match order {
            None => &[][..],
            // An order's own address goes first.
            Some(order) if !order.user_email.is_empty() => std::slice::from_ref(&order.user_email),
            Some(order) => self
                .users
                .get(order.user_id.as_str())
                .copied()
                .unwrap_or_default(),
        };
        match mail.recipients.as_slice() {
            [recipient] if right.contains(recipient) => {}
            _ => return Some("went to somebody else"),
        }
        if !mail.encrypted || mail.login != local_stack::smtp::USER {
            return Some("was not encrypted, or sent without a login");
        }
        (!mail.text.contains(&row.order_id) || !mail.html.contains(&row.order_id))
            .then_some("does not name its order")
    }
}
