//! `./dev bench`: builds what is measured as it is released, and hands over to the `bench` program.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context, Result};
use local_stack::{debezium, paths};

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
    build::packages(&["bench", "inventory-svc"]).await?;
    hand_over("inventory", arguments)
}

/// Comes back only when it fails.
pub(crate) async fn relay(arguments: &Arguments) -> Result<()> {
    build::install_missing().await?;
    // Not with the whole workspace, whose tests switch failpoints on.
    build::packages(&["bench", "outbox-relay"]).await?;
    ui::blocking_step("Debezium's jars", debezium::fetch_jars).await?;
    hand_over("relay", arguments)
}

fn hand_over(what: &str, arguments: &Arguments) -> Result<()> {
    let error = Command::new(paths::binary("bench")?)
        .arg(what)
        .args(&arguments.arguments)
        .exec();
    Err(error).context("the benchmark did not start")
}
