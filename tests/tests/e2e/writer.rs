//! The writer against a real Postgres: what it promises of local transactions, whatever they do.

mod claims;
pub mod fixture;
mod forgery;
mod groups;
mod load;
mod session;
mod types;
mod waits;

use std::time::Duration;

use anabranch_proto::record::ValueRef::{self, Integer, Null, Text};
use anabranch_streamer::{
    postgres::writer::{Error, Outcome, Rejection},
    write::{Conflict, Kind, NO_HASH, Policy},
};
use anabranch_tests::{
    postgres::Server,
    wait::{DEADLINE, until},
};

use self::fixture::{Fixture, Program, delete, insert, update};

fn rejected(outcome: &Outcome) -> &Rejection {
    match outcome {
        Outcome::Rejected(rejection) => rejection,
        other => panic!("not rejected: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_comes_again_has_no_effect_again() {
    let fixture = Fixture::new("CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL)").await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut program = Program::new(&rules, &["t"]);
    let first = program.transaction(&[insert(0, &[Integer(1), Integer(1)])]);
    let second = program.transaction(&[update(0, &[Integer(1)], "01", &[Integer(2)])]);
    let third = program.transaction(&[update(0, &[Integer(1)], "01", &[Integer(3)])]);
    let (mut a, mut b) = (fixture.writer().await, fixture.writer().await);
    // Both at once: one of them waits for the other's claim.
    let (of_a, of_b) = tokio::join!(
        a.apply(&replica, &NO_HASH, &first, &rules.rules),
        b.apply(&replica, &NO_HASH, &first, &rules.rules),
    );
    let mut both = [of_a.unwrap(), of_b.unwrap()];
    both.sort_by_key(|outcome| *outcome == Outcome::AlreadyAnswered);
    assert_eq!(both, [Outcome::Applied, Outcome::AlreadyAnswered]);
    let all = [first, second, third];
    let applied = a.apply_many(&replica, &NO_HASH, &all, &rules.rules).await;
    assert!(applied.error.is_none(), "{:?}", applied.error);
    let expected = [Outcome::AlreadyAnswered, Outcome::Applied, Outcome::Applied];
    assert_eq!(applied.outcomes, expected);
    let applied = b.apply_many(&replica, &NO_HASH, &all, &rules.rules).await;
    assert_eq!(applied.outcomes, [const { Outcome::AlreadyAnswered }; 3]);
    assert_eq!(
        fixture
            .text("SELECT string_agg(id || ':' || n, ' ') FROM t")
            .await,
        "1:3"
    );
    assert_eq!(
        a.books().standing(&replica).await,
        Ok(Some((3, all[2].hash)))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_the_next_transaction_is_not_applied() {
    let fixture = Fixture::new("CREATE TABLE t (id int PRIMARY KEY)").await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    assert_eq!(writer.books().standing(&replica).await, Ok(None));
    let mut program = Program::new(&rules, &["t"]);
    let all: Vec<_> = (1..=4)
        .map(|id| program.transaction(&[insert(0, &[Integer(id)])]))
        .collect();
    let out_of_order = |expected| Err(Error::OutOfOrder { expected });
    let outcome = writer
        .apply(&replica, &all[0].hash, &all[1], &rules.rules)
        .await;
    assert_eq!(outcome, out_of_order(1));
    let outcome = writer
        .apply(&replica, &NO_HASH, &all[0], &rules.rules)
        .await;
    assert_eq!(outcome, Ok(Outcome::Applied));
    let outcome = writer
        .apply(&replica, &all[1].hash, &all[2], &rules.rules)
        .await;
    assert_eq!(outcome, out_of_order(2));

    // The same number from a file that was restored and then written to, or one after it.
    let mut fork = Program::new(&rules, &["t"]);
    let other = fork.transaction(&[insert(0, &[Integer(100)])]);
    let outcome = writer.apply(&replica, &NO_HASH, &other, &rules.rules).await;
    assert_eq!(outcome, Err(Error::Forked { seq: 1 }));
    let other = fork.transaction(&[insert(0, &[Integer(101)])]);
    let outcome = writer
        .apply(&replica, &other.hash, &other, &rules.rules)
        .await;
    assert_eq!(outcome, Err(Error::Forked { seq: 1 }));

    // Somebody else's id.
    let mut thief = fixture.replica("r1");
    thief.subject = "thief".into();
    let outcome = writer
        .apply(&thief, &all[0].hash, &all[1], &rules.rules)
        .await;
    assert_eq!(outcome, Err(Error::OtherSubject));
    assert_eq!(
        writer.books().standing(&thief).await,
        Err(Error::OtherSubject)
    );

    assert_eq!(
        fixture
            .text("SELECT string_agg(id::text, ' ') FROM t")
            .await,
        "1"
    );
    let applied = writer
        .apply_many(&replica, &all[0].hash, &all[1..], &rules.rules)
        .await;
    assert_eq!(applied.outcomes, [const { Outcome::Applied }; 3]);
}

/// What Postgres refuses for whatever reason is recorded with that reason, and does not hold up what is behind it.
#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_transaction_says_why_and_blocks_nothing() {
    let fixture = Fixture::new(
        "CREATE TABLE parents (id int PRIMARY KEY);
         INSERT INTO parents VALUES (1);
         CREATE TABLE t (id int PRIMARY KEY, v varchar(3), n int NOT NULL CONSTRAINT positive CHECK (n > 0),
             u int CONSTRAINT one_u UNIQUE, p int CONSTRAINT has_parent REFERENCES parents,
             d int CONSTRAINT has_parent_late REFERENCES parents DEFERRABLE INITIALLY DEFERRED,
             r int4range, CONSTRAINT apart EXCLUDE USING gist (r WITH &&));
         INSERT INTO t VALUES (1, 'one', 1, 1, 1, 1, '[1,10)');
         CREATE FUNCTION complain() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.v = 'P01' THEN RAISE EXCEPTION 'not today' USING DETAIL = 'a secret'; END IF;
             IF NEW.v = '440' THEN RAISE EXCEPTION 'outside of the view' USING ERRCODE = '44000'; END IF;
             RETURN NEW; END $$;
         CREATE TRIGGER complain BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION complain();
         CREATE TABLE hidden (id int PRIMARY KEY, owner text NOT NULL);
         ALTER TABLE hidden ENABLE ROW LEVEL SECURITY;
         CREATE POLICY own ON hidden USING (owner = current_setting('request.jwt.claims')::json->>'sub');
         INSERT INTO hidden VALUES (1, 'nobody');
         CREATE TABLE closed (id int PRIMARY KEY)",
    )
    .await;
    fixture
        .grant("REVOKE ALL ON closed FROM {app}; CREATE POLICY looks ON hidden FOR SELECT TO {login} USING (true)")
        .await;
    let rules = fixture
        .rules(&["t", "hidden", "closed"], &Policy::default())
        .await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t", "hidden", "closed"]);
    let row = |id, v: &'static str, n, u, p, d, r: &'static str| {
        let text = |text: &'static str| if text.is_empty() { Null } else { Text(text) };
        [Integer(id), text(v), n, u, p, d, text(r)]
    };
    let mut next = 10;
    let mut previous = NO_HASH;
    // Values; SQLSTATE, constraint, entry, outcome.
    for (values, sqlstate, constraint, at_commit, outcome) in [
        (
            row(2, "long", Integer(1), Null, Null, Null, ""),
            "22001",
            None,
            false,
            "error",
        ),
        (
            row(2, "a", Integer(1 << 40), Null, Null, Null, ""),
            "22003",
            None,
            false,
            "error",
        ),
        (
            row(1 << 40, "a", Integer(1), Null, Null, Null, ""),
            "22003",
            None,
            false,
            "error",
        ),
        (
            row(2, "a", Integer(1), Null, Null, Null, "x"),
            "22P02",
            None,
            false,
            "error",
        ),
        (
            row(2, "a", Text("1"), Null, Null, Null, ""),
            "22018",
            None,
            false,
            "error",
        ),
        (
            row(2, "a", Null, Null, Null, Null, ""),
            "23502",
            None,
            false,
            "error",
        ),
        (
            row(2, "a", Integer(1), Null, Integer(9), Null, ""),
            "23503",
            Some("has_parent"),
            false,
            "error",
        ),
        (
            row(2, "a", Integer(1), Integer(1), Null, Null, ""),
            "23505",
            Some("one_u"),
            false,
            "error",
        ),
        (
            row(1, "a", Integer(1), Null, Null, Null, ""),
            "23505",
            Some("t_pkey"),
            false,
            "insert_exists",
        ),
        (
            row(2, "a", Integer(-1), Null, Null, Null, ""),
            "23514",
            Some("positive"),
            false,
            "error",
        ),
        (
            row(2, "a", Integer(1), Null, Null, Null, "[5,6)"),
            "23P01",
            Some("apart"),
            false,
            "error",
        ),
        (
            row(2, "440", Integer(1), Null, Null, Null, ""),
            "44000",
            None,
            false,
            "error",
        ),
        (
            row(2, "P01", Integer(1), Null, Null, Null, ""),
            "P0001",
            None,
            false,
            "error",
        ),
        (
            row(2, "a", Integer(1), Null, Null, Integer(9), ""),
            "23503",
            Some("has_parent_late"),
            true,
            "error",
        ),
    ] {
        next += 1;
        let good = row(next, "ok", Integer(1), Null, Null, Null, "");
        let both = [
            // The first entry goes too.
            program.transaction(&[
                insert(0, &row(1000, "ok", Integer(1), Null, Null, Null, "")),
                insert(0, &values),
            ]),
            program.transaction(&[insert(0, &good)]),
        ];
        let applied = writer
            .apply_many(&replica, &previous, &both, &rules.rules)
            .await;
        assert!(applied.error.is_none(), "{sqlstate}: {:?}", applied.error);
        let rejection = rejected(&applied.outcomes[0]);
        assert_eq!(rejection.sqlstate, sqlstate, "{rejection:?}");
        assert_eq!(rejection.constraint.as_deref(), constraint, "{rejection:?}");
        assert_eq!(rejection.entry, (!at_commit).then_some(1), "{rejection:?}");
        assert_eq!(rejection.outcome, outcome, "{rejection:?}");
        assert!(!rejection.message.contains("secret"), "{rejection:?}");
        assert_eq!(applied.outcomes[1], Outcome::Applied);
        previous = both[1].hash;
        // It is recorded as it was said, and nothing of it is there.
        let seq = both[0].seq;
        let recorded = format!(
            "SELECT concat_ws('|', coalesce(entry, -1), outcome, sqlstate, coalesce(constraint_name, '-'))
               FROM anabranch.rejections WHERE replica = 'r1' AND seq = {seq}"
        );
        let entry = if at_commit { -1 } else { 1 };
        let constraint = constraint.unwrap_or("-");
        assert_eq!(
            fixture.text(&recorded).await,
            format!("{entry}|{outcome}|{sqlstate}|{constraint}")
        );
        let count = format!("SELECT count(*)::text FROM t WHERE id IN (2, 1000) OR id = {next}");
        assert_eq!(fixture.text(&count).await, "1");
    }

    // By grant, and by policies: INSERT says so, UPDATE finds nothing.
    for (entry, sqlstate, outcome) in [
        (insert(2, &[Integer(1)]), "42501", "error"),
        (insert(1, &[Integer(2), Text("nobody")]), "42501", "error"),
        (
            update(1, &[Integer(1)], "01", &[Text("me")]),
            "AB100",
            "update_missing",
        ),
    ] {
        let good = row(next + 1, "ok", Integer(1), Null, Null, Null, "");
        next += 1;
        let both = [
            program.transaction(&[entry]),
            program.transaction(&[insert(0, &good)]),
        ];
        let applied = writer
            .apply_many(&replica, &previous, &both, &rules.rules)
            .await;
        assert!(applied.error.is_none(), "{:?}", applied.error);
        let rejection = rejected(&applied.outcomes[0]);
        assert_eq!(
            (&*rejection.sqlstate, &*rejection.outcome),
            (sqlstate, outcome)
        );
        assert_eq!(rejection.entry, Some(0));
        assert_eq!(applied.outcomes[1], Outcome::Applied);
        previous = both[1].hash;
    }
    let own = program.transaction(&[insert(1, &[Integer(3), Text("edge-1")])]);
    let outcome = writer.apply(&replica, &previous, &own, &rules.rules).await;
    assert_eq!(outcome, Ok(Outcome::Applied));

    writer.books().settle(&replica, own.seq - 2).await.unwrap();
    let settled = "SELECT bool_and(settled)::text FROM anabranch.rejections";
    assert_eq!(fixture.text(settled).await, "true");
    fixture
        .database
        .execute("UPDATE anabranch.rejections SET at = now() - interval '31 days'")
        .await;
    writer.books().prune().await.unwrap();
    let left = "SELECT count(*)::text FROM anabranch.rejections";
    assert_eq!(fixture.text(left).await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_replica_is_not_shown_it_can_not_write() {
    let fixture = Fixture::new(
        "CREATE TABLE issues (id int PRIMARY KEY, team int, title text, secret text);
         INSERT INTO issues VALUES (1, 7, 'ours', 'x'), (2, 8, 'theirs', 'y'), (3, 7, 'ours', 'z')",
    )
    .await;
    let rules = fixture
        .rules_of(
            &[(
                "issues",
                "SELECT id, team, title FROM issues WHERE team = 7",
            )],
            &Policy::default(),
        )
        .await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["issues"]);
    let state =
        "SELECT string_agg(concat_ws(',', id, team, title, secret), ' ' ORDER BY id) FROM issues";
    let before = fixture.text(state).await;
    let mut previous = NO_HASH;
    for (entries, outcome, entry) in [
        (
            vec![update(0, &[Integer(2)], "001", &[Text("mine")])],
            "update_missing",
            0,
        ),
        (
            vec![update(0, &[Integer(2)], "010", &[Integer(7)])],
            "update_missing",
            0,
        ),
        (
            vec![update(0, &[Integer(1)], "010", &[Integer(8)])],
            "out_of_shape",
            0,
        ),
        (
            vec![insert(0, &[Integer(9), Integer(8), Null])],
            "out_of_shape",
            0,
        ),
        (
            vec![insert(0, &[Integer(9), Null, Null])],
            "out_of_shape",
            0,
        ),
        (
            vec![update(0, &[Integer(5)], "001", &[Text("x")])],
            "update_missing",
            0,
        ),
        (vec![insert(0, &[Null, Integer(7), Null])], "error", 0),
        (
            vec![
                update(0, &[Integer(1)], "001", &[Text("x")]),
                delete(0, &[Integer(3)]),
                insert(0, &[Integer(9), Integer(9), Null]),
            ],
            "out_of_shape",
            2,
        ),
    ] {
        let transaction = program.transaction(&entries);
        let answer = writer
            .apply(&replica, &previous, &transaction, &rules.rules)
            .await;
        let answer = answer.unwrap();
        let rejection = rejected(&answer);
        assert_eq!(rejection.outcome, outcome, "{rejection:?}");
        assert_eq!(rejection.entry, Some(entry), "{rejection:?}");
        assert_eq!(fixture.text(state).await, before);
        previous = transaction.hash;
    }
    // What a transaction did not write is not its own because it named it before.
    let stolen = program.transaction(&[
        delete(0, &[Integer(2)]),
        update(0, &[Integer(2)], "010", &[Integer(7)]),
    ]);
    let answer = writer
        .apply(&replica, &previous, &stolen, &rules.rules)
        .await;
    let answer = answer.unwrap();
    let rejection = rejected(&answer);
    assert_eq!(
        (&*rejection.outcome, rejection.entry),
        ("update_missing", Some(1))
    );
    assert_eq!(fixture.text(state).await, before);
    previous = stolen.hash;
    // In and out within one transaction, and what is not there is deleted.
    let transaction = program.transaction(&[
        update(0, &[Integer(1)], "010", &[Integer(8)]),
        update(0, &[Integer(1)], "110", &[Integer(4), Integer(7)]),
        delete(0, &[Integer(3)]),
        delete(0, &[Integer(3)]),
        // Not there, and not there for it.
        delete(0, &[Integer(77)]),
        delete(0, &[Integer(2)]),
        insert(0, &[Integer(3), Integer(7), Text("new")]),
    ]);
    let outcome = writer
        .apply(&replica, &previous, &transaction, &rules.rules)
        .await;
    assert_eq!(outcome, Ok(Outcome::Applied));
    assert_eq!(fixture.text(state).await, "2,8,theirs,y 3,7,new 4,7,ours,x");
    previous = transaction.hash;

    // A column and a table that are in no shape of it.
    let mut program = program.with(&[("issues", &["id", "secret"]), ("other", &["id"])]);
    for (entry, sqlstate) in [
        (insert(0, &[Integer(11), Text("x")]), "42501"),
        (insert(1, &[Integer(11)]), "42501"),
    ] {
        let transaction = program.transaction(&[entry]);
        let answer = writer
            .apply(&replica, &previous, &transaction, &rules.rules)
            .await;
        let answer = answer.unwrap();
        let rejection = rejected(&answer);
        assert_eq!(
            (&*rejection.outcome, &*rejection.sqlstate),
            ("not_writable", sqlstate)
        );
        previous = transaction.hash;
    }
}

/// The outer row is named in subqueries, in whatever statement the condition stands.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_a_row_of_another_table_shows_can_be_written_and_no_other() {
    let fixture = Fixture::new(
        "CREATE TABLE issues (id int PRIMARY KEY, team int, title text);
         CREATE TABLE members (id int PRIMARY KEY, team int, person int);
         CREATE FUNCTION merge_issues(old issues, new issues, now issues) RETURNS issues LANGUAGE sql AS 'SELECT $2';
         INSERT INTO members VALUES (1, 7, 5), (2, 8, 6), (3, 7, 4)",
    )
    .await;
    let select = "SELECT * FROM issues WHERE EXISTS (SELECT 1 FROM members t WHERE t.team = issues.team AND t.person = 5) \
                  AND (id, team) NOT IN (SELECT id, team FROM members WHERE person = 4 AND members.id = issues.id)";
    let state = "SELECT string_agg(concat_ws(',', id, team, title), ' ' ORDER BY id) FROM issues";
    for (number, conflict) in [
        Conflict::LastWrite,
        Conflict::FirstWrite,
        Conflict::Function("public.merge_issues".into()),
    ]
    .into_iter()
    .enumerate()
    {
        let there =
            "TRUNCATE issues; INSERT INTO issues VALUES (1, 7, 'a'), (2, 8, 'b'), (3, 7, 'c')";
        fixture.database.execute(there).await;
        let mut policy = Policy::default();
        policy.columns.insert("title".into(), conflict);
        let rules = fixture.rules_of(&[("issues", select)], &policy).await;
        let replica = fixture.replica(&format!("r{number}"));
        let mut writer = fixture.writer().await;
        let mut program = Program::new(&rules, &["issues"]);
        let mut previous = NO_HASH;
        let set = |old: &'static str| match number {
            0 => vec![Text("x")],
            _ => vec![Text("x"), Text(old)],
        };
        for (entry, outcome) in [
            (
                update(0, &[Integer(2)], "001", &set("b")),
                Some("update_missing"),
            ),
            (
                update(0, &[Integer(3)], "001", &set("c")),
                Some("update_missing"),
            ),
            (
                update(0, &[Integer(1)], "010", &[Integer(8)]),
                Some("out_of_shape"),
            ),
            (
                insert(0, &[Integer(4), Integer(8), Null]),
                Some("out_of_shape"),
            ),
            (delete(0, &[Integer(2)]), None),
            (update(0, &[Integer(1)], "001", &set("a")), None),
            (insert(0, &[Integer(5), Integer(7), Null]), None),
            (delete(0, &[Integer(5)]), None),
        ] {
            let transaction = program.transaction(&[entry]);
            let answer = writer
                .apply(&replica, &previous, &transaction, &rules.rules)
                .await;
            previous = transaction.hash;
            let answer = answer.unwrap();
            match outcome {
                Some(outcome) => assert_eq!(rejected(&answer).outcome, outcome, "{answer:?}"),
                None => assert_eq!(answer, Outcome::Applied),
            }
        }
        assert_eq!(fixture.text(state).await, "1,7,x 2,8,b 3,7,c");
    }
}

/// Another transaction takes the row out of the shape while ours waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_leaves_the_shape_meanwhile_is_not_pulled_back() {
    let fixture = Fixture::new(
        "CREATE TABLE issues (id int PRIMARY KEY, team int, title text);
         INSERT INTO issues VALUES (1, 7, 'ours')",
    )
    .await;
    let select = "SELECT * FROM issues WHERE team = 7";
    let rules = fixture
        .rules_of(&[("issues", select)], &Policy::default())
        .await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["issues"]);
    let transaction = program.transaction(&[update(0, &[Integer(1)], "010", &[Integer(7)])]);
    let other = fixture.database.connect().await;
    let take = "BEGIN; UPDATE issues SET team = 8, title = 'theirs'";
    other.batch_execute(take).await.unwrap();
    let applying = writer.apply(&replica, &NO_HASH, &transaction, &rules.rules);
    let commit = async {
        fixture.until_somebody_waits().await;
        other.batch_execute("COMMIT").await.unwrap();
    };
    let (outcome, ()) = tokio::join!(applying, commit);
    rejected(&outcome.unwrap());
    let state = "SELECT concat_ws(',', id, team, title) FROM issues";
    assert_eq!(fixture.text(state).await, "1,8,theirs");
}

