//! Rows in memory. After a power loss a prefix of the batches that were not synced survives.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Batch, Family, Kv, Row};
use crate::error::{Result, StoreError};

type Table = BTreeMap<(Family, Vec<u8>), Vec<u8>>;

#[derive(Default)]
struct State {
    now: Table,
    durable: Table,
    unsynced: Vec<Batch>,
    fail: bool,
}

#[derive(Clone, Default)]
pub struct MemKv(Arc<Mutex<State>>);

impl MemKv {
    /// `keep` is asked for each unsynced batch in order; the first `false` loses it and all after it.
    pub fn power_loss(&self, mut keep: impl FnMut() -> bool) {
        let mut s = self.0.lock();
        let s = &mut *s;
        for batch in std::mem::take(&mut s.unsynced) {
            if !keep() {
                break;
            }
            apply(&mut s.durable, &batch);
        }
        s.now.clone_from(&s.durable);
        s.fail = false;
    }

    /// Every write fails until told otherwise.
    pub fn fail_writes(&self, fail: bool) {
        self.0.lock().fail = fail;
    }
}

fn apply(table: &mut Table, batch: &Batch) {
    for (family, key, value) in &batch.0 {
        match value {
            Some(value) => table.insert((*family, key.clone()), value.clone()),
            None => table.remove(&(*family, key.clone())),
        };
    }
}

impl Kv for MemKv {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.0.lock().now.get(&(family, key.to_vec())).cloned())
    }

    fn rows(&self, family: Family) -> Result<Vec<Row>> {
        let s = self.0.lock();
        Ok(s.now
            .iter()
            .filter(|((f, _), _)| *f == family)
            .map(|((_, k), v)| (k.clone(), v.clone()))
            .collect())
    }

    fn range(&self, family: Family, from: &[u8], max: usize) -> Result<Vec<Row>> {
        let s = self.0.lock();
        let rows = s.now.range((family, from.to_vec())..).take_while(|((f, _), _)| *f == family);
        Ok(rows.take(max).map(|((_, k), v)| (k.clone(), v.clone())).collect())
    }

    fn memory(&self) -> usize {
        0
    }

    fn write(&self, batch: &Batch, sync: bool) -> Result<()> {
        let mut s = self.0.lock();
        let s = &mut *s;
        if s.fail {
            return Err(StoreError::Kv("injected write error".into()));
        }
        apply(&mut s.now, batch);
        s.unsynced.push(batch.clone());
        if sync {
            s.unsynced.clear();
            s.durable.clone_from(&s.now);
        }
        Ok(())
    }
}
