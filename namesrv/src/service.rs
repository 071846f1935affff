//! The internal gRPC service of a name server.

use apis::brokers::NameServers;
use apis::context::CallContext;
use apis::internal::name_service_server::NameService;
use apis::internal::*;
use tonic::{Request, Response, Status};

use crate::LocalNameServer;

#[tonic::async_trait]
impl NameService for LocalNameServer {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<RegisterReply>, Status> {
        CallContext::of(request.metadata())?;
        Ok(Response::new(NameServers::register(self, request.into_inner()).await?))
    }

    async fn route(&self, request: Request<RouteRequest>) -> Result<Response<RouteReply>, Status> {
        CallContext::of(request.metadata())?;
        Ok(Response::new(NameServers::route(self, request.into_inner()).await?))
    }

    async fn cluster(&self, request: Request<ClusterRequest>) -> Result<Response<ClusterReply>, Status> {
        CallContext::of(request.metadata())?;
        Ok(Response::new(NameServers::cluster(self, request.into_inner()).await?))
    }
}
