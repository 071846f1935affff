//! `ferry store …`: what is stored, looked at from outside; and taking over a folder of Apache RocketMQ.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use apis::admin::StoreStateRequest;
use clap::Subcommand;
use model::{Clock, SystemClock, message};
use runtime::random;
use serde_json::{Value, json};
use store::fs::OsFs;
use store::inspect::{self, Kind};
use store::kv::RocksKv;
use store::log::record::Record;
use store::log::walk::Step;
use store::log::{LogOptions, mark_imported, segment_path};
use store::{Engine, FlushMode, Options, Retention, StoreError, import};

use super::client::{self, failed};
use super::{Format, Remote, Usage, output};

#[derive(Subcommand)]
pub enum StoreCommand {
    /// Decode a CommitLog, ConsumeQueue, IndexFile or checkpoint, of FerryMQ or Apache RocketMQ
    Inspect {
        file: PathBuf,
        /// At most this many records or entries
        #[arg(long, short = 'n', default_value_t = 20)]
        max: u64,
        /// Begin at this offset: bytes of the log, or a queue offset
        #[arg(long, default_value_t = 0)]
        from: u64,
        /// Slots of an index file
        #[arg(long, default_value_t = 5_000_000)]
        slots: u32,
        #[arg(short, long, value_enum, default_value = "table")]
        output: Format,
    },
    /// Read all of a data folder and name what is damaged; the server may be running
    Verify {
        data: PathBuf,
        #[arg(short, long, value_enum, default_value = "table")]
        output: Format,
    },
    /// What a data folder uses of the disk, or with no folder what the running brokers do
    Usage {
        data: Option<PathBuf>,
        /// What the servers hold in memory, against what they may
        #[arg(long, conflicts_with = "data")]
        bounds: bool,
        #[command(flatten)]
        remote: Remote,
    },
    /// Let go at once of what retention allows: the running brokers' own, or with a folder what is said here
    Prune {
        /// The folder of a stopped broker
        data: Option<PathBuf>,
        /// Messages older than this may go, hours
        #[arg(long, default_value_t = 72, requires = "data")]
        hours: u32,
        /// Bytes of log that are kept at the most
        #[arg(long, requires = "data")]
        bytes: Option<u64>,
        /// Also what a group has not consumed
        #[arg(long, requires = "data")]
        delete_unconsumed: bool,
        #[command(flatten)]
        remote: Remote,
    },
    /// Make queues and keys of a data folder again from its log; the server must be stopped
    Repair {
        data: PathBuf,
        #[arg(short, long, value_enum, default_value = "table")]
        output: Format,
    },
    /// Take over a store folder of Apache RocketMQ; the source is only read
    Import {
        /// The folder with commitlog, consumequeue and config
        source: PathBuf,
        /// The new data folder
        #[arg(long, default_value = "ferry-data")]
        data: PathBuf,
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
        /// Link the log's full files instead of copying them: the new folder is to be on the same file system
        #[arg(long)]
        in_place: bool,
        #[arg(short, long, value_enum, default_value = "table")]
        output: Format,
    },
}

pub async fn run(command: StoreCommand) -> anyhow::Result<()> {
    match command {
        StoreCommand::Inspect { file, max, from, slots, output } => {
            show_file(&file, from, max, slots, output)
        }
        StoreCommand::Verify { data, output } => verify(&data, output),
        StoreCommand::Usage { data: Some(data), remote, .. } => usage(&data, remote.output),
        StoreCommand::Usage { bounds: true, remote, .. } => bounds(remote).await,
        StoreCommand::Usage { remote, .. } => state(false, remote).await,
        StoreCommand::Prune { data: Some(data), hours, bytes, delete_unconsumed, remote } => {
            let max_bytes = bytes.unwrap_or(u64::MAX);
            let age_ms = i64::from(hours) * 3_600_000;
            prune(&data, Retention { age_ms, max_bytes, delete_unconsumed, ..UNHURRIED }, remote.output)
        }
        StoreCommand::Prune { remote, .. } => state(true, remote).await,
        StoreCommand::Repair { data, output } => repair(&data, output),
        StoreCommand::Import { source, data, dry_run, in_place, output } => {
            take_over(&source, &data, (dry_run, in_place), output)
        }
    }
}

