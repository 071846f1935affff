//! What a proxy asks of the brokers, whether they run in this process or elsewhere. Both implementations pass
//! the same conformance suite. The messages are the internal protocol's, so that a remote call converts nothing.

use std::future::Future;

use crate::context::CallContext;
use crate::internal::*;
use crate::status::Error;

pub type Reply<T> = std::result::Result<T, Error>;

/// Calls to brokers by name. Every call has a context; its deadline bounds the call.
pub trait Brokers: Clone + Send + Sync + 'static {
    /// Stores messages of one topic, all or none. Returns once they are as durable as the broker is configured.
    fn append(
        &self,
        broker: &str,
        context: &CallContext,
        request: AppendRequest,
    ) -> impl Future<Output = Reply<AppendReply>> + Send;

    /// Hands messages out to a group; waits up to `poll_ms` for one. A caller that goes away loses nothing:
    /// what was meant for it becomes visible at once, or after its invisible time if the answer was on the wire.
    fn pop(
        &self,
        broker: &str,
        context: &CallContext,
        request: PopRequest,
    ) -> impl Future<Output = Reply<PopReply>> + Send;

    fn ack(
        &self,
        broker: &str,
        context: &CallContext,
        request: AckRequest,
    ) -> impl Future<Output = Reply<AckReply>> + Send;

    fn change_invisible(
        &self,
        broker: &str,
        context: &CallContext,
        request: ChangeInvisibleRequest,
    ) -> impl Future<Output = Reply<ChangeInvisibleReply>> + Send;

    fn dead_letter(
        &self,
        broker: &str,
        context: &CallContext,
        request: DeadLetterRequest,
    ) -> impl Future<Output = Reply<DeadLetterReply>> + Send;

    /// Commits or rolls back; only the first decision counts.
    fn decide(
        &self,
        broker: &str,
        context: &CallContext,
        request: DecideRequest,
    ) -> impl Future<Output = Reply<DecideReply>> + Send;

    /// Takes a scheduled message back: it is delivered or recalled, never both.
    fn recall(
        &self,
        broker: &str,
        context: &CallContext,
        request: RecallRequest,
    ) -> impl Future<Output = Reply<RecallReply>> + Send;

    /// Waits up to `poll_ms` for half messages whose producers are to be asked; an answer counts as a check.
    fn checks(
        &self,
        broker: &str,
        context: &CallContext,
        request: ChecksRequest,
    ) -> impl Future<Output = Reply<ChecksReply>> + Send;

    fn scheduled(
        &self,
        broker: &str,
        context: &CallContext,
        request: ScheduledRequest,
    ) -> impl Future<Output = Reply<ScheduledReply>> + Send;

    fn transactions(
        &self,
        broker: &str,
        context: &CallContext,
        request: TransactionsRequest,
    ) -> impl Future<Output = Reply<TransactionsReply>> + Send;

    fn reset_group(
        &self,
        broker: &str,
        context: &CallContext,
        request: ResetGroupRequest,
    ) -> impl Future<Output = Reply<ResetGroupReply>> + Send;

    fn liveness(
        &self,
        broker: &str,
        context: &CallContext,
        request: LivenessRequest,
    ) -> impl Future<Output = Reply<LivenessReply>> + Send;

    fn read(
        &self,
        broker: &str,
        context: &CallContext,
        request: ReadRequest,
    ) -> impl Future<Output = Reply<ReadReply>> + Send;

    /// Messages by key or by time; touches no group.
    fn query(
        &self,
        broker: &str,
        context: &CallContext,
        request: QueryRequest,
    ) -> impl Future<Output = Reply<QueryReply>> + Send;

    /// How the store stands; prunes it before if asked to.
    fn store_state(
        &self,
        broker: &str,
        context: &CallContext,
        request: StoreStateRequest,
    ) -> impl Future<Output = Reply<StoreStateReply>> + Send;

    fn metadata(
        &self,
        broker: &str,
        context: &CallContext,
        request: MetadataRequest,
    ) -> impl Future<Output = Reply<MetadataReply>> + Send;

    fn put_metadata(
        &self,
        broker: &str,
        context: &CallContext,
        request: PutMetadataRequest,
    ) -> impl Future<Output = Reply<PutMetadataReply>> + Send;

    fn group_lag(
        &self,
        broker: &str,
        context: &CallContext,
        request: GroupLagRequest,
    ) -> impl Future<Output = Reply<GroupLagReply>> + Send;
}

/// Expands `$then!` with the list of all calls of [`Brokers`], so that whoever only passes them on names none.
#[macro_export]
macro_rules! broker_calls {
    ($then:ident) => {
        $then! {
            append(AppendRequest) -> AppendReply,
            pop(PopRequest) -> PopReply,
            ack(AckRequest) -> AckReply,
            change_invisible(ChangeInvisibleRequest) -> ChangeInvisibleReply,
            dead_letter(DeadLetterRequest) -> DeadLetterReply,
            decide(DecideRequest) -> DecideReply,
            recall(RecallRequest) -> RecallReply,
            checks(ChecksRequest) -> ChecksReply,
            scheduled(ScheduledRequest) -> ScheduledReply,
            transactions(TransactionsRequest) -> TransactionsReply,
            reset_group(ResetGroupRequest) -> ResetGroupReply,
            liveness(LivenessRequest) -> LivenessReply,
            read(ReadRequest) -> ReadReply,
            query(QueryRequest) -> QueryReply,
            store_state(StoreStateRequest) -> StoreStateReply,
            metadata(MetadataRequest) -> MetadataReply,
            put_metadata(PutMetadataRequest) -> PutMetadataReply,
            group_lag(GroupLagRequest) -> GroupLagReply,
        }
    };
}

/// What proxies and brokers ask of a name server.
pub trait NameServers: Clone + Send + Sync + 'static {
    fn register(&self, request: RegisterRequest) -> impl Future<Output = Reply<RegisterReply>> + Send;
    fn route(&self, request: RouteRequest) -> impl Future<Output = Reply<RouteReply>> + Send;
    fn cluster(&self, request: ClusterRequest) -> impl Future<Output = Reply<ClusterReply>> + Send;
}
