//! `[provider]`

use std::time::Duration;

use reqwest::Url;
use secrecy::SecretString;
use service::config::{Reader, Reported};

const DEFAULT_BASE_URL: &str = "https://api.stripe.com";
const SECOND: Duration = Duration::from_secs(1);

/// `[provider]`: where the payment provider is, and who we are to it.
#[derive(Debug, Clone)]
pub struct Config {
    /// `provider.base_url`
    pub base_url: Url,
    /// `provider.secret_key`, or `provider.secret_key_file`.
    pub secret_key: SecretString,
    /// `provider.timeout`: the longest that one call may take, from connecting to the end of the answer.
    pub timeout: Duration,
    /// `provider.connect_timeout`
    pub connect_timeout: Duration,
}

impl Config {
    /// Reads `[provider]`. Cards and the key go over what is configured here, so it must be https, unless it is on this
    /// machine or `provider.allow_plain_http` says that the network in between is trusted with them.
    pub fn read(reader: &mut Reader) -> Result<Self, Reported> {
        let plain_http = reader.or("provider.allow_plain_http", false);
        let base_url = reader
            .or("provider.base_url", DEFAULT_BASE_URL.to_owned())
            .and_then(|text| match check_url(&text, plain_http == Ok(true)) {
                Ok(url) => Ok(url),
                Err(problem) => reader.reject("provider.base_url", problem),
            });
        let secret_key = reader.secret("provider.secret_key");
        let timeout = reader.duration("provider.timeout", 10 * SECOND, SECOND / 10..=120 * SECOND);
        let connect_timeout =
            reader.duration("provider.connect_timeout", 3 * SECOND, SECOND / 100..=60 * SECOND);
        plain_http?;
        Ok(Self {
            base_url: base_url?,
            secret_key: secret_key?,
            timeout: timeout?,
            connect_timeout: connect_timeout?,
        })
    }
}

fn check_url(text: &str, plain_http_allowed: bool) -> Result<Url, &'static str> {
    let url: Url = text.parse().map_err(|_| "must be like https://api.stripe.com")?;
    if !url.has_host() || !url.username().is_empty() || url.password().is_some() || url.query().is_some() {
        return Err("must be like https://api.stripe.com");
    }
    match url.scheme() {
        "https" => Ok(url),
        "http" if plain_http_allowed || is_loopback(&url) => Ok(url),
        "http" => Err("is plain http to another machine; set provider.allow_plain_http if it may be"),
        _ => Err("must be like https://api.stripe.com"),
    }
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || address
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use service::config::{Sources, parse};

    use super::*;

    fn read(toml: &str) -> Result<Config, String> {
        parse(
            Sources::new("X_").toml(&format!("[provider]\n{toml}")),
            Config::read,
        )
        .map_err(|errors| errors.to_string())
    }

    #[test]
    fn only_the_key_must_be_given() {
        let config = read("secret_key = \"sk_1\"").expect("valid");
        assert_eq!(config.base_url.as_str(), "https://api.stripe.com/");
        assert!(!format!("{config:?}").contains("sk_1"));
        let error = read("").expect_err("no key");
        assert!(error.contains("provider.secret_key"), "{error}");
    }

    #[test]
    fn cards_do_not_cross_a_network_in_the_clear_by_accident() {
        let with = |url: &str, more: &str| read(&format!("secret_key = \"k\"\nbase_url = \"{url}\"\n{more}"));
        for url in [
            "https://api.stripe.com",
            "https://sandbox.internal:8443/prefix",
            "http://127.0.0.1:12111",
            "http://localhost:12111",
            "http://[::1]:12111",
        ] {
            with(url, "").expect(url);
        }
        for url in [
            "http://api.stripe.com",
            "http://10.0.0.1",
            "http://127.0.0.1.example.org",
            "http://localhost.example.org",
            "ftp://127.0.0.1",
            "https://user:pass@host",
            "api.stripe.com",
        ] {
            let error = with(url, "").expect_err(url);
            assert!(error.contains("provider.base_url"), "{error}");
        }
        with("http://payment-sandbox:12111", "allow_plain_http = true").expect("asked for");
    }
}
