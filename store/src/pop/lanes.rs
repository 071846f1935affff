//! Order on one queue that a group consumes in order: the messages of one message group are a lane. A lane with
//! messages in flight hands out no more of its own; the other lanes go on. Used by [`super::Pop`] alone.
//!
//! ```text
//!   lane a   3 (in flight)  7  9        not ready: 3 is out
//!   lane b   4  5                       ready, first is 4
//! ```

use std::collections::{BTreeSet, HashMap};

/// Which lane a message is in: a hash of its message group. Two groups of one hash share a lane, which keeps order.
pub type Lane = u64;

#[derive(Debug, Default)]
struct State {
    in_flight: u32,
    waiting: BTreeSet<u64>,
}

#[derive(Debug, Default)]
pub(super) struct Lanes {
    lanes: HashMap<Lane, State>,
    /// First waiting offset of every lane that has nothing in flight.
    ready: BTreeSet<(u64, Lane)>,
    waiting: usize,
}

impl Lanes {
    pub fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// Messages that were passed over, or came back.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    pub fn is_free(&self, lane: Lane) -> bool {
        !self.lanes.contains_key(&lane)
    }

    /// The offsets that are next, lane by lane, the lane with the oldest first.
    pub fn ready(&self) -> impl Iterator<Item = (Lane, &BTreeSet<u64>)> {
        self.ready.iter().filter_map(|(_, lane)| Some((*lane, &self.lanes.get(lane)?.waiting)))
    }

    /// Everything that waits, whether its lane is ready or not.
    pub fn all_waiting(&self) -> impl Iterator<Item = u64> {
        self.lanes.values().flat_map(|lane| &lane.waiting).copied()
    }

    /// True if something can be handed out now that could not before.
    fn update(&mut self, lane: Lane, change: impl FnOnce(&mut State)) -> bool {
        let state = self.lanes.entry(lane).or_default();
        let first = |state: &State| state.waiting.first().copied().filter(|_| state.in_flight == 0);
        let (before, count) = (first(state), state.waiting.len());
        change(state);
        let after = first(state);
        self.waiting = self.waiting + state.waiting.len() - count;
        if state.in_flight == 0 && state.waiting.is_empty() {
            self.lanes.remove(&lane);
        }
        if before != after {
            before.map(|offset| self.ready.remove(&(offset, lane)));
            after.map(|offset| self.ready.insert((offset, lane)));
        }
        before.is_none() && after.is_some()
    }

    pub fn hold(&mut self, lane: Lane, offset: u64) -> bool {
        self.update(lane, |state| {
            state.waiting.insert(offset);
        })
    }

    /// A message that waited, or a new one.
    pub fn hand_out(&mut self, lane: Lane, offset: u64) {
        self.update(lane, |state| {
            state.waiting.remove(&offset);
            state.in_flight += 1;
        });
    }

    pub fn come_back(&mut self, lane: Lane, offset: u64) -> bool {
        self.update(lane, |state| {
            state.in_flight = state.in_flight.saturating_sub(1);
            state.waiting.insert(offset);
        })
    }

    /// The message is no longer this group's to consume.
    pub fn settle(&mut self, lane: Lane, offset: u64) -> bool {
        self.update(lane, |state| {
            if !state.waiting.remove(&offset) {
                state.in_flight = state.in_flight.saturating_sub(1);
            }
        })
    }
}
