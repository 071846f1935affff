//! The Rust client as a test: suite ENDPOINT PREFIX MODE (see ../../README.md). It has no push consumer.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rocketmq::conf::{ClientOption, LoggingFormat, ProducerOption, SimpleConsumerOption};
use rocketmq::model::common::{FilterExpression, FilterType};
use rocketmq::model::message::{MessageBuilder, MessageView};
use rocketmq::model::transaction::{Transaction, TransactionResolution};
use rocketmq::{Producer, SimpleConsumer};
use tokio::io::AsyncBufReadExt;

fn options(endpoint: &str) -> ClientOption {
    let mut options = ClientOption::default();
    options.set_access_url(endpoint);
    options.set_enable_tls(false);
    options.set_long_polling_timeout(Duration::from_secs(5));
    options
}

async fn producer(endpoint: &str, topics: &[String]) -> Producer {
    let mut option = ProducerOption::default();
    option.set_logging_format(LoggingFormat::Terminal);
    option.set_topics(topics.to_vec());
    let mut producer = Producer::new(option, options(endpoint)).expect("a producer");
    producer.start().await.expect("the producer starts");
    producer
}

async fn consumer(endpoint: &str, topic: &str, group: &str) -> SimpleConsumer {
    let mut option = SimpleConsumerOption::default();
    option.set_consumer_group(group);
    option.set_topics(vec![topic]);
    let mut consumer = SimpleConsumer::new(option, options(endpoint)).expect("a consumer");
    consumer.start().await.expect("the consumer starts");
    consumer
}

async fn send(producer: &Producer, topic: &str, body: &str, tag: &str) -> Result<(), String> {
    let message = MessageBuilder::builder()
        .set_topic(topic)
        .set_body(body.as_bytes().to_vec())
        .set_tag(tag)
        .set_keys(vec![format!("key-{body}")])
        .set_properties(std::collections::HashMap::from([("language", "rust")]))
        .build()
        .map_err(|e| e.to_string())?;
    let receipt = producer.send(message).await.map_err(|e| e.to_string())?;
    assert!(!receipt.message_id().is_empty());
    Ok(())
}

fn body(message: &MessageView) -> String {
    String::from_utf8_lossy(message.body()).into_owned()
}

/// Receives and acknowledges until everything wanted is there.
async fn receive(
    consumer: &SimpleConsumer,
    topic: &str,
    tags: &str,
    want: &[String],
    seconds: u64,
) -> Result<BTreeMap<String, i32>, String> {
    let filter = FilterExpression::new(FilterType::Tag, tags);
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut got = BTreeMap::new();
    while !want.iter().all(|b| got.contains_key(b)) && Instant::now() < until {
        let messages = consumer.receive_with(topic, &filter, 16, Duration::from_secs(30)).await;
        for message in messages.map_err(|e| e.to_string())? {
            consumer.ack(&message).await.map_err(|e| e.to_string())?;
            got.insert(body(&message), message.delivery_attempt());
        }
    }
    Ok(got)
}

fn numbered(prefix: char, n: u32) -> Vec<String> {
    (0..n).map(|i| format!("{prefix}{i}")).collect()
}

async fn basic(endpoint: &str, prefix: &str) {
    let topics: Vec<String> = ["simple", "tag", "dlq"].iter().map(|n| format!("{prefix}-{n}")).collect();
    let p = producer(endpoint, &topics).await;

    let bodies = numbered('m', 8);
    for body in &bodies {
        send(&p, &topics[0], body, "x").await.expect("sent");
    }
    let c = consumer(endpoint, &topics[0], &topics[0]).await;
    let got = receive(&c, &topics[0], "*", &bodies, 30).await.expect("received");
    assert_eq!(got.keys().cloned().collect::<Vec<_>>(), bodies);
    assert!(got.values().all(|attempt| *attempt == 1));
    println!("ok simple");

    for (i, body) in numbered('t', 8).iter().enumerate() {
        send(&p, &topics[1], body, ["a", "b"][i % 2]).await.expect("sent");
    }
    let tagged = consumer(endpoint, &topics[1], &topics[1]).await;
    let want: Vec<String> = ["t0", "t2", "t4", "t6"].map(String::from).to_vec();
    let got = receive(&tagged, &topics[1], "a", &want, 30).await.expect("received");
    assert_eq!(got.into_keys().collect::<Vec<_>>(), want);
    println!("ok tag");

    send(&p, &topics[2], "fails", "x").await.expect("sent");
    let failing = consumer(endpoint, &topics[2], &format!("{prefix}-dlq")).await;
    let filter = FilterExpression::new(FilterType::Tag, "*");
    let until = Instant::now() + Duration::from_secs(26);
    let mut attempts = Vec::new();
    while Instant::now() < until {
        let messages = failing.receive_with(&topics[2], &filter, 16, Duration::from_secs(10)).await;
        attempts.extend(messages.expect("received").iter().map(|m| m.delivery_attempt()));
    }
    assert_eq!(attempts, [1, 2]);
    println!("ok dlq");
}

