//! Large transactions, and many small ones.

use std::time::Instant;

use anabranch_proto::record::ValueRef::{Integer, Text};
use anabranch_streamer::{
    postgres::writer::Outcome,
    write::{NO_HASH, Policy},
};
use anabranch_tests::announce;

use super::fixture::{Fixture, Program, delete, insert, update};

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, team int NOT NULL, title text)";
const SHOWN: &[(&str, &str)] = &[("t", "SELECT * FROM t WHERE team = 7")];

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_100_000_entries_is_applied_whole_or_not_at_all() {
    let fixture = Fixture::new(TABLE).await;
    let rules = fixture.rules_of(SHOWN, &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let mut entries: Vec<_> = (0..80_000)
        .map(|id| {
            insert(
                0,
                &[
                    Integer(id),
                    Integer(7),
                    Text("a title that is neither long nor short"),
                ],
            )
        })
        .collect();
    let keys: Vec<_> = (0..20_000).map(|id| [Integer(id)]).collect();
    for (i, key) in keys.iter().enumerate() {
        entries.push(if i % 2 == 0 {
            update(0, key, "001", &[Text("another")])
        } else {
            delete(0, key)
        });
    }
    let mut bad = entries.clone();
    bad.push(insert(
        0,
        &[Integer(1_000_000), Integer(8), Text("not shown")],
    ));
    let transactions = [program.transaction(&bad), program.transaction(&entries)];
    for (transaction, expected) in transactions.iter().zip([0, 70_000]) {
        let start = Instant::now();
        let previous = if transaction.seq == 1 {
            NO_HASH
        } else {
            transactions[0].hash
        };
        let outcome = writer
            .apply(&replica, &previous, transaction, &rules.rules)
            .await;
        announce(&format!(
            "MEASURED: a transaction of {} entries: {:?}",
            transaction.entries.len(),
            start.elapsed()
        ));
        match outcome.unwrap() {
            Outcome::Applied => assert_eq!(transaction.seq, 2),
            Outcome::Rejected(rejection) => {
                assert_eq!((transaction.seq, rejection.entry), (1, Some(100_000)));
                assert_eq!(rejection.outcome, "out_of_shape");
            }
            Outcome::AlreadyAnswered => panic!("new"),
        }
        let count = fixture.text("SELECT count(*)::text FROM t").await;
        assert_eq!(count, expected.to_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn small_transactions_do_not_wait_for_each_other() {
    const COUNT: i64 = 10_000;
    let fixture = Fixture::new(TABLE).await;
    let rules = fixture.rules_of(SHOWN, &Policy::default()).await;
    for together in [1, 16, 128] {
        let replica = fixture.replica(&format!("r{together}"));
        let mut writer = fixture.writer().await;
        let mut program = Program::new(&rules, &["t"]);
        let count = if together == 1 { COUNT / 5 } else { COUNT };
        let transactions: Vec<_> = (0..count)
            .map(|id| {
                let id = id + i64::from(together) * 1_000_000;
                program.transaction(&[insert(0, &[Integer(id), Integer(7), Text("a title")])])
            })
            .collect();
        let (mut previous, start) = (NO_HASH, Instant::now());
        for some in transactions.chunks(together as usize) {
            let applied = writer
                .apply_many(&replica, &previous, some, &rules.rules)
                .await;
            assert!(applied.error.is_none(), "{:?}", applied.error);
            assert!(
                applied
                    .outcomes
                    .iter()
                    .all(|outcome| *outcome == Outcome::Applied)
            );
            previous = some.last().unwrap().hash;
        }
        let seconds = start.elapsed().as_secs_f64();
        announce(&format!(
            "MEASURED: {:.0} one-row transactions a second, {together} at a time",
            count as f64 / seconds
        ));
    }
    // Rejected ones among them: nothing behind them is lost or doubled.
    let replica = fixture.replica("mixed");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let transactions: Vec<_> = (0..300)
        .map(|id| {
            let team = if id % 7 == 3 { 8 } else { 7 };
            program.transaction(&[insert(0, &[Integer(id), Integer(team), Text("x")])])
        })
        .collect();
    let applied = writer
        .apply_many(&replica, &NO_HASH, &transactions, &rules.rules)
        .await;
    assert!(applied.error.is_none(), "{:?}", applied.error);
    for (id, outcome) in applied.outcomes.iter().enumerate() {
        assert_eq!(*outcome == Outcome::Applied, id % 7 != 3, "{id}");
    }
    let count = fixture
        .text("SELECT count(*)::text FROM t WHERE id < 1000")
        .await;
    let rejections = "SELECT count(*)::text FROM anabranch.rejections WHERE replica = 'mixed'";
    assert_eq!((&*count, &*fixture.text(rejections).await), ("257", "43"));
}