/// A trigger may suppress an UPDATE that changes nothing. A row that went while ours waited for it is another matter.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_went_meanwhile_is_taken_for_a_suppressed_update() {
    let fixture = Fixture::new(
        "CREATE TABLE issues (id int PRIMARY KEY, team int, title text, updated timestamptz);
         CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.title = OLD.title THEN RETURN NULL; END IF;
             NEW.updated := now(); RETURN NEW; END $$;
         CREATE TRIGGER touch BEFORE UPDATE OF title ON issues FOR EACH ROW EXECUTE FUNCTION touch();
         INSERT INTO issues VALUES (1, 7, 'gone'), (2, 7, 'theirs'), (3, 7, 'same')",
    )
    .await;
    let select = "SELECT id, team, title FROM issues WHERE team = 7";
    let rules = fixture
        .rules_of(&[("issues", select)], &Policy::default())
        .await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["issues"]);
    let mut previous = NO_HASH;
    let takes = [
        "DELETE FROM issues WHERE id = 1",
        "UPDATE issues SET team = 8 WHERE id = 2",
    ];
    for (id, take) in (1..).zip(takes) {
        let transaction = program.transaction(&[update(0, &[Integer(id)], "001", &[Text("ours")])]);
        let other = fixture.database.connect().await;
        other
            .batch_execute(&format!("BEGIN; {take}"))
            .await
            .unwrap();
        let applying = writer.apply(&replica, &previous, &transaction, &rules.rules);
        let commit = async {
            fixture.until_somebody_waits().await;
            other.batch_execute("COMMIT").await.unwrap();
        };
        let (outcome, ()) = tokio::join!(applying, commit);
        let outcome = outcome.unwrap();
        assert_eq!(rejected(&outcome).outcome, "update_missing", "{take}");
        previous = transaction.hash;
    }
    let same = program.transaction(&[update(0, &[Integer(3)], "001", &[Text("same")])]);
    let outcome = writer.apply(&replica, &previous, &same, &rules.rules).await;
    assert_eq!(outcome, Ok(Outcome::Applied));
    let state = "SELECT string_agg(concat_ws(',', id, team, title), ' ' ORDER BY id) FROM issues";
    assert_eq!(fixture.text(state).await, "2,8,theirs 3,7,same");
}

