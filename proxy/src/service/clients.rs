//! Telemetry, Heartbeat, NotifyClientTermination: who the clients are, and that they live.

use std::sync::Arc;

use apis::brokers::{Brokers, NameServers};
use apis::internal::LivenessRequest;
use apis::names;
use apis::status::{Error, ok};
use apis::v2::settings::PubSub;
use apis::v2::telemetry_command::Command;
use apis::v2::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status as GrpcStatus, Streaming};

use super::{Frames, Front};
use crate::call::Call;
use crate::session::{CommandSender, settings};

impl<B: Brokers, N: NameServers> Front<B, N> {
    /// Answers at once with the stream: some clients wait for its headers before they write anything.
    pub(super) fn telemetry(
        self: Arc<Self>,
        call: Result<Call, Error>,
        inbound: Streaming<TelemetryCommand>,
    ) -> Frames<TelemetryCommand> {
        let (out, stream) = mpsc::channel(16);
        tokio::spawn(async move {
            match call {
                Ok(call) => {
                    self.converse(&call, inbound, &out).await;
                    self.sessions.hung_up(&call.client_id, &out);
                }
                Err(error) => {
                    let command = TelemetryCommand { status: Some(error.status()), command: None };
                    let _ = out.send(Ok(command)).await;
                }
            }
        });
        Box::pin(ReceiverStream::new(stream))
    }

    async fn converse(&self, call: &Call, mut inbound: Streaming<TelemetryCommand>, out: &CommandSender) {
        loop {
            let command = tokio::select! {
                command = inbound.message() => command,
                () = self.draining.cancelled() => return,
                () = out.closed() => return,
            };
            let Ok(Some(command)) = command else { return };
            // Results of commands that this version does not send are of no use.
            let Some(Command::Settings(settings)) = command.command else { continue };
            let answer = match self.settle(call, settings, out).await {
                Ok(settings) => {
                    Ok(TelemetryCommand { status: Some(ok()), command: Some(Command::Settings(settings)) })
                }
                Err(error) if error.code == Code::ConsumerGroupNotFound => {
                    Ok(TelemetryCommand { status: Some(error.status()), command: None })
                }
                Err(error) => Err(GrpcStatus::invalid_argument(error.message)),
            };
            let ended = answer.is_err();
            if out.send(answer).await.is_err() || ended {
                return;
            }
        }
    }

    async fn settle(&self, call: &Call, said: Settings, out: &CommandSender) -> Result<Settings, Error> {
        let mut publishes = Vec::new();
        let group = match &said.pub_sub {
            None => {
                let what =
                    "the settings hold neither publishing nor subscription; a client is one or the other";
                return Err(Error::new(Code::BadRequest, what));
            }
            Some(PubSub::Publishing(publishing)) => {
                for topic in &publishing.topics {
                    publishes.push(names::topic(Some(topic), &call.namespace)?);
                }
                None
            }
            Some(PubSub::Subscription(subscription)) => {
                for entry in &subscription.subscriptions {
                    names::topic(entry.topic.as_ref(), &call.namespace)?;
                }
                Some(names::group(subscription.group.as_ref(), &call.namespace)?)
            }
        };
        self.sessions.put(&call.client_id, said.clone(), publishes, out.clone());
        let config = match &group {
            Some(group) => Some(self.group(group, &call.context()).await?),
            None => None,
        };
        Ok(settings::answer(said, config.as_ref()))
    }

    pub(super) async fn heartbeat(
        self: Arc<Self>,
        call: Call,
        r: HeartbeatRequest,
    ) -> Result<HeartbeatResponse, Error> {
        let settings = self.sessions.seen(&call.client_id);
        // It lives, whatever else is said of it here: a proxy may have restarted since it sent its settings.
        self.clone().tell_liveness(vec![call.client_id.clone()], Vec::new());
        let settings = settings.ok_or_else(unknown_client)?;
        if matches!(settings.pub_sub, Some(PubSub::Subscription(_))) {
            let group = names::group(r.group.as_ref(), &call.namespace)?;
            let found = self.group(&group, &call.context()).await;
            found.map_err(|e| Error::new(Code::IllegalConsumerGroup, e.message))?;
        } else if settings.client_type.is_none() {
            return Err(unknown_client());
        }
        Ok(HeartbeatResponse { status: Some(ok()) })
    }

    pub(super) async fn terminate(
        self: Arc<Self>,
        call: Call,
        _: NotifyClientTerminationRequest,
    ) -> Result<NotifyClientTerminationResponse, Error> {
        self.clone().tell_liveness(Vec::new(), vec![call.client_id.clone()]);
        match self.sessions.remove(&call.client_id) {
            true => Ok(NotifyClientTerminationResponse { status: Some(ok()) }),
            false => Err(unknown_client()),
        }
    }

    fn tell_liveness(self: Arc<Self>, alive: Vec<String>, gone: Vec<String>) {
        let request = LivenessRequest { alive, gone };
        tokio::spawn(async move {
            for broker in self.routes.view().brokers.keys() {
                let context = apis::context::CallContext::internal();
                if let Err(error) = self.brokers.liveness(broker, &context, request.clone()).await {
                    tracing::debug!(broker, %error, "the broker was not told which clients live");
                }
            }
        });
    }
}

fn unknown_client() -> Error {
    let what = "no settings of this client are known here; it sends them on its telemetry stream";
    Error::new(Code::UnrecognizedClientType, what)
}
