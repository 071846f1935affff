//! Producers and consumers of the simulated world: what they do, and what they were promised.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use apis::convert::receive::timestamp;
use apis::v2;
use apis::v2::messaging_service_server::MessagingService;
use model::Clock;
use tokio::time::sleep;
use tokio_stream::StreamExt;

use super::{Front, Random, SimClock, Trace};
use crate::client::{by, message, name, receive};

/// Takes every kind but those in order, which have the other one.
const TOPIC: &str = "t";
const ORDERED: &str = "f";
const GROUP: &str = "g";
pub const IN_ORDER: &str = "o";

/// What clients know.
#[derive(Default)]
pub struct Facts {
    /// Messages that are to arrive: their sends, and commits, were confirmed.
    pub sent: Vec<String>,
    pub received: BTreeSet<String>,
    /// Where each message is, retries aside.
    places: BTreeMap<String, (i32, i64)>,
    /// Those in order whose sends were confirmed.
    ordered: Vec<String>,
    /// Acknowledgements that were asked for, and those that were confirmed.
    asked: BTreeSet<String>,
    pub acked: BTreeSet<String>,
    /// When scheduled messages are due.
    due: BTreeMap<String, i64>,
    /// Rolled back, recalled, or not decided yet.
    never: BTreeSet<String>,
}

/// One client.
pub struct Hand {
    pub id: u32,
    pub front: Front,
    pub facts: Rc<RefCell<Facts>>,
    pub trace: Trace,
    pub clock: SimClock,
    pub random: Random,
}

impl Hand {
    fn note(&self, what: String) {
        self.trace.note(&self.clock, format!("{} {what}", self.id));
    }

    async fn send(&self, m: v2::Message) -> v2::SendResultEntry {
        loop {
            sleep(Duration::from_millis(self.random.below(300))).await;
            let request = v2::SendMessageRequest { messages: vec![m.clone()] };
            let reply = self.front.send_message(by(&format!("p{}", self.id), request)).await;
            let reply = reply.expect("gRPC OK").into_inner();
            let code = reply.status.map_or(v2::Code::Unspecified, |s| s.code());
            self.note(format!("send {:?} {}", m.body, code.as_str_name()));
            if code == v2::Code::Ok {
                return reply.entries.into_iter().next().expect("one entry");
            }
        }
    }

    pub async fn produce(self) {
        for n in 0..40 {
            // Numbers in order, as text.
            let body = format!("{}-{n:03}", self.id);
            let now = self.clock.now().0;
            let mut m = message(TOPIC, body.as_bytes());
            let system = m.system_properties.as_mut().expect("set");
            (system.message_id, system.born_timestamp) = (body.clone(), Some(timestamp(now)));
            match self.random.below(6) {
                0 | 1 => drop(self.send(m).await),
                2 | 3 => {
                    m.topic = name(ORDERED);
                    (system.message_type, system.message_group) =
                        (v2::MessageType::Fifo.into(), Some(self.id.to_string()));
                    self.send(m).await;
                    self.facts.borrow_mut().ordered.push(body.clone());
                }
                4 => {
                    let due = now + self.random.below(5_000) as i64;
                    (system.message_type, system.delivery_timestamp) =
                        (v2::MessageType::Delay.into(), Some(timestamp(due)));
                    self.facts.borrow_mut().due.insert(body.clone(), due);
                    let handle = self.send(m).await.recall_handle;
                    if !handle.is_empty() && self.random.one_in(2) && self.recall(&body, handle).await {
                        continue;
                    }
                }
                _ => {
                    system.message_type = v2::MessageType::Transaction.into();
                    self.facts.borrow_mut().never.insert(body.clone());
                    let sent = self.send(m).await;
                    let commit = self.random.one_in(2);
                    if commit {
                        self.facts.borrow_mut().never.remove(&body);
                    }
                    self.decide(&body, sent, commit).await;
                    if !commit {
                        continue;
                    }
                }
            }
            self.facts.borrow_mut().sent.push(body);
        }
    }

    /// True if it was taken back; then it is never seen.
    async fn recall(&self, body: &str, handle: String) -> bool {
        loop {
            let request = v2::RecallMessageRequest { topic: name(TOPIC), recall_handle: handle.clone() };
            let reply = self.front.recall_message(by(&format!("p{}", self.id), request)).await;
            let code =
                reply.expect("gRPC OK").into_inner().status.map_or(v2::Code::Unspecified, |s| s.code());
            self.note(format!("recall {body} {}", code.as_str_name()));
            match code {
                v2::Code::Ok => {
                    let mut facts = self.facts.borrow_mut();
                    assert!(!facts.received.contains(body), "{body} was recalled and delivered");
                    facts.never.insert(body.to_owned());
                    return true;
                }
                v2::Code::PreconditionFailed => return false,
                _ => sleep(Duration::from_millis(100)).await,
            }
        }
    }

