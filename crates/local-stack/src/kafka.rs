//! A Kafka broker of one's own: a single KRaft node, run from the jars that Maven fetches.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::certificates::Authority;
use crate::child::{self, Child, Launch};
use crate::{maven, paths, ports, wait};

/// The version of Kafka that is run.
pub const VERSION: &str = "4.1.0";

/// Who may log in where the broker asks for it, and by what password; the second may do everything.
pub const USER: (&str, &str) = ("relay", "secret");
pub const ADMIN: (&str, &str) = ("admin", "admin-secret");

/// How Kafka's processes log.
pub(crate) const LOGGING: &str = "\
rootLogger.level=INFO
rootLogger.appenderRef.stdout.ref=STDOUT
appender.stdout.type=Console
appender.stdout.name=STDOUT
appender.stdout.layout.type=PatternLayout
appender.stdout.layout.pattern=[%d] %p %m (%c)%n
";

const START_LIMIT: Duration = Duration::from_secs(90);
const STOP_LIMIT: Duration = Duration::from_secs(20);
const TOOL_LIMIT: Duration = Duration::from_secs(60);
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// How to make a broker.
#[derive(Debug, Clone)]
pub struct Builder {
    folder: PathBuf,
    data_in: Option<PathBuf>,
    ports: Option<(u16, u16)>,
    sasl_tls: bool,
    authorizer: bool,
    settings: Vec<(String, String)>,
    jvm: Vec<String>,
}

impl Builder {
    /// The ports for clients and for the controller; by default free ones.
    pub fn ports(mut self, clients: u16, controller: u16) -> Self {
        self.ports = Some((clients, controller));
        self
    }

    /// Keeps the data in this folder, such as a [`Disk`](crate::Disk), and the log and the rest in its own.
    pub fn data_in(mut self, folder: impl Into<PathBuf>) -> Self {
        self.data_in = Some(folder.into());
        self
    }

    /// Listens at a further port for clients that come by TLS and log in by SASL PLAIN, as [`USER`] or [`ADMIN`]: see
    /// [`Kafka::sasl_tls_brokers`] and [`Kafka::ca_file`].
    pub fn sasl_tls(mut self) -> Self {
        self.sasl_tls = true;
        self
    }

    /// Keeps rules about who may do what. Nothing is forbidden at first: see [`Kafka::deny_write`].
    pub fn authorizer(mut self) -> Self {
        self.authorizer = true;
        self
    }

    /// Any setting of server.properties.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// An option of the JVM, such as `-Xmx1g`, behind those of this crate: the last one counts.
    pub fn jvm_option(mut self, option: &str) -> Self {
        self.jvm.push(option.to_owned());
        self
    }