/// A foreign key that cascades writes rows too, in our transaction, and may put them where the transaction wrote before.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_a_cascade_moved_is_taken_for_the_replicas_own() {
    let fixture = Fixture::new(
        "CREATE TABLE issues (id int PRIMARY KEY, team int);
         CREATE TABLE comments (issue int REFERENCES issues ON UPDATE CASCADE, n int, team int, body text, PRIMARY KEY (issue, n));
         INSERT INTO issues VALUES (1, 7), (2, 7);
         INSERT INTO comments VALUES (1, 1, 7, 'ours'), (2, 1, 8, 'theirs')",
    )
    .await;
    let selects = [
        ("issues", "SELECT * FROM issues WHERE team = 7"),
        ("comments", "SELECT * FROM comments WHERE team = 7"),
    ];
    let rules = fixture.rules_of(&selects, &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["issues", "comments"]);
    let key = [Integer(1), Integer(1)];
    let stolen = program.transaction(&[
        update(1, &key, "0001", &[Text("mine")]),
        delete(1, &key),
        update(0, &[Integer(1)], "10", &[Integer(9)]),
        // Takes along what is not shown, to where the one was that was shown.
        update(0, &[Integer(2)], "10", &[Integer(1)]),
        update(1, &key, "0010", &[Integer(7)]),
    ]);
    let answer = writer
        .apply(&replica, &NO_HASH, &stolen, &rules.rules)
        .await
        .unwrap();
    let rejection = rejected(&answer);
    assert_eq!(
        (&*rejection.outcome, rejection.entry),
        ("update_missing", Some(4))
    );
    let state =
        "SELECT string_agg(concat_ws(',', issue, n, team, body), ' ' ORDER BY issue) FROM comments";
    assert_eq!(fixture.text(state).await, "1,1,7,ours 2,1,8,theirs");
}

