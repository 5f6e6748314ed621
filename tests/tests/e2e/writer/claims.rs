//! What Postgres remembers of entries: none takes effect twice, whichever copy of the file sends it, under whatever id.

use anabranch_proto::{Nonce, record::ValueRef::Integer};
use anabranch_streamer::{
    postgres::writer::{Claimed, Error, Outcome},
    write::{Entry, LocalTransaction, NO_HASH, Policy},
};

use super::fixture::{Fixture, Program, insert};

const CLAIMS: &str = "SELECT count(*)::text FROM anabranch.claims";

/// The same entries, sent as the first of another copy.
fn again(transaction: &LocalTransaction) -> LocalTransaction {
    LocalTransaction {
        seq: 8,
        hash: [8; 32],
        ..transaction.clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_takes_effect_again_for_another_copy() {
    let fixture = Fixture::new("CREATE TABLE t (id int PRIMARY KEY CHECK (id <> 13))").await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let (one, two) = (fixture.replica("r1"), fixture.replica("r2"));
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let exact = program.transaction(&[insert(0, &[Integer(1)]), insert(0, &[Integer(2)])]);
    let mut merged = program.transaction(&[insert(0, &[Integer(3)]), insert(0, &[Integer(4)])]);
    merged.merged = true;
    let bad = program.transaction(&[insert(0, &[Integer(13)])]);
    let all = [exact, merged, bad];
    let applied = writer.apply_many(&one, &NO_HASH, &all, &rules.rules).await;
    assert_eq!(applied.outcomes.len(), 3, "{:?}", applied.error);
    assert_eq!(fixture.text(CLAIMS).await, "4");

    // A new id begins at any number, but not with what was claimed.
    let mut copy = Program::new(&rules, &["t"]);
    for transaction in &all {
        let same = again(transaction);
        let outcome = writer.apply(&two, &NO_HASH, &same, &rules.rules).await;
        assert_eq!(outcome, Err(Error::AlreadyClaimed));
    }
    let other = copy.transaction(&[insert(0, &[Integer(5)])]);
    let other = again(&other);
    let outcome = writer.apply(&two, &NO_HASH, &other, &rules.rules).await;
    assert_eq!(outcome, Ok(Outcome::Applied));
    assert_eq!(
        writer.books().standing(&two).await,
        Ok(Some((8, other.hash)))
    );

    // And it is told what became of each.
    let nonces = all.iter().flat_map(|all| &all.entries).map(Entry::nonce);
    let asked: Vec<Nonce> = nonces.collect();
    let judged = writer.books().judge(&asked).await.unwrap();
    let claimed = |place: usize| judged.claimed.iter().find(|one| one.nonce == asked[place]);
    assert_eq!(claimed(0), None);
    assert_eq!(claimed(1).unwrap().outcome, None);
    assert!(claimed(2).is_some() && claimed(3).is_some());
    let rejected = Claimed {
        nonce: asked[4],
        outcome: Some("error".into()),
        sqlstate: Some("23514".into()),
    };
    assert_eq!(claimed(4), Some(&rejected));
    assert!(judged.lsn <= fixture.database.lsn().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_copies_that_send_the_same_at_once_both_have_an_effect() {
    let fixture = Fixture::new("CREATE TABLE t (id int)").await;
    fixture
        .database
        .execute("ALTER TABLE t ADD PRIMARY KEY (id)")
        .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let (one, two) = (fixture.replica("r1"), fixture.replica("r2"));
    let (mut a, mut b) = (fixture.writer().await, fixture.writer().await);
    for id in 0..20 {
        let mut program = Program::new(&rules, &["t"]);
        let first = program.transaction(&[insert(0, &[Integer(id)])]);
        let (one, two) = (
            fixture.replica(&format!("{}-{id}", one.id)),
            fixture.replica(&format!("{}-{id}", two.id)),
        );
        let (of_a, of_b) = tokio::join!(
            a.apply(&one, &NO_HASH, &first, &rules.rules),
            b.apply(&two, &NO_HASH, &first, &rules.rules),
        );
        let mut both = [of_a, of_b];
        both.sort_by_key(Result::is_err);
        assert_eq!(both, [Ok(Outcome::Applied), Err(Error::AlreadyClaimed)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_is_forgotten_before_it_is_old_by_both_clocks() {
    let fixture = Fixture::new("CREATE TABLE t (id int PRIMARY KEY)").await;
    let writer = fixture.writer().await;
    // By the replica's clock and by Postgres', in days: forgotten is only what is old by both.
    fixture
        .database
        .execute(
            "INSERT INTO anabranch.claims (nonce, at)
             SELECT (lpad(to_hex(extract('epoch' FROM now() - make_interval(days => captured))::bigint), 16, '0')
                     || lpad(to_hex(100 * n + claimed), 16, '0'))::uuid, now() - make_interval(days => claimed)
               FROM (VALUES (29, 29), (29, 31), (31, 29), (31, 31), (20000, 31), (20000, 29)) v(captured, claimed),
                    generate_series(1, 600) n",
        )
        .await;
    assert!(writer.books().prune().await.unwrap(), "there are more");
    while writer.books().prune().await.unwrap() {}
    assert_eq!(fixture.text(CLAIMS).await, "2400");
    let judged = writer.books().judge(&[Nonce::new(0, 0)]).await.unwrap();
    let kept: i64 = fixture
        .text("SELECT extract('epoch' FROM now() - interval '30 days')::bigint::text")
        .await
        .parse()
        .unwrap();
    assert!(kept.abs_diff(judged.kept_since as i64) < 60);
}
