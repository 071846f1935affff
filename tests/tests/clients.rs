//! Official clients, unmodified, against real `ferry` processes. None is skipped: a missing client is a failure,
//! and `tools/clients.sh` installs them all.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

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

    fn steady(&self, home: &Path, port: u16, disturb: impl FnOnce()) {
        let mut command = self.command(home, port, "steady");
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the client runs");
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
