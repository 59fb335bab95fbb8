//! Creating topics, for a deployment's first start.

use std::str::FromStr;
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

/// A topic to create: `NAME=PARTITIONS`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    pub name: String,
    pub partitions: i32,
}

impl FromStr for Topic {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "must be NAME=PARTITIONS, for example events.order=6";
        let (name, partitions) = text.split_once('=').ok_or(FORM)?;
        match partitions.parse() {
            Ok(partitions) if partitions > 0 && !name.is_empty() => Ok(Self {
                name: name.to_owned(),
                partitions,
            }),
            _ => Err(FORM),
        }
    }
}

/// Why topics were not created.
#[derive(Debug, thiserror::Error)]
pub enum TopicError {
    #[error("Kafka did not take the request")]
    Request(#[source] KafkaError),
    #[error("topic {name} was not created: {code}")]
    Refused { name: String, code: RDKafkaErrorCode },
}

const TIMEOUT: Duration = Duration::from_secs(30);

/// Creates the topics that do not exist yet, as event topics: everything is kept, since projections are rebuilt from
/// them, and the broker's clock stamps the records. Returns the names of those created.
///
/// # Errors
/// When a topic neither exists nor could be created.
pub async fn create(
    brokers: &ClientConfig,
    topics: &[Topic],
    replication: i32,
) -> Result<Vec<String>, TopicError> {
    let admin: AdminClient<DefaultClientContext> = brokers.create().map_err(TopicError::Request)?;
    let wanted: Vec<NewTopic<'_>> = topics
        .iter()
        .map(|topic| {
            NewTopic::new(
                &topic.name,
                topic.partitions,
                TopicReplication::Fixed(replication),
            )
            .set("retention.ms", "-1")
            .set("message.timestamp.type", "LogAppendTime")
        })
        .collect();
    let options = AdminOptions::new()
        .operation_timeout(Some(TIMEOUT))
        .request_timeout(Some(TIMEOUT));
    let mut created = Vec::new();
    for result in admin
        .create_topics(&wanted, &options)
        .await
        .map_err(TopicError::Request)?
    {
        match result {
            Ok(name) => created.push(name),
            Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((name, code)) => return Err(TopicError::Refused { name, code }),
        }
    }
    Ok(created)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_are_names_with_partitions() {
        assert_eq!(
            "a.b=3".parse(),
            Ok(Topic {
                name: "a.b".to_owned(),
                partitions: 3
            })
        );
        for bad in ["a", "a=", "a=0", "=3", "a=x"] {
            assert!(bad.parse::<Topic>().is_err(), "{bad}");
        }
    }
}
