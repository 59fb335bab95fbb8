//! Card data where there should be none, to see the scan find it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use card_scan::{Scanner, What};
use contracts::shop::payment::v1::Card;
use local_stack::shop::Addresses;
use local_stack::{cards, postgres};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use prost::Message as _;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};

use super::Options;
use super::places::{self, Place, Which};
use crate::rpc::channel;

/// Of everything that is made for a plant.
const NAME: &str = "card-scan-plant";
const LIMIT: Duration = Duration::from_secs(30);
const CVV: &str = "917";

/// What has to be found in a place.
struct Expected {
    place: Place,
    /// The last four digits of the numbers that are in it.
    numbers: Vec<String>,
    /// How many CVVs are in it.
    cvvs: usize,
}

/// Plants, finds all of it, and removes it; how many plants there were.
pub(super) async fn find_all(options: &Options, addresses: &Addresses) -> Result<usize> {
    // Not the numbers of the load, and not known to the scanner: what nobody knows has to be found, too.
    let mut cards = (1u64 << 36..).map(cards::fine);
    let mut card = move || cards.next().unwrap_or_default();
    let mut planted = Vec::new();
    planted.extend(database(options, addresses, &mut card).await?);
    planted.push(topic(&addresses.brokers, &mut card).await?);
    planted.push(log(options, &mut card)?);
    planted.push(span(options, &mut card).await?);
    planted.push(storage(options, &mut card)?);
    let mut plants = 0;
    for expected in &planted {
        expected.check()?;
        plants += expected.numbers.len() + expected.cvvs;
    }
    Ok(plants)
}

impl Expected {
    fn check(&self) -> Result<()> {
        let found = Scanner::default().scan(&self.place.bytes);
        let numbers = found.iter().filter_map(|finding| match finding.what {
            What::Number { last_four } => Some(String::from_utf8_lossy(&last_four).into_owned()),
            _ => None,
        });
        let numbers: Vec<String> = numbers.collect();
        for number in &self.numbers {
            if !numbers.contains(&number[number.len() - 4..].to_owned()) {
                bail!(
                    "the scan is blind: it has not found a card number planted in {}",
                    self.place.name
                );
            }
        }
        let cvvs = found.iter().filter(|finding| finding.what == What::Cvv).count();
        if cvvs < self.cvvs {
            bail!(
                "the scan is blind: it has found {cvvs} of {} CVVs planted in {}",
                self.cvvs,
                self.place.name
            );
        }
        Ok(())
    }
}

/// As a service would send it to the provider.
fn message(number: &str) -> Vec<u8> {
    let card = Card {
        number: number.to_owned(),
        expiry_month: 12,
        expiry_year: 2030,
        cvv: CVV.to_owned(),
    };
    card.encode_to_vec()
}

/// In text, in a column of its own, and in Protobuf in a bytea; found in the dump, and in the table.
async fn database(
    options: &Options,
    addresses: &Addresses,
    card: &mut impl FnMut() -> String,
) -> Result<[Expected; 2]> {
    let server = addresses
        .databases
        .values()
        .next()
        .context("there is no database")?;
    let name = NAME.replace('-', "_");
    let url = postgres::with_database(server, &name);
    let admin = postgres::connect(server).await?;
    let remove = format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)");
    // Left by a scan that was broken off.
    admin.batch_execute(&remove).await?;
    admin.batch_execute(&format!("CREATE DATABASE {name}")).await?;
    let client = postgres::connect(&url).await?;
    client
        .batch_execute("CREATE TABLE plants (id bigint, note text, cvv text, payload bytea)")
        .await?;
    let (in_text, in_bytes) = (card(), card());
    client
        .execute(
            "INSERT INTO plants VALUES (1, $1, $2, $3)",
            &[&format!("card {in_text}, cvc: {CVV}"), &CVV, &message(&in_bytes)],
        )
        .await?;
    let dump = places::dump(&options.pg_dump, NAME, &url).await?;
    let mut tables = places::tables(NAME, &client).await?;
    drop(client);
    admin.batch_execute(&remove).await?;
    let table = tables.pop().context("the table of the plants is missing")?;
    let numbers = vec![in_text, in_bytes];
    Ok([
        Expected {
            place: dump,
            numbers: numbers.clone(),
            cvvs: 3,
        },
        Expected {
            place: table,
            numbers,
            // In a binary row, nothing says what a column is called.
            cvvs: 2,
        },
    ])
}

