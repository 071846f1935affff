//! RocksDB, one column family a [`Family`]. Small: it holds checkpoints, not messages.

use std::path::Path;

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, Direction, IteratorMode, Options, WriteBatch,
    WriteOptions,
};

use super::{Batch, CACHE_BYTES, Family, Kv, Row, WRITE_BUFFER_BYTES};
use crate::error::{Result, StoreError};

pub struct RocksKv(DB);

fn failed(error: rocksdb::Error) -> StoreError {
    StoreError::Kv(error.into_string())
}

impl RocksKv {
    pub fn open(dir: &Path) -> Result<Self> {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_max_open_files(64);
        options.set_keep_log_file_num(2);
        options.set_max_background_jobs(2);
        options.set_max_total_wal_size(16 << 20);
        let mut family = Options::default();
        family.set_write_buffer_size(WRITE_BUFFER_BYTES);
        let mut blocks = BlockBasedOptions::default();
        blocks.set_block_cache(&Cache::new_lru_cache(CACHE_BYTES));
        family.set_block_based_table_factory(&blocks);
        family.set_max_write_buffer_number(2);
        let families = Family::ALL.map(|f| ColumnFamilyDescriptor::new(f.name(), family.clone()));
        DB::open_cf_descriptors(&options, dir, families).map(Self).map_err(failed)
    }

    /// Rows of the default family of another program's database. Opening writes into the folder: give it a copy.
    pub fn foreign_rows(dir: &Path) -> Result<Vec<Row>> {
        let options = Options::default();
        let families = DB::list_cf(&options, dir).map_err(failed)?;
        let db = DB::open_cf_for_read_only(&options, dir, families, false).map_err(failed)?;
        let rows = db.iterator(IteratorMode::Start);
        rows.map(|row| row.map(|(k, v)| (k.into(), v.into())).map_err(failed)).collect()
    }

    fn family(&self, family: Family) -> Result<&rocksdb::ColumnFamily> {
        let missing = || StoreError::Kv(format!("column family {} is missing", family.name()));
        self.0.cf_handle(family.name()).ok_or_else(missing)
    }
}

impl Kv for RocksKv {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.0.get_cf(self.family(family)?, key).map_err(failed)
    }

    fn rows(&self, family: Family) -> Result<Vec<Row>> {
        let rows = self.0.iterator_cf(self.family(family)?, IteratorMode::Start);
        rows.map(|row| row.map(|(k, v)| (k.into(), v.into())).map_err(failed)).collect()
    }

    fn range(&self, family: Family, from: &[u8], max: usize) -> Result<Vec<Row>> {
        let start = IteratorMode::From(from, Direction::Forward);
        let rows = self.0.iterator_cf(self.family(family)?, start).take(max);
        rows.map(|row| row.map(|(k, v)| (k.into(), v.into())).map_err(failed)).collect()
    }

    fn memory(&self) -> usize {
        let of = |property: &str, family: Family| {
            let family = self.0.cf_handle(family.name())?;
            self.0.property_int_value_cf(family, property).ok().flatten()
        };
        let buffers = Family::ALL.into_iter().filter_map(|f| of("rocksdb.cur-size-all-mem-tables", f));
        // One cache serves all families.
        let cached = of("rocksdb.block-cache-usage", Family::Covered);
        buffers.chain(cached).sum::<u64>() as usize
    }

    fn write(&self, batch: &Batch, sync: bool) -> Result<()> {
        let mut out = WriteBatch::default();
        for (family, key, value) in &batch.0 {
            match value {
                Some(value) => out.put_cf(self.family(*family)?, key, value),
                None => out.delete_cf(self.family(*family)?, key),
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        self.0.write_opt(out, &options).map_err(failed)
    }
}
