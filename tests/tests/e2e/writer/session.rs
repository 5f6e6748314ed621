//! What a connection remembers: nothing of one replica may reach another.

use anabranch_proto::record::ValueRef::{Integer, Null, Text};
use anabranch_streamer::{
    postgres::writer::{Error, Outcome, Replica, Writer},
    write::{NO_HASH, Policy},
};

use super::fixture::{Fixture, Program, delete, insert, update};

/// Functions of an application may set what they like, for longer than their transaction.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_replicas_write_sets_is_seen_by_the_next_ones() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, tenant text, seen text, printed text);
         CREATE FUNCTION remember() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             NEW.seen := nullif(current_setting('app.tenant', true), '');
             NEW.printed := current_setting('TimeZone');
             IF NEW.tenant IS NOT NULL THEN
                 PERFORM set_config('app.tenant', NEW.tenant, false), set_config('TimeZone', 'Asia/Tokyo', false),
                         pg_advisory_lock(7);
             END IF;
             RETURN NEW; END $$;
         CREATE TRIGGER remember BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION remember()",
    )
    .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let mut writer = fixture.writer().await;
    for (id, tenant) in [(1, Text("one")), (2, Null)] {
        let replica = fixture.replica(&format!("r{id}"));
        let mut program = Program::new(&rules, &["t"]);
        let transaction = program.transaction(&[insert(0, &[Integer(id), tenant, Null, Null])]);
        let outcome = writer
            .apply(&replica, &NO_HASH, &transaction, &rules.rules)
            .await;
        assert_eq!(outcome, Ok(Outcome::Applied));
    }
    let seen = "SELECT concat_ws(' ', coalesce(seen, '-'), printed) FROM t WHERE id = 2";
    assert_eq!(fixture.text(seen).await, "- UTC");
    let locks = "SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory'
                    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    assert_eq!(fixture.text(locks).await, "0");
}

/// A session that can't be made as good as new is not used as it is, also not the second time.
#[tokio::test(flavor = "multi_thread")]
async fn what_another_replicas_write_set_is_in_force_where_it_can_not_be_reset() {
    let fixture = Fixture::new("CREATE TABLE t (id int PRIMARY KEY)").await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let apply = async |writer: &mut Writer, name: &str, id| {
        let transaction = Program::new(&rules, &["t"]).transaction(&[insert(0, &[Integer(id)])]);
        let replica = fixture.replica(name);
        writer
            .apply(&replica, &NO_HASH, &transaction, &rules.rules)
            .await
    };
    let mut writer = fixture.writer().await;
    assert_eq!(apply(&mut writer, "r1", 1).await, Ok(Outcome::Applied));
    fixture
        .grant("REVOKE EXECUTE ON FUNCTION pg_advisory_unlock_all() FROM PUBLIC")
        .await;
    let refused = apply(&mut writer, "r2", 2).await;
    assert!(matches!(refused, Err(Error::Definite(_))), "{refused:?}");
    assert!(!writer.is_usable());
    assert!(apply(&mut writer, "r2", 2).await.is_err());
    assert_eq!(fixture.text("SELECT count(*)::text FROM t").await, "1");
    fixture
        .grant("GRANT EXECUTE ON FUNCTION pg_advisory_unlock_all() TO PUBLIC")
        .await;
    let mut writer = fixture.writer().await;
    assert_eq!(apply(&mut writer, "r2", 2).await, Ok(Outcome::Applied));
}

/// What the streamer grants it grants as it starts. A role that is made later lacks that, and not a right to write.
#[tokio::test(flavor = "multi_thread")]
async fn updates_of_a_role_that_was_made_later_are_rejected() {
    let fixture = Fixture::new("CREATE TABLE t (id int PRIMARY KEY, seen text)").await;
    let late = format!("{} late", fixture.database.name());
    let make = format!(
        "CREATE ROLE \"{late}\"; GRANT \"{late}\" TO {{login}}; GRANT ALL ON t TO \"{late}\""
    );
    fixture.grant(&make).await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let mut program = Program::new(&rules, &["t"]);
    let all = [
        program.transaction(&[insert(0, &[Integer(1), Null])]),
        program.transaction(&[update(0, &[Integer(1)], "01", &[Text("new")])]),
    ];
    let replica = Replica {
        role: Some(late.clone()),
        ..fixture.replica("r1")
    };
    let mut writer = fixture.writer().await;
    let refused = writer
        .apply_many(&replica, &NO_HASH, &all, &rules.rules)
        .await;
    assert!(
        matches!(refused.error, Some(Error::Definite(_))),
        "{refused:?}"
    );
    assert!(refused.outcomes.is_empty(), "{refused:?}");
    let grant = format!(
        "GRANT USAGE ON SCHEMA anabranch TO \"{late}\"; GRANT EXECUTE ON FUNCTION anabranch.refuse TO \"{late}\""
    );
    fixture.grant(&grant).await;
    let applied = writer
        .apply_many(&replica, &NO_HASH, &all, &rules.rules)
        .await;
    assert_eq!(
        applied.outcomes,
        [Outcome::Applied, Outcome::Applied],
        "{:?}",
        applied.error
    );
}

