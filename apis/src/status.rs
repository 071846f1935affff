//! The one table of what can go wrong between client and broker, and the code that a client sees.

use std::fmt;

use model::NameError;
use model::filter::FilterError;

use crate::v2::{self, Code};

/// An error on its way to a client: its code, and a message with cause and fix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    pub code: Code,
    pub message: String,
}

impl Error {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    pub fn topic(error: &NameError) -> Self {
        Self::new(Code::IllegalTopic, format!("topic: {error}"))
    }

    pub fn group(error: &NameError) -> Self {
        Self::new(Code::IllegalConsumerGroup, format!("consumer group: {error}"))
    }

    pub fn topic_not_found(topic: &impl fmt::Display) -> Self {
        let fix = format!("topic {topic} does not exist; create it with `ferry topic create {topic}`");
        Self::new(Code::TopicNotFound, fix)
    }

    pub fn group_not_found(group: &impl fmt::Display) -> Self {
        let fix =
            format!("consumer group {group} does not exist; create it with `ferry group create {group}`");
        Self::new(Code::ConsumerGroupNotFound, fix)
    }

    pub fn status(&self) -> v2::Status {
        let message =
            if self.message.is_empty() { self.code.as_str_name().into() } else { self.message.clone() };
        v2::Status { code: self.code.into(), message }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.code.as_str_name(), self.code as i32, self.message)
    }
}

impl std::error::Error for Error {}

impl From<FilterError> for Error {
    fn from(error: FilterError) -> Self {
        Self::new(Code::IllegalFilterExpression, error.to_string())
    }
}

pub fn ok() -> v2::Status {
    v2::Status { code: Code::Ok.into(), message: "OK".into() }
}

/// One code for several results: the common one, or MULTIPLE_RESULTS.
pub fn summary<'a>(results: impl Iterator<Item = &'a Option<v2::Status>>) -> v2::Status {
    let mut codes: Vec<i32> = results.flatten().map(|s| s.code).collect();
    codes.sort_unstable();
    codes.dedup();
    match codes[..] {
        [code] => {
            let name = Code::try_from(code).map_or("UNKNOWN", |c| c.as_str_name());
            v2::Status { code, message: name.into() }
        }
        _ => v2::Status {
            code: Code::MultipleResults.into(),
            message: "the entries have several results".into(),
        },
    }
}

const CODE: &str = "ferry-code";

/// How an error crosses an internal call: its code as metadata beside the message.
impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        let mut status = tonic::Status::internal(error.message);
        status.metadata_mut().insert(CODE, (error.code as i32).into());
        status
    }
}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        let sent = status.metadata().get(CODE).and_then(|v| v.to_str().ok()?.parse::<i32>().ok());
        if let Some(code) = sent.and_then(|c| Code::try_from(c).ok()) {
            return Self::new(code, status.message());
        }
        let code = match status.code() {
            tonic::Code::DeadlineExceeded | tonic::Code::Cancelled => Code::ProxyTimeout,
            tonic::Code::Unavailable => Code::HaNotAvailable,
            tonic::Code::Unimplemented => Code::NotImplemented,
            _ => Code::InternalServerError,
        };
        Self::new(code, format!("the broker did not answer: {}", status.message()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_an_internal_call() {
        let error = Error::topic_not_found(&"t");
        assert_eq!(Error::from(tonic::Status::from(error.clone())), error);
        assert_eq!(Error::from(tonic::Status::deadline_exceeded("x")).code, Code::ProxyTimeout);
    }

    #[test]
    fn results_are_summed_up() {
        let status = |code: Code| Some(Error::new(code, "").status());
        assert_eq!(summary([status(Code::Ok), status(Code::Ok)].iter()).code, Code::Ok as i32);
        assert_eq!(
            summary([status(Code::Ok), status(Code::BadRequest)].iter()).code,
            Code::MultipleResults as i32
        );
    }
}
