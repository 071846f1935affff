//! Queues against a model, with crashes, and their named cases.

use super::*;
use crate::fs::MemFs;
use crate::kv::MemKv;
use proptest::prelude::*;

const PER_FILE: u64 = 10;

fn entry(i: u64) -> Entry {
    Entry { log_offset: 1000 + i * 10, size: 10, tag_code: -(i as i64) }
}

struct World {
    fs: MemFs,
    kv: MemKv,
    index: FileQueues,
}

fn open(fs: &MemFs, kv: &MemKv) -> FileQueues {
    FileQueues::open(Arc::new(fs.clone()), Arc::new(kv.clone()), Path::new("/q"), PER_FILE).unwrap()
}

impl World {
    fn new() -> Self {
        let (fs, kv) = (MemFs::new(), MemKv::default());
        let index = open(&fs, &kv);
        Self { fs, kv, index }
    }

    fn checkpoint(&mut self, ok: bool) {
        let mut batch = Batch::default();
        let taken = self.index.take(&mut batch).unwrap();
        taken.write().unwrap();
        self.kv.fail_writes(!ok);
        match self.kv.write(&batch, true) {
            Ok(()) => self.index.written(taken),
            Err(_) => self.index.give_back(taken, &batch),
        }
        self.kv.fail_writes(false);
    }

    fn crash(&mut self) {
        self.kv.power_loss(|| false);
        self.index = open(&self.fs, &self.kv);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Append { topic: u8, queue: u32, count: u64, gap: u64 },
    Checkpoint(bool),
    Crash,
    Delete(u8),
    Trim,
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0u8..3, 0u32..2, 1u64..8, prop_oneof![4 => Just(0u64), 1 => 0u64..12])
            .prop_map(|(topic, queue, count, gap)| Op::Append { topic, queue, count, gap }),
        4 => any::<bool>().prop_map(Op::Checkpoint),
        2 => Just(Op::Crash),
        1 => (0u8..3).prop_map(Op::Delete),
        1 => Just(Op::Trim),
    ]
}

type Model = HashMap<(u8, u32), (u64, Vec<Entry>)>;

/// What a restart replays: an appended entry, or the deletion of a topic.
type Logged = (Topic, Option<(u32, u64, Entry)>);

fn compare(index: &FileQueues, model: &Model) {
    for ((topic, queue), (min, entries)) in model {
        let topic = Topic::stored(&format!("t{topic}"));
        let want = Bounds { min: *min, max: min + entries.len() as u64 };
        assert_eq!(index.bounds(&topic, *queue), want, "{topic} {queue}");
        assert_eq!(index.read(&topic, *queue, 0, 10_000).unwrap(), *entries);
        for at in 0..entries.len() {
            let got = index.read(&topic, *queue, min + at as u64, 3).unwrap();
            assert_eq!(got, entries[at..entries.len().min(at + 3)]);
        }
    }
    assert_eq!(index.topics.values().flatten().count(), model.len());
}