    async fn decide(&self, body: &str, sent: v2::SendResultEntry, commit: bool) {
        let resolution = match commit {
            true => v2::TransactionResolution::Commit,
            false => v2::TransactionResolution::Rollback,
        };
        loop {
            let request = v2::EndTransactionRequest {
                topic: name(TOPIC),
                message_id: sent.message_id.clone(),
                transaction_id: sent.transaction_id.clone(),
                resolution: resolution.into(),
                ..Default::default()
            };
            let reply = self.front.end_transaction(by(&format!("p{}", self.id), request)).await;
            let code =
                reply.expect("gRPC OK").into_inner().status.map_or(v2::Code::Unspecified, |s| s.code());
            self.note(format!("{} {body} {}", resolution.as_str_name(), code.as_str_name()));
            match code {
                v2::Code::Ok => return,
                v2::Code::PreconditionFailed | v2::Code::InvalidTransactionId => panic!("{body}: {code:?}"),
                _ => sleep(Duration::from_millis(100)).await,
            }
        }
    }

    async fn receive(&self, client: &str, request: v2::ReceiveMessageRequest) -> Vec<v2::Message> {
        let reply = self.front.receive_message(by(client, request)).await.expect("gRPC OK");
        let mut frames = reply.into_inner();
        let mut messages = Vec::new();
        while let Some(frame) = frames.next().await {
            match frame.expect("a frame").content {
                Some(v2::receive_message_response::Content::Message(m)) => messages.push(m),
                Some(v2::receive_message_response::Content::Status(s)) if s.code() != v2::Code::Ok => {
                    sleep(Duration::from_millis(100)).await;
                }
                _ => {}
            }
        }
        messages
    }

    pub async fn consume(self) {
        let client = format!("c{}", self.id);
        loop {
            for m in self.receive(&client, receive(TOPIC, GROUP)).await {
                let body = self.got(&client, &m);
                self.ack(&client, (TOPIC, GROUP), m, &body).await;
            }
        }
    }

    pub async fn consume_in_order(self) {
        let client = format!("o{}", self.id);
        for attempt in 0.. {
            let mut request = receive(ORDERED, IN_ORDER);
            request.attempt_id = Some(format!("{client}-{attempt}"));
            // An answer that is lost is asked for again.
            let batch = loop {
                let batch = self.receive(&client, request.clone()).await;
                if !batch.is_empty() {
                    break batch;
                }
            };
            let bodies: Vec<String> =
                batch.iter().map(|m| String::from_utf8_lossy(&m.body).into_owned()).collect();
            for (i, m) in batch.into_iter().enumerate() {
                let body = self.got(&client, &m);
                self.nothing_before(&body, &bodies[..i]);
                if !self.ack(&client, (ORDERED, IN_ORDER), m, &body).await {
                    // Its time is over: it comes again, and all after it.
                    break;
                }
            }
        }
    }

    /// Every earlier message of the same message group is done with.
    fn nothing_before(&self, body: &str, batch: &[String]) {
        let lane = body.split('-').next().unwrap_or_default();
        let facts = self.facts.borrow();
        for earlier in facts.ordered.iter().filter(|b| b.split('-').next() == Some(lane) && b.as_str() < body)
        {
            let done = facts.asked.contains(earlier) || batch.contains(earlier);
            assert!(done, "{body} came before {earlier}");
        }
    }

    fn got(&self, client: &str, m: &v2::Message) -> String {
        let body = String::from_utf8_lossy(&m.body).into_owned();
        let system = m.system_properties.as_ref().expect("set");
        let attempt = system.delivery_attempt();
        self.note(format!("{client} got {body} attempt {attempt}"));
        let mut facts = self.facts.borrow_mut();
        assert!(!facts.acked.contains(&body), "{body} came back after its acknowledgement");
        assert!(!facts.never.contains(&body), "{body} was rolled back, recalled or not decided");
        let due = facts.due.get(&body).copied().unwrap_or(0);
        assert!(due <= self.clock.now().0, "{body} is early");
        if m.topic == name(ORDERED) || attempt == 1 {
            let place = (system.queue_id, system.queue_offset());
            let first = *facts.places.entry(body.clone()).or_insert(place);
            assert_eq!(first, place, "{body} is there twice");
        }
        facts.received.insert(body.clone());
        body
    }

    /// As real clients do: again until it is confirmed, or the handle is no good any more.
    async fn ack(&self, client: &str, (topic, group): (&str, &str), m: v2::Message, body: &str) -> bool {
        let system = m.system_properties.expect("set");
        let entry = v2::AckMessageEntry {
            receipt_handle: system.receipt_handle().into(),
            message_id: system.message_id,
            lite_topic: None,
        };
        let request = v2::AckMessageRequest { group: name(group), topic: name(topic), entries: vec![entry] };
        loop {
            self.facts.borrow_mut().asked.insert(body.to_owned());
            let reply =
                self.front.ack_message(by(client, request.clone())).await.expect("gRPC OK").into_inner();
            let code = reply.status.map_or(v2::Code::Unspecified, |s| s.code());
            self.note(format!("{client} ack {body} {}", code.as_str_name()));
            match code {
                v2::Code::Ok => {
                    self.facts.borrow_mut().acked.insert(body.to_owned());
                    return true;
                }
                v2::Code::InvalidReceiptHandle => return false,
                _ => sleep(Duration::from_millis(200)).await,
            }
        }
    }
}
