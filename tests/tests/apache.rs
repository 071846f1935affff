//! Beside the real Apache RocketMQ 5.5.0: its folder is taken over, and it reads our log.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use apis::v2::{Code, QueryRouteRequest};
use serde_json::Value;
use tests::client;
use tests::process::{Server, free_port, run};

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/apache.sh")
}

struct Apache {
    script: Child,
    port: u16,
    dir: PathBuf,
}

impl Apache {
    fn start(dir: &Path, conf: &[&str]) -> Self {
        // gRPC, remoting, name server; the broker's three stand ten higher.
        let free = |port: u16| {
            [0, 1, 2, 8, 10, 11].iter().all(|i| TcpListener::bind(("127.0.0.1", port + i)).is_ok())
        };
        let port = (0..100).map(|_| free_port().min(65_000)).find(|p| free(*p)).expect("free ports");
        let script = Command::new(script())
            .arg(dir)
            .arg(port.to_string())
            .args(conf)
            .env("HEAP", "512m")
            .stdout(Stdio::null())
            .spawn()
            .expect("the script runs");
        let mut apache = Self { script, port, dir: dir.into() };
        let until = Instant::now() + Duration::from_secs(120);
        while !dir.join("ready").exists() {
            assert!(Instant::now() < until, "Apache RocketMQ is not ready after 120 s");
            assert_eq!(apache.script.try_wait().unwrap(), None, "Apache RocketMQ did not start");
            std::thread::park_timeout(Duration::from_millis(50));
        }
        apache
    }

    /// Again until it works: the broker registers with its name server a while after it is ready.
    fn admin(&self, args: &[&str]) {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let out =
                Command::new(script()).args(["admin", &self.port.to_string()]).args(args).output().unwrap();
            let text = String::from_utf8_lossy(&out.stdout);
            if text.contains("success") {
                return;
            }
            assert!(Instant::now() < until, "{args:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
        }
    }

    fn topic_and_group(&self) {
        let topic = ["updateTopic", "-c", "DefaultCluster", "-t", "T", "-r", "4", "-w", "4"];
        self.admin(&[&topic[..], &["-a", "+message.type=NORMAL"]].concat());
        self.admin(&["updateSubGroup", "-c", "DefaultCluster", "-g", "G", "-s", "true", "-r", "9"]);
        self.await_route();
    }

