//! The cluster as the name servers see it: brokers, topics, groups. Asked for once a second; what was known
//! stays in use while no name server answers. A broker that missed a topic or group is told of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use apis::brokers::{Brokers, NameServers};
use apis::context::CallContext;
use apis::convert::metadata as wire;
use apis::internal::{ClusterRequest, PutMetadataRequest, RegisterRequest};
use apis::status::Error;
use arc_swap::ArcSwap;
use model::{Group, GroupConfig, Topic, TopicConfig};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const REFRESH: Duration = Duration::from_secs(1);
/// By then every broker has registered what was written to it.
const HEARD_OF: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct BrokerView {
    pub name: String,
    pub address: String,
    pub topics: HashMap<Topic, TopicConfig>,
    pub groups: HashMap<Group, GroupConfig>,
}

/// One version of what is known.
#[derive(Clone, Debug, Default)]
pub struct View {
    version: u64,
    pub brokers: BTreeMap<String, BrokerView>,
}

impl View {
    fn of(version: u64, brokers: &[RegisterRequest]) -> Self {
        let view = |r: &RegisterRequest| {
            let m = r.metadata.clone().unwrap_or_default();
            let topics = m.topics.iter().map(wire::topic_from_wire).map(|t| (t.topic.clone(), t));
            let groups = m.groups.iter().map(wire::group_from_wire).map(|g| (g.group.clone(), g));
            BrokerView {
                name: r.broker.clone(),
                address: r.address.clone(),
                topics: topics.collect(),
                groups: groups.collect(),
            }
        };
        // Masters only: a follower registers with another id.
        let masters = brokers.iter().filter(|r| r.broker_id == 0);
        Self { version, brokers: masters.map(|r| (r.broker.clone(), view(r))).collect() }
    }

    /// The brokers that have a topic.
    pub fn route(&self, topic: &Topic) -> Vec<(&BrokerView, &TopicConfig)> {
        let brokers = self.brokers.values();
        brokers.filter_map(|b| Some((b, b.topics.get(topic).filter(|t| !t.deleted)?))).collect()
    }

    /// The newest record of a topic, also of one that is no more.
    pub fn topic_record(&self, topic: &Topic) -> Option<&TopicConfig> {
        self.brokers.values().filter_map(|b| b.topics.get(topic)).max_by_key(|t| t.version)
    }

    pub fn topic(&self, topic: &Topic) -> Option<&TopicConfig> {
        self.topic_record(topic).filter(|t| !t.deleted)
    }

    pub fn group_record(&self, group: &Group) -> Option<&GroupConfig> {
        self.brokers.values().filter_map(|b| b.groups.get(group)).max_by_key(|g| g.version)
    }

    pub fn group(&self, group: &Group) -> Option<&GroupConfig> {
        self.group_record(group).filter(|g| !g.deleted)
    }

    /// The newest records, those of deleted topics too.
    pub fn topics(&self) -> BTreeMap<&Topic, &TopicConfig> {
        let all = self.brokers.values().flat_map(|b| b.topics.values());
        let mut newest: BTreeMap<&Topic, &TopicConfig> = BTreeMap::new();
        for t in all {
            let known = newest.entry(&t.topic).or_insert(t);
            if known.version < t.version {
                *known = t;
            }
        }
        newest
    }

    /// The newest records, those of deleted groups too.
    pub fn groups(&self) -> BTreeMap<&Group, &GroupConfig> {
        let all = self.brokers.values().flat_map(|b| b.groups.values());
        let mut newest: BTreeMap<&Group, &GroupConfig> = BTreeMap::new();
        for g in all {
            let known = newest.entry(&g.group).or_insert(g);
            if known.version < g.version {
                *known = g;
            }
        }
        newest
    }

    /// Puts newer records over what is known of every broker.
    fn overlay(&mut self, request: &PutMetadataRequest) {
        for broker in self.brokers.values_mut() {
            for t in request.topics.iter().map(wire::topic_from_wire) {
                if broker.topics.get(&t.topic).is_none_or(|known| known.version < t.version) {
                    broker.topics.insert(t.topic.clone(), t);
                }
            }
            for g in request.groups.iter().map(wire::group_from_wire) {
                if broker.groups.get(&g.group).is_none_or(|known| known.version < g.version) {
                    broker.groups.insert(g.group.clone(), g);
                }
            }
        }
    }

