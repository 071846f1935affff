//! What can go wrong in the store. `broker` maps each to a code that travels.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the disk under {} is full; free space or add disk: sends go on by themselves", path.display())]
    DiskFull { path: PathBuf },
    #[error(
        "the store stopped after a failed {operation}: {source}; check the disk, then restart the broker"
    )]
    Poisoned { operation: &'static str, source: Arc<io::Error> },
    #[error("the data folder {} is in use by another process; stop it, or choose another folder with --data", path.display())]
    Locked { path: PathBuf },
    #[error("{} cannot be {operation}: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: Arc<io::Error> },
    #[error("the data folder {} has format {found}, this binary knows up to {known}; use a newer ferry", path.display())]
    NewerFormat { path: PathBuf, found: u32, known: u32 },
    #[error("{} is damaged: {what}", path.display())]
    Damaged { path: PathBuf, what: String },
    #[error("RocksDB: {0}")]
    Kv(String),
    #[error("a record of {size} bytes does not fit a log file of {segment} bytes")]
    RecordTooLarge { size: u64, segment: u64 },
}

impl StoreError {
    pub fn io(operation: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        if source.kind() == io::ErrorKind::StorageFull {
            return StoreError::DiskFull { path };
        }
        StoreError::Io { operation, path, source: Arc::new(source) }
    }
}

pub type Result<T> = std::result::Result<T, StoreError>;
