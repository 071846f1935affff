//! Mixed load on a name server, a broker and two proxies, of which one is killed or stopped now and then: nothing
//! acknowledged is lost, nothing is changed, and memory, files and threads stay what they were. Seconds in the gate;
//! `tools/soak.sh` runs it for half an hour (`SOAK_SECONDS`), the last third of it without kills.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use apis::v2::receive_message_response::Content;
use apis::v2::*;
use parking_lot::Mutex;
use serde_json::json;
use tests::client::{self, Client, by, endpoints, name};
use tests::process::{Server, free_port, run};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;

const TOPICS: u32 = 20;
const PRODUCERS: u32 = 8;
/// Calls a second of each producer; a call carries 5 messages on the average.
const CALLS: u64 = 40;
const TAGS: [&str; 2] = ["even", "odd"];
/// Received messages that are not acknowledged: one of so many.
const FORGOTTEN: u32 = 30;

fn seconds() -> u64 {
    std::env::var("SOAK_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(24)
}

fn topic(i: u32) -> String {
    format!("soak-{i}")
}

fn tag(n: u32) -> &'static str {
    TAGS[n as usize % 2]
}

fn body(producer: u32, n: u32) -> Vec<u8> {
    let mut body = format!("{producer}-{n}-").into_bytes();
    body.resize(100 + (n as usize * 37) % 2500, b'a' + (n % 26) as u8);
    body
}

/// Producer and number of a message that is what was sent.
fn identity(message: &Message) -> (u32, u32) {
    let text = String::from_utf8_lossy(&message.body[..message.body.len().min(40)]).into_owned();
    let mut parts = text.split('-').map(|p| p.parse::<u32>());
    let (Some(Ok(producer)), Some(Ok(n))) = (parts.next(), parts.next()) else { panic!("corrupted: {text}") };
    assert!(message.body == body(producer, n), "message {producer}-{n} is corrupted");
    (producer, n)
}

#[derive(Clone, Copy, Default)]
struct State {
    sent: bool,
    delivered: bool,
}

/// What is known of messages on their way; one that was sent and delivered is forgotten.
#[derive(Default)]
struct Books {
    open: Mutex<HashMap<(u32, u32), State>>,
    sent: Mutex<u64>,
    again: Mutex<u64>,
    /// Failures of calls, by what was done.
    failed: Mutex<HashMap<&'static str, u64>>,
}

impl Books {
    fn note(&self, message: (u32, u32), with: impl FnOnce(&mut State)) {
        let mut open = self.open.lock();
        let state = open.entry(message).or_default();
        with(state);
        if state.sent && state.delivered {
            open.remove(&message);
        }
    }

    fn fail(&self, what: &'static str) {
        *self.failed.lock().entry(what).or_default() += 1;
    }

    fn missing(&self) -> usize {
        self.open.lock().values().filter(|s| s.sent && !s.delivered).count()
    }
}

/// A client of either proxy, whichever answers.
struct Connection {
    ports: [u16; 2],
    turn: usize,
    id: String,
    client: Option<Client>,
}

impl Connection {
    fn new(ports: [u16; 2], id: String) -> Self {
        Self { ports, turn: id.len(), id, client: None }
    }

    async fn client(&mut self) -> &mut Client {
        while self.client.is_none() {
            self.turn += 1;
            let uri = format!("http://127.0.0.1:{}", self.ports[self.turn % 2]);
            match tonic::transport::Endpoint::from_shared(uri).unwrap().connect().await {
                Ok(channel) => self.client = Some(Client::new(channel)),
                Err(_) => sleep(Duration::from_millis(50)).await,
            }
        }
        self.client.as_mut().unwrap()
    }

