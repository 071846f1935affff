//! `ferry` as a client of a proxy.

use std::time::Duration;

use apis::admin::ferry_admin_client::FerryAdminClient;
use apis::convert::receive::duration;
use apis::v2::messaging_service_client::MessagingServiceClient;
use apis::v2::*;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use super::{Unreachable, Usage};

pub type Admin = FerryAdminClient<Channel>;
pub type Messaging = MessagingServiceClient<InterceptedService<Channel, Identify>>;

const FRAME: usize = model::limits::FRAME_MAX_BYTES;

pub async fn channel(endpoint: &str) -> anyhow::Result<Channel> {
    let uri = format!("http://{endpoint}");
    let endpoint_ = tonic::transport::Endpoint::from_shared(uri)
        .map_err(|_| Usage(format!("{endpoint:?} is not an endpoint of the form host:port")))?
        .tcp_nodelay(true)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .connect_timeout(Duration::from_secs(3));
    endpoint_.connect().await.map_err(|_| Unreachable(endpoint.to_owned()).into())
}

pub async fn admin(endpoint: &str) -> anyhow::Result<Admin> {
    Ok(FerryAdminClient::new(channel(endpoint).await?).max_decoding_message_size(FRAME))
}

/// Puts the headers of a RocketMQ client on every call.
#[derive(Clone)]
pub struct Identify(MetadataValue<tonic::metadata::Ascii>);

impl tonic::service::Interceptor for Identify {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        let metadata = request.metadata_mut();
        metadata.insert("x-mq-client-id", self.0.clone());
        metadata.insert("x-mq-language", MetadataValue::from_static("RUST"));
        metadata.insert("x-mq-client-version", MetadataValue::from_static(env!("CARGO_PKG_VERSION")));
        metadata.insert("x-mq-protocol", MetadataValue::from_static("v2"));
        Ok(request)
    }
}

pub fn messaging_on(channel: Channel, name: &str) -> Messaging {
    let id = format!("ferry-{name}@{}", std::process::id());
    let id = MetadataValue::try_from(id).unwrap_or_else(|_| MetadataValue::from_static("ferry"));
    MessagingServiceClient::with_interceptor(channel, Identify(id))
        .max_decoding_message_size(FRAME)
        .max_encoding_message_size(FRAME)
}

pub async fn messaging(endpoint: &str, name: &str) -> anyhow::Result<Messaging> {
    Ok(messaging_on(channel(endpoint).await?, name))
}

/// What a consumer holds while it works: servers other than FerryMQ serve only clients whose stream is open.
pub struct Attached {
    _commands: mpsc::Sender<TelemetryCommand>,
    _reader: tokio::task::JoinHandle<()>,
}

/// Says a consumer's settings on a telemetry stream and waits until the server has them.
pub async fn attach(
    client: &mut Messaging,
    topic: &str,
    group: &str,
    filter: FilterExpression,
) -> anyhow::Result<Attached> {
    let entry = SubscriptionEntry { topic: resource(topic), expression: Some(filter) };
    let subscription = Subscription {
        group: resource(group),
        subscriptions: vec![entry],
        fifo: Some(false),
        long_polling_timeout: Some(duration(20_000)),
        ..Default::default()
    };
    let agent = Ua { language: Language::Rust.into(), version: "5.0.0".into(), ..Default::default() };
    let settings = Settings {
        client_type: Some(ClientType::SimpleConsumer.into()),
        request_timeout: Some(duration(3_000)),
        user_agent: Some(agent),
        pub_sub: Some(settings::PubSub::Subscription(subscription)),
        ..Default::default()
    };
    let (commands, stream) = mpsc::channel(4);
    let command = Some(telemetry_command::Command::Settings(settings));
    commands.send(TelemetryCommand { status: None, command }).await?;
    let mut answers = client.telemetry(ReceiverStream::new(stream)).await.map_err(failed)?.into_inner();
    let answer = tokio::time::timeout(Duration::from_secs(5), answers.next()).await;
    match answer {
        Ok(Some(answer)) => drop(answer.map_err(failed)?),
        Ok(None) => anyhow::bail!("the server ended the telemetry stream"),
        Err(_) => anyhow::bail!("the server did not answer the client's settings within 5 s"),
    }
    let reader = tokio::spawn(async move { while let Some(Ok(_)) = answers.next().await {} });
    Ok(Attached { _commands: commands, _reader: reader })
}

/// A full name as a resource.
pub fn resource(name: &str) -> Option<Resource> {
    Some(apis::convert::receive::resource(name))
}

pub fn endpoints(endpoint: &str) -> Option<Endpoints> {
    let (host, port) = endpoint.rsplit_once(':')?;
    let scheme = match host.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V4(_)) => AddressScheme::IPv4,
        Ok(std::net::IpAddr::V6(_)) => AddressScheme::IPv6,
        Err(_) => AddressScheme::DomainName,
    };
    let address = Address { host: host.into(), port: port.parse().ok()? };
    Some(Endpoints { scheme: scheme.into(), addresses: vec![address] })
}

/// An answer's status as a result.
pub fn check(status: Option<&Status>) -> anyhow::Result<()> {
    let status = status.ok_or_else(|| anyhow::anyhow!("the server's answer has no status"))?;
    if status.code == Code::Ok as i32 {
        return Ok(());
    }
    let name = Code::try_from(status.code).map_or("UNKNOWN", |c| c.as_str_name());
    anyhow::bail!("{name} ({}): {}", status.code, status.message)
}

/// A gRPC error as a person reads it.
pub fn failed(status: tonic::Status) -> anyhow::Error {
    let error = apis::status::Error::from(status);
    anyhow::anyhow!("{error}")
}
