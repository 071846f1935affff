//! The internal gRPC service of a broker: each call has its context, and goes to the handle.

use apis::context::CallContext;
use apis::internal::broker_service_server::{BrokerService, BrokerServiceServer, SERVICE_NAME};
use apis::internal::*;
use apis::unary;
use model::limits::FRAME_MAX_BYTES;
use runtime::net;
use tonic::body::Body;
use tonic::service::Routes;
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

/// What a broker serves. The calls that come most often take the short way.
#[derive(Clone)]
pub struct Services {
    broker: Broker,
    others: Routes,
}

impl Services {
    pub fn new(broker: Broker) -> Self {
        let service = BrokerServiceServer::new(broker.clone())
            .max_decoding_message_size(FRAME_MAX_BYTES)
            .max_encoding_message_size(FRAME_MAX_BYTES);
        Self { broker, others: Routes::new(service) }
    }
}

impl net::Service for Services {
    async fn call(&self, request: http::Request<net::Counted>) -> http::Response<Body> {
        let (broker, max) = (&self.broker, FRAME_MAX_BYTES);
        let mut path = request.uri().path().rsplit('/');
        let method = path.next().filter(|_| path.next() == Some(SERVICE_NAME));
        match method.filter(|_| !unary::is_compressed(&request)) {
            Some("Append") => unary::serve(request, max, |r| BrokerService::append(broker, r)).await,
            Some("Pop") => unary::serve(request, max, |r| BrokerService::pop(broker, r)).await,
            Some("Ack") => unary::serve(request, max, |r| BrokerService::ack(broker, r)).await,
            _ => net::Service::call(&self.others, request).await,
        }
    }
}
