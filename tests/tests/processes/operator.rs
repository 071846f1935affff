//! What an operator does with the command line, on a real server that is killed in between.

use apis::v2::*;
use serde_json::Value;
use tests::client::{by, connect, drain, message, name, receive};
use tests::process::{free_port, run};

use super::dev;

fn json(args: &[&str]) -> Value {
    let mut all = args.to_vec();
    all.extend(["-o", "json"]);
    let out = run(&all);
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{args:?}: {e}: {out}"))
}

fn lines(args: &[&str]) -> Vec<Value> {
    let mut all = args.to_vec();
    all.extend(["-o", "json"]);
    run(&all).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operators_day() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let mut server = dev(dir.path(), port, &[]);
    let endpoint = format!("127.0.0.1:{port}");
    let at = ["--endpoint", endpoint.as_str()];
    let ferry = |args: &[&str]| json(&[args, &at].concat());
    let ferry_lines = |args: &[&str]| lines(&[args, &at].concat());
    ferry(&["topic", "create", "work", "--type", "mixed", "--queues", "1"]);
    ferry(&["group", "create", "crew", "--max-attempts", "2"]);

    // Dead letters: looked at, and sent again, each once.
    let sent = ferry(&["send", "work", "broken", "--key", "k1", "--tag", "hot"]);
    let mut client = connect(port).await;
    let mut request = receive("work", "crew");
    request.message_queue.as_mut().unwrap().broker.as_mut().unwrap().name = "ferry-dev".into();
    let got = drain(&mut client, by("c", request)).await;
    let system = got.messages[0].system_properties.clone().unwrap();
    let bury = ForwardMessageToDeadLetterQueueRequest {
        group: name("crew"),
        topic: name("work"),
        receipt_handle: system.receipt_handle.unwrap(),
        message_id: system.message_id,
        delivery_attempt: 1,
        max_delivery_attempts: 2,
        ..Default::default()
    };
    client.forward_message_to_dead_letter_queue(by("c", bury)).await.unwrap();
    // The broker made the topic; the name server hears of it when it registers next.
    let letters =
        (0..1000).map(|_| ferry(&["dlq", "list"])).find(|l| l.as_array().is_some_and(|l| !l.is_empty()));
    let letters = letters.expect("the dead letter is listed");
    assert_eq!((letters[0]["group"].as_str(), letters[0]["messages"].as_u64()), (Some("crew"), Some(1)));
    assert_eq!(ferry_lines(&["dlq", "show", "crew"])[0]["body"], "broken");
    server.kill();
    server.start_again();
    assert_eq!(ferry(&["dlq", "replay", "crew"])["sent_again"], 1);
    assert_eq!(ferry(&["dlq", "replay", "crew"])["sent_again"], 0, "once");
    let again = &ferry_lines(&["receive", "work", "--group", "crew", "--ack"])[0];
    assert_eq!((&again["body"], &again["message_id"]), (&Value::from("broken"), &sent["message_id"]));
    assert_eq!((&again["keys"][0], &again["tag"]), (&Value::from("k1"), &Value::from("hot")));

    // Back in time: said first, then done.
    let reset = ["group", "reset", "crew", "--to", "1h", "--topic", "work"];
    let dry = ferry(&[&reset[..], &["--dry-run"]].concat());
    assert_eq!(
        (dry[0]["from"].as_u64(), dry[0]["to"].as_u64(), dry[0]["moved"].as_i64()),
        (Some(2), Some(0), Some(-2))
    );
    assert_eq!(ferry(&["group", "lag", "crew"])[0]["lag"], 0, "nothing was changed");
    ferry(&reset);
    server.kill();
    server.start_again();
    let both = ferry_lines(&["receive", "work", "--group", "crew", "--ack", "-n", "2"]);
    assert_eq!(both.iter().map(|m| m["body"].as_str().unwrap()).collect::<Vec<_>>(), ["broken", "broken"]);

    // What is scheduled.
    let scheduled = ferry(&["send", "work", "later", "--in", "1h"]);
    let handle = scheduled["recall_handle"].as_str().unwrap();
    server.kill();
    server.start_again();
    let listed = ferry(&["schedule", "list", "work"]);
    assert_eq!((listed.as_array().unwrap().len(), listed[0]["recall_handle"].as_str()), (1, Some(handle)));
    assert_eq!(ferry(&["schedule", "cancel", "work", handle])["recalled"], scheduled["message_id"]);
    assert_eq!(ferry(&["schedule", "list"]), Value::Array(Vec::new()));

    // A transaction whose producer is gone.
    let mut half = message("work", b"half");
    half.system_properties.as_mut().unwrap().message_type = MessageType::Transaction.into();
    let mut client = connect(port).await;
    let sent =
        client.send_message(by("p", SendMessageRequest { messages: vec![half] })).await.unwrap().into_inner();
    let id = sent.entries[0].transaction_id.as_str();
    let open = ferry(&["tx", "list", "work"]);
    assert_eq!((open[0]["state"].as_str(), open[0]["transaction_id"].as_str()), (Some("open"), Some(id)));
    assert_eq!(ferry_lines(&["tx", "show", "work", id])[0]["body"], "half");
    assert_eq!(ferry(&["tx", "resolve", "work", id, "commit"])["transaction"], "committed");
    assert_eq!(ferry(&["tx", "list"]), Value::Array(Vec::new()));
    assert_eq!(ferry_lines(&["receive", "work", "--group", "crew", "--ack"])[0]["body"], "half");
}
