//! Bytes of requests that are on their way in, over all connections of the process: what is not yet a message must
//! not fill the memory. A request that would exceed the bound fails; the others go on.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use model::bound::Bound;
use tonic::Status;

/// All requests together.
pub const BODIES_MAX_BYTES: usize = 256 << 20;

static HELD: AtomicUsize = AtomicUsize::new(0);

pub fn bound() -> Bound {
    Bound::bytes("requests on their way in", HELD.load(Ordering::Relaxed), BODIES_MAX_BYTES)
}

/// The body of one request, counted from its first byte until it is dropped: by then it is a message.
pub struct Counted {
    body: Incoming,
    held: usize,
}

impl From<Incoming> for Counted {
    fn from(body: Incoming) -> Self {
        Self { body, held: 0 }
    }
}

impl Body for Counted {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            self.held += data.len();
            let held = HELD.fetch_add(data.len(), Ordering::Relaxed) + data.len();
            if held > BODIES_MAX_BYTES {
                let what = format!(
                    "the server takes in {} MiB of requests already; try again",
                    BODIES_MAX_BYTES >> 20
                );
                return Poll::Ready(Some(Err(Status::resource_exhausted(what).into())));
            }
        }
        Poll::Ready(frame.map(|f| f.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        HELD.fetch_sub(self.held, Ordering::Relaxed);
    }
}
