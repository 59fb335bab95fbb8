//! `./dev test`: everything that must hold before a change is done, in the order of how soon it tells.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use local_stack::testing::{self, Endpoints};
use local_stack::{install, paths};

use crate::background::asked_to_end;
use crate::build::cargo;
use crate::stack::TestStack;
use crate::{build, ui};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only this step
    #[arg(long, value_enum)]
    only: Option<Step>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Step {
    /// cargo fmt --check
    Format,
    /// cargo clippy, warnings are errors
    Clippy,
    /// cargo doc, warnings are errors
    Doc,
    /// Dependencies that are declared and not used
    Unused,
    /// Licences and sources of dependencies
    Licences,
    /// All tests, on PostgreSQL and Kafka of their own
    Tests,
}

impl Step {
    const ALL: [Self; 6] = [
        Self::Format,
        Self::Clippy,
        Self::Doc,
        Self::Unused,
        Self::Licences,
        Self::Tests,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Format => "formatting",
            Self::Clippy => "clippy",
            Self::Doc => "documentation",
            Self::Unused => "unused dependencies",
            Self::Licences => "licences and sources",
            Self::Tests => "tests",
        }
    }

    async fn run(self) -> Result<()> {
        match self {
            Self::Format => cargo(&["fmt", "--all", "--check"], &[]).await,
            Self::Clippy => {
                let args = [
                    "clippy",
                    "--release",
                    "--workspace",
                    "--all-targets",
                    "--",
                    "-D",
                    "warnings",
                ];
                cargo(&args, &[]).await
            }
            Self::Doc => {
                let args = ["doc", "--release", "--workspace", "--no-deps"];
                cargo(&args, &[("RUSTDOCFLAGS", "-D warnings".to_owned())]).await
            }
            Self::Unused => unused_dependencies().await,
            Self::Licences => licences().await,
            Self::Tests => tests().await,
        }
    }
}

pub(crate) async fn run(options: Options) -> Result<()> {
    tokio::select! {
        result = all(options) => result,
        asked = asked_to_end() => {
            asked?;
            bail!("interrupted; everything is stopped");
        }
    }
}

async fn all(options: Options) -> Result<()> {
    build::install_missing().await?;
    let mut lines = Vec::new();
    let mut failed = Vec::new();
    for step in Step::ALL
        .into_iter()
        .filter(|step| options.only.is_none_or(|only| only == *step))
    {
        println!("==> {}", step.name());
        let started = Instant::now();
        let result = step.run().await;
        let seconds = started.elapsed().as_secs_f64();
        if let Err(error) = &result {
            eprintln!("error: {error:#}");
            failed.push(step.name());
        }
        let verdict = if result.is_ok() { "ok" } else { "FAILED" };
        lines.push(format!("  {:<22} {verdict:<7} {seconds:>7.1} s", step.name()));
    }
    println!("\n{}", lines.join("\n"));
    if failed.is_empty() {
        println!("all steps passed");
        return Ok(());
    }
    bail!("failed: {}", failed.join(", "));
}

async fn tests() -> Result<()> {
    // Tests across processes start binaries of the workspace; cargo test alone would leave them out or old.
    build::processes().await?;
    let mut stack = TestStack::start(&paths::target_dir()?.join("test-run")).await?;
    let Endpoints {
        postgres_url,
        kafka_brokers,
    } = stack.endpoints();
    testing::remove_test_folders()?;
    let args = ["test", "--release", "--workspace", "--no-fail-fast"];
    let env = [
        ("TEST_POSTGRES_URL", postgres_url),
        ("TEST_KAFKA_BROKERS", kafka_brokers),
    ];
    let result = cargo(&args, &env).await;
    stack.stop().await?;
    result
}

async fn unused_dependencies() -> Result<()> {
    let machete = tool("cargo-machete", "0.9.2").await?;
    check(
        Command::new(machete),
        "some dependencies are declared and not used, see above",
    )
}

async fn licences() -> Result<()> {
    let deny = tool("cargo-deny", "0.20.2").await?;
    let mut command = Command::new(deny);
    command.args(["check", "licenses", "bans", "sources"]);
    check(command, "deny.toml does not allow some dependencies, see above")
}

fn check(mut command: Command, problem: &'static str) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command
        .status()
        .with_context(|| format!("{program} did not start"))?;
    if !status.success() {
        bail!(problem);
    }
    Ok(())
}

/// A tool written in Rust: as it is installed, or our own build of it.
async fn tool(name: &str, version: &str) -> Result<PathBuf> {
    let root = paths::target_dir()?.join("tools");
    let ours = root.join("bin").join(name);
    if ours.is_file() {
        return Ok(ours);
    }
    if let Some(path) = install::optional(name) {
        return Ok(path.into());
    }
    let root = root.to_string_lossy().into_owned();
    let package = format!("{name}@{version}");
    let args = [
        "install",
        "--quiet",
        "--locked",
        "--no-default-features",
        "--root",
        &root,
        &package,
    ];
    // It runs for a moment: what counts is how soon it is built.
    let quick = [
        ("CARGO_PROFILE_RELEASE_LTO", "off".to_owned()),
        ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1".to_owned()),
        ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16".to_owned()),
    ];
    ui::step(
        &format!("installing {name} (the first time takes minutes)"),
        cargo(&args, &quick),
    )
    .await?;
    Ok(ours)
}
