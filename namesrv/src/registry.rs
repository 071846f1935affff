//! The table of brokers: pure, time is an argument. A broker that is silent for [`EXPIRY_MS`] leaves it.

use std::collections::BTreeMap;

use apis::internal::{BrokerRoute, MetadataReply, RegisterRequest};
use model::Timestamp;

/// Three signs of life that did not come.
pub const EXPIRY_MS: i64 = 3_000;

#[derive(Debug, Default)]
pub struct Registry {
    brokers: BTreeMap<(String, u32), (RegisterRequest, Timestamp)>,
    version: u64,
}

impl Registry {
    /// `version` must be larger than that of any earlier registry that callers may remember.
    pub fn new(version: u64) -> Self {
        Self { brokers: BTreeMap::new(), version }
    }

    /// A sign of life. False if the registration must be sent in full.
    pub fn register(&mut self, request: RegisterRequest, now: Timestamp) -> bool {
        let key = (request.broker.clone(), request.broker_id);
        let version = |r: &RegisterRequest| r.metadata.as_ref().map(|m| m.version);
        if let Some((known, seen)) = self.brokers.get_mut(&key) {
            let same = version(known) == version(&request) && known.address == request.address;
            if same {
                *seen = now;
                return true;
            }
        }
        if request.unchanged {
            return false;
        }
        self.brokers.insert(key, (request, now));
        self.version += 1;
        true
    }

    /// Drops the brokers that have been silent; true if there were any.
    pub fn expire(&mut self, now: Timestamp) -> bool {
        let before = self.brokers.len();
        self.brokers.retain(|_, (_, seen)| now.since(*seen) <= EXPIRY_MS);
        let gone = self.brokers.len() != before;
        self.version += u64::from(gone);
        gone
    }

    /// When the next broker would leave if it stayed silent.
    pub fn next_expiry(&self) -> Option<Timestamp> {
        self.brokers.values().map(|(_, seen)| seen.plus_ms(EXPIRY_MS + 1)).min()
    }

    pub fn route(&self, topic: &str) -> Vec<BrokerRoute> {
        let route = |r: &RegisterRequest, m: &MetadataReply| {
            let topic = m.topics.iter().find(|t| t.name == topic && !t.deleted)?.clone();
            Some(BrokerRoute {
                cluster: r.cluster.clone(),
                broker: r.broker.clone(),
                address: r.address.clone(),
                topic: Some(topic),
            })
        };
        self.brokers.values().filter_map(|(r, _)| route(r, r.metadata.as_ref()?)).collect()
    }

    /// Everything, unless the caller has it already.
    pub fn cluster(&self, known_version: u64) -> (u64, Vec<RegisterRequest>) {
        let news = known_version != self.version;
        (
            self.version,
            if news { self.brokers.values().map(|(r, _)| r.clone()).collect() } else { Vec::new() },
        )
    }
}

#[cfg(test)]
mod tests {
    use apis::internal::TopicConfig;

    use super::*;

    fn registration(broker: &str, version: u64, unchanged: bool) -> RegisterRequest {
        let topics = vec![TopicConfig { name: "t".into(), queues: 8, ..Default::default() }];
        let metadata = MetadataReply { broker: broker.into(), version, topics, groups: Vec::new() };
        RegisterRequest {
            cluster: "c".into(),
            broker: broker.into(),
            broker_id: 0,
            address: "h:1".into(),
            metadata: Some(metadata),
            unchanged,
        }
    }

    #[test]
    fn a_route_lives_as_long_as_its_broker() {
        let mut registry = Registry::new(7);
        assert!(!registry.register(registration("a", 1, true), Timestamp(0)), "unknown: send all");
        assert!(registry.register(registration("a", 1, false), Timestamp(0)));
        assert!(registry.register(registration("b", 1, false), Timestamp(2_000)));
        assert_eq!(registry.route("t").len(), 2);
        assert!(registry.route("u").is_empty());
        let (version, brokers) = registry.cluster(0);
        assert_eq!(brokers.len(), 2);
        assert_eq!(registry.cluster(version), (version, Vec::new()));

        assert!(registry.register(registration("a", 1, true), Timestamp(2_500)));
        assert_eq!(registry.cluster(version).1, [], "a sign of life is no news");
        assert_eq!(registry.next_expiry(), Some(Timestamp(5_001)));
        assert!(registry.expire(Timestamp(5_001)));
        assert_eq!(registry.route("t")[0].broker, "a");
        assert_ne!(registry.cluster(version).0, version);
        assert!(!registry.register(registration("a", 2, true), Timestamp(5_100)), "a new version: send all");
    }
}
