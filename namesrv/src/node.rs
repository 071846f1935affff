//! A name server's life on its own port.

use apis::internal::name_service_server::NameServiceServer;
use model::limits;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;

use crate::LocalNameServer;

/// Serves until told to stop.
pub async fn run(
    name_server: LocalNameServer,
    listener: TcpListener,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let service = NameServiceServer::new(name_server)
        .max_decoding_message_size(limits::FRAME_MAX_BYTES)
        .max_encoding_message_size(limits::FRAME_MAX_BYTES);
    tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .add_service(service)
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.cancelled())
        .await
}
