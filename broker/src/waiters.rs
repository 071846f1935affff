//! Consumers that wait for a message. They stand in line with the engine, so that no arrival is missed between
//! looking and waiting, and one arrival wakes one of them.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use model::{Group, Topic};
use store::Popped;

use crate::command::{Answer, PopCommand};

pub type Key = (Topic, Group);
pub type Waiter = (PopCommand, Answer<Vec<Popped>>);

#[derive(Default)]
struct Line {
    waiters: VecDeque<Waiter>,
    /// Length at which those who left are looked for.
    sweep_at: usize,
}

#[derive(Default)]
pub struct Waiters {
    /// Sorted: when the broker ends, those who wait learn of it in an order that does not depend on chance.
    lines: BTreeMap<Key, Line>,
    /// Who waits for which stored topic: the topic itself, or the group's retry topic.
    wanted: HashMap<Topic, BTreeSet<Key>>,
    count: usize,
}

impl Waiters {
    /// Those who left and were not yet looked for count too.
    pub fn len(&self) -> usize {
        self.count
    }

    pub fn park(&mut self, request: PopCommand, answer: Answer<Vec<Popped>>) {
        let key = (request.topic.clone(), request.group.clone());
        if !self.lines.contains_key(&key) {
            for topic in [key.0.clone(), Topic::retry(&key.1, &key.0)] {
                self.wanted.entry(topic).or_default().insert(key.clone());
            }
        }
        let line = self.lines.entry(key).or_default();
        if line.waiters.len() >= line.sweep_at {
            let before = line.waiters.len();
            line.waiters.retain(|(_, answer)| !answer.is_closed());
            self.count -= before - line.waiters.len();
            line.sweep_at = 2 * line.waiters.len() + 16;
        }
        line.waiters.push_back((request, answer));
        self.count += 1;
    }

    /// Lines that wait for one of these stored topics.
    pub fn wanting(&self, topics: &[Topic]) -> Vec<Key> {
        let keys: BTreeSet<&Key> = topics.iter().filter_map(|t| self.wanted.get(t)).flatten().collect();
        keys.into_iter().cloned().collect()
    }

    /// The first who is still there.
    pub fn next(&mut self, key: &Key) -> Option<Waiter> {
        let line = self.lines.get_mut(key)?;
        while let Some(waiter) = line.waiters.pop_front() {
            self.count -= 1;
            if !waiter.1.is_closed() {
                return Some(waiter);
            }
        }
        self.lines.remove(key);
        for topic in [key.0.clone(), Topic::retry(&key.1, &key.0)] {
            if let Some(keys) = self.wanted.get_mut(&topic) {
                keys.remove(key);
                if keys.is_empty() {
                    self.wanted.remove(&topic);
                }
            }
        }
        None
    }

    /// Back to the front of its line: there was nothing for it.
    pub fn put_back(&mut self, key: &Key, waiter: Waiter) {
        if let Some(line) = self.lines.get_mut(key) {
            line.waiters.push_front(waiter);
            self.count += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use model::TagFilter;
    use tokio::sync::oneshot;

    use super::*;

    fn request() -> PopCommand {
        PopCommand {
            group: Group::stored("g"),
            topic: Topic::stored("t"),
            filter: TagFilter::All,
            max: 1,
            invisible_ms: 1,
            client: Arc::from("c"),
            auto_renew: false,
            wait: true,
            attempt_id: 0,
        }
    }

    #[test]
    fn those_who_left_are_swept_and_lines_disappear() {
        let mut waiters = Waiters::default();
        for _ in 0..10_000 {
            let (answer, left) = oneshot::channel();
            drop(left);
            waiters.park(request(), answer);
        }
        assert!(waiters.len() <= 17, "{} kept", waiters.len());
        let keys = waiters.wanting(&[Topic::retry(&Group::stored("g"), &Topic::stored("t"))]);
        assert_eq!(keys.len(), 1);
        assert!(waiters.next(&keys[0]).is_none());
        assert!(waiters.wanting(&[Topic::stored("t")]).is_empty());
    }
}
