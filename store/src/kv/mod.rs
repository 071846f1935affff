//! The seam to RocksDB. Rows live in families; a batch is atomic over all of them.
//! [`MemKv`] loses what was not synced; both pass the same conformance tests.

mod mem;
#[cfg(feature = "rocksdb")]
mod rocks;

pub use mem::MemKv;
#[cfg(feature = "rocksdb")]
pub use rocks::RocksKv;

use crate::error::Result;

/// Persisted as column-family names: never rename.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// family name -> log offset covered (8 bytes, big-endian)
    Covered,
    Topics,
    Groups,
    /// The replica set's secrets.
    Keys,
    Offsets,
    InFlight,
    /// Bounds of every queue, and its last entries.
    Queues,
    /// Scheduled messages by due time.
    Timers,
    /// Transactions that are open, and those decided lately.
    Transactions,
}

impl Family {
    pub const ALL: [Family; 9] = [
        Family::Covered,
        Family::Topics,
        Family::Groups,
        Family::Keys,
        Family::Offsets,
        Family::InFlight,
        Family::Queues,
        Family::Timers,
        Family::Transactions,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Family::Covered => "covered",
            Family::Topics => "topics",
            Family::Groups => "groups",
            Family::Keys => "keys",
            Family::Offsets => "offsets",
            Family::InFlight => "in_flight",
            Family::Queues => "queues",
            Family::Timers => "timers",
            Family::Transactions => "transactions",
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct Batch(pub Vec<(Family, Vec<u8>, Option<Vec<u8>>)>);

impl Batch {
    pub fn put(&mut self, family: Family, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.0.push((family, key.into(), Some(value.into())));
    }

    pub fn delete(&mut self, family: Family, key: impl Into<Vec<u8>>) {
        self.0.push((family, key.into(), None));
    }
}

/// What RocksDB may hold in memory: two write buffers of each family, and the block cache.
pub const MEMORY_MAX: usize = Family::ALL.len() * 2 * WRITE_BUFFER_BYTES + CACHE_BYTES;
const WRITE_BUFFER_BYTES: usize = 4 << 20;
const CACHE_BYTES: usize = 16 << 20;

pub type Row = (Vec<u8>, Vec<u8>);

pub trait Kv: Send + Sync + 'static {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>>;
    /// All rows of a family, by key.
    fn rows(&self, family: Family) -> Result<Vec<Row>>;
    /// Up to `max` rows of a family from a key on, by key.
    fn range(&self, family: Family, from: &[u8], max: usize) -> Result<Vec<Row>>;
    /// Bytes it holds in memory.
    fn memory(&self) -> usize;
    /// All of it or nothing; with `sync`, it and everything written before survives a power loss.
    fn write(&self, batch: &Batch, sync: bool) -> Result<()>;
}

#[cfg(test)]
mod conformance {
    use super::*;

    fn suite(kv: &dyn Kv) {
        let mut batch = Batch::default();
        batch.put(Family::Topics, "b", "2");
        batch.put(Family::Topics, "a", "1");
        batch.put(Family::Groups, "a", "g");
        kv.write(&batch, true).unwrap();
        assert_eq!(kv.get(Family::Topics, b"a").unwrap().unwrap(), b"1");
        assert_eq!(kv.get(Family::Groups, b"a").unwrap().unwrap(), b"g");
        assert_eq!(kv.get(Family::Groups, b"b").unwrap(), None);
        let rows = kv.rows(Family::Topics).unwrap();
        assert_eq!(rows, [(b"a".to_vec(), b"1".to_vec()), (b"b".to_vec(), b"2".to_vec())]);
        assert_eq!(kv.range(Family::Topics, b"a", 1).unwrap(), rows[..1]);
        assert_eq!(kv.range(Family::Topics, b"aa", 9).unwrap(), rows[1..]);
        assert_eq!(kv.range(Family::Topics, b"c", 9).unwrap(), []);
        let mut batch = Batch::default();
        batch.put(Family::Topics, "a", "x");
        batch.delete(Family::Topics, "a");
        batch.put(Family::Topics, "c", "3");
        kv.write(&batch, false).unwrap();
        assert_eq!(kv.get(Family::Topics, b"a").unwrap(), None, "the later operation of a batch wins");
        assert_eq!(kv.rows(Family::Topics).unwrap().len(), 2);
    }

    #[test]
    fn memory() {
        suite(&MemKv::default());
    }

    #[test]
    fn memory_loses_what_was_not_synced() {
        let kv = MemKv::default();
        suite(&kv);
        kv.power_loss(|| false);
        assert_eq!(kv.get(Family::Topics, b"a").unwrap().unwrap(), b"1");
        assert_eq!(kv.get(Family::Topics, b"c").unwrap(), None);
    }

    #[cfg(feature = "rocksdb")]
    #[test]
    fn rocksdb() {
        let dir = tempfile::tempdir().unwrap();
        suite(&RocksKv::open(dir.path()).unwrap());
        let again = RocksKv::open(dir.path()).unwrap();
        assert_eq!(again.get(Family::Topics, b"c").unwrap().unwrap(), b"3");
    }
}
