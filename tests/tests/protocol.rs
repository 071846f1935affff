//! The real proxy, asked raw: every row of what Apache RocketMQ 5.5.0 was observed to answer that concerns what is
//! built, and every limit for NORMAL messages. Rows have the names of the observation.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;

use apis::admin::PutTopicRequest;
use apis::v2::telemetry_command::Command;
use apis::v2::*;
use tests::client::*;
use tests::cluster::Served;
use tokio_stream::StreamExt;

const CLIENT: &str = "test@1@1@x";

/// A proxy with the observation's topics, and a producer and a consumer that sent their settings.
async fn served() -> (Served, Client) {
    let served = Served::start(false).await;
    let mut admin = admin(served.port).await;
    for (name, kind) in [("p-n", 1), ("p-f", 2), ("p-d", 3), ("p-t", 4)] {
        let topic = apis::internal::TopicConfig {
            name: name.into(),
            queues: 2,
            types: vec![kind],
            ..Default::default()
        };
        admin.put_topic(PutTopicRequest { topic: Some(topic), create_only: true }).await.expect("created");
    }
    let mixed = apis::internal::TopicConfig {
        name: "p-m".into(),
        queues: 2,
        types: vec![1, 2, 3, 4],
        ..Default::default()
    };
    admin.put_topic(PutTopicRequest { topic: Some(mixed), create_only: true }).await.expect("created");
    put_group(served.port, "pg").await;
    let client = connect(served.port).await;
    (served, client)
}

async fn put_group(port: u16, name: &str) {
    let config = apis::internal::GroupConfig {
        name: name.into(),
        fifo: false,
        max_attempts: 17,
        ..Default::default()
    };
    let request = apis::admin::PutGroupRequest { group: Some(config), create_only: true };
    admin(port).await.put_group(request).await.expect("created");
}

fn settings(client_type: Option<ClientType>, pub_sub: Option<settings::PubSub>) -> Settings {
    Settings {
        client_type: client_type.map(Into::into),
        access_point: endpoints(),
        request_timeout: Some(seconds(3)),
        pub_sub,
        ..Default::default()
    }
}

fn publishing(topic: &str) -> Option<settings::PubSub> {
    let topics = name(topic).into_iter().collect();
    Some(settings::PubSub::Publishing(Publishing { topics, ..Default::default() }))
}

