//! What the `main` of every process does: read the configuration, set up telemetry, run until a signal, leave with a code.

use std::future::Future;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::config::{self, ConfigErrors, Instance, Log, Reader, Reported, Sources, Telemetry};
use crate::shutdown::{self, BoxError};
use crate::telemetry::{self, chain};

/// How long blocking work may hold the process after everything has ended.
const RUNTIME_SHUTDOWN: Duration = Duration::from_secs(2);

/// Arguments of every process.
#[derive(Debug, Clone, clap::Args)]
pub struct ConfigArgs {
    /// Configuration in TOML; environment variables override it.
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl ConfigArgs {
    /// Reads the configuration from the file and from environment variables that start with `prefix`.
    ///
    /// # Errors
    /// An exit code, after everything that is wrong was printed on standard error.
    pub fn load<T>(
        &self,
        prefix: &str,
        read: impl FnOnce(&mut Reader) -> Result<T, Reported>,
    ) -> Result<T, ExitCode> {
        config::parse(Sources::of_process(prefix, self.config.as_deref()), read)
            .map_err(|errors| refuse(&errors))
    }
}

#[expect(
    clippy::print_stderr,
    reason = "there is no log before there is a configuration"
)]
fn refuse(errors: &ConfigErrors) -> ExitCode {
    eprintln!("{errors}");
    ExitCode::from(config::EXIT_CODE)
}

/// Who the process is and how it speaks.
#[derive(Debug, Clone)]
pub struct Process<'c> {
    pub name: &'static str,
    pub version: &'static str,
    pub instance: &'c Instance,
    pub log: &'c Log,
    pub telemetry: &'c Telemetry,
}

impl Process<'_> {
    /// Runs `body` on a multi-thread runtime with telemetry, handing it a token that SIGTERM or SIGINT cancels.
    ///
    /// The code is 0 when `body` ends well, 1 when it fails: that was logged.
    pub fn run<F, E>(self, body: impl FnOnce(CancellationToken) -> F) -> ExitCode
    where
        F: Future<Output = Result<(), E>>,
        E: Into<BoxError>,
    {
        let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return complain(&error),
        };
        let code = runtime.block_on(async {
            let guard = match telemetry::init(
                self.name,
                self.version,
                &self.instance.name,
                self.log,
                self.telemetry,
            ) {
                Ok(guard) => guard,
                Err(error) => return complain(&error),
            };
            let code = match shutdown::on_signals() {
                Ok(token) => match body(token).await.map_err(Into::into) {
                    Ok(()) => {
                        tracing::info!("stopped");
                        ExitCode::SUCCESS
                    }
                    Err(error) => {
                        tracing::error!(error = %chain(error.as_ref()), "failed");
                        ExitCode::FAILURE
                    }
                },
                Err(error) => complain(&error),
            };
            guard.shutdown().await;
            code
        });
        runtime.shutdown_timeout(RUNTIME_SHUTDOWN);
        code
    }
}

#[expect(clippy::print_stderr, reason = "there is no log yet")]
fn complain(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    eprintln!("cannot start: {}", chain(error));
    ExitCode::FAILURE
}
