//! ReceiveMessage: a long poll on one broker's queues. The stream is status, messages, delivery timestamp; an
//! error is a status and the timestamp.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use apis::brokers::{Brokers, NameServers};
use apis::convert::receive::{self as convert, Scratch};
use apis::internal::{ChangeInvisibleRequest, Delivered, PopRequest};
use apis::status::{Error, ok};
use apis::v2::receive_message_response::Content;
use apis::v2::*;
use apis::{names, unary, v2};
use bytes::Bytes;
use http_body::Frame;
use md5::{Digest as _, Md5};
use model::{TagFilter, limits};
use prost::Message as _;
use tokio_stream::Stream;
use tonic::Status as GrpcStatus;

use super::Front;
use crate::call::Call;

/// What a broker call may take beyond its waiting.
const ANSWER: Duration = Duration::from_secs(3);

impl<B: Brokers, N: NameServers> Front<B, N> {
    pub(super) async fn receive(
        self: Arc<Self>,
        call: Result<Call, Error>,
        r: ReceiveMessageRequest,
    ) -> Delivery<B, N> {
        let received = match call {
            Ok(call) => self.pop(&call, r).await,
            Err(error) => Err(error),
        };
        let (status, received) = match received {
            Ok(popped) if popped.messages.is_empty() => {
                (Error::new(Code::MessageNotFound, "no new message").status(), None)
            }
            Ok(popped) => (ok(), Some(popped)),
            Err(error) => (error.status(), None),
        };
        Delivery::new(status, received, self)
    }

    async fn pop(&self, call: &Call, r: ReceiveMessageRequest) -> Result<Received, Error> {
        let group = names::group(r.group.as_ref(), &call.namespace)?;
        let queue = r.message_queue.unwrap_or_default();
        let topic = names::topic(queue.topic.as_ref(), &call.namespace)?;
        let tags = filter(r.filter_expression.as_ref())?;
        let max_messages = batch(r.batch_size)?;
        let invisible_ms = invisible(r.invisible_duration.as_ref(), r.auto_renew)?;
        let poll_ms = self.poll_ms(call, r.long_polling_timeout.as_ref())?;
        let context = call.context();
        let view = self.view_with_topic(&topic, &context).await?;
        self.group(&group, &context).await?;
        let broker = queue.broker.map(|b| b.name).unwrap_or_default();
        let route = view.route(&topic);
        if !route.iter().any(|(b, _)| b.name == broker) {
            let known: Vec<&str> = route.iter().map(|(b, _)| b.name.as_str()).collect();
            let what =
                format!("broker {broker:?} does not have topic {topic}; these do: {}", known.join(", "));
            return Err(Error::new(Code::NotFound, what));
        }
        let request = PopRequest {
            group: group.as_str().into(),
            topic: topic.as_str().into(),
            max_messages,
            invisible_ms,
            poll_ms,
            auto_renew: r.auto_renew,
            tags,
            attempt_id: r.attempt_id.unwrap_or_default(),
        };
        let mut context = call.waiting();
        context.deadline = Some(Duration::from_millis(poll_ms as u64) + ANSWER);
        let popped = tokio::select! {
            popped = self.brokers.pop(&broker, &context, request) => popped?,
            // A proxy that stops does not keep its consumers waiting.
            () = self.draining.cancelled() => Default::default(),
        };
        Ok(Received {
            messages: popped.messages,
            broker,
            group: group.as_str().into(),
            topic: topic.as_str().into(),
            call: call.clone(),
        })
    }

    /// How long to wait: what is asked for, within bounds and within what the client's deadline leaves.
    fn poll_ms(&self, call: &Call, asked: Option<&prost_types::Duration>) -> Result<i64, Error> {
        let remaining = call.deadline.map_or(i64::MAX, |d| d.as_millis() as i64);
        let left = (remaining - limits::POLL_RESERVE_MS).max(0);
        let Some(asked) = asked.map(millis) else {
            let half = self.sessions.request_timeout(&call.client_id).map_or(0, |t| t.as_millis() as i64 / 2);
            let poll = remaining.saturating_sub(half).clamp(limits::POLL_MIN_MS, limits::POLL_MAX_MS);
            return Ok(poll.min(left));
        };
        if asked > remaining && remaining < limits::POLL_MIN_MS {
            let what = format!(
                "the call ends in {remaining} ms, too soon for a long poll of {asked} ms; \
                 give the call a deadline of at least the polling time"
            );
            return Err(Error::new(Code::IllegalPollingTime, what));
        }
        Ok(asked.clamp(limits::POLL_MIN_MS, limits::POLL_MAX_MS).min(left))
    }
}

struct Received {
    messages: Vec<Delivered>,
    broker: String,
    group: String,
    topic: String,
    call: Call,
}

fn millis(d: &prost_types::Duration) -> i64 {
    d.seconds.saturating_mul(1000).saturating_add(i64::from(d.nanos) / 1_000_000)
}

fn filter(expression: Option<&FilterExpression>) -> Result<String, Error> {
    let Some(expression) = expression else { return Ok("*".into()) };
    if expression.r#type() == v2::FilterType::Sql {
        if expression.expression.trim().is_empty() {
            return Err(Error::new(
                Code::IllegalFilterExpression,
                "the SQL filter is empty; write one, or use tags",
            ));
        }
        return Err(Error::new(Code::NotImplemented, "SQL filters are not part of this version of FerryMQ"));
    }
    TagFilter::parse(&expression.expression)?;
    Ok(expression.expression.clone())
}

