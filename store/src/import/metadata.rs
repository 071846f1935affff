//! Topics, groups and consumer positions of Apache RocketMQ: JSON files, or RocksDB.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use model::name::{DLQ_PREFIX, RETRY_PREFIX, SYSTEM_TOPICS};
use model::{Group, GroupConfig, MessageType, Topic, TopicConfig, limits};
use serde_json::Value;

use super::{REVIVE_TOPIC, ReadRows};
use crate::error::{Result, StoreError};
use crate::fs::Fs;
use crate::kv::Row;

/// What the configuration says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    pub topics: Vec<TopicConfig>,
    pub groups: Vec<GroupConfig>,
    /// Group, topic, queue, next offset.
    pub offsets: Vec<(Group, Topic, u32, u64)>,
    /// How far POP has put messages that were not acknowledged back, by queue of its own topic.
    pub revived: BTreeMap<u32, u64>,
}

type Table = serde_json::Map<String, Value>;

/// Topics, groups and positions by name, wherever the broker kept them.
#[derive(Default)]
struct Tables {
    topics: Table,
    groups: Table,
    offsets: Table,
}

impl Tables {
    fn read(fs: &dyn Fs, read_rows: &ReadRows<'_>, config: &Path) -> Result<Self> {
        let table = |file: &str, name: &str| -> Result<Table> {
            let value = read_json(fs, &config.join(file))?;
            Ok(value.get(name).and_then(Value::as_object).cloned().unwrap_or_default())
        };
        let mut out = Self {
            topics: table("topics.json", "topicConfigTable")?,
            groups: table("subscriptionGroup.json", "subscriptionGroupTable")?,
            offsets: table("consumerOffset.json", "offsetTable")?,
        };
        // A broker with `storeType=defaultRocksDB` keeps them in databases: one each, or (v2) one for all.
        let rows = |name: &str| -> Result<Vec<Row>> {
            let dir = config.join(name);
            let there = !fs.list(&dir).map_err(|e| StoreError::io("listed", &dir, e))?.is_empty();
            if there { read_rows(&dir) } else { Ok(Vec::new()) }
        };
        let tables = [
            ("topics", &mut out.topics),
            ("subscriptionGroups", &mut out.groups),
            ("consumerOffsets", &mut out.offsets),
        ];
        for (name, table) in tables {
            for (key, value) in rows(name)? {
                let key = String::from_utf8_lossy(&key).into_owned();
                // Other rows, of versions, are not JSON objects.
                if let Some(value) = parse(&value).filter(Value::is_object) {
                    table.insert(key, value.get("offsetTable").cloned().unwrap_or(value));
                }
            }
        }
        for (key, value) in rows("rdb")? {
            out.add_v2(&key, &value);
        }
        Ok(out)
    }

    /// A row of the second generation (storage spec §3.2): prefix 1, table 2, kind 1 (2: data); big-endian.
    fn add_v2(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let (head, rest) = key.split_first_chunk::<4>()?;
        let name = |rest: &[u8]| -> Option<(String, usize)> {
            let len = usize::from(u16::from_be_bytes(*rest.first_chunk()?));
            Some((String::from_utf8(rest.get(2..2 + len)?.to_vec()).ok()?, 2 + len))
        };
        match head {
            [1, 0, 1, 2] => {
                // group, 1, topic, 1, queue
                let (group, at) = name(rest)?;
                let rest = rest.get(at + 1..)?;
                let (topic, at) = name(rest)?;
                let queue = u32::from_be_bytes(*rest.get(at + 1..)?.first_chunk()?);
                let offset = u64::from_be_bytes(*value.first_chunk()?);
                let queues =
                    self.offsets.entry(format!("{topic}@{group}")).or_insert(Value::Object(Table::new()));
                queues.as_object_mut()?.insert(queue.to_string(), offset.into());
            }
            [1, 0, table @ (3 | 4), 2] => {
                let (name, _) = name(rest)?;
                let config = parse(value.get(1..)?)?;
                let table = if *table == 3 { &mut self.topics } else { &mut self.groups };
                table.insert(name, config);
            }
            _ => {}
        }
        Some(())
    }
}

