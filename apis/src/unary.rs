//! A unary call answered with as little as gRPC over HTTP/2 asks for: the message is decoded where it lies, the answer
//! is one frame and its trailers. For the calls that come a hundred thousand times a second; the others go through
//! tonic, whose buffers, boxes and layers cost more than those calls themselves.

use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, header};
use http_body::{Body, Frame, SizeHint};
use prost::Message;
use tonic::Status;
use tonic::metadata::MetadataMap;

/// Compressed flag (1), length (4, big-endian).
const PREFIX_BYTES: usize = 5;
/// Memory taken for a message before its bytes are there.
const AHEAD_MAX_BYTES: usize = 1 << 20;
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
const OK: HeaderValue = HeaderValue::from_static("0");

/// True if the call's message may be compressed: that is tonic's business.
pub fn is_compressed<B>(request: &Request<B>) -> bool {
    request.headers().get("grpc-encoding").is_some_and(|encoding| encoding != "identity")
}

/// The message of a call, of at most `max` bytes and not compressed, with what came along.
pub async fn take<B, M>(request: Request<B>, max: usize) -> Result<tonic::Request<M>, Status>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    M: Message + Default,
{
    let (parts, body) = request.into_parts();
    let message = M::decode(read(body, max).await?).map_err(|e| Status::internal(e.to_string()))?;
    Ok(tonic::Request::from_parts(MetadataMap::from_headers(parts.headers), parts.extensions, message))
}

/// A successful response with this body: frames, and then [`trailers`].
pub fn respond(
    body: impl Body<Data = Bytes, Error = Status> + Send + 'static,
) -> Response<tonic::body::Body> {
    let mut response = Response::new(tonic::body::Body::new(body));
    response.headers_mut().insert(header::CONTENT_TYPE, GRPC);
    response
}

/// The end of a successful response.
pub fn trailers() -> Frame<Bytes> {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(Status::GRPC_STATUS, OK);
    Frame::trailers(trailers)
}

/// Answers a call with one message.
pub async fn serve<B, M, R, F>(
    request: Request<B>,
    max: usize,
    answer: impl FnOnce(tonic::Request<M>) -> F,
) -> Response<tonic::body::Body>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    M: Message + Default,
    R: Message,
    F: Future<Output = Result<tonic::Response<R>, Status>>,
{
    let answered = match take(request, max).await {
        Ok(request) => answer(request).await,
        Err(status) => Err(status),
    };
    match answered {
        Ok(reply) => respond(Answer::of(reply.get_ref())),
        Err(status) => status.into_http(),
    }
}

/// The one message of a body.
async fn read<B>(body: B, max: usize) -> Result<Bytes, Status>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut body = pin!(body);
    // Nearly always one piece, which is then not copied.
    let mut whole = Bytes::new();
    let mut pieces = BytesMut::new();
    while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
        let Ok(data) = frame.map_err(|e| Status::from_error(e.into()))?.into_data() else { continue };
        if data.is_empty() {
            continue; // only says that this is the end
        }
        if whole.is_empty() && pieces.is_empty() {
            whole = data;
        } else {
            if pieces.is_empty() {
                let expected = length(&whole, max)?.map_or(0, |len| len + PREFIX_BYTES);
                pieces.reserve(expected.min(AHEAD_MAX_BYTES).max(whole.len() + data.len()));
                pieces.put(std::mem::take(&mut whole));
            }
            pieces.put(data);
        }
        // What is too long is refused before it is here.
        length(if pieces.is_empty() { &whole } else { &pieces }, max)?;
    }
    if !pieces.is_empty() {
        whole = pieces.freeze();
    }
    let Some(len) = length(&whole, max)? else {
        return Err(Status::internal("Missing request message."));
    };
    whole.advance(PREFIX_BYTES);
    if whole.len() < len {
        return Err(Status::internal("Unexpected EOF decoding stream."));
    }
    whole.truncate(len);
    Ok(whole)
}

/// The length that a prefix says, once it is there.
fn length(data: &[u8], max: usize) -> Result<Option<usize>, Status> {
    let Some(([compressed, len @ ..], _)) = data.split_first_chunk::<PREFIX_BYTES>() else { return Ok(None) };
    if *compressed != 0 {
        let what = "protocol error: received message with compressed-flag but no grpc-encoding was specified";
        return Err(Status::internal(what));
    }
    let len = u32::from_be_bytes(*len) as usize;
    if len > max {
        let what =
            format!("Error, decoded message length too large: found {len} bytes, the limit is: {max} bytes");
        return Err(Status::out_of_range(what));
    }
    Ok(Some(len))
}

/// Writes a message as one frame.
pub fn put_frame(message: &impl Message, out: &mut Vec<u8>) {
    let len = message.encoded_len();
    out.reserve(PREFIX_BYTES + len);
    out.put_u8(0);
    out.put_u32(len as u32);
    message.encode_raw(out);
}

/// One frame, then the trailers of success.
struct Answer {
    frame: Option<Bytes>,
    ended: bool,
}

impl Answer {
    fn of(reply: &impl Message) -> Self {
        let mut frame = Vec::new();
        put_frame(reply, &mut frame);
        Self { frame: Some(frame.into()), ended: false }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(frame) = self.frame.take() {
            return Poll::Ready(Some(Ok(Frame::data(frame))));
        }
        if std::mem::replace(&mut self.ended, true) {
            return Poll::Ready(None);
        }
        Poll::Ready(Some(Ok(trailers())))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.frame.as_ref().map_or(0, |f| f.len() as u64))
    }
}
