//! Where this build put its things, derived from the running executable, so that it holds for any target directory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The folder of the workspace's binaries, for example `target/release`.
pub fn bin_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("the path of the running executable is unknown")?;
    let folder = exe.parent().context("the running executable has no folder")?;
    // Test executables are in `deps`, examples in `examples`, next to the binaries.
    match folder.file_name().and_then(|name| name.to_str()) {
        Some("deps" | "examples") => Ok(folder.parent().unwrap_or(folder).to_owned()),
        _ => Ok(folder.to_owned()),
    }
}

/// Cargo's target directory.
pub fn target_dir() -> Result<PathBuf> {
    let bin_dir = bin_dir()?;
    Ok(bin_dir
        .parent()
        .with_context(|| format!("{} has no parent", bin_dir.display()))?
        .to_owned())
}

/// The executable of the workspace binary `name`.
pub fn binary(name: &str) -> Result<PathBuf> {
    let path = bin_dir()?.join(name);
    if !path.is_file() {
        bail!(
            "{} does not exist; build it with: cargo build --release -p {name}",
            path.display()
        );
    }
    Ok(path)
}

/// `program` as found on the PATH.
pub fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Not on everybody's PATH, but where Debian keeps some of the programs used here.
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|folder| folder.join(program))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
