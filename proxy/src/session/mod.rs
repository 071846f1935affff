//! What clients said of themselves. Only a hint: a client that is not here is served all the same.

pub mod settings;

use std::sync::Arc;
use std::time::{Duration, Instant};

use apis::v2::Settings;
use dashmap::DashMap;
use model::bound::{Bound, Unit};
use model::limits::SESSIONS_MAX;

/// A client that is silent for this long is forgotten.
const EXPIRY: Duration = Duration::from_millis(model::limits::CLIENT_EXPIRY_MS as u64);

#[derive(Debug)]
struct Session {
    settings: Arc<Settings>,
    seen: Instant,
}

#[derive(Debug, Default)]
pub struct Sessions(DashMap<String, Session>);

impl Sessions {
    /// Where there are too many clients, new ones are served without what they said.
    pub fn put(&self, client_id: &str, settings: Settings) {
        if self.0.len() < SESSIONS_MAX || self.0.contains_key(client_id) {
            let settings = Arc::new(settings);
            self.0.insert(client_id.to_owned(), Session { settings, seen: Instant::now() });
        }
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
