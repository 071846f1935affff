//! `ferry bench`: load for any server of the protocol, Apache RocketMQ included. Latencies in an HDR histogram,
//! server CPU per message read from /proc by pid.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use apis::convert::receive::{duration, timestamp};
use apis::v2::receive_message_response::Content;
use apis::v2::*;
use bytes::Bytes;
use clap::{Args, Subcommand, ValueEnum};
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio_stream::StreamExt;

use super::client::{self, Messaging, check, failed, resource};
use super::messages::message_id;
use super::{Format, Remote, ceiling, output};

#[derive(Subcommand)]
pub enum BenchCommand {
    /// Send as fast as the server takes it
    Send(BenchArgs),
    /// Receive and acknowledge what is there
    Receive(BenchArgs),
    /// Send at a rate and measure until a waiting consumer has it
    E2e(BenchArgs),
    /// Run a server that only answers: what the protocol itself costs
    Ceiling(ceiling::CeilingArgs),
}

#[derive(Args, Clone)]
pub struct BenchArgs {
    #[arg(long, default_value = "bench")]
    pub topic: String,
    /// Send to this many topics in turn: NAME-0, NAME-1, …
    #[arg(long, default_value_t = 1)]
    pub topics: u64,
    #[arg(long, default_value = "bench")]
    pub group: String,
    /// Receivers belong to this many groups in turn: NAME-0, NAME-1, …
    #[arg(long, default_value_t = 1)]
    pub groups: usize,
    /// Longest wait of a receiver for a message, seconds
    #[arg(long, default_value_t = 10)]
    pub poll: u64,
    /// Body, bytes
    #[arg(long, default_value_t = 1024)]
    pub size: usize,
    #[arg(long, default_value_t = 4)]
    pub connections: usize,
    /// Calls in flight, over all connections
    #[arg(long, default_value_t = 64)]
    pub in_flight: usize,
    /// Messages of one call
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Seconds
    #[arg(long, default_value_t = 10)]
    pub duration: u64,
    /// Seconds before measuring
    #[arg(long, default_value_t = 1)]
    pub warm_up: u64,
    /// Messages a second (e2e)
    #[arg(long, default_value_t = 500)]
    pub rate: u64,
    /// What is sent. A transaction is sent and committed; scheduled messages are measured by how late they are
    #[arg(long, value_enum, default_value = "normal")]
    pub kind: Kind,
    /// Message groups (fifo)
    #[arg(long, default_value_t = 1000)]
    pub message_groups: u64,
    /// Scheduled this far ahead, ms (delay)
    #[arg(long, default_value_t = 1000)]
    pub ahead: i64,
    /// Scheduled up to this much later than that, ms (delay)
    #[arg(long, default_value_t = 0)]
    pub spread: i64,
    /// Stop after this many messages
    #[arg(long, default_value_t = u64::MAX, hide_default_value = true)]
    pub count: u64,
    /// The server's process: its CPU time per message is shown
    #[arg(long)]
    pub pid: Option<u32>,
    #[command(flatten)]
    pub remote: Remote,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    Normal,
    Fifo,
    Delay,
    Transaction,
}

/// A receiver's latencies are added to everybody's this often.
const MERGE: Duration = Duration::from_millis(100);

/// What the workers count.
struct Meter {
    messages: AtomicU64,
    errors: AtomicU64,
    measuring: AtomicBool,
    stop: AtomicBool,
    latency: Mutex<Histogram<u64>>,
}

impl Meter {
    fn new() -> anyhow::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            messages: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            measuring: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            latency: Mutex::new(Histogram::new_with_bounds(1, 120_000_000, 3)?),
        }))
    }

    fn running(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn count(&self, messages: u64, took: Duration, own: &mut Histogram<u64>) {
        if self.measuring.load(Ordering::Relaxed) {
            self.messages.fetch_add(messages, Ordering::Relaxed);
            own.saturating_record(took.as_micros() as u64);
        }
    }
}

