//! Configuration from a TOML file and environment variables, with every error reported at once.
//!
//! Both sources become one flat map of dotted keys (`grpc.listen`). An environment variable `<PREFIX>GRPC__LISTEN` overrides
//! the file's `grpc.listen`. Each section reads its keys through a [`Reader`], which notes every missing or bad value;
//! what nobody has read in the end is an unknown key, and an error too. Nothing here reads the real environment except
//! [`Sources::of_process`], so tests pass their own.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use secrecy::SecretString;

pub use sections::{Admin, Database, Grpc, Instance, Kafka, Log, LogFormat, Telemetry};

mod sections;

/// Exit code of a process whose configuration is bad (`EX_CONFIG` of sysexits.h).
pub const EXIT_CODE: u8 = 78;

/// All that is wrong with a configuration, one problem a line. Values of secrets are never in it.
#[derive(Debug, thiserror::Error)]
pub struct ConfigErrors {
    problems: Vec<String>,
}

impl ConfigErrors {
    /// The problems, in the order in which they were found.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration has {} problem(s):", self.problems.len())?;
        for problem in &self.problems {
            write!(f, "\n  - {problem}")?;
        }
        Ok(())
    }
}

/// A value could not be read; the [`Reader`] has noted why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reported;

/// Where a value was given.
#[derive(Debug, Clone)]
enum Origin {
    File,
    Env(String),
}

#[derive(Debug, Clone)]
struct Entry {
    text: String,
    origin: Origin,
}

/// The text of a configuration before anybody interprets it.
#[derive(Debug, Default)]
pub struct Sources {
    prefix: String,
    entries: BTreeMap<String, Entry>,
    problems: Vec<String>,
}

impl Sources {
    /// No values yet; `prefix` (for example `ORDER_SVC_`) is what this process's environment variables start with.
    pub fn new(prefix: &str) -> Self {
        Self {
            prefix: prefix.to_owned(),
            ..Self::default()
        }
    }

    /// The file, if one is named, overridden by the environment of this process.
    pub fn of_process(prefix: &str, file: Option<&Path>) -> Self {
        let mut sources = Self::new(prefix);
        if let Some(path) = file {
            match std::fs::read_to_string(path) {
                Ok(text) => sources = sources.toml(&text),
                Err(error) => sources
                    .problems
                    .push(format!("cannot read {}: {error}", path.display())),
            }
        }
        let environment = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
        });
        sources.env(environment)
    }

    /// Adds the keys of a TOML document.
    #[must_use]
    pub fn toml(mut self, text: &str) -> Self {
        match text.parse::<toml::Table>() {
            Ok(table) => {
                for (key, value) in &table {
                    self.flatten(key, value);
                }
            }
            // The parser's own message quotes the line, which may hold a password.
            Err(error) => {
                let line = error
                    .span()
                    .map_or(0, |span| text[..span.start].lines().count().max(1));
                self.problems
                    .push(format!("the file is not TOML: line {line}: {}", error.message()));
            }
        }
        self
    }

    /// Adds the environment variables that start with the prefix; they override the file.
    ///
    /// Names without `__` cannot be keys, since every key is in a section. Those that Kubernetes injects for a service of
    /// the same name (`ORDER_SVC_SERVICE_HOST`, `ORDER_SVC_PORT_50051_TCP`) are passed over, other ones are reported.
    #[must_use]
    pub fn env(mut self, variables: impl IntoIterator<Item = (String, String)>) -> Self {
        for (name, text) in variables {
            let Some(rest) = name.strip_prefix(&self.prefix) else {
                continue;
            };
            if rest.contains("__") {
                let key = rest.to_lowercase().replace("__", ".");
                self.entries.insert(
                    key,
                    Entry {
                        text,
                        origin: Origin::Env(name),
                    },
                );
            } else if rest != "CONFIG" && !is_from_kubernetes(rest) {
                self.problems.push(format!(
                    "unknown environment variable {name} (sections and keys are joined by __)"
                ));
            }
        }
        self
    }

    fn flatten(&mut self, key: &str, value: &toml::Value) {
        let text = match value {
            toml::Value::Table(table) => {
                for (name, value) in table {
                    self.flatten(&format!("{key}.{name}"), value);
                }
                return;
            }
            toml::Value::Array(values) => {
                let texts: Vec<String> = values.iter().filter_map(scalar).collect();
                if texts.len() != values.len() {
                    self.problems
                        .push(format!("{key}: a list may hold plain values only"));
                }
                texts.join(",")
            }
            other => scalar(other).unwrap_or_default(),
        };
        self.entries.insert(
            key.to_owned(),
            Entry {
                text,
                origin: Origin::File,
            },
        );
    }
}

