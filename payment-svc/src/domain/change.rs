//! What was done to a payment, to be stored as a whole.

use chrono::{DateTime, Utc};

use super::payment::{self, Command, Event, NewPayment, Payment, Refusal, Status};

/// A payment as it is now, the events that made it so, and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    payment: Payment,
    events: Vec<Event>,
    before: Option<(Status, i64)>,
}

impl Change {
    /// Begins a payment.
    pub fn start(new: NewPayment, now: DateTime<Utc>) -> Self {
        Self {
            payment: Payment::pending(new, now),
            events: Vec::new(),
            before: None,
        }
    }

    /// Nothing yet, of a payment that is stored.
    pub fn of(payment: Payment) -> Self {
        Self {
            before: Some((payment.status, payment.version)),
            payment,
            events: Vec::new(),
        }
    }

    /// Decides and applies.
    ///
    /// # Errors
    /// When the payment's state does not allow it.
    pub fn then(mut self, command: Command, now: DateTime<Utc>) -> Result<Self, Refusal> {
        for event in payment::decide(&self.payment, command, now)? {
            self.payment = payment::apply(self.payment, &event).map_err(Refusal::Inconsistent)?;
            self.events.push(event);
        }
        Ok(self)
    }

    /// Writes ahead which charge of the provider's is this payment's.
    ///
    /// # Errors
    /// When it has another one, or is settled.
    pub fn with_intent(mut self, intent: &str) -> Result<Self, Refusal> {
        match &self.payment.intent {
            _ if self.payment.status != Status::Pending => Err(Refusal::Settled(self.payment.status)),
            Some(known) if known != intent => Err(Refusal::OtherIntent),
            _ => {
                self.payment.intent = Some(intent.to_owned());
                Ok(self)
            }
        }
    }

    /// Writes ahead that the money is to be given back.
    ///
    /// # Errors
    /// [`Refusal::NotReceived`] when there is none, [`Refusal::Settled`] when that has been done.
    pub fn refunding(mut self, now: DateTime<Utc>) -> Result<Self, Refusal> {
        match self.payment.status {
            Status::Received => {
                self.payment.status = Status::RefundPending;
                self.payment.updated_at = now.max(self.payment.updated_at);
                Ok(self)
            }
            Status::Pending | Status::Failed => Err(Refusal::NotReceived),
            status => Err(Refusal::Settled(status)),
        }
    }

    /// The payment after the change.
    pub fn payment(&self) -> &Payment {
        &self.payment
    }

    /// What happened, oldest first.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// Status and version before the change; none when there was no payment.
    pub fn before(&self) -> Option<(Status, i64)> {
        self.before
    }

    /// The payment after the change.
    pub fn into_payment(self) -> Payment {
        self.payment
    }
}
