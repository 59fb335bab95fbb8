//! What the machine must have: what each thing is for, whether it is there, and how it gets there.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{kafka, paths, postgres};

/// Something that has to be on the machine.
#[derive(Debug, Clone)]
pub struct Need {
    /// What it is, for people.
    pub name: &'static str,
    /// What it is needed for.
    pub purpose: &'static str,
    /// Where it was found, or its version.
    pub found: Option<String>,
    /// The Debian packages that bring it; the first one that the machine's Debian or Ubuntu has is taken.
    packages: &'static [&'static str],
}

/// Everything that is needed to build and run, in the order in which to read about it.
pub fn needs() -> Vec<Need> {
    let need = |name, purpose, packages, found| Need {
        name,
        purpose,
        found,
        packages,
    };
    vec![
        need(
            "C and C++ compiler",
            "to build librdkafka",
            &["build-essential"],
            compilers(),
        ),
        need(
            "pkg-config",
            "to find the libraries below",
            &["pkg-config"],
            program("pkg-config"),
        ),
        need(
            "OpenSSL's headers",
            "to build librdkafka",
            &["libssl-dev"],
            library("openssl"),
        ),
        need(
            "zlib's headers",
            "to build librdkafka",
            &["zlib1g-dev"],
            library("zlib"),
        ),
        need(
            "PostgreSQL server",
            "the databases",
            &["postgresql"],
            show(postgres::find_binaries()),
        ),
        need(
            "Java 17 or newer",
            "to run Kafka",
            JAVA_PACKAGES,
            show(kafka::find_java()),
        ),
        need("Maven", "to fetch Kafka's jars", &["maven"], maven()),
        need(
            "Python 3 with pip",
            "to run the examples in Python",
            &["python3-pip"],
            pip(),
        ),
        need(
            "setpriv and setsid",
            "to start and stop processes",
            &["util-linux"],
            util_linux(),
        ),
    ]
}

/// Newer ones than these are fine too; these are what current releases of Debian and Ubuntu have.
const JAVA_PACKAGES: &[&str] = &[
    "openjdk-17-jre-headless",
    "openjdk-21-jre-headless",
    "default-jre-headless",
];

