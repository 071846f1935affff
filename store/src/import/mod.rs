//! Taking over a store folder of Apache RocketMQ: the log as it is, queues and keys made from it, topics, groups and
//! consumer offsets from its configuration. The source is only read.

mod metadata;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use model::message;
use model::name::RETRY_PREFIX;
use model::{Group, GroupConfig, Timestamp, Topic};
use serde_json::Value;

pub use self::metadata::Metadata;
use crate::change::{Change, CursorKey};
use crate::error::{Result, StoreError};
use crate::fs::Fs;
use crate::inspect::{self, Flaw};
use crate::kv::Row;
use crate::log::record::Record;
use crate::log::walk::Step;

/// A folder that can be taken over, as it was found.
#[derive(Debug, Default)]
pub struct Source {
    pub dir: PathBuf,
    /// Base and length.
    pub files: BTreeMap<u64, (PathBuf, u64)>,
    pub segment_bytes: u64,
    /// Offset after the last record.
    pub end: u64,
    pub records: u64,
    /// Records of each topic.
    pub topics: BTreeMap<String, u64>,
    pub damage: Vec<Flaw>,
    pub metadata: Metadata,
    /// What POP consumers had in flight: its state is messages of a topic of the broker's.
    pub pops: Pops,
    /// What is not carried over, for the operator.
    pub remarks: Vec<String>,
}

/// Topics that a broker fills for itself; what waits in them is not carried over.
const PENDING: [(&str, &str); 3] = [
    ("rmq_sys_wheel_timer", "scheduled messages that were not yet due"),
    ("SCHEDULE_TOPIC_XXXX", "messages with a delay level that were not yet due"),
    ("RMQ_SYS_TRANS_HALF_TOPIC", "half messages, decided or not"),
];

/// Where POP keeps what it has handed out.
const REVIVE_TOPIC: &str = "rmq_sys_REVIVE_LOG_";

/// Gives the rows of a RocksDB folder's default family, without changing the folder.
pub type ReadRows<'a> = dyn Fn(&Path) -> Result<Vec<Row>> + 'a;

/// Reads all of a folder. `progress` is told of bytes read.
pub fn scan(
    fs: &dyn Fs,
    read_rows: &ReadRows<'_>,
    dir: &Path,
    mut progress: impl FnMut(u64),
) -> Result<Source> {
    let files = inspect::log_files(fs, &dir.join("commitlog"))?;
    let damaged = |path: &Path, what: String| StoreError::Damaged { path: path.into(), what };
    let Some((first, (_, segment_bytes))) = files.first_key_value().map(|(b, f)| (*b, f.clone())) else {
        let what = "no commitlog folder with files in it; name the folder that holds commitlog, consumequeue and config";
        return Err(damaged(dir, what.into()));
    };
    let mut source = Source { dir: dir.into(), segment_bytes, end: first, ..Source::default() };
    let mut expected = first;
    for (base, (path, len)) in &files {
        if *len != segment_bytes || *base != expected {
            let what = format!(
                "{len} bytes at {base}; expected {segment_bytes} at {expected}: a file is missing or cut"
            );
            return Err(damaged(path, what));
        }
        expected += segment_bytes;
        inspect::commit_log(fs, path, *base, |step| {
            match step {
                Step::Record(r) => {
                    source.records += 1;
                    source.end = r.log_offset + u64::from(r.size);
                    if !is_pop_state(r) {
                        *source.topics.entry(r.topic.to_string()).or_default() += 1;
                    }
                    source.pops.see(r);
                    progress(u64::from(r.size));
                }
                Step::Damage { at, to, error } => {
                    let what = format!("{error}; {} bytes", to - at);
                    source.damage.push(Flaw { file: path.clone(), at: at - base, what });
                }
                Step::End { at, blank: true } => source.end = source.end.max(*at),
                Step::End { .. } => {}
            }
            true
        })?;
    }
    // Damage after the last record is the torn end of a crash.
    let end = source.end;
    source.damage.retain(|f| log_offset(f).is_some_and(|at| at < end));
    source.files = files;
    source.metadata = metadata::read(fs, read_rows, &dir.join("config"), &source.topics)?;
    for (topic, what) in PENDING {
        let count: u64 = source.topics.iter().filter(|(t, _)| t.starts_with(topic)).map(|(_, n)| n).sum();
        if count > 0 {
            source.remarks.push(format!("{count} records of {topic}: {what}"));
        }
    }
    Ok(source)
}

fn log_offset(flaw: &Flaw) -> Option<u64> {
    Some(flaw.file.file_name()?.to_str()?.parse::<u64>().ok()? + flaw.at)
}

/// What has to be said to the engine once it is open on the copied log.
impl Source {
    pub fn changes(&self, id_of: impl FnMut(&Topic, u32, u64) -> Option<String>) -> Vec<Change> {
        let Metadata { topics, groups, offsets, revived } = &self.metadata;
        let topics = topics.iter().cloned().map(Change::PutTopic);
        let groups = groups.iter().cloned().map(Change::PutGroup);
        // What waits in retry topics of the older names moves: nobody stands there any more.
        let stays = |t: &Topic| !t.is_retry() || t.as_str().contains('+');
        let seeks =
            offsets.iter().filter(|(_, t, ..)| stays(t)).cloned().map(|(group, topic, queue, next)| {
                let cursor = CursorKey { group, topic, queue };
                Change::Seek { cursor, next }
            });
        let in_flight = self.pops.in_flight(revived, id_of);
        topics.chain(groups).chain(seeks).chain(in_flight).collect()
    }

