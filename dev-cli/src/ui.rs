//! What a person sees while something takes long: a spinner at a terminal, plain lines otherwise. All on standard
//! error; standard output is for results.

use std::future::Future;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use local_stack::Postgres;

/// Shows that `what` is under way until `work` is done, then how long it took.
pub(crate) async fn step<T>(what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    let started = Instant::now();
    let spinner = spinner(what);
    let result = work.await;
    spinner.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    match &result {
        Ok(_) => eprintln!("  ok    {what} ({seconds:.1} s)"),
        Err(_) => eprintln!("  FAIL  {what} ({seconds:.1} s)"),
    }
    result
}

/// As [`step`], for work that blocks its thread.
pub(crate) async fn blocking_step<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    step(what, async { tokio::task::spawn_blocking(work).await? }).await
}

fn spinner(what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        eprintln!("  ...   {what}");
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner().with_message(what.to_owned());
    if let Ok(style) = ProgressStyle::with_template("  {spinner}     {msg} ({elapsed})") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(Duration::from_millis(120));
    spinner
}

/// Prints a result. Whoever reads may have had enough, as `head` does.
pub(crate) fn print(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Says where PostgreSQL keeps its data, if that is not where one would look.
pub(crate) fn say_where_data_is(postgres: &Postgres, folder: &Path) {
    if !postgres
        .data()
        .starts_with(folder.canonicalize().unwrap_or_default())
    {
        let (data, folder) = (postgres.data().display(), folder.display());
        eprintln!("        PostgreSQL's data is in {data}: its user cannot get into {folder}");
    }
}
