//! `apache.rocketmq.v2.MessagingService`. Errors travel in the body's Status; the gRPC status is OK.

mod ack;
mod clients;
mod held;
mod receive;
mod route;
mod send;

use std::pin::Pin;
use std::sync::Arc;

use apis::brokers::{Brokers, NameServers};
use apis::context::CallContext;
use apis::internal::PutMetadataRequest;
use apis::status::Error;
use apis::unary;
use apis::v2::messaging_service_server::MessagingService;
use apis::v2::*;
use model::limits::FRAME_MAX_BYTES;
use model::{Clock, Group, GroupConfig, Topic, TopicConfig};
use runtime::net::Counted;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::{Request, Response, Status as GrpcStatus, Streaming};

pub(crate) use self::held::ask_producers;
use crate::call::Call;
use crate::routes::{Routes, View};
use crate::session::Sessions;

/// What all calls share.
pub struct Front<B, N> {
    pub brokers: B,
    pub routes: Routes<B, N>,
    pub sessions: Sessions,
    pub clock: Arc<dyn Clock>,
    /// Topics and groups come into being when they are first named.
    pub auto_create: bool,
    /// How far ahead messages may be scheduled.
    pub delay_max_ms: i64,
    pub draining: CancellationToken,
    pub(crate) turn: std::sync::atomic::AtomicUsize,
}

impl<B: Brokers, N: NameServers> Front<B, N> {
    /// A view that has the topic.
    pub async fn view_with_topic(&self, topic: &Topic, context: &CallContext) -> Result<Arc<View>, Error> {
        let view = self.routes.view();
        if view.topic(topic).is_some() {
            return Ok(view);
        }
        let view = self.routes.refresh().await.unwrap_or(view);
        if view.topic(topic).is_some() {
            return Ok(view);
        }
        if !self.auto_create || topic.is_retry() || topic.is_dead_letter() {
            return Err(Error::topic_not_found(topic));
        }
        let version = view.topic_record(topic).map_or(0, |t| t.version) + 1;
        let config = TopicConfig { version, ..TopicConfig::mixed(topic.clone()) };
        let request = PutMetadataRequest {
            topics: vec![apis::convert::metadata::topic_to_wire(&config)],
            ..PutMetadataRequest::default()
        };
        tracing::info!(%topic, "the topic comes into being");
        self.routes.put(context, request).await?;
        Ok(self.routes.view())
    }

    pub async fn group(&self, group: &Group, context: &CallContext) -> Result<GroupConfig, Error> {
        if let Some(config) = self.routes.view().group(group) {
            return Ok(config.clone());
        }
        if let Some(config) = self.routes.refresh().await.ok().and_then(|v| v.group(group).cloned()) {
            return Ok(config);
        }
        if !self.auto_create {
            return Err(Error::group_not_found(group));
        }
        let version = self.routes.view().group_record(group).map_or(0, |g| g.version) + 1;
        let config = GroupConfig { version, ..GroupConfig::concurrent(group.clone()) };
        let request = PutMetadataRequest {
            groups: vec![apis::convert::metadata::group_to_wire(&config)],
            ..PutMetadataRequest::default()
        };
        tracing::info!(%group, "the consumer group comes into being");
        self.routes.put(context, request).await?;
        Ok(config)
    }
}

/// The service; cheap to clone.
pub struct Messaging<B, N>(pub Arc<Front<B, N>>);

impl<B, N> Clone for Messaging<B, N> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

type Frames<T> = Pin<Box<dyn Stream<Item = Result<T, GrpcStatus>> + Send>>;

fn not_yet(what: &str) -> Option<Status> {
    let what = format!("{what} is not part of this version of FerryMQ");
    Some(Error::new(Code::NotImplemented, what).status())
}

/// Runs a family's function and puts its error into the answer's status.
macro_rules! answer {
    ($request:ident, $reply:ident, $run:expr) => {{
        let result = match Call::of(&$request) {
            Ok(call) => $run(call, $request.into_inner()).await,
            Err(error) => Err(error),
        };
        let reply =
            result.unwrap_or_else(|e: Error| $reply { status: Some(e.status()), ..Default::default() });
        Ok(Response::new(reply))
    }};
}

impl<B: Brokers, N: NameServers> Messaging<B, N> {
    /// Answers the calls that come most often by the short way, if this is one of them.
    pub async fn answer(
        &self,
        request: http::Request<Counted>,
    ) -> Result<http::Response<Body>, http::Request<Counted>> {
        if unary::is_compressed(&request) {
            return Err(request);
        }
        let front = self.0.clone();
        let max = FRAME_MAX_BYTES;
        match request.uri().path().rsplit('/').next() {
            Some("SendMessage") => Ok(unary::serve(request, max, async move |r| {
                answer!(r, SendMessageResponse, |call, r| front.send(call, r))
            })
            .await),
            Some("AckMessage") => Ok(unary::serve(request, max, async move |r| {
                answer!(r, AckMessageResponse, |call, r| front.ack(call, r))
            })
            .await),
            Some("ReceiveMessage") => Ok(match unary::take(request, max).await {
                Ok(r) => unary::respond(front.receive(Call::of(&r), r.into_inner()).await),
                Err(status) => status.into_http(),
            }),
            _ => Err(request),
        }
    }
}