/// A token that is renewed may say less than the one before.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_set_under_other_claims_is_seen_with_new_ones() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, seen text);
         CREATE FUNCTION remember() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             NEW.seen := nullif(current_setting('app.claims', true), '');
             PERFORM set_config('app.claims', current_setting('request.jwt.claims'), false);
             RETURN NEW; END $$;
         CREATE TRIGGER remember BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION remember()",
    )
    .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let mut replica = fixture.replica("r1");
    let mut previous = NO_HASH;
    for (id, claims) in [
        (1, r#"{"tenant":1}"#),
        (2, r#"{"tenant":1}"#),
        (3, r#"{"tenant":2}"#),
    ] {
        claims.clone_into(&mut replica.claims_json);
        let transaction = program.transaction(&[insert(0, &[Integer(id), Null])]);
        let outcome = writer
            .apply(&replica, &previous, &transaction, &rules.rules)
            .await;
        assert_eq!(outcome, Ok(Outcome::Applied));
        previous = transaction.hash;
    }
    let seen = "SELECT string_agg(coalesce(seen, '-'), ' ' ORDER BY id) FROM t";
    assert_eq!(fixture.text(seen).await, r#"- {"tenant":1} -"#);
}

/// A trigger may set the role of the session: it would come back as the transaction ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_a_trigger_sets_stays() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY);
         CREATE FUNCTION stay() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             EXECUTE format('SET ROLE %I', current_user); RETURN NEW; END $$;
         CREATE TRIGGER stay BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION stay()",
    )
    .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let all: Vec<_> = (1..=3)
        .map(|id| program.transaction(&[insert(0, &[Integer(id)])]))
        .collect();
    let replica = fixture.replica("r1");
    let applied = writer
        .apply_many(&replica, &NO_HASH, &all, &rules.rules)
        .await;
    assert_eq!(applied.error, None);
    assert_eq!(applied.outcomes, [(); 3].map(|()| Outcome::Applied));
    let other = Program::new(&rules, &["t"]).transaction(&[insert(0, &[Integer(4)])]);
    let replica = fixture.replica("r2");
    let outcome = writer.apply(&replica, &NO_HASH, &other, &rules.rules).await;
    assert_eq!(outcome, Ok(Outcome::Applied));
}

/// A trigger may leave the role, or other claims, and think that its own role is left.
#[tokio::test(flavor = "multi_thread")]
async fn what_comes_behind_a_trigger_that_resets_the_role_is_written_as_the_login_role() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, role text, claims text);
         CREATE FUNCTION leave() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             NEW.role := current_user;
             NEW.claims := current_setting('request.jwt.claims');
             RESET ROLE;
             PERFORM set_config('request.jwt.claims', '{}', true);
             RETURN NEW; END $$;
         CREATE TRIGGER leave BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION leave();
         CREATE TABLE seen (id int PRIMARY KEY, role text DEFAULT current_user);
         CREATE TABLE parent (id int PRIMARY KEY);
         CREATE TABLE child (parent int REFERENCES parent ON DELETE CASCADE);
         INSERT INTO parent VALUES (7);
         INSERT INTO child VALUES (7);
         CREATE FUNCTION child() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RESET ROLE; RETURN NULL; END $$;
         CREATE TRIGGER child AFTER DELETE ON child FOR EACH ROW EXECUTE FUNCTION child();
         CREATE TABLE late (role text);
         CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO late VALUES (current_user); RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER late AFTER INSERT ON seen DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION late()",
    )
    .await;
    let tables = ["t", "parent", "seen"];
    let rules = fixture.rules(&tables, &Policy::default()).await;
    let mut writer = fixture.writer().await;
    let row = |id| insert(0, &[Integer(id), Null, Null]);
    let mut program = Program::new(&rules, &tables);
    let transaction = program.transaction(&[insert(2, &[Integer(0), Null]), row(1), row(2)]);
    let cascading =
        program.transaction(&[delete(1, &[Integer(7)]), insert(2, &[Integer(1), Null])]);
    let replica = fixture.replica("r1");
    let outcome = writer
        .apply(&replica, &NO_HASH, &transaction, &rules.rules)
        .await;
    assert_eq!(outcome, Ok(Outcome::Applied));
    let app = fixture.app();
    assert_eq!(
        fixture
            .text("SELECT string_agg(concat_ws(' ', role, claims), ', ' ORDER BY id) FROM t")
            .await,
        format!(
            "{app} {claims}, {app} {claims}",
            claims = replica.claims_json
        )
    );
    assert_eq!(
        fixture
            .text("SELECT string_agg(role, ', ') FROM late")
            .await,
        app
    );
    let outcome = writer
        .apply(&replica, &transaction.hash, &cascading, &rules.rules)
        .await;
    match outcome {
        Ok(Outcome::Applied) => assert_eq!(
            fixture.text("SELECT role FROM seen WHERE id = 1").await,
            app
        ),
        // Since Postgres 18 a trigger of rows that a foreign key removes may not leave the role.
        Ok(Outcome::Rejected(why)) => assert_eq!((why.entry, &*why.sqlstate), (Some(0), "42501")),
        outcome => panic!("{outcome:?}"),
    }
}