#[tokio::test(flavor = "multi_thread")]
async fn role_and_claims_are_in_force_for_the_effects_and_nothing_else() {
    let fixture = Fixture::new(
        "CREATE TABLE seen (n serial, at text, who text, claims text);
         CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql SECURITY INVOKER AS $$ BEGIN
             INSERT INTO seen (at, who, claims) VALUES (TG_NAME, current_user, current_setting('request.jwt.claims'));
             RETURN NULL; END $$;
         CREATE TABLE t (id int PRIMARY KEY);
         CREATE TRIGGER soon AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION see();
         CREATE CONSTRAINT TRIGGER late AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION see();
         CREATE FUNCTION see_claim() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO public.seen (at, who, claims) VALUES ('claim', pg_catalog.session_user, ''); RETURN NULL; END $$",
    )
    .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let transaction = program.transaction(&[insert(0, &[Integer(1)])]);
    let outcome = writer
        .apply(&replica, &NO_HASH, &transaction, &rules.rules)
        .await;
    assert_eq!(outcome, Ok(Outcome::Applied));
    let app = fixture.app();
    let seen = "SELECT string_agg(concat_ws(' ', at, who, claims), '|' ORDER BY n) FROM seen";
    let claims = &replica.claims_json;
    assert_eq!(
        fixture.text(seen).await,
        format!("soon {app} {claims}|late {app} {claims}")
    );

    // Not the role's, and not within a trigger, whoever calls.
    let zeros = "'\\x00'::bytea";
    let claim = format!("SELECT anabranch.claim('r9', 's', 1, {zeros}, {zeros}, '{{}}')");
    let other = fixture.database.connect().await;
    let as_app = format!("BEGIN; SET LOCAL ROLE \"{app}\"; {claim}");
    let denied = other.batch_execute(&as_app).await.unwrap_err();
    assert_eq!(denied.code().unwrap().code(), "42501");
    other.batch_execute("ROLLBACK").await.unwrap();
    let nobody = "SELECT count(*)::text FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace,
        aclexplode(coalesce(proacl, acldefault('f', proowner))) a WHERE nspname = 'anabranch' AND a.grantee = 0";
    assert_eq!(fixture.text(nobody).await, "0");
    fixture
        .database
        .execute(&format!(
            "CREATE TABLE forging (id int PRIMARY KEY);
             CREATE FUNCTION forge() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 RESET ROLE; PERFORM * FROM (SELECT anabranch.settle('r1', 'edge-1', 1, 1)) s; RETURN NULL; END $$;
             CREATE TRIGGER forge AFTER INSERT ON forging FOR EACH ROW EXECUTE FUNCTION forge();
             GRANT ALL ON forging TO \"{app}\""
        ))
        .await;
    let rules = fixture.rules(&["t", "forging"], &Policy::default()).await;
    let mut program = program.over(&rules, &["t", "forging"]);
    let forged = program.transaction(&[insert(1, &[Integer(1)])]);
    let answer = writer
        .apply(&replica, &transaction.hash, &forged, &rules.rules)
        .await;
    let answer = answer.unwrap();
    let rejection = rejected(&answer);
    assert_eq!(rejection.sqlstate, "42501", "{rejection:?}");
    assert!(
        rejection.message.contains("within a trigger"),
        "{rejection:?}"
    );
}

