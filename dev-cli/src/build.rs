//! Building the workspace, and installing what that needs.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use local_stack::{install, kafka};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::ui;

/// Installs what is missing: packages, then Kafka's jars.
pub(crate) async fn install_missing() -> Result<()> {
    if install::needs().iter().any(|need| need.found.is_none()) {
        ui::blocking_step("system packages", || {
            install::install_missing(&|what| eprintln!("        {what}"))
        })
        .await?;
    }
    if !kafka::jars_dir()?.is_dir() {
        ui::blocking_step("Kafka's jars, by Maven", kafka::fetch_jars).await?;
    }
    Ok(())
}

/// The same build for everything: processes, demo and tests share it.
pub(crate) async fn processes() -> Result<()> {
    // This tool itself is built already, and running.
    let args = [
        "build",
        "--release",
        "--workspace",
        "--exclude",
        "dev-cli",
        "--bins",
    ];
    eprintln!("  ...   cargo build --release (the first time takes minutes)");
    let started = Instant::now();
    cargo(&args, &[]).await?;
    eprintln!(
        "  ok    cargo build --release ({:.1} s)",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// These packages alone, with their own features and no others.
pub(crate) async fn packages(names: &[&str]) -> Result<()> {
    let named = names.iter().flat_map(|name| ["--package", name]);
    let args: Vec<&str> = ["build", "--release"].into_iter().chain(named).collect();
    cargo(&args, &[]).await
}

/// Runs Cargo with its output where ours goes. It ends, with all that it started, when this is dropped.
pub(crate) async fn cargo(args: &[&str], env: &[(&str, String)]) -> Result<()> {
    let mut child = tokio::process::Command::new("cargo")
        .args(args)
        .envs(env.iter().map(|(name, value)| (name, value)))
        // A group of its own, by which to end compilers and tests too.
        .process_group(0)
        .spawn()
        .context("cargo did not start")?;
    let group = Group(child.id().and_then(|id| id.try_into().ok()).map(Pid::from_raw));
    let status = child.wait().await?;
    group.has_ended();
    if !status.success() {
        bail!("cargo {} failed ({status})", args.join(" "));
    }
    Ok(())
}

/// A process group, killed when dropped.
struct Group(Option<Pid>);

impl Group {
    fn has_ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // It may have ended just now.
            let _ = killpg(leader, Signal::SIGKILL);
        }
    }
}
