//! Logs: text on a terminal, JSON lines otherwise; to stderr. `FERRY_LOG` filters (`info`, `broker=debug`).

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

pub fn init(default_filter: &str) {
    let filter = EnvFilter::try_from_env("FERRY_LOG").unwrap_or_else(|_| EnvFilter::new(default_filter));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second call (tests) changes nothing.
    let _ = match std::io::stderr().is_terminal() {
        true => builder.compact().try_init(),
        false => builder.json().try_init(),
    };
}
