//! `ferry schedule …` and `ferry tx …`: messages that wait for their time, or for a decision.

use std::time::{Duration, UNIX_EPOCH};

use apis::admin::*;
use apis::convert::receive as convert;
use apis::v2::{Digest, Message};
use model::message;
use serde_json::{Value, json};

use super::client::{self, failed};
use super::{Format, Resolution, ScheduleCommand, TxCommand, messages, output};

fn time(ms: i64) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(ms.max(0) as u64)).to_string()
}

fn property(properties: &[u8], key: &str) -> String {
    message::property(properties, key).unwrap_or_default().to_owned()
}

pub async fn schedule(command: ScheduleCommand) -> anyhow::Result<()> {
    match command {
        ScheduleCommand::List { topic, from, max, remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let request = ListScheduledRequest {
                topic: topic.unwrap_or_default(),
                from_ms: from.unwrap_or(0),
                max_messages: max,
            };
            let reply = admin.list_scheduled(request).await.map_err(failed)?.into_inner();
            let row = |on: &ScheduledOn| {
                let scheduled = on.message.clone().unwrap_or_default();
                let m = scheduled.message.unwrap_or_default();
                vec![
                    json!(time(scheduled.due_ms)),
                    json!(m.topic),
                    json!(property(&m.properties, message::UNIQ_KEY)),
                    json!(m.body.len()),
                    json!(on.broker),
                    json!(scheduled.recall_handle),
                ]
            };
            let rows: Vec<Vec<Value>> = reply.messages.iter().map(row).collect();
            output::rows(
                remote.output,
                &["DUE", "TOPIC", "MESSAGE ID", "BYTES", "BROKER", "RECALL HANDLE"],
                &rows,
            );
            if remote.output == Format::Table {
                println!("{} of {} that wait", rows.len(), reply.pending);
            }
        }
        ScheduleCommand::Cancel { topic, handle, remote } => {
            let request = CancelScheduledRequest { topic, recall_handle: handle };
            let mut admin = client::admin(&remote.endpoint).await?;
            let reply = admin.cancel_scheduled(request).await.map_err(failed)?.into_inner();
            output::object(remote.output, &[("recalled", json!(reply.message_id))]);
        }
    }
    Ok(())
}

pub async fn tx(command: TxCommand) -> anyhow::Result<()> {
    match command {
        TxCommand::List { topic, remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let request = ListTransactionsRequest { topic: topic.unwrap_or_default() };
            let reply = admin.list_transactions(request).await.map_err(failed)?.into_inner();
            let row = |on: &TransactionOn| {
                let t = on.transaction.clone().unwrap_or_default();
                let m = t.message.unwrap_or_default();
                let parked = t.check_at_ms == 0;
                vec![
                    json!(time(m.store_timestamp_ms)),
                    json!(m.topic),
                    json!(property(&m.properties, message::UNIQ_KEY)),
                    json!(if parked { "parked" } else { "open" }),
                    json!(t.checks),
                    if parked { Value::Null } else { json!(time(t.check_at_ms)) },
                    json!(t.transaction_id),
                ]
            };
            let rows: Vec<Vec<Value>> = reply.transactions.iter().map(row).collect();
            let columns = ["SENT", "TOPIC", "MESSAGE ID", "STATE", "CHECKS", "NEXT CHECK", "TRANSACTION ID"];
            output::rows(remote.output, &columns, &rows);
        }
        TxCommand::Show { topic, id, remote } => {
            let mut admin = client::admin(&remote.endpoint).await?;
            let reply = admin
                .list_transactions(ListTransactionsRequest { topic })
                .await
                .map_err(failed)?
                .into_inner();
            let is_it = |on: &TransactionOn| on.transaction.as_ref().is_some_and(|t| t.transaction_id == id);
            let found = reply.transactions.into_iter().find(is_it);
            let found =
                found.ok_or_else(|| anyhow::anyhow!("there is no open transaction {id} of this topic"))?;
            let delivered = found.transaction.and_then(|t| t.message).unwrap_or_default();
            let shown: Message = convert::message(delivered, Digest::default());
            messages::show(remote.output, &found.broker, &shown, false);
        }
        TxCommand::Resolve { topic, id, decision, remote } => {
            let commit = decision == Resolution::Commit;
            let request = ResolveTransactionRequest { topic, transaction_id: id, commit };
            client::admin(&remote.endpoint).await?.resolve_transaction(request).await.map_err(failed)?;
            let what = if commit { "committed" } else { "rolled back" };
            output::object(remote.output, &[("transaction", json!(what))]);
        }
    }
    Ok(())
}
