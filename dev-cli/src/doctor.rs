//! `./dev doctor`: what this machine has and lacks.

use anyhow::{Result, bail};
use local_stack::install;

pub(crate) const GRPCURL: &str = "go install github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.4";

pub(crate) fn run() -> Result<()> {
    let rustc = std::process::Command::new("rustc").arg("--version").output();
    let rustc = rustc
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default();
    println!("Needed");
    line(
        !rustc.is_empty(),
        "Rust",
        if rustc.is_empty() {
            "MISSING, get it from https://rustup.rs"
        } else {
            &rustc
        },
    );
    let needs = install::needs();
    for need in &needs {
        match &need.found {
            Some(found) => line(true, need.name, found),
            None => line(false, need.name, &format!("MISSING, {}", need.purpose)),
        }
    }
    println!("\nUseful, not needed");
    match install::optional("grpcurl") {
        Some(path) => line(true, "grpcurl", &path),
        None => line(
            false,
            "grpcurl",
            &format!("to call the services by hand: {GRPCURL}"),
        ),
    }

    let missing: Vec<_> = needs.into_iter().filter(|need| need.found.is_none()).collect();
    println!();
    if missing.is_empty() {
        println!("Nothing is missing. ./dev demo shows the whole thing.");
        return Ok(());
    }
    println!("./dev demo, up and test install what is missing, as root or with sudo. To do it by hand:");
    println!("  {}", install::instructions(&missing));
    bail!("{} needed things are missing", missing.len());
}

fn line(there: bool, name: &str, detail: &str) {
    println!("  {} {name:<22} {detail}", if there { "ok" } else { "--" });
}