    /// The proxy learns of a new topic a while after its name server.
    #[tokio::main(flavor = "current_thread")]
    async fn await_route(&self) {
        let mut proxy = client::connect(self.port).await;
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let request = QueryRouteRequest { topic: client::name("T"), endpoints: client::endpoints() };
            let reply = proxy.query_route(client::by("c", request)).await.expect("the proxy answers");
            match reply.into_inner().status {
                Some(status) if status.code() == Code::Ok => return,
                status => assert!(Instant::now() < until, "{status:?}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The folder as it was left.
    fn stop(mut self) -> PathBuf {
        self.terminate();
        self.dir.join("store")
    }

    fn terminate(&mut self) {
        if matches!(self.script.try_wait(), Ok(None)) {
            let _ = Command::new("kill").arg(self.script.id().to_string()).status();
        }
        let _ = self.script.wait();
    }
}

impl Drop for Apache {
    fn drop(&mut self) {
        self.terminate();
    }
}

/// Lines of JSON that a command prints.
fn json(endpoint: &str, args: &[&str]) -> Vec<Value> {
    let text = run(&[args, &["--endpoint", endpoint, "-o", "json"]].concat());
    let values: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    match &values[..] {
        [Value::Array(rows)] => rows.clone(),
        _ => values,
    }
}

/// More than there are.
const ALL: &str = "64";

/// As many messages as are asked for, or what came within the time.
fn received(endpoint: &str, max: &str, more: &[&str]) -> Vec<(String, u64)> {
    // The reference refuses polls of less than 5 s, also for what is left of a longer wait.
    let wait = if max == ALL { "6" } else { "60" };
    let args = [&["receive", "T", "--group", "G", "-n", max, "--wait", wait], more].concat();
    let messages = json(endpoint, &args).into_iter().filter(|m| m["message_id"].is_string());
    messages.map(|m| (m["body"].as_str().unwrap().to_owned(), m["attempt"].as_u64().unwrap())).collect()
}

fn sums(dir: &Path) -> BTreeMap<PathBuf, u64> {
    let mut out = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => out.extend(sums(&path)),
            // Large and sparse ones by their beginning.
            false => {
                let mut head = Vec::new();
                let file = std::fs::File::open(&path).unwrap();
                file.take(8 << 20).read_to_end(&mut head).unwrap();
                let mut hasher = DefaultHasher::new();
                head.hash(&mut hasher);
                out.insert(path, hasher.finish());
            }
        }
    }
    out
}

/// Waits until the log holds so many messages of retry topics.
fn await_retries(log: &Path, count: usize) {
    let until = Instant::now() + Duration::from_secs(60);
    let retries_of = |file: PathBuf| {
        let rows = run(&["store", "inspect", file.to_str().unwrap(), "-n", "100000", "-o", "json"]);
        let rows: Vec<Value> = serde_json::from_str(&rows).unwrap();
        rows.iter().filter(|r| r["topic"].as_str().is_some_and(|t| t.starts_with("%RETRY%"))).count()
    };
    loop {
        let files = std::fs::read_dir(log).unwrap().map(|f| f.unwrap().path());
        if files.map(retries_of).sum::<usize>() >= count {
            return;
        }
        assert!(Instant::now() < until, "Apache RocketMQ puts nothing back");
        std::thread::park_timeout(Duration::from_millis(200));
    }
}

#[test]
fn apaches_folder_is_taken_over() {
    take_over(&[], &[]);
}

#[test]
fn apaches_folder_with_rocksdb_is_taken_over_in_place() {
    take_over(&["storeType=defaultRocksDB"], &["--in-place"]);
}

#[test]
fn apaches_folder_with_the_second_generation_of_metadata_is_taken_over() {
    take_over(&["storeType=defaultRocksDB", "configManagerVersion=v2"], &[]);
}

fn take_over(conf: &[&str], how: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let common = ["flushDiskType=ASYNC_FLUSH", "mappedFileSizeCommitLog=1048576"];
    let apache = Apache::start(&dir.path().join("apache"), &[&common[..], conf].concat());
    apache.topic_and_group();
    let endpoint = format!("127.0.0.1:{}", apache.port);
    let lines = dir.path().join("lines");
    // Some of the log's files are full.
    std::fs::write(&lines, vec!["y".repeat(100 << 10); 25].join("\n")).unwrap();
    run(&["send", "T", "--file", lines.to_str().unwrap(), "--endpoint", &endpoint]);
    assert_eq!(received(&endpoint, "25", &["--ack"]).len(), 25);
    let bodies: Vec<String> = (0..60).map(|i| format!("message {i}")).collect();
    std::fs::write(&lines, bodies.join("\n")).unwrap();
    run(&[
        "send",
        "T",
        "--file",
        lines.to_str().unwrap(),
        "--key",
        "order",
        "--tag",
        "a",
        "--endpoint",
        &endpoint,
    ]);
    // Some are acknowledged, some go to the retry topic, some are still in flight at the end.
    let mut done: Vec<String> = received(&endpoint, "20", &["--ack"]).into_iter().map(|m| m.0).collect();
    let retried = received(&endpoint, "5", &["--invisible", "10"]);
    await_retries(&apache.dir.join("store/commitlog"), 5);
    let held = received(&endpoint, "7", &["--invisible", "36000"]);
    assert_eq!((done.len(), retried.len()), (20, 5));
    let source = apache.stop();
    let before = sums(&source);

    let data = dir.path().join("data").display().to_string();
    let source_path = source.display().to_string();
    run(&["store", "import", &source_path, "--data", &data, "--dry-run"]);
    assert!(!Path::new(&data).exists());
    run(&[&["store", "import", &source_path, "--data", &data], how].concat());
    assert_eq!(sums(&source), before, "the source is only read");
    run(&["store", "verify", &data]);

    let port = free_port().to_string();
    let endpoint = format!("127.0.0.1:{port}");
    let mut server = Server::start(dir.path(), &["dev", "--data", &data, "--port", &port]);
    let groups = json(&endpoint, &["group", "list"]);
    let group = groups.iter().find(|g| g["group"] == "G").unwrap();
    assert_eq!(group["max_attempts"], 10, "nine retries are ten deliveries");
    assert_eq!(json(&endpoint, &["message", "find", "T", "--key", "order", "-n", "100"]).len(), 60);
    let rest = received(&endpoint, ALL, &["--ack"]);
    let late = |body: &String| retried.iter().any(|r| r.0 == *body) && !held.iter().any(|h| h.0 == *body);
    for (body, attempt) in &rest {
        assert_eq!(*attempt, if late(body) { 2 } else { 1 }, "{body}");
    }
    done.extend(rest.into_iter().map(|m| m.0));
    done.extend(held.into_iter().map(|m| m.0));
    done.sort_unstable();
    let mut all = bodies;
    all.sort_unstable();
    assert_eq!(done, all, "each exactly once: acknowledged there, in flight, or received here");
    server.kill();
    assert_eq!(sums(&source), before, "nor does serving from it change it");
}

#[test]
fn apache_reads_our_log() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let port = free_port().to_string();
    let endpoint = format!("127.0.0.1:{port}");
    let mut server = Server::start(dir.path(), &["dev", "--data", data.to_str().unwrap(), "--port", &port]);
    let lines = dir.path().join("lines");
    let bodies: Vec<String> = (0..50).map(|i| "x".repeat(i * 13 + 1) + &i.to_string()).collect();
    std::fs::write(&lines, bodies.join("\n")).unwrap();
    run(&[
        "send",
        "T",
        "--file",
        lines.to_str().unwrap(),
        "--key",
        "k",
        "--property",
        "p=v",
        "--endpoint",
        &endpoint,
    ]);
    run(&["receive", "T", "--group", "other", "-n", "3", "--ack", "--endpoint", &endpoint]);
    assert_eq!(server.terminate(), Some(0));

    let home = dir.path().join("apache");
    std::fs::create_dir_all(home.join("store")).unwrap();
    let copied = Command::new("cp")
        .args(["-r", "--sparse=always"])
        .arg(data.join("commitlog"))
        .arg(home.join("store"))
        .status();
    assert!(copied.unwrap().success());
    let apache = Apache::start(&home, &["flushDiskType=ASYNC_FLUSH"]);
    apache.topic_and_group();
    let got = received(&format!("127.0.0.1:{}", apache.port), "50", &["--ack"]);
    let mut got: Vec<String> = got.into_iter().map(|m| m.0).collect();
    got.sort_unstable();
    let mut all = bodies;
    all.sort_unstable();
    assert_eq!(got, all);
}
