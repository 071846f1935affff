//! `ferry bench ceiling`: a server that only answers. What it costs is what the protocol costs with tonic as it
//! comes; the rest of a broker's cost is the broker's.

use std::net::SocketAddr;
use std::pin::Pin;

use apis::convert::receive::timestamp;
use apis::status::ok;
use apis::v2::messaging_service_server::{MessagingService, MessagingServiceServer};
use apis::v2::receive_message_response::Content;
use apis::v2::*;
use bytes::Bytes;
use clap::Args;
use model::limits;
use tokio_stream::Stream;
use tonic::{Request, Response, Status as GrpcStatus, Streaming};

use super::messages::message_id;

#[derive(Args, Clone)]
pub struct CeilingArgs {
    #[arg(long, default_value_t = 8081)]
    pub port: u16,
    /// Body of the messages it hands out, bytes
    #[arg(long, default_value_t = 1024)]
    pub size: usize,
}

#[derive(Clone)]
struct Ceiling(Bytes);

type Frames<T> = Pin<Box<dyn Stream<Item = Result<T, GrpcStatus>> + Send>>;

fn unused<T>() -> Result<Response<T>, GrpcStatus> {
    Err(GrpcStatus::unimplemented("the ceiling sends, receives and acknowledges; nothing else"))
}

/// The service out of what it does and what it does not. The attribute must see all of it.
macro_rules! service {
    ({ $($used:tt)* } $($name:ident($request:ty) -> $reply:ty),* $(,)?) => {
        #[tonic::async_trait]
        impl MessagingService for Ceiling {
            $($used)*
            $(async fn $name(&self, _: Request<$request>) -> Result<Response<$reply>, GrpcStatus> {
                unused()
            })*
        }
    };
}

service! {
    {
    async fn query_route(
        &self,
        r: Request<QueryRouteRequest>,
    ) -> Result<Response<QueryRouteResponse>, GrpcStatus> {
        let r = r.into_inner();
        let broker = Broker { name: "ceiling".into(), id: 0, endpoints: r.endpoints };
        let queue = |id| MessageQueue {
            topic: r.topic.clone(),
            id,
            broker: Some(broker.clone()),
            ..Default::default()
        };
        Ok(Response::new(QueryRouteResponse {
            status: Some(ok()),
            message_queues: (0..8).map(queue).collect(),
        }))
    }

    async fn send_message(
        &self,
        r: Request<SendMessageRequest>,
    ) -> Result<Response<SendMessageResponse>, GrpcStatus> {
        let entry = |m: Message| SendResultEntry {
            status: Some(ok()),
            message_id: m.system_properties.map(|s| s.message_id).unwrap_or_default(),
            ..Default::default()
        };
        let entries = r.into_inner().messages.into_iter().map(entry).collect();
        Ok(Response::new(SendMessageResponse { status: Some(ok()), entries }))
    }

    type ReceiveMessageStream = Frames<ReceiveMessageResponse>;

    async fn receive_message(
        &self,
        r: Request<ReceiveMessageRequest>,
    ) -> Result<Response<Self::ReceiveMessageStream>, GrpcStatus> {
        let r = r.into_inner();
        let message = |i: i32| Message {
            topic: r.message_queue.as_ref().and_then(|q| q.topic.clone()),
            user_properties: [("sent".to_owned(), "1".to_owned())].into(),
            system_properties: Some(SystemProperties {
                tag: Some("tag".into()),
                keys: vec!["key".into()],
                message_id: message_id(i as u64),
                receipt_handle: Some("x".repeat(120)),
                born_timestamp: Some(timestamp(1)),
                store_timestamp: Some(timestamp(1)),
                born_host: "localhost".into(),
                store_host: "127.0.0.1:8081".into(),
                ..Default::default()
            }),
            body: self.0.clone(),
        };
        let messages = (0..r.batch_size).map(|i| Content::Message(message(i)));
        let contents = std::iter::once(Content::Status(ok())).chain(messages);
        let frames = contents.chain([Content::DeliveryTimestamp(timestamp(1))]);
        let frames: Vec<_> = frames.map(|c| Ok(ReceiveMessageResponse { content: Some(c) })).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(frames))))
    }

    async fn ack_message(
        &self,
        r: Request<AckMessageRequest>,
    ) -> Result<Response<AckMessageResponse>, GrpcStatus> {
        let entry = |e: AckMessageEntry| AckMessageResultEntry {
            message_id: e.message_id,
            receipt_handle: e.receipt_handle,
            status: Some(ok()),
        };
        let entries = r.into_inner().entries.into_iter().map(entry).collect();
        Ok(Response::new(AckMessageResponse { status: Some(ok()), entries }))
    }

    type TelemetryStream = Frames<TelemetryCommand>;

    /// Says every command back.
    async fn telemetry(
        &self,
        r: Request<Streaming<TelemetryCommand>>,
    ) -> Result<Response<Self::TelemetryStream>, GrpcStatus> {
        Ok(Response::new(Box::pin(r.into_inner())))
    }

    type PullMessageStream = Frames<PullMessageResponse>;

    }
        query_assignment(QueryAssignmentRequest) -> QueryAssignmentResponse,
        heartbeat(HeartbeatRequest) -> HeartbeatResponse,
        notify_client_termination(NotifyClientTerminationRequest) -> NotifyClientTerminationResponse,
        change_invisible_duration(ChangeInvisibleDurationRequest) -> ChangeInvisibleDurationResponse,
        forward_message_to_dead_letter_queue(ForwardMessageToDeadLetterQueueRequest) -> ForwardMessageToDeadLetterQueueResponse,
        pull_message(PullMessageRequest) -> Self::PullMessageStream,
        update_offset(UpdateOffsetRequest) -> UpdateOffsetResponse,
        get_offset(GetOffsetRequest) -> GetOffsetResponse,
        query_offset(QueryOffsetRequest) -> QueryOffsetResponse,
        end_transaction(EndTransactionRequest) -> EndTransactionResponse,
        recall_message(RecallMessageRequest) -> RecallMessageResponse,
        sync_lite_subscription(SyncLiteSubscriptionRequest) -> SyncLiteSubscriptionResponse,
}

pub async fn run(args: CeilingArgs) -> anyhow::Result<()> {
    let service = MessagingServiceServer::new(Ceiling(vec![b'x'; args.size].into()))
        .max_decoding_message_size(limits::FRAME_MAX_BYTES)
        .max_encoding_message_size(limits::FRAME_MAX_BYTES);
    println!("the ceiling answers on port {}", args.port);
    tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .add_service(service)
        .serve(SocketAddr::from(([127, 0, 0, 1], args.port)))
        .await?;
    Ok(())
}
