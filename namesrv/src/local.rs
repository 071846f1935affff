//! A name server in this process: the table behind a lock, with a clock.

use std::sync::Arc;

use apis::brokers::{NameServers, Reply};
use apis::internal::*;
use model::Clock;
use parking_lot::Mutex;

use crate::registry::Registry;

#[derive(Clone)]
pub struct LocalNameServer(Arc<Inner>);

struct Inner {
    registry: Mutex<Registry>,
    clock: Box<dyn Clock>,
}

impl LocalNameServer {
    pub fn new(clock: impl Clock) -> Self {
        // Starting from the time of day, versions grow over restarts.
        let registry = Registry::new(clock.now().0 as u64);
        Self(Arc::new(Inner { registry: Mutex::new(registry), clock: Box::new(clock) }))
    }

    fn current(&self) -> parking_lot::MutexGuard<'_, Registry> {
        let mut registry = self.0.registry.lock();
        if registry.expire(self.0.clock.now()) {
            tracing::warn!("a broker fell silent and left the routes");
        }
        registry
    }
}

impl NameServers for LocalNameServer {
    async fn register(&self, request: RegisterRequest) -> Reply<RegisterReply> {
        let now = self.0.clock.now();
        Ok(RegisterReply { send_all: !self.current().register(request, now) })
    }

    async fn route(&self, request: RouteRequest) -> Reply<RouteReply> {
        Ok(RouteReply { brokers: self.current().route(&request.topic) })
    }

    async fn cluster(&self, request: ClusterRequest) -> Reply<ClusterReply> {
        let (version, brokers) = self.current().cluster(request.known_version);
        Ok(ClusterReply { version, brokers })
    }
}
