//! Whether what is measured was built as it is released.

use anyhow::{Context, Result, ensure};
use local_stack::paths;

/// Fails when one of these was built with the workspace's tests, which switch failpoints on: they cost something at every record.
pub(crate) fn check(programs: &[&str]) -> Result<()> {
    for name in programs {
        let program = paths::binary(name)?;
        let bytes = std::fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
        // The variable that the crate `fail` reads, where it is switched on.
        let variable = b"FAILPOINTS";
        ensure!(
            !bytes.windows(variable.len()).any(|window| window == variable),
            "{} has failpoints; build it as it is released: cargo build --release -p {name} -p bench",
            program.display()
        );
    }
    Ok(())
}
