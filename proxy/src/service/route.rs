//! QueryRoute and QueryAssignment: master queues only, readable and writable, at the address the client dialled.

use apis::brokers::{Brokers, NameServers};
use apis::convert::receive::resource;
use apis::status::{Error, ok};
use apis::v2::*;
use apis::{names, v2};

use super::Front;
use crate::call::Call;

/// "All queues of this broker": what consumers that do not consume in order are assigned.
const ANY_QUEUE: i32 = -1;

impl<B: Brokers, N: NameServers> Front<B, N> {
    pub(super) async fn query_route(
        &self,
        call: Call,
        r: QueryRouteRequest,
    ) -> Result<QueryRouteResponse, Error> {
        let topic = names::topic(r.topic.as_ref(), &call.namespace)?;
        let view = self.view_with_topic(&topic, &call.context()).await?;
        let endpoints = call.endpoints(r.endpoints);
        let mut message_queues = Vec::new();
        for (broker, config) in view.route(&topic) {
            for id in 0..config.queues {
                message_queues.push(MessageQueue {
                    accept_message_types: config.types.iter().map(|t| *t as i32).collect(),
                    ..queue(r.topic.clone(), id as i32, &broker.name, &endpoints)
                });
            }
        }
        Ok(QueryRouteResponse { status: Some(ok()), message_queues })
    }

    pub(super) async fn query_assignment(
        &self,
        call: Call,
        r: QueryAssignmentRequest,
    ) -> Result<QueryAssignmentResponse, Error> {
        let topic = names::topic(r.topic.as_ref(), &call.namespace)?;
        let group = names::group(r.group.as_ref(), &call.namespace)?;
        let view = self.view_with_topic(&topic, &call.context()).await?;
        let fifo = view.group(&group).is_some_and(|g| g.fifo);
        let endpoints = call.endpoints(r.endpoints);
        let name = Some(resource(topic.as_str()));
        let mut assignments = Vec::new();
        for (broker, config) in view.route(&topic) {
            let ids: Vec<i32> = if fifo { (0..config.queues as i32).collect() } else { vec![ANY_QUEUE] };
            assignments.extend(ids.into_iter().map(|id| Assignment {
                message_queue: Some(queue(name.clone(), id, &broker.name, &endpoints)),
            }));
        }
        Ok(QueryAssignmentResponse { status: Some(ok()), assignments })
    }
}

fn queue(topic: Option<Resource>, id: i32, broker: &str, endpoints: &Endpoints) -> MessageQueue {
    MessageQueue {
        topic,
        id,
        permission: v2::Permission::ReadWrite.into(),
        broker: Some(Broker { name: broker.into(), id: 0, endpoints: Some(endpoints.clone()) }),
        accept_message_types: Vec::new(),
    }
}
