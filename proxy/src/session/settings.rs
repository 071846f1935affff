//! What a server says to a client's Settings: the client's own, with what the server decides put over them
//! (protocol spec §4.2).

use apis::convert::receive::duration;
use apis::v2::retry_policy::Strategy;
use apis::v2::settings::PubSub;
use apis::v2::{ClientType, CustomizedBackoff, ExponentialBackoff, Metric, RetryPolicy, Settings};
use model::{Backoff, GroupConfig, limits};

const PRODUCER_ATTEMPTS: i32 = 3;
const LITE_SUBSCRIPTION_QUOTA: i32 = 2000;
const LITE_TOPIC_MAX_CHARS: i32 = 64;

/// `group` is the consumer's, if it exists.
pub fn answer(mut settings: Settings, group: Option<&GroupConfig>) -> Settings {
    match settings.pub_sub.as_mut() {
        Some(PubSub::Publishing(publishing)) => {
            publishing.max_body_size = limits::BODY_MAX_BYTES as i32;
            publishing.validate_message_type = true;
            settings.backoff_policy = Some(producer_backoff());
        }
        Some(PubSub::Subscription(subscription)) => {
            subscription.fifo = Some(group.is_some_and(|g| g.fifo));
            subscription.receive_batch_size = Some(limits::RECEIVE_BATCH_MAX as i32);
            subscription.long_polling_timeout = Some(duration(limits::POLL_MAX_MS));
            if matches!(
                ClientType::try_from(settings.client_type.unwrap_or_default()),
                Ok(ClientType::PushConsumer | ClientType::SimpleConsumer | ClientType::LitePushConsumer)
            ) {
                subscription.lite_subscription_quota = Some(LITE_SUBSCRIPTION_QUOTA);
                subscription.max_lite_topic_size = Some(LITE_TOPIC_MAX_CHARS);
            }
            let attempts = group.map_or(limits::ATTEMPTS_DEFAULT, |g| g.max_attempts);
            let backoff = group.map(|g| g.backoff.clone()).unwrap_or_default();
            settings.backoff_policy = Some(consumer_backoff(attempts, &backoff));
        }
        None => {}
    }
    settings.metric = Some(Metric { on: false, endpoints: None });
    settings
}

fn producer_backoff() -> RetryPolicy {
    let backoff =
        ExponentialBackoff { initial: Some(duration(10)), max: Some(duration(1000)), multiplier: 2.0 };
    RetryPolicy { max_attempts: PRODUCER_ATTEMPTS, strategy: Some(Strategy::ExponentialBackoff(backoff)) }
}

fn consumer_backoff(attempts: u32, backoff: &Backoff) -> RetryPolicy {
    let strategy = match backoff {
        Backoff::Steps(steps) => Strategy::CustomizedBackoff(CustomizedBackoff {
            next: steps.iter().map(|ms| duration(*ms)).collect(),
        }),
        Backoff::Exponential { initial, max, multiplier } => {
            Strategy::ExponentialBackoff(ExponentialBackoff {
                initial: Some(duration(*initial)),
                max: Some(duration(*max)),
                multiplier: *multiplier as f32 / 100.0,
            })
        }
    };
    RetryPolicy { max_attempts: attempts as i32, strategy: Some(strategy) }
}
