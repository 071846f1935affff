//! Store errors to the codes that clients see.

use apis::status::Error;
use apis::v2::Code;
use store::StoreError;

pub fn of_store(error: &StoreError) -> Error {
    let code = match error {
        // Not stored, through no fault of the sender; clients try another broker, then give up.
        StoreError::DiskFull { .. } | StoreError::Poisoned { .. } => Code::MasterPersistenceTimeout,
        StoreError::RecordTooLarge { .. } => Code::MessageBodyTooLarge,
        _ => Code::InternalServerError,
    };
    Error::new(code, error.to_string())
}

pub fn busy(what: &str) -> Error {
    Error::new(Code::TooManyRequests, format!("too many {what}; try again, or add a broker"))
}

pub fn stopped() -> Error {
    Error::new(Code::HaNotAvailable, "the broker is stopping; try another one, or wait until it is back")
}
