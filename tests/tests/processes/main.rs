//! `ferry` as real processes: kill -9 under load, what bad input gets, and the README's transcript.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod operator;
mod soak;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use apis::admin::TailRequest;
use apis::v2::*;
use model::message;
use tests::client::{self, by, connect, endpoints, name};
use tests::process::{Server, ferry, free_port, run};
use tokio_stream::StreamExt;

fn ferry_fails(args: &[&str]) -> (i32, String) {
    let Output { status, stderr, .. } = Command::new(ferry()).args(args).output().expect("ferry runs");
    (status.code().expect("an exit code"), String::from_utf8_lossy(&stderr).into_owned())
}

fn dev(dir: &Path, port: u16, more: &[&str]) -> Server {
    let (data, port) = (dir.join("data").display().to_string(), port.to_string());
    let mut args = vec!["dev", "--data", &data, "--port", &port];
    args.extend(more);
    Server::start(dir, &args)
}

const TOPIC: &str = "crash";
const PRODUCERS: u32 = 8;

/// A body that shows whether it was changed.
fn body(producer: u32, n: u32) -> Vec<u8> {
    let mut body = format!("{producer}-{n}-").into_bytes();
    body.resize(200 + (n as usize * 37) % 900, b'a' + (n % 26) as u8);
    body
}

/// Acknowledged sends of each producer, by number.
type Acked = Arc<Mutex<BTreeMap<(u32, u32), i64>>>;

/// Sends one after the other until told to stop; what is refused is sent again.
async fn produce(
    port: u16,
    producer: u32,
    next: Arc<Mutex<u32>>,
    acked: Acked,
    stop: tokio_util::sync::CancellationToken,
) {
    let mut client = None;
    while !stop.is_cancelled() {
        let Some(c) = &mut client else {
            let endpoint =
                tonic::transport::Endpoint::from_shared(format!("http://127.0.0.1:{port}")).expect("a uri");
            match endpoint.connect().await {
                Ok(channel) => {
                    client = Some(messaging_service_client::MessagingServiceClient::new(channel));
                }
                Err(_) => tokio::task::yield_now().await,
            }
            continue;
        };
        let n = *next.lock().unwrap();
        let request = SendMessageRequest { messages: vec![client::message(TOPIC, &body(producer, n))] };
        match c.send_message(by(&format!("p{producer}"), request)).await {
            Ok(reply) if reply.get_ref().status.as_ref().is_some_and(|s| s.code() == Code::Ok) => {
                let offset = reply.into_inner().entries[0].offset;
                acked.lock().unwrap().insert((producer, n), offset);
                *next.lock().unwrap() += 1;
            }
            Ok(_) => {}
            Err(_) => client = None,
        }
    }
}

/// Kills a loaded server again and again; nothing acknowledged may be lost, changed, or out of order.
async fn crash(flush: &str, kills: u32) {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let mut server = dev(dir.path(), port, &["--flush", flush]);
    let endpoint = format!("127.0.0.1:{port}");
    run(&["topic", "create", TOPIC, "--queues", "2", "--endpoint", &endpoint]);
    let acked: Acked = Arc::default();
    let stop = tokio_util::sync::CancellationToken::new();
    let mut producers = Vec::new();
    for producer in 0..PRODUCERS {
        producers.push(tokio::spawn(produce(port, producer, Arc::default(), acked.clone(), stop.clone())));
    }
    for kill in 0..kills {
        // Under load: some hundred more sends have been acknowledged since the last kill.
        let before = acked.lock().unwrap().len();
        let until = Instant::now() + Duration::from_secs(30);
        while acked.lock().unwrap().len() < before + 200 + (kill as usize * 97) % 400 {
            assert!(Instant::now() < until, "the server takes nothing any more");
            tokio::task::yield_now().await;
        }
        server.kill();
        server.start_again();
    }
    stop.cancel();
    for producer in producers {
        producer.await.unwrap();
    }
    let acked = acked.lock().unwrap().clone();
    let stored = everything(port).await;
    check(&acked, &stored);
    assert_eq!(server.terminate(), Some(0), "a clean stop");
}

