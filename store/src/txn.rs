//! Transactions that are not decided yet, and for a while those that are. Sans-IO: time is an argument, every effect is
//! a [`Change`], or a record that says itself what it settles.
//!
//! ```text
//!   half message ──► open ──commit──► committed    its copy goes to the topic, or to the timers
//!                     │ ▲   ──rollback─► rolled back
//!          check due  ▼ │ after 30 s
//!                    asked  …fifteen times, then parked: only an operator decides
//! ```
//! A decision is final: whoever asks for the other one learns what was decided.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use model::codec::{self, CodecError, Reader};
use model::{Timestamp, Topic};

use crate::change::Change;
use crate::error::{Result, StoreError};
use crate::kv::{Batch, Family, Kv};
use crate::timer::Held;

/// No check before this, whatever the producer says (the reference's `transactionTimeOut`).
pub const IMMUNITY_MIN_MS: i64 = 6_000;
/// Between two checks (`transactionCheckInterval`).
pub const CHECK_EVERY_MS: i64 = 30_000;
/// After as many it is parked (`transactionCheckMax`).
pub const CHECKS_MAX: u32 = 15;
/// How long and how many decisions are remembered.
const DECIDED_MS: i64 = 3_600_000;
const DECIDED_MAX: usize = 64 * 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Half {
    pub held: Held,
    pub topic: Topic,
    pub sent_at: Timestamp,
    pub check_at: Timestamp,
    /// How often a producer was asked.
    pub checks: u32,
}

impl Half {
    pub fn is_parked(&self) -> bool {
        self.checks >= CHECKS_MAX
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Committed,
    RolledBack,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    Open(Held),
    Decided(Decision),
    /// Never heard of, or decided long ago.
    Unknown,
}

#[derive(Default)]
pub struct Txns {
    /// Transaction id: log offset of the half message as it was sent.
    open: BTreeMap<u64, Half>,
    /// When to ask whom: the producers of a topic.
    due: HashMap<Topic, BTreeSet<(Timestamp, u64)>>,
    decided: BTreeMap<u64, (Timestamp, Decision)>,
    by_age: BTreeSet<(Timestamp, u64)>,
    dirty: BTreeSet<u64>,
}

impl Txns {
    pub fn open(&self) -> impl Iterator<Item = (u64, &Half)> {
        self.open.iter().map(|(id, half)| (*id, half))
    }

    pub fn standing(&self, id: u64) -> Standing {
        match (self.open.get(&id), self.decided.get(&id)) {
            (Some(half), _) => Standing::Open(half.held),
            (None, Some((_, decision))) => Standing::Decided(*decision),
            (None, None) => Standing::Unknown,
        }
    }

    /// Half messages in the log between two offsets.
    pub fn within(&self, from: u64, to: u64) -> Vec<u64> {
        let within = |half: &Half| (from..to).contains(&half.held.log_offset);
        self.open.iter().filter(|(_, half)| within(half)).map(|(id, _)| *id).collect()
    }

    pub fn begin(&mut self, id: u64, half: Half) {
        self.due.entry(half.topic.clone()).or_default().insert((half.check_at, id));
        self.open.insert(id, half);
        self.dirty.insert(id);
    }

    pub fn decide(&mut self, id: u64, decision: Decision, now: Timestamp) {
        self.take_from_line(id);
        self.open.remove(&id);
        if self.decided.insert(id, (now, decision)).is_none() {
            self.by_age.insert((now, id));
        }
        self.dirty.insert(id);
        while let Some((at, oldest)) = self.by_age.first().copied()
            && (now.since(at) > DECIDED_MS || self.by_age.len() > DECIDED_MAX)
        {
            self.by_age.pop_first();
            self.decided.remove(&oldest);
            self.dirty.insert(oldest);
        }
    }

    pub fn move_to(&mut self, id: u64, held: Held) {
        if let Some(half) = self.open.get_mut(&id) {
            half.held = held;
            self.dirty.insert(id);
        }
    }

    /// When producers of one of these topics are to be asked next.
    pub fn next_check(&self, can_ask: impl Fn(&Topic) -> bool) -> Option<Timestamp> {
        let lines = self.due.iter().filter(|(topic, _)| can_ask(topic));
        lines.filter_map(|(_, line)| line.first()).map(|(at, _)| *at).min()
    }

    /// Whom to ask now, and that it was done.
    pub fn checks(&self, topics: &[Topic], now: Timestamp, max: usize) -> Vec<Change> {
        let due = topics.iter().filter_map(|topic| self.due.get(topic));
        let due = due.flat_map(|line| line.range(..=(now, u64::MAX)));
        due.take(max)
            .map(|(_, id)| Change::Checked { id: *id, check_at: now.plus_ms(CHECK_EVERY_MS) })
            .collect()
    }

    pub fn half(&self, id: u64) -> Option<&Half> {
        self.open.get(&id)
    }

    pub fn checked(&mut self, id: u64, check_at: Timestamp) {
        self.take_from_line(id);
        let Some(half) = self.open.get_mut(&id) else { return };
        half.checks += 1;
        half.check_at = check_at;
        if !half.is_parked() {
            self.due.entry(half.topic.clone()).or_default().insert((check_at, id));
        }
        self.dirty.insert(id);
    }

    fn take_from_line(&mut self, id: u64) {
        let Some(half) = self.open.get(&id) else { return };
        if let Some(line) = self.due.get_mut(&half.topic) {
            line.remove(&(half.check_at, id));
            if line.is_empty() {
                self.due.remove(&half.topic);
            }
        }
    }