async fn steady(endpoint: &str, prefix: &str) {
    let topic = format!("{prefix}-steady");
    let p = producer(endpoint, &[topic.clone()]).await;
    let c = consumer(endpoint, &topic, &topic).await;
    let (before, after) = (numbered('b', 5), numbered('a', 5));
    for body in &before {
        send(&p, &topic, body, "x").await.expect("sent");
    }
    println!("READY");
    let mut line = String::new();
    tokio::io::BufReader::new(tokio::io::stdin()).read_line(&mut line).await.expect("a line");
    let until = Instant::now() + Duration::from_secs(60);
    for body in &after {
        while let Err(error) = send(&p, &topic, body, "x").await {
            assert!(Instant::now() < until, "cannot send: {error}");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
    let all: Vec<String> = before.into_iter().chain(after).collect();
    let mut got = BTreeMap::new();
    while !all.iter().all(|b| got.contains_key(b)) {
        assert!(Instant::now() < until, "lost: {all:?} but {got:?}");
        match receive(&c, &topic, "*", &all, 5).await {
            Ok(more) => got.extend(more),
            Err(_) => tokio::time::sleep(Duration::from_millis(500)).await,
        }
    }
    println!("DONE");
}

/// The server is away for a moment: waits until it takes messages again.
async fn until_it_is_back(p: &Producer, topic: &str) {
    let until = Instant::now() + Duration::from_secs(60);
    while let Err(error) = send(p, topic, "back", "x").await {
        assert!(Instant::now() < until, "the server does not come back: {error}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn transactional_producer(endpoint: &str, topic: &str) -> Producer {
    let mut option = ProducerOption::default();
    option.set_logging_format(LoggingFormat::Terminal);
    option.set_topics(vec![topic]);
    let check = Box::new(|_, m: MessageView| match m.body() {
        b"orphan" => TransactionResolution::COMMIT,
        _ => TransactionResolution::UNKNOWN,
    });
    let mut producer = Producer::new_transaction_producer(option, options(endpoint), check).expect("a producer");
    producer.start().await.expect("the producer starts");
    producer
}

async fn kinds(endpoint: &str, prefix: &str) {
    let [fifo, delay, tx, other] = ["fifo", "delay", "tx", "other"].map(|n| format!("{prefix}-{n}"));
    let p = producer(endpoint, &[fifo.clone(), delay.clone(), other.clone()]).await;
    for i in 0..6 {
        for group in ["a", "b"] {
            let body = format!("{group}{i}").into_bytes();
            let message = MessageBuilder::fifo_message_builder(fifo.as_str(), body, group).build().expect("a message");
            p.send(message).await.expect("sent");
        }
    }
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs() as i64;
    let due = now() + 6;
    let message = MessageBuilder::delay_message_builder(delay.as_str(), b"later".to_vec(), due);
    p.send(message.build().expect("a message")).await.expect("sent");
    let transactional = transactional_producer(endpoint, &tx).await;
    let half = |body: &str| {
        let message = MessageBuilder::transaction_message_builder(tx.as_str(), body.as_bytes().to_vec());
        transactional.send_transaction_message(message.build().expect("a message"))
    };
    let committed = half("committed").await.expect("sent");
    let rolled_back = half("rolled back").await.expect("sent");
    let _orphan = half("orphan").await.expect("sent");
    println!("READY");
    let mut line = String::new();
    tokio::io::BufReader::new(tokio::io::stdin()).read_line(&mut line).await.expect("a line");

    until_it_is_back(&p, &other).await;
    committed.commit().await.expect("committed");
    rolled_back.rollback().await.expect("rolled back");

    // It has no push consumer, so that order is what a simple consumer gets.
    let c = consumer(endpoint, &fifo, &fifo).await;
    let filter = FilterExpression::new(FilterType::Tag, "*");
    let (mut order, until) = (Vec::new(), Instant::now() + Duration::from_secs(60));
    while order.len() < 12 && Instant::now() < until {
        for message in c.receive_with(&fifo, &filter, 3, Duration::from_secs(30)).await.expect("received") {
            order.push(body(&message));
            c.ack(&message).await.expect("acknowledged");
        }
    }
    for group in ['a', 'b'] {
        let of_group: Vec<String> = order.iter().filter(|b| b.starts_with(group)).cloned().collect();
        assert_eq!(of_group, numbered(group, 6), "{order:?}");
    }
    println!("ok fifo");

    let c = consumer(endpoint, &delay, &delay).await;
    let got = receive(&c, &delay, "*", &["later".to_owned()], 30).await.expect("received");
    assert!(got.contains_key("later") && now() >= due, "{got:?}");
    println!("ok delay");

    // After a break this client says late what it produces; any other producer can be asked instead.
    let _other = transactional_producer(endpoint, &tx).await;
    let c = consumer(endpoint, &tx, &tx).await;
    let want = ["committed", "orphan"].map(String::from);
    let got = receive(&c, &tx, "*", &want, 40).await.expect("received");
    assert_eq!(got.into_keys().collect::<Vec<_>>(), want);
    println!("DONE");
}

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args[2].as_str() {
        "basic" => basic(&args[0], &args[1]).await,
        "kinds" => kinds(&args[0], &args[1]).await,
        _ => steady(&args[0], &args[1]).await,
    }
    // The client has no way to stop its background work in time.
    std::process::exit(0);
}