/// Bodies of each queue, by offset.
async fn everything(port: u16) -> BTreeMap<u32, BTreeMap<u64, Vec<u8>>> {
    let mut admin = client::admin(port).await;
    let described =
        admin.describe_topic(apis::admin::DescribeTopicRequest { topic: TOPIC.into() }).await.unwrap();
    let total: u64 = described.into_inner().queues.iter().map(|q| q.max_offset - q.min_offset).sum();
    let request = TailRequest { topic: TOPIC.into(), from_beginning: true };
    let mut stream = admin.tail(request).await.unwrap().into_inner();
    let mut queues: BTreeMap<u32, BTreeMap<u64, Vec<u8>>> = BTreeMap::new();
    for _ in 0..total {
        let m = stream.next().await.expect("all of them").unwrap().message.unwrap();
        let id = message::property(&m.properties, message::UNIQ_KEY);
        assert!(id.is_some(), "the properties are there");
        let old = queues.entry(m.queue_id).or_default().insert(m.queue_offset, m.body.to_vec());
        assert!(old.is_none());
    }
    queues
}

fn check(acked: &BTreeMap<(u32, u32), i64>, stored: &BTreeMap<u32, BTreeMap<u64, Vec<u8>>>) {
    let mut places: HashMap<(u32, u32), Vec<u64>> = HashMap::new();
    for messages in stored.values() {
        let offsets: Vec<u64> = messages.keys().copied().collect();
        assert_eq!(offsets, (0..offsets.len() as u64).collect::<Vec<_>>(), "offsets without a gap");
        let mut last: HashMap<u32, u32> = HashMap::new();
        for (offset, stored) in messages {
            let text = String::from_utf8_lossy(stored);
            let mut parts = text.split('-').map(|p| p.parse::<u32>());
            let (Some(Ok(producer)), Some(Ok(n))) = (parts.next(), parts.next()) else {
                panic!("corrupted: {text}")
            };
            assert!(*stored == body(producer, n), "message {producer}-{n} is corrupted");
            // A send whose answer was lost in a kill is sent again; it may stand twice, never out of order.
            let before = last.insert(producer, n);
            assert!(before.is_none_or(|b| b <= n), "{producer}-{n} stands after {before:?}");
            places.entry((producer, n)).or_default().push(*offset);
        }
    }
    for (message, offset) in acked {
        let found = places.get(message).is_some_and(|offsets| offsets.contains(&(*offset as u64)));
        assert!(found, "message {message:?} was acknowledged at offset {offset} and is gone");
    }
    println!("{} messages acknowledged, 0 lost, 0 corrupted", acked.len());
}