    // --- checkpoints ----------------------------------------------------------------------------------------

    pub fn checkpoint(&mut self, batch: &mut Batch) {
        for id in std::mem::take(&mut self.dirty) {
            let key = id.to_be_bytes();
            match (self.open.get(&id), self.decided.get(&id)) {
                (Some(half), _) => batch.put(Family::Transactions, key, encode(half)),
                (None, Some((at, decision))) => {
                    let mut row = vec![if *decision == Decision::Committed { 1 } else { 2 }];
                    codec::put_i64(&mut row, at.0);
                    batch.put(Family::Transactions, key, row);
                }
                (None, None) => batch.delete(Family::Transactions, key),
            }
        }
    }

    /// A checkpoint failed: everything must go into the next one.
    pub fn mark_dirty(&mut self, batch: &Batch) {
        let keys = batch.0.iter().filter(|(family, ..)| *family == Family::Transactions);
        self.dirty.extend(keys.filter_map(|(_, key, _)| Some(u64::from_be_bytes(key[..].try_into().ok()?))));
    }

    pub fn load(kv: &dyn Kv) -> Result<Self> {
        let mut txns = Self::default();
        for (key, row) in kv.rows(Family::Transactions)? {
            let damaged = |e| StoreError::Kv(format!("a stored transaction cannot be read: {e}"));
            let id = u64::from_be_bytes(key[..].try_into().map_err(|_| damaged(CodecError { at: 0 }))?);
            txns.take(id, &mut Reader::new(&row)).map_err(damaged)?;
        }
        txns.dirty.clear();
        Ok(txns)
    }

    fn take(&mut self, id: u64, r: &mut Reader<'_>) -> std::result::Result<(), CodecError> {
        let state = r.u8()?;
        if state != 0 {
            let at = Timestamp(r.i64()?);
            let decision = if state == 1 { Decision::Committed } else { Decision::RolledBack };
            self.decided.insert(id, (at, decision));
            self.by_age.insert((at, id));
            return Ok(());
        }
        let half = Half {
            held: Held::take(r)?,
            topic: Topic::stored(r.str()?),
            sent_at: Timestamp(r.i64()?),
            check_at: Timestamp(r.i64()?),
            checks: r.u32()?,
        };
        let parked = half.is_parked();
        self.begin(id, half);
        if parked {
            self.take_from_line(id);
        }
        Ok(())
    }
}

/// 0, place, topic, sent at, check at, checks; a decision is 1 or 2, and when
fn encode(half: &Half) -> Vec<u8> {
    let mut out = vec![0];
    half.held.put(&mut out);
    codec::put_bytes(&mut out, half.topic.as_str().as_bytes());
    codec::put_i64(&mut out, half.sent_at.0);
    codec::put_i64(&mut out, half.check_at.0);
    codec::put_u64(&mut out, u64::from(half.checks));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::MemKv;

    fn half(check_at: i64) -> Half {
        let held = Held { log_offset: 5, size: 6 };
        let (sent_at, check_at) = (Timestamp(0), Timestamp(check_at));
        Half { held, topic: Topic::stored("t"), sent_at, check_at, checks: 0 }
    }

    fn topics() -> [Topic; 1] {
        [Topic::stored("t")]
    }

    fn reopened(txns: &mut Txns, kv: &MemKv) -> Txns {
        let mut batch = Batch::default();
        txns.checkpoint(&mut batch);
        kv.write(&batch, true).unwrap();
        Txns::load(kv).unwrap()
    }

    #[test]
    fn asked_fifteen_times_and_then_parked() {
        let kv = MemKv::default();
        let mut txns = Txns::default();
        txns.begin(5, half(6_000));
        assert_eq!(txns.checks(&topics(), Timestamp(5_999), 9), []);
        assert_eq!(txns.checks(&[Topic::stored("other")], Timestamp(9_999), 9), []);
        let mut now = Timestamp(6_000);
        for n in 1..=CHECKS_MAX {
            assert_eq!(txns.next_check(|t| topics().contains(t)), Some(now));
            let [Change::Checked { id, check_at }] = txns.checks(&topics(), now, 9)[..] else {
                panic!("check {n} is not due")
            };
            txns.checked(id, check_at);
            assert_eq!(txns.checks(&topics(), now, 9), [], "one check at a time");
            now = check_at;
            txns = reopened(&mut txns, &kv);
        }
        assert_eq!(txns.next_check(|t| topics().contains(t)), None);
        assert!(txns.half(5).is_some_and(Half::is_parked));
        assert_eq!(txns.standing(5), Standing::Open(Held { log_offset: 5, size: 6 }));
    }

    #[test]
    fn a_decision_is_remembered_for_a_while() {
        let kv = MemKv::default();
        let mut txns = Txns::default();
        txns.begin(5, half(6_000));
        txns.begin(6, half(6_000));
        txns.decide(5, Decision::RolledBack, Timestamp(10));
        txns = reopened(&mut txns, &kv);
        assert_eq!(txns.standing(5), Standing::Decided(Decision::RolledBack));
        assert_eq!(txns.standing(7), Standing::Unknown);
        txns.decide(6, Decision::Committed, Timestamp(11 + DECIDED_MS));
        assert_eq!(txns.standing(5), Standing::Unknown);
        txns = reopened(&mut txns, &kv);
        assert_eq!(txns.standing(5), Standing::Unknown);
        assert_eq!(txns.standing(6), Standing::Decided(Decision::Committed));
        assert_eq!(kv.rows(Family::Transactions).unwrap().len(), 1);
    }
}
