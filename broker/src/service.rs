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
            $(async fn $name(&self, request: Request<$request>) -> Result<Response<$reply>, Status> {
                let context = CallContext::of(request.metadata())?;
                Ok(Response::new(Broker::$name(self, &context, request.into_inner()).await?))
            })*
        }
    };
}

apis::broker_calls!(serve);
