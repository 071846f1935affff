//! The threads that drive an [`EngineLoop`]: one writes, one syncs and answers, one writes checkpoints.

use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use model::Clock;
use store::checkpoint::Checkpoint;
use store::log::Syncer;

use crate::command::Command;
use crate::engine_loop::{EngineLoop, Pending};
use crate::error;

/// Commands taken into one group at the most.
const GROUP_MAX: usize = 4096;

/// What the syncing thread is given: answers that wait for the sync, or just the wish for one.
type SyncJob = Option<Pending>;

/// Starts the threads. The loop ends by [`Command::Stop`], or when every sender is gone.
pub fn spawn(engine_loop: EngineLoop, commands: (Sender<Command>, Receiver<Command>), clock: impl Clock) {
    let (to_engine, from_callers) = commands;
    let syncer = engine_loop.engine().syncer();
    let (fs, kv) = (engine_loop.engine().fs(), engine_loop.engine().kv());
    let (sync_jobs, sync_queue) = unbounded::<SyncJob>();
    let (checkpoints, checkpoint_queue) = unbounded::<Checkpoint>();
    let flushed = to_engine.clone();
    let checkpoint_syncer = syncer.clone();
    let mut names = ["ferry-engine", "ferry-sync", "ferry-checkpoint"].into_iter();
    let mut start = |run: Box<dyn FnOnce() + Send>| {
        let name = names.next().unwrap_or("ferry").to_owned();
        thread::Builder::new().name(name).spawn(run).expect("the machine has room for three threads");
    };
    start(Box::new(move || write(engine_loop, &from_callers, &sync_jobs, &checkpoints, &clock)));
    start(Box::new(move || sync(&syncer, &sync_queue, &flushed)));
    start(Box::new(move || {
        for checkpoint in checkpoint_queue {
            let result = checkpoint.write(&checkpoint_syncer, &*fs, &*kv);
            let _ = to_engine.send(Command::CheckpointWritten(result));
        }
    }));
}

fn write(
    mut engine_loop: EngineLoop,
    commands: &Receiver<Command>,
    sync_jobs: &Sender<SyncJob>,
    checkpoints: &Sender<Checkpoint>,
    clock: &impl Clock,
) {
    loop {
        let first = match engine_loop.next_wake(clock.now()) {
            Some(at) => {
                let wait = at.since(clock.now()).max(0) as u64;
                commands.recv_timeout(Duration::from_millis(wait))
            }
            None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        let now = clock.now();
        match first {
            Ok(command) => engine_loop.handle(command, now),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        // Natural batching: whatever has come in meanwhile joins this group; nothing is waited for.
        for command in commands.try_iter().take(GROUP_MAX) {
            engine_loop.handle(command, now);
        }
        let effects = engine_loop.finish(now);
        if effects.sync {
            let _ = sync_jobs.send(effects.pending);
        }
        if let Some(checkpoint) = effects.checkpoint {
            let _ = checkpoints.send(checkpoint);
        }
        if effects.stopped {
            break;
        }
    }
    engine_loop.close(clock.now());
}

fn sync(syncer: &Syncer, jobs: &Receiver<SyncJob>, engine: &Sender<Command>) {
    while let Ok(first) = jobs.recv() {
        let mut waiting: Vec<Pending> = first.into_iter().collect();
        waiting.extend(jobs.try_iter().flatten());
        let result = syncer.sync();
        for pending in waiting {
            let result = match &result {
                Ok(flushed) => {
                    debug_assert!(*flushed >= pending.end);
                    Ok(())
                }
                Err(e) => Err(error::of_store(e)),
            };
            pending.replies.into_iter().for_each(|reply| reply.send(result.clone()));
        }
        if let Ok(flushed) = result {
            let _ = engine.send(Command::Flushed(flushed));
        }
    }
}
