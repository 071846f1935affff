//! A whole world on one thread: clients, proxy, broker and name server, with seeded time, network and disk.
//! Calls are delayed, lost, or their answers are; the broker's machine loses its power. Same seed, same trace.
//! What clients do and expect is in [`clients`].

mod clients;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use apis::brokers::{Brokers, NameServers, Reply};
use apis::context::CallContext;
use apis::internal::*;
use apis::status::Error;
use apis::v2;
use broker::engine_loop::EngineLoop;
use broker::{Broker, LocalBrokers};
use crossbeam_channel::{Receiver, unbounded};
use model::{Clock, Timestamp, limits};
use namesrv::LocalNameServer;
use parking_lot::Mutex;
use proxy::service::Messaging;
use proxy::{Proxy, ProxyConfig};
use store::fs::{Fs, MemFs};
use store::kv::MemKv;
use store::log::LogOptions;
use store::{Engine, FlushMode, Options};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use self::clients::{Facts, Hand};

/// The world's one source of chance.
#[derive(Clone)]
struct Random(Arc<Mutex<fastrand::Rng>>);

impl Random {
    fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(fastrand::Rng::with_seed(seed))))
    }

    fn below(&self, n: u64) -> u64 {
        self.0.lock().u64(..n)
    }

    fn one_in(&self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// The runtime's virtual time as a clock.
#[derive(Clone)]
struct SimClock(Instant);

impl Clock for SimClock {
    fn now(&self) -> Timestamp {
        Timestamp(1_700_000_000_000 + self.0.elapsed().as_millis() as i64)
    }
}

const NAME: &str = "broker-a";

/// The broker's machine: its disk survives, its process does not.
struct Machine {
    fs: MemFs,
    kv: MemKv,
    running: Mutex<Option<(Broker, JoinHandle<()>)>>,
    clock: SimClock,
    random: Random,
}

impl Machine {
    fn boot(&self) {
        let options = Options {
            dir: "/data".into(),
            flush: FlushMode::Sync,
            log: LogOptions { segment_bytes: 1 << 20, chunk_bytes: 64 << 10, reserve_bytes: 64 << 10 },
            queue_file_entries: 64,
            key_index: store::keys::Shape { slots: 64, entries: 1000 },
            retention: store::Retention::default(),
            host: ([127, 0, 0, 1], 10911).into(),
            new_key: [3; 16],
        };
        let fs: Arc<dyn Fs> = Arc::new(self.fs.clone());
        let lock = store::engine::claim(&*fs, &options).expect("the folder is free");
        let now = self.clock.now();
        let (engine, report) =
            Engine::open(options, fs, Arc::new(self.kv.clone()), lock, now).expect("the store opens");
        assert_eq!(report.damaged, [] as [u64; 0]);
        let (commands, receiver) = unbounded();
        let broker = Broker::new(NAME.into(), commands.into(), engine.reader(), engine.key());
        let driver = drive(EngineLoop::new(engine, now), receiver, self.clock.clone(), self.random.clone());
        *self.running.lock() = Some((broker, tokio::task::spawn_local(driver)));
    }

    fn power_loss(&self) {
        if let Some((_, driver)) = self.running.lock().take() {
            driver.abort();
        }
    }

    fn power_back(&self) {
        let random = self.random.clone();
        self.fs.power_loss(|| random.one_in(2));
        self.kv.power_loss(|| random.one_in(2));
        self.boot();
    }
}

/// What `broker::driver` does with its callers and threads, as one task: disk operations take virtual time.
async fn drive(
    mut engine_loop: EngineLoop,
    commands: Receiver<broker::command::Command>,
    clock: SimClock,
    random: Random,
) {
    loop {
        sleep(Duration::from_millis(1)).await;
        let now = clock.now();
        for command in commands.try_iter() {
            engine_loop.handle(command, now);
        }
        let effects = engine_loop.tend(now);
        let syncer = engine_loop.engine().syncer();
        if effects.sync {
            sleep(Duration::from_millis(random.below(5))).await;
            let result = syncer.sync().map_err(|e| broker::error::of_store(&e));
            for reply in effects.pending.into_iter().flat_map(|p| p.replies) {
                if let Some(unread) = reply.send(result.clone().map(drop)) {
                    engine_loop.handle(unread, clock.now());
                }
            }
            if let Ok(flushed) = result {
                engine_loop.handle(broker::command::Command::Flushed(flushed), clock.now());
            }
        }
        if let Some(checkpoint) = effects.checkpoint {
            let kv = engine_loop.engine().kv();
            let result = checkpoint.write(&syncer, &*kv);
            engine_loop.handle(broker::command::Command::CheckpointWritten(result), clock.now());
        }
    }
}

/// The network between proxy and broker.
#[derive(Clone)]
struct SimBrokers {
    machine: Arc<Machine>,
    random: Random,
}

impl SimBrokers {
    fn local(&self) -> Result<LocalBrokers, Error> {
        let running = self.machine.running.lock();
        let (broker, _) = running.as_ref().ok_or_else(|| Error::new(v2::Code::HaNotAvailable, "no power"))?;
        Ok(LocalBrokers::new([broker.clone()]))
    }

    /// Delays, and sometimes loses: false.
    async fn wire(&self) -> bool {
        sleep(Duration::from_micros(self.random.below(3_000))).await;
        !self.random.one_in(40)
    }

    fn lost() -> Error {
        Error::new(v2::Code::ProxyTimeout, "lost on the way")
    }
}

macro_rules! over_the_wire {
    ($($name:ident($request:ty) -> $reply:ty),* $(,)?) => {
        impl Brokers for SimBrokers {
            $(async fn $name(&self, broker: &str, context: &CallContext, request: $request) -> Reply<$reply> {
                if !self.wire().await {
                    return Err(Self::lost());
                }
                let reply = self.local()?.$name(broker, context, request).await;
                if self.wire().await { reply } else { Err(Self::lost()) }
            })*
        }
    };
}

apis::broker_calls!(over_the_wire);

/// What happened, in order.
#[derive(Clone, Default)]
pub struct Trace(Rc<RefCell<Vec<String>>>);

impl Trace {
    fn note(&self, clock: &SimClock, what: impl AsRef<str>) {
        let line = format!("{} {}", clock.now().0 - 1_700_000_000_000, what.as_ref());
        self.0.borrow_mut().push(line);
    }

    pub fn lines(&self) -> Vec<String> {
        self.0.borrow().clone()
    }
}

type Front = Messaging<SimBrokers, LocalNameServer>;

/// Runs a world; panics if a promise is broken. Returns its trace.
pub fn run(seed: u64) -> Vec<String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, world(seed))
}

