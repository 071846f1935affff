//! Names of topics and groups. A name is stored with its namespace in front: `name`, or `namespace%name`;
//! so the namespace is part of every key. Retry and dead-letter topics are named as RocketMQ 5.x (V2) does:
//! `%RETRY%group+topic`, `%DLQ%group`.

use std::fmt;
use std::sync::Arc;

use crate::limits;

pub const RETRY_PREFIX: &str = "%RETRY%";
pub const DLQ_PREFIX: &str = "%DLQ%";
/// Prefix of topics that belong to the server; clients may not touch them.
pub const SYSTEM_PREFIX: &str = "rmq_sys_";
/// The reserved topic whose records are the server's own change records.
pub const CHANGES_TOPIC: &str = "rmq_sys_ferry_changes";
/// Messages that wait for their time, with their topic and queue in properties. No queue has them.
pub const TIMER_TOPIC: &str = "rmq_sys_ferry_timer";
/// Half messages, likewise.
pub const HALF_TOPIC: &str = "rmq_sys_ferry_half";

pub const SYSTEM_TOPICS: [&str; 10] = [
    "TBW102",
    "SCHEDULE_TOPIC_XXXX",
    "BenchmarkTest",
    "RMQ_SYS_TRANS_HALF_TOPIC",
    "RMQ_SYS_TRANS_OP_HALF_TOPIC",
    "RMQ_SYS_TRACE_TOPIC",
    "TRANS_CHECK_MAX_TIME_TOPIC",
    "SELF_TEST_TOPIC",
    "OFFSET_MOVED_EVENT",
    "CHECKPOINT_TOPIC",
];

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("the name is blank; give it 1 to {max} characters")]
    Blank { max: usize },
    #[error("the name has {len} characters; at most {max} are allowed")]
    TooLong { len: usize, max: usize },
    #[error("the name {name:?} contains {character:?}; allowed are letters, digits, '_', '-', '%' and '|'")]
    IllegalCharacter { name: String, character: char },
    #[error("{name:?} belongs to the server; choose another name")]
    System { name: String },
    #[error("the namespace {namespace:?} is not made of letters, digits, '_' and '-', at most {max}")]
    Namespace { namespace: String, max: usize },
}

fn check(name: &str, max: usize) -> Result<(), NameError> {
    if name.trim().is_empty() {
        return Err(NameError::Blank { max });
    }
    let len = name.chars().count();
    if len > max {
        return Err(NameError::TooLong { len, max });
    }
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '%' | '|');
    match name.chars().find(|c| !legal(*c)) {
        Some(character) => Err(NameError::IllegalCharacter { name: name.into(), character }),
        None => Ok(()),
    }
}

fn qualify(namespace: &str, name: &str) -> Result<Arc<str>, NameError> {
    if namespace.is_empty() {
        return Ok(name.into());
    }
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if namespace.len() > limits::NAMESPACE_MAX_CHARS || !namespace.chars().all(legal) {
        return Err(NameError::Namespace { namespace: namespace.into(), max: limits::NAMESPACE_MAX_CHARS });
    }
    // `%DLQ%g` in namespace n is `%DLQ%n%g`: the prefix stays in front.
    for prefix in [DLQ_PREFIX, RETRY_PREFIX] {
        if let Some(rest) = name.strip_prefix(prefix) {
            return Ok(format!("{prefix}{namespace}%{rest}").into());
        }
    }
    Ok(format!("{namespace}%{name}").into())
}

/// A topic's full name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Topic(Arc<str>);

impl Topic {
    /// A name that a client gave.
    pub fn new(namespace: &str, name: &str) -> Result<Self, NameError> {
        check(name, limits::TOPIC_NAME_MAX_CHARS)?;
        if SYSTEM_TOPICS.contains(&name) || name.starts_with(SYSTEM_PREFIX) {
            return Err(NameError::System { name: name.into() });
        }
        qualify(namespace, name).map(Topic)
    }

    /// A full name that the server itself wrote.
    pub fn stored(full: &str) -> Self {
        Self(full.into())
    }

    /// Where messages go that a group has not acknowledged in time.
    pub fn retry(group: &Group, topic: &Topic) -> Self {
        Self(format!("{RETRY_PREFIX}{group}+{topic}").into())
    }

    /// Where messages go that a group has failed to consume.
    pub fn dead_letter(group: &Group) -> Self {
        Self(format!("{DLQ_PREFIX}{group}").into())
    }

    pub fn is_retry(&self) -> bool {
        self.0.starts_with(RETRY_PREFIX)
    }

    pub fn is_dead_letter(&self) -> bool {
        self.0.starts_with(DLQ_PREFIX)
    }

    pub fn is_system(&self) -> bool {
        self.0.starts_with(SYSTEM_PREFIX)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Namespace and name; the namespace is empty where there is none.
    pub fn split(&self) -> (&str, &str) {
        split(&self.0)
    }
}

/// A consumer group's full name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Group(Arc<str>);

impl Group {
    pub fn new(namespace: &str, name: &str) -> Result<Self, NameError> {
        check(name, limits::GROUP_NAME_MAX_CHARS)?;
        if name.starts_with("CID_RMQ_SYS_") {
            return Err(NameError::System { name: name.into() });
        }
        qualify(namespace, name).map(Group)
    }

    pub fn stored(full: &str) -> Self {
        Self(full.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn split(&self) -> (&str, &str) {
        split(&self.0)
    }
}

/// Namespace and name of a full name.
pub fn split(full: &str) -> (&str, &str) {
    if full.starts_with(RETRY_PREFIX) || full.starts_with(DLQ_PREFIX) {
        return ("", full);
    }
    full.split_once('%').unwrap_or(("", full))
}

macro_rules! text {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }
    )*};
}
text!(Topic, Group);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_reference_refuses_is_refused() {
        assert!(matches!(Topic::new("", " "), Err(NameError::Blank { .. })));
        assert!(matches!(Topic::new("", "a b"), Err(NameError::IllegalCharacter { character: ' ', .. })));
        assert!(Topic::new("", &"x".repeat(127)).is_ok());
        assert!(matches!(Topic::new("", &"x".repeat(128)), Err(NameError::TooLong { len: 128, .. })));
        assert!(matches!(Topic::new("", "TBW102"), Err(NameError::System { .. })));
        assert!(matches!(Topic::new("", CHANGES_TOPIC), Err(NameError::System { .. })));
        assert!(Topic::new("", "%DLQ%pg").is_ok());
        assert!(matches!(Group::new("", "CID_RMQ_SYS_x"), Err(NameError::System { .. })));
    }

    #[test]
    fn the_namespace_is_part_of_the_name() {
        let topic = Topic::new("ns", "t").unwrap();
        assert_eq!(topic.as_str(), "ns%t");
        assert_eq!(topic.split(), ("ns", "t"));
        assert_ne!(topic, Topic::new("", "t").unwrap());
        let group = Group::new("ns", "g").unwrap();
        assert_eq!(Topic::retry(&group, &topic).as_str(), "%RETRY%ns%g+ns%t");
        assert_eq!(Topic::new("ns", "%DLQ%g").unwrap(), Topic::dead_letter(&group));
        assert!(matches!(Topic::new("n%s", "t"), Err(NameError::Namespace { .. })));
    }
}
