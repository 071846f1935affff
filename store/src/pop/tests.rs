//! The state machine with a virtual clock.

use super::*;
use crate::kv::MemKv;

fn key() -> CursorKey {
    CursorKey { group: Group::stored("g"), topic: Topic::stored("t"), queue: 0 }
}

fn popped(next: u64, at: i64, invisible: i64, client: Option<&str>, offsets: &[u64]) -> Change {
    Change::Popped {
        cursor: key(),
        next,
        since: Timestamp(at),
        visible_at: Timestamp(at + invisible),
        client: client.map(Arc::from),
        offsets: offsets.into(),
    }
}

fn done(offsets: &[u64], moved: bool) -> Change {
    Change::Done { cursor: key(), moved, offsets: offsets.into() }
}

#[test]
fn a_message_not_acknowledged_in_time_becomes_due() {
    let mut pop = Pop::default();
    pop.apply(&popped(3, 0, 100, None, &[0, 1, 2]));
    pop.apply(&done(&[0, 2], false));
    assert_eq!(pop.lag(&key()), Some(Lag { committed: 1, next: 3, in_flight: 1 }));
    assert_eq!(pop.due(Timestamp(99), 9), []);
    assert_eq!(pop.next_due(), Some(Timestamp(100)));
    assert_eq!(pop.due(Timestamp(100), 9), [Due::Move(key(), 1)]);
    pop.apply(&done(&[1], true));
    assert_eq!(pop.lag(&key()), Some(Lag { committed: 3, next: 3, in_flight: 0 }));
    assert_eq!(pop.standing(&key(), 1, (Timestamp(0), Timestamp(500)), Timestamp(100)), Standing::Expired);
    assert_eq!(pop.standing(&key(), 0, (Timestamp(0), Timestamp(500)), Timestamp(100)), Standing::Settled);
}

#[test]
fn the_row_decides_not_the_handle() {
    let mut pop = Pop::default();
    pop.apply(&popped(1, 0, 100, None, &[0]));
    pop.apply(&Change::Visible { cursor: key(), offset: 0, visible_at: Timestamp(900), renewal: false });
    // The handle's own time (100) is over; the row's is not.
    assert_eq!(pop.standing(&key(), 0, (Timestamp(0), Timestamp(100)), Timestamp(500)), Standing::Live);
    assert_eq!(pop.standing(&key(), 0, (Timestamp(0), Timestamp(9999)), Timestamp(900)), Standing::Expired);
}

#[test]
fn a_handle_of_another_delivery_is_expired() {
    let mut pop = Pop::default();
    pop.apply(&popped(1, 50, 100, None, &[0]));
    assert_eq!(pop.standing(&key(), 0, (Timestamp(49), Timestamp(149)), Timestamp(60)), Standing::Expired);
    assert_eq!(pop.standing(&key(), 0, (Timestamp(50), Timestamp(150)), Timestamp(60)), Standing::Live);
}

#[test]
fn a_row_lost_in_a_crash_still_takes_its_ack() {
    let mut pop = Pop::default();
    pop.apply(&Change::Seek { cursor: key(), next: 0 });
    assert_eq!(pop.standing(&key(), 1, (Timestamp(0), Timestamp(900)), Timestamp(1)), Standing::Lost);
    pop.apply(&done(&[1], false));
    assert!(pop.is_settled_ahead(&key(), 1));
    assert_eq!(pop.standing(&key(), 1, (Timestamp(0), Timestamp(900)), Timestamp(1)), Standing::Settled);
    pop.apply(&popped(2, 0, 100, None, &[0]));
    assert!(!pop.is_settled_ahead(&key(), 1));
    assert_eq!(pop.lag(&key()).map(|l| l.committed), Some(0));
}

#[test]
fn renewal_lasts_as_long_as_the_client_lives() {
    let mut pop = Pop::default();
    pop.apply(&popped(1, 0, 60_000, Some("c"), &[0]));
    pop.client_seen("c", Timestamp(50_000));
    let Due::Renew(renewed) = &pop.due(Timestamp(60_000), 9)[0] else { panic!("not renewed") };
    pop.apply(renewed);
    assert_eq!(pop.next_due(), Some(Timestamp(120_000)));
    assert_eq!(pop.due(Timestamp(180_000), 9), [Due::Move(key(), 0)], "silent for more than two minutes");
    pop.client_seen("c", Timestamp(170_000));
    assert!(matches!(pop.due(Timestamp(180_000), 9)[0], Due::Renew(_)));
    for change in pop.client_gone("c", Timestamp(100_000)) {
        pop.apply(&change);
    }
    assert_eq!(pop.due(Timestamp(101_000), 9), [Due::Move(key(), 0)]);
}

#[test]
fn a_message_given_back_is_not_renewed() {
    let mut pop = Pop::default();
    pop.apply(&popped(1, 0, 60_000, Some("c"), &[0]));
    pop.client_seen("c", Timestamp(500));
    pop.apply(&Change::Visible { cursor: key(), offset: 0, visible_at: Timestamp(1000), renewal: false });
    assert_eq!(pop.due(Timestamp(1000), 9), [Due::Move(key(), 0)]);
}

#[test]
fn a_checkpoint_holds_everything() {
    let mut pop = Pop::default();
    pop.apply(&popped(5, 7, 100, Some("c"), &[0, 3, 4]));
    pop.apply(&done(&[3, 9], false));
    let kv = MemKv::default();
    let mut batch = Batch::default();
    pop.checkpoint(&mut batch);
    kv.write(&batch, true).unwrap();
    let loaded = Pop::load(&kv, Timestamp(0)).unwrap();
    assert_eq!(loaded.lag(&key()), pop.lag(&key()));
    assert_eq!(loaded.due, pop.due);
    assert!(loaded.is_settled_ahead(&key(), 9));
    pop.apply(&Change::PutGroup(GroupConfig {
        deleted: true,
        ..GroupConfig::concurrent(Group::stored("g"))
    }));
    let mut batch = Batch::default();
    pop.checkpoint(&mut batch);
    kv.write(&batch, true).unwrap();
    assert_eq!(Pop::load(&kv, Timestamp(0)).unwrap().cursors(&Group::stored("g")), []);
}