async fn world(seed: u64) -> Vec<String> {
    let random = Random::new(seed);
    let clock = SimClock(Instant::now());
    let trace = Trace::default();
    let machine = Arc::new(Machine {
        fs: MemFs::new(),
        kv: MemKv::default(),
        running: Mutex::default(),
        clock: clock.clone(),
        random: random.clone(),
    });
    machine.boot();
    let names = LocalNameServer::new(clock.clone());
    let brokers = SimBrokers { machine: machine.clone(), random: random.clone() };
    let on_its_way = brokers.clone();
    tokio::task::spawn_local(keep_registered(machine.clone(), names.clone()));
    let config = ProxyConfig { auto_create: true, delay_max_ms: limits::DELAY_MAX_MS, tls: None };
    let proxy = Rc::new(Proxy::build(config, brokers, names, Arc::new(|_| {}), clock.clone()));
    let refreshed = proxy.clone();
    tokio::task::spawn_local(async move {
        loop {
            let _ = refreshed.refresh().await;
            sleep(Duration::from_secs(1)).await;
        }
    });
    let ordered = GroupConfig {
        name: clients::IN_ORDER.into(),
        fifo: true,
        max_attempts: 17,
        version: 1,
        ..Default::default()
    };
    let put = PutMetadataRequest { groups: vec![ordered], ..Default::default() };
    while on_its_way.put_metadata(NAME, &CallContext::internal(), put.clone()).await.is_err() {}
    sleep(Duration::from_secs(2)).await;

    let facts = Rc::new(RefCell::new(Facts::default()));
    let hand = |id: u32| Hand {
        id,
        front: proxy.messaging(),
        facts: facts.clone(),
        trace: trace.clone(),
        clock: clock.clone(),
        random: random.clone(),
    };
    let clients: Vec<_> = (0..3).map(|id| tokio::task::spawn_local(hand(id).produce())).collect();
    for id in 0..2 {
        tokio::task::spawn_local(hand(id).consume());
        tokio::task::spawn_local(hand(id).consume_in_order());
    }
    for _ in 0..3 {
        sleep(Duration::from_millis(500 + random.below(4_000))).await;
        trace.note(&clock, "power loss");
        machine.power_loss();
        sleep(Duration::from_millis(random.below(5_000))).await;
        machine.power_back();
        trace.note(&clock, "power back");
    }
    for client in clients {
        client.await.expect("a producer ends");
    }
    // Everything comes, at the latest after its invisible time.
    sleep(Duration::from_secs(90)).await;
    if std::env::var("SIM_TRACE").is_ok() {
        eprintln!("{}", trace.lines().join("\n"));
    }
    let facts = facts.borrow();
    assert!(facts.sent.len() > 30, "seed {seed}: only {} messages were sent", facts.sent.len());
    for id in &facts.sent {
        assert!(facts.received.contains(id), "seed {seed}: {id} was acknowledged and never delivered");
        assert!(facts.acked.contains(id), "seed {seed}: no acknowledgement of {id} was ever confirmed");
    }
    trace.lines()
}

async fn keep_registered(machine: Arc<Machine>, names: LocalNameServer) {
    loop {
        let broker = machine.running.lock().as_ref().map(|(broker, _)| broker.clone());
        if let Some(broker) = broker {
            let metadata = tokio::time::timeout(
                Duration::from_secs(1),
                broker.metadata(&CallContext::internal(), MetadataRequest {}),
            )
            .await;
            if let Ok(Ok(metadata)) = metadata {
                let request = RegisterRequest {
                    cluster: "sim".into(),
                    broker: NAME.into(),
                    broker_id: 0,
                    address: "sim:1".into(),
                    metadata: Some(metadata),
                    unchanged: false,
                };
                let _ = names.register(request).await;
            }
        }
        sleep(Duration::from_millis(500)).await;
    }
}
