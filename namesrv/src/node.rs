//! A name server's life on its own port.

use std::time::Duration;

use apis::internal::name_service_server::NameServiceServer;
use model::limits;
use runtime::net;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::LocalNameServer;

/// Calls in progress get this long at a stop.
const DRAIN: Duration = Duration::from_secs(5);

/// Serves until told to stop.
pub async fn run(name_server: LocalNameServer, listener: TcpListener, stop: CancellationToken) {
    let service = NameServiceServer::new(name_server)
        .max_decoding_message_size(limits::FRAME_MAX_BYTES)
        .max_encoding_message_size(limits::FRAME_MAX_BYTES);
    net::serve(listener, None, Routes::new(service), stop, DRAIN).await;
}
