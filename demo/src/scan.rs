//! `demo scan`: looks for card numbers and CVVs in everything that a run has left: databases, dumps, topics, logs, traces, mails, and
//! what the payment provider keeps.
//!
//! A scan that finds nothing says little about what it looked through, so it proves itself first, each time: in each kind of place it
//! plants card data, and has to find all of it there. The plants are gone before the real scan begins.

mod places;
mod plants;

use std::path::PathBuf;

use anyhow::{Result, bail};
use card_scan::Scanner;
use local_stack::cards;
use local_stack::shop::Addresses;

use crate::Where;
use crate::databases::Databases;
use crate::plan::Load;
use places::Place;

const FINDINGS_SHOWN: usize = 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    at: Where,
    /// The program pg_dump, of the server's version
    #[arg(long, default_value = "pg_dump")]
    pg_dump: PathBuf,
    /// The folder of the logs
    #[arg(long)]
    logs: PathBuf,
    /// The folder in which `demo collect` keeps spans
    #[arg(long)]
    traces: PathBuf,
    /// URL of `demo collect`
    #[arg(long)]
    collector: String,
    /// The file in which the payment sandbox keeps what it knows
    #[arg(long)]
    storage: PathBuf,
    /// Of the load whose cards were used: how many orders
    #[arg(long, default_value_t = 0)]
    orders: u32,
    /// Of the load whose cards were used: its seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

pub(crate) async fn run(options: Options) -> Result<()> {
    let addresses = Addresses::read(&options.at.addresses)?;
    let planted = plants::find_all(&options, &addresses).await?;

    let used = Load::generate(options.orders, options.seed);
    let scanner = Scanner::new(used.card_numbers().chain([cards::VISA]));
    let databases = Databases::connect(&addresses).await?;
    let mut places = Vec::new();
    for (name, url) in &addresses.databases {
        places.push(places::dump(&options.pg_dump, name, url).await?);
        places.extend(places::tables(name, databases.client(name)?).await?);
    }
    places.extend(places::topics(&addresses.brokers, places::Which::All).await?);
    places.extend(places::logs(&options.logs)?);
    places.extend(places::files("traces", &options.traces)?);
    places.push(Place::file("the provider's storage", &options.storage)?);
    places.push(Place::file("mails", &addresses.mails)?);
    report(&scanner, &places, planted)
}

fn report(scanner: &Scanner, places: &[Place], planted: usize) -> Result<()> {
    let mut findings = Vec::new();
    for place in places {
        let found = scanner.scan(&place.bytes);
        findings.extend(found.iter().map(|finding| format!("{}: {finding}", place.name)));
    }
    if !findings.is_empty() {
        for finding in findings.iter().take(FINDINGS_SHOWN) {
            println!("{finding}");
        }
        bail!("card data was found in {} places", findings.len());
    }
    let bytes: usize = places.iter().map(|place| place.bytes.len()).sum();
    println!(
        "card data: none in {:.1} MB of databases, dumps, topics, logs, traces, mails and the provider's storage; \
         planted: found all {planted}",
        bytes as f64 / 1e6
    );
    Ok(())
}