/// Each of these leaves the shape by a way that a look for rows which are there and not shown does not see.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_not_seen_to_be_shown_afterwards_is_refused() {
    let fixture = Fixture::new(
        "CREATE TABLE secured (id int PRIMARY KEY, team int, title text);
         ALTER TABLE secured ENABLE ROW LEVEL SECURITY;
         CREATE TABLE moved (id int PRIMARY KEY, team int, title text);
         CREATE FUNCTION move() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.title = 'move' THEN NEW.id := NEW.id + 1000; END IF;
             IF NEW.title = 'swallow' THEN RETURN NULL; END IF;
             RETURN NEW; END $$;
         CREATE TRIGGER move BEFORE INSERT ON moved FOR EACH ROW EXECUTE FUNCTION move();
         CREATE FUNCTION stay() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
         CREATE TRIGGER stay BEFORE DELETE ON moved FOR EACH ROW EXECUTE FUNCTION stay();
         INSERT INTO secured VALUES (1, 7, 'ours');
         INSERT INTO moved VALUES (1, 7, 'ours'), (9, 8, 'theirs')",
    )
    .await;
    fixture
        .grant("CREATE POLICY writes ON secured TO {app} USING (true)")
        .await;
    let selects = [
        ("secured", "SELECT * FROM secured WHERE team = 7"),
        ("moved", "SELECT * FROM moved WHERE team = 7"),
    ];
    let rules = fixture.rules_of(&selects, &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["secured", "moved"]);
    let state = "SELECT string_agg(concat_ws(',', id, team, title), ' ' ORDER BY id, title)
                   FROM (SELECT * FROM secured UNION ALL SELECT * FROM moved) s";
    let before = fixture.text(state).await;

    // The login role sees no row at all: nothing is accepted, nothing is lost, and it is said what is missing.
    let key = [Integer(1)];
    let leaves = program.transaction(&[update(0, &key, "010", &[Integer(8)])]);
    let answer = writer
        .apply(&replica, &NO_HASH, &leaves, &rules.rules)
        .await;
    let Err(Error::Definite(message)) = answer else {
        panic!("{answer:?}")
    };
    assert!(
        message.contains("BYPASSRLS") && message.contains("public.secured"),
        "{message}"
    );
    assert_eq!(fixture.text(state).await, before);

    // It sees some: those that it does not see may be any.
    fixture
        .grant("CREATE POLICY looks ON secured FOR SELECT TO {login} USING (team = 7)")
        .await;
    let mut previous = NO_HASH;
    let refused = [
        vec![],
        vec![insert(0, &[Integer(2), Integer(8), Null])],
        vec![insert(0, &[Integer(2), Null, Null])],
        // What a trigger made of it is at another key, or nowhere, or still there.
        vec![insert(1, &[Integer(2), Integer(8), Text("move")])],
        vec![insert(1, &[Integer(2), Integer(7), Text("swallow")])],
        vec![update(1, &key, "010", &[Integer(8)]), delete(1, &key)],
        // Nor is another's row its own because a trigger swallowed what it wrote there.
        vec![
            insert(1, &[Integer(9), Integer(7), Text("swallow")]),
            update(1, &[Integer(9)], "010", &[Integer(7)]),
        ],
    ];
    let outcome = |i| {
        if i == refused.len() - 1 {
            "update_missing"
        } else {
            "out_of_shape"
        }
    };
    for (i, entries) in refused.iter().enumerate() {
        let made = match i {
            0 => None,
            _ => Some(program.transaction(entries)),
        };
        let transaction = made.as_ref().unwrap_or(&leaves);
        let answer = writer
            .apply(&replica, &previous, transaction, &rules.rules)
            .await;
        let answer = answer.unwrap();
        let rejection = rejected(&answer);
        assert_eq!(rejection.outcome, outcome(i), "{i}: {rejection:?}");
        assert_eq!(fixture.text(state).await, before, "{i}");
        previous = transaction.hash;
    }

    // What stays in the shape, or does not stay, is fine.
    let fine = program.transaction(&[
        update(0, &key, "010", &[Integer(8)]),
        update(0, &key, "110", &[Integer(2), Integer(7)]),
        insert(0, &[Integer(3), Integer(8), Null]),
        delete(0, &[Integer(3)]),
        insert(0, &[Integer(3), Integer(7), Null]),
        insert(0, &[Integer(4), Integer(9), Null]),
        delete(0, &[Integer(4)]),
    ]);
    let outcome = writer.apply(&replica, &previous, &fine, &rules.rules).await;
    assert_eq!(outcome, Ok(Outcome::Applied));
    assert_eq!(
        fixture.text(state).await,
        "1,7,ours 2,7,ours 3,7 9,8,theirs"
    );
}

