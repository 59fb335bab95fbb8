//! `demo order`: where one order, its payments, its reservation and its mails have been, from their rows to the read model.

use std::fmt::Write;
use std::time::Duration;

use anyhow::{Result, bail};
use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use contracts::catalogue;
use contracts::shop::order::v1::{Order, OrderStatus};
use contracts::shop::orderquery::v1::order_query_service_client::OrderQueryServiceClient;
use contracts::shop::orderquery::v1::{
    GetOrderJourneyRequest, GetOrderJourneyResponse, GetOrderViewRequest, JourneyEvent, OrderView,
};
use contracts::shop::payment::v1::{Payment, PaymentStatus};
use contracts::wire;
use envelope::header;
use local_stack::shop::{Addresses, ORDER_QUERY_SVC, SERVICES, events, topics};
use tonic::{Request, Status};

use crate::databases::{Databases, EventRow, Mark, OutboxRow};
use crate::rpc::{call, channel};
use crate::topic::{Record, Topics};
use crate::{Where, blocking};

/// How long an instance is waited for: another one may answer.
const JOURNEY_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    at: Where,
    /// The order
    #[arg(long)]
    id: uuid::Uuid,
}

pub(crate) async fn show(options: Options) -> Result<()> {
    let addresses = Addresses::read(&options.at.addresses)?;
    let id = options.id.to_string();
    let databases = Databases::connect(&addresses).await?;
    let Some(order) = databases.orders(Some(&id)).await?.pop() else {
        bail!("there is no order {id}")
    };
    let brokers = addresses.brokers.clone();
    let records = blocking(move || Topics::open(&brokers, &topics())?.read()).await?;
    let mut steps = Vec::new();
    for ((database, kind), records) in events().into_iter().zip(records) {
        let mut outbox = databases
            .outbox(database, kind.entity_type, Some(options.id))
            .await?;
        for event in databases.events(database, kind, Some(options.id)).await? {
            let row = outbox.iter().position(|row| row.event.event_id == event.event_id);
            let row = row.map(|index| outbox.swap_remove(index));
            let is_of = |record: &&Record| {
                let id = row.as_ref().map(|row| row.id.to_string());
                id.is_some() && record.header(header::OUTBOX_ID) == id.as_deref()
            };
            steps.push(Step {
                records: records.iter().filter(is_of).cloned().collect(),
                event,
                row,
                topic: kind.topic,
            });
        }
    }
    steps.sort_by_key(|step| step.row.as_ref().map(|row| row.committed_at_us));
    let marks = databases.marks("order_query").await?;
    let entities: Vec<&str> = steps.iter().map(|step| step.event.entity_id.as_str()).collect();
    let journey = Journey {
        marks: marks
            .into_iter()
            .filter(|mark| entities.contains(&mark.entity_id.as_str()))
            .collect(),
        payments: databases.payments(Some(&id)).await?,
        views: views(&addresses, &order).await?,
        told: told(&addresses, &order).await?,
        order,
        steps,
    };
    print!("{}", journey.text()?);
    Ok(())
}

type Answers = Vec<(String, Result<OrderView, Status>)>;

/// What each instance of the read model says.
async fn views(addresses: &Addresses, order: &Order) -> Result<Answers> {
    let mut answers = Vec::new();
    for url in addresses.service(ORDER_QUERY_SVC)? {
        let client = OrderQueryServiceClient::new(channel(url)?);
        let request = GetOrderViewRequest {
            user_id: order.user_id.clone(),
            order_id: order.order_id.clone(),
            at_least_version: 0,
        };
        let answer = call(request, |request| {
            let mut client = client.clone();
            async move { client.get_order_view(request).await }
        });
        answers.push((
            url.clone(),
            answer.await.map(|response| response.order.unwrap_or_default()),
        ));
    }
    Ok(answers)
}

/// The journey as the first instance of the read model tells it that answers; nothing when none does.
async fn told(addresses: &Addresses, order: &Order) -> Result<Option<GetOrderJourneyResponse>> {
    for url in addresses.service(ORDER_QUERY_SVC)? {
        let mut client = OrderQueryServiceClient::new(channel(url)?);
        let mut request = Request::new(GetOrderJourneyRequest {
            user_id: order.user_id.clone(),
            order_id: order.order_id.clone(),
            at_least_version: 0,
        });
        request.set_timeout(JOURNEY_LIMIT);
        let answer = tokio::time::timeout(JOURNEY_LIMIT, client.get_order_journey(request)).await;
        if let Ok(Ok(journey)) = answer {
            return Ok(Some(journey.into_inner()));
        }
    }
    Ok(None)
}

/// An event, and where it has been.
struct Step {
    topic: &'static str,
    event: EventRow,
    row: Option<OutboxRow>,
    records: Vec<Record>,
}

