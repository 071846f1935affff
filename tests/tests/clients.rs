//! Official clients, unmodified, against real `ferry` processes. None is skipped: a missing client is a failure,
//! and `tools/clients.sh` installs them all.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use prost::Message as _;
use tests::process::{Lines, Server, free_port, run};

fn cache() -> PathBuf {
    let home = || PathBuf::from(std::env::var("HOME").expect("HOME is set"));
    let base = std::env::var("FERRYMQ_CACHE").map(PathBuf::from);
    let cache = std::env::var("XDG_CACHE_HOME").map_or_else(|_| home().join(".cache"), PathBuf::from);
    base.unwrap_or_else(|_| cache.join("ferrymq")).join("clients")
}

fn suites() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients")
}

/// One client in one way of using it.
struct Suite {
    name: &'static str,
    program: PathBuf,
    args: Vec<String>,
    env: Vec<(&'static str, String)>,
}

impl Suite {
    fn new(name: &'static str, program: impl Into<PathBuf>, args: &[&Path]) -> Self {
        let args = args.iter().map(|a| a.display().to_string()).collect();
        Self { name, program: program.into(), args, env: Vec::new() }
    }

    fn env(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.env.push((key, value.into()));
        self
    }

    fn command(&self, home: &Path, port: u16, mode: &str) -> Command {
        let mut command = Command::new(&self.program);
        // Clients write logs into the home folder.
        command.args(&self.args).args([&format!("127.0.0.1:{port}"), self.name, mode]).env("HOME", home);
        command.envs(self.env.iter().map(|(k, v)| (k, v)));
        command
    }