/// In key, header and value.
async fn topic(brokers: &str, card: &mut impl FnMut() -> String) -> Result<Expected> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    let admin: AdminClient<DefaultClientContext> = config.create().context("no Kafka client")?;
    let name = format!("{NAME}-{}", uuid::Uuid::new_v4());
    let new = NewTopic::new(&name, 1, TopicReplication::Fixed(1));
    let options = AdminOptions::new().operation_timeout(Some(LIMIT));
    for made in admin.create_topics([&new], &options).await? {
        if let Err((_, code)) = made {
            bail!("the topic of the plants cannot be made: {code}");
        }
    }
    let numbers = [card(), card(), card()];
    let producer: FutureProducer = config.create().context("no Kafka producer")?;
    let value = message(&numbers[2]);
    let header = format!("{}&card[cvc]={CVV}", numbers[1]);
    let record = FutureRecord::to(&name)
        .key(&numbers[0])
        .headers(OwnedHeaders::new().insert(Header {
            key: "note",
            value: Some(&header),
        }))
        .payload(&value);
    if let Err((error, _)) = producer.send(record, LIMIT).await {
        bail!("nothing could be planted on Kafka: {error}");
    }
    let place = places::topics(brokers, Which::One(name.clone())).await?.pop();
    for removed in admin.delete_topics(&[&name], &options).await? {
        if let Err((_, code)) = removed {
            bail!("the topic of the plants cannot be removed: {code}");
        }
    }
    Ok(Expected {
        place: place.context("the topic of the plants is missing")?,
        numbers: numbers.into(),
        cvvs: 2,
    })
}

/// In a line like those of the services.
fn log(options: &Options, card: &mut impl FnMut() -> String) -> Result<Expected> {
    let number = card();
    let path = options.logs.join(format!("{NAME}.log"));
    let line =
        format!("{{\"level\":\"INFO\",\"message\":\"charging {number}\",\"card\":{{\"cvv\":\"{CVV}\"}}}}\n");
    std::fs::write(&path, line)?;
    let of_plant = |place: &Place| place.name.contains(NAME);
    let place = places::logs(&options.logs)?.into_iter().find(of_plant);
    std::fs::remove_file(path)?;
    Ok(Expected {
        place: place.context("the log of the plants is missing")?,
        numbers: vec![number],
        cvvs: 1,
    })
}

/// In the attributes of a span that goes the way of all spans.
async fn span(options: &Options, card: &mut impl FnMut() -> String) -> Result<Expected> {
    let number = card();
    let attribute = |key: &str, value: &str| KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue {
            value: Some(Value::StringValue(value.to_owned())),
        }),
        ..KeyValue::default()
    };
    let span = Span {
        name: "charge".to_owned(),
        attributes: vec![attribute("card.number", &number), attribute("card.cvv", CVV)],
        ..Span::default()
    };
    let spans = ResourceSpans {
        resource: Some(Resource {
            attributes: vec![attribute("service.name", NAME)],
            ..Resource::default()
        }),
        scope_spans: vec![ScopeSpans {
            spans: vec![span],
            ..ScopeSpans::default()
        }],
        ..ResourceSpans::default()
    };
    let request = ExportTraceServiceRequest {
        resource_spans: vec![spans],
    };
    let mut collector = TraceServiceClient::new(channel(&options.collector)?);
    tokio::time::timeout(LIMIT, collector.export(request))
        .await
        .context("the collector does not answer")?
        .context("the collector does not take a span")?;
    let path: PathBuf = options.traces.join(format!("{NAME}.otlp"));
    let of_plant = |place: &Place| place.name.contains(NAME);
    let place = places::files("traces", &options.traces)?
        .into_iter()
        .find(of_plant);
    std::fs::remove_file(path)?;
    Ok(Expected {
        place: place.context("the span of the plants is missing")?,
        numbers: vec![number],
        cvvs: 1,
    })
}

/// In a file like the provider's.
fn storage(options: &Options, card: &mut impl FnMut() -> String) -> Result<Expected> {
    let number = card();
    let path = options.storage.with_file_name(format!("{NAME}.redb"));
    let record = format!("\0\x1f\0\0{{\"number\":\"{number}\",\"cvc\":\"{CVV}\"}}\0\0");
    std::fs::write(&path, record)?;
    let place = Place::file("the provider's storage", &path);
    std::fs::remove_file(path)?;
    Ok(Expected {
        place: place?,
        numbers: vec![number],
        cvvs: 1,
    })
}
