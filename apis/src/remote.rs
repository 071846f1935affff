//! The calls of [`Brokers`] and [`NameServers`] over gRPC. Generic over the channel: whoever uses this dials.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use bytes::Bytes;
use http_body::Body;
use model::limits;
use tonic::client::GrpcService;

use crate::brokers::{Brokers, NameServers, Reply};
use crate::context::CallContext;
use crate::internal::broker_service_client::BrokerServiceClient;
use crate::internal::name_service_client::NameServiceClient;
use crate::internal::*;
use crate::status::Error;
use crate::v2::Code;

/// Makes a channel to `host:port`; does not wait for the connection.
pub type Dial<T> = Arc<dyn Fn(&str) -> Result<T, Error> + Send + Sync>;

/// Brokers elsewhere; their addresses come with the routes.
#[derive(Clone)]
pub struct RemoteBrokers<T> {
    dial: Dial<T>,
    channels: Arc<RwLock<HashMap<String, (String, T)>>>,
}

impl<T: Clone> RemoteBrokers<T> {
    pub fn new(dial: Dial<T>) -> Self {
        Self { dial, channels: Arc::default() }
    }

    /// Sets where the brokers are; those not named are forgotten.
    pub fn set_addresses<'a>(
        &self,
        addresses: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<(), Error> {
        let mut channels = self.channels.write().unwrap_or_else(|e| e.into_inner());
        let mut next = HashMap::new();
        for (name, address) in addresses {
            let entry = match channels.remove(name) {
                Some((old, channel)) if old == address => (old, channel),
                _ => (address.to_owned(), (self.dial)(address)?),
            };
            next.insert(name.to_owned(), entry);
        }
        *channels = next;
        Ok(())
    }

    fn client(&self, broker: &str) -> Result<BrokerServiceClient<T>, Error>
    where
        T: GrpcService<tonic::body::Body>,
        T::ResponseBody: Body<Data = Bytes> + Send + 'static,
        <T::ResponseBody as Body>::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    {
        let channels = self.channels.read().unwrap_or_else(|e| e.into_inner());
        let (_, channel) = channels
            .get(broker)
            .ok_or_else(|| Error::new(Code::NotFound, format!("there is no broker {broker:?}")))?;
        Ok(BrokerServiceClient::new(channel.clone())
            .max_decoding_message_size(limits::FRAME_MAX_BYTES)
            .max_encoding_message_size(limits::FRAME_MAX_BYTES))
    }
}

/// A remote call ends at the deadline even if the other side has gone silent.
async fn within<T>(
    context: &CallContext,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Reply<T> {
    let limit = context.deadline.unwrap_or(Duration::from_secs(30));
    let late = |_| Error::new(Code::ProxyTimeout, format!("the broker did not answer within {limit:?}"));
    Ok(tokio::time::timeout(limit, call).await.map_err(late)??.into_inner())
}

macro_rules! remote {
    ($($name:ident($request:ty) -> $reply:ty),* $(,)?) => {
        impl<T> Brokers for RemoteBrokers<T>
        where
            T: GrpcService<tonic::body::Body> + Clone + Send + Sync + 'static,
            T::Future: Send,
            T::ResponseBody: Body<Data = Bytes> + Send + 'static,
            <T::ResponseBody as Body>::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
        {
            $(async fn $name(&self, broker: &str, context: &CallContext, request: $request) -> Reply<$reply> {
                let mut client = self.client(broker)?;
                within(context, client.$name(context.request(request))).await
            })*
        }
    };
}

crate::broker_calls!(remote);

/// Name servers elsewhere: all are told, the first that answers is believed.
#[derive(Clone)]
pub struct RemoteNameServers<T>(Arc<Vec<NameServiceClient<T>>>);

impl<T> RemoteNameServers<T>
where
    T: GrpcService<tonic::body::Body> + Clone + Send + Sync + 'static,
    T::Future: Send,
    T::ResponseBody: Body<Data = Bytes> + Send + 'static,
    <T::ResponseBody as Body>::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    pub fn new(addresses: &[String], dial: &Dial<T>) -> Result<Self, Error> {
        let client = |address: &String| {
            let client = NameServiceClient::new(dial(address)?);
            Ok(client
                .max_decoding_message_size(limits::FRAME_MAX_BYTES)
                .max_encoding_message_size(limits::FRAME_MAX_BYTES))
        };
        Ok(Self(Arc::new(addresses.iter().map(client).collect::<Result<_, Error>>()?)))
    }

    async fn first<R, F>(&self, call: impl Fn(NameServiceClient<T>) -> F) -> Reply<R>
    where
        F: Future<Output = Result<tonic::Response<R>, tonic::Status>>,
    {
        let mut last = Error::new(Code::HaNotAvailable, "no name server is configured");
        for client in self.0.iter() {
            match within(&CallContext::internal(), call(client.clone())).await {
                Ok(reply) => return Ok(reply),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

impl<T> NameServers for RemoteNameServers<T>
where
    T: GrpcService<tonic::body::Body> + Clone + Send + Sync + 'static,
    T::Future: Send,
    T::ResponseBody: Body<Data = Bytes> + Send + 'static,
    <T::ResponseBody as Body>::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    async fn register(&self, request: RegisterRequest) -> Reply<RegisterReply> {
        let mut reply = Err(Error::new(Code::HaNotAvailable, "no name server is configured"));
        let mut send_all = false;
        for client in self.0.iter() {
            let mut client = client.clone();
            let context = CallContext::internal();
            match within(&context, client.register(context.request(request.clone()))).await {
                Ok(r) => {
                    send_all |= r.send_all;
                    reply = Ok(());
                }
                // The others still know; this one is told everything when it is back.
                Err(error) if reply.is_err() => reply = Err(error),
                Err(_) => send_all = true,
            }
        }
        reply.map(|()| RegisterReply { send_all })
    }

    async fn route(&self, request: RouteRequest) -> Reply<RouteReply> {
        self.first(|mut client| {
            let request = CallContext::internal().request(request.clone());
            async move { client.route(request).await }
        })
        .await
    }

    async fn cluster(&self, request: ClusterRequest) -> Reply<ClusterReply> {
        self.first(|mut client| {
            let request = CallContext::internal().request(request);
            async move { client.cluster(request).await }
        })
        .await
    }
}