pub async fn run(command: BenchCommand) -> anyhow::Result<()> {
    let (name, args) = match &command {
        BenchCommand::Send(args) => ("send", args.clone()),
        BenchCommand::Receive(args) => ("receive", args.clone()),
        BenchCommand::E2e(args) => ("e2e", args.clone()),
        BenchCommand::Ceiling(args) => return ceiling::run(args.clone()).await,
    };
    let mut first = client::messaging(&args.remote.endpoint, "bench").await?;
    let queues = route(&mut first, &args).await?;
    let meter = Meter::new()?;
    let mut attached = Vec::new();
    let mut workers = tokio::task::JoinSet::new();
    let per_connection = args.in_flight.div_ceil(args.connections.max(1));
    for connection in 0..args.connections.max(1) {
        let mut client = client::messaging(&args.remote.endpoint, &format!("bench-{connection}")).await?;
        if !matches!(command, BenchCommand::Send(_)) {
            attached.push(client::attach(&mut client, &args.topic, &args.group, everything()).await?);
        }
        for worker in 0..per_connection {
            let number = connection * per_connection + worker;
            if number >= args.in_flight {
                break;
            }
            let (client, meter, mut args) = (client.clone(), meter.clone(), args.clone());
            if args.groups > 1 {
                args.group = format!("{}-{}", args.group, number % args.groups);
            }
            let queue = queues[number % queues.len()].clone();
            match command {
                BenchCommand::Send(_) | BenchCommand::Ceiling(_) => {
                    drop(workers.spawn(send(client, meter, args, number)));
                }
                BenchCommand::Receive(_) => {
                    let late = args.kind == Kind::Delay;
                    drop(workers.spawn(receive(client, meter, args, queue, late)));
                }
                BenchCommand::E2e(_) => drop(workers.spawn(receive(client, meter, args, queue, true))),
            }
        }
    }
    if matches!(command, BenchCommand::E2e(_)) {
        drop(workers.spawn(paced(first, meter.clone(), args.clone())));
    }
    let (seconds, cpu) = measure(&meter, &args).await;
    meter.stop.store(true, Ordering::Relaxed);
    // Long polls end with the process; what was measured is in the histogram.
    let _ =
        tokio::time::timeout(Duration::from_secs(2), async { while workers.join_next().await.is_some() {} })
            .await;
    report(name, &args, &meter, seconds, cpu).await;
    Ok(())
}

async fn route(client: &mut Messaging, args: &BenchArgs) -> anyhow::Result<Vec<MessageQueue>> {
    let mut queues = Vec::new();
    for i in 0..args.topics.max(1) {
        let endpoints = client::endpoints(&args.remote.endpoint);
        let request = QueryRouteRequest { topic: resource(&topic_of(args, i)), endpoints };
        let reply = client.query_route(request).await.map_err(failed)?.into_inner();
        check(reply.status.as_ref())?;
        queues = reply.message_queues;
    }
    Ok(queues)
}

async fn measure(meter: &Meter, args: &BenchArgs) -> (f64, Option<Duration>) {
    tokio::time::sleep(Duration::from_secs(args.warm_up)).await;
    let cpu = || args.pid.and_then(cpu_time);
    let (began, before) = (Instant::now(), cpu());
    meter.measuring.store(true, Ordering::Relaxed);
    let mut last = 0;
    for second in 1..=args.duration {
        if last >= args.count {
            break;
        }
        tokio::time::sleep_until((began + Duration::from_secs(second)).into()).await;
        let now = meter.messages.load(Ordering::Relaxed);
        if std::io::stderr().is_terminal() {
            eprint!("\r{second:>4} s  {:>9} messages/s ", now - last);
        }
        last = now;
    }
    if std::io::stderr().is_terminal() {
        eprint!("\r{:40}\r", "");
    }
    meter.measuring.store(false, Ordering::Relaxed);
    let used = cpu().zip(before).map(|(after, before)| after.saturating_sub(before));
    (began.elapsed().as_secs_f64(), used)
}

/// User and system time of a process, all threads.
fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    // USER_HZ is 100 on Linux, whatever the kernel's own tick.
    Some(Duration::from_millis(ticks * 10))
}

