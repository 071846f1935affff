//! What the engine's thread is asked to do. Every command has one reply; a caller that went away gets none.

use std::sync::Arc;

use apis::status::Error;
use model::{Bound, Group, Receipt, TagFilter, Topic};
use store::change::Change;
use store::engine::{Ended, Recall, Stored};
use store::log::record::Record;
use store::pop::Standing;
use store::timer::TimerKey;
use store::txn::Decision;
use store::{Engine, NewMessage, Popped};
use tokio::sync::oneshot;

pub type Answer<T> = oneshot::Sender<Result<T, Error>>;

#[derive(Clone, Debug)]
pub struct PopCommand {
    pub group: Group,
    pub topic: Topic,
    pub filter: TagFilter,
    pub max: usize,
    pub invisible_ms: i64,
    pub client: Arc<str>,
    pub auto_renew: bool,
    /// Hash of the receive's attempt id, 0 if it has none.
    pub attempt_id: u64,
    /// Wait for a message if there is none; the caller ends the wait by going away.
    pub wait: bool,
}

pub enum Command {
    Append {
        topic: Topic,
        messages: Vec<NewMessage>,
        answer: Answer<Vec<Stored>>,
    },
    Pop {
        request: PopCommand,
        answer: Answer<Vec<Popped>>,
    },
    Ack {
        receipts: Vec<Receipt>,
        answer: Answer<Vec<Standing>>,
    },
    ChangeInvisible {
        receipt: Receipt,
        invisible_ms: i64,
        answer: Answer<Option<Receipt>>,
    },
    DeadLetter {
        receipt: Receipt,
        answer: Answer<Standing>,
    },
    /// Commits a transaction or rolls it back.
    Decide {
        id: u64,
        decision: Decision,
        answer: Answer<Ended>,
    },
    /// Takes a scheduled message back.
    Recall {
        key: TimerKey,
        answer: Answer<Recall>,
    },
    /// Half messages of these topics whose producers are to be asked; waits for one.
    Checks {
        topics: Vec<Topic>,
        answer: Answer<Vec<(u64, Record)>>,
    },
    /// Messages that never reached their consumer.
    Release(Vec<Receipt>),
    PutMeta {
        changes: Vec<Change>,
        answer: Answer<u64>,
    },
    Liveness {
        alive: Vec<String>,
        gone: Vec<String>,
        answer: Answer<()>,
    },
    /// Let go of what the retention policy allows, now.
    Prune {
        answer: Answer<()>,
    },
    /// What is held in memory, against what may be.
    Bounds(Answer<Vec<Bound>>),
    /// A look at the engine between two commits.
    Look(Box<dyn FnOnce(&Engine) + Send>),
    /// The log is durable up to here.
    Flushed(u64),
    CheckpointWritten(store::checkpoint::Outcome),
    Stop(oneshot::Sender<()>),
}
