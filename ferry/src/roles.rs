//! `ferry namesrv`, `ferry broker`, `ferry proxy`: one role each, configured by TOML < environment < --set.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use apis::remote::{Dial, RemoteBrokers, RemoteNameServers};
use apis::status::Error;
use apis::v2::Code;
use broker::{BrokerConfig, Node};
use model::{SystemClock, limits};
use namesrv::LocalNameServer;
use proxy::{Proxy, ProxyConfig};
use runtime::{config, net, random, shutdown, telemetry, tls};
use serde::Deserialize;
use store::fs::OsFs;
use store::keys::Shape;
use store::kv::{Kv, RocksKv};
use store::log::LogOptions;
use store::{FlushMode, Retention, StoreError};
use tonic::transport::Channel;

use crate::cli::RoleArgs;

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct NamesrvConfig {
    listen: SocketAddr,
}

impl Default for NamesrvConfig {
    fn default() -> Self {
        Self { listen: ([0, 0, 0, 0], 9876).into() }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct BrokerFile {
    name: String,
    cluster: String,
    listen: SocketAddr,
    /// What proxies dial; the listening address if it is not set.
    advertise: Option<String>,
    namesrv: Vec<String>,
    data: PathBuf,
    storage: Storage,
}

impl Default for BrokerFile {
    fn default() -> Self {
        Self {
            name: "broker-a".into(),
            cluster: "DefaultCluster".into(),
            listen: ([0, 0, 0, 0], 10911).into(),
            advertise: None,
            namesrv: vec!["127.0.0.1:9876".into()],
            data: "ferry-data".into(),
            storage: Storage::default(),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Flush {
    #[default]
    Async,
    Sync,
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Storage {
    flush: Flush,
    segment_bytes: u64,
    /// Messages older than this may go.
    retention_hours: u64,
    /// Bytes of log kept at the most; 0: no limit.
    retention_bytes: u64,
    /// Let go also of what a group has not consumed.
    delete_unconsumed: bool,
    /// Used part of the disk from which on consumed messages go whatever their age.
    disk_clean_ratio: f64,
    /// Used part of the disk from which on sends are refused.
    disk_full_ratio: f64,
}

impl Default for Storage {
    fn default() -> Self {
        let retention = Retention::default();
        Self {
            flush: Flush::Async,
            segment_bytes: LogOptions::default().segment_bytes,
            retention_hours: 72,
            retention_bytes: 0,
            delete_unconsumed: retention.delete_unconsumed,
            disk_clean_ratio: retention.clean_ratio,
            disk_full_ratio: retention.full_ratio,
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ProxyFile {
    listen: SocketAddr,
    namesrv: Vec<String>,
    auto_create: bool,
    /// How far ahead messages may be scheduled.
    delay_max_hours: u64,
    tls: TlsFile,
}

impl Default for ProxyFile {
    fn default() -> Self {
        let namesrv = vec!["127.0.0.1:9876".into()];
        Self {
            listen: ([0, 0, 0, 0], 8081).into(),
            namesrv,
            auto_create: false,
            delay_max_hours: limits::DELAY_MAX_MS as u64 / 3_600_000,
            tls: TlsFile::default(),
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct TlsFile {
    enabled: bool,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl Default for TlsFile {
    fn default() -> Self {
        Self { enabled: true, cert: None, key: None }
    }
}

fn load<T: serde::de::DeserializeOwned>(args: &RoleArgs) -> anyhow::Result<T> {
    Ok(config::load(args.config.as_deref(), std::env::vars(), &args.set)?)
}

/// Says that clients can be served.
pub fn ready(file: Option<&Path>) -> anyhow::Result<()> {
    let Some(file) = file else { return Ok(()) };
    let context = || format!("the ready file {} cannot be written", file.display());
    let temporary = file.with_extension("tmp");
    std::fs::write(&temporary, "ready\n").with_context(context)?;
    std::fs::rename(&temporary, file).with_context(context)
}

pub fn open_kv(config: &BrokerConfig) -> Result<Arc<dyn Kv>, StoreError> {
    let kv = RocksKv::open(&config.data.join("rocksdb"))?;
    Ok(Arc::new(kv))
}

fn dial() -> Dial<Channel> {
    Arc::new(|address| net::dial(address).map_err(|e| Error::new(Code::BadRequest, e.to_string())))
}

pub async fn namesrv(args: RoleArgs) -> anyhow::Result<()> {
    telemetry::init("info");
    let file: NamesrvConfig = load(&args)?;
    let stop = shutdown::on_signal()?;
    let listener = net::bind(file.listen).await?;
    println!("name server listening on {}", listener.local_addr()?);
    ready(args.ready_file.as_deref())?;
    namesrv::node::run(LocalNameServer::new(SystemClock), listener, stop).await;
    Ok(())
}

pub async fn broker(args: RoleArgs) -> anyhow::Result<()> {
    telemetry::init("info");
    let file: BrokerFile = load(&args)?;
    let stop = shutdown::on_signal()?;
    let listener = net::bind(file.listen).await?;
    let listening = listener.local_addr()?;
    let advertise = file.advertise.unwrap_or_else(|| match listening.ip().is_unspecified() {
        true => format!("127.0.0.1:{}", listening.port()),
        false => listening.to_string(),
    });
    let config = BrokerConfig {
        name: file.name,
        cluster: file.cluster,
        data: file.data,
        flush: match file.storage.flush {
            Flush::Async => FlushMode::Async,
            Flush::Sync => FlushMode::Sync,
        },
        log: LogOptions { segment_bytes: file.storage.segment_bytes, ..LogOptions::default() },
        retention: Retention {
            age_ms: file.storage.retention_hours.saturating_mul(3_600_000).min(i64::MAX as u64) as i64,
            max_bytes: Some(file.storage.retention_bytes).filter(|b| *b > 0).unwrap_or(u64::MAX),
            delete_unconsumed: file.storage.delete_unconsumed,
            clean_ratio: file.storage.disk_clean_ratio,
            full_ratio: file.storage.disk_full_ratio,
        },
        key_index: Shape::default(),
        host: advertise.parse().unwrap_or(listening),
        new_key: random::secret(),
    };
    let name = config.name.clone();
    let node = Node::build(config, Arc::new(OsFs), open_kv, SystemClock)?;
    let name_servers = RemoteNameServers::new(&file.namesrv, &dial())?;
    println!("broker {name} listening on {listening}, advertised as {advertise}");
    ready(args.ready_file.as_deref())?;
    node.run(listener, advertise, name_servers, stop).await;
    Ok(())
}

pub async fn proxy(args: RoleArgs) -> anyhow::Result<()> {
    telemetry::init("info");
    let file: ProxyFile = load(&args)?;
    let stop = shutdown::on_signal()?;
    let listener = net::bind(file.listen).await?;
    let tls = match (file.tls.enabled, &file.tls.cert, &file.tls.key) {
        (false, ..) => None,
        (true, Some(cert), Some(key)) => Some(tls::from_files(cert, key)?),
        (true, None, None) => Some(tls::self_signed(None)?),
        _ => anyhow::bail!("configuration: tls: give both cert and key, or neither (self-signed)"),
    };
    let dial = dial();
    let brokers = RemoteBrokers::new(dial.clone());
    let name_servers = RemoteNameServers::new(&file.namesrv, &dial)?;
    let addresses = brokers.clone();
    let on_view: proxy::routes::OnView = Arc::new(move |view| {
        let all = view.brokers.values().map(|b| (b.name.as_str(), b.address.as_str()));
        if let Err(error) = addresses.set_addresses(all) {
            tracing::error!(%error, "a broker registered an address that cannot be dialled");
        }
    });
    let delay_max_ms = i64::try_from(file.delay_max_hours).unwrap_or(i64::MAX).saturating_mul(3_600_000);
    let config = ProxyConfig { auto_create: file.auto_create, delay_max_ms, tls };
    let proxy = Proxy::build(config, brokers, name_servers, on_view, SystemClock);
    if let Err(error) = proxy.refresh().await {
        tracing::warn!(%error, "no name server answers yet");
    }
    println!("proxy listening on {}", listener.local_addr()?);
    ready(args.ready_file.as_deref())?;
    proxy.run(listener, stop).await;
    Ok(())
}