fn subscription(group: &str, topic: &str) -> Option<settings::PubSub> {
    let expression = Some(FilterExpression { r#type: FilterType::Tag.into(), expression: "*".into() });
    let subscriptions = vec![SubscriptionEntry { topic: name(topic), expression }];
    Some(settings::PubSub::Subscription(Subscription {
        group: name(group),
        subscriptions,
        ..Default::default()
    }))
}

/// Sends settings; what comes back first.
async fn telemetry(
    client: &mut Client,
    id: &str,
    settings: Settings,
) -> Result<TelemetryCommand, tonic::Status> {
    let command = TelemetryCommand { status: None, command: Some(Command::Settings(settings)) };
    // The stream stays open on the client's side, as with real clients.
    let commands = tokio_stream::once(command).chain(tokio_stream::pending());
    let mut stream = client.telemetry(by(id, commands)).await?.into_inner();
    stream.message().await.map(|m| m.expect("an answer"))
}

fn code(status: Option<Status>) -> Code {
    let status = status.expect("every answer has a status");
    assert!(!status.message.is_empty(), "a status has a text");
    status.code()
}

#[tokio::test]
async fn route() {
    let (_served, mut client) = served().await;
    let long = "x".repeat(128);
    let rows = [
        ("route.ok", "p-n", CLIENT, Code::Ok),
        ("route.unknown", "no-such-topic", CLIENT, Code::TopicNotFound),
        ("route.empty", "", CLIENT, Code::IllegalTopic),
        ("route.illegal-char", "a b", CLIENT, Code::IllegalTopic),
        ("route.too-long", &long, CLIENT, Code::IllegalTopic),
        ("route.127", &long[1..], CLIENT, Code::TopicNotFound),
        ("route.system", "TBW102", CLIENT, Code::IllegalTopic),
        ("route.system (own)", "rmq_sys_ferry_changes", CLIENT, Code::IllegalTopic),
        ("route.retry-topic", "%RETRY%pg", CLIENT, Code::TopicNotFound),
        ("route.dlq", "%DLQ%pg", CLIENT, Code::TopicNotFound),
        ("route.no-client-id", "p-n", "", Code::ClientIdRequired),
    ];
    for (row, topic, id, want) in rows {
        let request = QueryRouteRequest { topic: name(topic), endpoints: endpoints() };
        let reply = client.query_route(by(id, request)).await.expect("gRPC OK").into_inner();
        assert_eq!(code(reply.status), want, "{row}");
    }
    let request = QueryRouteRequest { topic: name("p-n"), endpoints: endpoints() };
    let reply = client.query_route(by(CLIENT, request)).await.unwrap().into_inner();
    assert_eq!(reply.message_queues.len(), 2);
    for (id, queue) in reply.message_queues.iter().enumerate() {
        assert_eq!(queue.id, id as i32);
        assert_eq!(queue.permission(), Permission::ReadWrite);
        assert_eq!(queue.accept_message_types, [MessageType::Normal as i32]);
        let broker = queue.broker.as_ref().unwrap();
        assert_eq!(broker.id, 0);
        assert_eq!(broker.endpoints, endpoints(), "what the client dialled, port included");
    }
    let request = QueryRouteRequest { topic: name("p-n"), endpoints: None };
    let reply = client.query_route(by(CLIENT, request)).await.unwrap().into_inner();
    assert_eq!(code(reply.status), Code::Ok, "route.no-endpoints");
    let given = reply.message_queues[0].broker.clone().unwrap().endpoints.unwrap();
    assert_eq!(given.scheme(), AddressScheme::IPv4);
    assert_eq!(given.addresses[0].host, "127.0.0.1");
}

#[tokio::test]
async fn settings_are_answered() {
    let (served, mut client) = served().await;
    let said = settings(Some(ClientType::Producer), publishing("p-n"));
    let answer = telemetry(&mut client, "p", said.clone()).await.unwrap();
    assert_eq!(code(answer.status), Code::Ok, "telemetry.producer");
    let Some(Command::Settings(got)) = answer.command else { panic!("no settings") };
    let Some(settings::PubSub::Publishing(publishing_)) = &got.pub_sub else { panic!("not a producer") };
    assert_eq!((publishing_.max_body_size, publishing_.validate_message_type), (4_194_304, true));
    assert_eq!(publishing_.topics, name("p-n").into_iter().collect::<Vec<_>>());
    let policy = got.backoff_policy.unwrap();
    assert_eq!(policy.max_attempts, 3);
    assert!(matches!(policy.strategy, Some(retry_policy::Strategy::ExponentialBackoff(_))));
    assert_eq!((got.access_point, got.request_timeout), (said.access_point, said.request_timeout), "echoed");

    for kind in [ClientType::PushConsumer, ClientType::SimpleConsumer] {
        let answer =
            telemetry(&mut client, "c", settings(Some(kind), subscription("pg", "p-n"))).await.unwrap();
        assert_eq!(code(answer.status), Code::Ok, "telemetry.push, telemetry.simple");
        let Some(Command::Settings(got)) = answer.command else { panic!("no settings") };
        let Some(settings::PubSub::Subscription(subscription)) = &got.pub_sub else {
            panic!("not a consumer")
        };
        assert_eq!(subscription.fifo, Some(false));
        assert_eq!(subscription.receive_batch_size, Some(32));
        assert_eq!(subscription.long_polling_timeout, Some(seconds(20)));
        assert_eq!(
            (subscription.lite_subscription_quota, subscription.max_lite_topic_size),
            (Some(2000), Some(64))
        );
        let policy = got.backoff_policy.unwrap();
        assert_eq!(policy.max_attempts, 17);
        let Some(retry_policy::Strategy::CustomizedBackoff(backoff)) = policy.strategy else {
            panic!("no backoff")
        };
        assert_eq!(backoff.next.len(), 18);
    }
    let ok = |command: TelemetryCommand| code(command.status);
    let unknown_topic = settings(Some(ClientType::Producer), publishing("no-such-topic"));
    assert_eq!(ok(telemetry(&mut client, "p", unknown_topic).await.unwrap()), Code::Ok);
    assert_eq!(ok(telemetry(&mut client, "p", settings(None, publishing("p-n"))).await.unwrap()), Code::Ok);
    let neither = telemetry(&mut client, "p", settings(Some(ClientType::Producer), None)).await.unwrap_err();
    assert_eq!(neither.code(), tonic::Code::InvalidArgument, "telemetry.neither-pub-nor-sub");
    let no_id =
        telemetry(&mut client, "", settings(Some(ClientType::Producer), publishing("p-n"))).await.unwrap();
    assert_eq!(ok(no_id), Code::ClientIdRequired);

    // telemetry.unknown-group: the stream stays open, and goes on once the group exists.
    let (commands, receiver) = tokio::sync::mpsc::channel(4);
    let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut answers = client.telemetry(by("late", stream)).await.unwrap().into_inner();
    let said = settings(Some(ClientType::SimpleConsumer), subscription("later", "p-n"));
    let command = TelemetryCommand { status: None, command: Some(Command::Settings(said)) };
    commands.send(command.clone()).await.unwrap();
    assert_eq!(ok(answers.message().await.unwrap().unwrap()), Code::ConsumerGroupNotFound);
    put_group(served.port, "later").await;
    commands.send(command).await.unwrap();
    assert_eq!(ok(answers.message().await.unwrap().unwrap()), Code::Ok);
}

#[tokio::test]
async fn heartbeat_and_termination() {
    let (_served, mut client) = served().await;
    telemetry(&mut client, "p", settings(Some(ClientType::Producer), publishing("p-n"))).await.unwrap();
    telemetry(&mut client, "untyped", settings(None, publishing("p-n"))).await.unwrap();
    telemetry(&mut client, "c", settings(Some(ClientType::SimpleConsumer), subscription("pg", "p-n")))
        .await
        .unwrap();
    let rows = [
        ("heartbeat.producer", "p", None, Code::Ok),
        ("heartbeat.simple", "c", name("pg"), Code::Ok),
        ("heartbeat.no-type", "untyped", None, Code::UnrecognizedClientType),
        ("heartbeat.unsettled-client", "nobody", name("pg"), Code::UnrecognizedClientType),
        ("heartbeat.unknown-group", "c", name("no-such-group"), Code::IllegalConsumerGroup),
        ("heartbeat.no-group", "c", None, Code::IllegalConsumerGroup),
    ];
    for (row, id, group, want) in rows {
        let request = HeartbeatRequest { group, client_type: ClientType::SimpleConsumer.into() };
        let reply = client.heartbeat(by(id, request)).await.unwrap().into_inner();
        assert_eq!(code(reply.status), want, "{row}");
    }
    for (row, id, want) in [
        ("terminate.ok", "c", Code::Ok),
        ("terminate.unknown", "c", Code::UnrecognizedClientType),
        ("terminate.no-client-id", "", Code::ClientIdRequired),
    ] {
        let request = NotifyClientTerminationRequest { group: name("pg") };
        let reply = client.notify_client_termination(by(id, request)).await.unwrap().into_inner();
        assert_eq!(code(reply.status), want, "{row}");
    }
}

type Edit = Box<dyn Fn(&mut Message)>;

fn system(edit: impl Fn(&mut SystemProperties) + 'static) -> Edit {
    Box::new(move |m| edit(m.system_properties.as_mut().expect("set")))
}

fn property(key: &str, value: &str) -> Edit {
    let (key, value) = (key.to_owned(), value.to_owned());
    Box::new(move |m| drop(m.user_properties.insert(key.clone(), value.clone())))
}

fn body(len: usize) -> Edit {
    Box::new(move |m| m.body = vec![7u8; len].into())
}

fn to(topic: &'static str, kind: MessageType, edit: impl Fn(&mut SystemProperties) + 'static) -> Edit {
    Box::new(move |m| {
        m.topic = name(topic);
        let system = m.system_properties.as_mut().expect("set");
        system.message_type = kind.into();
        edit(system);
    })
}

fn properties(n: usize) -> Edit {
    Box::new(move |m| {
        m.user_properties = (0..n).map(|i| (format!("k{i}"), "v".to_owned())).collect::<HashMap<_, _>>()
    })
}

fn in_seconds(s: i64) -> prost_types::Timestamp {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    prost_types::Timestamp { seconds: now.as_secs() as i64 + s, nanos: 0 }
}

fn delayed(s: i64) -> Edit {
    to("p-d", MessageType::Delay, move |system| system.delivery_timestamp = Some(in_seconds(s)))
}

fn send_rows() -> Vec<(&'static str, Edit, Code)> {
    use Code::*;
    let crc = |sum: &'static str| {
        system(move |s| {
            s.body_digest = Some(Digest { r#type: DigestType::Crc32.into(), checksum: sum.into() })
        })
    };
    let normal = MessageType::Normal;
    vec![
        ("send.ok", Box::new(|_| {}), Ok),
        ("send.no-topic", Box::new(|m| m.topic = None), IllegalTopic),
        ("send.unknown-topic", to("no-such-topic", normal, |_| {}), TopicNotFound),
        ("send.illegal-topic", to("a b", normal, |_| {}), IllegalTopic),
        ("send.system-topic", to("TBW102", normal, |_| {}), IllegalTopic),
        ("send.retry-topic", to("%RETRY%pg", normal, |_| {}), IllegalTopic),
        ("send.dlq", to("%DLQ%pg", normal, |_| {}), IllegalTopic),
        ("send.body-empty", body(0), MessageBodyEmpty),
        ("send.body-4MiB", body(4 << 20), Ok),
        ("send.body-4MiB+1", body((4 << 20) + 1), MessageBodyTooLarge),
        ("send.body-16MiB+1", body((16 << 20) + 1), MessageBodyTooLarge),
        ("send.tag-blank", system(|s| s.tag = Some("  ".into())), IllegalMessageTag),
        ("send.tag-bar", system(|s| s.tag = Some("a|b".into())), IllegalMessageTag),
        ("send.tag-ctrl", system(|s| s.tag = Some("a\u{7f}".into())), IllegalMessageTag),
        ("send.tag-long", system(|s| s.tag = Some("t".repeat(16 * 1024 + 1))), MessagePropertiesTooLarge),
        ("send.key-blank", system(|s| s.keys = vec![" ".into()]), IllegalMessageKey),
        ("send.key-space", system(|s| s.keys = vec!["a b".into()]), Ok),
        ("send.key-ctrl", system(|s| s.keys = vec!["a\u{1}".into()]), IllegalMessageKey),
        ("send.key-long", system(|s| s.keys = vec!["k".repeat(16 * 1024 + 1)]), MessagePropertiesTooLarge),
        ("send.prop-count-129", properties(129), MessagePropertiesTooLarge),
        ("send.prop-count-128", properties(128), Ok),
        ("send.prop-16KiB", property("k", &"v".repeat(16 * 1024 - 1)), Ok),
        ("send.prop-16KiB+1", property("k", &"v".repeat(16 * 1024)), MessagePropertiesTooLarge),
        ("send.prop-reserved", property("KEYS", "x"), IllegalMessagePropertyKey),
        (
            "send.prop-reserved (multi dispatch)",
            property("INNER_MULTI_DISPATCH", "x"),
            IllegalMessagePropertyKey,
        ),
        ("send.prop-reserved (own)", property("FERRY_MOVED_FROM", "t 0 0"), IllegalMessagePropertyKey),
        ("send.prop-ctrl-key", property("a\u{2}", "x"), IllegalMessagePropertyKey),
        ("send.prop-ctrl-value", property("a", "x\u{9f}"), IllegalMessagePropertyKey),
        ("send.prop-empty-key", property("", "x"), IllegalMessagePropertyKey),
        ("send.no-message-id", system(|s| s.message_id = " ".into()), IllegalMessageId),
        ("send.odd-message-id", system(|s| s.message_id = "odd".into()), Ok),
        ("send.type-unspecified", system(|s| s.message_type = 0), Ok),
        ("send.normal-to-fifo", to("p-f", normal, |_| {}), MessagePropertyConflictWithType),
        (
            "send.fifo-to-normal",
            to("p-n", MessageType::Fifo, |s| s.message_group = Some("g".into())),
            MessagePropertyConflictWithType,
        ),
        (
            "send.delay-to-normal",
            to("p-n", MessageType::Delay, |s| s.delivery_timestamp = Some(in_seconds(3600))),
            MessagePropertyConflictWithType,
        ),
        ("send.tx-to-normal", to("p-n", MessageType::Transaction, |_| {}), MessagePropertyConflictWithType),
        ("send.fifo-no-group", to("p-f", MessageType::Fifo, |_| {}), MessagePropertyConflictWithType),
        ("send.fifo-blank-group", system(|s| s.message_group = Some(" ".into())), IllegalMessageGroup),
        ("send.fifo-group-65", system(|s| s.message_group = Some("g".repeat(65))), IllegalMessageGroup),
        ("send.fifo-group-64", system(|s| s.message_group = Some("g".repeat(64))), IllegalMessageGroup),
        (
            "send.fifo-and-delay",
            to("p-f", MessageType::Fifo, |s| {
                s.message_group = Some("g".into());
                s.delivery_timestamp = Some(in_seconds(3600));
            }),
            MessagePropertyConflictWithType,
        ),
        ("send.delay-no-timestamp", to("p-d", MessageType::Delay, |_| {}), MessagePropertyConflictWithType),
        ("send.fifo-ok", to("p-f", MessageType::Fifo, |s| s.message_group = Some("g".into())), Ok),
        ("send.delay-ok", delayed(3600), Ok),
        ("send.delay-past", delayed(-3600), Ok),
        ("send.delay-25h", delayed(25 * 3600), Ok),
        ("send.delay-4d", delayed(4 * 24 * 3600), Ok),
        ("send.delay (40 days)", delayed(40 * 24 * 3600 - 60), Ok),
        ("send.delay (over 40 days)", delayed(40 * 24 * 3600 + 60), IllegalDeliveryTime),
        (
            "send.delay (far beyond)",
            to("p-d", MessageType::Delay, |s| {
                s.delivery_timestamp = Some(prost_types::Timestamp { seconds: i64::MAX, nanos: i32::MAX })
            }),
            IllegalDeliveryTime,
        ),
        (
            "send.fifo-and-delay (mixed topic)",
            to("p-m", MessageType::Delay, |s| {
                s.message_group = Some("g".into());
                s.delivery_timestamp = Some(in_seconds(60));
            }),
            MessagePropertyConflictWithType,
        ),
        (
            "send.tx-and-fifo",
            to("p-m", MessageType::Transaction, |s| s.message_group = Some("g".into())),
            MessagePropertyConflictWithType,
        ),
        (
            "send.tx-and-delay",
            to("p-t", MessageType::Transaction, |s| s.delivery_timestamp = Some(in_seconds(60))),
            Ok,
        ),
        ("send.tx-ok", to("p-t", MessageType::Transaction, |_| {}), Ok),
        (
            "send.tx-recovery-1h",
            to("p-t", MessageType::Transaction, |s| {
                s.orphaned_transaction_recovery_duration = Some(seconds(3600))
            }),
            Ok,
        ),
        (
            "send.tx-recovery-1h+1s",
            to("p-t", MessageType::Transaction, |s| {
                s.orphaned_transaction_recovery_duration = Some(seconds(3601))
            }),
            BadRequest,
        ),
        ("send.normal-to-mixed", to("p-m", normal, |_| {}), Ok),
        ("send.fifo-to-mixed", to("p-m", MessageType::Fifo, |s| s.message_group = Some("g".into())), Ok),
        (
            "send.delay-to-mixed",
            to("p-m", MessageType::Delay, |s| s.delivery_timestamp = Some(in_seconds(60))),
            Ok,
        ),
        ("send.tx-to-mixed", to("p-m", MessageType::Transaction, |_| {}), Ok),
        ("send.gzip-flag", system(|s| s.body_encoding = Encoding::Gzip.into()), Ok),
        ("send.crc-wrong", crc("DEADBEEF"), MessageCorrupted),
        ("send.crc-hex", crc("3610A686"), Ok),
        ("send.crc-decimal", crc("907060870"), Ok),
    ]
}

#[tokio::test]
async fn send() {
    let (_served, mut client) = served().await;
    for (row, edit, want) in send_rows() {
        let mut m = message("p-n", b"hello");
        edit(&mut m);
        let id = m.system_properties.clone().unwrap().message_id;
        let request = SendMessageRequest { messages: vec![m] };
        let reply = client
            .send_message(by(CLIENT, request))
            .await
            .unwrap_or_else(|e| panic!("{row}: {e}"))
            .into_inner();
        if want == Code::Ok {
            assert_eq!(reply.entries.len(), 1, "{row}: one entry a message");
            assert_eq!(reply.entries[0].message_id, id, "{row}");
            assert_eq!(code(reply.entries[0].status.clone()), Code::Ok, "{row}");
        }
        assert_eq!(code(reply.status), want, "{row}");
    }
    let many = |messages| SendMessageRequest { messages };
    let rows = [
        ("send.empty-list", CLIENT, many(vec![]), Code::MessageCorrupted),
        ("send.two-ok", CLIENT, many(vec![message("p-n", b"1"), message("p-n", b"2")]), Code::Ok),
        (
            "send.two-topics",
            CLIENT,
            many(vec![message("p-n", b"1"), message("p-f", b"2")]),
            Code::MessageCorrupted,
        ),
        ("send.no-client-id", "", many(vec![message("p-n", b"1")]), Code::ClientIdRequired),
    ];
    for (row, id, request, want) in rows {
        let count = request.messages.len();
        let reply = client.send_message(by(id, request)).await.unwrap().into_inner();
        assert_eq!(code(reply.status), want, "{row}");
        if want == Code::Ok {
            assert_eq!(reply.entries.len(), count, "{row}");
        }
    }
}

async fn feed(client: &mut Client, count: usize) {
    for i in 0..count {
        let request = SendMessageRequest { messages: vec![message("p-n", format!("m{i}").as_bytes())] };
        let reply = client.send_message(by(CLIENT, request)).await.unwrap().into_inner();
        assert_eq!(code(reply.status), Code::Ok);
    }
}

#[tokio::test]
async fn receive_rows() {
    let (_served, mut client) = served().await;
    type Change = fn(&mut ReceiveMessageRequest);
    let rows: Vec<(&str, Change, Code)> = vec![
        ("receive.empty-group", |r| r.group = None, Code::IllegalConsumerGroup),
        ("receive.illegal-group", |r| r.group = name("a b"), Code::IllegalConsumerGroup),
        ("receive.unknown-group", |r| r.group = name("no-such-group"), Code::ConsumerGroupNotFound),
        (
            "receive.unknown-topic",
            |r| r.message_queue.as_mut().unwrap().topic = name("none"),
            Code::TopicNotFound,
        ),
        (
            "receive.unknown-broker",
            |r| r.message_queue.as_mut().unwrap().broker.as_mut().unwrap().name = "b9".into(),
            Code::NotFound,
        ),
        ("receive.inv-0", |r| r.invisible_duration = Some(seconds(0)), Code::IllegalInvisibleTime),
        ("receive.inv-1s", |r| r.invisible_duration = Some(seconds(1)), Code::IllegalInvisibleTime),
        ("receive.inv-9s", |r| r.invisible_duration = Some(seconds(9)), Code::IllegalInvisibleTime),
        ("receive.inv-13h", |r| r.invisible_duration = Some(seconds(13 * 3600)), Code::IllegalInvisibleTime),
        ("receive.no-inv", |r| r.invisible_duration = None, Code::IllegalInvisibleTime),
        ("receive.batch-0", |r| r.batch_size = 0, Code::BadRequest),
        ("receive.batch-neg", |r| r.batch_size = -1, Code::BadRequest),
        (
            "receive.tag-a|b",
            |r| r.filter_expression.as_mut().unwrap().expression = "a|b".into(),
            Code::IllegalFilterExpression,
        ),
        (
            "receive.tag-bars",
            |r| r.filter_expression.as_mut().unwrap().expression = "||".into(),
            Code::IllegalFilterExpression,
        ),
        (
            "receive.sql-empty",
            |r| {
                r.filter_expression =
                    Some(FilterExpression { r#type: FilterType::Sql.into(), expression: String::new() })
            },
            Code::IllegalFilterExpression,
        ),
        (
            "receive.sql (later)",
            |r| {
                r.filter_expression =
                    Some(FilterExpression { r#type: FilterType::Sql.into(), expression: "a=1".into() })
            },
            Code::NotImplemented,
        ),
    ];
    for (row, change, want) in rows {
        let mut request = receive("p-n", "pg");
        change(&mut request);
        let got = drain(&mut client, by(CLIENT, request)).await;
        assert_eq!(got.code(), want, "{row}");
        assert!(got.delivery_timestamp, "{row}: the timestamp comes even after an error");
    }
    let got = drain(&mut client, by("", receive("p-n", "pg"))).await;
    assert_eq!((got.code(), got.delivery_timestamp), (Code::ClientIdRequired, true));

    // receive.no-poll and receive.tag-empty: nothing there, so the call waits for what its deadline leaves.
    let began = std::time::Instant::now();
    let mut request = by(CLIENT, receive("p-n", "pg"));
    request.set_timeout(std::time::Duration::from_secs(3));
    let got = drain(&mut client, request).await;
    assert_eq!((got.code(), got.messages.len()), (Code::MessageNotFound, 0));
    assert!(began.elapsed() < std::time::Duration::from_secs(3), "it answers before the deadline");

    // receive.poll-40s: the deadline does not leave room for it.
    let mut request = receive("p-n", "pg");
    request.long_polling_timeout = Some(seconds(40));
    let mut request = by(CLIENT, request);
    request.set_timeout(std::time::Duration::from_secs(3));
    assert_eq!(drain(&mut client, request).await.code(), Code::IllegalPollingTime);
}

#[tokio::test]
async fn receive_ok_of_an_unsettled_client_and_any_queue() {
    let (_served, mut client) = served().await;
    feed(&mut client, 6).await;
    let mut request = receive("p-n", "pg");
    // receive.queue-99, receive.batch-1000: any queue of the broker, bounded to 32.
    request.message_queue.as_mut().unwrap().id = 99;
    request.batch_size = 1000;
    let got = drain(&mut client, by("never-seen-before", request)).await;
    assert_eq!((got.code(), got.messages.len(), got.delivery_timestamp), (Code::Ok, 6, true));
    for m in &got.messages {
        let s = m.system_properties.as_ref().unwrap();
        let digest = s.body_digest.as_ref().unwrap();
        assert_eq!(digest.r#type(), DigestType::Md5);
        assert!(
            digest.checksum.len() == 32
                && digest.checksum.chars().all(|c| matches!(c, '0'..='9' | 'A'..='F'))
        );
        assert_eq!(s.body_encoding(), Encoding::Identity);
        assert_eq!(s.message_type(), MessageType::Normal);
        assert_eq!(s.delivery_attempt, Some(1));
        assert_eq!(s.message_id, "01C0FFEE0123456789ABCDEF0123456789");
        assert!(s.receipt_handle.is_some() && s.store_timestamp.is_some() && s.queue_offset.is_some());
        assert!(
            m.user_properties.is_empty(),
            "what is the server's own stays there: {:?}",
            m.user_properties
        );
        assert_eq!(m.topic, name("p-n"));
    }
}

#[tokio::test]
async fn a_long_poll_is_woken_by_an_arrival() {
    let (_served, mut client) = served().await;
    let mut waiting = client.clone();
    let poll = tokio::spawn(async move { drain(&mut waiting, by(CLIENT, receive("p-n", "pg"))).await });
    // It is in line once the group has a position.
    loop {
        let lag =
            admin(_served.port).await.group_lag(apis::admin::GroupLagRequest { group: "pg".into() }).await;
        if lag.is_ok() {
            break;
        }
    }
    feed(&mut client, 1).await;
    let got = poll.await.unwrap();
    assert_eq!((got.code(), got.messages.len()), (Code::Ok, 1), "receive.empty-queue-waits");
}

async fn one_handle(client: &mut Client) -> String {
    feed(client, 1).await;
    let got = drain(client, by(CLIENT, receive("p-n", "pg"))).await;
    assert_eq!(got.code(), Code::Ok, "ack.receive");
    got.messages[0].system_properties.clone().unwrap().receipt_handle.unwrap()
}

fn ack(topic: &str, group: &str, handles: &[&str]) -> AckMessageRequest {
    let entry = |handle: &&str| AckMessageEntry {
        message_id: "m".into(),
        receipt_handle: (*handle).to_owned(),
        lite_topic: None,
    };
    AckMessageRequest { group: name(group), topic: name(topic), entries: handles.iter().map(entry).collect() }
}

fn invisible(handle: &str, s: i64) -> ChangeInvisibleDurationRequest {
    ChangeInvisibleDurationRequest {
        group: name("pg"),
        topic: name("p-n"),
        receipt_handle: handle.into(),
        invisible_duration: Some(seconds(s)),
        ..Default::default()
    }
}

#[tokio::test]
async fn acknowledge() {
    let (served, mut client) = served().await;
    put_group(served.port, "other").await;
    let old = one_handle(&mut client).await;
    for (row, s, want) in [("inv.ok", 30, Code::Ok), ("inv.13h", 13 * 3600, Code::IllegalInvisibleTime)] {
        let reply =
            client.change_invisible_duration(by(CLIENT, invisible(&old, s))).await.unwrap().into_inner();
        assert_eq!(reply.receipt_handle.is_empty(), want != Code::Ok, "{row}: a new handle if it went well");
        assert_eq!(code(reply.status), want, "{row}");
    }
    let again = client.change_invisible_duration(by(CLIENT, invisible(&old, 40))).await.unwrap().into_inner();
    assert_eq!(code(again.status), Code::Ok, "inv.old-handle-again");
    let altered = old.replace("1.broker-a.", "1.broker-a.A");
    let rows: Vec<(&str, AckMessageRequest, Code)> = vec![
        ("ack.other-group", ack("p-n", "other", &[&old]), Code::InvalidReceiptHandle),
        ("ack.other-topic", ack("p-f", "pg", &[&old]), Code::InvalidReceiptHandle),
        ("ack.malformed", ack("p-n", "pg", &["rubbish"]), Code::InvalidReceiptHandle),
        ("ack.forged", ack("p-n", "pg", &[&altered]), Code::InvalidReceiptHandle),
        ("ack.unknown-broker", ack("p-n", "pg", &["1.nobody.AAAA"]), Code::InvalidReceiptHandle),
        ("ack.empty", ack("p-n", "pg", &[""]), Code::InvalidReceiptHandle),
        ("ack.unknown-group", ack("p-n", "no-such-group", &["x"]), Code::InvalidReceiptHandle),
        ("ack.no-entries", ack("p-n", "pg", &[]), Code::BadRequest),
        ("ack.old-handle", ack("p-n", "pg", &[&old]), Code::Ok),
        ("ack.again", ack("p-n", "pg", &[&old]), Code::Ok),
        ("ack.some", ack("p-n", "pg", &[&old, "rubbish"]), Code::MultipleResults),
    ];
    for (row, request, want) in rows {
        let count = request.entries.len();
        let reply = client.ack_message(by(CLIENT, request)).await.unwrap().into_inner();
        assert_eq!(code(reply.status), want, "{row}");
        assert_eq!(reply.entries.len(), if want == Code::BadRequest { 0 } else { count }, "{row}");
    }
    for handle in ["rubbish", "", "1.broker-a.AAAA"] {
        let reply =
            client.change_invisible_duration(by(CLIENT, invisible(handle, 30))).await.unwrap().into_inner();
        assert_eq!(code(reply.status), Code::InvalidReceiptHandle, "inv.malformed");
        let request = ForwardMessageToDeadLetterQueueRequest {
            group: name("pg"),
            topic: name("p-n"),
            receipt_handle: handle.into(),
            ..Default::default()
        };
        let reply =
            client.forward_message_to_dead_letter_queue(by(CLIENT, request)).await.unwrap().into_inner();
        assert_eq!(code(reply.status), Code::InvalidReceiptHandle, "dlq.malformed");
    }
}

#[tokio::test]
async fn a_message_given_back_comes_again_and_its_old_handle_is_expired() {
    let (_served, mut client) = served().await;
    let handle = one_handle(&mut client).await;
    let reply =
        client.change_invisible_duration(by(CLIENT, invisible(&handle, 0))).await.unwrap().into_inner();
    assert_eq!(code(reply.status), Code::Ok, "inv.0s");
    let got = drain(&mut client, by(CLIENT, receive("p-n", "pg"))).await;
    let system = got.messages[0].system_properties.clone().unwrap();
    assert_eq!(system.delivery_attempt, Some(2));
    assert_eq!(got.messages[0].topic, name("p-n"), "a retry shows the topic it was sent to");
    let reply = client.ack_message(by(CLIENT, ack("p-n", "pg", &[&handle]))).await.unwrap().into_inner();
    assert_eq!(code(reply.status), Code::InvalidReceiptHandle, "expired.ack");
    let reply =
        client.change_invisible_duration(by(CLIENT, invisible(&handle, 30))).await.unwrap().into_inner();
    assert_eq!(code(reply.status), Code::InvalidReceiptHandle, "expired.inv");
    let new = system.receipt_handle.unwrap();
    let reply = client.ack_message(by(CLIENT, ack("p-n", "pg", &[&new]))).await.unwrap().into_inner();
    assert_eq!(code(reply.status), Code::Ok);
}

#[tokio::test]
async fn a_dead_letter_can_be_consumed() {
    let (_served, mut client) = served().await;
    let handle = one_handle(&mut client).await;
    let request = ForwardMessageToDeadLetterQueueRequest {
        group: name("pg"),
        topic: name("p-n"),
        receipt_handle: handle,
        message_id: "m".into(),
        delivery_attempt: 1,
        max_delivery_attempts: 1,
        lite_topic: None,
    };
    let reply = client.forward_message_to_dead_letter_queue(by(CLIENT, request)).await.unwrap().into_inner();
    assert_eq!(code(reply.status), Code::Ok);
    let route = QueryRouteRequest { topic: name("%DLQ%pg"), endpoints: endpoints() };
    // The name server hears of the new topic with the broker's next sign of life.
    let until = tokio::time::Instant::now() + std::time::Duration::from_secs(5);
    loop {
        let reply = client.query_route(by(CLIENT, route.clone())).await.unwrap().into_inner();
        if code(reply.status) == Code::Ok {
            break;
        }
        assert!(tokio::time::Instant::now() < until, "the dead-letter topic has no route");
        tokio::task::yield_now().await;
    }
    let got = drain(&mut client, by(CLIENT, receive("%DLQ%pg", "pg"))).await;
    let system = got.messages[0].system_properties.clone().unwrap();
    let origin = system.dead_letter_queue.unwrap();
    assert_eq!((origin.topic.as_str(), origin.message_id), ("p-n", system.message_id));
}

#[tokio::test]
async fn assignment() {
    let (_served, mut client) = served().await;
    for (row, topic, group, want) in [
        ("assignment.ok", "p-n", "pg", Code::Ok),
        ("assignment.unknown-topic", "no-such-topic", "pg", Code::TopicNotFound),
        ("assignment.unknown-group", "p-n", "no-such-group", Code::Ok),
    ] {
        let request =
            QueryAssignmentRequest { topic: name(topic), group: name(group), endpoints: endpoints() };
        let reply = client.query_assignment(by(CLIENT, request)).await.unwrap().into_inner();
        assert_eq!(code(reply.status), want, "{row}");
        if want == Code::Ok {
            let queue = reply.assignments[0].message_queue.clone().unwrap();
            assert_eq!((reply.assignments.len(), queue.id), (1, -1), "{row}");
        }
    }
}

#[tokio::test]
async fn what_is_not_built_says_so() {
    let (_served, mut client) = served().await;
    let c = &mut client;
    let replies = [
        c.get_offset(by(CLIENT, GetOffsetRequest::default())).await.unwrap().into_inner().status,
        c.update_offset(by(CLIENT, UpdateOffsetRequest::default())).await.unwrap().into_inner().status,
        c.query_offset(by(CLIENT, QueryOffsetRequest::default())).await.unwrap().into_inner().status,
        c.sync_lite_subscription(by(CLIENT, SyncLiteSubscriptionRequest::default()))
            .await
            .unwrap()
            .into_inner()
            .status,
    ];
    assert!(replies.into_iter().all(|status| code(status) == Code::NotImplemented));
}

#[tokio::test]
async fn namespaces_part_topics_of_one_name() {
    let served = Served::start(true).await;
    let mut client = connect(served.port).await;
    let resource = |namespace: &str, name: &str| {
        Some(Resource { resource_namespace: namespace.into(), name: name.into() })
    };
    let mut m = message("t", b"for a");
    m.topic = resource("a", "t");
    let reply =
        client.send_message(by(CLIENT, SendMessageRequest { messages: vec![m] })).await.unwrap().into_inner();
    assert_eq!(code(reply.status), Code::Ok);

    let mut other = receive("t", "g");
    other.group = resource("b", "g");
    other.message_queue.as_mut().unwrap().topic = resource("b", "t");
    let mut request = by(CLIENT, other);
    request.set_timeout(std::time::Duration::from_secs(3));
    assert_eq!(drain(&mut client, request).await.code(), Code::MessageNotFound);

    // Where the resource leaves it empty, the header counts.
    let mut request = by(CLIENT, receive("t", "g"));
    request.metadata_mut().insert("x-mq-namespace", "a".parse().unwrap());
    let got = drain(&mut client, request).await;
    assert_eq!(got.code(), Code::Ok);
    assert_eq!(got.messages[0].topic, resource("a", "t"));
}

#[tokio::test]
async fn unknown_rpcs_and_frames_that_are_too_large_leave_the_server_unharmed() {
    let (_served, mut client) = served().await;
    let mut m = message("p-n", b"x");
    m.body = vec![0u8; 131 << 20].into();
    let too_large =
        client.send_message(by(CLIENT, SendMessageRequest { messages: vec![m] })).await.unwrap_err();
    assert!(
        matches!(
            too_large.code(),
            tonic::Code::OutOfRange | tonic::Code::ResourceExhausted | tonic::Code::Cancelled
        ),
        "{too_large}"
    );
    let mut grpc = tonic::client::Grpc::new(
        tonic::transport::Endpoint::from_shared(format!("http://127.0.0.1:{}", _served.port))
            .unwrap()
            .connect()
            .await
            .unwrap(),
    );
    grpc.ready().await.unwrap();
    let path = "/apache.rocketmq.v2.MessagingService/NoSuch".parse().unwrap();
    let codec = tonic_prost::ProstCodec::<QueryRouteRequest, QueryRouteResponse>::default();
    let unknown = grpc.unary(by(CLIENT, QueryRouteRequest::default()), path, codec).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::Unimplemented, "rpc.unknown");
    feed(&mut connect(_served.port).await, 1).await;
}

#[tokio::test]
async fn a_lease_that_is_renewed_ends_when_its_client_says_good_bye() {
    let (_served, mut client) = served().await;
    telemetry(&mut client, "push", settings(Some(ClientType::PushConsumer), subscription("pg", "p-n")))
        .await
        .unwrap();
    feed(&mut client, 1).await;
    let mut request = receive("p-n", "pg");
    request.auto_renew = true;
    request.invisible_duration = None;
    let got = drain(&mut client, by("push", request)).await;
    assert_eq!((got.code(), got.messages.len()), (Code::Ok, 1), "with auto_renew the duration is not needed");
    let bye = NotifyClientTerminationRequest { group: name("pg") };
    client.notify_client_termination(by("push", bye)).await.unwrap();
    let got = drain(&mut client, by("other", receive("p-n", "pg"))).await;
    assert_eq!(got.messages[0].system_properties.clone().unwrap().delivery_attempt, Some(2));
}

#[tokio::test]
async fn health_and_reflection() {
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    let served = Served::start(true).await;
    let uri = format!("http://127.0.0.1:{}", served.port);
    let channel = tonic::transport::Endpoint::from_shared(uri).unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    for service in ["", "apache.rocketmq.v2.MessagingService"] {
        let request = tonic_health::pb::HealthCheckRequest { service: service.into() };
        let reply = health.check(request).await.unwrap().into_inner();
        assert_eq!(reply.status(), tonic_health::pb::health_check_response::ServingStatus::Serving);
    }
    let list = MessageRequest::ListServices(String::new());
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut reflection = ServerReflectionClient::new(channel);
    let mut answers =
        reflection.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(services)) =
        answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list of services")
    };
    assert!(services.service.iter().any(|s| s.name == "apache.rocketmq.v2.MessagingService"));
}

async fn send_one(client: &mut Client, topic: &str, edit: impl Fn(&mut SystemProperties)) -> SendResultEntry {
    let mut m = message(topic, b"one");
    edit(m.system_properties.as_mut().unwrap());
    let reply =
        client.send_message(by(CLIENT, SendMessageRequest { messages: vec![m] })).await.unwrap().into_inner();
    assert_eq!(code(reply.status), Code::Ok);
    reply.entries.into_iter().next().unwrap()
}

#[tokio::test]
async fn end_transaction_rows() {
    let (_served, mut client) = served().await;
    let transaction = |s: &mut SystemProperties| s.message_type = MessageType::Transaction.into();
    let sent = send_one(&mut client, "p-t", transaction).await;
    let other = send_one(&mut client, "p-t", transaction).await;
    assert!(!sent.transaction_id.is_empty() && sent.recall_handle.is_empty());
    assert_ne!(sent.transaction_id, other.transaction_id);
    let (commit, rollback) = (TransactionResolution::Commit, TransactionResolution::Rollback);
    let forged = format!("{}x", sent.transaction_id);
    let rows = [
        (
            "tx.unspecified",
            "p-t",
            &*sent.transaction_id,
            TransactionResolution::Unspecified,
            Code::BadRequest,
        ),
        ("tx.no-id", "p-t", "", commit, Code::InvalidTransactionId),
        ("tx.bad-id", "p-t", "no-such-transaction", commit, Code::InvalidTransactionId),
        ("tx.bad-id (forged)", "p-t", &*forged, commit, Code::InvalidTransactionId),
        ("tx.other-topic", "p-m", &*sent.transaction_id, commit, Code::InvalidTransactionId),
        ("tx.commit", "p-t", &*sent.transaction_id, commit, Code::Ok),
        ("tx.commit-again", "p-t", &*sent.transaction_id, commit, Code::Ok),
        ("tx.rollback-after-commit", "p-t", &*sent.transaction_id, rollback, Code::PreconditionFailed),
        ("tx.rollback", "p-t", &*other.transaction_id, rollback, Code::Ok),
        ("tx.commit-after-rollback", "p-t", &*other.transaction_id, commit, Code::PreconditionFailed),
    ];
    for (row, topic, id, resolution, want) in rows {
        let request = EndTransactionRequest {
            topic: name(topic),
            message_id: sent.message_id.clone(),
            transaction_id: id.into(),
            resolution: resolution.into(),
            source: TransactionSource::SourceClient.into(),
            trace_context: String::new(),
        };
        let reply = client.end_transaction(by(CLIENT, request)).await.unwrap().into_inner();
        assert_eq!(code(reply.status), want, "{row}");
    }
    let got = drain(&mut client, by(CLIENT, receive("p-t", "pg"))).await;
    assert_eq!((got.code(), got.messages.len()), (Code::Ok, 1), "the committed one alone");
    let system = got.messages[0].system_properties.as_ref().unwrap();
    assert_eq!(system.message_type(), MessageType::Normal, "as the reference hands it out");
    assert!(got.messages[0].user_properties.is_empty(), "{:?}", got.messages[0].user_properties);
}

#[tokio::test]
async fn recall_rows() {
    let (_served, mut client) = served().await;
    let delay = |s: &mut SystemProperties| {
        s.message_type = MessageType::Delay.into();
        s.delivery_timestamp = Some(in_seconds(3600));
    };
    let sent = send_one(&mut client, "p-d", delay).await;
    assert!(!sent.recall_handle.is_empty() && sent.transaction_id.is_empty(), "recall.feed");
    let late = send_one(&mut client, "p-d", |s| {
        delay(s);
        s.delivery_timestamp = Some(in_seconds(1));
    })
    .await;
    let forged = sent.recall_handle.replacen("r1.", "t1.", 1);
    let recall =
        |topic: &str, handle: &str| RecallMessageRequest { topic: name(topic), recall_handle: handle.into() };
    let rows = [
        ("recall.malformed", "p-d", "no-such-handle", Code::BadRequest),
        ("recall.malformed (forged)", "p-d", &*forged, Code::BadRequest),
        ("recall.empty", "p-d", "", Code::BadRequest),
        ("recall.other-topic", "p-n", &*sent.recall_handle, Code::BadRequest),
        ("recall.ok", "p-d", &*sent.recall_handle, Code::Ok),
        ("recall.again", "p-d", &*sent.recall_handle, Code::Ok),
    ];
    for (row, topic, handle, want) in rows {
        let reply = client.recall_message(by(CLIENT, recall(topic, handle))).await.unwrap().into_inner();
        assert_eq!(code(reply.status), want, "{row}");
        if want == Code::Ok {
            assert_eq!(reply.message_id, sent.message_id, "{row}");
        }
    }
    let got = loop {
        let got = drain(&mut client, by(CLIENT, receive("p-d", "pg"))).await;
        if !got.messages.is_empty() {
            break got;
        }
    };
    let system = got.messages[0].system_properties.as_ref().unwrap();
    assert_eq!(system.message_type(), MessageType::Delay);
    let (due, at) = (system.delivery_timestamp.unwrap(), system.store_timestamp.unwrap());
    assert!((at.seconds, at.nanos) >= (due.seconds, due.nanos), "never early: due {due:?}, stored {at:?}");
    let reply =
        client.recall_message(by(CLIENT, recall("p-d", &late.recall_handle))).await.unwrap().into_inner();
    assert_eq!(code(reply.status), Code::PreconditionFailed, "its time has come");
    let two = vec![message("p-d", b"1"), message("p-d", b"2")];
    let messages: Vec<Message> = two
        .into_iter()
        .map(|mut m| {
            delay(m.system_properties.as_mut().unwrap());
            m
        })
        .collect();
    let reply = client.send_message(by(CLIENT, SendMessageRequest { messages })).await.unwrap().into_inner();
    assert_eq!(code(reply.status), Code::Ok, "send.two-delay");
    assert!(reply.entries.len() == 2 && reply.entries[0].recall_handle != reply.entries[1].recall_handle);
}

#[tokio::test]
async fn an_orphaned_transaction_is_asked_after() {
    let (_served, mut client) = served().await;
    let said = settings(Some(ClientType::Producer), publishing("p-t"));
    let command = TelemetryCommand { status: None, command: Some(Command::Settings(said)) };
    let commands = tokio_stream::once(command).chain(tokio_stream::pending());
    let mut stream = client.telemetry(by(CLIENT, commands)).await.unwrap().into_inner();
    stream.message().await.unwrap().expect("settings");
    let sent = send_one(&mut client, "p-t", |s| s.message_type = MessageType::Transaction.into()).await;
    let asked = stream.message().await.unwrap().expect("a command");
    assert_eq!(code(asked.status), Code::Ok);
    let Some(Command::RecoverOrphanedTransactionCommand(orphan)) = asked.command else {
        panic!("something else was asked")
    };
    assert_eq!(orphan.transaction_id, sent.transaction_id);
    let m = orphan.message.unwrap();
    assert_eq!((m.topic, &m.body[..]), (name("p-t"), &b"one"[..]));
    let system = m.system_properties.unwrap();
    assert_eq!(
        (system.message_id, system.message_type),
        (sent.message_id.clone(), MessageType::Transaction as i32)
    );
    let request = EndTransactionRequest {
        topic: name("p-t"),
        message_id: sent.message_id,
        transaction_id: orphan.transaction_id,
        resolution: TransactionResolution::Commit.into(),
        source: TransactionSource::SourceServerCheck.into(),
        trace_context: String::new(),
    };
    assert_eq!(
        code(client.end_transaction(by(CLIENT, request)).await.unwrap().into_inner().status),
        Code::Ok
    );
    assert_eq!(drain(&mut client, by(CLIENT, receive("p-t", "pg"))).await.messages.len(), 1);
}

#[tokio::test]
async fn a_message_group_has_one_queue_and_an_order() {
    let (served, mut client) = served().await;
    let config = apis::internal::GroupConfig {
        name: "pgo".into(),
        fifo: true,
        max_attempts: 17,
        ..Default::default()
    };
    let request = apis::admin::PutGroupRequest { group: Some(config), create_only: true };
    admin(served.port).await.put_group(request).await.expect("created");
    let answer =
        telemetry(&mut client, "o", settings(Some(ClientType::PushConsumer), subscription("pgo", "p-f")));
    let Some(Command::Settings(got)) = answer.await.unwrap().command else { panic!("no settings") };
    let Some(settings::PubSub::Subscription(subscription)) = &got.pub_sub else { panic!("not a consumer") };
    assert_eq!(subscription.fifo, Some(true), "telemetry.push-ordered");
    for i in 0..6 {
        let mut m = message("p-f", format!("{i}").as_bytes());
        let system = m.system_properties.as_mut().unwrap();
        (system.message_type, system.message_group) = (MessageType::Fifo.into(), Some("one".into()));
        client.send_message(by(CLIENT, SendMessageRequest { messages: vec![m] })).await.unwrap();
    }
    let ask = |attempt: &str| {
        let mut request = receive("p-f", "pgo");
        (request.batch_size, request.attempt_id) = (2, Some(attempt.into()));
        let mut request = by("o", request);
        request.set_timeout(std::time::Duration::from_secs(1));
        request
    };
    let first = drain(&mut client, ask("a")).await;
    let bodies = |got: &Received| got.messages.iter().map(|m| m.body.to_vec()).collect::<Vec<_>>();
    assert_eq!(bodies(&first), [b"0", b"1"]);
    assert_eq!(drain(&mut client, ask("b")).await.messages.len(), 0, "one batch at a time");
    let again = drain(&mut client, ask("a")).await;
    assert_eq!(bodies(&again), [b"0", b"1"], "the same attempt, the same batch");
    let attempt = |m: &Message| m.system_properties.as_ref().unwrap().delivery_attempt;
    assert!(again.messages.iter().all(|m| attempt(m) == Some(1)));
    let waiting = tokio::spawn({
        let mut client = client.clone();
        let mut request = receive("p-f", "pgo");
        request.attempt_id = Some("c".into());
        async move { drain(&mut client, by("o", request)).await }
    });
    for m in &again.messages {
        let entry = AckMessageEntry {
            message_id: m.system_properties.as_ref().unwrap().message_id.clone(),
            receipt_handle: m.system_properties.as_ref().unwrap().receipt_handle.clone().unwrap(),
            lite_topic: None,
        };
        let request = AckMessageRequest { group: name("pgo"), topic: name("p-f"), entries: vec![entry] };
        assert_eq!(code(client.ack_message(by("o", request)).await.unwrap().into_inner().status), Code::Ok);
    }
    // The consumer that waits is woken by the acknowledgement.
    assert_eq!(bodies(&waiting.await.unwrap()), [b"2", b"3", b"4", b"5"]);
}
