//! Tells the name servers that this broker lives, and what topics and groups it has.

use std::time::Duration;

use apis::brokers::NameServers;
use apis::context::CallContext;
use apis::internal::{MetadataReply, MetadataRequest, RegisterRequest};
use tokio_util::sync::CancellationToken;

use crate::Broker;

/// Between two signs of life; a name server forgets a broker after three that did not come.
pub const INTERVAL: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct Identity {
    pub cluster: String,
    pub broker_id: u32,
    /// `host:port` of the internal service.
    pub address: String,
}

/// Registers until told to stop.
pub async fn run(
    broker: Broker,
    identity: Identity,
    name_servers: impl NameServers,
    stop: CancellationToken,
) {
    let mut known: Option<u64> = None;
    let mut silent = false;
    loop {
        match register(&broker, &identity, &name_servers, known).await {
            Ok(version) => {
                known = version;
                silent = false;
            }
            Err(error) => {
                known = None;
                if !std::mem::replace(&mut silent, true) {
                    tracing::warn!(%error, "no name server answers; the broker goes on and keeps trying");
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Returns the version that the name server knows now.
pub async fn register(
    broker: &Broker,
    identity: &Identity,
    name_servers: &impl NameServers,
    known: Option<u64>,
) -> Result<Option<u64>, apis::status::Error> {
    let version = broker.metadata_version().await?;
    let unchanged = known == Some(version);
    let metadata = match unchanged {
        true => MetadataReply { version, broker: broker.name().to_owned(), ..MetadataReply::default() },
        false => broker.metadata(&CallContext::internal(), MetadataRequest {}).await?,
    };
    let version = metadata.version;
    let request = RegisterRequest {
        cluster: identity.cluster.clone(),
        broker: broker.name().to_owned(),
        broker_id: identity.broker_id,
        address: identity.address.clone(),
        metadata: Some(metadata),
        unchanged,
    };
    let reply = name_servers.register(request).await?;
    Ok((!reply.send_all).then_some(version))
}
