//! Who runs the [`EngineLoop`]: a caller that brings a command and finds the engine idle runs it itself, together
//! with whatever others have brought meanwhile; if it is busy, whoever is running it takes the command along. So a
//! lone call costs no thread switch, and under load one round serves many. What needs time (expiry, checkpoints, a
//! flood of commands) is the keeper thread's; a second thread syncs and answers, a third writes checkpoints.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering, fence};
use std::sync::mpsc::{Receiver as Jobs, Sender as JobSender, channel};
use std::sync::{Arc, Mutex, OnceLock, TryLockError, Weak};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use apis::brokers::Reply;
use crossbeam_channel::{Receiver, Sender, unbounded};
use model::bound::{Bound, Unit};
use model::{Clock, Timestamp, limits};
use store::StoreError;
use store::checkpoint::Checkpoint;
use store::engine::Retired;
use store::fs::Fs;
use store::keys::KeyIndex;
use store::kv::Kv;
use store::log::{LogReader, Syncer};
use tokio::runtime::Handle;

use crate::command::Command;
use crate::engine_loop::{Effects, EngineLoop, Pending};
use crate::error;
use runtime::net;

/// Commands taken into one group at the most.
const GROUP_MAX: usize = 4096;
/// A disk that syncs within this time is waited for where the call is, if it is the only one.
const SYNC_HERE_MAX_US: u64 = 500;
/// Rounds a caller runs for others before the keeper takes over.
const ROUNDS_MAX: usize = 4;

/// What the syncing thread is given: answers that wait for the sync, or just the wish for one.
type SyncJob = Option<Pending>;

/// What takes long and is nobody's answer.
enum Chore {
    Write(Checkpoint),
    Remove(Retired),
}

/// The way to the engine; cheap to clone.
#[derive(Clone)]
pub struct Commands {
    sender: Sender<Command>,
    /// None if somebody else runs the engine: the simulation does.
    driver: Option<Arc<Driver>>,
}

impl From<Sender<Command>> for Commands {
    fn from(sender: Sender<Command>) -> Self {
        Self { sender, driver: None }
    }
}

impl Commands {
    /// Brings a command. The other tasks that are ready now get their turn first, so that what came in together
    /// becomes one group.
    pub async fn bring(&self, command: Command) -> Reply<()> {
        if self.sender.len() >= limits::COMMANDS_MAX {
            return Err(error::busy("calls wait for the engine"));
        }
        self.sender.send(command).map_err(|_| error::stopped())?;
        if let Some(driver) = &self.driver {
            // Also if the caller goes away while it yields: its command must not lie there.
            let _drives = OnDrop(driver);
            if !net::is_alone() {
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    pub fn bound(&self) -> Bound {
        Bound::of("calls waiting for the engine", self.sender.len(), limits::COMMANDS_MAX, Unit::Calls)
    }

    /// Brings a command from where nothing can be awaited.
    pub fn bring_now(&self, command: Command) {
        if self.sender.send(command).is_ok()
            && let Some(driver) = &self.driver
        {
            driver.drive();
        }
    }
}

struct OnDrop<'a>(&'a Driver);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.drive();
    }
}

struct Driver {
    /// None once the engine is closed. Poisoned if it panicked: nothing is answered any more.
    engine: Mutex<Option<Running>>,
    commands: Receiver<Command>,
    sender: Sender<Command>,
    syncer: Syncer,
    /// How long the last sync took.
    sync_us: Arc<AtomicU64>,
    clock: Arc<dyn Clock>,
    keeper: OnceLock<Thread>,
    /// When the keeper will wake by itself, ms.
    planned: AtomicI64,
}

struct Running {
    engine_loop: EngineLoop,
    sync_jobs: JobSender<SyncJob>,
    chores: JobSender<Chore>,
    threads: Vec<JoinHandle<()>>,
    /// Ends what works in the background.
    stopping: Arc<AtomicBool>,
}