    /// What a broker lacks of the cluster's topics and groups. Dead-letter topics are each broker's own.
    fn missing(&self, broker: &BrokerView) -> Option<PutMetadataRequest> {
        let topics = self.topics().into_values().filter(|t| {
            !t.topic.is_dead_letter() && broker.topics.get(&t.topic).is_none_or(|own| own.version < t.version)
        });
        let groups = self
            .groups()
            .into_values()
            .filter(|g| broker.groups.get(&g.group).is_none_or(|own| own.version < g.version));
        let request = PutMetadataRequest {
            topics: topics.map(wire::topic_to_wire).collect(),
            groups: groups.map(wire::group_to_wire).collect(),
        };
        (!request.topics.is_empty() || !request.groups.is_empty()).then_some(request)
    }
}

/// Called with every new view; a remote `Brokers` learns addresses from it.
pub type OnView = Arc<dyn Fn(&View) + Send + Sync>;

pub struct Routes<B, N> {
    brokers: B,
    name_servers: N,
    view: ArcSwap<View>,
    /// Names of all brokers that were ever seen: one that is away is not one that does not exist.
    seen: parking_lot::Mutex<BTreeSet<String>>,
    /// Records written through here that the name servers may not have heard of yet.
    recent: parking_lot::Mutex<Vec<(Instant, PutMetadataRequest)>>,
    /// One question at a time.
    asking: Mutex<()>,
    on_view: OnView,
}

impl<B: Brokers, N: NameServers> Routes<B, N> {
    pub fn new(brokers: B, name_servers: N, on_view: OnView) -> Self {
        Self {
            brokers,
            name_servers,
            view: ArcSwap::default(),
            seen: Default::default(),
            recent: Default::default(),
            asking: Mutex::default(),
            on_view,
        }
    }

    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    pub fn was_seen(&self, broker: &str) -> bool {
        self.seen.lock().contains(broker)
    }

    /// Asks a name server now.
    pub async fn refresh(&self) -> Result<Arc<View>, Error> {
        let _one = self.asking.lock().await;
        let known = self.view.load().version;
        let reply = self.name_servers.cluster(ClusterRequest { known_version: known }).await?;
        if reply.version != known {
            let mut view = View::of(reply.version, &reply.brokers);
            let mut recent = self.recent.lock();
            recent.retain(|(written, _)| written.elapsed() < HEARD_OF);
            recent.iter().for_each(|(_, request)| view.overlay(request));
            drop(recent);
            self.set(view);
        }
        Ok(self.view())
    }

    fn set(&self, view: View) {
        (self.on_view)(&view);
        self.seen.lock().extend(view.brokers.keys().cloned());
        self.view.store(Arc::new(view));
    }

    /// Refreshes until told to stop, and mends brokers that lack a record.
    pub async fn run(&self, stop: CancellationToken) {
        let mut mended = 0;
        let mut silent = false;
        loop {
            match self.refresh().await {
                Ok(view) => {
                    silent = false;
                    if view.version != mended {
                        let done = self.mend(&view).await;
                        mended = if done { view.version } else { 0 };
                    }
                }
                Err(error) if !std::mem::replace(&mut silent, true) => {
                    tracing::warn!(%error, "no name server answers; the known routes stay in use");
                }
                Err(_) => {}
            }
            tokio::select! {
                () = tokio::time::sleep(REFRESH) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// True if every broker has been told what it lacked.
    async fn mend(&self, view: &View) -> bool {
        let mut done = true;
        for broker in view.brokers.values() {
            let Some(missing) = view.missing(broker) else { continue };
            tracing::info!(
                broker = broker.name,
                topics = missing.topics.len(),
                groups = missing.groups.len(),
                "the broker lacked records of topics or groups"
            );
            let put = self.brokers.put_metadata(&broker.name, &CallContext::internal(), missing).await;
            if let Err(error) = put {
                tracing::warn!(broker = broker.name, %error, "it could not be told; it is tried again");
                done = false;
            }
        }
        done
    }

    /// Writes to every broker of the cluster, and to what is known here: it counts at once.
    pub async fn put(&self, context: &CallContext, request: PutMetadataRequest) -> Result<(), Error> {
        let view = self.view();
        if view.brokers.is_empty() {
            let what = "no broker is registered; start one, or wait until it is up";
            return Err(Error::new(apis::v2::Code::HaNotAvailable, what));
        }
        for name in view.brokers.keys() {
            self.brokers.put_metadata(name, context, request.clone()).await?;
        }
        let _one = self.asking.lock().await;
        let mut next = View::clone(&self.view());
        next.overlay(&request);
        self.recent.lock().push((Instant::now(), request));
        self.set(next);
        Ok(())
    }
}