/// Half of the gate's kills; `FERRY_KILLS` sets another number.
fn kills() -> u32 {
    std::env::var("FERRY_KILLS").ok().and_then(|k| k.parse().ok()).unwrap_or(10)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_async_flush() {
    crash("async", kills()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_sync_flush() {
    crash("sync", kills()).await;
}

#[tokio::test]
async fn what_is_in_flight_survives_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let mut server = dev(dir.path(), port, &[]);
    let mut client = connect(port).await;
    let route = QueryRouteRequest { topic: name("t"), endpoints: endpoints() };
    client.query_route(by("c", route)).await.unwrap();
    let messages = vec![client::message("t", b"acked"), client::message("t", b"held")];
    client.send_message(by("c", SendMessageRequest { messages })).await.unwrap();
    let mut request = client::receive("t", "g");
    request.message_queue.as_mut().unwrap().broker.as_mut().unwrap().name = "ferry-dev".into();
    let got = client::drain(&mut client, by("c", request.clone())).await;
    assert_eq!(got.messages.len(), 2);
    let entry = |m: &Message| AckMessageEntry {
        receipt_handle: m.system_properties.clone().unwrap().receipt_handle.unwrap(),
        ..Default::default()
    };
    let ack = |m| AckMessageRequest { group: name("g"), topic: name("t"), entries: vec![entry(m)] };
    client.ack_message(by("c", ack(&got.messages[0]))).await.unwrap();
    server.kill();
    server.start_again();
    let mut client = connect(port).await;
    let mut again = by("c", request);
    again.set_timeout(Duration::from_secs(3));
    assert_eq!(
        client::drain(&mut client, again).await.code(),
        Code::MessageNotFound,
        "one acked, one in flight"
    );
    let reply = client.ack_message(by("c", ack(&got.messages[1]))).await.unwrap().into_inner();
    assert_eq!(reply.status.unwrap().code(), Code::Ok, "the handle given out before still acks");
    let lag = run(&["group", "lag", "g", "-o", "json", "--endpoint", &format!("127.0.0.1:{port}")]);
    let lag: serde_json::Value = serde_json::from_str(&lag).unwrap();
    assert!(lag.as_array().unwrap().iter().all(|q| q["lag"] == 0 && q["in_flight"] == 0), "{lag}");
}

#[test]
fn a_port_in_use_a_locked_folder_and_a_newer_format_are_clear_errors() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let data = dir.path().join("data");
    let data = data.to_str().unwrap();
    let mut server = dev(dir.path(), port, &[]);
    let (code, error) = ferry_fails(&["dev", "--ephemeral", "--port", &port.to_string()]);
    assert!(
        code == 1 && error.contains("is in use; stop the other process, or choose another port"),
        "{error}"
    );
    let (code, error) = ferry_fails(&["dev", "--data", data, "--port", "0"]);
    assert!(
        code == 1 && error.contains("is in use by another process; stop it, or choose another folder"),
        "{error}"
    );
    assert_eq!(server.terminate(), Some(0));

    std::fs::write(dir.path().join("data/format"), "ferrymq 99\n").unwrap();
    let (code, error) = ferry_fails(&["dev", "--data", data, "--port", "0"]);
    assert!(
        code == 1 && error.contains("has format 99, this binary knows up to 3; use a newer ferry"),
        "{error}"
    );

    let file = dir.path().join("file");
    std::fs::write(&file, "not a folder").unwrap();
    let (code, error) = ferry_fails(&["dev", "--data", file.to_str().unwrap(), "--port", "0"]);
    assert!(code == 1 && error.contains("cannot be created"), "{error}");
}

#[test]
fn usage_and_unreachable_have_their_own_exit_codes() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("broker.toml");
    std::fs::write(&config, "[storage]\nflsh = 'sync'\n").unwrap();
    let (code, error) = ferry_fails(&["broker", "--config", config.to_str().unwrap()]);
    assert!(
        code == 2 && error.contains("storage.flsh: unknown key `flsh`; did you mean `flush`?"),
        "{error}"
    );
    let (code, _) = ferry_fails(&["topic", "create"]);
    assert_eq!(code, 2);
    let nobody = format!("127.0.0.1:{}", free_port());
    let (code, error) = ferry_fails(&["topic", "list", "--endpoint", &nobody]);
    assert!(code == 3 && error.contains("start one with `ferry dev`"), "{error}");
}

#[test]
fn commands_fail_with_a_code_and_a_fix() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let _server = dev(dir.path(), port, &[]);
    let endpoint = format!("127.0.0.1:{port}");
    let at = ["--endpoint", endpoint.as_str()];
    run(&["topic", "create", "t", at[0], at[1]]);
    for (args, want) in [
        (vec!["topic", "create", "t"], "topic t exists already"),
        (vec!["topic", "create", "a b"], "ILLEGAL_TOPIC (40002)"),
        (
            vec!["topic", "describe", "none"],
            "TOPIC_NOT_FOUND (40402): topic none does not exist; create it with",
        ),
        (vec!["group", "lag", "none"], "CONSUMER_GROUP_NOT_FOUND (40403)"),
        (vec!["group", "set", "none", "--max-attempts", "3"], "CONSUMER_GROUP_NOT_FOUND (40403)"),
        (vec!["group", "reset", "none", "--to", "1h"], "CONSUMER_GROUP_NOT_FOUND (40403)"),
        (vec!["send", "t", "x", "--in", "1h"], "MESSAGE_PROPERTY_CONFLICT_WITH_TYPE (40014)"),
        (vec!["send", "mixed", "x", "--in", "41d"], "ILLEGAL_DELIVERY_TIME (40012)"),
        (vec!["schedule", "cancel", "t", "nonsense"], "BAD_REQUEST (40000): the recall handle is malformed"),
        (vec!["tx", "resolve", "t", "nonsense", "commit"], "INVALID_TRANSACTION_ID (40008)"),
        (vec!["dlq", "replay", "none"], "TOPIC_NOT_FOUND (40402)"),
        (vec!["send", "t", ""], "MESSAGE_BODY_EMPTY (41302)"),
    ] {
        let args: Vec<&str> = args.into_iter().chain(at).collect();
        let (code, error) = ferry_fails(&args);
        assert!(code == 1 && error.contains(want), "{args:?}: {code} {error}");
    }
}

