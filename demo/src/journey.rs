//! `demo order`: where one order has been, from its row to the read model.

use std::fmt::Write;

use anyhow::{Result, bail};
use chrono::{DateTime, SecondsFormat, Utc};
use contracts::catalogue;
use contracts::shop::order::v1::{Order, OrderStatus};
use contracts::shop::orderquery::v1::{GetOrderViewRequest, OrderView};
use envelope::header;
use tonic::Status;

use crate::Addresses;
use crate::databases::{Committed, Databases, EventRow, OutboxRow};
use crate::rpc::{Clients, call};
use crate::topic::{Record, Topic};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    addresses: Addresses,
    /// The order
    #[arg(long)]
    id: uuid::Uuid,
}

pub(crate) async fn show(options: Options) -> Result<()> {
    let addresses = &options.addresses;
    let id = options.id.to_string();
    let databases = Databases::connect(&addresses.orders_database, &addresses.order_query_database).await?;
    let Some(order) = databases.state(Some(&id)).await?.pop() else {
        bail!("there is no order {id}")
    };
    let (brokers, name) = (addresses.brokers.clone(), addresses.topic.clone());
    let records = tokio::task::spawn_blocking(move || Topic::open(&brokers, &name)?.read()).await??;
    let journey = Journey {
        events: databases.events(Some(&id)).await?,
        outbox: databases.outbox(Some(&id)).await?,
        records: records
            .into_iter()
            .filter(|record| record.key_text() == id)
            .collect(),
        view_row: databases.view_commits(Some(&id)).await?.pop(),
        views: views(addresses, &order).await?,
        topic: addresses.topic.clone(),
        order,
    };
    print!("{}", journey.text()?);
    Ok(())
}

type Answers = Vec<(String, Result<OrderView, Status>)>;

/// What each instance of the read model says.
async fn views(addresses: &Addresses, order: &Order) -> Result<Answers> {
    let clients = Clients::connect(addresses)?;
    let mut answers = Vec::new();
    for (url, client) in addresses.order_query_svc.iter().zip(clients.views) {
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

struct Journey {
    order: Order,
    events: Vec<EventRow>,
    outbox: Vec<OutboxRow>,
    records: Vec<Record>,
    view_row: Option<Committed>,
    views: Answers,
    topic: String,
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
        if !order.cancel_reason.is_empty() {
            writeln!(text, "  cancelled  {}", order.cancel_reason)?;
        }
        for event in &self.events {
            self.event(&mut text, event)?;
        }
        writeln!(text, "\nread model")?;
        match &self.view_row {
            Some(row) => {
                writeln!(
                    text,
                    "  row        version {}, committed {}",
                    row.version,
                    time(row.committed_at_us)
                )?;
                let committed = self
                    .outbox
                    .iter()
                    .find(|outbox| outbox.event.version == row.version);
                if let Some(outbox) = committed {
                    let after = (row.committed_at_us - outbox.committed_at_us) as f64 / 1e3;
                    writeln!(text, "             {after:.1} ms after the order's commit")?;
                }
            }
            None => writeln!(text, "  row        none yet")?,
        }
        for (url, answer) in &self.views {
            match answer {
                Ok(view) => {
                    writeln!(
                        text,
                        "  answer     {}, version {} ({url})",
                        status(view.status()),
                        view.version
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

    fn event(&self, text: &mut String, event: &EventRow) -> Result<()> {
        writeln!(text, "\nversion {}: {}", event.version, event.event_type)?;
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
        let row = self
            .outbox
            .iter()
            .find(|row| row.event.event_id == event.event_id);
        let Some(row) = row else {
            writeln!(text, "  outbox     NO ROW")?;
            return Ok(());
        };
        writeln!(
            text,
            "  outbox     row {}, committed {}",
            row.id,
            time(row.committed_at_us)
        )?;
        let id = row.id.to_string();
        let mut records = self
            .records
            .iter()
            .filter(|record| record.header(header::OUTBOX_ID) == Some(&id));
        match records.next() {
            Some(record) => {
                let after = (record.appended_at_ms as f64 - row.committed_at_us as f64 / 1e3).max(0.0);
                writeln!(
                    text,
                    "  Kafka      {}, partition {}, offset {}, {after:.1} ms after the commit",
                    self.topic, record.partition, record.offset
                )?;
            }
            None => writeln!(text, "  Kafka      not there yet")?,
        }
        for repeat in records {
            writeln!(text, "             repeated at offset {}", repeat.offset)?;
        }
        Ok(())
    }
}

fn status(status: OrderStatus) -> &'static str {
    status.as_str_name().trim_start_matches("ORDER_STATUS_")
}

fn time(microseconds: i64) -> String {
    DateTime::<Utc>::from_timestamp_micros(microseconds).map_or_else(String::new, |time| {
        time.to_rfc3339_opts(SecondsFormat::Micros, true)
    })
}
