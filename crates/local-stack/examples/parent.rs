//! Starts a child and waits to be killed; for the test that a child dies with its parent.
#![expect(clippy::print_stdout, reason = "its output is its result")]

use local_stack::child::Launch;

fn main() -> anyhow::Result<()> {
    let log = std::env::args_os()
        .nth(1)
        .ok_or_else(|| anyhow::anyhow!("usage: parent LOG"))?;
    let child = Launch::new("sleep", "/bin/sleep", log).args(["600"]).spawn()?;
    println!("{}", child.id());
    loop {
        std::thread::park();
    }
}
