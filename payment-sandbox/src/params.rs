//! Parameters: form-encoded, nested ones in brackets. One that nobody asked for is refused, as Stripe does.

use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use crate::error::ApiError;
use crate::model::Metadata;

/// The parameters of a request that have not been read yet.
#[derive(Debug, Clone, Default)]
pub struct Params(Vec<(String, String)>);

impl Params {
    /// From a body or a query.
    pub fn parse(text: &[u8]) -> Self {
        Self(form_urlencoded::parse(text).into_owned().collect())
    }

    /// What tells this request from others. Keyed, so that the card number in it cannot be found by trying.
    pub fn fingerprint(&self, secret: &str, path: &str) -> String {
        let mut sorted = self.0.clone();
        sorted.sort();
        let mut hash = Sha256::new();
        for part in [secret, path]
            .into_iter()
            .chain(sorted.iter().flat_map(|(key, value)| [key.as_str(), value]))
        {
            hash.update(part.len().to_be_bytes());
            hash.update(part);
        }
        // Letters only, so that it never looks like a card number.
        let letter = |nibble: u8| char::from(b'a' + nibble);
        hash.finalize()
            .iter()
            .flat_map(|byte| [letter(byte >> 4), letter(byte & 15)])
            .collect()
    }

    /// The value of a parameter that may be left out; an empty one is left out.
    pub fn optional(&mut self, key: &str) -> Option<String> {
        let at = self.0.iter().position(|(name, _)| name == key)?;
        Some(self.0.remove(at).1).filter(|value| !value.is_empty())
    }

    /// The value of a parameter that must be given.
    pub fn required(&mut self, key: &str) -> Result<String, ApiError> {
        self.optional(key)
            .ok_or_else(|| ApiError::invalid("parameter_missing", key, "Missing required param."))
    }

    /// The value of a parameter as a number or a truth.
    pub fn parsed<T: FromStr>(&mut self, key: &str) -> Result<Option<T>, ApiError> {
        let text = self.optional(key);
        text.map(|text| text.parse().map_err(|_| ApiError::unusable(key)))
            .transpose()
    }

    /// `metadata[…]`
    pub fn metadata(&mut self) -> Result<Metadata, ApiError> {
        let mut metadata = Metadata::new();
        self.0.retain(|(name, value)| {
            let key = name
                .strip_prefix("metadata[")
                .and_then(|rest| rest.strip_suffix(']'));
            if let Some(key) = key {
                metadata.insert(key.to_owned(), value.clone());
            }
            key.is_none()
        });
        let fits = metadata.len() <= 50
            && metadata
                .iter()
                .all(|(key, value)| key.len() <= 40 && value.len() <= 500);
        if fits {
            Ok(metadata)
        } else {
            Err(ApiError::unusable("metadata"))
        }
    }

    /// Removes `payment_method_types[]`; only cards are known here.
    pub fn method_types(&mut self) -> Result<(), ApiError> {
        let is_type = |name: &str| name.starts_with("payment_method_types[");
        if self
            .0
            .iter()
            .any(|(name, value)| is_type(name) && value != "card")
        {
            return Err(ApiError::unusable("payment_method_types"));
        }
        self.0.retain(|(name, _)| !is_type(name));
        Ok(())
    }

    /// Refuses what nobody has read.
    pub fn finish(&self) -> Result<(), ApiError> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => Err(ApiError::invalid(
                "parameter_unknown",
                name,
                "Received unknown parameter.",
            )),
        }
    }
}