pub(super) fn read(
    fs: &dyn Fs,
    read_rows: &ReadRows<'_>,
    config: &Path,
    stored: &BTreeMap<String, u64>,
) -> Result<Metadata> {
    let Tables { topics, groups, offsets } = Tables::read(fs, read_rows, config)?;
    let mut out = Metadata::default();
    let mut known = BTreeSet::new();
    for (name, config) in topics {
        // Its own topics are left alone, but for those that hold messages somebody sent.
        let own =
            SYSTEM_TOPICS.contains(&name.as_str()) || is_system(&name) || name.starts_with(RETRY_PREFIX);
        if own && !name.starts_with(DLQ_PREFIX) {
            continue;
        }
        // Topics that it makes of its cluster and broker name for others to inherit from.
        let inherited = config.get("perm").and_then(Value::as_u64).is_some_and(|p| p & 1 != 0);
        if inherited && !stored.contains_key(&name) {
            continue;
        }
        let number = |key: &str| config.get(key).and_then(Value::as_u64).unwrap_or(0) as u32;
        let queues = number("writeQueueNums").max(number("readQueueNums")).clamp(1, limits::QUEUES_MAX);
        let kind = config.get("attributes").and_then(|a| a.get("message.type")).and_then(Value::as_str);
        let types = match kind {
            Some("FIFO") => [MessageType::Fifo].into(),
            Some("DELAY") => [MessageType::Delay].into(),
            Some("TRANSACTION") => [MessageType::Transaction].into(),
            Some("MIXED") => MessageType::MIXED.into(),
            _ => [MessageType::Normal].into(),
        };
        known.insert(name.clone());
        let topic = Topic::stored(&name);
        out.topics.push(TopicConfig { queues, types, version: 1, ..TopicConfig::normal(topic) });
    }
    // A topic whose configuration is lost still has its messages.
    for topic in
        stored.keys().filter(|t| !known.contains(*t) && !is_system(t) && !t.starts_with(RETRY_PREFIX))
    {
        let topic = Topic::stored(topic);
        out.topics.push(TopicConfig { version: 1, ..TopicConfig::normal(topic) });
    }
    for (name, config) in groups {
        if is_system_group(&name) {
            continue;
        }
        let fifo = config.get("consumeMessageOrderly").and_then(Value::as_bool).unwrap_or(false);
        // The reference counts retries, we count deliveries.
        let retries = config.get("retryMaxTimes").and_then(Value::as_u64);
        let attempts = retries.and_then(|retries| u32::try_from(retries + 1).ok());
        let max_attempts = attempts.unwrap_or(limits::ATTEMPTS_DEFAULT);
        let group = Group::stored(&name);
        out.groups.push(GroupConfig { fifo, max_attempts, version: 1, ..GroupConfig::concurrent(group) });
    }
    for (place, queues) in offsets {
        let Some((topic, group)) = place.rsplit_once('@') else { continue };
        if topic.starts_with(REVIVE_TOPIC) {
            let queues = queues.as_object().into_iter().flatten();
            out.revived.extend(queues.filter_map(|(q, next)| Some((q.parse().ok()?, next.as_u64()?))));
        }
        if is_system_group(group) || is_system(topic) {
            continue;
        }
        for (queue, next) in queues.as_object().into_iter().flatten() {
            if let (Ok(queue), Some(next)) = (queue.parse(), next.as_u64()) {
                out.offsets.push((Group::stored(group), Topic::stored(topic), queue, next));
            }
        }
    }
    Ok(out)
}

fn is_system(topic: &str) -> bool {
    let prefixes =
        ["rmq_sys_", "RMQ_SYS_", "SCHEDULE_TOPIC", "OFFSET_MOVED_EVENT", "SELF_TEST_TOPIC", "TBW102"];
    prefixes.iter().any(|p| topic.starts_with(p))
        || topic.ends_with("_REPLY_TOPIC")
        || topic == "BenchmarkTest"
}

fn is_system_group(group: &str) -> bool {
    let names = ["TOOLS_CONSUMER", "FILTERSRV_CONSUMER", "SELF_TEST_C_GROUP", "CID_ONS-HTTP-PROXY"];
    group.starts_with("CID_RMQ_SYS_") || group.starts_with("CID_ONSAPI_") || names.contains(&group)
}

/// A JSON file, or null if there is none. The reference writes numbers as keys without quotes.
fn read_json(fs: &dyn Fs, path: &Path) -> Result<Value> {
    let file = match fs.open_read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Value::Null),
        file => file.map_err(|e| StoreError::io("opened", path, e))?,
    };
    let len = file.len().map_err(|e| StoreError::io("read", path, e))?;
    let bytes =
        crate::fs::read_exact_at(&*file, len as usize, 0).map_err(|e| StoreError::io("read", path, e))?;
    let text = String::from_utf8_lossy(&bytes);
    serde_json::from_str(&quote_keys(&text))
        .map_err(|e| StoreError::Damaged { path: path.into(), what: format!("not JSON: {e}") })
}

fn parse(bytes: &[u8]) -> Option<Value> {
    serde_json::from_str(&quote_keys(&String::from_utf8_lossy(bytes))).ok()
}

/// Puts quotes around numbers that are keys.
fn quote_keys(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 64);
    let mut rest = text;
    let (mut in_string, mut escaped, mut key_may_follow) = (false, false, false);
    while let Some(c) = rest.chars().next() {
        if !in_string && key_may_follow && c.is_ascii_digit() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let (number, after) = rest.split_at(digits);
            let is_key = after.trim_start().starts_with(':');
            out.push_str(&if is_key { format!("{number:?}") } else { number.to_owned() });
            (rest, key_may_follow) = (after, false);
            continue;
        }
        match c {
            '"' if !escaped => in_string = !in_string,
            '{' | ',' if !in_string => key_may_follow = true,
            c if c.is_whitespace() => {}
            _ => key_may_follow = false,
        }
        escaped = in_string && c == '\\' && !escaped;
        out.push(c);
        rest = &rest[c.len_utf8()..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_as_keys_are_read() {
        let text = r#"{"offsetTable":{"T@G":{0:5,1 : 3, "2":[1,2]},"a\"{1:":{}}}"#;
        let value: Value = serde_json::from_str(&quote_keys(text)).unwrap();
        assert_eq!(value["offsetTable"]["T@G"]["1"], 3);
        assert_eq!(value["offsetTable"]["T@G"]["2"][0], 1);
        assert!(value["offsetTable"].get("a\"{1:").is_some());
    }

    proptest! {
        #[test]
        fn sound_json_stays_as_it_is(text in "[a-z0-9{}:,\"\\\\ ]{0,40}") {
            if let Ok(value) = serde_json::from_str::<Value>(&text) {
                prop_assert_eq!(serde_json::from_str::<Value>(&quote_keys(&text)).unwrap(), value);
            }
        }
    }
}
