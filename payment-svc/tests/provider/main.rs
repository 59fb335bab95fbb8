//! The adapter of the payment provider: against the sandbox, which plays every outcome; against stripe-mock, which knows what
//! Stripe accepts; and against servers that answer what no provider would.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod answers;
mod sandbox;
mod stage;
mod stripe;