    /// None if the call failed: then another connection is next.
    async fn call<T, R>(
        &mut self,
        request: T,
        f: impl AsyncFnOnce(&mut Client, tonic::Request<T>) -> Result<R, tonic::Status>,
    ) -> Option<R> {
        let request = by(&self.id, request);
        let done = f(self.client().await, request).await;
        if done.is_err() {
            self.client = None;
        }
        done.ok()
    }
}

async fn produce(mut to: Connection, producer: u32, books: Arc<Books>, stop: CancellationToken) {
    let mut random = fastrand::Rng::with_seed(u64::from(producer));
    let mut pace = interval(Duration::from_millis(1000 / CALLS));
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut next = 0;
    while !stop.is_cancelled() {
        pace.tick().await;
        let count = if random.u32(..4) == 0 { random.u32(2..32) } else { 1 };
        let topic = topic(random.u32(..TOPICS));
        // Those of one call have one tag.
        let numbers: Vec<u32> = (0..count).map(|i| next + 2 * i).collect();
        next += 2 * count + 1;
        let message = |n: &u32| {
            let mut m = client::message(&topic, &body(producer, *n));
            let properties = m.system_properties.as_mut().unwrap();
            properties.tag = Some(tag(*n).into());
            properties.keys = vec![format!("{producer}-{n}")];
            m
        };
        let request = SendMessageRequest { messages: numbers.iter().map(message).collect() };
        let reply = to.call(request, async |c, r| c.send_message(r).await).await;
        match reply.map(|r| r.into_inner()) {
            Some(r) if r.status.as_ref().is_some_and(|s| s.code() == Code::Ok) => {
                *books.sent.lock() += u64::from(count);
                numbers.iter().for_each(|n| books.note((producer, *n), |s| s.sent = true));
            }
            Some(_) => books.fail("send refused"),
            None => books.fail("send"),
        }
    }
}

/// Receives one topic. With a filter it only looks whether it gets what it asked for.
async fn consume(
    mut from: Connection,
    topic: String,
    only: Option<&'static str>,
    books: Arc<Books>,
    stop: CancellationToken,
) {
    let mut random = fastrand::Rng::with_seed(from.id.len() as u64);
    let group = only.unwrap_or("all");
    let mut queue = None;
    while !stop.is_cancelled() {
        let Some(MessageQueue { .. }) = &queue else {
            let request = QueryRouteRequest { topic: name(&topic), endpoints: endpoints() };
            let route = from.call(request, async |c, r| c.query_route(r).await).await;
            queue = route.and_then(|r| r.into_inner().message_queues.into_iter().next());
            if queue.is_none() {
                sleep(Duration::from_millis(100)).await;
            }
            continue;
        };
        let mut request = client::receive(&topic, group);
        request.message_queue.clone_from(&queue);
        request.batch_size = 32;
        request.long_polling_timeout = Some(client::seconds(3));
        if let Some(tag) = only {
            request.filter_expression.as_mut().unwrap().expression = tag.into();
        }
        let got = from.call(request, async |c, r| {
            let mut stream = c.receive_message(r).await?.into_inner();
            let (mut messages, mut code) = (Vec::new(), Code::Ok);
            while let Some(frame) = stream.next().await {
                match frame?.content {
                    Some(Content::Message(m)) => messages.push(m),
                    Some(Content::Status(s)) => code = s.code(),
                    _ => {}
                }
            }
            Ok((messages, code))
        });
        let Some((messages, code)) = got.await else {
            books.fail("receive");
            continue;
        };
        if messages.is_empty() && code != Code::MessageNotFound {
            books.fail("receive refused");
            sleep(Duration::from_millis(100)).await;
        }
        let mut acks = Vec::new();
        for m in &messages {
            let message = identity(m);
            let properties = m.system_properties.as_ref().unwrap();
            assert!(only.is_none_or(|tag| properties.tag() == tag), "not the tag that was asked for");
            *books.again.lock() += u64::from(properties.delivery_attempt() > 1);
            if only.is_none() {
                books.note(message, |s| s.delivered = true);
            }
            if random.u32(..FORGOTTEN) == 0 {
                continue;
            }
            acks.push(AckMessageEntry {
                receipt_handle: properties.receipt_handle().into(),
                ..AckMessageEntry::default()
            });
        }
        if acks.is_empty() {
            continue;
        }
        let request = AckMessageRequest { group: name(group), topic: name(&topic), entries: acks };
        let Some(reply) = from.call(request, async |c, r| c.ack_message(r).await).await else {
            books.fail("ack");
            continue;
        };
        // It took longer than the invisible time: it comes again.
        let refused = |e: &AckMessageResultEntry| e.status.as_ref().is_none_or(|s| s.code() != Code::Ok);
        (0..reply.into_inner().entries.iter().filter(|e| refused(e)).count())
            .for_each(|_| books.fail("ack refused"));
    }
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: f64,
    anonymous_kib: u64,
    files: usize,
    threads: u64,
}