fn scalar(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(truth) => Some(truth.to_string()),
        toml::Value::Datetime(time) => Some(time.to_string()),
        toml::Value::Array(_) | toml::Value::Table(_) => None,
    }
}

fn is_from_kubernetes(rest: &str) -> bool {
    rest == "SERVICE_HOST" || rest.starts_with("SERVICE_PORT") || rest == "PORT" || rest.starts_with("PORT_")
}

/// Reads a whole configuration.
///
/// # Errors
/// Everything that `read` noted, and every key that it did not ask for.
pub fn parse<T>(
    sources: Sources,
    read: impl FnOnce(&mut Reader) -> Result<T, Reported>,
) -> Result<T, ConfigErrors> {
    let Sources {
        prefix,
        entries,
        problems,
    } = sources;
    let mut reader = Reader {
        prefix,
        entries,
        problems,
        used: BTreeSet::new(),
    };
    let result = read(&mut reader);
    reader.report_unknown();
    match result {
        Ok(value) if reader.problems.is_empty() => Ok(value),
        _ => Err(ConfigErrors {
            problems: reader.problems,
        }),
    }
}

/// Typed access to the values; notes what is wrong instead of stopping at it.
///
/// A section reads all its keys first and applies `?` afterwards, so that one bad value does not hide the next.
#[derive(Debug)]
pub struct Reader {
    prefix: String,
    entries: BTreeMap<String, Entry>,
    used: BTreeSet<String>,
    problems: Vec<String>,
}

impl Reader {
    /// A value that must be given.
    pub fn required<T: FromStr>(&mut self, key: &str) -> Result<T, Reported>
    where
        T::Err: fmt::Display,
    {
        match self.optional(key)? {
            Some(value) => Ok(value),
            None => self.missing(key),
        }
    }

    /// A value, or `default` when it is not given.
    pub fn or<T: FromStr>(&mut self, key: &str, default: T) -> Result<T, Reported>
    where
        T::Err: fmt::Display,
    {
        Ok(self.optional(key)?.unwrap_or(default))
    }

    /// A value that may be left out; empty text counts as left out.
    pub fn optional<T: FromStr>(&mut self, key: &str) -> Result<Option<T>, Reported>
    where
        T::Err: fmt::Display,
    {
        let Some(text) = self.take(key) else {
            return Ok(None);
        };
        match text.parse() {
            Ok(value) => Ok(Some(value)),
            Err(error) => self.reject(key, &format!("{error}; it is {text:?}")),
        }
    }

    /// A number within `range`, or `default`.
    pub fn number<T>(&mut self, key: &str, default: T, range: RangeInclusive<T>) -> Result<T, Reported>
    where
        T: FromStr + PartialOrd + fmt::Display,
        T::Err: fmt::Display,
    {
        let value = self.or(key, default)?;
        if range.contains(&value) {
            return Ok(value);
        }
        self.reject(
            key,
            &format!("must be {} to {}; it is {value}", range.start(), range.end()),
        )
    }