/// What a replica is told must not depend on what is outside of its shapes.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_not_told_what_is_outside_of_its_shapes() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, team int, title text);
         CREATE FUNCTION merge_t(old t, new t, now t) RETURNS t LANGUAGE sql AS 'SELECT $2';
         INSERT INTO t VALUES (2, 8, 'theirs')",
    )
    .await;
    let mut number = 0;
    for conflict in [
        Conflict::LastWrite,
        Conflict::FirstWrite,
        Conflict::Add,
        Conflict::Function("public.merge_t".into()),
    ] {
        let mut policy = Policy::default();
        policy.columns.insert("team".into(), conflict);
        let select = [("t", "SELECT * FROM t WHERE team = 7")];
        let rules = fixture.rules_of(&select, &policy).await;
        number += 1;
        let replica = fixture.replica(&format!("r{number}"));
        let mut writer = fixture.writer().await;
        let mut program = Program::new(&rules, &["t"]);
        let mut previous = NO_HASH;
        let mut told = Vec::new();
        // One is there, the other is not.
        for key in [2, 3].map(|id| [Integer(id)]) {
            let old = [Integer(5), Integer(7)];
            let last = policy.columns["team"] == Conflict::LastWrite;
            let set = if last { &old[..1] } else { &old[..] };
            let gone = [key[0], key[0], Integer(7), Null];
            for entry in [
                update(0, &key, "010", set),
                update(0, &key, "001", &[Text("x")]),
                (0, Kind::Delete, gone.to_vec()),
                delete(0, &key),
            ] {
                let transaction = program.transaction(&[entry]);
                let answer = writer
                    .apply(&replica, &previous, &transaction, &rules.rules)
                    .await;
                previous = transaction.hash;
                told.push(match answer.unwrap() {
                    Outcome::Rejected(rejection) => format!("{rejection:?}"),
                    other => format!("{other:?}"),
                });
            }
        }
        assert_eq!(told[..4], told[4..]);
    }
    let state = "SELECT string_agg(concat_ws(',', id, team, title), ' ') FROM t";
    assert_eq!(fixture.text(state).await, "2,8,theirs");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_quotes_what_the_replica_is_not_shown() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, a text, secret text);
         INSERT INTO t VALUES (1, 'x', 'a secret');
         ALTER TABLE t ADD CHECK (a <> 'y' OR secret::int > 0)",
    )
    .await;
    let rules = fixture
        .rules_of(&[("t", "SELECT id, a FROM t")], &Policy::default())
        .await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let transaction = program.transaction(&[update(0, &[Integer(1)], "01", &[Text("y")])]);
    let answer = writer
        .apply(&replica, &NO_HASH, &transaction, &rules.rules)
        .await;
    let answer = answer.unwrap();
    let rejection = rejected(&answer);
    assert_eq!(rejection.sqlstate, "22P02");
    assert!(!rejection.message.contains("secret"), "{rejection:?}");
}

/// Postgres quotes the whole of a value that it can't read.
#[tokio::test(flavor = "multi_thread")]
async fn an_error_that_quotes_a_large_value_is_taken_for_a_broken_connection() {
    let fixture = Fixture::new("CREATE TABLE t (id int PRIMARY KEY, u uuid)").await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let large = "CANARY ".repeat(500_000);
    let all = [
        program.transaction(&[insert(0, &[Integer(1), Text(&large)])]),
        program.transaction(&[insert(0, &[Integer(2), Null])]),
    ];
    let applied = writer
        .apply_many(&replica, &NO_HASH, &all, &rules.rules)
        .await;
    assert!(applied.error.is_none(), "{:?}", applied.error);
    let rejection = rejected(&applied.outcomes[0]);
    assert_eq!(rejection.sqlstate, "22P02");
    assert!(!rejection.message.contains("CANARY"), "it is quoted");
    assert_eq!(applied.outcomes[1], Outcome::Applied);
    assert!(writer.is_usable());
}

/// A transaction may need more statements than are kept prepared.
#[tokio::test(flavor = "multi_thread")]
async fn more_statements_than_are_kept_are_mixed_up() {
    let columns: Vec<_> = (1..=11).map(|i| format!("c{i} int")).collect();
    let sql = format!(
        "CREATE TABLE t (id int PRIMARY KEY, {})",
        columns.join(", ")
    );
    let fixture = Fixture::new(&sql).await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let mut row = vec![Integer(1)];
    row.extend([Null; 11]);
    let mut previous = NO_HASH;
    let first = program.transaction(&[insert(0, &row)]);
    let outcome = writer
        .apply(&replica, &previous, &first, &rules.rules)
        .await;
    assert_eq!(outcome, Ok(Outcome::Applied));
    previous = first.hash;
    // Each set of columns is a statement; in transactions below the limit and above it.
    let masks: Vec<String> = (1..2048).map(|set| format!("0{set:011b}")).collect();
    for (round, at_once) in [(1, 100), (2, 900), (3, 2047)] {
        for some in masks.chunks(at_once) {
            let entries: Vec<_> = some
                .iter()
                .map(|mask| {
                    let values = vec![Integer(round); mask.matches('1').count()];
                    update(0, &[Integer(1)], mask, &values)
                })
                .collect();
            let transaction = program.transaction(&entries);
            let outcome = writer
                .apply(&replica, &previous, &transaction, &rules.rules)
                .await;
            assert_eq!(outcome, Ok(Outcome::Applied));
            previous = transaction.hash;
        }
        let sum = "SELECT (c1 + c2 + c3 + c4 + c5 + c6 + c7 + c8 + c9 + c10 + c11)::text FROM t";
        assert_eq!(fixture.text(sum).await, (11 * round).to_string());
    }
}

/// What is known of a table's triggers may be old.
#[tokio::test(flavor = "multi_thread")]
async fn an_update_that_a_new_trigger_suppresses_is_taken_for_one_that_missed() {
    let fixture =
        Fixture::new("CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 1)")
            .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let [first, same] =
        [2, 2].map(|n| program.transaction(&[update(0, &[Integer(1)], "01", &[Integer(n)])]));
    let outcome = writer.apply(&replica, &NO_HASH, &first, &rules.rules).await;
    assert_eq!(outcome, Ok(Outcome::Applied));
    fixture
        .database
        .execute(
            "CREATE TRIGGER same BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        )
        .await;
    let outcome = writer
        .apply(&replica, &first.hash, &same, &rules.rules)
        .await;
    assert_eq!(outcome, Ok(Outcome::Applied));
}

/// Policies that are everybody's are the login role's too, and read the claims.
#[tokio::test(flavor = "multi_thread")]
async fn a_policy_for_everybody_fails_for_the_role_that_looks() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, owner text, team int);
         ALTER TABLE t ENABLE ROW LEVEL SECURITY;
         CREATE POLICY own ON t AS RESTRICTIVE USING (owner = current_setting('request.jwt.claims')::json->>'sub')",
    )
    .await;
    fixture
        .grant(
            "CREATE POLICY looks ON t FOR SELECT TO {login} USING (true);
             CREATE POLICY writes ON t TO {app} USING (true)",
        )
        .await;
    let rules = fixture
        .rules_of(
            &[("t", "SELECT * FROM t WHERE team = 7")],
            &Policy::default(),
        )
        .await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let transaction = program.transaction(&[insert(0, &[Integer(1), Text("edge-1"), Integer(7)])]);
    let outcome = writer
        .apply(&replica, &NO_HASH, &transaction, &rules.rules)
        .await;
    assert_eq!(outcome, Ok(Outcome::Applied));
}