    /// Everything on one `ferry dev`, then a kill -9 of it under a living client.
    fn test(&self) {
        let dir = tempfile::tempdir().expect("a folder");
        let port = free_port();
        let data = dir.path().join("data");
        let (port_text, data_text) = (port.to_string(), data.display().to_string());
        let mut server = Server::start(dir.path(), &["dev", "--data", &data_text, "--port", &port_text]);
        let endpoint = format!("127.0.0.1:{port}");
        let group = format!("{}-dlq", self.name);
        run(&["group", "create", &group, "--max-attempts", "2", "--endpoint", &endpoint]);
        let out = self.command(dir.path(), port, "basic").output().expect("the client runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(out.status.success(), "{}\n{}\n{}", self.name, text(&out.stdout), text(&out.stderr));
        let letters = format!("%DLQ%{group}");
        let letter = run(&["tail", &letters, "--from-beginning", "-n", "1", "--endpoint", &endpoint]);
        assert!(letter.contains("fails"), "{letter}");

        self.steady(dir.path(), port, || {
            server.kill();
            server.start_again();
        });
    }

    /// A proxy of a cluster is killed and comes back, under a living client.
    fn proxy_restart(&self) {
        let dir = tempfile::tempdir().expect("a folder");
        let mut cluster = Processes::start(dir.path());
        let port = cluster.port;
        self.steady(dir.path(), port, || {
            cluster.proxy.kill();
            cluster.proxy.start_again();
        });
    }

    /// Messages in order, scheduled, recalled and of transactions, with a kill -9 of the server in the middle of each.
    fn kinds(&self) {
        let dir = tempfile::tempdir().expect("a folder");
        let port = free_port();
        let data = dir.path().join("data");
        let (port_text, data_text) = (port.to_string(), data.display().to_string());
        let mut server = Server::start(dir.path(), &["dev", "--data", &data_text, "--port", &port_text]);
        let (group, endpoint) = (format!("{}-fifo", self.name), format!("127.0.0.1:{port}"));
        run(&["group", "create", &group, "--order", "fifo", "--endpoint", &endpoint]);
        // Node.js knows no other kind of back-off, and takes a message that failed for a dead letter without one.
        run(&["group", "set", &group, "--exponential", "1s", "10s", "--endpoint", &endpoint]);
        self.disturbed("kinds", dir.path(), port, || {
            server.kill();
            server.start_again();
        });
    }

    fn steady(&self, home: &Path, port: u16, disturb: impl FnOnce()) {
        self.disturbed("steady", home, port, disturb);
    }

    fn disturbed(&self, mode: &str, home: &Path, port: u16, disturb: impl FnOnce()) {
        let mut command = self.command(home, port, mode);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("the client runs");
        let lines = Lines::of(&mut child);
        lines.wait_for("READY", Duration::from_secs(60));
        disturb();
        child.stdin.take().expect("piped").write_all(b"\n").expect("the client listens");
        lines.wait_for("DONE", Duration::from_secs(90));
        assert!(child.wait().expect("a child").success(), "{}", self.name);
    }
}

/// Name server, broker and proxy, each a process.
struct Processes {
    _namesrv: Server,
    _broker: Server,
    proxy: Server,
    port: u16,
}

impl Processes {
    fn start(dir: &Path) -> Self {
        let [namesrv, broker, port] = [free_port(), free_port(), free_port()];
        let listen = |port: u16| format!("listen=\"127.0.0.1:{port}\"");
        let names = format!("namesrv=[\"127.0.0.1:{namesrv}\"]");
        let data = format!("data=\"{}\"", dir.join("data").display());
        let _namesrv = Server::start(dir, &["namesrv", "--set", &listen(namesrv)]);
        let _broker =
            Server::start(dir, &["broker", "--set", &listen(broker), "--set", &names, "--set", &data]);
        let args = ["proxy", "--set", &listen(port), "--set", &names, "--set", "auto_create=true"];
        let proxy = Server::start(dir, &args);
        Self { _namesrv, _broker, proxy, port }
    }
}

fn python() -> Suite {
    Suite::new("python", cache().join("python/bin/python"), &[&suites().join("python/suite.py")])
}

fn node() -> Suite {
    let modules = cache().join("node").display().to_string();
    Suite::new("node", "node", &[&suites().join("node/suite.mjs")]).env("FERRY_NODE_MODULES", modules)
}

fn go(name: &'static str, tls: &str) -> Suite {
    Suite::new(name, cache().join("go-suite"), &[]).env("TLS", tls)
}

fn rust() -> Suite {
    Suite::new("rust", cache().join("rust-target/debug/ferrymq-client-suite"), &[])
}

fn java(name: &'static str, version: &str, tls: &str) -> Suite {
    let classes = cache().join(format!("java-{version}")).display().to_string();
    let path = format!("{classes}/*:{classes}");
    Suite::new(name, "java", &[Path::new("-Xmx256m"), Path::new("-cp"), Path::new(&path), Path::new("Suite")])
        .env("TLS", tls)
}

macro_rules! suites {
    ($($name:ident: $suite:expr),* $(,)?) => {$(
        mod $name {
            use super::*;

            #[test]
            fn dev_and_kill() {
                $suite.test();
            }

            #[test]
            fn kinds() {
                $suite.kinds();
            }

            #[test]
            fn proxy_restart() {
                $suite.proxy_restart();
            }
        }
    )*};
}

suites! {
    python_5_1_2: python(),
    node_1_0_8: node(),
    rust_5_0_0: rust(),
    go_5_1_4_tls: go("go-tls", "1"),
    go_5_1_4_plaintext: go("go-plain", "0"),
    java_5_2_0_tls: java("java52-tls", "5.2.0", "1"),
    java_5_2_0_plaintext: java("java52-plain", "5.2.0", "0"),
    java_5_0_7_tls: java("java507-tls", "5.0.7", "1"),
    java_5_0_7_plaintext: java("java507-plain", "5.0.7", "0"),
}

/// Every message, field, enum value and method of some files, a line each.
fn lines(files: &[prost_types::FileDescriptorProto]) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    for file in files.iter().filter(|f| f.package() == "apache.rocketmq.v2") {
        file.enum_type.iter().for_each(|e| enum_lines(".", e, &mut out));
        file.message_type.iter().for_each(|m| message_lines(".", m, &mut out));
        for service in &file.service {
            for m in &service.method {
                let (from, to) = (m.client_streaming(), m.server_streaming());
                let io = format!("{} {} {from} {to}", m.input_type(), m.output_type());
                out.insert(format!("rpc {}.{} {io}", service.name(), m.name()));
            }
        }
    }
    out
}

fn enum_lines(scope: &str, e: &prost_types::EnumDescriptorProto, out: &mut BTreeSet<String>) {
    out.extend(e.value.iter().map(|v| format!("enum {scope}{}.{} = {}", e.name(), v.name(), v.number())));
}

fn message_lines(scope: &str, m: &prost_types::DescriptorProto, out: &mut BTreeSet<String>) {
    let scope = format!("{scope}{}.", m.name());
    for f in &m.field {
        let oneof = f.oneof_index.filter(|_| !f.proto3_optional()).map(|i| m.oneof_decl[i as usize].name());
        let kind =
            format!("{:?} {:?} {} optional={}", f.r#type(), f.label(), f.type_name(), f.proto3_optional());
        out.insert(format!("field {scope}{} = {} {kind} {oneof:?}", f.name(), f.number()));
    }
    m.enum_type.iter().for_each(|e| enum_lines(&scope, e, out));
    m.nested_type.iter().for_each(|n| message_lines(&scope, n, out));
}

/// Everything that the official Python package has exists identically here; what is here beyond it is this table.
#[test]
fn our_protocol_is_the_official_one() {
    let script = "
from google.protobuf import descriptor_pb2
from rocketmq.grpc_protocol import admin_pb2, definition_pb2, service_pb2
for module in (definition_pb2, service_pb2, admin_pb2):
    p = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(p)
    print(p.SerializeToString().hex())
";
    let out = Command::new(cache().join("python/bin/python")).args(["-c", script]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let byte = |hex: &[u8]| u8::from_str_radix(std::str::from_utf8(hex).unwrap(), 16).unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let official: Vec<_> = text
        .lines()
        .map(|line| line.as_bytes().chunks(2).map(byte).collect::<Vec<u8>>())
        .map(|bytes| prost_types::FileDescriptorProto::decode(&bytes[..]).unwrap())
        .collect();
    let ours = prost_types::FileDescriptorSet::decode(apis::DESCRIPTORS).unwrap();
    let (official, ours) = (lines(&official), lines(&ours.file));
    assert!(official.len() > 300, "{}", official.len());
    assert_eq!(
        official.difference(&ours).collect::<Vec<_>>(),
        [] as [&String; 0],
        "missing or different here"
    );
    let beyond: Vec<&str> = ours.difference(&official).map(String::as_str).collect();
    let table = [
        "enum .Code.INVALID_CLIENT_PROPERTIES = 40021",
        "field .Settings.ClientPropertiesEntry.key = 1 String Optional  optional=false None",
        "field .Settings.ClientPropertiesEntry.value = 2 String Optional  optional=false None",
        "field .Settings.client_properties = 9 Message Repeated .apache.rocketmq.v2.Settings.ClientPropertiesEntry optional=false None",
    ];
    assert_eq!(beyond, table);
}
