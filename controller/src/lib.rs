//! Leader election of replica sets, nothing else. Built with replication (see ARCHITECTURE.md); until then this crate is empty on purpose.
