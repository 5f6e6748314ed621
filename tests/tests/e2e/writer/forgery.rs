//! What is ours in the database, and who else gets at it.

use anabranch_proto::record::ValueRef::Integer;
use anabranch_streamer::write::{NO_HASH, Policy};

use super::{
    fixture::{Fixture, Program, insert},
    rejected,
};

#[tokio::test(flavor = "multi_thread")]
async fn somebody_elses_rejections_are_settled() {
    let fixture = Fixture::new("CREATE TABLE t (id int PRIMARY KEY CHECK (id < 10))").await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let (replica, mut thief) = (fixture.replica("r1"), fixture.replica("r1"));
    thief.subject = "thief".into();
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let bad = program.transaction(&[insert(0, &[Integer(10)])]);
    let outcome = writer.apply(&replica, &NO_HASH, &bad, &rules.rules).await;
    assert_eq!(rejected(&outcome.unwrap()).sqlstate, "23514");
    // A call that uses the id of another subject may say this as any other.
    writer.settle(&thief, 1).await.unwrap();
    writer.settle(&thief, i64::MAX as u64).await.unwrap();
    let left = "SELECT concat_ws(' ', count(*), bool_or(settled)) FROM anabranch.rejections";
    assert_eq!(fixture.text(left).await, "1 f");
    writer.settle(&replica, 1).await.unwrap();
    assert_eq!(fixture.text(left).await, "1 t");
}