async fn report(name: &str, args: &BenchArgs, meter: &Meter, seconds: f64, cpu: Option<Duration>) {
    let messages = meter.messages.load(Ordering::Relaxed);
    let latency = meter.latency.lock().await;
    let ms = |q: f64| json!((latency.value_at_quantile(q) as f64 / 10.0).round() / 100.0);
    let per_message = cpu.filter(|_| messages > 0).map(|c| c.as_secs_f64() * 1e6 / messages as f64);
    let fields = [
        ("case", json!(name)),
        ("messages", json!(messages)),
        ("per second", json!((messages as f64 / seconds).round())),
        ("p50 ms", ms(0.5)),
        ("p99 ms", ms(0.99)),
        ("p999 ms", ms(0.999)),
        ("max ms", json!(latency.max() as f64 / 1000.0)),
        ("server cpu us per message", per_message.map_or(Value::Null, |c| json!((c * 10.0).round() / 10.0))),
        ("errors", json!(meter.errors.load(Ordering::Relaxed))),
    ];
    output::object(args.remote.output, &fields);
    if args.remote.output == Format::Table && latency.is_empty() {
        println!("(nothing was measured: is there a message to receive, or does the server refuse?)");
    }
}

fn now_us() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    since.as_micros() as u64
}

/// The topic of a call.
fn topic_of(args: &BenchArgs, call: u64) -> String {
    match args.topics {
        0 | 1 => args.topic.clone(),
        topics => format!("{}-{}", args.topic, call % topics),
    }
}

fn message(args: &BenchArgs, topic: &str, body: &Bytes, sequence: u64) -> Message {
    let sent = now_us();
    // Spread evenly, and the same way every time.
    let later = sequence.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (args.spread.max(0) as u64 + 1);
    let due = sent as i64 / 1000 + args.ahead + later as i64;
    let kind = match args.kind {
        Kind::Normal => MessageType::Normal,
        Kind::Fifo => MessageType::Fifo,
        Kind::Delay => MessageType::Delay,
        Kind::Transaction => MessageType::Transaction,
    };
    Message {
        topic: resource(topic),
        user_properties: HashMap::from([("sent".to_owned(), sent.to_string())]),
        system_properties: Some(SystemProperties {
            tag: Some("bench".into()),
            keys: vec![format!("k{sequence}")],
            message_id: message_id(sequence),
            body_encoding: Encoding::Identity.into(),
            message_type: kind.into(),
            message_group: (args.kind == Kind::Fifo)
                .then(|| format!("g{}", sequence % args.message_groups.max(1))),
            delivery_timestamp: (args.kind == Kind::Delay).then(|| timestamp(due)),
            born_timestamp: Some(timestamp(sent as i64 / 1000)),
            born_host: "bench".into(),
            ..Default::default()
        }),
        body: body.clone(),
    }
}

async fn send_once(
    client: &mut Messaging,
    args: &BenchArgs,
    body: &Bytes,
    sequence: u64,
) -> anyhow::Result<()> {
    // Calls of one worker and of different workers go to different topics.
    let topic = topic_of(args, sequence / args.batch as u64 + (sequence >> 24));
    let messages = (0..args.batch as u64).map(|i| message(args, &topic, body, sequence + i)).collect();
    let reply = client.send_message(SendMessageRequest { messages }).await.map_err(failed)?.into_inner();
    check(reply.status.as_ref())?;
    if args.kind == Kind::Transaction {
        for entry in reply.entries {
            let request = EndTransactionRequest {
                topic: resource(&topic),
                message_id: entry.message_id,
                transaction_id: entry.transaction_id,
                resolution: TransactionResolution::Commit.into(),
                source: TransactionSource::SourceClient.into(),
                trace_context: String::new(),
            };
            let reply = client.end_transaction(request).await.map_err(failed)?.into_inner();
            check(reply.status.as_ref())?;
        }
    }
    Ok(())
}

async fn send(mut client: Messaging, meter: Arc<Meter>, args: BenchArgs, number: usize) {
    let body = Bytes::from(vec![b'x'; args.size]);
    let mut sequence = (number as u64) << 24;
    let mut own = Histogram::new_with_bounds(1, 120_000_000, 3).expect("the bounds are valid");
    while meter.running() && meter.messages.load(Ordering::Relaxed) < args.count {
        let began = Instant::now();
        match send_once(&mut client, &args, &body, sequence).await {
            Ok(()) => meter.count(args.batch as u64, began.elapsed(), &mut own),
            Err(error) => complain(&meter, &error).await,
        }
        sequence += args.batch as u64;
    }
    let _ = meter.latency.lock().await.add(own);
}

