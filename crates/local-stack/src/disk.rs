//! A disk of a few megabytes, to be filled and enlarged: for what happens when there is no room left.

use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

const PREFIX: &str = "local-stack-disk-";

/// No file system can be mounted here: for that one has to be root, which in a container is not enough.
#[derive(Debug)]
pub struct NotPossibleHere {
    why: String,
}

impl fmt::Display for NotPossibleHere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot mount a disk of its own size: {}", self.why)
    }
}

impl std::error::Error for NotPossibleHere {}

/// A file system in memory. Dropping it unmounts it, and its content is gone; drop first what uses it.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
}

impl Disk {
    /// An empty one that holds this many bytes.
    pub fn mount(bytes: u64) -> Result<Self, NotPossibleHere> {
        let no = |why: String| NotPossibleHere { why };
        if !nix::unistd::geteuid().is_root() {
            return Err(no("this process is not root".to_owned()));
        }
        remove_those_of_the_dead();
        // Where the users of the servers get, too, which do not run as root.
        let id = uuid::Uuid::new_v4().simple();
        let path = PathBuf::from(format!("/var/tmp/{PREFIX}{}-{id}", std::process::id()));
        std::fs::create_dir(&path).map_err(|error| no(error.to_string()))?;
        let options = format!("size={bytes},mode=755");
        if let Err(error) = run("mount", &["-t", "tmpfs", "-o", &options, "local-stack"], &path) {
            let _ = std::fs::remove_dir(&path);
            return Err(no(format!("{error:#}")));
        }
        Ok(Self { path })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it hold this many bytes.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        run("mount", &["-o", &format!("remount,size={bytes}")], &self.path)
    }

    /// Takes all the room that is left. What is written after that has to fit into files that are there.
    pub fn fill(&self) -> Result<()> {
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(self.filler())
            .context("cannot fill the disk")?;
        let block = vec![0; 64 * 1024];
        loop {
            match file.write(&block) {
                // Less than a block was left.
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error).context("cannot fill the disk"),
            }
        }
    }

    /// Undoes [`fill`](Self::fill).
    pub fn free(&self) -> Result<()> {
        std::fs::remove_file(self.filler()).context("the disk was not filled")
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        unmount(&self.path);
    }
}

fn unmount(path: &Path) {
    // Lazily: whoever still uses it does not keep it from going.
    if run("umount", &["--lazy"], path).is_ok() {
        let _ = std::fs::remove_dir(path);
    }
}

/// The disks of processes that were killed.
fn remove_those_of_the_dead() {
    for entry in std::fs::read_dir("/var/tmp").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            unmount(&entry.path());
        }
    }
}

fn run(program: &str, args: &[&str], path: &Path) -> Result<()> {
    let output = Command::new(program)
        .args(args)
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{program} did not start"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