    /// Retries of the 4.x and early 5.x names: the topic they wait in, their group, where it stands.
    pub fn retries(&self) -> Vec<(Topic, Group, u64)> {
        let mut out = Vec::new();
        for topic in self.topics.keys() {
            let Some(rest) = topic.strip_prefix(RETRY_PREFIX).filter(|r| !r.contains('+')) else { continue };
            let of = |g: &&GroupConfig| {
                let after = rest.strip_prefix(g.group.as_str());
                after.is_some_and(|a| a.is_empty() || a.starts_with('_'))
            };
            // The longest name that fits: group names may contain the separator.
            let group = self.metadata.groups.iter().filter(of).max_by_key(|g| g.group.as_str().len());
            let Some(group) = group.map(|g| g.group.clone()) else { continue };
            let topic = Topic::stored(topic);
            let place = self.metadata.offsets.iter().find(|(g, t, ..)| *g == group && *t == topic);
            out.push((topic.clone(), group, place.map_or(0, |p| p.3)));
        }
        out
    }
}

/// One message handed out by POP.
type Handed = (Topic, Group, u32, u64);

/// POP's checkpoints and acknowledgements in the order of the log.
#[derive(Debug, Default)]
pub struct Pops {
    handed: BTreeMap<Handed, Pop>,
    done: BTreeSet<(Handed, i64)>,
    /// Topic and message id of every retry.
    retried: BTreeSet<(String, String)>,
}

#[derive(Clone, Copy, Debug)]
struct Pop {
    /// Queue and offset in POP's own topic, once it is there.
    said_at: Option<(u32, u64)>,
    popped_at: i64,
    until: i64,
}

fn is_pop_state(r: &Record) -> bool {
    r.property("REAL_TOPIC").is_some_and(|t| t.starts_with(REVIVE_TOPIC))
}

impl Pops {
    fn see(&mut self, r: &Record) {
        if r.topic.starts_with(RETRY_PREFIX) {
            let id = r.property(message::UNIQ_KEY).unwrap_or_default();
            self.retried.insert((r.topic.to_string(), id.to_owned()));
        }
        // Said first as a message to be delivered later, then in the topic itself.
        let said = r.topic.starts_with(REVIVE_TOPIC);
        if !said && !is_pop_state(r) {
            return;
        }
        let Ok(body) = serde_json::from_slice::<Value>(&r.body) else { return };
        let number = |key: &str| body.get(key).and_then(Value::as_i64);
        let text = |key: &str| body.get(key).and_then(Value::as_str);
        let (Some(topic), Some(group), Some(queue)) = (text("t"), text("c"), number("q")) else { return };
        let (topic, group, queue) = (Topic::stored(topic), Group::stored(group), queue as u32);
        let popped_at = number("pt").unwrap_or(0);
        let at = |offset: i64| (topic.clone(), group.clone(), queue, offset.max(0) as u64);
        let list = |key: &str| {
            let values = body.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
            values.iter().filter_map(Value::as_i64).collect::<Vec<_>>()
        };
        match r.property(message::TAGS) {
            Some("ck") => {
                let (start, bits) = (number("so").unwrap_or(0), number("bm").unwrap_or(0));
                let steps = list("d");
                for i in 0..number("n").unwrap_or(0).clamp(0, 64) {
                    let offset = start + steps.get(i as usize).copied().unwrap_or(i);
                    if bits >> i & 1 == 0 {
                        let until = popped_at + number("it").unwrap_or(0);
                        let said_at = said.then_some((r.queue, r.queue_offset));
                        self.handed.insert(at(offset), Pop { said_at, popped_at, until });
                    } else {
                        self.done.insert((at(offset), popped_at));
                    }
                }
            }
            Some("ack" | "bAck") => {
                let offsets = number("ao").into_iter().chain(list("aol"));
                self.done.extend(offsets.map(|offset| (at(offset), popped_at)));
            }
            _ => {}
        }
    }

    /// What was neither acknowledged nor put back. `id_of` gives the id of the message at a place.
    fn in_flight(
        &self,
        revived: &BTreeMap<u32, u64>,
        mut id_of: impl FnMut(&Topic, u32, u64) -> Option<String>,
    ) -> Vec<Change> {
        let mut out = Vec::new();
        for (handed, pop) in &self.handed {
            let put_back =
                pop.said_at.is_some_and(|(queue, at)| revived.get(&queue).is_some_and(|done| at < *done));
            if put_back || self.done.contains(&(handed.clone(), pop.popped_at)) {
                continue;
            }
            let (topic, group, queue, offset) = handed;
            // Put back a moment before the broker stopped, which it had not yet written down.
            let id = id_of(topic, *queue, *offset).unwrap_or_default();
            let old = self.retried.contains(&(format!("{RETRY_PREFIX}{group}_{topic}"), id.clone()));
            if old || self.retried.contains(&(Topic::retry(group, topic).to_string(), id)) {
                continue;
            }
            out.push(Change::Popped {
                cursor: CursorKey { group: group.clone(), topic: topic.clone(), queue: *queue },
                next: 0,
                since: Timestamp(pop.popped_at),
                visible_at: Timestamp(pop.until),
                client: None,
                offsets: vec![*offset],
            });
        }
        out
    }
}
