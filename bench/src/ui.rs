//! What a person sees while it runs: a spinner at a terminal, plain lines otherwise, on standard error.

use std::future::Future;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};

/// Does `work`, unless somebody ends it first.
pub(crate) async fn unless_ended<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        done = work => done,
        _ = tokio::signal::ctrl_c() => Err(anyhow!("interrupted")),
        _ = terminate.recv() => Err(anyhow!("asked to end")),
    }
}

/// Shows that `what` is under way until `work` is done, then how long it took and what `outcome` says of the result.
pub(crate) async fn step<T>(
    what: impl Into<String>,
    outcome: impl FnOnce(&T) -> String,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let what = what.into();
    let started = Instant::now();
    let spinner = spinner(&what);
    let result = work.await;
    spinner.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    match &result {
        Ok(value) => eprintln!("  ok    {what} ({seconds:.1} s) {}", outcome(value)),
        Err(_) => eprintln!("  FAIL  {what} ({seconds:.1} s)"),
    }
    result.context(what)
}

/// As [`step`], with nothing to say of the result.
pub(crate) async fn quiet_step<T>(
    what: impl Into<String>,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    step(what, |_| String::new(), work).await
}

/// Something is done.
pub(crate) fn done(what: &str) {
    eprintln!("  ok    {what}");
}

/// The heading of what follows.
pub(crate) fn heading(text: &str) {
    eprintln!("==> {text}");
}

fn spinner(what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner().with_message(what.to_owned());
    if let Ok(style) = ProgressStyle::with_template("  {spinner}     {msg} ({elapsed})") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(Duration::from_millis(250));
    spinner
}
