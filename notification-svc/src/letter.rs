//! What a mail says, as a message for the mail server: plain text and HTML from `templates/`. What comes from events is escaped in HTML
//! by the templates' engine, and has no way into the headers.

use std::time::SystemTime;

use askama::Template as _;
use lettre::Message;
use lettre::message::header::{Header, HeaderName, HeaderValue};
use lettre::message::{Mailbox, MultiPart};

use crate::domain::{Content, MailId, OrderId};

/// What a mail is made of besides its content.
#[derive(Debug, Clone)]
pub struct Letter<'a> {
    pub id: MailId,
    pub order_id: OrderId,
    pub content: &'a Content,
    /// What the user is addressed by, if that is known.
    pub first_name: Option<&'a str>,
}

/// Why there is no message.
#[derive(Debug, thiserror::Error)]
pub enum LetterError {
    #[error("the template cannot be filled in")]
    Template(#[from] askama::Error),
    #[error("the message cannot be made")]
    Message(#[from] lettre::error::Error),
}

/// Plain text.
#[derive(askama::Template)]
#[template(path = "mail.txt")]
struct Text<'a> {
    letter: &'a Letter<'a>,
    shop: &'a str,
}

/// HTML.
#[derive(askama::Template)]
#[template(path = "mail.html")]
struct Html<'a> {
    letter: &'a Letter<'a>,
    shop: &'a str,
    subject: &'a str,
}

/// Tells other programs not to answer (RFC 3834).
#[derive(Debug, Clone)]
struct AutoSubmitted;

impl Header for AutoSubmitted {
    fn name() -> HeaderName {
        HeaderName::new_from_ascii_str("Auto-Submitted")
    }

    fn parse(_: &str) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Self)
    }

    fn display(&self) -> HeaderValue {
        HeaderValue::new(Self::name(), "auto-generated".to_owned())
    }
}

impl Letter<'_> {
    /// The subject.
    pub fn subject(&self) -> String {
        let number = self.order_id;
        match self.content {
            Content::Placed { .. } => format!("We have your order {number}"),
            Content::Confirmed => format!("Your order {number} is confirmed"),
            Content::Shipped { .. } => format!("Your order {number} is on its way"),
            Content::Cancelled { .. } => format!("Your order {number} is cancelled"),
            Content::Refunded { .. } => format!("Your money for order {number} is on its way back"),
        }
    }

    /// The message, from `from` to `to`. Its id follows from the event that it answers and the domain of `from`, so that a message that
    /// is sent twice can be recognised.
    ///
    /// # Errors
    /// [`LetterError`]; none is expected.
    pub fn message(&self, from: &Mailbox, to: Mailbox, now: SystemTime) -> Result<Message, LetterError> {
        let shop = from.name.as_deref().unwrap_or("the shop");
        let subject = self.subject();
        let text = Text { letter: self, shop }.render()?;
        let html = Html {
            letter: self,
            shop,
            subject: &subject,
        }
        .render()?;
        let message = Message::builder()
            .from(from.clone())
            .to(to)
            .subject(subject)
            .date(now)
            .message_id(Some(format!("<{}@{}>", self.id, from.email.domain())))
            .header(AutoSubmitted)
            .multipart(MultiPart::alternative_plain_html(text, html))?;
        Ok(message)
    }
}
