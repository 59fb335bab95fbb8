//! What the tests across processes share: they start the real binaries on real PostgreSQL and Kafka, break them, and look
//! at what came out with eyes of their own. Nothing here uses code of the processes but the generated messages.

pub mod check;
pub mod databases;
pub mod load;
pub mod shop;
pub mod stage;
pub mod topic;
pub mod writers;

use std::time::Duration;

use anyhow::{Context, Result};
use local_stack::Process;
use local_stack::testing::Folder;
use tokio_postgres::Client;

/// For whatever has to happen in the end, also on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Runs a test with a folder for its logs. They stay there when it fails.
///
/// # Panics
/// When the test fails.
pub async fn run(name: &str, test: impl AsyncFnOnce(&Folder) -> Result<()>) {
    let folder = Folder::create(name);
    if let Err(error) = test(&folder).await {
        panic!("{error:?}\nlogs: {}", folder.path().display());
    }
}

/// The seed of a test: `TEST_SEED`, or a new one. It is printed, so that a failure can be had again, as far as the
/// machine's timing allows.
pub fn seed(test: &str) -> u64 {
    let given = std::env::var("TEST_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(rand::random);
    say(&format!("{test}: TEST_SEED={seed}"));
    seed
}

/// A line of a test's output.
#[expect(clippy::print_stdout, reason = "shown with the test's result")]
pub fn say(line: &str) {
    println!("{line}");
}

/// Fails with the first of the problems.
///
/// # Panics
/// When there is any.
#[track_caller]
pub fn assert_sound(problems: &[String]) {
    const SHOWN: usize = 10;
    let shown = problems.iter().take(SHOWN).map(String::as_str);
    assert!(
        problems.is_empty(),
        "{} problems:\n{}",
        problems.len(),
        shown.collect::<Vec<_>>().join("\n")
    );
}

/// Fails unless the read model is as the orders are, and the marks of the consumer `group` are where the entities' events end.
///
/// # Errors
/// When a database does not answer.
pub async fn assert_projected(orders: &Client, views: &Client, group: &str) -> Result<()> {
    assert_sound(&check::same(
        ["orders", "order_views"],
        &databases::states(orders).await?,
        &databases::views(views).await?,
    ));
    assert_sound(&check::same(
        ["the outbox", "consumer_marks"],
        &databases::last_events(orders).await?,
        &databases::marks(views, group).await?,
    ));
    Ok(())
}

/// The sum of a metric's samples that have all of these labels, each written `name="value"`; 0 when there is none.
pub async fn metric(process: &Process, name: &str, labels: &[&str]) -> Result<f64> {
    sum(&process.metrics().await?, name, labels)
}

fn sum(text: &str, name: &str, labels: &[&str]) -> Result<f64> {
    let mut sum = 0.0;
    for line in text.lines() {
        let Some(rest) = line.strip_prefix(name) else {
            continue;
        };
        let (found, value) = match rest.strip_prefix('{') {
            Some(rest) => rest.rsplit_once("} ").context("no value")?,
            None if rest.starts_with(' ') => ("", rest),
            None => continue,
        };
        if labels.iter().all(|label| found.contains(label)) {
            sum += value.trim().parse::<f64>().with_context(|| line.to_owned())?;
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_by_name_and_labels() {
        let text =
            "# HELP a_total x\na_total{x=\"1\",y=\"2\"} 3\na_total{x=\"2\",y=\"2\"} 4\na_total_more 9\nb 5\n";
        assert_eq!(sum(text, "a_total", &[]).expect("valid"), 7.0);
        assert_eq!(sum(text, "a_total", &["x=\"2\""]).expect("valid"), 4.0);
        assert_eq!(sum(text, "b", &[]).expect("valid"), 5.0);
        assert_eq!(sum(text, "c", &[]).expect("valid"), 0.0);
    }

    #[test]
    #[should_panic(expected = "1 problems:\nit broke")]
    fn problems_are_shown() {
        assert_sound(&["it broke".to_owned()]);
    }
}