fn sample(server: &Server, began: Instant) -> Sample {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    Sample {
        at: began.elapsed().as_secs_f64(),
        anonymous_kib: field("RssAnon:"),
        files: std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count(),
        threads: field("Threads:"),
    }
}

struct Cluster {
    servers: Vec<(&'static str, Server)>,
    proxies: [u16; 2],
}

impl Cluster {
    fn start(dir: &Path) -> Self {
        let [namesrv, broker, a, b] = std::array::from_fn(|_| free_port());
        let listen = |port: u16| format!("listen=\"127.0.0.1:{port}\"");
        let names = format!("namesrv=[\"127.0.0.1:{namesrv}\"]");
        let data = format!("data=\"{}\"", dir.join("data").display());
        let proxy = |port| {
            Server::start(
                dir,
                &["proxy", "--set", &listen(port), "--set", &names, "--set", "auto_create=true"],
            )
        };
        let servers = vec![
            ("namesrv", Server::start(dir, &["namesrv", "--set", &listen(namesrv)])),
            (
                "broker",
                Server::start(dir, &["broker", "--set", &listen(broker), "--set", &names, "--set", &data]),
            ),
            ("proxy-a", proxy(a)),
            ("proxy-b", proxy(b)),
        ];
        Self { servers, proxies: [a, b] }
    }
}

/// Messages of the group that takes all which it has not acknowledged yet.
async fn unsettled(endpoint: &str) -> u64 {
    let endpoint = endpoint.to_owned();
    let lag = tokio::task::spawn_blocking(move || {
        run(&["group", "lag", "all", "-o", "json", "--endpoint", &endpoint])
    });
    let queues: Vec<serde_json::Value> = serde_json::from_str(&lag.await.unwrap()).unwrap();
    queues.iter().map(|q| q["lag"].as_u64().unwrap() + q["in_flight"].as_u64().unwrap()).sum()
}

/// The median of what a role used in a part of the time.
fn median(samples: &[Sample], of: impl Fn(&Sample) -> u64) -> u64 {
    let mut values: Vec<u64> = samples.iter().map(of).collect();
    values.sort_unstable();
    values[values.len() / 2]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn soak() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path());
    let books = Arc::new(Books::default());
    let (producing, consuming) = (CancellationToken::new(), CancellationToken::new());
    let mut tasks = JoinSet::new();
    for p in 0..PRODUCERS {
        let to = Connection::new(cluster.proxies, format!("producer{}", "+".repeat(p as usize)));
        tasks.spawn(produce(to, p, books.clone(), producing.clone()));
    }
    for t in 0..TOPICS {
        let from = Connection::new(cluster.proxies, format!("consumer{}", "+".repeat(t as usize)));
        tasks.spawn(consume(from, topic(t), None, books.clone(), consuming.clone()));
    }
    for (i, tag) in TAGS.into_iter().enumerate() {
        let from = Connection::new(cluster.proxies, format!("filter{}", "+".repeat(i)));
        tasks.spawn(consume(from, topic(0), Some(tag), books.clone(), consuming.clone()));
    }

