//! Looking at a store's files without opening it: every decoder reads only, names damage by file and offset, and
//! never panics. For `ferry store inspect|usage|verify`, on our folders and on Apache RocketMQ's, running or not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Result, StoreError};
use crate::fs::{self, Fs};
use crate::keys::{self, Header, StoredEntry};
use crate::log::record::{self, Check, Record};
use crate::log::walk::{Step, Walk};
use crate::log::{flushed_of, imported_of};
use crate::queue::{ENTRY_BYTES, Entry};

/// What a file is, by its name, its size and its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Messages; the offset of its first byte.
    CommitLog {
        base: u64,
    },
    /// Where a queue's messages are; the offset of its first byte in the queue's index.
    ConsumeQueue {
        base: u64,
    },
    IndexFile,
    /// Apache RocketMQ's five marks.
    Checkpoint,
    /// One of our marks, and the log offset it holds.
    Mark {
        offset: u64,
    },
}

fn io<'a>(operation: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> StoreError + 'a {
    move |e| StoreError::io(operation, path, e)
}

pub fn kind(fs: &dyn Fs, path: &Path) -> Result<Kind> {
    let file = fs.open_read(path).map_err(io("opened", path))?;
    let len = file.len().map_err(io("read", path))?;
    let mut head = [0; 40];
    let n = file.read_at(&mut head, 0).map_err(io("read", path))?;
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let unknown = |what: String| StoreError::Damaged { path: path.into(), what };
    let digits = name.len() >= 17 && name.bytes().all(|b| b.is_ascii_digit());
    if digits && name.len() == 20 {
        let base = name.parse().map_err(|_| unknown("its name is not an offset".into()))?;
        let in_log = path.parent().and_then(Path::file_name).is_some_and(|d| d == "commitlog");
        let is_log = matches!(record::peek(&head[..n]), Ok(_) | Err(record::RecordError::Blank));
        return Ok(if is_log || in_log { Kind::CommitLog { base } } else { Kind::ConsumeQueue { base } });
    }
    if digits && name.len() == 17 && len > 40 {
        return Ok(Kind::IndexFile);
    }
    if name == "checkpoint" && n >= 40 {
        return Ok(Kind::Checkpoint);
    }
    if n >= 16 && matches!(&head[..4], b"FMF1" | b"FMI1") {
        return Ok(Kind::Mark { offset: record::get64(&head, 4).unwrap_or(0) });
    }
    let known = "a CommitLog or ConsumeQueue file has a name of 20 digits, an IndexFile one of 17, a checkpoint its own";
    Err(unknown(format!("not a file of a store that is known here; {known}")))
}

/// Every step of a log file, until `each` returns false. Records of any broker are taken.
pub fn commit_log(fs: &dyn Fs, path: &Path, base: u64, mut each: impl FnMut(&Step) -> bool) -> Result<()> {
    let file = fs.open_read(path).map_err(io("opened", path))?;
    let len = file.len().map_err(io("read", path))?;
    let mut walk = Walk::new(file, base, len);
    let mut at = base;
    loop {
        let step = walk.step(at, Check::WholeOrBody).map_err(io("read", path))?;
        let next = match &step {
            Step::Record(r) => at + u64::from(r.size),
            Step::Damage { to, .. } => *to,
            Step::End { .. } => walk.end(),
        };
        if !each(&step) || next >= walk.end() || matches!(step, Step::End { .. }) {
            return Ok(());
        }
        at = next;
    }
}

/// Every entry of a queue file with its queue offset; `None` where nothing was written.
pub fn consume_queue(
    fs: &dyn Fs,
    path: &Path,
    base: u64,
    mut each: impl FnMut(u64, Option<Entry>) -> bool,
) -> Result<()> {
    let file = fs.open_read(path).map_err(io("opened", path))?;
    let len = file.len().map_err(io("read", path))?;
    let mut at = 0;
    while at + ENTRY_BYTES <= len {
        let want = (len - at).min(ENTRY_BYTES * 8192) / ENTRY_BYTES * ENTRY_BYTES;
        let bytes = fs::read_exact_at(&*file, want as usize, at).map_err(io("read", path))?;
        for entry in bytes.chunks(ENTRY_BYTES as usize) {
            if !each((base + at) / ENTRY_BYTES, Entry::decode(entry)) {
                return Ok(());
            }
            at += ENTRY_BYTES;
        }
    }
    Ok(())
}

