//! `./dev test`: everything that must hold before a change is done, in the order of how soon it tells.

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
    /// All tests, on PostgreSQL and Kafka of their own
    Tests,
}

impl Step {
    const ALL: [Self; 5] = [Self::Format, Self::Clippy, Self::Doc, Self::Unused, Self::Tests];

    fn name(self) -> &'static str {
        match self {
            Self::Format => "formatting",
            Self::Clippy => "clippy",
            Self::Doc => "documentation",
            Self::Unused => "unused dependencies",
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
    const VERSION: &str = "0.9.2";
    let root = paths::target_dir()?.join("tools");
    let ours = root.join("bin/cargo-machete");
    let machete = if ours.is_file() {
        ours
    } else if let Some(path) = install::optional("cargo-machete") {
        path.into()
    } else {
        let install = format!("cargo-machete@{VERSION}");
        let root = root.to_string_lossy().into_owned();
        ui::step("installing cargo-machete", async {
            cargo(
                &["install", "--quiet", "--locked", "--root", &root, &install],
                &[],
            )
            .await
        })
        .await?;
        ours
    };
    let status = Command::new(machete)
        .status()
        .context("cargo-machete did not start")?;
    if !status.success() {
        bail!("some dependencies are declared and not used, see above");
    }
    Ok(())
}