fn batch(size: i32) -> Result<u32, Error> {
    match u32::try_from(size) {
        Ok(size @ 1..) => Ok(size.min(limits::RECEIVE_BATCH_MAX)),
        _ => Err(Error::new(Code::BadRequest, format!("a batch of {size} messages; ask for 1 to 32"))),
    }
}

fn invisible(duration: Option<&prost_types::Duration>, auto_renew: bool) -> Result<i64, Error> {
    if auto_renew {
        return Ok(limits::INVISIBLE_RENEWED_MS);
    }
    let ms = duration.map_or(0, millis);
    let (min, max) = (limits::INVISIBLE_RECEIVE_MIN_MS, limits::INVISIBLE_MAX_MS);
    if (min..=max).contains(&ms) {
        return Ok(ms);
    }
    let what = format!("an invisible duration of {ms} ms; it must be {min} to {max} ms");
    Err(Error::new(Code::IllegalInvisibleTime, what))
}

/// MD5 in upper-case hex is what every client takes. CRC-32 in eight upper-case digits is as good to the clients that
/// are known to take it, and costs next to nothing; some write it without leading zeros, so that such a sum is MD5.
pub(super) fn digest(body: &[u8], language: Language) -> (DigestType, String) {
    let takes_crc = matches!(language, Language::Java | Language::Golang | Language::Python | Language::Rust);
    if takes_crc {
        let sum = crc32fast::hash(body);
        if sum >> 28 != 0 {
            return (DigestType::Crc32, format!("{sum:08X}"));
        }
    }
    let digest = Md5::digest(body);
    let checksum = digest.iter().fold(String::with_capacity(32), |mut text, b| {
        text.push(char::from(b"0123456789ABCDEF"[usize::from(b >> 4)]));
        text.push(char::from(b"0123456789ABCDEF"[usize::from(b & 15)]));
        text
    });
    (DigestType::Md5, checksum)
}

/// Frames are gathered up to this many bytes.
const GATHER_BYTES: usize = 32 * 1024;

/// The answer to a receive: status, messages, delivery timestamp. If the client goes away in the middle, what it has not
/// been sent comes back at once.
pub(crate) struct Delivery<B: Brokers, N: NameServers> {
    status: Option<v2::Status>,
    messages: std::vec::IntoIter<Delivered>,
    delivered_at: Option<prost_types::Timestamp>,
    ended: bool,
    scratch: Scratch,
    received: Option<Received>,
    front: Arc<Front<B, N>>,
}

impl<B: Brokers, N: NameServers> Delivery<B, N> {
    fn new(status: v2::Status, mut received: Option<Received>, front: Arc<Front<B, N>>) -> Self {
        let messages = received.as_mut().map(|r| std::mem::take(&mut r.messages)).unwrap_or_default();
        Self {
            status: Some(status),
            messages: messages.into_iter(),
            delivered_at: Some(convert::timestamp(front.clock.now().0)),
            ended: false,
            scratch: Scratch::default(),
            received,
            front,
        }
    }

    /// Writes the next frame; false if there is none.
    fn put_next(&mut self, out: &mut Vec<u8>) -> bool {
        let frame = |content| ReceiveMessageResponse { content: Some(content) };
        if let Some(status) = self.status.take() {
            unary::put_frame(&frame(Content::Status(status)), out);
        } else if let Some(delivered) = self.messages.next() {
            let language = self.received.as_ref().map_or(Language::Unspecified, |r| r.call.language);
            let (kind, sum) = digest(&delivered.body, language);
            convert::encode_message(&delivered, (kind, &sum), &mut self.scratch, out);
        } else if let Some(at) = self.delivered_at.take() {
            unary::put_frame(&frame(Content::DeliveryTimestamp(at)), out);
        } else {
            return false;
        }
        true
    }
}

impl<B: Brokers, N: NameServers> http_body::Body for Delivery<B, N> {
    type Data = Bytes;
    type Error = GrpcStatus;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, GrpcStatus>>> {
        let this = self.get_mut();
        let ahead: usize =
            this.messages.as_slice().iter().map(|d| d.body.len() + d.properties.len() + 512).sum();
        let mut out = Vec::with_capacity(ahead.min(GATHER_BYTES) + 256);
        while out.len() < GATHER_BYTES && this.put_next(&mut out) {}
        Poll::Ready(match out.is_empty() {
            false => Some(Ok(Frame::data(out.into()))),
            true if std::mem::replace(&mut this.ended, true) => None,
            true => Some(Ok(unary::trailers())),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

/// Frame by frame, for whoever calls the service without a wire.
impl<B: Brokers, N: NameServers> Stream for Delivery<B, N> {
    type Item = Result<ReceiveMessageResponse, GrpcStatus>;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut frame = Vec::new();
        let more = self.get_mut().put_next(&mut frame);
        let decode =
            || ReceiveMessageResponse::decode(&frame[5..]).map_err(|e| GrpcStatus::internal(e.to_string()));
        Poll::Ready(more.then(decode))
    }
}

impl<B: Brokers, N: NameServers> Drop for Delivery<B, N> {
    fn drop(&mut self) {
        let unsent: Vec<String> =
            self.messages.by_ref().map(|d| d.handle).filter(|h| !h.is_empty()).collect();
        let Some(Received { broker, group, topic, call, .. }) = self.received.take() else { return };
        if unsent.is_empty() {
            return;
        }
        let (front, context) = (self.front.clone(), call.context());
        tokio::spawn(async move {
            for handle in unsent {
                let (group, topic) = (group.clone(), topic.clone());
                let nack = ChangeInvisibleRequest { group, topic, handle, invisible_ms: 0 };
                let _ = front.brokers.change_invisible(&broker, &context, nack).await;
            }
        });
    }
}
