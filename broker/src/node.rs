//! A broker's life: `build` opens the store, `bind` takes the port, `run` serves, `drain` stops cleanly.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use apis::brokers::NameServers;
use model::Clock;
use runtime::net;
use store::fs::Fs;
use store::keys::Shape;
use store::kv::Kv;
use store::log::LogOptions;
use store::{Engine, FlushMode, Options, RecoveryReport, Retention, StoreError};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::engine_loop::EngineLoop;
use crate::register::{self, Identity};
use crate::service::Services;
use crate::{Broker, driver};

/// Calls in progress get this long at a stop.
const DRAIN: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct BrokerConfig {
    pub name: String,
    pub cluster: String,
    pub data: PathBuf,
    pub flush: FlushMode,
    pub log: LogOptions,
    pub retention: Retention,
    /// Sizes of one file of the key index.
    pub key_index: Shape,
    /// The address in records and routes.
    pub host: SocketAddr,
    /// The receipt key of a new store: 16 random bytes.
    pub new_key: [u8; 16],
}

pub struct Node {
    broker: Broker,
    config: BrokerConfig,
    report: RecoveryReport,
}

impl Node {
    /// Opens the store and starts the engine. `kv` is opened after the folder has been claimed.
    pub fn build(
        config: BrokerConfig,
        fs: Arc<dyn Fs>,
        kv: impl FnOnce(&BrokerConfig) -> Result<Arc<dyn Kv>, StoreError>,
        clock: impl Clock,
    ) -> Result<Self, StoreError> {
        let options = Options {
            dir: config.data.clone(),
            flush: config.flush,
            log: config.log,
            queue_file_entries: store::queue::ENTRIES_PER_FILE,
            key_index: config.key_index,
            retention: config.retention,
            host: config.host,
            new_key: config.new_key,
        };
        let lock = store::engine::claim(&*fs, &options)?;
        let kv = kv(&config)?;
        let now = clock.now();
        let (engine, report) = Engine::open(options, fs, kv, lock, now)?;
        tracing::info!(
            broker = config.name,
            end = report.end,
            replayed = report.replayed,
            torn = report.torn,
            damaged = report.damaged.len(),
            clean = report.clean,
            "store opened"
        );
        let (reader, key) = (engine.reader(), engine.key());
        let commands = driver::start(EngineLoop::new(engine, now), clock);
        let broker = Broker::new(config.name.clone(), commands, reader, key);
        Ok(Self { broker, config, report })
    }

    pub fn broker(&self) -> &Broker {
        &self.broker
    }

    pub fn report(&self) -> &RecoveryReport {
        &self.report
    }

    pub fn identity(&self, address: String) -> Identity {
        Identity { cluster: self.config.cluster.clone(), broker_id: 0, address }
    }

    /// Serves the internal protocol and registers until `stop`, then drains.
    pub async fn run(
        self,
        listener: TcpListener,
        advertised: String,
        name_servers: impl NameServers,
        stop: CancellationToken,
    ) {
        let identity = self.identity(advertised);
        let registration = register::run(self.broker.clone(), identity, name_servers, stop.clone());
        let registration = tokio::spawn(registration);
        net::serve(listener, None, Services::new(self.broker.clone()), stop, DRAIN).await;
        let _ = registration.await;
        self.drain().await;
    }

    /// Everything durable, nothing to replay at the next start.
    pub async fn drain(self) {
        self.broker.stop().await;
    }
}