struct Journey {
    order: Order,
    payments: Vec<Payment>,
    /// By the order in which they were committed.
    steps: Vec<Step>,
    /// How far the read model has come.
    marks: Vec<Mark>,
    views: Answers,
    told: Option<GetOrderJourneyResponse>,
}

impl Journey {
    fn text(&self) -> Result<String> {
        let mut text = String::new();
        let order = &self.order;
        let total = order.total.clone().unwrap_or_default();
        writeln!(text, "order {}", order.order_id)?;
        writeln!(
            text,
            "  row        {}, version {}",
            status(order.status()),
            order.version
        )?;
        writeln!(text, "  user       {}", order.user_id)?;
        writeln!(
            text,
            "  items      {}, in all {} {} in minor units",
            order.items.len(),
            total.minor_units,
            total.currency_code
        )?;
        if order.status() == OrderStatus::Cancelled {
            writeln!(text, "  cancelled  {}", order.cancel_reason)?;
        }
        for payment in &self.payments {
            write!(
                text,
                "  payment    {}, {} by {} {}",
                payment.payment_id,
                payment_status(payment.status()),
                payment.brand,
                payment.last_four
            )?;
            if let Some(failure) = payment.failure {
                let reason = failure.reason().as_str_name();
                write!(text, ": {}", reason.trim_start_matches("FAILURE_REASON_"))?;
            }
            if !payment.provider_reference.is_empty() {
                write!(text, " (at the provider {})", payment.provider_reference)?;
            }
            writeln!(text)?;
        }
        match &self.told {
            Some(told) => tell(&mut text, told)?,
            None => writeln!(text, "\nno instance of the read model tells of its journey")?,
        }
        for step in &self.steps {
            self.step(&mut text, step)?;
        }
        writeln!(text, "\nread model")?;
        for (url, answer) in &self.views {
            match answer {
                Ok(view) => {
                    writeln!(
                        text,
                        "  answer     {}, version {}, {} payments{} ({url})",
                        status(view.status()),
                        view.version,
                        view.payments.len(),
                        if view.parked { ", PARKED" } else { "" }
                    )?;
                }
                Err(refusal) => writeln!(
                    text,
                    "  answer     {:?}: {} ({url})",
                    refusal.code(),
                    refusal.message()
                )?,
            }
        }
        Ok(text)
    }

    fn step(&self, text: &mut String, step: &Step) -> Result<()> {
        let event = &step.event;
        writeln!(
            text,
            "\n{} (version {} of {} {})",
            event.event_type, event.version, event.entity_type, event.entity_id
        )?;
        writeln!(text, "  event      {}", event.event_id)?;
        let trace = event
            .traceparent
            .as_deref()
            .and_then(|parent| parent.split('-').nth(1));
        writeln!(text, "  trace      {}", trace.unwrap_or("not traced"))?;
        match catalogue::payload_json(&event.event_type, event.schema_version, &event.payload) {
            Ok(payload) => writeln!(text, "  payload    {payload}")?,
            Err(error) => writeln!(text, "  payload    {} bytes: {error}", event.payload.len())?,
        }
        let Some(row) = &step.row else {
            writeln!(text, "  outbox     NO ROW")?;
            return Ok(());
        };
        writeln!(
            text,
            "  outbox     row {}, committed {}",
            row.id,
            time(row.committed_at_us)
        )?;
        let mut records = step.records.iter();
        match records.next() {
            Some(record) => {
                let after = (record.appended_at_ms as f64 - row.committed_at_us as f64 / 1e3).max(0.0);
                writeln!(
                    text,
                    "  Kafka      {}, partition {}, offset {}, {after:.1} ms after the commit",
                    step.topic, record.partition, record.offset
                )?;
            }
            None => writeln!(text, "  Kafka      not there yet")?,
        }
        for repeat in records {
            writeln!(text, "             repeated at offset {}", repeat.offset)?;
        }
        let mut readers = SERVICES.iter().filter(|service| service.name == ORDER_QUERY_SVC);
        if !readers.any(|service| service.consumes.contains(&step.topic)) {
            return Ok(());
        }
        let mark = self
            .marks
            .iter()
            .find(|mark| mark.topic == step.topic && mark.entity_id == event.entity_id);
        match mark {
            Some(mark) if mark.version == event.version => {
                let after = ((mark.committed_at_us - row.committed_at_us) as f64 / 1e3).max(0.0);
                writeln!(text, "  read model {after:.1} ms after the commit")?;
            }
            Some(mark) if mark.version > event.version => writeln!(text, "  read model taken in")?,
            _ => writeln!(text, "  read model not there yet")?,
        }
        Ok(())
    }
}

