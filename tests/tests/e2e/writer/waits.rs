//! What may pass is waited out, and not for ever, nor at the cost of others.

use std::time::Duration;

use anabranch_proto::record::ValueRef::{Integer, Null, Text};
use anabranch_streamer::{
    postgres::{
        target::Target,
        writer::{Error, Outcome, Writer},
    },
    write::{NO_HASH, Policy},
};
use anabranch_tests::{
    postgres::{Options, Server},
    proxy::{Proxy, Way},
    wait::{DEADLINE, until},
};

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

/// A streamer whose machine is gone says nothing any more, and Postgres does not hear that for two hours.
#[tokio::test(flavor = "multi_thread")]
async fn a_streamer_that_is_gone_keeps_rows_locked() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 0); CREATE TABLE u (id int PRIMARY KEY)",
    )
    .await;
    let rules = fixture.rules(&["t", "u"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let url = fixture.database.url_as(&fixture.login(), "writer");
    let (user, place) = url.split_once('@').unwrap();
    let (address, name) = place.split_once('/').unwrap();
    let proxy = Proxy::to(address).await;
    let url = format!("{user}@{}/{name}", proxy.address());
    let mut gone = Writer::connect(&Target::parse(&url).unwrap())
        .await
        .unwrap();
    let mut program = Program::new(&rules, &["t", "u"]);
    // More than is sent before the first is answered.
    let mut entries = vec![update(0, &[Integer(1)], "01", &[Integer(1)])];
    entries.extend((0..5000).map(|id| insert(1, &[Integer(id)])));
    let transaction = program.transaction(&entries);
    let other = fixture.database.connect().await;
    other
        .batch_execute("BEGIN; UPDATE t SET n = 5")
        .await
        .unwrap();
    let mut applying = Box::pin(gone.apply(&replica, &NO_HASH, &transaction, &rules.rules));
    tokio::select! {
        outcome = &mut applying => panic!("{outcome:?}"),
        () = fixture.until_somebody_waits() => {}
    }
    proxy.set(|faults| {
        faults.swallow(Way::Up);
        faults.swallow(Way::Down);
    });
    other.batch_execute("COMMIT").await.unwrap();
    let mut writer = fixture.writer().await;
    let deadline = Duration::from_secs(60);
    tokio::time::timeout(deadline, async {
        loop {
            let outcome = writer
                .apply(&replica, &NO_HASH, &transaction, &rules.rules)
                .await;
            match outcome {
                Ok(outcome) => break assert_eq!(outcome, Outcome::Applied),
                Err(Error::Transient(_)) => {}
                Err(error) => panic!("{error:?}"),
            }
        }
    })
    .await
    .expect("the row is locked for ever");
    drop(applying);
}

/// Replicas come and go. What they began and nobody waits for any more must not use up the server's connections.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_was_given_up_goes_on_in_postgres() {
    let fixture =
        Fixture::new("CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 0)")
            .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let mut program = Program::new(&rules, &["t"]);
    let transaction = program.transaction(&[update(0, &[Integer(1)], "01", &[Integer(1)])]);
    let other = fixture.database.connect().await;
    other
        .batch_execute("BEGIN; UPDATE t SET n = 5")
        .await
        .unwrap();
    for i in 0..10 {
        let replica = fixture.replica(&format!("r{i}"));
        let mut writer = fixture.writer().await;
        tokio::select! {
            outcome = writer.apply(&replica, &NO_HASH, &transaction, &rules.rules) => panic!("{outcome:?}"),
            () = fixture.until_somebody_waits() => {}
        }
    }
    // Not as long as they would wait for the lock.
    until("nobody waits", Duration::from_secs(6), || async {
        let sql = "SELECT count(*)::text FROM pg_stat_activity
                    WHERE datname = current_database() AND application_name = 'anabranch writer'";
        fixture.text(sql).await == "0"
    })
    .await;
    other.batch_execute("COMMIT").await.unwrap();
}

/// Its name may point elsewhere by now.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_became_a_standby_is_asked_for_ever() {
    let Some(server) = Server::start_local(Options::new()).await else {
        return;
    };
    let fixture = Fixture::on(&server, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let url = fixture.database.url_as(&fixture.login(), "writer");
    let standby = server.standby().await;
    let here = format!("{}:{}", server.host(), server.port());
    let there = format!("{}:{}", standby.host(), standby.port());
    assert!(url.contains(&here), "{url} {here}");
    let target = Target::parse(&url.replace(&here, &there)).unwrap();
    let mut writer = until("the standby has the role", DEADLINE, || {
        Writer::connect(&target)
    })
    .await;
    let mut program = Program::new(&rules, &["t"]);
    let transaction = program.transaction(&[insert(0, &[Integer(1)])]);
    let outcome = writer
        .apply(&replica, &NO_HASH, &transaction, &rules.rules)
        .await;
    assert!(matches!(outcome, Err(Error::Transient(_))), "{outcome:?}");
    assert!(!writer.is_usable());
}
