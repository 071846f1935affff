//! A cluster in one process: the two ways to call a broker pass one suite, and the seeded simulation.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use apis::brokers::Brokers;
use apis::context::CallContext;
use apis::internal::broker_service_server::BrokerServiceServer;
use apis::internal::*;
use apis::remote::{Dial, RemoteBrokers};
use apis::status::Error;
use apis::v2::Code;
use broker::LocalBrokers;
use model::SystemClock;
use store::FlushMode;
use tests::cluster::broker;
use tests::sim;
use tokio_stream::wrappers::TcpListenerStream;

const A: &str = "broker-a";

fn context() -> CallContext {
    CallContext { client_id: "c".into(), ..CallContext::internal() }
}

fn append(topic: &str, body: &str) -> AppendRequest {
    let message = AppendMessage {
        queue_id: 0,
        body: body.as_bytes().to_vec().into(),
        properties: format!("UNIQ_KEY\u{1}id\u{2}TAGS\u{1}a\u{2}KEYS\u{1}key-of-{body}\u{2}")
            .into_bytes()
            .into(),
        born_host: apis::convert::address::to_wire(([127, 0, 0, 1], 1).into()),
        ..Default::default()
    };
    AppendRequest { topic: topic.into(), messages: vec![message] }
}

fn pop(tags: &str, poll_ms: i64) -> PopRequest {
    PopRequest {
        group: "g".into(),
        topic: "t".into(),
        max_messages: 4,
        invisible_ms: 60_000,
        poll_ms,
        tags: tags.into(),
        ..Default::default()
    }
}

