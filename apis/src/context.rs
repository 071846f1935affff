//! The call context: what travels with every call between roles besides its request.
//!
//! ```text
//! metadata of an internal call    ferry-protocol: 1 · ferry-client-id · ferry-namespace · ferry-principal
//!                                 traceparent · grpc-timeout
//! ```

use std::time::Duration;

use tonic::Status;
use tonic::metadata::{MetadataMap, MetadataValue};

use crate::INTERNAL_VERSION;

const PROTOCOL: &str = "ferry-protocol";
const CLIENT_ID: &str = "ferry-client-id";
const NAMESPACE: &str = "ferry-namespace";
const PRINCIPAL: &str = "ferry-principal";
const TRACE: &str = "traceparent";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallContext {
    /// Time left until the caller gives up.
    pub deadline: Option<Duration>,
    /// W3C trace context.
    pub trace: Option<String>,
    /// Who asks, once authentication is on.
    pub principal: Option<String>,
    /// Empty where the call is the server's own.
    pub client_id: String,
    pub namespace: String,
}

impl CallContext {
    /// A call that no client asked for.
    pub fn internal() -> Self {
        Self { deadline: Some(Duration::from_secs(3)), ..Self::default() }
    }

    pub fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        let metadata = request.metadata_mut();
        metadata.insert(PROTOCOL, INTERNAL_VERSION.into());
        let texts = [
            (CLIENT_ID, Some(&self.client_id)),
            (NAMESPACE, Some(&self.namespace)),
            (PRINCIPAL, self.principal.as_ref()),
            (TRACE, self.trace.as_ref()),
        ];
        for (key, text) in texts {
            let value = text.filter(|t| !t.is_empty()).and_then(|t| MetadataValue::try_from(t).ok());
            if let Some(value) = value {
                metadata.insert(key, value);
            }
        }
        if let Some(deadline) = self.deadline {
            request.set_timeout(deadline);
        }
        request
    }

    /// Reads the context of an internal call; refuses a newer protocol.
    pub fn of(metadata: &MetadataMap) -> Result<Self, Status> {
        let text = |key: &str| metadata.get(key).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let version = text(PROTOCOL).and_then(|v| v.parse::<u32>().ok()).unwrap_or(0);
        if version != INTERNAL_VERSION {
            return Err(Status::failed_precondition(format!(
                "the caller speaks version {version} of the internal protocol, this role speaks {INTERNAL_VERSION}; \
                 upgrade the older one"
            )));
        }
        Ok(Self {
            deadline: text("grpc-timeout").as_deref().and_then(parse_timeout),
            trace: text(TRACE),
            principal: text(PRINCIPAL),
            client_id: text(CLIENT_ID).unwrap_or_default(),
            namespace: text(NAMESPACE).unwrap_or_default(),
        })
    }
}

/// The value of `grpc-timeout`: up to eight digits and a unit.
pub fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let n: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(n * 3600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let context = CallContext {
            deadline: Some(Duration::from_millis(1500)),
            trace: Some("00-aa-bb-01".into()),
            principal: Some("alice".into()),
            client_id: "host@1@2@x".into(),
            namespace: "ns".into(),
        };
        let request = context.request(());
        assert_eq!(CallContext::of(request.metadata()).unwrap(), context);
    }

    #[test]
    fn another_protocol_version_is_refused() {
        let mut metadata = MetadataMap::new();
        metadata.insert(PROTOCOL, "2".parse().unwrap());
        let error = CallContext::of(&metadata).unwrap_err();
        assert_eq!(error.code(), tonic::Code::FailedPrecondition);
        assert!(CallContext::of(&MetadataMap::new()).is_err());
    }

    #[test]
    fn timeouts() {
        assert_eq!(parse_timeout("20S"), Some(Duration::from_secs(20)));
        assert_eq!(parse_timeout("3000000u"), Some(Duration::from_secs(3)));
        assert_eq!(parse_timeout(""), None);
        assert_eq!(parse_timeout("123456789S"), None);
        assert_eq!(parse_timeout("5x"), None);
    }
}