fn show_file(path: &Path, from: u64, max: u64, slots: u32, format: Format) -> anyhow::Result<()> {
    let mut rows: Vec<Vec<Value>> = Vec::new();
    let max = max as usize;
    match inspect::kind(&OsFs, path)? {
        Kind::CommitLog { base } => {
            inspect::commit_log(&OsFs, path, base, |step| {
                let row = match step {
                    Step::Record(r) if r.log_offset < from => return true,
                    Step::Record(r) => record_row(r),
                    Step::Damage { at, to, error } => {
                        let mut row = vec![json!(at), json!(to - at), json!(format!("DAMAGED: {error}"))];
                        row.resize(8, Value::Null);
                        row
                    }
                    Step::End { .. } => return false,
                };
                rows.push(row);
                rows.len() < max
            })?;
            let columns =
                ["OFFSET", "BYTES", "TOPIC", "QUEUE", "QUEUE OFFSET", "STORED MS", "KEYS", "PROPERTIES"];
            output::rows(format, &columns, &rows);
        }
        Kind::ConsumeQueue { base } => {
            inspect::consume_queue(&OsFs, path, base, |offset, entry| {
                let Some(entry) = entry else { return false };
                if offset >= from {
                    let hole = entry.is_hole();
                    rows.push(vec![
                        json!(offset),
                        json!(entry.log_offset),
                        json!(entry.size),
                        json!(entry.tag_code),
                        json!(hole),
                    ]);
                }
                rows.len() < max
            })?;
            output::rows(format, &["QUEUE OFFSET", "LOG OFFSET", "BYTES", "TAG CODE", "HOLE"], &rows);
        }
        Kind::IndexFile => {
            let header = inspect::index_file(&OsFs, path, slots, |number, entry| {
                if u64::from(number) > from {
                    rows.push(vec![
                        json!(number),
                        json!(entry.hash),
                        json!(entry.log_offset),
                        json!(entry.seconds),
                        json!(entry.previous),
                    ]);
                }
                rows.len() < max
            })?;
            if format == Format::Table {
                println!(
                    "{} entries, {} slots used; store time {} to {}, log offset {} to {}",
                    header.next.saturating_sub(1),
                    header.slots_used,
                    header.begin_ms,
                    header.end_ms,
                    header.begin_offset,
                    header.end_offset
                );
            }
            output::rows(format, &["ENTRY", "HASH", "LOG OFFSET", "SECONDS", "PREVIOUS"], &rows);
        }
        Kind::Checkpoint => {
            let names =
                ["message time ms", "queue time ms", "index time ms", "flushed offset", "confirmed offset"];
            let values = inspect::checkpoint(&OsFs, path)?;
            let fields: Vec<(&str, Value)> = names.into_iter().zip(values.map(|v| json!(v))).collect();
            output::object(format, &fields);
        }
        Kind::Mark { offset } => output::object(format, &[("log offset", json!(offset))]),
    }
    Ok(())
}

fn record_row(r: &Record) -> Vec<Value> {
    let keys =
        [message::UNIQ_KEY, message::KEYS].iter().filter_map(|k| r.property(k)).collect::<Vec<_>>().join(" ");
    let own = [message::UNIQ_KEY, message::KEYS, message::CRC];
    let properties = message::properties(&r.properties).filter(|(k, _)| !own.contains(k));
    let properties = properties.map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(" ");
    vec![
        json!(r.log_offset),
        json!(r.size),
        json!(&*r.topic),
        json!(r.queue),
        json!(r.queue_offset),
        json!(r.store_timestamp_ms),
        json!(keys),
        json!(properties),
    ]
}

/// Bytes done of a total, on a terminal.
struct Progress {
    what: &'static str,
    total: u64,
    done: u64,
    shown: Instant,
}

impl Progress {
    fn new(what: &'static str, total: u64) -> Self {
        Self { what, total, done: 0, shown: Instant::now() }
    }