proptest! {
    #[test]
    fn queues_are_what_was_put_into_them(ops in prop::collection::vec(any_op(), 1..60)) {
        let mut world = World::new();
        let mut now = Model::new();
        let mut log: Vec<Logged> = Vec::new();
        let mut at = 1;
        for op in ops {
            match op {
                Op::Append { topic, queue, count, gap } => {
                    let name = Topic::stored(&format!("t{topic}"));
                    for i in 0..count {
                        let gap = if i == 0 { gap } else { 0 };
                        let (min, entries) = now.entry((topic, queue)).or_insert((gap, Vec::new()));
                        let offset = *min + entries.len() as u64 + if *min == gap && entries.is_empty() { 0 } else { gap };
                        entries.resize((offset - *min) as usize, Entry::HOLE);
                        let new = Entry { log_offset: at, size: 5, tag_code: at as i64 };
                        entries.push(new);
                        world.index.append(&name, queue, offset, new);
                        log.push((name.clone(), Some((queue, offset, new))));
                        at += 5;
                    }
                }
                Op::Checkpoint(ok) => {
                    world.checkpoint(ok);
                    if ok {
                        log.clear();
                    }
                }
                Op::Crash => {
                    world.crash();
                    for (topic, what) in &log {
                        match what {
                            Some((queue, offset, entry)) => world.index.append(topic, *queue, *offset, *entry),
                            None => world.index.delete(topic),
                        }
                    }
                }
                Op::Delete(topic) => {
                    let name = Topic::stored(&format!("t{topic}"));
                    world.index.delete(&name);
                    log.push((name, None));
                    now.retain(|(t, _), _| *t != topic);
                }
                Op::Trim => {
                    let start = at / 2;
                    for file in world.index.trim(start).unwrap() {
                        world.fs.remove_file(&file).unwrap();
                    }
                    for (min, entries) in now.values_mut() {
                        let gone = entries.iter().rposition(|e| !e.is_hole() && e.log_offset < start);
                        let gone = gone.map_or(0, |i| i + 1);
                        // Holes after what is gone, before what stays.
                        *min += gone as u64;
                        entries.drain(..gone);
                    }
                    // As the engine: nothing is let go that a restart still reads.
                    world.checkpoint(true);
                    log.clear();
                }
            }
            compare(&world.index, &now);
        }
    }

    #[test]
    fn a_row_comes_back_and_foreign_bytes_are_refused(
        min in 0u64..50,
        sizes in prop::collection::vec((any::<u64>(), any::<u32>(), any::<i64>()), 0..40),
        noise in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let tail: VecDeque<_> =
            sizes.into_iter().map(|(log_offset, size, tag_code)| Entry { log_offset, size, tag_code }).collect();
        let max = 50 + tail.len() as u64;
        let queue = Queue { bounds: Bounds { min, max }, first: 7, filed: 50, tail, ..Queue::default() };
        let again = Queue::of_row(0, &queue.row()).unwrap();
        prop_assert_eq!((again.bounds, again.first, again.filed, again.tail), (queue.bounds, 7, 50, queue.tail));
        let _ = Queue::of_row(0, &noise);
    }
}

#[test]
fn quiet_queues_have_no_file() {
    let mut world = World::new();
    let topic = Topic::stored("t");
    for i in 0..ROW_ENTRIES - 1 {
        world.index.append(&topic, 0, i, entry(i));
    }
    world.checkpoint(true);
    assert_eq!(world.fs.list(Path::new("/q")).unwrap(), Vec::<String>::new());
    world.index.append(&topic, 0, ROW_ENTRIES - 1, entry(ROW_ENTRIES - 1));
    world.checkpoint(true);
    assert_eq!(world.fs.list(Path::new("/q/t/0")).unwrap(), ["00000000000000000000"]);
    world.crash();
    let all: Vec<_> = (0..ROW_ENTRIES).map(entry).collect();
    assert_eq!(world.index.read(&topic, 0, 0, 99).unwrap(), all);
}

#[test]
fn an_entry_that_is_gone_from_its_file_is_named() {
    let mut world = World::new();
    let topic = Topic::stored("t");
    (0..ROW_ENTRIES).for_each(|i| world.index.append(&topic, 0, i, entry(i)));
    world.checkpoint(true);
    let file = world.fs.open(Path::new("/q/t/0/00000000000000000000"), false).unwrap();
    file.write_at(&[0; 20], 20).unwrap();
    let error = world.index.read(&topic, 0, 0, 9).unwrap_err();
    assert!(error.to_string().contains("no queue entry at byte 20"), "{error}");
}

#[test]
fn a_gap_becomes_holes() {
    let mut world = World::new();
    let topic = Topic::stored("t");
    world.index.append(&topic, 0, 0, entry(0));
    world.index.append(&topic, 0, 2, entry(2));
    assert_eq!(world.index.read(&topic, 0, 0, 9).unwrap(), [entry(0), Entry::HOLE, entry(2)]);
    world.index.append(&topic, 0, 1, entry(1));
    assert_eq!(world.index.bounds(&topic, 0).max, 3, "an offset already there is left alone");
}
