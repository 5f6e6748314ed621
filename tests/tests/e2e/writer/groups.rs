//! Transactions are sent before those ahead of them are answered: what these come to must not be taken for their own.

use anabranch_proto::record::ValueRef::Integer;
use anabranch_streamer::{
    postgres::writer::Outcome,
    write::{NO_HASH, Policy},
};

use super::fixture::{Fixture, Program, insert, update};

/// A call that is cut goes on in Postgres while the replica calls again, and sends what it has no answer to. So one of both finds
/// what the other has made, skips that, with the statements that were to be prepared for it, and goes on behind.
#[tokio::test(flavor = "multi_thread")]
async fn what_another_call_has_made_takes_the_next_ones_statements_away() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, n int);
         CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN PERFORM pg_advisory_xact_lock(NEW.id); RETURN NEW; END $$;
         CREATE TRIGGER holds BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION hold()",
    )
    .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let rules = &rules;
    let replica = &fixture.replica("r1");
    let mut program = Program::new(rules, &["t"]);
    let inserted = |id| insert(0, &[Integer(id), Integer(0)]);
    let updated = |n| update(0, &[Integer(1)], "01", &[Integer(n)]);
    let all = [
        program.transaction(&[inserted(1)]),
        program.transaction(&[updated(2)]),
        program.transaction(&[inserted(3), updated(3)]),
        program.transaction(&[inserted(4), updated(4)]),
        program.transaction(&[updated(5)]),
    ];
    let (mut cut, mut next) = (fixture.writer().await, fixture.writer().await);
    let first = next.apply(replica, &NO_HASH, &all[0], &rules.rules).await;
    assert_eq!(first, Ok(Outcome::Applied));
    let second = cut
        .apply(replica, &all[0].hash, &all[1], &rules.rules)
        .await;
    assert_eq!(second, Ok(Outcome::Applied));

    // It knows how to insert, finds the second one made, and has the third one's claim as long as it can't insert.
    let holder = fixture.database.connect().await;
    holder
        .batch_execute("SELECT pg_advisory_lock(3)")
        .await
        .unwrap();
    let going_on = next.apply_many(replica, &all[0].hash, &all[1..], &rules.rules);
    let meanwhile = async {
        fixture.until_waiting(1).await;
        let third = cut.apply(replica, &all[1].hash, &all[2], &rules.rules);
        let release = async {
            fixture.until_waiting(2).await;
            holder
                .batch_execute("SELECT pg_advisory_unlock(3)")
                .await
                .unwrap();
        };
        tokio::join!(third, release).0
    };
    let (applied, third) = tokio::join!(going_on, meanwhile);
    // Whose it was does not matter.
    assert!(
        matches!(third, Ok(Outcome::Applied | Outcome::AlreadyAnswered)),
        "{third:?}"
    );
    assert_eq!(applied.error, None);
    let [_, _, rest @ ..] = &applied.outcomes[..] else {
        panic!("{:?}", applied.outcomes);
    };
    assert_eq!(rest, [Outcome::Applied, Outcome::Applied]);
    let rows = "SELECT string_agg(id || ': ' || n, ', ' ORDER BY id) FROM t";
    assert_eq!(fixture.text(rows).await, "1: 5, 3: 0, 4: 0");
}