/// Starts the threads. They end by [`Command::Stop`], or when the last [`Commands`] is gone.
pub fn start(engine_loop: EngineLoop, clock: impl Clock) -> Commands {
    let syncer = engine_loop.engine().syncer();
    let (fs, kv) = (engine_loop.engine().fs(), engine_loop.engine().kv());
    let (keys, reader) = (engine_loop.engine().keys(), engine_loop.engine().reader());
    let (sender, commands) = unbounded();
    let (sync_jobs, sync_queue) = channel();
    let (chores, chore_queue) = channel();
    let sync_us = Arc::new(AtomicU64::new(0));
    let driver = Arc::new(Driver {
        engine: Mutex::new(None),
        commands,
        sender: sender.clone(),
        syncer: syncer.clone(),
        sync_us: sync_us.clone(),
        clock: Arc::new(clock),
        keeper: OnceLock::new(),
        planned: AtomicI64::new(i64::MIN),
    });
    let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
        thread::Builder::new().name(name.into()).spawn(run).expect("the machine has room for three threads")
    };
    let back = (sender.clone(), Arc::downgrade(&driver));
    let syncing = syncer.clone();
    let tasks = Handle::try_current().ok();
    let sync = move || sync((&syncing, &sync_us), &sync_queue, tasks.as_ref(), &back);
    let sync = spawn("ferry-sync", Box::new(sync));
    let back = (sender.clone(), Arc::downgrade(&driver));
    let stopping = Arc::new(AtomicBool::new(false));
    let index = KeyThread { keys: keys.clone(), reader: reader.clone(), stopping: stopping.clone() };
    let chores_of = move || do_chores(&chore_queue, &syncer, (&*fs, &*kv), &index, &back);
    let mut threads = vec![sync, spawn("ferry-chores", Box::new(chores_of))];
    if keys.progress().is_some() {
        let index = KeyThread { keys, reader, stopping: stopping.clone() };
        threads.push(spawn("ferry-keys", Box::new(move || index.run())));
    }
    if let Ok(mut engine) = driver.engine.lock() {
        *engine = Some(Running { engine_loop, sync_jobs, chores, threads, stopping });
    }
    let weak = Arc::downgrade(&driver);
    let keeping = move || {
        while let Some(rest) = keep(&weak) {
            thread::park_timeout(rest);
        }
    };
    let keeper = spawn("ferry-keeper", Box::new(keeping));
    let _ = driver.keeper.set(keeper.thread().clone());
    Commands { sender, driver: Some(driver) }
}

impl Driver {
    /// Runs the engine if nobody does. Whoever does sees every command that was sent before this call.
    fn drive(&self) {
        for _ in 0..ROUNDS_MAX {
            // Pairs with the fence below: either this caller gets the lock, or its holder sees the command.
            fence(Ordering::SeqCst);
            match self.engine.try_lock() {
                Ok(mut guard) => {
                    let Some(running) = guard.as_mut() else { return self.refuse() };
                    let here = net::is_alone() && self.sync_us.load(Ordering::Relaxed) < SYNC_HERE_MAX_US;
                    let pending = self.round(running, here);
                    drop(guard);
                    if let Some(pending) = pending {
                        self.sync_here(pending);
                    }
                }
                Err(TryLockError::WouldBlock) => return,
                Err(TryLockError::Poisoned(_)) => return self.refuse(),
            }
            fence(Ordering::SeqCst);
            if self.commands.is_empty() {
                return;
            }
        }
        self.wake();
    }

    /// Callers learn from the lost answer that the store has stopped.
    fn refuse(&self) {
        self.commands.try_iter().for_each(drop);
    }

    fn wake(&self) {
        if let Some(keeper) = self.keeper.get() {
            keeper.unpark();
        }
    }

    /// Syncs for the one caller there is: two thread switches less than the syncing thread.
    fn sync_here(&self, pending: Pending) {
        let result = timed_sync(&self.syncer, &self.sync_us);
        let flushed = result.clone().map(drop).map_err(|e| error::of_store(&e));
        let unread = pending.replies.into_iter().filter_map(|reply| reply.send(flushed.clone()));
        unread.for_each(|unread| drop(self.sender.send(unread)));
        if let Ok(flushed) = result {
            let _ = self.sender.send(Command::Flushed(flushed));
        }
    }

    /// Natural batching: whatever has come in joins this group; nothing is waited for. What is to be synced is given
    /// back if the caller does that itself.
    fn round(&self, running: &mut Running, sync_here: bool) -> Option<Pending> {
        let now = self.clock.now();
        for command in self.commands.try_iter().take(GROUP_MAX) {
            running.engine_loop.handle(command, now);
        }
        let mut effects = running.engine_loop.finish(now);
        let pending = effects.pending.take_if(|_| sync_here);
        effects.sync &= pending.is_none();
        running.carry_out(effects);
        let next = running.next_wake(now);
        if next < self.planned.load(Ordering::Relaxed) {
            self.planned.store(next, Ordering::Relaxed);
            self.wake();
        }
        pending
    }
}

