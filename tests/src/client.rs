//! The raw protocol: builders for its requests, and a client that puts the headers on.

use std::collections::HashMap;
use std::time::Duration;

use apis::admin::ferry_admin_client::FerryAdminClient;
use apis::v2::messaging_service_client::MessagingServiceClient;
use apis::v2::receive_message_response::Content;
use apis::v2::*;
use tokio_stream::StreamExt;
use tonic::transport::Channel;

pub type Client = MessagingServiceClient<Channel>;

pub async fn connect(port: u16) -> Client {
    let channel = channel(port).await;
    MessagingServiceClient::new(channel)
        .max_decoding_message_size(64 << 20)
        .max_encoding_message_size(256 << 20)
}

pub async fn admin(port: u16) -> FerryAdminClient<Channel> {
    FerryAdminClient::new(channel(port).await)
}

async fn channel(port: u16) -> Channel {
    let uri = format!("http://127.0.0.1:{port}");
    tonic::transport::Endpoint::from_shared(uri).expect("a uri").connect().await.expect("the proxy listens")
}

/// A request of a client; an empty id leaves the header out.
pub fn by<T>(client_id: &str, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    if !client_id.is_empty() {
        request.metadata_mut().insert("x-mq-client-id", client_id.parse().expect("an id"));
    }
    request.set_timeout(Duration::from_secs(10));
    request
}

pub fn name(name: &str) -> Option<Resource> {
    Some(Resource { resource_namespace: String::new(), name: name.into() })
}

pub fn endpoints() -> Option<Endpoints> {
    let address = Address { host: "my.host".into(), port: 4711 };
    Some(Endpoints { scheme: AddressScheme::DomainName.into(), addresses: vec![address] })
}

/// A valid NORMAL message.
pub fn message(topic: &str, body: &[u8]) -> Message {
    Message {
        topic: name(topic),
        user_properties: HashMap::new(),
        system_properties: Some(SystemProperties {
            message_id: "01C0FFEE0123456789ABCDEF0123456789".into(),
            message_type: MessageType::Normal.into(),
            body_encoding: Encoding::Identity.into(),
            born_host: "test".into(),
            ..Default::default()
        }),
        body: bytes::Bytes::copy_from_slice(body),
    }
}

/// A valid receive of up to four messages, invisible for 10 s.
pub fn receive(topic: &str, group: &str) -> ReceiveMessageRequest {
    let broker = Broker { name: "broker-a".into(), id: 0, endpoints: endpoints() };
    ReceiveMessageRequest {
        group: name(group),
        message_queue: Some(MessageQueue { topic: name(topic), broker: Some(broker), ..Default::default() }),
        filter_expression: Some(FilterExpression { r#type: FilterType::Tag.into(), expression: "*".into() }),
        batch_size: 4,
        invisible_duration: Some(seconds(10)),
        auto_renew: false,
        long_polling_timeout: None,
        attempt_id: None,
    }
}

pub fn seconds(s: i64) -> prost_types::Duration {
    prost_types::Duration { seconds: s, nanos: 0 }
}

/// What a receive's stream held.
#[derive(Debug, Default)]
pub struct Received {
    pub status: Option<Status>,
    pub messages: Vec<Message>,
    pub delivery_timestamp: bool,
}

impl Received {
    pub fn code(&self) -> Code {
        self.status.as_ref().map_or(Code::Unspecified, Status::code)
    }
}

pub async fn drain(client: &mut Client, request: tonic::Request<ReceiveMessageRequest>) -> Received {
    let mut out = Received::default();
    let mut stream = client.receive_message(request).await.expect("the RPC itself is OK").into_inner();
    while let Some(frame) = stream.next().await {
        match frame.expect("a frame").content {
            Some(Content::Status(status)) => {
                assert!(out.status.is_none() && out.messages.is_empty(), "the status comes first, and once");
                out.status = Some(status);
            }
            Some(Content::Message(message)) => out.messages.push(message),
            Some(Content::DeliveryTimestamp(_)) => out.delivery_timestamp = true,
            None => panic!("an empty frame"),
        }
    }
    out
}
