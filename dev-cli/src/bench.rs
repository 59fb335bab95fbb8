//! `./dev bench`: builds what is measured as it is released, and hands over to the `bench` program.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context, Result};
use local_stack::{debezium, install, paths};

use crate::{build, ui};

/// Handed on as they are; the program says what there is.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Comes back only when it fails.
pub(crate) async fn inventory(arguments: &Arguments) -> Result<()> {
    build::install_missing().await?;
    hand_over("inventory", &["inventory-svc"], arguments).await
}

/// Comes back only when it fails.
pub(crate) async fn relay(arguments: &Arguments) -> Result<()> {
    build::install_missing().await?;
    ui::blocking_step("Debezium's jars", debezium::fetch_jars).await?;
    hand_over("relay", &["outbox-relay"], arguments).await
}

/// Comes back only when it fails.
pub(crate) async fn consumer(arguments: &Arguments) -> Result<()> {
    build::install_missing().await?;
    let measured = ["order-query-svc", "order-svc", "outbox-relay"];
    hand_over("consumer", &measured, arguments).await
}

/// Comes back only when it fails.
pub(crate) async fn commands(arguments: &Arguments) -> Result<()> {
    build::install_missing().await?;
    ui::blocking_step("ghz", || install::ghz().map(drop)).await?;
    let measured = ["order-svc", "payment-svc", "payment-sandbox"];
    hand_over("commands", &measured, arguments).await
}

async fn hand_over(benchmark: &str, measured: &[&str], arguments: &Arguments) -> Result<()> {
    // Not with the whole workspace, whose tests switch failpoints on.
    build::packages(&[&["bench"], measured].concat()).await?;
    let error = Command::new(paths::binary("bench")?)
        .arg(benchmark)
        .args(&arguments.arguments)
        .exec();
    Err(error).context("the benchmark did not start")
}