    fn add(&mut self, bytes: u64) {
        self.done += bytes;
        if self.shown.elapsed().as_millis() >= 200 && std::io::stderr().is_terminal() {
            self.shown = Instant::now();
            let percent = 100 * self.done / self.total.max(1);
            eprint!("\r{} {percent:>3} %  {:.1} GiB ", self.what, self.done as f64 / (1u64 << 30) as f64);
            let _ = std::io::stderr().flush();
        }
    }

    fn end(&self) {
        if std::io::stderr().is_terminal() {
            eprint!("\r{:40}\r", "");
        }
    }
}

fn log_bytes(data: &Path) -> anyhow::Result<u64> {
    Ok(inspect::log_files(&OsFs, &data.join("commitlog"))?.values().map(|(_, len)| len).sum())
}

fn verify(data: &Path, format: Format) -> anyhow::Result<()> {
    let mut progress = Progress::new("verifying", log_bytes(data)?);
    let seen = inspect::verify(&OsFs, data, |bytes| progress.add(bytes))?;
    progress.end();
    let fields = [
        ("files", json!(seen.files)),
        ("records", json!(seen.records)),
        ("bytes", json!(seen.bytes)),
        ("log start", json!(seen.log_start)),
        ("log end", json!(seen.log_end)),
        ("queue entries", json!(seen.queue_entries)),
        ("flaws", json!(seen.flaws.len())),
    ];
    match format {
        Format::Table => {
            output::object(format, &fields);
            seen.flaws
                .iter()
                .for_each(|f| println!("DAMAGED  {} at byte {}: {}", f.file.display(), f.at, f.what));
        }
        Format::Json => {
            let flaw = |f: &inspect::Flaw| json!({"file": f.file, "at": f.at, "what": f.what});
            let flaws = Value::Array(seen.flaws.iter().map(flaw).collect());
            let fields: Vec<_> =
                fields.into_iter().filter(|(k, _)| *k != "flaws").chain([("flaws", flaws)]).collect();
            output::object(format, &fields);
        }
    }
    anyhow::ensure!(
        seen.flaws.is_empty(),
        "{} damaged places; what can be read is read, the rest is skipped",
        seen.flaws.len()
    );
    Ok(())
}

fn usage(data: &Path, format: Format) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    let mut parts: Vec<PathBuf> = std::fs::read_dir(data)
        .with_context(|| format!("{} cannot be listed", data.display()))?
        .filter_map(|e| Some(e.ok()?.path()))
        .collect();
    parts.sort();
    for part in parts {
        let (files, bytes, on_disk) = weigh(&part);
        let name = part.file_name().unwrap_or_default().to_string_lossy().into_owned();
        rows.push(vec![json!(name), json!(files), json!(bytes), json!(on_disk)]);
    }
    output::rows(format, &["PART", "FILES", "BYTES", "ON DISK"], &rows);
    Ok(())
}

/// Files, bytes and bytes that the disk really holds.
fn weigh(path: &Path) -> (u64, u64, u64) {
    use std::os::unix::fs::MetadataExt;
    let Ok(meta) = std::fs::symlink_metadata(path) else { return (0, 0, 0) };
    if !meta.is_dir() {
        return (1, meta.len(), meta.blocks() * 512);
    }
    let inside = std::fs::read_dir(path).into_iter().flatten().flatten().map(|e| weigh(&e.path()));
    inside.fold((0, 0, 0), |a, b| (a.0 + b.0, a.1 + b.1, a.2 + b.2))
}

async fn bounds(remote: Remote) -> anyhow::Result<()> {
    let mut admin = client::admin(&remote.endpoint).await?;
    let reply = admin.store_state(StoreStateRequest::default()).await.map_err(failed)?.into_inner();
    let brokers = reply.brokers.iter().flat_map(|b| b.bounds.iter().map(|bound| (b.broker.as_str(), bound)));
    let all = brokers.chain(reply.bounds.iter().map(|bound| ("proxy", bound)));
    let row = |(server, b): (&str, &apis::internal::Bound)| {
        let percent = (100 * b.used).checked_div(b.limit).unwrap_or(0);
        vec![json!(server), json!(b.what), json!(b.used), json!(b.limit), json!(b.unit), json!(percent)]
    };
    let rows: Vec<_> = all.map(row).collect();
    output::rows(remote.output, &["SERVER", "WHAT", "USED", "LIMIT", "UNIT", "%"], &rows);
    Ok(())
}

