//! What is bounded, how much of it there is, and how much there may be. Every queue, cache and buffer has one; they
//! are shown together (`ferry store usage --bounds`, docs/performance.md).

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// In words, for an operator.
    pub what: &'static str,
    pub used: u64,
    pub limit: u64,
    pub unit: Unit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Calls,
    Clients,
    Messages,
}

impl Unit {
    pub fn name(self) -> &'static str {
        match self {
            Unit::Bytes => "bytes",
            Unit::Calls => "calls",
            Unit::Clients => "clients",
            Unit::Messages => "messages",
        }
    }
}

impl Bound {
    pub fn bytes(what: &'static str, used: usize, limit: usize) -> Self {
        Self { what, used: used as u64, limit: limit as u64, unit: Unit::Bytes }
    }

    pub fn of(what: &'static str, used: usize, limit: usize, unit: Unit) -> Self {
        Self { what, used: used as u64, limit: limit as u64, unit }
    }
}
