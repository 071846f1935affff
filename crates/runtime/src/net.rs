//! Sockets. Listeners are bound before anything runs, so that a port in use is an error at the start, and tests
//! bind port 0. One port takes TLS and plaintext, told apart by the first byte.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tonic::transport::{Channel, Endpoint};

#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("port {} on {} is in use; stop the other process, or choose another port", address.port(), address.ip())]
    InUse { address: SocketAddr },
    #[error("{address} cannot be listened on: {source}")]
    Bind { address: SocketAddr, source: io::Error },
    #[error("{address:?} is not an address of the form host:port")]
    Address { address: String },
}

pub async fn bind(address: SocketAddr) -> Result<TcpListener, NetError> {
    TcpListener::bind(address).await.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => NetError::InUse { address },
        _ => NetError::Bind { address, source },
    })
}

/// A channel to `host:port` that connects when it is first used, and again after a break.
pub fn dial(address: &str) -> Result<Channel, NetError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| NetError::Address { address: address.into() })?;
    Ok(endpoint
        .tcp_nodelay(true)
        .connect_timeout(Duration::from_secs(3))
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .connect_lazy())
}

/// First byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;
/// A connection must say something within this time.
const FIRST_BYTE: Duration = Duration::from_secs(10);

pub enum Connection {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Accepts connections; handshakes run beside each other, so that a slow one holds up nobody.
pub fn accept(
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
) -> ReceiverStream<io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(64);
    tokio::spawn(async move {
        loop {
            let stream = tokio::select! {
                accepted = listener.accept() => accepted,
                () = ready.closed() => return,
            };
            match stream {
                Ok((stream, _)) => drop(tokio::spawn(greet(stream, tls.clone(), ready.clone()))),
                // Out of file descriptors, or the peer is gone already: the next one may work.
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    });
    ReceiverStream::new(connections)
}

async fn greet(
    stream: TcpStream,
    tls: Option<Arc<ServerConfig>>,
    ready: mpsc::Sender<io::Result<Connection>>,
) {
    let _ = stream.set_nodelay(true);
    let connection = tokio::time::timeout(FIRST_BYTE, async {
        let mut first = [0];
        if stream.peek(&mut first).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        match tls.filter(|_| first[0] == TLS_HANDSHAKE) {
            Some(config) => {
                let stream = TlsAcceptor::from(config).accept(stream).await?;
                Ok(Connection::Tls(Box::new(stream)))
            }
            None => Ok(Connection::Plain(stream)),
        }
    });
    match connection.await {
        Ok(Ok(connection)) => drop(ready.send(Ok(connection)).await),
        Ok(Err(error)) => tracing::debug!(%error, "a connection ended before it was one"),
        Err(_) => tracing::debug!("a connection said nothing for ten seconds"),
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        match self {
            Connection::Plain(stream) => stream.connect_info(),
            Connection::Tls(stream) => stream.get_ref().0.connect_info(),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Connection::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Connection::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Connection::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Connection::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Connection::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Connection::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Connection::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Connection::Plain(stream) => stream.is_write_vectored(),
            Connection::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
