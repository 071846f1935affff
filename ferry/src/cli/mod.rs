//! The command line: what there is, and where each command goes.

mod admin;
mod bench;
mod ceiling;
mod client;
mod dlq;
mod held;
mod messages;
mod output;
mod store;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{dev, roles};

#[derive(Parser)]
#[command(name = "ferry", version, about = "FerryMQ: a message broker for the Apache RocketMQ 5.x world")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// Where commands go, and how they answer.
#[derive(Args, Clone)]
pub struct Remote {
    /// The proxy to talk to
    #[arg(long, global = true, env = "FERRY_ENDPOINT", default_value = "127.0.0.1:8081")]
    pub endpoint: String,
    /// Output for people or for machines
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    pub output: Format,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
}

#[derive(Subcommand)]
pub enum Command {
    /// All roles in one process, no configuration
    Dev(dev::DevArgs),
    /// Run a name server
    Namesrv(RoleArgs),
    /// Run a storage broker
    Broker(RoleArgs),
    /// Run a proxy
    Proxy(RoleArgs),
    /// Topics
    #[command(subcommand)]
    Topic(TopicCommand),
    /// Consumer groups
    #[command(subcommand)]
    Group(GroupCommand),
    /// Send messages
    Send(SendArgs),
    /// Show messages as they arrive; touches no group
    Tail(TailArgs),
    /// Receive messages as a member of a group
    Receive(ReceiveArgs),
    /// Messages by id, key or time
    #[command(subcommand)]
    Message(MessageCommand),
    /// Messages that wait for their time
    #[command(subcommand)]
    Schedule(ScheduleCommand),
    /// Transactions that are not decided
    #[command(subcommand)]
    Tx(TxCommand),
    /// Messages that a group could not consume
    #[command(subcommand)]
    Dlq(DlqCommand),
    /// What is stored: look at it, verify it, take over Apache RocketMQ's
    #[command(subcommand)]
    Store(store::StoreCommand),
    /// Measure a server of the protocol
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

impl Command {
    pub fn is_server(&self) -> bool {
        matches!(
            self,
            Command::Dev(_)
                | Command::Namesrv(_)
                | Command::Broker(_)
                | Command::Proxy(_)
                | Command::Bench(_)
        )
    }
}

/// A role is configured by a TOML file < environment (FERRY_SECTION__KEY) < --set.
#[derive(Args)]
pub struct RoleArgs {
    /// TOML file
    #[arg(long, short)]
    pub config: Option<PathBuf>,
    /// Set one key: --set storage.flush=sync
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = pair)]
    pub set: Vec<(String, String)>,
    /// Written when the role serves
    #[arg(long)]
    pub ready_file: Option<PathBuf>,
}

pub fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) =
        text.split_once('=').ok_or_else(|| format!("{text:?} is not of the form key=value"))?;
    Ok((key.to_owned(), value.to_owned()))
}

