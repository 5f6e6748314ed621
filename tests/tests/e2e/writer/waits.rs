//! What may pass is waited out, and not for ever, nor at the cost of others.

use anabranch_proto::record::ValueRef::{Integer, Null, Text};
use anabranch_streamer::{
    postgres::writer::{Error, Outcome},
    write::{NO_HASH, Policy},
};
use anabranch_tests::wait::DEADLINE;

use super::{
    fixture::{Fixture, Program, insert, update},
    rejected,
};

/// Functions raise what they like: serialization failures for their own optimistic locks, for instance.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_application_raises_is_waited_out_for_ever() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, v text);
         CREATE FUNCTION complain() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.v IS NOT NULL THEN RAISE EXCEPTION 'somebody was faster' USING ERRCODE = NEW.v; END IF;
             RETURN NEW; END $$;
         CREATE TRIGGER complain BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION complain()",
    )
    .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let mut previous = NO_HASH;
    for (id, sqlstate) in (0..).zip([
        "40001", "40P01", "55P03", "57014", "53400", "58000", "25006", "08000",
    ]) {
        let both = [
            program.transaction(&[insert(0, &[Integer(id), Text(sqlstate)])]),
            program.transaction(&[insert(0, &[Integer(id), Null])]),
        ];
        let applied = writer
            .apply_many(&replica, &previous, &both, &rules.rules)
            .await;
        assert!(applied.error.is_none(), "{sqlstate}: {:?}", applied.error);
        assert_eq!(rejected(&applied.outcomes[0]).sqlstate, sqlstate);
        assert_eq!(applied.outcomes[1], Outcome::Applied);
        previous = both[1].hash;
    }
}

/// There are a few connections for all replicas: who waits for a lock must let others have its turn.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_locked_for_long_keeps_a_connection_for_as_long() {
    let fixture =
        Fixture::new("CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 0)")
            .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let transaction = program.transaction(&[update(0, &[Integer(1)], "01", &[Integer(1)])]);
    let other = fixture.database.connect().await;
    other
        .batch_execute("BEGIN; UPDATE t SET n = 5")
        .await
        .unwrap();
    let waiting = writer.apply(&replica, &NO_HASH, &transaction, &rules.rules);
    let outcome = tokio::time::timeout(DEADLINE, waiting).await;
    let outcome = outcome.expect("it keeps its connection");
    assert!(matches!(outcome, Err(Error::Transient(_))), "{outcome:?}");
    assert!(writer.is_usable());
    other.batch_execute("COMMIT").await.unwrap();
    let outcome = writer
        .apply(&replica, &NO_HASH, &transaction, &rules.rules)
        .await;
    assert_eq!(outcome, Ok(Outcome::Applied));
}