async fn complain(meter: &Meter, error: &anyhow::Error) {
    if meter.errors.fetch_add(1, Ordering::Relaxed) == 0 {
        eprintln!("first error: {error:#}");
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
}

/// Sends at a constant rate, whatever the answers take.
async fn paced(client: Messaging, meter: Arc<Meter>, args: BenchArgs) {
    let body = Bytes::from(vec![b'x'; args.size]);
    let mut tick = tokio::time::interval(Duration::from_secs_f64(1.0 / args.rate.max(1) as f64));
    let mut sequence = 0;
    while meter.running() {
        tick.tick().await;
        sequence += 1;
        let (mut client, meter, args, body) = (client.clone(), meter.clone(), args.clone(), body.clone());
        tokio::spawn(async move {
            if let Err(error) = send_once(&mut client, &args, &body, sequence).await {
                complain(&meter, &error).await;
            }
        });
    }
}

async fn receive(mut client: Messaging, meter: Arc<Meter>, args: BenchArgs, queue: MessageQueue, e2e: bool) {
    let mut own = Histogram::new_with_bounds(1, 120_000_000, 3).expect("the bounds are valid");
    let mut merged = Instant::now();
    while meter.running() {
        let began = Instant::now();
        match receive_once(&mut client, &args, &queue).await {
            Ok(messages) if messages.is_empty() => {}
            Ok(messages) if e2e => {
                let now = now_us();
                for m in &messages {
                    meter.count(
                        1,
                        Duration::from_micros(now.saturating_sub(expected(m).unwrap_or(now))),
                        &mut own,
                    );
                }
                acknowledge(&mut client, &meter, &args, messages).await;
            }
            Ok(messages) => {
                let count = messages.len() as u64;
                acknowledge(&mut client, &meter, &args, messages).await;
                meter.count(count, began.elapsed(), &mut own);
            }
            Err(error) => complain(&meter, &error).await,
        }
        // What came so far counts even if the next long poll outlasts the run.
        if merged.elapsed() > MERGE {
            let _ = meter.latency.lock().await.add(&own);
            own.reset();
            merged = Instant::now();
        }
    }
    let _ = meter.latency.lock().await.add(own);
}

/// When it was to arrive, µs: when it was sent, or when it is due.
fn expected(m: &Message) -> Option<u64> {
    let due = m.system_properties.as_ref().and_then(|s| s.delivery_timestamp);
    let due = due.map(|at| apis::convert::send::millis(&at) as u64 * 1000);
    due.or_else(|| m.user_properties.get("sent")?.parse().ok())
}

async fn acknowledge(client: &mut Messaging, meter: &Meter, args: &BenchArgs, messages: Vec<Message>) {
    let entries = messages.into_iter().filter_map(|m| m.system_properties).map(|s| AckMessageEntry {
        message_id: s.message_id,
        receipt_handle: s.receipt_handle.unwrap_or_default(),
        lite_topic: None,
    });
    let (group, topic) = (resource(&args.group), resource(&args.topic));
    let request = AckMessageRequest { group, topic, entries: entries.collect() };
    let acked = match client.ack_message(request).await {
        Ok(reply) => check(reply.into_inner().status.as_ref()),
        Err(error) => Err(failed(error)),
    };
    if let Err(error) = acked {
        complain(meter, &error).await;
    }
}

fn everything() -> FilterExpression {
    FilterExpression { r#type: FilterType::Tag.into(), expression: "*".into() }
}

async fn receive_once(
    client: &mut Messaging,
    args: &BenchArgs,
    queue: &MessageQueue,
) -> anyhow::Result<Vec<Message>> {
    let request = ReceiveMessageRequest {
        group: resource(&args.group),
        message_queue: Some(queue.clone()),
        filter_expression: Some(everything()),
        batch_size: args.batch as i32,
        invisible_duration: Some(duration(60_000)),
        auto_renew: false,
        long_polling_timeout: Some(duration(args.poll as i64 * 1000)),
        attempt_id: None,
    };
    let mut request = tonic::Request::new(request);
    request.set_timeout(Duration::from_secs(args.poll + 5));
    let mut stream = client.receive_message(request).await.map_err(failed)?.into_inner();
    let mut messages = Vec::new();
    while let Some(frame) = stream.next().await {
        match frame.map_err(failed)?.content {
            Some(Content::Status(s)) if s.code == Code::MessageNotFound as i32 => {}
            Some(Content::Status(s)) => check(Some(&s))?,
            Some(Content::Message(m)) => messages.push(m),
            _ => {}
        }
    }
    Ok(messages)
}