/// A folder of a stopped broker: 300 messages of 1 KiB, many years old, in log files of 64 KiB.
fn old_folder(data: &Path) {
    let options = store::Options {
        dir: data.into(),
        flush: store::FlushMode::Async,
        log: store::log::LogOptions { segment_bytes: 64 << 10, chunk_bytes: 8 << 10, reserve_bytes: 8 << 10 },
        queue_file_entries: store::queue::ENTRIES_PER_FILE,
        key_index: store::keys::Shape::default(),
        retention: store::Retention::default(),
        host: ([127, 0, 0, 1], 1).into(),
        new_key: [1; 16],
    };
    let (fs, then) = (Arc::new(store::fs::OsFs), model::Timestamp(1_000));
    let lock = store::engine::claim(&*fs, &options).unwrap();
    let kv = Arc::new(store::kv::RocksKv::open(&data.join("rocksdb")).unwrap());
    let (mut engine, _) = store::Engine::open(options, fs, kv, lock, then).unwrap();
    let topic = model::Topic::stored("old");
    engine.put_meta(store::change::Change::PutTopic(model::TopicConfig::normal(topic.clone())));
    for _ in 0..300 {
        let message = store::NewMessage {
            queue: 0,
            body: vec![b'x'; 1024].into(),
            properties: bytes::Bytes::new(),
            sys_flag: 0,
            born_timestamp_ms: then.0,
            born_host: ([127, 0, 0, 1], 2).into(),
            hold: store::Hold::Nothing,
        };
        engine.append(&topic, &[message], then).unwrap();
        engine.commit(then).unwrap();
    }
    engine.close(then).unwrap();
}

#[test]
fn a_stopped_brokers_folder_is_pruned() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    old_folder(&data);
    let folder = data.to_str().unwrap();
    let prune = |more: &[&str]| -> serde_json::Value {
        let args = [&["store", "prune", folder, "-o", "json"], more].concat();
        serde_json::from_str(&run(&args)).unwrap()
    };
    assert_eq!(prune(&["--hours", "4000000"])["bytes_let_go"], 0, "not that old");
    let let_go = prune(&[])["bytes_let_go"].as_u64().unwrap();
    assert!((256 << 10..400 << 10).contains(&let_go) && let_go % (64 << 10) == 0, "{let_go}");
    assert_eq!(prune(&[])["bytes_let_go"], 0, "once");
    run(&["store", "verify", folder]);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(ferry())
        .args(["store", "usage", dir.path().to_str().unwrap()])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stderr), "", "no panic about a broken pipe");
}

#[test]
fn what_is_held_in_memory_is_shown_against_its_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let _server = dev(dir.path(), port, &[]);
    let endpoint = format!("127.0.0.1:{port}");
    run(&["send", "t", "hello", "--endpoint", &endpoint]);
    let bounds = run(&["store", "usage", "--bounds", "-o", "json", "--endpoint", &endpoint]);
    let bounds: Vec<serde_json::Value> = serde_json::from_str(&bounds).unwrap();
    assert!(bounds.len() >= 11, "{bounds:?}");
    for bound in &bounds {
        assert!(bound["limit"].as_u64().unwrap() > 0, "{bound}");
        assert!(bound["used"].as_u64().unwrap() <= bound["limit"].as_u64().unwrap(), "{bound}");
    }
    let entries = bounds.iter().find(|b| b["what"] == "queue entries no checkpoint has taken").unwrap();
    assert!(entries["used"].as_u64().unwrap() > 0, "{entries}");
}

/// The README's transcript, line by line, against a server. `<…>` stands for anything.
#[test]
fn the_readme_tells_the_truth() {
    transcripts("README.md");
}

#[test]
fn the_kinds_are_as_they_are_shown() {
    transcripts("docs/kinds.md");
}

/// What is between the fences of a language.
fn blocks(text: &str, language: &str) -> String {
    let fence = format!("```{language}\n");
    text.split(&fence).skip(1).filter_map(|rest| rest.split("```").next()).collect()
}

/// Every line of the examples is one that a client's suite runs.
#[test]
fn the_examples_are_executed() {
    let home = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = std::fs::read_to_string(home.join("../docs/kinds.md")).unwrap();
    for (language, suite) in [
        ("python", "python/suite.py"),
        ("java", "java/Suite.java"),
        ("go", "go/main.go"),
        ("js", "node/suite.mjs"),
        ("rust", "rust/src/main.rs"),
    ] {
        let source = std::fs::read_to_string(home.join("clients").join(suite)).unwrap();
        let examples = blocks(&docs, language);
        assert!(examples.lines().count() >= 4, "{language}");
        for line in examples.lines() {
            assert!(source.contains(line.trim()), "{suite} does not do this: {line}");
        }
    }
}

