//! Resources of the wire to names of the model. Where a client leaves the resource's namespace empty, its
//! `x-mq-namespace` header counts.

use model::{Group, Topic};

use crate::status::Error;
use crate::v2::Resource;

fn parts<'a>(resource: Option<&'a Resource>, header: &'a str) -> (&'a str, &'a str) {
    let Some(resource) = resource else { return (header, "") };
    let namespace =
        if resource.resource_namespace.is_empty() { header } else { &resource.resource_namespace };
    (namespace, &resource.name)
}

pub fn topic(resource: Option<&Resource>, header_namespace: &str) -> Result<Topic, Error> {
    let (namespace, name) = parts(resource, header_namespace);
    Topic::new(namespace, name).map_err(|e| Error::topic(&e))
}

pub fn group(resource: Option<&Resource>, header_namespace: &str) -> Result<Group, Error> {
    let (namespace, name) = parts(resource, header_namespace);
    Group::new(namespace, name).map_err(|e| Error::group(&e))
}