    let began = Instant::now();
    let long = seconds() >= 600;
    let (kills_end, end) = (seconds() as f64 * 2.0 / 3.0, seconds() as f64);
    let mut random = fastrand::Rng::with_seed(7);
    let (mut kills, mut stops) = (0, 0);
    let mut next_kill = 3.0;
    let mut quiet: Vec<Vec<Sample>> = vec![Vec::new(); cluster.servers.len()];
    let mut tick = interval(Duration::from_secs(if long { 5 } else { 1 }));
    while began.elapsed().as_secs_f64() < end {
        tick.tick().await;
        let at = began.elapsed().as_secs_f64();
        for ((role, server), quiet) in cluster.servers.iter().zip(&mut quiet) {
            let s = sample(server, began);
            println!(
                "{}",
                json!({"at_s": s.at.round(), "role": role, "anonymous_kib": s.anonymous_kib, "files": s.files, "threads": s.threads,
                       "sent": *books.sent.lock(), "under_way": books.missing()})
            );
            if at > kills_end {
                quiet.push(s);
            }
        }
        if at > next_kill && at < kills_end {
            next_kill = at + if long { random.f64() * 30.0 } else { 2.0 };
            // The broker most often.
            let (role, server) = &mut cluster.servers[[0, 1, 1, 1, 2, 3][random.usize(..6)]];
            let hard = random.u32(..4) > 0;
            tokio::task::block_in_place(|| {
                match hard {
                    true => server.kill(),
                    false => assert_eq!(server.terminate(), Some(0), "{role} stops cleanly"),
                }
                server.start_again();
            });
            println!(
                "{}",
                json!({"at_s": at.round(), "role": role, "what": if hard { "kill -9" } else { "SIGTERM" }})
            );
            if hard { kills += 1 } else { stops += 1 }
        }
    }
    producing.cancel();
    // Everything is delivered, and everything is acknowledged in the end: also what was forgotten at first.
    let endpoint = format!("127.0.0.1:{}", cluster.proxies[0]);
    let drained = timeout(Duration::from_secs(120), async {
        while books.missing() > 0 || unsettled(&endpoint).await > 0 {
            sleep(Duration::from_millis(200)).await;
        }
    });
    let drained = drained.await.is_ok();
    consuming.cancel();
    while let Some(done) = tasks.join_next().await {
        done.expect("no task found anything wrong");
    }
    let sent = *books.sent.lock();
    println!(
        "{}",
        json!({"seconds": seconds(), "kills": kills, "stops": stops, "sent": sent, "lost": books.missing(),
               "delivered_again": *books.again.lock(), "failed_calls": *books.failed.lock()})
    );
    assert_eq!(books.missing(), 0, "messages were acknowledged and never delivered");
    assert!(drained, "some messages are never done with");
    assert!(kills > 0 && sent > 50 * seconds(), "{kills} kills, {sent} sent: hardly a load");
    for ((role, _), samples) in cluster.servers.iter().zip(&quiet) {
        // The first third fills what was emptied by the last kill.
        let third = samples.len() / 3;
        let (before, after) = (&samples[third..2 * third], &samples[2 * third..]);
        let kib = [before, after].map(|s| median(s, |s| s.anonymous_kib));
        let files = [before, after].map(|s| median(s, |s| s.files as u64));
        let threads = [before, after].map(|s| median(s, |s| s.threads));
        println!("{}", json!({"role": role, "anonymous_kib": kib, "files": files, "threads": threads}));
        if long {
            assert!(kib[1] <= kib[0] + kib[0] / 10 + 2048, "{role} grows: {kib:?} KiB");
            assert!(
                files[1] <= files[0] + 4 && threads[1] <= threads[0] + 1,
                "{role}: {files:?} files, {threads:?} threads"
            );
        }
    }
}