fn transcripts(page: &str) {
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(page)).unwrap();
    let transcript = blocks(&page, "console");
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let _server = dev(dir.path(), port, &[]);
    let mut commands: Vec<(String, Vec<String>)> = Vec::new();
    for line in transcript.lines() {
        match line.strip_prefix("$ ") {
            Some(command) => commands.push((command.to_owned(), Vec::new())),
            None => commands.last_mut().expect("a command first").1.push(line.trim_end().to_owned()),
        }
    }
    assert!(commands.len() >= 3);
    for (command, want) in commands {
        let out = Command::new("sh")
            .args(["-c", &command])
            .env("PATH", format!("{}:/usr/bin:/bin", ferry().parent().unwrap().display()))
            .env("FERRY_ENDPOINT", format!("127.0.0.1:{port}"))
            .output()
            .unwrap();
        let said = String::from_utf8(out.stdout).unwrap();
        let said: Vec<&str> = said.lines().map(str::trim_end).collect();
        assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(said.len(), want.len(), "{command}: {said:?}");
        for (said, want) in said.iter().zip(&want) {
            let same = match want.split_once('<') {
                Some((head, tail)) => {
                    said.starts_with(head) && said.ends_with(tail.split_once('>').expect("closed").1)
                }
                None => said == want,
            };
            assert!(same, "{command}:\n  said {said:?}\n  want {want:?}");
        }
    }
}

/// A small file system in memory, taken away at the end. Needs root, as the gate has it.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(at: &Path, size: &str) -> Self {
        std::fs::create_dir(at).unwrap();
        let options = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).status();
        assert!(mounted.is_ok_and(|s| s.success()), "mounting a tmpfs needs root");
        Self(at.into())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_refuses_sends_keeps_everything_and_goes_on_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(&dir.path().join("disk"), "224m");
    let ballast = disk.0.join("ballast");
    std::fs::write(&ballast, vec![1; 100 << 20]).unwrap();
    let port = free_port();
    let mut server = dev(&disk.0, port, &[]);
    let endpoint = format!("127.0.0.1:{port}");
    let lines = dir.path().join("lines");
    std::fs::write(&lines, "y".repeat(1 << 20)).unwrap();
    let send = || {
        let args = ["send", "full", "--file", lines.to_str().unwrap(), "--endpoint", &endpoint];
        let out = Command::new(ferry()).args(args).output().expect("ferry runs");
        (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let mut stored = 0;
    let refused = loop {
        match send() {
            (true, _) => stored += 1,
            (false, why) => break why,
        }
        assert!(stored < 200, "the disk does not fill");
    };
    assert!(refused.contains("MASTER_PERSISTENCE_TIMEOUT") && refused.contains("full"), "{refused}");
    assert!(stored > 20, "{stored} MiB fitted");
    // Acknowledgements go on.
    let args = ["receive", "full", "--group", "g", "-n", "3", "--ack", "--endpoint", &endpoint, "-o", "json"];
    assert_eq!(run(&args).lines().count(), 3);
    assert!(!send().0, "still full");

    std::fs::remove_file(&ballast).unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while !send().0 {
        assert!(Instant::now() < until, "sends do not go on though there is space");
    }
    stored += 1;
    server.kill();
    server.start_again();
    let queues: serde_json::Value =
        serde_json::from_str(&run(&["topic", "describe", "full", "--endpoint", &endpoint, "-o", "json"]))
            .unwrap();
    let count = |q: &serde_json::Value| q["max"].as_u64().unwrap() - q["min"].as_u64().unwrap();
    assert_eq!(queues.as_array().unwrap().iter().map(count).sum::<u64>(), stored, "{queues}");
    let lag: serde_json::Value =
        serde_json::from_str(&run(&["group", "lag", "g", "--endpoint", &endpoint, "-o", "json"])).unwrap();
    let committed: u64 = lag.as_array().unwrap().iter().map(|q| q["committed"].as_u64().unwrap()).sum();
    assert_eq!(committed, 3, "{lag}");
    server.kill();
}