impl Running {
    fn next_wake(&self, now: Timestamp) -> i64 {
        self.engine_loop.next_wake(now).map_or(i64::MAX, |at| at.0)
    }

    fn carry_out(&self, effects: Effects) {
        if effects.sync {
            let _ = self.sync_jobs.send(effects.pending);
        }
        let chores = effects.checkpoint.into_iter().map(Chore::Write);
        for chore in chores.chain(effects.retired.into_iter().map(Chore::Remove)) {
            let _ = self.chores.send(chore);
        }
    }

    /// A clean stop. Nobody holds RocksDB any more when it is reported.
    fn close(self, now: Timestamp) {
        let Self { engine_loop, sync_jobs, chores, threads, stopping } = self;
        stopping.store(true, Ordering::Relaxed);
        drop((sync_jobs, chores));
        // The last way to the engine may have been given up on one of them.
        let own = thread::current().id();
        threads.into_iter().filter(|t| t.thread().id() != own).for_each(|t| drop(t.join()));
        engine_loop.close(now);
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.wake();
        let now = self.clock.now();
        if let Ok(Some(running)) = self.engine.get_mut().map(Option::take) {
            running.close(now);
        }
    }
}

/// One turn of the keeper; how long it may rest afterwards, or nothing at the end.
fn keep(driver: &Weak<Driver>) -> Option<Duration> {
    let driver = driver.upgrade()?;
    let mut guard = driver.engine.lock().ok()?;
    let running = guard.as_mut()?;
    driver.round(running, false);
    let now = driver.clock.now();
    let effects = running.engine_loop.tend(now);
    if effects.stopped {
        let running = guard.take()?;
        drop(guard);
        running.close(now);
        driver.refuse();
        return None;
    }
    running.carry_out(effects);
    let next = running.next_wake(now);
    driver.planned.store(next, Ordering::Relaxed);
    drop(guard);
    fence(Ordering::SeqCst);
    match driver.commands.is_empty() {
        true => Some(Duration::from_millis(next.saturating_sub(now.0).clamp(0, 3_600_000) as u64)),
        false => Some(Duration::ZERO),
    }
}

/// The way back to the engine for its own threads, which do not keep it alive.
type Back = (Sender<Command>, Weak<Driver>);

fn timed_sync(syncer: &Syncer, took_us: &AtomicU64) -> Result<u64, StoreError> {
    let began = Instant::now();
    let result = syncer.sync();
    took_us.store(began.elapsed().as_micros() as u64, Ordering::Relaxed);
    result
}

fn sync((syncer, took_us): (&Syncer, &AtomicU64), jobs: &Jobs<SyncJob>, tasks: Option<&Handle>, back: &Back) {
    while let Ok(first) = jobs.recv() {
        let mut waiting: Vec<Pending> = first.into_iter().collect();
        waiting.extend(jobs.try_iter().flatten());
        let result = timed_sync(syncer, took_us);
        let flushed = result.clone().map_err(|e| error::of_store(&e));
        let release = back.0.clone();
        let answer = move || {
            for Pending { end, replies } in waiting {
                debug_assert!(flushed.as_ref().map_or(true, |flushed| *flushed >= end));
                let unread = replies.into_iter().filter_map(|reply| reply.send(flushed.clone().map(drop)));
                unread.for_each(|unread| drop(release.send(unread)));
            }
        };
        match tasks {
            // A task wakes other tasks more cheaply than this thread does, and where they will run.
            Some(tasks) => drop(tasks.spawn(async move { answer() })),
            None => answer(),
        }
        if let Ok(flushed) = result {
            report(Command::Flushed(flushed), back);
        }
    }
}

fn do_chores(
    chores: &Jobs<Chore>,
    syncer: &Syncer,
    (fs, kv): (&dyn Fs, &dyn Kv),
    index: &KeyThread,
    back: &Back,
) {
    let mut mending: Option<JoinHandle<()>> = None;
    for chore in chores {
        match chore {
            Chore::Write(checkpoint) => {
                let outcome = checkpoint.write(syncer, kv);
                report(Command::CheckpointWritten(outcome), back);
                if mending.as_ref().is_none_or(JoinHandle::is_finished) {
                    mending = index.mend();
                }
            }
            Chore::Remove(retired) => {
                for file in &retired.files {
                    if let Err(error) = fs.remove_file(file) {
                        tracing::warn!(%error, file = %file.display(), "an old file could not be removed");
                    }
                }
                if let Err(error) = retired.keys.prune(retired.log_start) {
                    tracing::warn!(%error, "the key index could not be pruned");
                }
            }
        }
    }
    if let Some(thread) = mending {
        let _ = thread.join();
    }
}

