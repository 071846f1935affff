//! What comes with every call of a client besides its message: who, until when, from where. Lenient with
//! everything that official clients write differently (clients spec §2).

use std::net::SocketAddr;
use std::time::Duration;

use apis::context::{CallContext, parse_timeout};
use apis::status::Error;
use apis::v2::{Address, AddressScheme, Code, Endpoints, Language};
use tonic::Request;
use tonic::metadata::MetadataMap;

/// A broker gets this long for a call that does not wait.
const BROKER_CALL: Duration = Duration::from_secs(3);

#[derive(Clone, Debug)]
pub struct Call {
    pub client_id: String,
    pub namespace: String,
    /// What the client is written in, as it says: JAVA, GO, …
    pub language: Language,
    /// Time the client still waits.
    pub deadline: Option<Duration>,
    pub trace: Option<String>,
    pub peer: Option<SocketAddr>,
    /// The authority the client dialled, or else the address it reached.
    dialled: Option<SocketAddr>,
}

impl Call {
    pub fn of<T>(request: &Request<T>) -> Result<Self, Error> {
        let metadata = request.metadata();
        let text = |key| text(metadata, key);
        let client_id = text("x-mq-client-id").filter(|id| !id.trim().is_empty()).ok_or_else(|| {
            let what = "the header x-mq-client-id is missing or empty; every client names itself with it";
            Error::new(Code::ClientIdRequired, what)
        })?;
        Ok(Self {
            client_id,
            namespace: text("x-mq-namespace").unwrap_or_default(),
            language: metadata
                .get("x-mq-language")
                .and_then(|v| Language::from_str_name(v.to_str().ok()?))
                .unwrap_or(Language::Unspecified),
            deadline: text("grpc-timeout").as_deref().and_then(parse_timeout),
            trace: text("traceparent"),
            peer: request.remote_addr(),
            dialled: request.local_addr(),
        })
    }

    pub fn context(&self) -> CallContext {
        CallContext {
            deadline: Some(self.deadline.map_or(BROKER_CALL, |d| d.min(BROKER_CALL))),
            ..self.waiting()
        }
    }

    /// For a call that waits; its caller sets the deadline.
    pub fn waiting(&self) -> CallContext {
        CallContext {
            deadline: None,
            trace: self.trace.clone(),
            principal: None,
            client_id: self.client_id.clone(),
            namespace: self.namespace.clone(),
        }
    }

    /// Where the client is to send its further calls: what it dialled, port included.
    pub fn endpoints(&self, said: Option<Endpoints>) -> Endpoints {
        if let Some(said) = said.filter(|e| !e.addresses.is_empty()) {
            let scheme = match said.scheme() {
                AddressScheme::Unspecified => scheme_of(&said.addresses[0].host),
                scheme => scheme,
            };
            return Endpoints { scheme: scheme.into(), addresses: said.addresses };
        }
        let reached = self.dialled.unwrap_or_else(|| ([127, 0, 0, 1], 8081).into());
        let host = reached.ip().to_string();
        Endpoints {
            scheme: scheme_of(&host).into(),
            addresses: vec![Address { host, port: reached.port().into() }],
        }
    }
}

fn scheme_of(host: &str) -> AddressScheme {
    match host.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V4(_)) => AddressScheme::IPv4,
        Ok(std::net::IpAddr::V6(_)) => AddressScheme::IPv6,
        Err(_) => AddressScheme::DomainName,
    }
}

fn text(metadata: &MetadataMap, key: &str) -> Option<String> {
    metadata.get(key).and_then(|v| v.to_str().ok()).map(str::to_owned)
}
