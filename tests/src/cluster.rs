//! A cluster in this process, on memory files and rows, without sockets between its roles.

use std::sync::Arc;

use broker::{BrokerConfig, LocalBrokers, Node};
use model::{Clock, SystemClock, limits};
use namesrv::LocalNameServer;
use proxy::{Proxy, ProxyConfig};
use store::fs::MemFs;
use store::kv::MemKv;
use store::log::LogOptions;
use store::{FlushMode, StoreError};
use tokio_util::sync::CancellationToken;

pub type LocalProxy = Proxy<LocalBrokers, LocalNameServer>;

/// A broker on memory files.
pub fn broker(name: &str, clock: impl Clock, flush: FlushMode) -> Result<Node, StoreError> {
    let config = BrokerConfig {
        name: name.into(),
        cluster: "test".into(),
        data: "/data".into(),
        flush,
        retention: store::Retention::default(),
        key_index: store::keys::Shape { slots: 1000, entries: 10_000 },
        log: LogOptions { segment_bytes: 16 << 20, chunk_bytes: 1 << 20, reserve_bytes: 1 << 20 },
        host: ([127, 0, 0, 1], 10911).into(),
        new_key: [7; 16],
    };
    Node::build(config, Arc::new(MemFs::new()), |_| Ok(Arc::new(MemKv::default())), clock)
}

/// A proxy on a port of its own, with its broker and name server behind it.
pub struct Served {
    pub port: u16,
    stop: CancellationToken,
}

impl Served {
    pub async fn start(auto_create: bool) -> Self {
        let node = broker("broker-a", SystemClock, FlushMode::Async).expect("a store in memory opens");
        let names = LocalNameServer::new(SystemClock);
        let stop = CancellationToken::new();
        let identity = node.identity("127.0.0.1:1".into());
        broker::register::register(node.broker(), &identity, &names, None).await.expect("it registers");
        tokio::spawn(broker::register::run(node.broker().clone(), identity, names.clone(), stop.clone()));
        let brokers = LocalBrokers::new([node.broker().clone()]);
        let tls = Some(runtime::tls::self_signed(None).expect("a certificate"));
        let proxy = Proxy::build(
            ProxyConfig { auto_create, delay_max_ms: limits::DELAY_MAX_MS, tls },
            brokers,
            names,
            Arc::new(|_| {}),
            SystemClock,
        );
        proxy.refresh().await.expect("routes");
        let listener = runtime::net::bind(([127, 0, 0, 1], 0).into()).await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        tokio::spawn(proxy.run(listener, stop.clone()));
        Self { port, stop }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
