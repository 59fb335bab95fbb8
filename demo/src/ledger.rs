//! What the payment provider has done: the sandbox's ledger.

use anyhow::{Context, Result, bail};
use local_stack::process::http_get;
use serde::Deserialize;

/// Money that was taken.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Charge {
    pub(crate) id: String,
    pub(crate) payment_intent: String,
    pub(crate) amount: i64,
    pub(crate) currency: String,
    /// As payment-svc told the provider.
    pub(crate) payment_id: Option<String>,
    pub(crate) order_id: Option<String>,
}

/// Money that was given back, or is on its way.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Refund {
    pub(crate) id: String,
    pub(crate) payment_intent: String,
    pub(crate) amount: i64,
    pub(crate) currency: String,
    pub(crate) status: String,
    pub(crate) payment_id: Option<String>,
    pub(crate) order_id: Option<String>,
}

/// All of it.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Ledger {
    pub(crate) charges: Vec<Charge>,
    pub(crate) refunds: Vec<Refund>,
}

impl Ledger {
    /// Asks the sandbox at this URL.
    pub(crate) async fn read(sandbox: &str) -> Result<Self> {
        let address = sandbox.trim_start_matches("http://").parse()?;
        let (status, body) = http_get(address, "/sandbox/ledger").await?;
        if status != 200 {
            bail!("the payment sandbox answers {status} to the question for its ledger");
        }
        serde_json::from_str(&body).context("the payment sandbox's ledger is not understood")
    }
}
