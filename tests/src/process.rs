//! `ferry` as a process: started on a free port, waited for by its ready file, killed as wanted.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The binary, built beside this test.
pub fn ferry() -> PathBuf {
    let exe = std::env::current_exe().expect("this test has a path");
    let dir = exe.parent().and_then(Path::parent).expect("tests lie in target/PROFILE/deps");
    let path = dir.join("ferry");
    assert!(path.exists(), "{} is missing: run `cargo build` first", path.display());
    path
}

/// A port that nobody listens on just now.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    listener.local_addr().expect("it is bound").port()
}

/// Runs a `ferry` command to its end; its standard output. Panics if it fails.
pub fn run(args: &[&str]) -> String {
    let out = Command::new(ferry()).args(args).output().expect("ferry runs");
    assert!(out.status.success(), "ferry {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text")
}

/// A server process; killed when dropped.
pub struct Server {
    child: Child,
    args: Vec<String>,
    ready: PathBuf,
}

impl Server {
    /// Starts `ferry ARGS` and waits until it is ready.
    pub fn start(dir: &Path, args: &[&str]) -> Self {
        let ready = dir.join(format!("ready-{}-{}", args[0], free_port()));
        let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        let child = Self::spawn(&args, &ready);
        Self { child, args, ready }
    }

    fn spawn(args: &[String], ready: &Path) -> Child {
        let _ = std::fs::remove_file(ready);
        let mut child = Command::new(ferry())
            .args(args)
            .arg("--ready-file")
            .arg(ready)
            .env("FERRY_LOG", "error")
            .stdout(Stdio::null())
            .spawn()
            .expect("ferry starts");
        let until = Instant::now() + Duration::from_secs(30);
        while !ready.exists() {
            assert!(Instant::now() < until, "ferry {args:?} is not ready after 30 s");
            if let Some(status) = child.try_wait().expect("a child") {
                panic!("ferry {args:?} ended with {status} before it was ready");
            }
            std::thread::yield_now();
            std::thread::park_timeout(Duration::from_millis(5));
        }
        child
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// kill -9.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The same command again, on the same folder.
    pub fn start_again(&mut self) {
        self.child = Self::spawn(&self.args, &self.ready);
    }

    /// SIGTERM, and the exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        let pid = self.pid().to_string();
        let _ = Command::new("kill").args(["-TERM", &pid]).status();
        self.child.wait().expect("a child").code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Lines of a child's standard output, each waited for with a limit.
pub struct Lines(mpsc::Receiver<String>);

impl Lines {
    pub fn of(child: &mut Child) -> Self {
        use std::io::BufRead;
        let stdout = child.stdout.take().expect("piped");
        let (lines, received) = mpsc::channel();
        std::thread::spawn(move || {
            for line in std::io::BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = lines.send(line);
            }
        });
        Self(received)
    }

    /// Waits for a line; panics if the output ends or the time is up.
    pub fn wait_for(&self, wanted: &str, limit: Duration) {
        let until = Instant::now() + limit;
        loop {
            match self.0.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) if line.trim() == wanted => return,
                Ok(_) => {}
                Err(_) => panic!("the client did not say {wanted:?} within {limit:?}"),
            }
        }
    }
}
