//! The internal gRPC service of a broker: each call has its context, and goes to the handle.

use apis::context::CallContext;
use apis::internal::broker_service_server::BrokerService;
use apis::internal::*;
use tonic::{Request, Response, Status};

use crate::Broker;

macro_rules! serve {
    ($($name:ident($request:ty) -> $reply:ty),* $(,)?) => {
        #[tonic::async_trait]
        impl BrokerService for Broker {
            async fn pop(&self, request: Request<PopRequest>) -> Result<Response<PopReply>, Status> {
                let context = CallContext::of(request.metadata())?;
                Ok(Response::new(Broker::pop(self, &context, request.into_inner()).await?))
            }
            $(async fn $name(&self, request: Request<$request>) -> Result<Response<$reply>, Status> {
                CallContext::of(request.metadata())?;
                Ok(Response::new(Broker::$name(self, request.into_inner()).await?))
            })*
        }
    };
}

serve! {
    append(AppendRequest) -> AppendReply,
    ack(AckRequest) -> AckReply,
    change_invisible(ChangeInvisibleRequest) -> ChangeInvisibleReply,
    dead_letter(DeadLetterRequest) -> DeadLetterReply,
    liveness(LivenessRequest) -> LivenessReply,
    read(ReadRequest) -> ReadReply,
    metadata(MetadataRequest) -> MetadataReply,
    put_metadata(PutMetadataRequest) -> PutMetadataReply,
    group_lag(GroupLagRequest) -> GroupLagReply,
}
