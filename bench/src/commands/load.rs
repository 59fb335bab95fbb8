//! Those who send load: ghz, and pgbench.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use local_stack::install;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};

use super::captured::Script;
use crate::servers::Servers;

/// As many as the services' pools have by default.
pub(crate) const CONNECTIONS: u32 = 16;

/// Calls under way at once, over [`CHANNELS`]: every connection of the pool finds the next command waiting.
pub(crate) const CALLS: u32 = 64;
pub(crate) const CHANNELS: u32 = 4;

/// A process that sends load.
pub(crate) struct Load {
    name: &'static str,
    child: Child,
    /// Where ghz tells what came of its calls.
    result: Option<PathBuf>,
}

/// What ghz says of its calls.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

impl Load {
    /// Calls `method` for so long. `data` is a template of ghz.
    pub(crate) fn ghz(
        servers: &Servers,
        address: &str,
        method: &str,
        data: &str,
        time: Duration,
    ) -> Result<Self> {
        let folder = servers.folder("ghz");
        std::fs::create_dir_all(&folder)?;
        let (protos, result) = (folder.join("protos"), folder.join("result.json"));
        std::fs::write(&protos, contracts::FILE_DESCRIPTOR_SET)?;
        let child = Command::new(install::ghz()?)
            .arg("--insecure")
            .arg(format!("--protoset={}", protos.display()))
            .arg(format!("--call={method}"))
            .arg(format!("--data={data}"))
            .arg(format!("--concurrency={CALLS}"))
            .arg(format!("--connections={CHANNELS}"))
            .arg(format!("--duration={}s", time.as_secs()))
            .arg("--duration-stop=wait")
            .arg("--format=json")
            .arg(format!("--output={}", result.display()))
            .arg(address)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("ghz did not start")?;
        Ok(Self {
            name: "ghz",
            child,
            result: Some(result),
        })
    }

    /// Runs `script` on `database` for so long.
    pub(crate) fn pgbench(
        servers: &Servers,
        database: &str,
        script: &Script,
        time: Duration,
    ) -> Result<Self> {
        let folder = servers.folder("pgbench");
        std::fs::create_dir_all(&folder)?;
        let file = folder.join("script.sql");
        std::fs::write(&file, &script.text)?;
        let constants = script.constants.iter();
        let child = Command::new(servers.postgres.binaries().join("pgbench"))
            .args([
                "--no-vacuum",
                "--protocol=prepared",
                "--host=127.0.0.1",
                "--username=postgres",
            ])
            .arg(format!("--port={}", servers.postgres.port()))
            .arg(format!("--client={CONNECTIONS}"))
            .arg(format!("--time={}", time.as_secs()))
            .arg(format!("--file={}", file.display()))
            .args(constants.map(|(name, value)| format!("--define={name}={value}")))
            .arg(database)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("pgbench did not start")?;
        Ok(Self {
            name: "pgbench",
            child,
            result: None,
        })
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) fn id(&self) -> Result<u32> {
        self.child
            .id()
            .with_context(|| format!("{} has ended", self.name))
    }

    /// Fails when it ends, which is too early.
    pub(crate) async fn ended(&mut self) -> Result<()> {
        let status = self.child.wait().await?;
        let mut said = String::new();
        for output in [
            self.child
                .stdout
                .as_mut()
                .map(|output| output as &mut (dyn AsyncRead + Send + Unpin)),
            self.child.stderr.as_mut().map(|output| output as _),
        ]
        .into_iter()
        .flatten()
        {
            output.read_to_string(&mut said).await?;
        }
        bail!("{} has ended ({status}):\n{said}", self.name)
    }

    /// Waits for its end; all calls and statements must have succeeded.
    pub(crate) async fn end(self) -> Result<Option<Latency>> {
        let output = self.child.wait_with_output().await?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            // pgbench goes on with other clients where one of them failed, and says so at its end.
            output.status.success() && !errors.contains("aborted"),
            "{} failed ({}):\n{}{errors}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stdout)
        );
        self.result
            .map(|file| latency(&std::fs::read_to_string(file)?))
            .transpose()
    }
}

fn latency(result: &str) -> Result<Latency> {
    let result: Value = serde_json::from_str(result).context("ghz's result is not understood")?;
    let codes = result["statusCodeDistribution"].as_object();
    ensure!(
        codes.is_some_and(|codes| codes.keys().eq(["OK"])),
        "calls failed: {} {}",
        result["statusCodeDistribution"],
        result["errorDistribution"]
    );
    let at = |percentage: u64| {
        let all = result["latencyDistribution"].as_array();
        let found = all.and_then(|all| all.iter().find(|at| at["percentage"] == percentage));
        let nanoseconds = found.and_then(|at| at["latency"].as_f64());
        nanoseconds
            .map(|nanoseconds| nanoseconds / 1e6)
            .context("ghz tells no latencies")
    };
    Ok(Latency {
        p50: at(50)?,
        p99: at(99)?,
    })
}
