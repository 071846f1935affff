//! `ferry dev`: name server, broker and proxy in one process, with calls instead of sockets between them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use broker::{BrokerConfig, LocalBrokers, Node};
use clap::Args;
use model::{SystemClock, limits};
use namesrv::LocalNameServer;
use proxy::{Proxy, ProxyConfig};
use runtime::{net, random, shutdown, telemetry, tls};
use store::fs::OsFs;
use store::keys::Shape;
use store::log::LogOptions;
use store::{FlushMode, Retention};

use crate::roles::{open_kv, ready};

#[derive(Args)]
pub struct DevArgs {
    /// Folder for everything that is stored
    #[arg(long, default_value = "ferry-data")]
    pub data: PathBuf,
    /// Forget everything at the end
    #[arg(long, conflicts_with = "data")]
    pub ephemeral: bool,
    /// Port for clients, TLS and plaintext
    #[arg(long, default_value_t = 8081)]
    pub port: u16,
    /// Address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub bind: IpAddr,
    /// Written when clients can be served
    #[arg(long)]
    pub ready_file: Option<PathBuf>,
    /// Acknowledge after the disk has it (sync), or after the kernel has it (async)
    #[arg(long, default_value = "async", value_parser = flush_mode)]
    pub flush: FlushMode,
}

pub fn flush_mode(text: &str) -> Result<FlushMode, String> {
    match text {
        "async" => Ok(FlushMode::Async),
        "sync" => Ok(FlushMode::Sync),
        other => Err(format!("{other:?} is not a flush mode; choose async or sync")),
    }
}

const BROKER: &str = "ferry-dev";

pub async fn run(args: DevArgs) -> anyhow::Result<()> {
    telemetry::init("warn");
    let stop = shutdown::on_signal()?;
    // Sockets and locks first: what is wrong shows before anything is touched.
    let listener = net::bind(SocketAddr::new(args.bind, args.port)).await?;
    let address = listener.local_addr()?;
    let temporary = args.ephemeral.then(tempfile::tempdir).transpose()?;
    let data = temporary.as_ref().map_or(args.data.as_path(), |dir| dir.path());
    let node = Node::build(config(data, address, args.flush), Arc::new(OsFs), open_kv, SystemClock)?;
    let name_server = LocalNameServer::new(SystemClock);
    let brokers = LocalBrokers::new([node.broker().clone()]);
    let identity = node.identity(address.to_string());
    broker::register::register(node.broker(), &identity, &name_server, None).await?;
    let registration =
        broker::register::run(node.broker().clone(), identity, name_server.clone(), stop.clone());
    let registration = tokio::spawn(registration);
    let tls = Some(tls::self_signed(Some(data))?);
    let config = ProxyConfig { auto_create: true, delay_max_ms: limits::DELAY_MAX_MS, tls };
    let proxy = Proxy::build(config, brokers, name_server, Arc::new(|_| {}), SystemClock);
    proxy.refresh().await?;
    ready(args.ready_file.as_deref())?;
    welcome(address, data, args.ephemeral);
    proxy.run(listener, stop.clone()).await;
    stop.cancel();
    let _ = registration.await;
    node.drain().await;
    Ok(())
}

fn config(data: &Path, address: SocketAddr, flush: FlushMode) -> BrokerConfig {
    BrokerConfig {
        name: BROKER.into(),
        cluster: "ferry-dev".into(),
        data: data.into(),
        flush,
        log: LogOptions::default(),
        // A developer's disk may be as full as it likes; what is older than three days and consumed goes.
        retention: Retention { clean_ratio: 1.0, full_ratio: 1.0, ..Retention::default() },
        key_index: Shape::default(),
        host: address,
        new_key: random::secret(),
    }
}

fn welcome(address: SocketAddr, data: &Path, ephemeral: bool) {
    let kept = if ephemeral { "nothing is kept".to_owned() } else { format!("data in {}", data.display()) };
    println!("FerryMQ is ready: {address} (gRPC, TLS and plaintext; {kept})");
    println!();
    println!("  ferry    ferry send demo hello        then: ferry receive demo --group g --ack");
    println!("  Python   config = ClientConfiguration(\"{address}\", Credentials())");
    println!("  Java     ClientConfiguration.newBuilder().setEndpoints(\"{address}\").build()");
    println!(
        "  Go       rmq.Config{{Endpoint: \"{address}\", Credentials: &credentials.SessionCredentials{{}}}}"
    );
    println!("  Node.js  new Producer({{ endpoints: '{address}' }})");
    println!("  Rust     option.set_access_url(\"{address}\")");
    println!();
    println!("Topics and groups come into being when they are first named. Ctrl-C stops.");
}
