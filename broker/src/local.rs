//! Brokers of this process: calls without a socket. Used by `ferry dev` and by tests.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use apis::brokers::{Brokers, Reply};
use apis::context::CallContext;
use apis::internal::*;
use apis::status::Error;
use apis::v2::Code;

use crate::Broker;

#[derive(Clone)]
pub struct LocalBrokers(Arc<HashMap<String, Broker>>);

impl LocalBrokers {
    pub fn new(brokers: impl IntoIterator<Item = Broker>) -> Self {
        Self(Arc::new(brokers.into_iter().map(|b| (b.name().to_owned(), b)).collect()))
    }

    fn get(&self, name: &str) -> Result<&Broker, Error> {
        self.0.get(name).ok_or_else(|| Error::new(Code::NotFound, format!("there is no broker {name:?}")))
    }
}

async fn within<T>(deadline: Option<Duration>, call: impl Future<Output = Reply<T>>) -> Reply<T> {
    let Some(deadline) = deadline else { return call.await };
    let late = |_| Error::new(Code::ProxyTimeout, format!("the broker did not answer within {deadline:?}"));
    tokio::time::timeout(deadline, call).await.map_err(late)?
}

macro_rules! forward {
    ($($name:ident($request:ty) -> $reply:ty),* $(,)?) => {
        impl Brokers for LocalBrokers {
            $(async fn $name(&self, broker: &str, context: &CallContext, request: $request) -> Reply<$reply> {
                within(context.deadline, self.get(broker)?.$name(context, request)).await
            })*
        }
    };
}

apis::broker_calls!(forward);