/// The read model's part: reservation, mails, every event in a table, and what is parked.
fn tell(text: &mut String, told: &GetOrderJourneyResponse) -> Result<()> {
    match &told.reservation {
        Some(reservation) => {
            let status = reservation.status().as_str_name();
            let status = status.trim_start_matches("RESERVATION_STATUS_");
            writeln!(text, "  stock      {status}, version {}", reservation.version)?;
        }
        None => writeln!(text, "  stock      nothing heard")?,
    }
    for mail in &told.mails {
        let template = mail.template().as_str_name().trim_start_matches("TEMPLATE_");
        writeln!(
            text,
            "  mail       {template}, sent {}",
            moment(wire::time(mail.sent_at.as_ref()))
        )?;
    }
    writeln!(text, "\njourney")?;
    text.push_str(&table(&told.events));
    if told.more_events {
        writeln!(text, "  … and more")?;
    }
    for record in &told.parked {
        let what = match record.event_type.as_str() {
            "" => "a record that cannot be read",
            event_type => event_type,
        };
        writeln!(
            text,
            "  PARKED     {what} at {}/{}/{} since {}: {} (order-query-svc dlt list)",
            record.topic,
            record.partition,
            record.offset,
            moment(wire::time(record.parked_at.as_ref())),
            record.error_kind
        )?;
    }
    Ok(())
}

/// Every event in a line: when it was, how long after the one before, what, where, and in which trace.
fn table(events: &[JourneyEvent]) -> String {
    let mut lines = vec![["time", "after", "event", "version", "place", "trace"].map(str::to_owned)];
    let mut before = None;
    for event in events {
        let at = wire::time(event.occurred_at.as_ref());
        let after = at.zip(before).map(|(at, before)| at - before);
        before = at.or(before);
        let trace = match event.trace_id.as_str() {
            "" => "not traced",
            id => id,
        };
        lines.push([
            moment(at),
            after.map_or_else(String::new, delta),
            event.event_type.clone(),
            event.version.to_string(),
            format!("{}/{}/{}", event.topic, event.partition, event.offset),
            trace.to_owned(),
        ]);
    }
    let width = |column: usize| {
        let cells = lines.iter().map(|line| line[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths = [0, 1, 2, 3, 4, 5].map(width);
    let mut text = String::new();
    for [time, after, event, version, place, trace] in &lines {
        let [w0, w1, w2, w3, w4, _] = widths;
        text.push_str(&format!(
            "  {time:<w0$}  {after:>w1$}  {event:<w2$}  {version:>w3$}  {place:<w4$}  {trace}\n"
        ));
    }
    text
}

/// From one event to the next, as short as it can be read.
fn delta(time: TimeDelta) -> String {
    let ms = time.num_microseconds().unwrap_or(i64::MAX) as f64 / 1e3;
    match ms.abs() {
        short if short < 1_000.0 => format!("{ms:+.1} ms"),
        long if long < 60_000.0 => format!("{:+.2} s", ms / 1e3),
        _ => format!("{:+.1} min", ms / 60e3),
    }
}

fn moment(time: Option<DateTime<Utc>>) -> String {
    time.map_or_else(String::new, |time| self::time(time.timestamp_micros()))
}

fn status(status: OrderStatus) -> &'static str {
    status.as_str_name().trim_start_matches("ORDER_STATUS_")
}

fn payment_status(status: PaymentStatus) -> &'static str {
    status.as_str_name().trim_start_matches("PAYMENT_STATUS_")
}

fn time(microseconds: i64) -> String {
    DateTime::<Utc>::from_timestamp_micros(microseconds).map_or_else(String::new, |time| {
        time.to_rfc3339_opts(SecondsFormat::Micros, true)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journey_is_an_easy_table() {
        let event = |event_type: &str, version, microseconds: i64, trace_id: &str| JourneyEvent {
            event_type: event_type.to_owned(),
            version,
            occurred_at: DateTime::from_timestamp_micros(1_800_000_000_000_000 + microseconds)
                .map(wire::timestamp),
            topic: "events.order".to_owned(),
            partition: 3,
            offset: 17,
            trace_id: trace_id.to_owned(),
            ..JourneyEvent::default()
        };
        let events = [
            event("order.placed", 1, 0, "0af7651916cd43dd8448eb211c80319c"),
            event("order.paid", 2, 12_345, ""),
            event("order.shipped", 10, 90_012_345, ""),
            event("order.completed", 11, 89_012_345, ""),
        ];
        let expected = "  time                            after  event            version  place              trace
  2027-01-15T08:00:00.000000Z            order.placed           1  events.order/3/17  0af7651916cd43dd8448eb211c80319c
  2027-01-15T08:00:00.012345Z  +12.3 ms  order.paid             2  events.order/3/17  not traced
  2027-01-15T08:01:30.012345Z  +1.5 min  order.shipped         10  events.order/3/17  not traced
  2027-01-15T08:01:29.012345Z   -1.00 s  order.completed       11  events.order/3/17  not traced
";
        assert_eq!(table(&events), expected);
    }
}