#[tonic::async_trait]
#[allow(clippy::needless_update, reason = "some answers are nothing but their status")]
impl<B: Brokers, N: NameServers> MessagingService for Messaging<B, N> {
    async fn query_route(
        &self,
        request: Request<QueryRouteRequest>,
    ) -> Result<Response<QueryRouteResponse>, GrpcStatus> {
        answer!(request, QueryRouteResponse, |call, r| self.0.query_route(call, r))
    }

    async fn query_assignment(
        &self,
        request: Request<QueryAssignmentRequest>,
    ) -> Result<Response<QueryAssignmentResponse>, GrpcStatus> {
        answer!(request, QueryAssignmentResponse, |call, r| self.0.query_assignment(call, r))
    }

    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatResponse>, GrpcStatus> {
        answer!(request, HeartbeatResponse, |call, r| self.0.clone().heartbeat(call, r))
    }

    async fn notify_client_termination(
        &self,
        request: Request<NotifyClientTerminationRequest>,
    ) -> Result<Response<NotifyClientTerminationResponse>, GrpcStatus> {
        answer!(request, NotifyClientTerminationResponse, |call, r| self.0.clone().terminate(call, r))
    }

    type TelemetryStream = Frames<TelemetryCommand>;

    async fn telemetry(
        &self,
        request: Request<Streaming<TelemetryCommand>>,
    ) -> Result<Response<Self::TelemetryStream>, GrpcStatus> {
        let call = Call::of(&request);
        Ok(Response::new(self.0.clone().telemetry(call, request.into_inner())))
    }

    async fn send_message(
        &self,
        request: Request<SendMessageRequest>,
    ) -> Result<Response<SendMessageResponse>, GrpcStatus> {
        answer!(request, SendMessageResponse, |call, r| self.0.send(call, r))
    }

    type ReceiveMessageStream = Frames<ReceiveMessageResponse>;

    async fn receive_message(
        &self,
        request: Request<ReceiveMessageRequest>,
    ) -> Result<Response<Self::ReceiveMessageStream>, GrpcStatus> {
        let call = Call::of(&request);
        Ok(Response::new(Box::pin(self.0.clone().receive(call, request.into_inner()).await)))
    }

    async fn ack_message(
        &self,
        request: Request<AckMessageRequest>,
    ) -> Result<Response<AckMessageResponse>, GrpcStatus> {
        answer!(request, AckMessageResponse, |call, r| self.0.ack(call, r))
    }

    async fn change_invisible_duration(
        &self,
        request: Request<ChangeInvisibleDurationRequest>,
    ) -> Result<Response<ChangeInvisibleDurationResponse>, GrpcStatus> {
        answer!(request, ChangeInvisibleDurationResponse, |call, r| self.0.change_invisible(call, r))
    }

    async fn forward_message_to_dead_letter_queue(
        &self,
        request: Request<ForwardMessageToDeadLetterQueueRequest>,
    ) -> Result<Response<ForwardMessageToDeadLetterQueueResponse>, GrpcStatus> {
        answer!(request, ForwardMessageToDeadLetterQueueResponse, |call, r| self.0.dead_letter(call, r))
    }

    type PullMessageStream = Frames<PullMessageResponse>;

    async fn pull_message(
        &self,
        _: Request<PullMessageRequest>,
    ) -> Result<Response<Self::PullMessageStream>, GrpcStatus> {
        let content = not_yet("PullMessage").map(pull_message_response::Content::Status);
        let frame = PullMessageResponse { content };
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(frame)))))
    }

    async fn update_offset(
        &self,
        _: Request<UpdateOffsetRequest>,
    ) -> Result<Response<UpdateOffsetResponse>, GrpcStatus> {
        Ok(Response::new(UpdateOffsetResponse { status: not_yet("UpdateOffset") }))
    }

    async fn get_offset(
        &self,
        _: Request<GetOffsetRequest>,
    ) -> Result<Response<GetOffsetResponse>, GrpcStatus> {
        Ok(Response::new(GetOffsetResponse { status: not_yet("GetOffset"), ..Default::default() }))
    }

    async fn query_offset(
        &self,
        _: Request<QueryOffsetRequest>,
    ) -> Result<Response<QueryOffsetResponse>, GrpcStatus> {
        Ok(Response::new(QueryOffsetResponse { status: not_yet("QueryOffset"), ..Default::default() }))
    }

    async fn end_transaction(
        &self,
        request: Request<EndTransactionRequest>,
    ) -> Result<Response<EndTransactionResponse>, GrpcStatus> {
        answer!(request, EndTransactionResponse, |call, r| self.0.end_transaction(call, r))
    }

    async fn recall_message(
        &self,
        request: Request<RecallMessageRequest>,
    ) -> Result<Response<RecallMessageResponse>, GrpcStatus> {
        answer!(request, RecallMessageResponse, |call, r| self.0.recall(call, r))
    }

    async fn sync_lite_subscription(
        &self,
        _: Request<SyncLiteSubscriptionRequest>,
    ) -> Result<Response<SyncLiteSubscriptionResponse>, GrpcStatus> {
        Ok(Response::new(SyncLiteSubscriptionResponse { status: not_yet("SyncLiteSubscription") }))
    }
}