/// Installs what is missing, as root or with sudo where that asks for no password. Otherwise fails and says what to do.
///
/// `say` is told, in a word or two, what is being installed.
pub fn install_missing(say: &dyn Fn(&str)) -> Result<()> {
    let missing: Vec<Need> = needs().into_iter().filter(|need| need.found.is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing
        .iter()
        .map(|need| need.name)
        .collect::<Vec<_>>()
        .join(", ");
    let root = Root::get().with_context(|| format!("missing: {names}. {}", instructions(&missing)))?;
    say(&format!("installing: {names}"));
    root.apt_get(&["update", "-q"])?;
    if missing.iter().any(|need| need.packages.contains(&"postgresql")) {
        // The package would start a server of its own, on the default port and at every boot. Nobody asked for it.
        root.apt_get(&[
            "install",
            "-q",
            "-y",
            "--no-install-recommends",
            "postgresql-common",
        ])?;
        let setting = "s/^#* *create_main_cluster *=.*/create_main_cluster = false/";
        root.run(
            "sed",
            &["-i", "-E", setting, "/etc/postgresql-common/createcluster.conf"],
        )?;
    }
    let mut install = vec!["install", "-q", "-y", "--no-install-recommends"];
    install.extend(missing.iter().map(|need| available(need.packages)));
    root.apt_get(&install)?;

    let still: Vec<Need> = needs().into_iter().filter(|need| need.found.is_none()).collect();
    if !still.is_empty() {
        let names = still.iter().map(|need| need.name).collect::<Vec<_>>().join(", ");
        bail!("installed the packages, and still do not find: {names}");
    }
    Ok(())
}

/// The path of `program`, which only some tests need: the Debian package `package` is installed if it is not there. Safe
/// when several processes ask at once.
pub fn ensure(program: &str, package: &str) -> Result<PathBuf> {
    if let Some(found) = paths::on_path(program) {
        return Ok(found);
    }
    let folder = paths::target_dir()?.join("tools");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let lock = std::fs::File::create(folder.join("install.lock"))?;
    lock.lock()
        .with_context(|| format!("cannot lock {}", folder.display()))?;
    if let Some(found) = paths::on_path(program) {
        return Ok(found);
    }
    let install = || -> Result<()> {
        let root = Root::get()?;
        // The lists of packages may be there, and new enough. Reading them anew takes time, and does not wait for others
        // who do.
        root.install_without_starting(package).or_else(|_| {
            root.apt_get(&["update", "-q"])?;
            root.install_without_starting(package)
        })
    };
    install().with_context(|| {
        format!(
            "{program} is not installed. Install it with: sudo apt-get install --no-install-recommends {package}, or what \
             the machine's own package manager calls {package}"
        )
    })?;
    paths::on_path(program)
        .with_context(|| format!("installed the package {package}, and still do not find {program}"))
}

/// Runs its arguments while no package may start a service. Not where somebody has a policy of their own.
const WITHOUT_STARTING: &str = r#"policy=/usr/sbin/policy-rc.d
[ -e $policy ] && exec "$@"
trap 'rm -f $policy' EXIT
printf '#!/bin/sh\nexit 101\n' > $policy && chmod 755 $policy
"$@""#;

/// What a person has to do to get what is missing.
pub fn instructions(missing: &[Need]) -> String {
    let packages = missing
        .iter()
        .map(|need| need.packages[0])
        .collect::<Vec<_>>()
        .join(" ");
    if paths::on_path("apt-get").is_some() {
        format!(
            "Install with: sudo apt-get update && sudo apt-get install --no-install-recommends {packages}"
        )
    } else {
        format!(
            "This machine has no apt-get; install with its own package manager what Debian calls: {packages}"
        )
    }
}

/// The right to install packages.
enum Root {
    Already,
    BySudo,
}

impl Root {
    fn get() -> Result<Self> {
        if paths::on_path("apt-get").is_none() {
            bail!("cannot install packages: there is no apt-get");
        }
        if nix::unistd::geteuid().is_root() {
            return Ok(Self::Already);
        }
        let sudo = Command::new("sudo")
            .args(["-n", "true"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if sudo.is_ok_and(|status| status.success()) {
            return Ok(Self::BySudo);
        }
        bail!("cannot install packages: neither root nor sudo without a password")
    }

    fn apt_get(&self, args: &[&str]) -> Result<()> {
        // Another package tool may be at work, for example right after boot.
        let waiting = ["-o", "DPkg::Lock::Timeout=300"];
        self.run("apt-get", &[&waiting, args].concat())
    }

    /// The package alone: a server that it would start on a well-known port is nothing that anybody asked for.
    fn install_without_starting(&self, package: &str) -> Result<()> {
        let install = [
            "apt-get",
            "-o",
            "DPkg::Lock::Timeout=300",
            "install",
            "-q",
            "-y",
            "--no-install-recommends",
            package,
        ];
        let script = ["-c", WITHOUT_STARTING, "sh"];
        self.run("sh", &[&script[..], &install[..]].concat())
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<()> {
        let mut command = match self {
            Self::Already => Command::new("env"),
            Self::BySudo => {
                let mut command = Command::new("sudo");
                command.args(["-n", "env"]);
                command
            }
        };
        let output = command
            .args(["DEBIAN_FRONTEND=noninteractive", program])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("{program} did not start"))?;
        if !output.status.success() {
            bail!(
                "{program} {} failed ({}):\n{}{}",
                args.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }
}

/// The first of these packages that can be installed.
fn available(packages: &'static [&'static str]) -> &'static str {
    let known = |package: &&&str| {
        let output = Command::new("apt-cache")
            .args(["policy", package])
            .env("LC_ALL", "C")
            .output();
        output.is_ok_and(|output| {
            let text = String::from_utf8_lossy(&output.stdout);
            text.lines()
                .any(|line| line.trim_start().starts_with("Candidate:") && !line.contains("(none)"))
        })
    };
    packages.iter().find(known).unwrap_or(&packages[0])
}

/// The version of stripe-mock that holds the description of Stripe's API to which payment-svc is pinned.
const STRIPE_MOCK: &str = "v0.203.0";

/// The executable of stripe-mock, which checks requests against Stripe's own description of its API.
pub fn stripe_mock() -> Result<PathBuf> {
    go_program("stripe-mock", "github.com/stripe/stripe-mock", STRIPE_MOCK)
}

/// The executable of ghz, which sends gRPC calls as fast as they are answered.
pub fn ghz() -> Result<PathBuf> {
    go_program("ghz", "github.com/bojand/ghz/cmd/ghz", "v0.121.0")
}

/// An executable that is built with Go, once per target directory.
fn go_program(name: &str, package: &str, version: &str) -> Result<PathBuf> {
    let folder = paths::target_dir()?.join(format!("tools/{name}-{version}"));
    let executable = folder.join(name);
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    // Several tests may want it at once.
    let lock = std::fs::File::create(folder.join("lock"))?;
    lock.lock()
        .with_context(|| format!("cannot lock {}", folder.display()))?;
    if executable.is_file() {
        return Ok(executable);
    }
    let go = paths::on_path("go")
        .or_else(|| Some(PathBuf::from("/usr/local/go/bin/go")).filter(|path| path.is_file()))
        .with_context(|| {
            format!(
                "{name} is built with Go 1.23 or newer, which is not installed: see https://go.dev/dl, or apt-get install \
                 golang-go where that is new enough (Debian 13)"
            )
        })?;
    let incomplete = folder.join("incomplete");
    let output = Command::new(go)
        .arg("install")
        .arg(format!("{package}@{version}"))
        .env("GOBIN", &incomplete)
        .stdin(Stdio::null())
        .output()
        .context("Go did not start")?;
    if !output.status.success() {
        bail!(
            "Go could not build {name} (is it 1.23 or newer, and is the Go module proxy, or the one that GOPROXY names, \
             reachable?):\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    std::fs::rename(incomplete.join(name), &executable)?;
    Ok(executable)
}

fn show(path: Option<impl AsRef<Path>>) -> Option<String> {
    path.map(|path| path.as_ref().display().to_string())
}

fn program(name: &str) -> Option<String> {
    show(paths::on_path(name))
}

fn compilers() -> Option<String> {
    let all = ["cc", "c++", "make"].map(program);
    all.into_iter()
        .collect::<Option<Vec<_>>>()
        .map(|found| found.join(", "))
}

fn library(name: &str) -> Option<String> {
    let output = Command::new("pkg-config")
        .args(["--modversion", name])
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Maven, or nothing to fetch with it.
fn maven() -> Option<String> {
    if let Ok(jars) = kafka::jars_dir()
        && jars.is_dir()
    {
        return Some(format!("not needed, the jars are in {}", jars.display()));
    }
    program("mvn")
}

fn pip() -> Option<String> {
    let output = Command::new("python3")
        .args(["-m", "pip", "--version"])
        .stderr(Stdio::null())
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn util_linux() -> Option<String> {
    let all = ["setpriv", "setsid"].map(program);
    all.into_iter()
        .collect::<Option<Vec<_>>>()
        .map(|found| found.join(", "))
}

/// A program that is useful and not needed.
pub fn optional(name: impl AsRef<OsStr>) -> Option<String> {
    let name = name.as_ref().to_string_lossy().into_owned();
    let in_go_bin = std::env::var_os("HOME").map(|home| Path::new(&home).join("go/bin").join(&name));
    program(&name).or_else(|| show(in_go_bin.filter(|path| path.is_file())))
}
