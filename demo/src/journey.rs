//! `demo order`: where one order and its payments have been, from their rows to the read model.

use std::fmt::Write;

use anyhow::{Result, bail};
use chrono::{DateTime, SecondsFormat, Utc};
use contracts::catalogue;
use contracts::shop::order::v1::{Order, OrderStatus};
use contracts::shop::orderquery::v1::order_query_service_client::OrderQueryServiceClient;
use contracts::shop::orderquery::v1::{GetOrderViewRequest, OrderView};
use contracts::shop::payment::v1::{Payment, PaymentStatus};
use envelope::header;
use local_stack::shop::{Addresses, ORDER_QUERY_SVC, SERVICES, events, topics};
use tonic::Status;

use crate::databases::{Databases, EventRow, Mark, OutboxRow};
use crate::rpc::{call, channel};
use crate::topic::{Record, Topics};
use crate::{Where, blocking};

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
        for event in databases
            .events(database, kind.entity_type, Some(options.id))
            .await?
        {
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
        for step in &self.steps {
            self.step(&mut text, step)?;
        }
        writeln!(text, "\nread model")?;
        for (url, answer) in &self.views {
            match answer {
                Ok(view) => {
                    writeln!(
                        text,
                        "  answer     {}, version {}, {} payments ({url})",
                        status(view.status()),
                        view.version,
                        view.payments.len()
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
