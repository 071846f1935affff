//! ReceiveMessage: a long poll on one broker's queues. The stream is status, messages, delivery timestamp; an
//! error is a status and the timestamp.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use apis::brokers::{Brokers, NameServers};
use apis::convert::receive as convert;
use apis::internal::{ChangeInvisibleRequest, Delivered, PopRequest};
use apis::status::{Error, ok};
use apis::v2::receive_message_response::Content;
use apis::v2::*;
use apis::{names, v2};
use md5::{Digest as _, Md5};
use model::{TagFilter, limits};
use tokio_stream::Stream;
use tonic::Status as GrpcStatus;

use super::{Frames, Front};
use crate::call::Call;

/// What a broker call may take beyond its waiting.
const ANSWER: Duration = Duration::from_secs(3);

impl<B: Brokers, N: NameServers> Front<B, N> {
    pub(super) async fn receive(
        self: Arc<Self>,
        call: Result<Call, Error>,
        r: ReceiveMessageRequest,
    ) -> Frames<ReceiveMessageResponse> {
        let received = match call {
            Ok(call) => self.pop(&call, r).await,
            Err(error) => Err(error),
        };
        let now = self.clock.now().0;
        match received {
            Ok(popped) if popped.messages.is_empty() => {
                frames(Error::new(Code::MessageNotFound, "no new message").status(), now)
            }
            Ok(popped) => {
                let Received { messages, broker, group, topic, call } = popped;
                let frames = contents(ok(), messages.into_iter().map(|d| message(d, call.language)), now);
                Box::pin(Delivery { frames, broker, group, topic, call, front: self.clone() })
            }
            Err(error) => frames(error.status(), now),
        }
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

fn message(d: Delivered, language: Language) -> v2::Message {
    let digest = digest(&d.body, language);
    convert::message(d, digest)
}

/// MD5 in upper-case hex is what every client takes. CRC-32 in eight upper-case digits is as good to the clients that
/// are known to take it, and costs next to nothing; some write it without leading zeros, so that such a sum is MD5.
fn digest(body: &[u8], language: Language) -> Digest {
    let takes_crc = matches!(language, Language::Java | Language::Golang | Language::Python | Language::Rust);
    if takes_crc {
        let sum = crc32fast::hash(body);
        if sum >> 28 != 0 {
            return Digest { r#type: DigestType::Crc32.into(), checksum: format!("{sum:08X}") };
        }
    }
    let digest = Md5::digest(body);
    let checksum = digest.iter().fold(String::with_capacity(32), |mut text, b| {
        text.push(char::from(b"0123456789ABCDEF"[usize::from(b >> 4)]));
        text.push(char::from(b"0123456789ABCDEF"[usize::from(b & 15)]));
        text
    });
    Digest { r#type: DigestType::Md5.into(), checksum }
}

type Contents = std::vec::IntoIter<Content>;

fn contents(status: v2::Status, messages: impl Iterator<Item = v2::Message>, now_ms: i64) -> Contents {
    let contents = std::iter::once(Content::Status(status)).chain(messages.map(Content::Message));
    contents.chain([Content::DeliveryTimestamp(convert::timestamp(now_ms))]).collect::<Vec<_>>().into_iter()
}

fn frames(status: v2::Status, now_ms: i64) -> Frames<ReceiveMessageResponse> {
    let contents = contents(status, std::iter::empty(), now_ms);
    Box::pin(tokio_stream::iter(
        contents.map(|content| Ok(ReceiveMessageResponse { content: Some(content) })),
    ))
}

/// The stream of a batch. If the client goes away in the middle, what it has not been sent comes back at once.
struct Delivery<B: Brokers, N: NameServers> {
    frames: Contents,
    broker: String,
    group: String,
    topic: String,
    call: Call,
    front: Arc<Front<B, N>>,
}

impl<B: Brokers, N: NameServers> Stream for Delivery<B, N> {
    type Item = Result<ReceiveMessageResponse, GrpcStatus>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(self.frames.next().map(|content| Ok(ReceiveMessageResponse { content: Some(content) })))
    }
}

impl<B: Brokers, N: NameServers> Drop for Delivery<B, N> {
    fn drop(&mut self) {
        let unsent = self.frames.by_ref().filter_map(|content| match content {
            Content::Message(m) => m.system_properties?.receipt_handle,
            _ => None,
        });
        let unsent: Vec<String> = unsent.collect();
        if unsent.is_empty() {
            return;
        }
        let (front, broker, context) =
            (self.front.clone(), std::mem::take(&mut self.broker), self.call.context());
        let (group, topic) = (std::mem::take(&mut self.group), std::mem::take(&mut self.topic));
        tokio::spawn(async move {
            for handle in unsent {
                let (group, topic) = (group.clone(), topic.clone());
                let nack = ChangeInvisibleRequest { group, topic, handle, invisible_ms: 0 };
                let _ = front.brokers.change_invisible(&broker, &context, nack).await;
            }
        });
    }
}
