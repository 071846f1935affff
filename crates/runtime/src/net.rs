//! Sockets. Listeners are bound before anything runs, so that a port in use is an error at the start, and tests
//! bind port 0. One port takes TLS and plaintext, told apart by the first byte.

use std::cell::Cell;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicIsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::server::TcpConnectInfo;
use tonic::transport::{Channel, Endpoint};

pub use crate::bodies::Counted;

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
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .connect_lazy())
}

/// HTTP/2 windows, bytes.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// First byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;
/// A connection must say something within this time.
const FIRST_BYTE: Duration = Duration::from_secs(10);

/// Calls of one connection at a time.
const STREAMS_MAX: u32 = 10_000;
/// Connections of one port; more wait to be accepted.
const CONNECTIONS_MAX: usize = 20_000;

/// Written bytes that are gathered before the socket sees them.
const GATHER_MAX: usize = 16 * 1024;

trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

thread_local! {
    /// The buffer of the connection that wrote last: thousands that are idle need none.
    static SPARE: Cell<Option<BytesMut>> = const { Cell::new(None) };
}

/// An accepted connection. Small writes are gathered: a flush lets the other tasks that are ready run once, so that
/// their answers go out in the same system call.
struct Connection {
    io: Io,
    out: BytesMut,
    /// The flush in progress has given the others their turn.
    yielded: bool,
    peer: TcpConnectInfo,
}

/// Calls that are being answered in this process. Those that wait for a message to come do not count.
static BUSY: AtomicIsize = AtomicIsize::new(0);

/// Held while a call is being answered.
pub struct Busy(());

impl Busy {
    pub fn begin() -> Self {
        BUSY.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        BUSY.fetch_sub(1, Ordering::Relaxed);
    }
}

/// True if no other call is being answered: nothing is gained by waiting for company.
pub fn is_alone() -> bool {
    BUSY.load(Ordering::Relaxed) <= 1
}

/// Held by a call while it waits for a message to come.
pub struct Parked(());

impl Parked {
    pub fn begin() -> Self {
        BUSY.fetch_sub(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        BUSY.fetch_add(1, Ordering::Relaxed);
    }
}

/// What a server answers calls with: gRPC services, told apart by the path.
pub trait Service: Clone + Send + 'static {
    fn call(&self, request: Request<Counted>) -> impl Future<Output = Response<Body>> + Send;
}

impl Service for Routes {
    async fn call(&self, request: Request<Counted>) -> Response<Body> {
        match tower_service::Service::call(&mut self.clone(), request.map(Body::new)).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }
}

/// Serves until told to stop; then connections are asked to end, and have `drain` to do so. Handshakes run beside
/// each other, so that a slow one holds up nobody.
pub async fn serve<S: Service>(
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    service: S,
    stop: CancellationToken,
    drain: Duration,
) {
    let connections = TaskTracker::new();
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = async {
            let place = room.clone().acquire_owned().await.map_err(io::Error::other)?;
            listener.accept().await.map(|(stream, _)| (stream, place))
        };
        let stream = tokio::select! {
            accepted = accepted => accepted,
            () = stop.cancelled() => break,
        };
        match stream {
            Ok((stream, place)) => {
                let (tls, service, stop) = (tls.clone(), service.clone(), stop.clone());
                connections.spawn(async move {
                    if let Some(connection) = greet(stream, tls).await {
                        talk(connection, service, stop).await;
                    }
                    drop(place);
                });
            }
            // Out of file descriptors, or the peer is gone already: the next one may work.
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    drop(listener);
    connections.close();
    let _ = tokio::time::timeout(drain, connections.wait()).await;
}

async fn greet(stream: TcpStream, tls: Option<Arc<ServerConfig>>) -> Option<Connection> {
    let _ = stream.set_nodelay(true);
    let peer = TcpConnectInfo { local_addr: stream.local_addr().ok(), remote_addr: stream.peer_addr().ok() };
    let greeting = tokio::time::timeout(FIRST_BYTE, async {
        let mut first = [0];
        if stream.peek(&mut first).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        match tls.filter(|_| first[0] == TLS_HANDSHAKE) {
            Some(config) => {
                let stream = TlsAcceptor::from(config).accept(stream).await?;
                Ok(Io::Tls(Box::new(stream)))
            }
            None => Ok(Io::Plain(stream)),
        }
    });
    match greeting.await {
        Ok(Ok(io)) => return Some(Connection { io, out: BytesMut::new(), yielded: false, peer }),
        Ok(Err(error)) => tracing::debug!(%error, "a connection ended before it was one"),
        Err(_) => tracing::debug!("a connection said nothing for ten seconds"),
    }
    None
}

async fn talk<S: Service>(connection: Connection, service: S, stop: CancellationToken) {
    let peer = connection.peer.clone();
    let answer = service_fn(move |mut request: Request<Incoming>| {
        let service = service.clone();
        request.extensions_mut().insert(peer.clone());
        // From here on, not from when its turn comes: others are to know of it.
        let busy = Busy::begin();
        // In a box: some kilobytes that would otherwise be copied from task to task.
        Box::pin(async move {
            let _busy = busy;
            Ok::<_, Infallible>(service.call(request.map(Counted::from)).await)
        })
    });
    let served = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(STREAMS_MAX)
        .serve_connection(TokioIo::new(connection), answer);
    let mut served = std::pin::pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = stop.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
    }
}

impl Io {
    /// Either stream as one.
    fn stream(&mut self) -> Pin<&mut dyn Stream> {
        match self {
            Io::Plain(stream) => Pin::new(stream),
            Io::Tls(stream) => Pin::new(&mut **stream),
        }
    }
}

impl Connection {
    fn gather(&mut self, bufs: &[io::IoSlice<'_>]) {
        if self.out.capacity() == 0 {
            self.out = SPARE.take().unwrap_or_default();
        }
        bufs.iter().for_each(|b| self.out.extend_from_slice(b));
    }

    /// Hands what was gathered to the socket.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            match ready!(self.io.stream().poll_write(cx, &self.out))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.out.advance(n),
            }
        }
        if self.out.capacity() > 0 {
            let mut spare = std::mem::take(&mut self.out);
            spare.clear();
            SPARE.set(Some(spare));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.get_mut().io.stream().poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let len: usize = bufs.iter().map(|b| b.len()).sum();
        if this.out.len() + len <= GATHER_MAX {
            this.gather(bufs);
            return Poll::Ready(Ok(len));
        }
        ready!(this.poll_drain(cx))?;
        if len <= GATHER_MAX {
            this.gather(bufs);
            return Poll::Ready(Ok(len));
        }
        // Large bodies are not copied.
        this.io.stream().poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.out.is_empty() && !this.yielded && BUSY.load(Ordering::Relaxed) > 0 {
            this.yielded = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        ready!(this.poll_drain(cx))?;
        this.yielded = false;
        this.io.stream().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        this.io.stream().poll_shutdown(cx)
    }
}
