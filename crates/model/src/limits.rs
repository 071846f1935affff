//! Every bound that a client can meet, in one table. Units are in the names.
//! Source: protocol spec §3 and what Apache RocketMQ 5.5.0 answers.

/// Topic name, without its namespace.
pub const TOPIC_NAME_MAX_CHARS: usize = 127;
pub const GROUP_NAME_MAX_CHARS: usize = 120;
/// A stored topic name with namespace and `%RETRY%` prefix; the record keeps its length in two bytes.
pub const STORED_TOPIC_MAX_BYTES: usize = 512;
pub const NAMESPACE_MAX_CHARS: usize = 64;

pub const BODY_MAX_BYTES: usize = 4 * 1024 * 1024;
pub const USER_PROPERTIES_MAX: usize = 128;
/// Keys, values, tag and message keys together.
pub const USER_PROPERTIES_MAX_BYTES: usize = 16 * 1024;
/// The property area of a record keeps its length in a signed 16-bit number.
pub const PROPERTIES_AREA_MAX_BYTES: usize = 32_767;
/// Longest message group, in bytes (64 itself is refused).
pub const MESSAGE_GROUP_MAX_BYTES: usize = 63;

pub const INVISIBLE_RECEIVE_MIN_MS: i64 = 10_000;
pub const INVISIBLE_MAX_MS: i64 = 12 * 3_600_000;
/// Invisible time of a message whose renewal is the broker's job.
pub const INVISIBLE_RENEWED_MS: i64 = 60_000;
/// How long a lease is renewed at the most.
pub const RENEWAL_MAX_MS: i64 = 3 * 3_600_000;
/// A client that has not been heard of for this long is gone.
pub const CLIENT_EXPIRY_MS: i64 = 120_000;
/// A client's messages become visible this long after it said good-bye.
pub const INVISIBLE_AFTER_GOODBYE_MS: i64 = 1_000;

/// How far ahead a message can be scheduled: 40 days.
pub const DELAY_MAX_MS: i64 = 40 * 24 * 3_600_000;
/// How long a producer may keep a transaction from being asked after.
pub const CHECK_IMMUNITY_MAX_MS: i64 = 3_600_000;

pub const POLL_MIN_MS: i64 = 5_000;
pub const POLL_MAX_MS: i64 = 20_000;
/// Kept back from the call's deadline, so that the answer still arrives.
pub const POLL_RESERVE_MS: i64 = 100;
pub const RECEIVE_BATCH_MAX: u32 = 32;

/// gRPC frame.
pub const FRAME_MAX_BYTES: usize = 130 * 1024 * 1024;

pub const QUEUES_DEFAULT: u32 = 8;
pub const QUEUES_MAX: u32 = 1024;
/// First delivery included.
pub const ATTEMPTS_DEFAULT: u32 = 17;

/// Messages of one group on one topic that may be in flight at once.
pub const IN_FLIGHT_MAX: usize = 1_000_000;

/// Clients whose settings a proxy remembers.
pub const SESSIONS_MAX: usize = 100_000;
/// Long polls that wait on one broker, as in the reference.
pub const WAITING_MAX: usize = 100_000;
/// Calls that wait for the engine of one broker.
pub const COMMANDS_MAX: usize = 100_000;
