//! A proxy's life: `build` makes it, `run` serves on a bound port until told to stop, then drains.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use apis::admin::ferry_admin_server::FerryAdminServer;
use apis::brokers::{Brokers, NameServers};
use apis::status::Error;
use apis::v2::messaging_service_server::{self, MessagingServiceServer};
use model::{Clock, limits};
use runtime::net;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::service::Routes as Router;

use crate::admin::Admin;
use crate::routes::{OnView, Routes};
use crate::service::{Front, Messaging, ask_producers};
use crate::session::Sessions;

/// Calls in progress get this long when the proxy stops.
const DRAIN: Duration = Duration::from_secs(5);
const FORGET: Duration = Duration::from_secs(30);

#[derive(Clone)]
pub struct ProxyConfig {
    /// Topics and groups come into being when they are first named.
    pub auto_create: bool,
    /// How far ahead messages may be scheduled, ms.
    pub delay_max_ms: i64,
    /// TLS on the same port as plaintext.
    pub tls: Option<Arc<runtime::tls::ServerConfig>>,
}

pub struct Proxy<B, N>(Arc<Front<B, N>>, ProxyConfig);

impl<B: Brokers, N: NameServers> Proxy<B, N> {
    pub fn build(
        config: ProxyConfig,
        brokers: B,
        name_servers: N,
        on_view: OnView,
        clock: impl Clock,
    ) -> Self {
        let front = Front {
            routes: Routes::new(brokers.clone(), name_servers, on_view),
            brokers,
            sessions: Sessions::default(),
            clock: Arc::new(clock),
            auto_create: config.auto_create,
            delay_max_ms: config.delay_max_ms,
            draining: CancellationToken::new(),
            turn: AtomicUsize::new(0),
        };
        Self(Arc::new(front), config)
    }

    /// The calls themselves, without a port: for tests and simulations.
    pub fn messaging(&self) -> Messaging<B, N> {
        Messaging(self.0.clone())
    }

    pub async fn refresh(&self) -> Result<(), Error> {
        self.0.routes.refresh().await.map(drop)
    }

    pub async fn run(self, listener: TcpListener, stop: CancellationToken) {
        let Proxy(front, config) = self;
        let background = tokio::spawn(housekeeping(front.clone(), stop.clone()));
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<MessagingServiceServer<Messaging<B, N>>>().await;
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(apis::DESCRIPTORS)
        };
        let messaging = MessagingServiceServer::new(Messaging(front.clone()))
            .max_decoding_message_size(limits::FRAME_MAX_BYTES)
            .max_encoding_message_size(limits::FRAME_MAX_BYTES);
        let admin =
            FerryAdminServer::new(Admin(front.clone())).max_encoding_message_size(limits::FRAME_MAX_BYTES);
        let mut others = Router::new(admin).add_service(health_service);
        if let Ok(service) = reflection().build_v1() {
            others = others.add_service(service);
        }
        if let Ok(service) = reflection().build_v1alpha() {
            others = others.add_service(service);
        }
        let draining = front.draining.clone();
        let stopping = stop.clone();
        tokio::spawn(async move {
            stopping.cancelled().await;
            // Long polls and telemetry streams end now; they would otherwise never.
            draining.cancel();
        });
        let services = Services { hot: Messaging(front), messaging, others };
        net::serve(listener, config.tls, services, stop, DRAIN).await;
        let _ = background.await;
    }
}

/// Messages go straight to their service; what is rare takes the general way.
#[derive(Clone)]
struct Services<B, N> {
    hot: Messaging<B, N>,
    messaging: MessagingServiceServer<Messaging<B, N>>,
    others: Router,
}

impl<B: Brokers, N: NameServers> net::Service for Services<B, N> {
    async fn call(&self, request: http::Request<net::Counted>) -> http::Response<Body> {
        let service = request.uri().path().split('/').nth(1);
        if service != Some(messaging_service_server::SERVICE_NAME) {
            return self.others.call(request).await;
        }
        let request = match self.hot.answer(request).await {
            Ok(response) => return response,
            Err(request) => request,
        };
        match tower_service::Service::call(&mut self.messaging.clone(), request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }
}

async fn housekeeping<B: Brokers, N: NameServers>(front: Arc<Front<B, N>>, stop: CancellationToken) {
    let forget = async {
        loop {
            tokio::time::sleep(FORGET).await;
            front.sessions.expire();
        }
    };
    tokio::select! {
        () = front.routes.run(stop.clone()) => {}
        () = forget => {}
        () = ask_producers(front.clone(), stop.clone()) => {}
    }
}
