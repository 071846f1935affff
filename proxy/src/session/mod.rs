//! What clients said of themselves. Only a hint: a client that is not here is served all the same.

pub mod settings;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use apis::v2::{Settings, TelemetryCommand};
use dashmap::DashMap;
use model::Topic;
use model::bound::{Bound, Unit};
use model::limits::SESSIONS_MAX;
use tokio::sync::mpsc;
use tonic::Status as GrpcStatus;

/// A client that is silent for this long is forgotten.
const EXPIRY: Duration = Duration::from_millis(model::limits::CLIENT_EXPIRY_MS as u64);

#[derive(Debug)]
struct Session {
    settings: Arc<Settings>,
    seen: Instant,
    /// What it produces, if it does.
    publishes: Vec<Topic>,
    /// Its telemetry stream, while there is one.
    stream: Option<CommandSender>,
}

#[derive(Debug, Default)]
pub struct Sessions(DashMap<String, Session>, AtomicUsize);

/// Commands to a client.
pub type CommandSender = mpsc::Sender<Result<TelemetryCommand, GrpcStatus>>;

impl Sessions {
    /// Where there are too many clients, new ones are served without what they said.
    pub fn put(&self, client_id: &str, settings: Settings, publishes: Vec<Topic>, stream: CommandSender) {
        if self.0.len() < SESSIONS_MAX || self.0.contains_key(client_id) {
            let (settings, stream) = (Arc::new(settings), Some(stream));
            let session = Session { settings, seen: Instant::now(), publishes, stream };
            self.0.insert(client_id.to_owned(), session);
        }
    }

    /// Its telemetry stream ended, unless another one has taken its place.
    pub fn hung_up(&self, client_id: &str, stream: &CommandSender) {
        if let Some(mut session) = self.0.get_mut(client_id)
            && session.stream.as_ref().is_some_and(|s| s.same_channel(stream))
        {
            session.stream = None;
        }
    }

    /// Topics of producers that can be asked something.
    pub fn published(&self) -> BTreeSet<Topic> {
        let there = self.0.iter().filter(|s| s.stream.is_some());
        there.flat_map(|s| s.publishes.clone()).collect()
    }

    /// Some producer of a topic.
    pub fn producer_of(&self, topic: &Topic) -> Option<CommandSender> {
        let mut there: Vec<CommandSender> = self
            .0
            .iter()
            .filter(|s| s.publishes.contains(topic))
            .filter_map(|s| s.stream.clone().filter(|s| !s.is_closed()))
            .collect();
        let turn = self.1.fetch_add(1, Ordering::Relaxed);
        (!there.is_empty()).then(|| there.swap_remove(turn % there.len()))
    }

    pub fn bound(&self) -> Bound {
        Bound::of("clients remembered", self.0.len(), SESSIONS_MAX, Unit::Clients)
    }

    /// The client's settings; it counts as a sign of life.
    pub fn seen(&self, client_id: &str) -> Option<Arc<Settings>> {
        let mut session = self.0.get_mut(client_id)?;
        session.seen = Instant::now();
        Some(session.settings.clone())
    }

    pub fn request_timeout(&self, client_id: &str) -> Option<Duration> {
        let timeout = self.0.get(client_id)?.settings.request_timeout?;
        Some(Duration::new(timeout.seconds.max(0) as u64, timeout.nanos.max(0) as u32))
    }

    pub fn remove(&self, client_id: &str) -> bool {
        self.0.remove(client_id).is_some()
    }

    pub fn expire(&self) {
        self.0.retain(|_, session| session.seen.elapsed() < EXPIRY);
    }
}
