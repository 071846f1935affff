//! What the engine holds in memory, against what it may.

use model::Bound;
use model::bound::Unit;
use model::limits;

use super::Engine;
use crate::keys::{KeyEntry, WAITING_MAX};
use crate::queue::{BUFFERED_MAX, Entry, KEPT_MAX, QueueIndex};
use crate::recent;
use crate::timer::{FRESH_MAX, Held, TimerKey};

impl Engine {
    /// True if so much waits for a checkpoint that it should not wait for its time.
    pub fn is_laden(&self) -> bool {
        self.index.buffered() > BUFFERED_MAX
            || self.new_keys.len() > WAITING_MAX
            || self.timers.fresh() > FRESH_MAX
    }

    pub fn bounds_used(&self) -> Vec<Bound> {
        let (entry, key) = (size_of::<Entry>(), size_of::<KeyEntry>());
        let timer = size_of::<(TimerKey, Option<Held>)>();
        vec![
            Bound::bytes(
                "queue entries no checkpoint has taken",
                entry * self.index.buffered(),
                entry * BUFFERED_MAX,
            ),
            Bound::bytes(
                "queue entries kept for readers",
                entry * self.index.kept(),
                entry * (KEPT_MAX + BUFFERED_MAX),
            ),
            Bound::bytes("messages sent lately", 32 * self.recent.len(), 64 * recent::GENERATION_MAX),
            Bound::bytes("timers no checkpoint has taken", timer * self.timers.fresh(), timer * FRESH_MAX),
            Bound::bytes("keys no checkpoint has taken", key * self.new_keys.len(), key * WAITING_MAX),
            Bound::bytes("keys waiting to be written", key * self.keys.waiting(), 2 * key * WAITING_MAX),
            Bound::of(
                "messages in flight of the busiest group",
                self.pop.most_in_flight(),
                limits::IN_FLIGHT_MAX,
                Unit::Messages,
            ),
            Bound::bytes("RocksDB", self.kv.memory(), crate::kv::MEMORY_MAX),
        ]
    }
}
