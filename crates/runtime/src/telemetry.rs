//! Logs: text on a terminal, JSON lines otherwise; to stderr. `FERRY_LOG` filters (`info`, `warn,broker=debug`).

use std::io::IsTerminal;

use tracing_subscriber::{Layer, filter::Targets, layer::SubscriberExt, util::SubscriberInitExt};

pub fn init(default_filter: &str) {
    let given = std::env::var("FERRY_LOG").ok();
    let filter = given.as_deref().unwrap_or(default_filter).parse::<Targets>();
    let bad = filter.is_err();
    let filter = filter.unwrap_or_else(|_| Targets::new().with_default(tracing::Level::INFO));
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let layer = match std::io::stderr().is_terminal() {
        true => layer.compact().boxed(),
        false => layer.json().boxed(),
    };
    // A second call (tests) changes nothing.
    let _ = tracing_subscriber::registry().with(layer.with_filter(filter)).try_init();
    if bad {
        tracing::warn!(
            FERRY_LOG = given,
            "not a log filter, using info; write for example `warn,broker=debug`"
        );
    }
}