async fn state(prune: bool, remote: Remote) -> anyhow::Result<()> {
    let mut admin = client::admin(&remote.endpoint).await?;
    let reply = admin.store_state(StoreStateRequest { prune }).await.map_err(failed)?.into_inner();
    let percent = |free: u64, total: u64| 100 - (100 * free).checked_div(total).unwrap_or(100);
    let row = |b: &apis::internal::StoreStateReply| {
        vec![
            json!(b.broker),
            json!(b.log_end - b.log_start),
            json!(b.log_start),
            json!(b.log_end),
            json!(b.log_end - b.log_flushed.min(b.log_end)),
            json!(percent(b.disk_free, b.disk_total)),
            json!(b.oldest_ms),
            json!(b.held_by),
            json!(b.keys_to - b.keys_at),
            json!(b.unreadable),
        ]
    };
    let rows: Vec<_> = reply.brokers.iter().map(row).collect();
    let columns = [
        "BROKER",
        "LOG BYTES",
        "START",
        "END",
        "UNFLUSHED",
        "DISK %",
        "OLDEST MS",
        "HELD BY",
        "KEYS BEHIND",
        "UNREADABLE",
    ];
    output::rows(remote.output, &columns, &rows);
    Ok(())
}

fn take_over(
    source: &Path,
    data: &Path,
    (dry_run, in_place): (bool, bool),
    format: Format,
) -> anyhow::Result<()> {
    let total = log_bytes(source)?;
    let mut progress = Progress::new("reading", total);
    let found = import::scan(&OsFs, &rows_of, source, |bytes| progress.add(bytes))?;
    progress.end();
    let mut fields = vec![
        ("records", json!(found.records)),
        ("log bytes", json!(found.end - found.files.keys().next().copied().unwrap_or(0))),
        ("topics", json!(found.metadata.topics.len())),
        ("groups", json!(found.metadata.groups.len())),
        ("positions", json!(found.metadata.offsets.len())),
        ("damaged places", json!(found.damage.len())),
    ];
    for flaw in &found.damage {
        eprintln!("DAMAGED  {} at byte {}: {}; skipped", flaw.file.display(), flaw.at, flaw.what);
    }
    found.remarks.iter().for_each(|remark| eprintln!("not carried over: {remark}"));
    if !dry_run {
        let occupied = std::fs::read_dir(data).is_ok_and(|mut d| d.next().is_some());
        if occupied {
            return Err(
                Usage(format!("{} is not empty; name a new folder with --data", data.display())).into()
            );
        }
        copy_log(&found, data, in_place)?;
        let retries = adopt(&found, data)?;
        fields.extend([("retries moved", json!(retries)), ("data", json!(data))]);
    }
    output::object(format, &fields);
    Ok(())
}

/// Rows of a RocksDB folder of the source, read from a copy: opening a database changes it.
fn rows_of(dir: &Path) -> Result<Vec<store::kv::Row>, StoreError> {
    let failed = |e| StoreError::io("copied", dir, e);
    let copy = tempfile::tempdir().map_err(failed)?;
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).map_err(failed)?;
    }
    RocksKv::foreign_rows(copy.path())
}