#[derive(Clone, Copy, Default, ValueEnum)]
pub enum TopicType {
    #[default]
    Normal,
    Fifo,
    Delay,
    Transaction,
    Mixed,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Order {
    #[default]
    Concurrent,
    Fifo,
}

#[derive(Subcommand)]
pub enum TopicCommand {
    /// Create a topic on every broker
    Create {
        topic: String,
        #[arg(long = "type", value_enum, default_value = "normal")]
        kind: TopicType,
        /// Queues on each broker
        #[arg(long, default_value_t = model::limits::QUEUES_DEFAULT)]
        queues: u32,
        #[command(flatten)]
        remote: Remote,
    },
    /// List topics
    List {
        #[command(flatten)]
        remote: Remote,
    },
    /// Show a topic and its queues
    Describe {
        topic: String,
        #[command(flatten)]
        remote: Remote,
    },
    /// Delete a topic with its messages
    Delete {
        topic: String,
        #[command(flatten)]
        remote: Remote,
    },
}

#[derive(Subcommand)]
pub enum GroupCommand {
    /// Create a consumer group
    Create {
        group: String,
        #[arg(long, value_enum, default_value = "concurrent")]
        order: Order,
        /// Deliveries of a message in all; after the last it is a dead letter
        #[arg(long, default_value_t = model::limits::ATTEMPTS_DEFAULT)]
        max_attempts: u32,
        #[command(flatten)]
        remote: Remote,
    },
    /// Change a consumer group; what is not named stays
    Set {
        group: String,
        #[arg(long, value_enum)]
        order: Option<Order>,
        #[arg(long)]
        max_attempts: Option<u32>,
        /// Wait before each delivery: 1s,5s,30s (the last one for all after it)
        #[arg(long, value_delimiter = ',', value_parser = duration_ms, conflicts_with = "exponential")]
        backoff: Vec<i64>,
        /// Wait as long as FIRST, then twice as long each time, up to MAX: 5s 2h
        #[arg(long, value_parser = duration_ms, num_args = 2, value_names = ["FIRST", "MAX"])]
        exponential: Vec<i64>,
        #[command(flatten)]
        remote: Remote,
    },
    /// Let a group go on at a time; what is in flight is forgotten
    Reset {
        group: String,
        /// 2026-11-21T08:00:00Z, or 2h for two hours ago; 0s for now
        #[arg(long, value_parser = moment)]
        to: i64,
        /// Of this topic only
        #[arg(long)]
        topic: Option<String>,
        /// Say what would be done, and do nothing
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        remote: Remote,
    },
    /// List consumer groups
    List {
        #[command(flatten)]
        remote: Remote,
    },
    /// Show a group
    Describe {
        group: String,
        #[command(flatten)]
        remote: Remote,
    },
    /// Delete a group; its positions are forgotten
    Delete {
        group: String,
        #[command(flatten)]
        remote: Remote,
    },
    /// How far a group is behind
    Lag {
        group: String,
        #[command(flatten)]
        remote: Remote,
    },
}

#[derive(Subcommand)]
pub enum MessageCommand {
    /// The messages with this message id; more than one if it was delivered again
    Get {
        topic: String,
        id: String,
        #[command(flatten)]
        remote: Remote,
    },
    /// Messages with a key, or of a time
    Find {
        topic: String,
        #[arg(long)]
        key: Option<String>,
        /// Stored from then on: 2026-11-21T08:00:00Z, or 2h for two hours ago
        #[arg(long, value_parser = moment)]
        from: Option<i64>,
        /// Stored up to then
        #[arg(long, value_parser = moment)]
        to: Option<i64>,
        /// At most this many
        #[arg(long, short = 'n', default_value_t = 32)]
        max: u32,
        #[command(flatten)]
        remote: Remote,
    },
}

#[derive(Subcommand)]
pub enum ScheduleCommand {
    /// What waits for its time, the next one first
    List {
        topic: Option<String>,
        /// Due from then on
        #[arg(long, value_parser = moment)]
        from: Option<i64>,
        /// At most this many
        #[arg(long, short = 'n', default_value_t = 32)]
        max: u32,
        #[command(flatten)]
        remote: Remote,
    },
    /// Take a message back before its time
    Cancel {
        topic: String,
        handle: String,
        #[command(flatten)]
        remote: Remote,
    },
}

#[derive(Subcommand)]
pub enum TxCommand {
    /// Transactions that are not decided; PARKED ones are no longer asked after
    List {
        topic: Option<String>,
        #[command(flatten)]
        remote: Remote,
    },
    /// Show the message of a transaction
    Show {
        topic: String,
        id: String,
        #[command(flatten)]
        remote: Remote,
    },
    /// Decide instead of the producer
    Resolve {
        topic: String,
        id: String,
        #[arg(value_enum)]
        decision: Resolution,
        #[command(flatten)]
        remote: Remote,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Resolution {
    Commit,
    Rollback,
}

#[derive(Subcommand)]
pub enum DlqCommand {
    /// Groups with dead letters
    List {
        #[command(flatten)]
        remote: Remote,
    },
    /// A group's dead letters
    Show {
        group: String,
        /// At most this many
        #[arg(long, short = 'n', default_value_t = 32)]
        max: u32,
        #[command(flatten)]
        remote: Remote,
    },
    /// Send a group's dead letters to their topics again, each once; id, keys and tag stay
    Replay {
        group: String,
        /// Messages a second
        #[arg(long, default_value_t = 100)]
        rate: u32,
        /// At most this many
        #[arg(long, short = 'n', default_value_t = u64::MAX, hide_default_value = true)]
        max: u64,
        #[command(flatten)]
        remote: Remote,
    },
}

fn duration_ms(text: &str) -> Result<i64, String> {
    let what = || format!("{text:?} is not a duration like 500ms, 5s or 2h");
    let duration = humantime::parse_duration(text).map_err(|_| what())?;
    i64::try_from(duration.as_millis()).map_err(|_| what())
}

fn point(text: &str) -> Result<i64, String> {
    let since = |t: std::time::SystemTime| {
        t.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
    };
    humantime::parse_rfc3339_weak(text)
        .map(since)
        .map_err(|_| format!("{text:?} is not a time like 2026-11-21T08:00:00Z"))
}

/// Milliseconds since 1970 of a point in time, or of a duration before now.
fn moment(text: &str) -> Result<i64, String> {
    let ms = |t: std::time::SystemTime| {
        t.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
    };
    if let Ok(ago) = humantime::parse_duration(text) {
        return Ok(ms(std::time::SystemTime::now()) - ago.as_millis() as i64);
    }
    humantime::parse_rfc3339_weak(text).map(ms).map_err(|_| {
        format!("{text:?} is neither a time like 2026-11-21T08:00:00Z nor a duration like 2h or 30m")
    })
}

#[derive(Args)]
pub struct SendArgs {
    pub topic: String,
    /// The message; from --file otherwise
    pub body: Option<String>,
    #[arg(long)]
    pub tag: Option<String>,
    #[arg(long = "key")]
    pub keys: Vec<String>,
    /// A user property
    #[arg(long = "property", value_name = "K=V", value_parser = pair)]
    pub properties: Vec<(String, String)>,
    /// Messages of one message group are in order
    #[arg(long, conflicts_with_all = ["at", "delay"])]
    pub message_group: Option<String>,
    /// Deliver at this time: 2026-11-21T08:00:00Z
    #[arg(long, value_parser = point)]
    pub at: Option<i64>,
    /// Deliver after this time: 10s, 2h
    #[arg(long = "in", value_parser = duration_ms, conflicts_with = "at")]
    pub delay: Option<i64>,
    /// One message a line
    #[arg(long, conflicts_with = "body")]
    pub file: Option<PathBuf>,
    /// Send it this many times
    #[arg(long, default_value_t = 1)]
    pub count: u64,
    #[command(flatten)]
    pub remote: Remote,
}

#[derive(Args)]
pub struct TailArgs {
    pub topic: String,
    /// Begin with the first message that is stored
    #[arg(long)]
    pub from_beginning: bool,
    /// Stop after this many messages
    #[arg(long, short = 'n')]
    pub max: Option<u64>,
    #[command(flatten)]
    pub remote: Remote,
}

#[derive(Args)]
pub struct ReceiveArgs {
    pub topic: String,
    #[arg(long, short)]
    pub group: String,
    /// Acknowledge what is received; otherwise it is delivered again after the invisible time
    #[arg(long)]
    pub ack: bool,
    /// Tags, as in "a || b"
    #[arg(long, default_value = "*")]
    pub filter: String,
    /// Stop after this many messages
    #[arg(long, short = 'n', default_value_t = 1)]
    pub max: u64,
    /// Wait this long for a message, seconds
    #[arg(long, default_value_t = 20)]
    pub wait: u64,
    /// Invisible time, seconds
    #[arg(long, default_value_t = 30)]
    pub invisible: u64,
    #[command(flatten)]
    pub remote: Remote,
}

pub async fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Dev(args) => dev::run(args).await,
        Command::Namesrv(args) => roles::namesrv(args).await,
        Command::Broker(args) => roles::broker(args).await,
        Command::Proxy(args) => roles::proxy(args).await,
        Command::Topic(command) => admin::topic(command).await,
        Command::Group(command) => admin::group(command).await,
        Command::Send(args) => messages::send(args).await,
        Command::Tail(args) => messages::tail(args).await,
        Command::Receive(args) => messages::receive(args).await,
        Command::Message(command) => messages::message_command(command).await,
        Command::Schedule(command) => held::schedule(command).await,
        Command::Tx(command) => held::tx(command).await,
        Command::Dlq(command) => dlq::run(command).await,
        Command::Store(command) => store::run(command).await,
        Command::Bench(command) => bench::run(command).await,
    }
}

/// The server could not be reached.
#[derive(Debug)]
pub struct Unreachable(pub String);

impl std::fmt::Display for Unreachable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "no FerryMQ proxy answers at {}; start one with `ferry dev`, or name one with --endpoint",
            self.0
        )
    }
}

impl std::error::Error for Unreachable {}

/// The command makes no sense as it stands.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<Unreachable>() {
        3
    } else if error.is::<Usage>() || error.is::<runtime::config::ConfigError>() {
        2
    } else {
        1
    }
}