#[tokio::test(flavor = "multi_thread")]
async fn conflicts_end_as_the_policy_says() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, last text, first text, hits numeric(6,1), f float8, j json);
         CREATE TABLE m (id int PRIMARY KEY, a text, b int, c text GENERATED ALWAYS AS (a || b) STORED);
         CREATE FUNCTION merge_m(old m, new m, now m) RETURNS m LANGUAGE plpgsql AS $$ BEGIN
             IF new.a = 'keep' THEN RETURN NULL; END IF;
             now.a := concat_ws('/', old.a, new.a, now.a); now.b := now.b + 1; RETURN now; END $$;
         INSERT INTO t VALUES (1, 'l', 'f', 10.5, 'NaN', '{\"a\": 1}');
         INSERT INTO m VALUES (1, 'now', 5)",
    )
    .await;
    let mut policy = Policy::default();
    for (column, conflict) in [
        ("first", Conflict::FirstWrite),
        ("f", Conflict::FirstWrite),
        ("j", Conflict::FirstWrite),
        ("hits", Conflict::Add),
    ] {
        policy.columns.insert(column.into(), conflict);
    }
    let rules = fixture.rules(&["t"], &policy).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let mut previous = NO_HASH;
    let key = [Integer(1)];
    for (entry, expected) in [
        (update(0, &key, "010000", &[Text("L")]), None),
        (update(0, &key, "001000", &[Text("F"), Text("f")]), None),
        (
            update(0, &key, "001000", &[Text("G"), Text("f")]),
            Some("conflict"),
        ),
        (
            update(0, &key, "011000", &[Text("x"), Text("G"), Null]),
            Some("conflict"),
        ),
        (update(0, &key, "000100", &[Text("3.5"), Text("1.5")]), None),
        (
            update(0, &key, "000100", &[Text("99999"), Text("1")]),
            Some("error"),
        ),
        // The program saw NaN as NULL.
        (
            update(0, &key, "000010", &[ValueRef::Real(2.5), Null]),
            None,
        ),
        (
            update(0, &key, "000001", &[Text("[]"), Text("{\"a\": 1}")]),
            None,
        ),
        (
            update(0, &key, "000001", &[Text("[1]"), Text("{\"a\": 1}")]),
            Some("conflict"),
        ),
        (
            (
                0,
                Kind::Delete,
                vec![Integer(1), Integer(1), Null, Text("old"), Null, Null, Null],
            ),
            Some("conflict"),
        ),
    ] {
        let transaction = program.transaction(&[entry]);
        let answer = writer
            .apply(&replica, &previous, &transaction, &rules.rules)
            .await;
        let outcome = match answer.unwrap() {
            Outcome::Applied => None,
            Outcome::Rejected(rejection) => Some(rejection.outcome.into_owned()),
            Outcome::AlreadyAnswered => panic!("new"),
        };
        assert_eq!(
            outcome.as_deref(),
            expected,
            "transaction {}",
            transaction.seq
        );
        previous = transaction.hash;
    }
    let state = "SELECT concat_ws(',', id, last, first, hits, f, j) FROM t";
    assert_eq!(fixture.text(state).await, "1,L,F,12.5,2.5,[]");

    let policy = Policy {
        table: Conflict::Function("public.merge_m".into()),
        ..Policy::default()
    };
    let rules = fixture.rules(&["m"], &policy).await;
    let mut program = program.over(&rules, &["m"]);
    for (entry, expected) in [
        (
            update(0, &key, "010", &[Text("new"), Text("old")]),
            "1,old/new/now,6,old/new/now6",
        ),
        (
            update(0, &key, "010", &[Text("keep"), Text("x")]),
            "1,old/new/now,6,old/new/now6",
        ),
        (
            update(0, &key, "100", &[Integer(2), Integer(1)]),
            "2,old/new/now/old/new/now/old/new/now,7,old/new/now/old/new/now/old/new/now7",
        ),
    ] {
        let transaction = program.transaction(&[entry]);
        let outcome = writer
            .apply(&replica, &previous, &transaction, &rules.rules)
            .await;
        assert_eq!(outcome, Ok(Outcome::Applied));
        assert_eq!(
            fixture
                .text("SELECT concat_ws(',', id, a, b, c) FROM m")
                .await,
            expected
        );
        previous = transaction.hash;
    }
    let missing = program.transaction(&[update(0, &key, "010", &[Text("new"), Text("old")])]);
    let answer = writer
        .apply(&replica, &previous, &missing, &rules.rules)
        .await;
    assert_eq!(rejected(&answer.unwrap()).outcome, "update_missing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sum_fails_on_the_way_or_ends_as_no_number() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, small int2, big int8, n numeric);
         INSERT INTO t VALUES (1, -20000, -9223372036854775808, 'NaN')",
    )
    .await;
    let mut policy = Policy::default();
    for column in ["small", "big", "n"] {
        policy.columns.insert(column.into(), Conflict::Add);
    }
    let rules = fixture.rules(&["t"], &policy).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let key = [Integer(1)];
    let mut previous = NO_HASH;
    for entry in [
        update(0, &key, "0100", &[Integer(20_000), Integer(-20_000)]),
        update(0, &key, "0010", &[Integer(i64::MAX), Integer(i64::MIN)]),
        update(0, &key, "0001", &[Text("1.5"), Text("NaN")]),
    ] {
        let transaction = program.transaction(&[entry]);
        let outcome = writer
            .apply(&replica, &previous, &transaction, &rules.rules)
            .await;
        assert_eq!(outcome, Ok(Outcome::Applied));
        previous = transaction.hash;
    }
    let state = "SELECT concat_ws(' ', small, big, n) FROM t";
    let expected = format!("20000 {} 1.5", i64::MAX);
    assert_eq!(fixture.text(state).await, expected);
    // What is too much in the end is too much.
    let over = program.transaction(&[update(0, &key, "0100", &[Integer(20_000), Integer(0)])]);
    let outcome = writer.apply(&replica, &previous, &over, &rules.rules).await;
    assert_eq!(rejected(&outcome.unwrap()).sqlstate, "22003");
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_that_a_program_left_out_get_their_defaults() {
    let fixture = Fixture::new(
        "CREATE SEQUENCE numbers;
         CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int NOT NULL DEFAULT nextval('numbers') + 40,
             o int DEFAULT 7, i int GENERATED BY DEFAULT AS IDENTITY, w text);
         GRANT USAGE ON SEQUENCE numbers TO PUBLIC",
    )
    .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let first = program.transaction(&[insert(0, &[Integer(5), Null, Null, Null, Null])]);
    let outcome = writer.apply(&replica, &NO_HASH, &first, &rules.rules).await;
    assert_eq!(outcome, Ok(Outcome::Applied));
    let state = "SELECT string_agg(concat_ws(',', id, n, coalesce(o::text, '-'), i, w), ' ' ORDER BY id) FROM t";
    assert_eq!(fixture.text(state).await, "5,41,-,1");
    // The default came after the writer looked: it looks again before it rejects.
    fixture
        .database
        .execute("ALTER TABLE t ALTER w SET DEFAULT 'w'; UPDATE t SET w = 'x'; ALTER TABLE t ALTER w SET NOT NULL")
        .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let second = program.transaction(&[insert(
        0,
        &[Integer(6), Integer(1), Integer(2), Integer(3), Null],
    )]);
    let outcome = writer
        .apply(&replica, &first.hash, &second, &rules.rules)
        .await;
    assert_eq!(outcome, Ok(Outcome::Applied));
    assert_eq!(fixture.text(state).await, "5,41,-,1,x 6,1,2,3,w");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadlock_is_tried_again() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 0), (2, 0)",
    )
    .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let transaction = program.transaction(&[
        update(0, &[Integer(2)], "01", &[Integer(5)]),
        update(0, &[Integer(1)], "01", &[Integer(5)]),
    ]);
    let other = fixture.database.connect().await;
    // Whoever waits first gives up first.
    let hold = "BEGIN; SET LOCAL deadlock_timeout = '60s'; UPDATE t SET n = n + 1 WHERE id = 1";
    other.batch_execute(hold).await.unwrap();
    let applying = writer.apply(&replica, &NO_HASH, &transaction, &rules.rules);
    let crossing = async {
        fixture.until_somebody_waits().await;
        let rest = "UPDATE t SET n = n + 1 WHERE id = 2; COMMIT";
        other.batch_execute(rest).await.unwrap();
    };
    let (outcome, ()) = tokio::join!(applying, crossing);
    assert_eq!(outcome, Ok(Outcome::Applied));
    assert_eq!(
        fixture.text("SELECT string_agg(n::text, ' ') FROM t").await,
        "5 5"
    );
    until("the deadlock is counted", DEADLINE, || async {
        let sql = "SELECT deadlocks::text FROM pg_stat_database WHERE datname = current_database()";
        fixture.text(sql).await != "0"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_was_given_up_in_the_middle_is_not_used_again() {
    let fixture = Fixture::new("CREATE TABLE t (id int PRIMARY KEY)").await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let transaction = program.transaction(&[insert(0, &[Integer(1)])]);
    let other = fixture.database.connect().await;
    other.batch_execute("BEGIN; LOCK t").await.unwrap();
    let given_up = tokio::select! {
        _ = writer.apply(&replica, &NO_HASH, &transaction, &rules.rules) => false,
        () = fixture.until_somebody_waits() => true,
    };
    assert!(given_up && !writer.is_usable());
    let again = writer
        .apply(&replica, &NO_HASH, &transaction, &rules.rules)
        .await;
    assert!(matches!(again, Err(Error::Transient(_))), "{again:?}");
    drop(writer);
    other.batch_execute("COMMIT").await.unwrap();
    let mut writer = fixture.writer().await;
    let again = writer
        .apply(&replica, &NO_HASH, &transaction, &rules.rules)
        .await;
    again.unwrap();
    assert_eq!(fixture.text("SELECT count(*)::text FROM t").await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_goes_away_loses_nothing() {
    let server = Server::start(anabranch_tests::postgres::Options::new()).await;
    let fixture = Fixture::on(&server, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let all: Vec<_> = (0..3000)
        .map(|id| program.transaction(&[insert(0, &[Integer(id)])]))
        .collect();
    let (applied, _) = tokio::join!(
        writer.apply_many(&replica, &NO_HASH, &all, &rules.rules),
        async {
            until("something was applied", Duration::from_secs(30), || async {
                fixture.text("SELECT (count(*) > 10)::text FROM t").await == "true"
            })
            .await;
            server
                .restart(anabranch_tests::postgres::Stop::Immediate)
                .await;
        },
    );
    if let Some(error) = applied.error {
        assert!(matches!(error, Error::Transient(_)), "{error:?}");
    }
    let mut writer = fixture.writer().await;
    let standing = writer.books().standing(&replica).await.unwrap();
    let stored = standing.map_or(0, |(seq, _)| seq);
    assert!(
        stored >= applied.outcomes.len() as u64,
        "told, but not durable"
    );
    let applied = writer
        .apply_many(&replica, &NO_HASH, &all, &rules.rules)
        .await;
    assert!(applied.error.is_none(), "{:?}", applied.error);
    assert_eq!(applied.outcomes.len(), all.len());
    assert_eq!(fixture.text("SELECT count(*)::text FROM t").await, "3000");
}

/// Notices and settings come in the middle of answers, and may be large.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_in_many_pieces_does_not_hold_up_what_waits_behind_it() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY);
         CREATE FUNCTION chat() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             RAISE WARNING 'here %', repeat('x', CASE NEW.id % 30 WHEN 7 THEN 3000000 ELSE 1 END);
             PERFORM set_config('application_name', 'chat ' || NEW.id, true);
             RETURN NULL; END $$;
         CREATE TRIGGER chat AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION chat()",
    )
    .await;
    let rules = fixture.rules(&["t", "u"], &Policy::default()).await;
    let replica = fixture.replica("r1");
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t", "u"]);
    let transactions: Vec<_> = (0..100)
        .map(|id| program.transaction(&[insert(0, &[Integer(id)]), insert(1, &[Integer(id)])]))
        .collect();
    let applying = writer.apply_many(&replica, &NO_HASH, &transactions, &rules.rules);
    let applied = tokio::time::timeout(DEADLINE, applying)
        .await
        .expect("it stands still");
    assert!(applied.error.is_none(), "{:?}", applied.error);
    assert_eq!(applied.outcomes, [const { Outcome::Applied }; 100]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_function_is_replaced_and_nobody_else_may_call_it() {
    let fixture = Fixture::new("SELECT 1").await;
    fixture
        .database
        .execute(
            "CREATE OR REPLACE FUNCTION anabranch.settle(replica text, seq bigint) RETURNS void LANGUAGE sql AS 'SELECT';
             GRANT EXECUTE ON FUNCTION anabranch.claim(text, text, bigint, bytea, bytea, uuid[]) TO PUBLIC",
        )
        .await;
    // Panics if anything is missing afterwards.
    fixture.set_up().await;
    let settle = "SELECT (prosecdef AND prosrc LIKE '%DELETE FROM%')::text FROM pg_proc WHERE proname = 'settle'";
    assert_eq!(fixture.text(settle).await, "true");
    let public = "SELECT count(*)::text FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace,
        aclexplode(coalesce(proacl, acldefault('f', proowner))) a WHERE nspname = 'anabranch' AND a.grantee = 0";
    assert_eq!(fixture.text(public).await, "0");
}
