//! Names of tables and topics.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use crate::sql::identifier;

/// A table with its schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableName {
    schema: String,
    name: String,
}

impl TableName {
    pub fn schema(&self) -> &str {
        &self.schema
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// As it stands in SQL.
    pub fn quoted(&self) -> String {
        self.sibling(&self.name)
    }

    /// Something else of the same schema, as it stands in SQL.
    pub fn sibling(&self, name: &str) -> String {
        format!("{}.{}", identifier(&self.schema), identifier(name))
    }
}

impl Default for TableName {
    fn default() -> Self {
        Self {
            schema: "public".to_owned(),
            name: "outbox".to_owned(),
        }
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

impl FromStr for TableName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (schema, name) = text.split_once('.').unwrap_or(("public", text));
        if schema.is_empty() || name.is_empty() || name.contains('.') || text.contains('\0') {
            return Err("must be TABLE or SCHEMA.TABLE, without quotes");
        }
        Ok(Self {
            schema: schema.to_owned(),
            name: name.to_owned(),
        })
    }
}

/// A topic name in which `{aggregate_type}` stands for the row's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicTemplate {
    /// What is between the types.
    pieces: Vec<String>,
}

const AGGREGATE_TYPE: &str = "{aggregate_type}";

impl TopicTemplate {
    pub fn topic_of(&self, aggregate_type: &str) -> Cow<'_, str> {
        match self.pieces.as_slice() {
            [topic] => Cow::Borrowed(topic),
            pieces => Cow::Owned(pieces.join(aggregate_type)),
        }
    }

    pub(super) fn prefixed(prefix: &str) -> Self {
        Self::of(&format!("{prefix}.{AGGREGATE_TYPE}"))
    }

    fn of(text: &str) -> Self {
        Self {
            pieces: text.split(AGGREGATE_TYPE).map(str::to_owned).collect(),
        }
    }
}

impl Default for TopicTemplate {
    fn default() -> Self {
        Self::prefixed("events")
    }
}

impl fmt::Display for TopicTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.pieces.join(AGGREGATE_TYPE))
    }
}

impl FromStr for TopicTemplate {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() || text.replace(AGGREGATE_TYPE, "").contains(['{', '}', '/', ' ']) {
            return Err("must be a topic name, in which only {aggregate_type} is replaced");
        }
        Ok(Self::of(text))
    }
}