/// Indexes keys again that a crash or an error left out, while everything else goes on.
#[derive(Clone)]
struct KeyThread {
    keys: Arc<KeyIndex>,
    reader: LogReader,
    stopping: Arc<AtomicBool>,
}

impl KeyThread {
    fn run(&self) {
        let began = Instant::now();
        if let Err(error) = self.keys.rebuild(&self.reader, || self.stopping.load(Ordering::Relaxed)) {
            tracing::error!(%error, "keys could not be indexed again: older messages may not be found by key; it is tried again");
        } else if began.elapsed() > Duration::from_secs(1) {
            tracing::info!(took_ms = began.elapsed().as_millis() as u64, "keys indexed again");
        }
    }

    /// After an error, such as a full disk.
    fn mend(&self) -> Option<JoinHandle<()>> {
        match self.keys.mend() {
            Ok(true) => {
                let this = self.clone();
                thread::Builder::new().name("ferry-keys".into()).spawn(move || this.run()).ok()
            }
            Ok(false) => None,
            Err(error) => {
                tracing::error!(%error, "the key index cannot be opened again; it is tried again");
                None
            }
        }
    }
}

fn report(command: Command, (engine, driver): &Back) {
    if let Some(driver) = driver.upgrade() {
        let _ = engine.send(command);
        driver.drive();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use model::{ManualClock, SystemClock};
    use store::fs::MemFs;
    use store::keys::Shape;
    use store::kv::MemKv;
    use store::log::LogOptions;
    use store::{Engine, FlushMode, Options, Retention};
    use tokio::sync::oneshot;

    use super::*;

    fn start_one(clock: impl Clock) -> Commands {
        let options = Options {
            dir: "/data".into(),
            flush: FlushMode::Async,
            log: LogOptions { segment_bytes: 1 << 20, chunk_bytes: 64 << 10, reserve_bytes: 64 << 10 },
            queue_file_entries: 64,
            key_index: Shape { slots: 16, entries: 100 },
            retention: Retention::default(),
            host: ([127, 0, 0, 1], 1).into(),
            new_key: [1; 16],
        };
        let fs: Arc<dyn Fs> = Arc::new(MemFs::new());
        let lock = store::engine::claim(&*fs, &options).unwrap();
        let kv = Arc::new(MemKv::default());
        let (engine, _) = Engine::open(options, fs, kv, lock, clock.now()).unwrap();
        start(EngineLoop::new(engine, clock.now()), clock)
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_leaves_no_command_lying_there() {
        let commands = start_one(SystemClock);
        let (done, seen) = mpsc::channel();
        let look = Command::Look(Box::new(move |_| done.send(()).unwrap()));
        {
            let _others = [net::Busy::begin(), net::Busy::begin()];
            let mut bringing = Box::pin(commands.bring(look));
            // It is dropped while it lets the others go first.
            std::future::poll_fn(|cx| {
                assert!(bringing.as_mut().poll(cx).is_pending());
                std::task::Poll::Ready(())
            })
            .await;
        }
        seen.recv().unwrap();
    }

    #[tokio::test]
    async fn after_a_panic_every_call_is_told_that_the_store_has_stopped() {
        let commands = start_one(SystemClock);
        let panics = commands.clone();
        let look = Command::Look(Box::new(|_| panic!("a bug")));
        assert!(tokio::spawn(async move { panics.bring(look).await }).await.unwrap_err().is_panic());
        let (answer, reply) = oneshot::channel::<()>();
        commands.bring(Command::Look(Box::new(move |_| answer.send(()).unwrap()))).await.unwrap();
        assert!(reply.await.is_err(), "the answer is lost, not late");
    }

    #[tokio::test]
    async fn a_stop_is_answered_and_later_calls_are_refused() {
        // The keeper comes although time stands still.
        let commands = start_one(ManualClock::at(1_000_000));
        let (done, stopped) = oneshot::channel();
        commands.bring_now(Command::Stop(done));
        stopped.await.unwrap();
        let (answer, reply) = oneshot::channel::<()>();
        commands.bring(Command::Look(Box::new(move |_| answer.send(()).unwrap()))).await.unwrap();
        assert!(reply.await.is_err());
    }
}