/// What every `Brokers` must do.
async fn conformance(brokers: impl Brokers) {
    let c = context();
    let code = |e: Error| e.code;
    assert_eq!(
        brokers.append("nobody", &c, append("t", "x")).await.map_err(code).unwrap_err(),
        Code::NotFound
    );
    assert_eq!(brokers.append(A, &c, append("t", "x")).await.map_err(code).unwrap_err(), Code::TopicNotFound);
    let put = PutMetadataRequest {
        topics: vec![TopicConfig { name: "t".into(), queues: 1, types: vec![1], version: 2, deleted: false }],
        groups: vec![GroupConfig {
            name: "g".into(),
            fifo: false,
            max_attempts: 2,
            version: 1,
            deleted: false,
            backoff: None,
        }],
    };
    brokers.put_metadata(A, &c, put.clone()).await.unwrap();
    let mut older = put.clone();
    older.topics[0].version = 1;
    older.topics[0].queues = 9;
    brokers.put_metadata(A, &c, older).await.unwrap();
    let metadata = brokers.metadata(A, &c, MetadataRequest {}).await.unwrap();
    assert_eq!(
        (metadata.broker.as_str(), &metadata.topics[..]),
        (A, &put.topics[..]),
        "the higher version stays"
    );

    // A waiting consumer is woken; what does not match its filter is not for it.
    let waiting = {
        let (b, c) = (brokers.clone(), CallContext { deadline: None, ..c.clone() });
        tokio::spawn(async move { b.pop(A, &c, pop("a", 20_000)).await })
    };
    let stored = brokers.append(A, &c, append("t", "one")).await.unwrap();
    assert_eq!((stored.results[0].queue_id, stored.results[0].queue_offset), (0, 0));
    let popped = waiting.await.unwrap().unwrap();
    assert_eq!(popped.messages.len(), 1);
    let one = &popped.messages[0];
    assert_eq!((&one.body[..], one.attempt, one.topic.as_str()), (&b"one"[..], 1, "t"));
    assert!(brokers.pop(A, &c, pop("*", 0)).await.unwrap().messages.is_empty(), "it is invisible");

    // Given back, it comes again with the attempt counted; acknowledged, it is gone.
    let change = ChangeInvisibleRequest {
        group: "g".into(),
        topic: "t".into(),
        handle: one.handle.clone(),
        invisible_ms: 0,
    };
    let changed = brokers.change_invisible(A, &c, change).await.unwrap();
    assert_ne!(changed.handle, one.handle);
    let slow = CallContext { deadline: None, ..c.clone() };
    let again = brokers.pop(A, &slow, pop("*", 5_000)).await.unwrap();
    assert_eq!((again.messages[0].attempt, &again.messages[0].body[..]), (2, &b"one"[..]));
    let handles = vec![again.messages[0].handle.clone(), "rubbish".into(), one.handle.clone()];
    let ack = AckRequest { group: "g".into(), topic: "t".into(), handles };
    let acked = brokers.ack(A, &c, ack).await.unwrap();
    use AckResult::*;
    assert_eq!(acked.results, [AckOk as i32, AckInvalidHandle as i32, AckExpired as i32]);

    // The second failure is the last: a dead letter.
    brokers.append(A, &c, append("t", "two")).await.unwrap();
    for attempt in 1..=2 {
        let popped = brokers.pop(A, &slow, pop("*", 5_000)).await.unwrap();
        assert_eq!(popped.messages[0].attempt, attempt);
        let handle = popped.messages[0].handle.clone();
        let change = ChangeInvisibleRequest { group: "g".into(), topic: "t".into(), handle, invisible_ms: 0 };
        brokers.change_invisible(A, &c, change).await.unwrap();
    }
    let read = ReadRequest { topic: "%DLQ%g".into(), queue_id: 0, offset: 0, max_messages: 9 };
    let mut dead = brokers.read(A, &c, read.clone()).await.unwrap().messages;
    while dead.is_empty() {
        assert!(brokers.pop(A, &c, pop("*", 200)).await.unwrap().messages.is_empty(), "not delivered again");
        dead = brokers.read(A, &c, read.clone()).await.unwrap().messages;
    }
    assert_eq!(&dead[0].body[..], b"two");
    let lag = brokers.group_lag(A, &c, GroupLagRequest { group: "g".into() }).await.unwrap();
    assert!(lag.queues.iter().all(|q| q.committed == q.max_offset && q.in_flight == 0), "{lag:?}");
    // Found by key and by time, also before any checkpoint.
    let query = |key: &str, from_ms| QueryRequest {
        topic: "t".into(),
        key: key.into(),
        from_ms,
        to_ms: 0,
        max_messages: 9,
    };
    let found = brokers.query(A, &c, query("key-of-two", 0)).await.unwrap();
    assert_eq!(found.messages.iter().map(|m| &m.body[..]).collect::<Vec<_>>(), [b"two"]);
    assert_eq!(brokers.query(A, &c, query("", 1)).await.unwrap().messages.len(), 2, "by time alone");
    assert!(brokers.query(A, &c, query("", i64::MAX - 1)).await.unwrap().messages.is_empty());
    let state = brokers.store_state(A, &c, StoreStateRequest { prune: true }).await.unwrap();
    assert!(state.log_end > state.log_start && state.broker == A, "{state:?}");
    let nobody = brokers.group_lag(A, &c, GroupLagRequest { group: "h".into() }).await;
    assert_eq!(nobody.map_err(code).unwrap_err(), Code::ConsumerGroupNotFound);

    // A deadline bounds a call that waits.
    let short = CallContext { deadline: Some(Duration::from_millis(100)), ..c.clone() };
    let brief = PopRequest { invisible_ms: 1_000, ..pop("*", 20_000) };
    assert_eq!(brokers.pop(A, &short, brief).await.map_err(code).unwrap_err(), Code::ProxyTimeout);

    // A caller that went away (also the one above) loses nothing: the next one gets the message, at the latest after
    // its invisible time (an answer can be on the wire when the caller goes).
    let gone = {
        let (b, c) = (brokers.clone(), slow.clone());
        let request = PopRequest { invisible_ms: 1_000, ..pop("*", 20_000) };
        tokio::spawn(async move { b.pop(A, &c, request).await })
    };
    tokio::task::yield_now().await;
    gone.abort();
    let _ = gone.await;
    brokers.append(A, &c, append("t", "three")).await.unwrap();
    let popped = brokers.pop(A, &slow, pop("*", 5_000)).await.unwrap();
    assert_eq!(&popped.messages[0].body[..], b"three");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_brokers_conform() {
    for flush in [FlushMode::Async, FlushMode::Sync] {
        let node = broker(A, SystemClock, flush).unwrap();
        conformance(LocalBrokers::new([node.broker().clone()])).await;
        node.drain().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn remote_brokers_conform() {
    let node = broker(A, SystemClock, FlushMode::Async).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let service = BrokerServiceServer::new(node.broker().clone());
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let dial: Dial<_> =
        Arc::new(|a| runtime::net::dial(a).map_err(|e| Error::new(Code::BadRequest, e.to_string())));
    let brokers = RemoteBrokers::new(dial);
    brokers.set_addresses([(A, address.as_str())].into_iter()).unwrap();
    conformance(brokers).await;
}

#[test]
fn simulated_worlds_keep_their_promises() {
    let seeds: u64 = std::env::var("FERRY_SIM_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(20);
    let first: u64 = std::env::var("FERRY_SIM_FIRST").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    for seed in first..first + seeds {
        sim::run(seed);
    }
}

#[test]
fn same_seed_same_trace() {
    let first = sim::run(4711);
    assert_eq!(first, sim::run(4711));
    assert_ne!(first, sim::run(4712));
    assert!(first.iter().any(|line| line.contains("PROXY_TIMEOUT")), "the network loses something");
}

/// A broker that missed a topic, or is new, is told of it by any proxy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_lacks_a_topic_is_told_of_it() {
    use apis::brokers::NameServers;
    let names = namesrv::LocalNameServer::new(SystemClock);
    let (old, new) =
        (broker(A, SystemClock, FlushMode::Async), broker("broker-b", SystemClock, FlushMode::Async));
    let (old, new) = (old.unwrap(), new.unwrap());
    let brokers = LocalBrokers::new([old.broker().clone(), new.broker().clone()]);
    let put = PutMetadataRequest {
        topics: vec![TopicConfig { name: "t".into(), queues: 3, types: vec![1], version: 4, deleted: false }],
        groups: vec![GroupConfig {
            name: "g".into(),
            fifo: false,
            max_attempts: 2,
            version: 1,
            deleted: false,
            backoff: None,
        }],
    };
    brokers.put_metadata(A, &context(), put.clone()).await.unwrap();
    for node in [&old, &new] {
        broker::register::register(node.broker(), &node.identity("x:1".into()), &names, None).await.unwrap();
    }
    let routes = Arc::new(proxy::routes::Routes::new(brokers.clone(), names.clone(), Arc::new(|_| {})));
    let stop = tokio_util::sync::CancellationToken::new();
    let (running, stopped) = (routes.clone(), stop.clone());
    let task = tokio::spawn(async move { running.run(stopped).await });
    let told = async {
        while brokers.metadata("broker-b", &context(), MetadataRequest {}).await.unwrap().topics.is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), told).await.expect("it is told");
    let metadata = brokers.metadata("broker-b", &context(), MetadataRequest {}).await.unwrap();
    assert_eq!((&metadata.topics, &metadata.groups), (&put.topics, &put.groups));
    // Once it has registered what it was told, both brokers are on the route.
    broker::register::register(new.broker(), &new.identity("x:1".into()), &names, None).await.unwrap();
    assert_eq!(names.route(RouteRequest { topic: "t".into() }).await.unwrap().brokers.len(), 2);
    // The same with a deletion that it missed: the topic does not come back through it.
    let gone = TopicConfig { version: 5, deleted: true, ..metadata_topic(&put) };
    brokers
        .put_metadata(A, &context(), PutMetadataRequest { topics: vec![gone], ..Default::default() })
        .await
        .unwrap();
    broker::register::register(old.broker(), &old.identity("x:1".into()), &names, None).await.unwrap();
    let told = async {
        let deleted = |m: MetadataReply| m.topics.iter().all(|t| t.deleted);
        while !deleted(brokers.metadata("broker-b", &context(), MetadataRequest {}).await.unwrap()) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), told).await.expect("it is told");
    stop.cancel();
    task.await.unwrap();
}

fn metadata_topic(put: &PutMetadataRequest) -> TopicConfig {
    put.topics[0].clone()
}

/// A topic that was created a moment ago stays, though a name server that has not heard of it brings other news.
#[tokio::test]
async fn a_topic_just_created_is_not_forgotten() {
    let names = namesrv::LocalNameServer::new(SystemClock);
    let a = broker(A, SystemClock, FlushMode::Async).unwrap();
    let b = broker("broker-b", SystemClock, FlushMode::Async).unwrap();
    let brokers = LocalBrokers::new([a.broker().clone(), b.broker().clone()]);
    broker::register::register(a.broker(), &a.identity("x:1".into()), &names, None).await.unwrap();
    let routes = proxy::routes::Routes::new(brokers, names.clone(), Arc::new(|_| {}));
    routes.refresh().await.unwrap();
    let topic = TopicConfig { name: "t".into(), queues: 3, types: vec![1], version: 1, deleted: false };
    routes.put(&context(), PutMetadataRequest { topics: vec![topic], ..Default::default() }).await.unwrap();
    broker::register::register(b.broker(), &b.identity("x:2".into()), &names, None).await.unwrap();
    let view = routes.refresh().await.unwrap();
    assert_eq!(view.brokers.len(), 2, "other news came");
    assert!(view.topic(&model::Topic::stored("t")).is_some());
}
