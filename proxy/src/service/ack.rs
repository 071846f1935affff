//! AckMessage, ChangeInvisibleDuration, ForwardMessageToDeadLetterQueue: calls by receipt handle. The handle
//! names its broker; the broker checks the rest.

use std::collections::BTreeMap;

use apis::brokers::{Brokers, NameServers};
use apis::internal::{AckRequest, AckResult, ChangeInvisibleRequest, DeadLetterRequest};
use apis::names;
use apis::status::{Error, ok, summary};
use apis::v2::*;
use model::{Receipt, Sealed, limits};

use super::Front;
use crate::call::Call;

impl<B: Brokers, N: NameServers> Front<B, N> {
    /// The broker that made a handle, if it is known here.
    fn broker_of(&self, handle: &str) -> Result<String, Error> {
        let invalid = |what: String| Error::new(Code::InvalidReceiptHandle, what);
        self.broker_named(Receipt::broker_of(handle), "receipt handle", invalid)
    }

    /// The broker that made what a client gives back.
    pub(crate) fn broker_named(
        &self,
        broker: Option<&str>,
        what: &str,
        invalid: impl Fn(String) -> Error,
    ) -> Result<String, Error> {
        let Some(broker) = broker else {
            return Err(invalid(format!(
                "the {what} is malformed; use the one that the server gave, unchanged"
            )));
        };
        if self.routes.view().brokers.contains_key(broker) {
            return Ok(broker.to_owned());
        }
        if self.routes.was_seen(broker) {
            // Not the handle's fault: clients give a handle up that is called invalid.
            let what = format!("broker {broker:?} is away at the moment; try again");
            return Err(Error::new(Code::HaNotAvailable, what));
        }
        Err(invalid(format!("the {what} belongs to broker {broker:?}, which is not part of this cluster")))
    }

    pub(super) async fn ack(&self, call: Call, r: AckMessageRequest) -> Result<AckMessageResponse, Error> {
        let group = names::group(r.group.as_ref(), &call.namespace)?;
        let topic = names::topic(r.topic.as_ref(), &call.namespace)?;
        if r.entries.is_empty() {
            return Err(Error::new(Code::BadRequest, "no receipt handle to acknowledge; name at least one"));
        }
        let mut results: Vec<Option<Result<(), Error>>> = vec![None; r.entries.len()];
        let mut by_broker: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (i, entry) in r.entries.iter().enumerate() {
            match self.broker_of(&entry.receipt_handle) {
                Ok(broker) => by_broker.entry(broker).or_default().push(i),
                Err(error) => results[i] = Some(Err(error)),
            }
        }
        for (broker, indices) in by_broker {
            let request = AckRequest {
                group: group.as_str().into(),
                topic: topic.as_str().into(),
                handles: indices.iter().map(|i| r.entries[*i].receipt_handle.clone()).collect(),
            };
            let reply = self.brokers.ack(&broker, &call.context(), request).await;
            for (n, i) in indices.into_iter().enumerate() {
                results[i] = Some(match &reply {
                    Ok(reply) => result(reply.results.get(n).copied().unwrap_or_default()),
                    Err(error) => Err(error.clone()),
                });
            }
        }
        let entry = |(entry, result): (AckMessageEntry, Option<Result<(), Error>>)| AckMessageResultEntry {
            message_id: entry.message_id,
            receipt_handle: entry.receipt_handle,
            status: Some(match result {
                Some(Err(error)) => error.status(),
                _ => ok(),
            }),
        };
        let entries: Vec<_> = r.entries.into_iter().zip(results).map(entry).collect();
        let mut status = summary(entries.iter().map(|e| &e.status));
        if let [only] = &entries[..] {
            status = only.status.clone().unwrap_or(status);
        }
        Ok(AckMessageResponse { status: Some(status), entries })
    }

    pub(super) async fn change_invisible(
        &self,
        call: Call,
        r: ChangeInvisibleDurationRequest,
    ) -> Result<ChangeInvisibleDurationResponse, Error> {
        let group = names::group(r.group.as_ref(), &call.namespace)?;
        let topic = names::topic(r.topic.as_ref(), &call.namespace)?;
        let duration = r.invisible_duration.unwrap_or_default();
        let invisible_ms = duration.seconds.saturating_mul(1000) + i64::from(duration.nanos) / 1_000_000;
        if !(0..=limits::INVISIBLE_MAX_MS).contains(&invisible_ms) {
            let max = limits::INVISIBLE_MAX_MS;
            let what = format!("an invisible duration of {invisible_ms} ms; it must be 0 to {max} ms");
            return Err(Error::new(Code::IllegalInvisibleTime, what));
        }
        let broker = self.broker_of(&r.receipt_handle)?;
        let request = ChangeInvisibleRequest {
            group: group.as_str().into(),
            topic: topic.as_str().into(),
            handle: r.receipt_handle,
            invisible_ms,
        };
        let reply = self.brokers.change_invisible(&broker, &call.context(), request).await?;
        Ok(ChangeInvisibleDurationResponse { status: Some(ok()), receipt_handle: reply.handle })
    }

    pub(super) async fn dead_letter(
        &self,
        call: Call,
        r: ForwardMessageToDeadLetterQueueRequest,
    ) -> Result<ForwardMessageToDeadLetterQueueResponse, Error> {
        let group = names::group(r.group.as_ref(), &call.namespace)?;
        let topic = names::topic(r.topic.as_ref(), &call.namespace)?;
        let broker = self.broker_of(&r.receipt_handle)?;
        let request = DeadLetterRequest {
            group: group.as_str().into(),
            topic: topic.as_str().into(),
            handle: r.receipt_handle,
        };
        self.brokers.dead_letter(&broker, &call.context(), request).await?;
        Ok(ForwardMessageToDeadLetterQueueResponse { status: Some(ok()) })
    }
}

fn result(code: i32) -> Result<(), Error> {
    let invalid = |what: &str| Err(Error::new(Code::InvalidReceiptHandle, what));
    match AckResult::try_from(code) {
        Ok(AckResult::AckOk) => Ok(()),
        Ok(AckResult::AckExpired) => {
            invalid("the receipt handle is expired: the message is, or will be, delivered again")
        }
        _ => invalid("the receipt handle does not belong to this group and topic, or has been altered"),
    }
}
