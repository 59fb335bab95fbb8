use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use local_stack::child::{Launch, tail};
use local_stack::testing::Folder;
use local_stack::{paths, wait};
use nix::sys::signal::Signal;

#[tokio::test]
async fn a_child_dies_with_its_parent() {
    let folder = Folder::create("child");
    let example = paths::bin_dir().unwrap().join("examples/parent");
    let mut parent = Command::new(example)
        .arg(folder.path().join("log"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(parent.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let child: u32 = line.trim().parse().unwrap();
    assert!(runs(child));

    parent.kill().unwrap();
    parent.wait().unwrap();
    wait::until("the child is gone", Duration::from_secs(10), || async {
        Ok((!runs(child)).then_some(()))
    })
    .await
    .unwrap();
}

fn runs(pid: u32) -> bool {
    // A zombie whose new parent does not reap it has ended all the same.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

#[tokio::test]
async fn a_child_that_ignores_sigterm_is_killed() {
    let folder = Folder::create("child");
    let log = folder.path().join("log");
    let script = "trap '' TERM; echo armed; while :; do sleep 1; done";
    let mut child = Launch::new("stubborn", "/bin/sh", &log)
        .args(["-c", script])
        .spawn()
        .unwrap();
    wait::until("the trap is set", Duration::from_secs(10), || {
        let armed = tail(Path::new(&log), 1) == "armed";
        async move { Ok(armed.then_some(())) }
    })
    .await
    .unwrap();
    let status = child
        .stop(Signal::SIGTERM, Duration::from_millis(200))
        .await
        .unwrap();
    assert!(!status.success());
    assert!(!child.is_running());
}

#[tokio::test]
async fn a_child_that_ends_at_once_shows_its_log() {
    let folder = Folder::create("child");
    let log = folder.path().join("log");
    let mut child = Launch::new("short", "/bin/sh", &log)
        .args(["-c", "echo no such setting >&2; exit 78"])
        .spawn()
        .unwrap();
    child.wait(Duration::from_secs(10)).await.unwrap();
    let message = child.check_running().unwrap_err().to_string();
    assert!(
        message.contains("no such setting") && message.contains("78"),
        "{message}"
    );
}