    /// Makes the broker's folder, unless it is there already, and starts it. The jars must be there: [`fetch_jars`].
    pub async fn start(self) -> Result<Kafka> {
        let jars = jars_dir()?;
        if !jars.is_dir() {
            bail!(
                "the jars of Kafka are not there; ./dev doctor says how to get them, ./dev stack up gets them"
            );
        }
        let java = find_java().context("no Java 17 or newer (apt-get install default-jre-headless)")?;
        std::fs::create_dir_all(&self.folder)
            .with_context(|| format!("cannot make {}", self.folder.display()))?;
        let authority = match self.sasl_tls {
            true => Some(Authority::in_folder(self.folder.join("tls"))?),
            false => None,
        };
        let mut last_error = None;
        for _ in 0..3 {
            let free = ports::free_ports(3)?;
            let (port, controller_port) = self.ports.unwrap_or((free[0], free[1]));
            let mut broker = Kafka {
                java: java.clone(),
                classpath: classpath(&jars),
                data: match &self.data_in {
                    Some(folder) => folder.canonicalize()?.join("data"),
                    None => self.folder.canonicalize()?.join("data"),
                },
                folder: self.folder.canonicalize()?,
                log: self.folder.join("kafka.log"),
                port,
                sasl_tls: authority.as_ref().map(|authority| SaslTls {
                    port: free[2],
                    ca_file: authority.ca_file(),
                }),
                jvm: self.jvm.clone(),
                child: None,
            };
            let mut settings = self.settings.clone();
            if let Some(authority) = &authority {
                settings.extend(sasl_tls_settings(authority)?);
            }
            if self.authorizer {
                settings.extend(authorizer_settings());
            }
            broker.write_settings(controller_port, &settings)?;
            broker.format()?;
            let offset = child::length(&broker.log);
            match broker.start().await {
                Ok(()) => return Ok(broker),
                Err(error)
                    if child::written_since(&broker.log, offset).contains("Address already in use") =>
                {
                    if self.ports.is_some() {
                        return Err(error.context(format!("port {port} or {controller_port} is taken")));
                    }
                    last_error = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(last_error.unwrap_or_else(|| anyhow::anyhow!("Kafka did not start")))
    }
}

/// A running broker on loopback. Dropping it kills it; its data stays.
#[derive(Debug)]
pub struct Kafka {
    java: PathBuf,
    classpath: OsString,
    folder: PathBuf,
    data: PathBuf,
    log: PathBuf,
    port: u16,
    sasl_tls: Option<SaslTls>,
    jvm: Vec<String>,
    child: Option<Child>,
}

#[derive(Debug)]
struct SaslTls {
    port: u16,
    ca_file: PathBuf,
}

impl Kafka {
    /// A broker whose data and log are in `folder`.
    pub fn builder(folder: impl Into<PathBuf>) -> Builder {
        Builder {
            folder: folder.into(),
            data_in: None,
            ports: None,
            sasl_tls: false,
            authorizer: false,
            settings: Vec::new(),
            jvm: Vec::new(),
        }
    }

    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Where its topics are: a folder for each partition.
    pub fn data(&self) -> &Path {
        &self.data
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// `host:port`, for `bootstrap.servers`.
    pub fn brokers(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// `host:port` for clients that come by [`Builder::sasl_tls`].
    pub fn sasl_tls_brokers(&self) -> Result<String> {
        Ok(format!("127.0.0.1:{}", self.sasl_tls()?.port))
    }

    /// The certificate to trust there, PEM.
    pub fn ca_file(&self) -> Result<&Path> {
        Ok(&self.sasl_tls()?.ca_file)
    }

    fn sasl_tls(&self) -> Result<&SaslTls> {
        self.sasl_tls
            .as_ref()
            .context("this Kafka was started without SASL and TLS")
    }

    /// Runs one of Kafka's tools, by the name of its class and with `--bootstrap-server`, and returns what it prints. Fails
    /// when it does.
    pub async fn run_tool(&self, class: &str, args: &[&str]) -> Result<String> {
        let log = self
            .folder
            .join(format!("tool-{}.log", uuid::Uuid::new_v4().simple()));
        let mut child = Launch::new(class, &self.java, &log)
            .args(jvm_options(&self.folder))
            .args(["-XX:TieredStopAtLevel=1".into(), OsString::from("-cp")])
            .args([self.classpath.clone()])
            .args([class, "--bootstrap-server", &self.brokers()])
            .args(args)
            .folder(&self.folder)
            .spawn()?;
        let status = child.wait(TOOL_LIMIT).await?;
        let output = std::fs::read_to_string(&log)?;
        if !status.success() {
            bail!("{class} {} failed ({status}):\n{output}", args.join(" "));
        }
        Ok(output)
    }

    /// Forbids `user` to write to `topic`; soon, not at once, and where the broker was started with
    /// [`Builder::authorizer`]. While it holds nobody but this crate and [`ADMIN`] can use the topic: one that has rules is
    /// closed to those whom none lets in.
    pub async fn deny_write(&self, user: &str, topic: &str) -> Result<()> {
        self.change_rule("--add", &[], user, topic).await
    }

    /// Undoes [`deny_write`](Self::deny_write), soon.
    pub async fn allow_write(&self, user: &str, topic: &str) -> Result<()> {
        self.change_rule("--remove", &["--force"], user, topic).await
    }

    async fn change_rule(&self, action: &str, how: &[&str], user: &str, topic: &str) -> Result<()> {
        let principal = format!("User:{user}");
        let rule = [
            "--deny-principal",
            &principal,
            "--operation",
            "Write",
            "--topic",
            topic,
        ];
        self.run_tool(
            "org.apache.kafka.tools.AclCommand",
            &[&[action], how, &rule].concat(),
        )
        .await?;
        Ok(())
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Starts the broker again after [`stop`](Self::stop) or [`kill`](Self::kill): same ports, same data.
    pub async fn start(&mut self) -> Result<()> {
        if let Some(running) = &mut self.child
            && running.is_running()
        {
            return Ok(());
        }
        let mut child = Launch::new("Kafka", &self.java, &self.log)
            .args(jvm_options(&self.folder))
            .args(&self.jvm)
            .args([
                OsString::from("-cp"),
                self.classpath.clone(),
                "kafka.Kafka".into(),
            ])
            .args([self.properties()])
            .folder(&self.folder)
            .spawn()?;
        let port = self.port;
        let waited = wait::until("Kafka answers", START_LIMIT, || {
            let running = child.check_running();
            async move {
                running?;
                Ok(is_ready(port).await.then_some(()))
            }
        })
        .await;
        self.child = Some(child);
        waited.with_context(|| format!("Kafka did not start; its log: {}", self.log.display()))
    }

    /// An orderly shutdown.
    pub async fn stop(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.stop(Signal::SIGTERM, STOP_LIMIT).await?;
        }
        Ok(())
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
        }
        Ok(())
    }

    /// Freezes the broker: its connections stay open and nothing answers.
    pub fn pause(&mut self) -> Result<()> {
        self.child
            .as_mut()
            .context("Kafka is not running")?
            .signal(Signal::SIGSTOP)
    }

    /// Undoes [`pause`](Self::pause).
    pub fn resume(&mut self) -> Result<()> {
        self.child
            .as_mut()
            .context("Kafka is not running")?
            .signal(Signal::SIGCONT)
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(Child::is_running)
    }

    fn properties(&self) -> PathBuf {
        self.folder.join("server.properties")
    }

    fn write_settings(&self, controller_port: u16, own: &[(String, String)]) -> Result<()> {
        let port = self.port;
        let sasl_tls = self
            .sasl_tls
            .as_ref()
            .map(|listener| format!(",SASL_SSL://127.0.0.1:{}", listener.port))
            .unwrap_or_default();
        let mut text = format!(
            "# Written at every start.\n\
             process.roles=broker,controller\n\
             node.id=1\n\
             controller.quorum.voters=1@127.0.0.1:{controller_port}\n\
             listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}{sasl_tls}\n\
             advertised.listeners=PLAINTEXT://127.0.0.1:{port}{sasl_tls}\n\
             controller.listener.names=CONTROLLER\n\
             listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL\n\
             log.dirs={}\n",
            self.data.display()
        );
        let fixed = [
            ("auto.create.topics.enable", "false"),
            ("default.replication.factor", "1"),
            ("offsets.topic.replication.factor", "1"),
            ("offsets.topic.num.partitions", "4"),
            ("transaction.state.log.replication.factor", "1"),
            ("transaction.state.log.min.isr", "1"),
            ("share.coordinator.state.topic.replication.factor", "1"),
            ("share.coordinator.state.topic.min.isr", "1"),
            ("group.initial.rebalance.delay.ms", "0"),
            // Tests want to see members that died missed soon.
            ("group.min.session.timeout.ms", "1000"),
            ("message.max.bytes", "1048588"),
            // A broker that comes back after a kill waits for its former self to time out.
            ("broker.heartbeat.interval.ms", "500"),
            ("broker.session.timeout.ms", "3000"),
        ];
        let own = own.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in fixed.into_iter().chain(own) {
            text.push_str(&format!("{name}={value}\n"));
        }
        std::fs::write(self.properties(), text)?;
        std::fs::write(self.folder.join("log4j2.properties"), LOGGING)?;
        Ok(())
    }

    /// What `kafka-storage.sh format` does.
    fn format(&self) -> Result<()> {
        if self.data.join("meta.properties").exists() {
            return Ok(());
        }
        let output = Command::new(&self.java)
            .args(jvm_options(&self.folder))
            .arg("-XX:TieredStopAtLevel=1")
            .arg("-cp")
            .arg(&self.classpath)
            .args([
                "kafka.tools.StorageTool",
                "format",
                "--cluster-id",
                "bG9jYWwtc3RhY2stMDAwMQ",
                "--config",
            ])
            .arg(self.properties())
            .output()
            .context("Java did not start")?;
        if !output.status.success() {
            bail!(
                "formatting Kafka's folder failed ({}):\n{}{}",
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }
}

type Settings = Vec<(String, String)>;

fn sasl_tls_settings(authority: &Authority) -> Result<Settings> {
    let issued = authority.issue("kafka")?;
    // Kafka wants them in one file.
    let keystore = issued.key.with_extension("pem");
    let pem = std::fs::read_to_string(&issued.key)? + &std::fs::read_to_string(&issued.certificate)?;
    std::fs::write(&keystore, pem).with_context(|| format!("cannot write {}", keystore.display()))?;
    let users = [USER, ADMIN].map(|(name, password)| format!("user_{name}=\"{password}\""));
    let settings = [
        ("sasl.enabled.mechanisms", "PLAIN".to_owned()),
        (
            "listener.name.sasl_ssl.plain.sasl.jaas.config",
            format!(
                "org.apache.kafka.common.security.plain.PlainLoginModule required {};",
                users.join(" ")
            ),
        ),
        ("ssl.keystore.type", "PEM".to_owned()),
        ("ssl.keystore.location", keystore.display().to_string()),
    ];
    Ok(settings.map(|(name, value)| (name.to_owned(), value)).into())
}

fn authorizer_settings() -> Settings {
    let settings = [
        (
            "authorizer.class.name",
            "org.apache.kafka.metadata.authorizer.StandardAuthorizer".to_owned(),
        ),
        // Whoever comes without logging in, as the broker itself and this crate do, is nobody's user.
        ("super.users", format!("User:{};User:ANONYMOUS", ADMIN.0)),
        ("allow.everyone.if.no.acl.found", "true".to_owned()),
    ];
    settings.map(|(name, value)| (name.to_owned(), value)).into()
}

pub(crate) fn jvm_options(folder: &Path) -> Vec<OsString> {
    let log_config = format!(
        "-Dlog4j2.configurationFile={}",
        folder.join("log4j2.properties").display()
    );
    [
        "-Xms128m",
        "-Xmx512m",
        "-XX:+UseSerialGC",
        "-Xshare:auto",
        "-Djava.awt.headless=true",
        &log_config,
    ]
    .map(OsString::from)
    .into()
}

/// The class path of Kafka and its tools.
pub fn classpath(jars: &Path) -> OsString {
    let mut path = jars.as_os_str().to_owned();
    path.push("/*");
    path
}

/// Where the jars are kept once they were fetched.
pub fn jars_dir() -> Result<PathBuf> {
    Ok(paths::target_dir()?.join(format!("tools/kafka-{VERSION}/jars")))
}

/// Java 17 or newer.
pub fn find_java() -> Option<PathBuf> {
    let home = std::env::var_os("JAVA_HOME").map(|home| Path::new(&home).join("bin/java"));
    home.into_iter()
        .chain(paths::on_path("java"))
        .find(|java| java_version(java).is_some_and(|major| major >= 17))
}

fn java_version(java: &Path) -> Option<u32> {
    // Prints, for example: openjdk version "17.0.15" 2025-04-15
    let output = Command::new(java).arg("-version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    text.split('"').nth(1)?.split(['.', '-']).next()?.parse().ok()
}

/// Fetches Kafka's jars with Maven, once per target directory.
pub fn fetch_jars() -> Result<()> {
    maven::fetch(
        "Kafka",
        &jars_dir()?,
        &[
            // The broker, and the console consumer and the like, with Kafka Connect.
            ("org.apache.kafka", "kafka_2.13", VERSION),
            ("org.apache.kafka", "kafka-tools", VERSION),
            // Without it nothing is logged.
            ("org.apache.logging.log4j", "log4j-slf4j-impl", "2.24.3"),
        ],
    )
}

/// Whether the broker at this port of loopback serves requests: it answers a Metadata request and lists itself.
pub async fn is_ready(port: u16) -> bool {
    matches!(tokio::time::timeout(ANSWER_LIMIT, brokers_listed(port)).await, Ok(Ok(count)) if count > 0)
}

/// Speaks the protocol by hand (Metadata, version 4), so that this crate needs no Kafka client.
async fn brokers_listed(port: u16) -> std::io::Result<i32> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    let mut request = Vec::new();
    request.extend(3i16.to_be_bytes()); // api key
    request.extend(4i16.to_be_bytes()); // api version
    request.extend(7i32.to_be_bytes()); // correlation id
    request.extend((-1i16).to_be_bytes()); // no client id
    request.extend(0i32.to_be_bytes()); // no topics
    request.push(0); // do not create topics
    stream.write_i32(request.len() as i32).await?;
    stream.write_all(&request).await?;
    let length = stream.read_i32().await?;
    let mut answer = vec![0; usize::try_from(length.clamp(0, 1 << 20)).unwrap_or(0)];
    stream.read_exact(&mut answer).await?;
    // correlation id, throttle time, then the array of brokers
    let count = answer
        .get(8..12)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, i32::from_be_bytes);
    Ok(count)
}