    /// A duration such as `250ms` or `1m 30s` within `range`, or `default`.
    pub fn duration(
        &mut self,
        key: &str,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Result<Duration, Reported> {
        let value = self.or(key, humantime::Duration::from(default))?.into();
        if range.contains(&value) {
            return Ok(value);
        }
        let [low, high, is] = [*range.start(), *range.end(), value].map(humantime::format_duration);
        self.reject(key, &format!("must be {low} to {high}; it is {is}"))
    }

    /// A list, written as a TOML array or separated by commas.
    pub fn list(&mut self, key: &str) -> Vec<String> {
        let text = self.take(key).unwrap_or_default();
        text.split(',')
            .map(str::trim)
            .filter(|item| !item.is_empty())
            .map(str::to_owned)
            .collect()
    }

    /// A secret that must be given; or `<key>_file` names a file that holds it. Never shown.
    pub fn secret(&mut self, key: &str) -> Result<SecretString, Reported> {
        match self.optional_secret(key)? {
            Some(secret) => Ok(secret),
            None => self.missing(key),
        }
    }

    /// A secret that may be left out; or `<key>_file` names a file that holds it. Never shown.
    pub fn optional_secret(&mut self, key: &str) -> Result<Option<SecretString>, Reported> {
        let file_key = format!("{key}_file");
        let file: Option<PathBuf> = self.optional(&file_key)?;
        match (self.take(key), file) {
            (Some(_), Some(_)) => self.reject(key, &format!("is given twice, also as {file_key}")),
            (Some(text), None) => Ok(Some(text.into())),
            (None, Some(path)) => match std::fs::read_to_string(&path) {
                Ok(text) => Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned().into())),
                Err(error) => self.reject(&file_key, &format!("cannot read {}: {error}", path.display())),
            },
            (None, None) => Ok(None),
        }
    }

    /// Every key below `section`, as a map: `[kafka.properties]`.
    pub fn map(&mut self, section: &str) -> BTreeMap<String, String> {
        let start = format!("{section}.");
        let found: Vec<(String, String)> = self
            .entries
            .iter()
            .filter_map(|(key, entry)| Some((key.strip_prefix(&start)?.to_owned(), entry.text.clone())))
            .collect();
        self.used
            .extend(found.iter().map(|(name, _)| format!("{start}{name}")));
        found.into_iter().collect()
    }

    /// The names of the sections below `section`: `["orders"]` for `[outbox.orders]`.
    pub fn children(&self, section: &str) -> BTreeSet<String> {
        let start = format!("{section}.");
        self.entries
            .keys()
            .filter_map(|key| key.strip_prefix(&start)?.split_once('.'))
            .map(|(name, _)| name.to_owned())
            .collect()
    }

    /// Whether anything is given at `key` or below it.
    pub fn is_given(&self, key: &str) -> bool {
        let start = format!("{key}.");
        self.entries
            .keys()
            .any(|given| given == key || given.starts_with(&start))
    }

    /// Notes that the value of `key` cannot be used. The message must not hold a secret.
    pub fn reject<T>(&mut self, key: &str, message: &str) -> Result<T, Reported> {
        let place = match self.entries.get(key).map(|entry| &entry.origin) {
            Some(Origin::Env(name)) => format!("{key} (from {name})"),
            Some(Origin::File) => format!("{key} (from the file)"),
            None => key.to_owned(),
        };
        self.problems.push(format!("{place}: {message}"));
        Err(Reported)
    }

    fn missing<T>(&mut self, key: &str) -> Result<T, Reported> {
        let variable = format!("{}{}", self.prefix, key.replace('.', "__").to_uppercase());
        self.reject(key, &format!("is missing; give it in the file or as {variable}"))
    }

    fn take(&mut self, key: &str) -> Option<String> {
        self.used.insert(key.to_owned());
        self.entries
            .get(key)
            .map(|entry| entry.text.clone())
            .filter(|text| !text.is_empty())
    }

    fn report_unknown(&mut self) {
        for (key, entry) in &self.entries {
            if !self.used.contains(key) {
                self.problems.push(match &entry.origin {
                    Origin::File => format!("{key}: unknown key in the file"),
                    Origin::Env(name) => format!("{key}: unknown key, from {name}"),
                });
            }
        }
    }
}

