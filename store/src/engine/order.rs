//! Handing messages out in order. Of each message group one batch is in flight at a time; other message groups of the
//! queue go on. What is passed over on the way keeps a row, so that nothing is looked at twice.

use std::collections::HashSet;

use model::{Receipt, Timestamp, Topic, hash, message};

use super::{Engine, PopRequest, Popped};
use crate::change::{Change, CursorKey, Taken};
use crate::error::Result;
use crate::pop::Lane;
use crate::queue::{Entry, QueueIndex};

/// Messages of one queue and group that may wait behind others of their message group.
const WAITING_MAX: usize = 4096;
/// Queue entries looked at in one step, and in one pop.
const STEP: usize = 32;
const LOOKED_AT_MAX: usize = 1024;

impl Engine {
    /// A receive whose answer was lost gets the same messages again; it does not count as another delivery.
    pub(super) fn pop_attempted(
        &mut self,
        request: &PopRequest<'_>,
        now: Timestamp,
        out: &mut Vec<Popped>,
    ) -> Result<()> {
        if !request.in_order || request.attempt_id == 0 {
            return Ok(());
        }
        for queue in self.index.queues(request.topic) {
            let cursor = CursorKey { group: request.group.clone(), topic: request.topic.clone(), queue };
            let again = self.pop.attempted(&cursor, request.attempt_id, now);
            let Some(since) = again.first().map(|(_, since)| *since) else { continue };
            // Of one receive, so handed out at one time.
            let taken = again.into_iter().filter(|(_, at)| *at == since).map(|(taken, _)| taken).collect();
            self.hand_out(request, cursor, (0, taken, Vec::new()), (since, now), out)?;
        }
        Ok(())
    }

    /// Hands out what waits.
    pub(super) fn pop_ready(
        &mut self,
        request: &PopRequest<'_>,
        cursor: &CursorKey,
        now: Timestamp,
        out: &mut Vec<Popped>,
    ) -> Result<()> {
        if !self.pop.has_order(cursor) {
            return Ok(());
        }
        let taken = self.pop.ready(cursor, request.max - out.len(), request.in_order);
        self.hand_out(request, cursor.clone(), (0, taken, Vec::new()), (now, now), out)
    }

    pub(super) fn pop_in_order(
        &mut self,
        request: &PopRequest<'_>,
        topic: &Topic,
        queue: u32,
        now: Timestamp,
        out: &mut Vec<Popped>,
    ) -> Result<()> {
        let cursor = CursorKey { group: request.group.clone(), topic: topic.clone(), queue };
        let bounds = self.index.bounds(topic, queue);
        let start = match self.pop.next(&cursor) {
            Some(next) => next.max(bounds.min),
            None => {
                let start = self.first_offset(topic, queue, bounds)?;
                self.change(Change::Seek { cursor: cursor.clone(), next: start });
                start
            }
        };
        let want = request.max - out.len();
        let mut taken = self.pop.ready(&cursor, want, true);
        // All that waited in these lanes is in this batch: what follows may join it.
        let mut joined: HashSet<Lane> = taken.iter().map(|t| t.lane).collect();
        let mut held = Vec::new();
        let mut next = start;
        let visible_end = self.visible_end();
        'scan: while taken.len() < want && next < bounds.max && next - start < LOOKED_AT_MAX as u64 {
            let entries = self.index.read(topic, queue, next, STEP)?;
            if entries.is_empty() {
                break;
            }
            for entry in entries {
                if taken.len() == want
                    || (!entry.is_hole() && entry.log_offset + u64::from(entry.size) > visible_end)
                {
                    break 'scan;
                }
                let offset = next;
                let wanted = !entry.is_hole() && request.filter.may_match(entry.tag_code);
                if !wanted || self.pop.is_settled_ahead(&cursor, offset) {
                    next += 1;
                    continue;
                }
                let Some(lane) = self.lane(&cursor, offset, entry) else {
                    next += 1;
                    continue;
                };
                if joined.contains(&lane) || self.pop.is_free(&cursor, lane) {
                    joined.insert(lane);
                    taken.push(Taken { offset, lane, attempt: 1 });
                } else if self.pop.waiting(&cursor) + held.len() < WAITING_MAX {
                    held.push((offset, lane));
                } else {
                    break 'scan;
                }
                next += 1;
            }
        }
        if next > start || !taken.is_empty() {
            self.hand_out(request, cursor, (next, taken, held), (now, now), out)?;
        }
        Ok(())
    }

    /// A message without a message group is in order with all others like it.
    fn lane(&mut self, cursor: &CursorKey, offset: u64, entry: Entry) -> Option<Lane> {
        match self.reader.properties(entry.log_offset, entry.size) {
            Ok(properties) => {
                Some(message::property(&properties, message::SHARDING_KEY).map_or(0, hash::stable_hash))
            }
            Err(error) => {
                tracing::error!(topic = %cursor.topic, queue = cursor.queue, offset, %error, "unreadable message skipped");
                self.unreadable += 1;
                None
            }
        }
    }

    fn hand_out(
        &mut self,
        request: &PopRequest<'_>,
        cursor: CursorKey,
        (next, mut taken, held): (u64, Vec<Taken>, Vec<(u64, Lane)>),
        (since, now): (Timestamp, Timestamp),
        out: &mut Vec<Popped>,
    ) -> Result<()> {
        let visible_at = now.plus_ms(request.invisible_ms);
        let mut lost = Vec::new();
        let mut popped = Vec::with_capacity(taken.len());
        for Taken { offset, attempt, .. } in &taken {
            match self.entry(&cursor.topic, cursor.queue, *offset)? {
                Some(entry) => {
                    let one = request.popped(&cursor.topic, cursor.queue, *offset, entry, since, visible_at);
                    popped.push(Popped { attempt: Some(*attempt), ..one });
                }
                // Let go by the retention policy while it waited.
                None => lost.push(*offset),
            }
        }
        taken.retain(|t| !lost.contains(&t.offset));
        if !lost.is_empty() {
            self.change(Change::Done { cursor: cursor.clone(), moved: false, offsets: lost });
        }
        if next > 0 || !taken.is_empty() {
            let (client, attempt_id) = (request.renewed_for.clone(), request.attempt_id);
            self.change(Change::Ordered { cursor, next, since, visible_at, client, attempt_id, taken, held });
        }
        out.extend(popped);
        Ok(())
    }

    /// A delivery that never reached its consumer.
    pub fn release(&mut self, receipt: &Receipt, now: Timestamp) -> Result<()> {
        let cursor = Self::cursor_of(receipt);
        let times = (receipt.popped_at, receipt.invisible_until);
        if !self.pop.is_in_order(&cursor, receipt.offset) {
            return self.change_invisible(receipt, 0, now).map(drop);
        }
        if self.pop.standing(&cursor, receipt.offset, times, now) == crate::pop::Standing::Live {
            self.change(Change::Unsent { cursor, offsets: vec![receipt.offset] });
        }
        Ok(())
    }
}