/// A COMMIT may fail, although all constraints were found to hold before; and the BEGIN behind it is skipped then.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_behind_a_commit_that_fails_is_executed_without_a_claim() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, n int);
         CREATE TABLE late (id int);
         CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'too late'; END $$;
         CREATE CONSTRAINT TRIGGER fails AFTER INSERT ON late DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION fail();
         CREATE FUNCTION defer() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN SET CONSTRAINTS ALL DEFERRED; INSERT INTO late VALUES (NEW.id); RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER defers AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW WHEN (NEW.n = 13) EXECUTE FUNCTION defer()",
    )
    .await;
    // Or else Postgres refuses it, as nobody has become the role then.
    fixture.grant("GRANT ALL ON t TO {login}").await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    // More than one group of statements.
    let many: Vec<_> = (1..=300)
        .map(|id| insert(0, &[Integer(id), Integer(0)]))
        .collect();
    let all = [
        program.transaction(&[insert(0, &[Integer(0), Integer(13)])]),
        program.transaction(&many),
        program.transaction(&[insert(0, &[Integer(301), Integer(0)])]),
    ];
    let replica = fixture.replica("r1");
    let all_applied = writer
        .apply_many(&replica, &NO_HASH, &all, &rules.rules)
        .await;
    assert_eq!(all_applied.error, None);
    let [Outcome::Rejected(why), Outcome::Applied, Outcome::Applied] = &all_applied.outcomes[..]
    else {
        panic!("{:?}", all_applied.outcomes);
    };
    assert_eq!((&*why.sqlstate, why.entry), ("P0001", None));
    let rows = "SELECT count(*) || ' in ' || count(DISTINCT xmin::text) FROM t";
    assert_eq!(fixture.text(rows).await, "301 in 2");
    let again = writer
        .apply_many(&replica, &NO_HASH, &all, &rules.rules)
        .await;
    assert_eq!(again.outcomes, [(); 3].map(|()| Outcome::AlreadyAnswered));
}

/// What a function of the application drops, at any place, is prepared again, or not prepared.
#[tokio::test(flavor = "multi_thread")]
async fn a_trigger_that_drops_prepared_statements_rejects_or_blocks_writes() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, n int);
         CREATE FUNCTION drop_all() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN DEALLOCATE ALL; RETURN NEW; END $$;
         CREATE TRIGGER drops AFTER INSERT ON t FOR EACH ROW WHEN (NEW.n = 13) EXECUTE FUNCTION drop_all()",
    )
    .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let mut program = Program::new(&rules, &["t"]);
    let inserted = |id, n| insert(0, &[Integer(id), Integer(n)]);
    let all = [
        program.transaction(&[inserted(1, 0)]),
        program.transaction(&[inserted(2, 13)]),
        program.transaction(&[inserted(3, 0)]),
        program.transaction(&[inserted(4, 13), inserted(5, 13), inserted(6, 0)]),
        program.transaction(&[inserted(7, 0), inserted(8, 13)]),
        program.transaction(&[inserted(9, 0)]),
    ];
    let replica = fixture.replica("r1");
    let mut done = 0;
    let mut previous = NO_HASH;
    // A connection that ends within a transaction is not used again.
    for _ in 0..4 {
        let mut writer = fixture.writer().await;
        let rest = &all[done..];
        let applied = writer
            .apply_many(&replica, &previous, rest, &rules.rules)
            .await;
        for outcome in &applied.outcomes {
            assert!(
                matches!(outcome, Outcome::Applied | Outcome::AlreadyAnswered),
                "{outcome:?}"
            );
            previous = all[done].hash;
            done += 1;
        }
        assert_eq!(
            writer.is_usable(),
            applied.error.is_none(),
            "{:?}",
            applied.error
        );
    }
    assert_eq!(done, all.len());
    let rows = "SELECT string_agg(id::text, ' ' ORDER BY id) FROM t";
    assert_eq!(fixture.text(rows).await, "1 2 3 4 5 6 7 8 9");
}

/// Internal errors may be of what others do at the moment.
#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_else_changed_meanwhile_rejects_a_write() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY);
         CREATE FUNCTION helper() RETURNS int LANGUAGE sql AS 'SELECT 1';
         CREATE FUNCTION alter_it() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
             EXECUTE 'ALTER FUNCTION public.helper() COST 5'; RETURN NEW; END $$;
         CREATE TRIGGER alters BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION alter_it()",
    )
    .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let transaction = Program::new(&rules, &["t"]).transaction(&[insert(0, &[Integer(1)])]);
    let other = fixture.database.connect().await;
    let first = "BEGIN; ALTER FUNCTION helper() COST 7";
    other.batch_execute(first).await.unwrap();
    let mut writer = fixture.writer().await;
    let replica = fixture.replica("r1");
    let applied = writer.apply(&replica, &NO_HASH, &transaction, &rules.rules);
    let (outcome, ()) = tokio::join!(applied, async {
        fixture.until_somebody_waits().await;
        other.batch_execute("COMMIT").await.unwrap();
    });
    assert_eq!(outcome, Ok(Outcome::Applied));
}