/// The header of an index file, and its entries in the order they were written. `slots` is the reference's number
/// unless the broker was configured otherwise.
pub fn index_file(
    fs: &dyn Fs,
    path: &Path,
    slots: u32,
    mut each: impl FnMut(u32, StoredEntry) -> bool,
) -> Result<Header> {
    let file = fs.open_read(path).map_err(io("opened", path))?;
    let head = fs::read_exact_at(&*file, 40, 0).map_err(io("read", path))?;
    let damaged = |what: &str| StoreError::Damaged { path: path.into(), what: what.into() };
    let header = Header::decode(&head).ok_or_else(|| damaged("too short for a header"))?;
    let len = file.len().map_err(io("read", path))?;
    let entries_at = 40 + u64::from(slots) * 4;
    let end = entries_at + u64::from(header.next) * 20;
    if end > len {
        let what = format!("{} entries and {slots} slots need {end} bytes, the file has {len}", header.next);
        return Err(damaged(&what));
    }
    for entry in 1..header.next {
        let bytes = fs::read_exact_at(&*file, 20, entries_at + u64::from(entry) * 20);
        let Some(decoded) = keys::decode_entry(&bytes.map_err(io("read", path))?) else { break };
        if !each(entry, decoded) {
            break;
        }
    }
    Ok(header)
}

/// The five marks of Apache RocketMQ's checkpoint: message, queue and index time, flushed and confirmed offset.
pub fn checkpoint(fs: &dyn Fs, path: &Path) -> Result<[i64; 5]> {
    let file = fs.open_read(path).map_err(io("opened", path))?;
    let head = fs::read_exact_at(&*file, 40, 0).map_err(io("read", path))?;
    Ok(std::array::from_fn(|i| record::get64(&head, i * 8).unwrap_or(0) as i64))
}

/// Log files of a folder, by their base, with their length.
pub fn log_files(fs: &dyn Fs, dir: &Path) -> Result<BTreeMap<u64, (PathBuf, u64)>> {
    let mut files = BTreeMap::new();
    for name in fs.list(dir).map_err(io("listed", dir))? {
        let Ok(base) = name.parse::<u64>() else { continue };
        let path = dir.join(&name);
        let len = fs.open_read(&path).and_then(|f| f.len()).map_err(io("read", &path))?;
        if len > 0 {
            files.insert(base, (path, len));
        }
    }
    Ok(files)
}

/// A place that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    pub file: PathBuf,
    /// Bytes from the beginning of the file.
    pub at: u64,
    pub what: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    pub files: u64,
    pub records: u64,
    pub bytes: u64,
    pub log_start: u64,
    pub log_end: u64,
    pub queue_entries: u64,
    pub flaws: Vec<Flaw>,
}

/// Flaws that are kept; more are counted in the last one's text by nobody: the log says enough by then.
const FLAWS_MAX: usize = 1000;