/// An address to listen on, as text in error messages asks for it.
pub(crate) fn listen_address(
    reader: &mut Reader,
    key: &str,
    default: SocketAddr,
) -> Result<SocketAddr, Reported> {
    let Some(text) = reader.optional::<String>(key)? else {
        return Ok(default);
    };
    match text.parse() {
        Ok(address) => Ok(address),
        Err(_) => reader.reject(key, &format!("must be ADDRESS:PORT; it is {text:?}")),
    }
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn the_environment_overrides_the_file() {
        let sources = Sources::new("X_")
            .toml("[grpc]\nlisten = \"a\"\nlimit = 5\n")
            .env(env(&[
                ("X_GRPC__LISTEN", "b"),
                ("OTHER_GRPC__LISTEN", "c"),
                ("X_SERVICE_PORT_GRPC", "1"),
            ]));
        let read = |r: &mut Reader| {
            let listen = r.required::<String>("grpc.listen");
            let limit = r.number("grpc.limit", 1u16, 1..=10);
            Ok((listen?, limit?))
        };
        assert_eq!(parse(sources, read).expect("valid"), ("b".to_owned(), 5));
    }

    #[test]
    fn every_problem_is_reported_at_once_and_secrets_are_masked() {
        let sources = Sources::new("X_")
            .toml("typo = 1\n[database]\nurl = \"postgres://u:hunter2@h/d\"\nsize = \"many\"\n[a]\nwait = \"soon\"")
            .env(env(&[("X_GRPC__LISTENN", "hunter2"), ("X_GRPC_LISTEN", "hunter2")]));
        let read = |r: &mut Reader| {
            let size = r.number("database.size", 1u16, 1..=10);
            let second = Duration::from_secs(1);
            let wait = r.duration("a.wait", second, second..=second);
            let needed = r.required::<String>("a.needed");
            let url = r
                .secret("database.url")
                .and_then(|_| r.reject::<()>("database.url", "must be a URL"));
            let () = url?;
            Ok((size?, wait?, needed?))
        };
        let errors = parse(sources, read).expect_err("invalid");
        let text = errors.to_string();
        for part in [
            "unknown environment variable X_GRPC_LISTEN ",
            "database.size (from the file): invalid digit",
            "a.wait (from the file): ",
            "a.needed: is missing; give it in the file or as X_A__NEEDED",
            "database.url (from the file): must be a URL",
            "typo: unknown key in the file",
            "grpc.listenn: unknown key, from X_GRPC__LISTENN",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        assert_eq!(errors.problems().len(), 7, "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }

    #[test]
    fn a_file_that_is_not_toml_is_reported_without_its_text() {
        let errors =
            parse(Sources::new("X_").toml("a = 1\npassword = hunter2\n"), |_| Ok(())).expect_err("invalid");
        assert!(errors.to_string().contains("line 2"), "{errors}");
        assert!(!errors.to_string().contains("hunter2"), "{errors}");
    }

    #[test]
    fn secrets_come_from_files_too() {
        let file = std::env::temp_dir().join(format!("service-secret-{}", std::process::id()));
        std::fs::write(&file, "s3cret\n").expect("writable");
        let sources = Sources::new("X_").toml(&format!("[db]\nurl_file = {:?}", file));
        let secret = parse(sources, |r| r.secret("db.url")).expect("valid");
        std::fs::remove_file(&file).expect("removable");
        assert_eq!(secret.expose_secret(), "s3cret");
        assert!(!format!("{secret:?}").contains("s3cret"));
    }

    #[test]
    fn maps_and_children() {
        let sources = Sources::new("X_")
            .toml("[outbox.orders]\nurl = \"u\"\n[kafka.properties]\n\"linger.ms\" = 5\nbatch.size = 7")
            .env(env(&[("X_OUTBOX__PAYMENTS__URL", "v")]));
        let read = |r: &mut Reader| {
            let names = r.children("outbox");
            let urls: Vec<_> = names
                .iter()
                .map(|n| r.required::<String>(&format!("outbox.{n}.url")))
                .collect();
            Ok((
                names.into_iter().collect::<Vec<_>>(),
                urls,
                r.map("kafka.properties"),
            ))
        };
        let (names, urls, properties) = parse(sources, read).expect("valid");
        assert_eq!(names, ["orders", "payments"]);
        assert_eq!(urls, [Ok("u".to_owned()), Ok("v".to_owned())]);
        let expected = [("batch.size", "7"), ("linger.ms", "5")];
        assert_eq!(
            properties,
            expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into()
        );
    }
}
