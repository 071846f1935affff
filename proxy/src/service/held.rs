//! EndTransaction and RecallMessage, and asking producers what became of their transactions.

use std::sync::Arc;
use std::time::Duration;

use apis::brokers::{Brokers, NameServers};
use apis::context::CallContext;
use apis::convert::receive as convert;
use apis::internal::{Check, ChecksRequest, DecideRequest, RecallRequest};
use apis::names;
use apis::status::{Error, ok};
use apis::v2::telemetry_command::Command;
use apis::v2::*;
use model::{MessageType, RecallHandle, Sealed, Topic, TransactionId};
use tokio_util::sync::CancellationToken;

use super::{Front, receive};
use crate::call::Call;

/// How long a broker is waited for before the topics of this proxy's producers are said anew.
const POLL: Duration = Duration::from_secs(5);
/// What a broker call may take beyond its waiting.
const ANSWER: Duration = Duration::from_secs(3);
/// Between two looks for brokers that are new, and for producers where there were none.
const LOOK: Duration = Duration::from_secs(1);

impl<B: Brokers, N: NameServers> Front<B, N> {
    pub(super) async fn end_transaction(
        &self,
        call: Call,
        r: EndTransactionRequest,
    ) -> Result<EndTransactionResponse, Error> {
        let topic = names::topic(r.topic.as_ref(), &call.namespace)?;
        let invalid = |what: String| Error::new(Code::InvalidTransactionId, what);
        if r.transaction_id.trim().is_empty() {
            return Err(invalid("the transaction id is missing; it came with the answer to the send".into()));
        }
        let commit = match r.resolution() {
            TransactionResolution::Commit => true,
            TransactionResolution::Rollback => false,
            TransactionResolution::Unspecified => {
                let what =
                    "the resolution is neither COMMIT nor ROLLBACK; leave the call out if it is not known";
                return Err(Error::new(Code::BadRequest, what));
            }
        };
        let broker =
            self.broker_named(TransactionId::broker_of(&r.transaction_id), "transaction id", invalid)?;
        let request =
            DecideRequest { topic: topic.as_str().into(), transaction_id: r.transaction_id, commit };
        self.brokers.decide(&broker, &call.context(), request).await?;
        Ok(EndTransactionResponse { status: Some(ok()) })
    }

    pub(super) async fn recall(
        &self,
        call: Call,
        r: RecallMessageRequest,
    ) -> Result<RecallMessageResponse, Error> {
        let topic = names::topic(r.topic.as_ref(), &call.namespace)?;
        let bad = |what: String| Error::new(Code::BadRequest, what);
        let broker = self.broker_named(RecallHandle::broker_of(&r.recall_handle), "recall handle", bad)?;
        let request = RecallRequest { topic: topic.as_str().into(), handle: r.recall_handle };
        let reply = self.brokers.recall(&broker, &call.context(), request).await?;
        Ok(RecallMessageResponse { status: Some(ok()), message_id: reply.message_id })
    }

    /// Topics of transactions that this proxy can ask producers of.
    fn transaction_topics(&self) -> Vec<String> {
        let view = self.routes.view();
        let has = |t: &Topic| view.topic(t).is_some_and(|c| c.types.contains(&MessageType::Transaction));
        self.sessions.published().into_iter().filter(|t| has(t)).map(|t| t.as_str().into()).collect()
    }

    async fn check(&self, check: Check) {
        let Some(delivered) = check.message else { return };
        let topic = Topic::stored(&delivered.topic);
        let Some(producer) = self.sessions.producer_of(&topic) else {
            tracing::warn!(%topic, "no producer is left that could be asked after a transaction; it is tried again");
            return;
        };
        let (kind, checksum) = receive::digest(&delivered.body, Language::Unspecified);
        let mut message = convert::message(delivered, Digest { r#type: kind.into(), checksum });
        if let Some(system) = message.system_properties.as_mut() {
            system.message_type = apis::v2::MessageType::Transaction.into();
        }
        let command = Command::RecoverOrphanedTransactionCommand(RecoverOrphanedTransactionCommand {
            message: Some(message),
            transaction_id: check.transaction_id,
        });
        let command = TelemetryCommand { status: Some(ok()), command: Some(command) };
        if tokio::time::timeout(ANSWER, producer.send(Ok(command))).await.is_err() {
            tracing::warn!(%topic, "a producer does not read what it is asked; another one is tried later");
        }
    }
}

/// Asks every broker which transactions are to be asked after, while there are producers that can be.
pub(crate) async fn ask_producers<B: Brokers, N: NameServers>(
    front: Arc<Front<B, N>>,
    stop: CancellationToken,
) {
    let mut asking = std::collections::BTreeMap::new();
    loop {
        if !front.transaction_topics().is_empty() {
            asking.retain(|_, task: &mut tokio::task::JoinHandle<()>| !task.is_finished());
            for broker in front.routes.view().brokers.keys() {
                if !asking.contains_key(broker) {
                    let task = tokio::spawn(ask_broker(front.clone(), broker.clone(), stop.clone()));
                    asking.insert(broker.clone(), task);
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Ends when there is nobody to ask, or the broker does not answer.
async fn ask_broker<B: Brokers, N: NameServers>(
    front: Arc<Front<B, N>>,
    broker: String,
    stop: CancellationToken,
) {
    loop {
        let topics = front.transaction_topics();
        if topics.is_empty() {
            return;
        }
        let request = ChecksRequest { topics, poll_ms: POLL.as_millis() as i64 };
        let context = CallContext { deadline: Some(POLL + ANSWER), ..CallContext::internal() };
        let reply = tokio::select! {
            reply = front.brokers.checks(&broker, &context, request) => reply,
            () = stop.cancelled() => return,
        };
        match reply {
            Ok(reply) => {
                for check in reply.checks {
                    front.check(check).await;
                }
            }
            Err(error) => {
                tracing::debug!(broker, %error, "the broker did not say which transactions are to be asked after");
                return;
            }
        }
    }
}