/// Reads the whole log and every queue entry. `progress` is told of bytes read.
pub fn verify(fs: &dyn Fs, data: &Path, mut progress: impl FnMut(u64)) -> Result<Verified> {
    let log = data.join("commitlog");
    let files = log_files(fs, &log)?;
    let flushed = flushed_of(fs, data).map_err(io("read", data))?;
    let imported = imported_of(fs, data).map_err(io("read", data))?;
    let mut seen = Verified { log_start: files.keys().next().copied().unwrap_or(0), ..Verified::default() };
    let mut flaw = |seen: &mut Verified, file: &Path, at: u64, what: String| {
        if seen.flaws.len() < FLAWS_MAX {
            seen.flaws.push(Flaw { file: file.into(), at, what });
        }
    };
    let mut expected = None;
    let mut reached = 0;
    for (base, (path, len)) in &files {
        if expected.is_some_and(|e| e != *base) {
            flaw(
                &mut seen,
                path,
                0,
                format!("the file before it, {:020}, is missing", expected.unwrap_or(0)),
            );
        }
        expected = Some(base + len);
        seen.files += 1;
        let mut damage = Vec::new();
        commit_log(fs, path, *base, |step| {
            match step {
                Step::Record(r) => {
                    seen.records += 1;
                    seen.bytes += u64::from(r.size);
                    seen.log_end = r.log_offset + u64::from(r.size);
                    reached = seen.log_end;
                    progress(u64::from(r.size));
                    let foreign = !record::has_crc(r) && r.log_offset >= imported && flushed > 0;
                    if foreign {
                        damage.push((r.log_offset, "a record without its checksum".to_owned()));
                    }
                }
                // What was never flushed may be torn, or just being written.
                Step::Damage { at, .. } if *at >= flushed && flushed > 0 => {}
                Step::Damage { at, to, error } => damage.push((*at, format!("{error}; {} bytes", to - at))),
                Step::End { at, .. } => reached = reached.max(*at),
            }
            true
        })?;
        for (at, what) in damage {
            flaw(&mut seen, path, at - base, what);
        }
    }
    if let Some((base, (path, _))) = files.last_key_value().filter(|_| reached < flushed) {
        let what =
            format!("the log ends here; it was flushed up to {flushed}, {} bytes more", flushed - reached);
        flaw(&mut seen, path, reached.saturating_sub(*base), what);
    }
    verify_queues(fs, data, &files, &mut seen, &mut flaw)?;
    Ok(seen)
}

type Complain<'a> = dyn FnMut(&mut Verified, &Path, u64, String) + 'a;

fn verify_queues(
    fs: &dyn Fs,
    data: &Path,
    files: &BTreeMap<u64, (PathBuf, u64)>,
    seen: &mut Verified,
    flaw: &mut Complain<'_>,
) -> Result<()> {
    let queues = data.join("consumequeue");
    let record_at = |at: u64, size: u32| -> Option<Record> {
        let (base, (path, len)) = files.range(..=at).next_back()?;
        let file = fs.open_read(path).ok().filter(|_| at + u64::from(size) <= base + len)?;
        let bytes = fs::read_exact_at(&*file, size as usize, at - base).ok()?;
        record::decode(&bytes.into(), at, Check::Shape).ok()
    };
    for topic in fs.list(&queues).map_err(io("listed", &queues))? {
        let dir = queues.join(&topic);
        for queue in fs.list(&dir).map_err(io("listed", &dir))? {
            let dir = dir.join(&queue);
            for name in fs.list(&dir).map_err(io("listed", &dir))? {
                let Ok(base) = name.parse::<u64>() else { continue };
                let path = dir.join(&name);
                let mut wrong = Vec::new();
                consume_queue(fs, &path, base, |offset, entry| {
                    let Some(entry) = entry else { return false };
                    if entry.is_hole()
                        || entry.log_offset < seen.log_start
                        || entry.log_offset >= seen.log_end
                    {
                        return true;
                    }
                    seen.queue_entries += 1;
                    let found = record_at(entry.log_offset, entry.size);
                    let same = |r: &Record| {
                        *r.topic == *topic && r.queue.to_string() == queue && r.queue_offset == offset
                    };
                    if !found.as_ref().is_some_and(same) {
                        let what = match found {
                            Some(r) => format!(
                                "queue offset {offset} leads to {}/{}/{}",
                                r.topic, r.queue, r.queue_offset
                            ),
                            None => format!(
                                "queue offset {offset} leads to {}, where no record is",
                                entry.log_offset
                            ),
                        };
                        wrong.push((offset * ENTRY_BYTES - base, what));
                    }
                    true
                })?;
                wrong.into_iter().for_each(|(at, what)| flaw(seen, &path, at, what));
            }
        }
    }
    Ok(())
}