/// The log as it is. In place, files that are full are linked: they never change again, and the disk holds them once.
fn copy_log(found: &import::Source, data: &Path, in_place: bool) -> anyhow::Result<()> {
    let log = data.join("commitlog");
    std::fs::create_dir_all(&log).with_context(|| format!("{} cannot be made", log.display()))?;
    let mut progress = Progress::new("copying", found.files.len() as u64 * found.segment_bytes);
    for (base, (from, _)) in &found.files {
        if *base >= found.end {
            continue;
        }
        let to = segment_path(&log, *base);
        if in_place && base + found.segment_bytes <= found.end {
            std::fs::hard_link(from, &to).with_context(|| {
                format!(
                    "{} cannot be linked to {}; without --in-place it is copied",
                    from.display(),
                    to.display()
                )
            })?;
            continue;
        }
        let context = || format!("{} cannot be copied to {}", from.display(), to.display());
        let used = (found.end - base).min(found.segment_bytes);
        let mut input = std::io::Read::take(std::fs::File::open(from).with_context(context)?, used);
        let mut output = std::fs::File::create(&to).with_context(context)?;
        std::io::copy(&mut input, &mut output).with_context(context)?;
        output.set_len(found.segment_bytes).with_context(context)?;
        output.sync_all().with_context(context)?;
        progress.add(found.segment_bytes);
    }
    progress.end();
    mark_imported(&OsFs, data, found.end).with_context(|| format!("{} cannot be written", data.display()))
}

/// However full the disk is.
const UNHURRIED: Retention = Retention {
    age_ms: i64::MAX,
    max_bytes: u64::MAX,
    delete_unconsumed: false,
    clean_ratio: 1.0,
    full_ratio: 1.0,
};

fn must_be_ours(data: &Path) -> Result<(), Usage> {
    match data.join("format").exists() {
        true => Ok(()),
        false => Err(Usage(format!("{} is not a data folder of FerryMQ", data.display()))),
    }
}

fn prune(data: &Path, retention: Retention, format: Format) -> anyhow::Result<()> {
    must_be_ours(data)?;
    let mut engine = open(data, retention)?;
    let before = engine.state().log_start;
    let retired = engine.keep_disk(SystemClock.now())?;
    let state = engine.state();
    for file in retired.iter().flat_map(|r| &r.files) {
        std::fs::remove_file(file).with_context(|| format!("{} cannot be removed", file.display()))?;
    }
    engine.keys().prune(state.log_start)?;
    engine.close(SystemClock.now())?;
    let fields = [
        ("bytes let go", json!(state.log_start - before)),
        ("log start", json!(state.log_start)),
        ("log end", json!(state.log_end)),
        ("held by", json!(state.held_by)),
    ];
    output::object(format, &fields);
    Ok(())
}

/// Opens a folder as a broker does.
fn open(data: &Path, retention: Retention) -> anyhow::Result<Engine> {
    let options = Options {
        dir: data.into(),
        flush: FlushMode::Async,
        log: LogOptions::default(),
        queue_file_entries: store::queue::ENTRIES_PER_FILE,
        key_index: store::keys::Shape::default(),
        retention,
        host: SocketAddr::from(([127, 0, 0, 1], 10911)),
        new_key: random::secret(),
    };
    let fs = Arc::new(OsFs);
    let lock = store::engine::claim(&*fs, &options)?;
    let kv = Arc::new(RocksKv::open(&data.join("rocksdb"))?);
    Ok(Engine::open(options, fs, kv, lock, SystemClock.now())?.0)
}

fn repair(data: &Path, format: Format) -> anyhow::Result<()> {
    must_be_ours(data)?;
    let mut engine = open(data, UNHURRIED)?;
    let mut progress = Progress::new("indexing", log_bytes(data)?);
    let repaired = engine.rebuild_indexes(|bytes| progress.add(bytes))?;
    progress.end();
    engine.close(SystemClock.now())?;
    output::object(format, &[("records", json!(repaired.records)), ("queues", json!(repaired.queues))]);
    Ok(())
}

/// Opens the copied log once: makes queues and metadata, and closes it cleanly.
fn adopt(found: &import::Source, data: &Path) -> anyhow::Result<u64> {
    let now = SystemClock.now();
    let mut engine = open(data, UNHURRIED)?;
    let changes = found.changes(|topic, queue, offset| {
        engine.message(topic, queue, offset)?.property(message::UNIQ_KEY).map(str::to_owned)
    });
    engine.take_over(changes);
    let mut retries = 0;
    for (topic, group, offset) in found.retries() {
        retries += engine.adopt_retries(&topic, &group, offset, now)?;
    }
    engine.commit(now)?.changes?;
    let (keys, reader) = (engine.keys(), engine.reader());
    keys.rebuild(&reader, || false)?;
    engine.close(now)?;
    Ok(retries)
}
